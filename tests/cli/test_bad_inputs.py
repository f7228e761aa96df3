"""Every command given what is wrong: one line that names it, and nothing is written."""

import json
import logging
import shutil

import numpy as np
import pytest
import torch

from tests.cli import broken_tasks as broken
from tests.cli.calls import call, failed, save, save_sharded
from tests.runs import tasks

BROKEN = f"{broken.__name__}:"
pytestmark = pytest.mark.usefixtures("unoptimized", "standard_promotion")


def with_header(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def row(dtype="F32", shape=(1,), at=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(at)}


FILES = {
    "header is a list": (with_header([1, 2]), "its header is no object"),
    "header is deep": (with_header(b"[" * 100_000), "not as the format says"),
    "header has no end": ((2**62).to_bytes(8, "little") + b"x" * 90, "longer than the file"),
    "header is no text": (with_header(b"\xff\xfe{}"), "not as the format says"),
    "metadata are a list": (with_header({"__metadata__": [1]}), "not as the format says"),
    "metadata are numbers": (with_header({"__metadata__": {"a": 1}}), "metadata are no text"),
    "negative shape": (with_header({"a": row(shape=(-1,), at=(0, -4))}), "must be whole numbers"),
    "shape of text": (with_header({"a": row(shape="x")}, b"0000"), "must be whole numbers"),
    "shape beyond the file": (with_header({"a": row(shape=(2**40,))}), "bytes of 'a' are not"),
    "dtype is a list": (with_header({"a": row(["F32"])}, b"0000"), "not as the format says"),
    "dtype of four bits": (with_header({"a": row("F4", (2,), (0, 1))}, b"0"), "dtype F4"),
    "no tensors": (with_header({}), "none of its 0 tensors"),
}


@pytest.mark.parametrize("which", FILES)
def test_damaged_files(tmp_path, capsys, which):
    content, says = FILES[which]
    source = tmp_path / "m.safetensors"
    source.write_bytes(content)
    failed(capsys, 1, "prune", source, "--sparsity", "0.5", "-o", tmp_path / "o", says=says)
    if which != "no tensors":
        failed(capsys, 1, "inspect", source, says=(str(source), says))
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "EOFError"),
        (b"\x80\x04.", "weights_only=True"),
        (b"PK\x05\x06" + bytes(18), "weights_only=True"),
        ([1], "no state dict"),
        ({"a": 3}, "holds no tensors"),
        ({"w": torch.ones(2, 2).to_sparse()}, "save it dense"),
        ({"w": torch.empty(2, 2, device="meta")}, "save it dense"),
        ({"fc.weight": torch.ones(2, 2, dtype=torch.complex64)}, "complex64"),
    ],
)
def test_state_dicts_that_are_none(tmp_path, capsys, content, says):
    source = tmp_path / "m.pt"
    if isinstance(content, bytes):
        source.write_bytes(content)
    else:
        torch.save(content, source)
    failed(capsys, 1, "prune", source, "--sparsity", "0.5", "-o", tmp_path / "o", says=says)
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt"]


def test_folders_in_the_place_of_files(tmp_path, capsys):
    for name in ("model.safetensors.index.json", "model.safetensors", "m.safetensors"):
        folder = tmp_path / f"of {name}"
        (folder / name).mkdir(parents=True)
        arguments = ("prune", folder, "--sparsity", "0.5", "-o", tmp_path / "o")
        failed(capsys, 1, *arguments, says=("Is a directory", name))
    source = save(tmp_path / "m.safetensors")
    arguments = ("prune", source, "--rules", tmp_path, "-o", tmp_path / "o")
    failed(capsys, 1, *arguments, says="Is a directory")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{}", ("rule 0 gives no sparsity", "name one in the rule")),
        ("[" * 100_000, "nested too deeply"),
        ("", "mend the JSON"),
        ("\xff", "UTF-8"),
        ('[{"sparsity": NaN}]', "nan"),
        ('[{"sparsity": "a"}]', "must be a number"),
        ('{"config_list": 5}', "list of objects"),
    ],
)
def test_rules(tmp_path, capsys, content, says):
    (tmp_path / "r.json").write_bytes(content.encode("latin1"))
    source = save(tmp_path / "m.safetensors")
    arguments = ("prune", source, "--rules", tmp_path / "r.json", "-o", tmp_path / "o")
    failed(capsys, 1, *arguments, says=says)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("config", ["{", "[1]"])
