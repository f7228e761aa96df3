"""``purepruning run``: what it prints and writes, what it refuses, and a run that is killed."""

import json
import signal
import time

import numpy as np
import pytest
import safetensors.numpy

from tests.cli.calls import call, failed, finished, start
from tests.runs import tasks

TASKS = f"{tasks.__name__}:"
pytestmark = pytest.mark.usefixtures("unoptimized", "standard_promotion")
AGP = {
    "use": "agp",
    "rules": [{"final_sparsity": 0.5, "end_epoch": 6, "frequency": 1, "op_names": ["w"]}],
}


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({"purepruning": 1, "steps": [AGP]}))
    return path


def test_what_a_run_prints_and_writes(tmp_path, capsys, recipe):
    out = tmp_path / "run"
    arguments = ("run", recipe, "--task", f"{TASKS}small", "-o", out, "--epochs", "0")
    found = call(capsys, *arguments)
    assert (found.status, found.err) == (0, "")
    lines = found.out.splitlines()
    assert lines[0].split() == ["step", "stage", "density", "score", "time"]
    assert lines[1].split()[:2] == ["train", "100.0%"]
    assert lines[8].split()[:5] == ["0", "agp", "epoch", "6", "50.0%"]
    assert {p.name for p in out.iterdir()} >= {
        "resolved.json",
        "history.jsonl",
        "weights.safetensors",
        "masks.safetensors",
        "report.html",
    }
    page = (out / "report.html").read_text()
    assert "small: agp" in page
    assert f"--task {TASKS}small --seed 0 --epochs 0 -o {out}" in page
    again = call(capsys, *arguments, "--json").json
    assert again["history"] == [
        json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()
    ]
    assert again["density"] == 0.5


def test_a_network_that_is_trained_already(tmp_path, capsys, recipe):
    w = np.arange(32, dtype=np.float32).reshape(8, 4)
    safetensors.numpy.save_file(
        {"w": w, "v": np.ones((4, 2), np.float32)}, tmp_path / "m.safetensors"
    )
    options = ("--task", f"{TASKS}small", "--weights", tmp_path / "m.safetensors")
    found = call(capsys, "run", recipe, *options, "-o", tmp_path / "run", "--json").json
    want = -np.abs(w - np.asarray(tasks.TARGET)).mean()
    assert found["history"][0]["score"] == pytest.approx(want)
    content = {"w": w.T.copy(), "v": np.ones((4, 2), np.float32)}
    safetensors.numpy.save_file(content, tmp_path / "m.safetensors")
    failed(capsys, 1, "run", recipe, *options, "-o", tmp_path / "b", says="(4, 8)")


@pytest.mark.parametrize(
    ("content", "task", "says"),
    [
        ('{"purepruning": 1, "steps": [{"use": "agpp"}]}', "small", "nearest: 'agp'"),
        ('{"purepruning": 1, "steps": [', "small", "line 1"),
        (None, "smal", "nearest: 'small'"),
        (None, "not_a_task", "must be a Task"),
        (None, "failing", "raised RuntimeError: no data"),
    ],
)
def test_wrong_recipes_and_tasks(tmp_path, capsys, recipe, content, task, says):
    if content is not None:
        recipe.write_text(content)
    out = tmp_path / "run"
    failed(capsys, 1, "run", recipe, "--task", f"{TASKS}{task}", "-o", out, says=says)
    assert not out.exists()


def test_what_is_not_there(tmp_path, capsys, recipe):
    out = tmp_path / "run"
    failed(capsys, 1, "run", tmp_path / "no.json", "--task", f"{TASKS}small", "-o", out, says="no.")
    failed(capsys, 1, "run", recipe, "--task", "nowhere:task", "-o", out, says="no module")
    failed(capsys, 1, "run", recipe, "--task", "digit", "-o", out, says="digits")
    (tmp_path / "file").write_text("")
    options = ("--task", f"{TASKS}small", "-o", tmp_path / "file")
    failed(capsys, 3, "run", recipe, *options, says="cannot be written")


@pytest.mark.parametrize("also_terminated", [False, pytest.param(True, marks=pytest.mark.full)])
def test_a_killed_run_goes_on(tmp_path, capsys, recipe, also_terminated):
    """Killed in the middle of its fifth stage, and terminated somewhere, it ends the same."""
    out, whole = tmp_path / "run", tmp_path / "whole"
    arguments = ("run", recipe, "--task", f"{TASKS}small", "--epochs", "1")
    done = finished(start(*arguments, "-o", out, env={"STOP_AT": "5"}))
    assert done.status == -signal.SIGKILL
    assert (out / "history.jsonl").read_text().count("\n") == 4
    if also_terminated:
        process = start(*arguments, "-o", out)
        while process.poll() is None and (out / "history.jsonl").read_text().count("\n") < 6:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        done = finished(process)
        assert done.status in (0, 143)
        assert "Traceback" not in done.err
    found = call(capsys, *arguments, "-o", out, "--json").json
    want = call(capsys, *arguments, "-o", whole, "--json").json
    # Other processes compile otherwise.
    for got, row in zip(found["history"], want["history"], strict=True):
        assert got["score"] == pytest.approx(row["score"], rel=1e-5)
        assert (got["what"], got["density"]) == (row["what"], row["density"])
    weights = [safetensors.numpy.load_file(x / "weights.safetensors")["w"] for x in (out, whole)]
    np.testing.assert_allclose(*weights, rtol=1e-6)