def test_a_config_that_cannot_say_what_is_packed(tmp_path, capsys, config):
    source = save_sharded(tmp_path / "model")
    (source / "config.json").write_text(config)
    options = ("--nm", "2:4", "--format", "compressed-tensors", "-o", tmp_path / "o")
    failed(capsys, 1, "prune", source, *options, says=("config.json", "mend the JSON"))
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_seeds_that_no_generator_takes(tmp_path, capsys):
    source = save(tmp_path / "m.safetensors")
    for seed in ("-1", str(2**64)):
        options = ("--sparsity", "0.5", "--pruner", "random", "--seed", seed)
        failed(capsys, 2, "prune", source, *options, "-o", tmp_path / "o", says="--seed")


def test_places_that_nobody_may_write_to(tmp_path, capsys):
    source = save(tmp_path / "m.safetensors")
    arguments = ("prune", source, "--sparsity", "0.5", "-o")
    failed(capsys, 3, *arguments, "/proc/nowhere/o", says="cannot be written")
    failed(capsys, 1, *arguments, "x" * 300, says="File name too long")
    failed(capsys, 2, *arguments, "a\0b", says="null byte")


def test_weights_at_infinity_stay_and_those_without_numbers_do_not_pass(tmp_path, capsys):
    for value, status in ((np.inf, 0), (np.nan, 1)):
        source = save(tmp_path / "m.safetensors", {"fc.weight": np.full((4, 4), value, np.float32)})
        out = tmp_path / f"{status}.safetensors"
        found = call(capsys, "prune", source, "--sparsity", "0.5", "-o", out)
        assert (found.status, out.exists()) == (status, not status)


@pytest.fixture
def recipe(tmp_path):
    step = {"use": "level", "rules": [{"sparsity": 0.5, "op_names": ["w"]}]}
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({"purepruning": 1, "steps": [step]}))
    return path


STUDY = ("--seeds", "2", "--sparsities", "0.5", "--pruners", "level")
TASKS = {
    "init_raises": ": init raised RuntimeError: no data; purepruning --traceback",
    "train_raises": ": train raised OSError: no disk",
    "tune_raises": ": tune raised AssertionError: mine",
    "evaluate_raises": ": evaluate raised AttributeError: no such thing",
    "evaluate_exits": ": evaluate raised SystemExit: 7",
    "evaluate_none": ": evaluate must return a scalar, got None",
    "evaluate_matrix": ": evaluate must return a scalar, got",
    "init_none": ": init must return a tree of arrays",
    "train_none": ": train must return params as it takes them",
    "train_other": ("there is no 'v'", "known: 'w'"),
    "train_turned": "'w' has shape (4, 8), not (8, 4)",
    "number": "must be a function without arguments, got 3",
    "exits": "raised SystemExit: 7",
    "nothing": "the module has no 'nothing'",
}


@pytest.mark.parametrize("name", TASKS)
def test_tasks(tmp_path, capsys, recipe, name):
    """What a task's function raises or returns is told as the task's, by either command."""
    task = f"{BROKEN}{name}"
    failed(capsys, 1, "run", recipe, "--task", task, "-o", tmp_path / "r", says=TASKS[name])
    failed(capsys, 1, "study", task, *STUDY, "-o", tmp_path / "s", says=TASKS[name])
    assert not (tmp_path / "s" / "report.html").exists()
    assert not (tmp_path / "r" / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("tune_alive", "tune must leave pruned weights at zero, and 16 of 'w' are not"),
        ("evaluate_nan", "the score after train is NaN"),
    ],
)
def test_tasks_whose_results_cannot_be_used(tmp_path, capsys, recipe, name, says):
    arguments = ("run", recipe, "--task", f"{BROKEN}{name}", "-o", tmp_path / "r")
    failed(capsys, 1, *arguments, says=("task 'small'", says))
    assert not (tmp_path / "r" / "weights.safetensors").exists()


@pytest.mark.parametrize("depth", [980, 100_000])  # JSON reads the first, and what checks it not
def test_recipes_that_are_nested_too_deeply(tmp_path, capsys, recipe, depth):
    rule = "[" * depth + "]" * depth
    recipe.write_text(f'{{"purepruning": 1, "steps": [{{"use": "level", "rules": {rule}}}]}}')
    arguments = ("run", recipe, "--task", f"{tasks.__name__}:small", "-o", tmp_path / "r")
    failed(capsys, 1, *arguments, says=str(recipe))


@pytest.mark.parametrize("name", ["a:b:c", ".a:b", "..:x", "1a:b", "a:", ":a", "a b:c"])
def test_names_of_tasks(tmp_path, capsys, recipe, name):
    failed(capsys, 1, "run", recipe, "--task", name, "-o", tmp_path / "r", says=name)
    failed(capsys, 1, "study", name, "-o", tmp_path / "s", says=name)
    assert not (tmp_path / "r").exists()
    assert not (tmp_path / "s").exists()


def test_modules_that_fail_when_they_are_imported(tmp_path, capsys, recipe, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for i, (text, says) in enumerate(
        [
            ("import nothing_there", "raised ModuleNotFoundError: No module named 'nothing_there'"),
            ("def (", "raised SyntaxError"),
            ("raise SystemExit(3)", "raised SystemExit: 3"),
        ]
    ):
        (tmp_path / f"fails_{i}.py").write_text(text)
        failed(capsys, 1, "study", f"fails_{i}:x", "-o", tmp_path / "s", says=says)
        failed(capsys, 1, "inspect", f"fails_{i}:x", says=says)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no_model", "must return a torch"),
        ("exits", "raised SystemExit: 7"),
        ("wrong_input", "must have same reduction dim"),
        ("not_numbers", "are NaN"),
    ],
)
def test_models(tmp_path, capsys, name, says):
    arguments = ("shrink", f"{BROKEN}{name}", "--sparsity", "0.5", "-o", tmp_path / "o")
    failed(capsys, 1, *arguments, says=says)
    assert list(tmp_path.iterdir()) == []
    assert logging.root.manager.disable == logging.NOTSET  # of what torch logs, nothing is shown


@pytest.mark.parametrize("how", ["garbage", "half"])
def test_folders_of_runs_that_are_damaged(tmp_path, capsys, recipe, how):
    out = tmp_path / "run"
    arguments = ("run", recipe, "--task", f"{tasks.__name__}:small")
    assert call(capsys, *arguments, "-o", out).status == 0
    state = next(p.name for p in out.glob("state-*"))
    for name in ("history.jsonl", "resolved.json", "run.json", state):
        damaged = tmp_path / f"damaged {name}"
        shutil.copytree(out, damaged)
        content = (out / name).read_bytes()
        half = content[: len(content) // 2]
        (damaged / name).write_bytes(half if how == "half" else b"\0garbage\n")
        failed(capsys, 1, *arguments, "-o", damaged, says=name)
        assert call(capsys, *arguments, "-o", damaged, "--overwrite").status == 0


@pytest.mark.parametrize("content", [b"", b"\0garbage", b"[1]", b"{"])
def test_folders_of_studies_that_are_damaged(tmp_path, capsys, content):
    (tmp_path / "study.json").write_bytes(content)
    arguments = ("study", f"{tasks.__name__}:small", *STUDY, "-o", tmp_path)
    failed(capsys, 1, *arguments, says=("study.json", "is damaged", "choose another folder"))
