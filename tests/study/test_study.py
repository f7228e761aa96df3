"""Studies: what they compute, what they compare, and how they go on after they were stopped."""

import dataclasses
import math
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from purepruning_interop.report import render
from purepruning_interop.study import (
    CRITERIA,
    Method,
    Study,
    compared,
    methods_of,
    report_of,
    run_study,
)
from purepruning_interop.study.compare import interval, verdict
from purepruning_interop.study.networks import Outcomes
from tests.cli.calls import call, failed, start
from tests.messages import raises
from tests.study import tiny

pytestmark = pytest.mark.usefixtures("standard_promotion", "unoptimized")

FAST = ["level", "apoz_rank", "taylor_fo:weights", "wanda:weights"]


@pytest.fixture(scope="module")
def study(unoptimized):
    with jax.numpy_dtype_promotion("standard"):
        return run_study(tiny.task, FAST, sparsities=[0.25, 0.5], seeds=3, at_once=3)


def test_every_criterion_runs_in_one_study(study):
    assert [str(m) for m in study.methods] == [
        "random:weights",
        "random:channels",
        "level:weights",
        "apoz_rank:channels",
        "taylor_fo:weights",
        "wanda:weights",
    ]
    assert {o.tuned.shape for o in study.outcomes.values()} == {(3, 2)}
    assert study.dense.shape == (3,)
    # 96 weights in 12 channels of "a"; "b" is left whole.
    for outcome in study.outcomes.values():
        assert outcome.kept.tolist() == [[[72, 36], [48, 36]]] * 3


def test_a_cell_is_what_numpy_makes_of_it(study):
    """Level at half the weights of the network of seed 1, before fine-tuning."""
    params = {n: np.asarray(w) for n, w in tiny.descend(tiny.init(1), None, 20).items()}
    cut = np.sort(np.abs(params["a"]).ravel())[48]
    pruned = np.where(np.abs(params["a"]) >= cut, params["a"], 0)
    x, y = tiny.X[tiny.TEST], tiny.Y[tiny.TEST]
    right = np.argmax(np.maximum(x @ pruned, 0) @ params["b"], axis=-1) == y
    assert study.outcomes["level:weights"].pruned[1, 1] == pytest.approx(right.mean())
    dense = np.argmax(np.maximum(x @ params["a"], 0) @ params["b"], axis=-1) == y
    assert study.dense[1] == pytest.approx(dense.mean())


def test_what_is_batched_is_what_a_loop_finds(study):
    found = run_study(tiny.loop, FAST, sparsities=[0.25, 0.5], seeds=[2, 0])
    for name, outcome in found.outcomes.items():
        batched = study.outcomes[name]
        assert np.array_equal(outcome.kept, batched.kept[[2, 0]])
        # An example of 32 may fall on the other side by rounding.
        assert np.abs(outcome.pruned - batched.pruned[[2, 0]]).max() <= 1 / 32, name
        assert np.abs(outcome.tuned - batched.tuned[[2, 0]]).max() <= 2 / 32, name


@pytest.mark.full
def test_every_criterion_there_is():
    found = run_study(tiny.task, sparsities=[0.5], seeds=2, at_once=2)
    loop = run_study(tiny.torch_task(), sparsities=[0.5], seeds=2)
    assert len(found.outcomes) == len(methods_of())
    for name, outcome in found.outcomes.items():
        assert np.abs(outcome.pruned - loop.outcomes[name].pruned).max() <= 2 / 32, name


def test_torch_is_compared_as_jax_is(study):
    pruners = [*FAST, "sparse_gpt", "l1_norm"]
    found = run_study(tiny.torch_task(), pruners, sparsities=[0.25, 0.5], seeds=2)
    assert np.isfinite(found.outcomes["sparse_gpt:weights"].tuned).all()
    assert np.abs(found.dense - study.dense[:2]).max() <= 1 / 32
    for name, outcome in study.outcomes.items():
        assert np.array_equal(outcome.kept[:2], found.outcomes[name].kept)
        assert np.abs(outcome.pruned[:2] - found.outcomes[name].pruned).max() <= 2 / 32, name


def made(**scores):
    """A study of three networks at one sparsity, with these scores after fine-tuning."""
    methods = tuple(Method(*name.split("_on_")) for name in scores)
    column = {name: np.array(x, float)[:, None] for name, x in scores.items()}
    kept = np.full((3, 1, 2), [5, 4])
    of = {str(m): Outcomes(x, x, kept) for m, x in zip(methods, column.values(), strict=True)}
    return Study(
        "made",
        "score",
        methods,
        (0.5,),
        (0, 1, 2),
        1,
        "layer",
        ("a", "b"),
        ((2, 5), (4,)),
        np.array([10, 4]),
        np.array([True, False]),
        np.array([1.0, 2, 3]),
        of,
        {},
    )


def test_leads_are_of_pairs():
    found = made(random_on_weights=[1, 5, 9], level_on_weights=[2, 7, 12])
    chance, level = compared(found)
    assert chance.tuned_lead is None
    assert verdict(chance.tuned_lead) == "baseline"
    assert level.density == 0.5  # of the layer that is pruned
    # Differences 1, 2, 3: t of two degrees of freedom is 4.302653 at 97.5 %.
    half = 4.302653 / math.sqrt(3)
    assert level.tuned_lead == pytest.approx((2, 1, 2 - half, 2 + half), rel=1e-6)
    assert verdict(level.tuned_lead) == "no difference"
    assert level.tuned.deviation == pytest.approx(5)
    ahead = made(random_on_weights=[1, 5, 9], level_on_weights=[2, 6.1, 10.2])
    assert verdict(compared(ahead)[1].tuned_lead) == "ahead"
    behind = made(random_on_weights=[1, 5, 9], level_on_weights=[0, 3.9, 7.8])
    assert verdict(compared(behind)[1].tuned_lead) == "behind"


def test_one_number_has_no_interval():
    assert math.isnan(interval([3.0]).low)


@pytest.mark.parametrize(
    ("change", "error", "parts"),
    [
        ({"pruners": ["levle"]}, ValueError, ["'levle'", "'level'"]),
        ({"pruners": ["level:channels"]}, ValueError, ["'level' ranks weights", "level:weights"]),
        ({"pruners": []}, ValueError, ["no pruners"]),
        ({"seeds": 1}, ValueError, ["at least two"]),
        ({"seeds": [3, 3]}, ValueError, ["two different"]),
        ({"sparsities": []}, ValueError, ["no sparsities"]),
        ({"sparsities": [1.5]}, ValueError, ["1.5"]),
        ({"scope": "model"}, ValueError, ["scope", "'global'"]),
        ({"epochs": -1}, ValueError, ["epochs"]),
        ({"at_once": 0}, ValueError, ["at_once"]),
        ({"task": "tiny"}, TypeError, ["run_study: task", "Task"]),
    ],
)
def test_wrong_arguments(change, error, parts):
    arguments = {"task": tiny.task, "pruners": ["level"], **change}
    with raises(error, *parts):
        run_study(arguments.pop("task"), arguments.pop("pruners"), **arguments)


def test_a_task_without_what_a_criterion_needs():
    task = dataclasses.replace(tiny.task, loss=None)
    with raises(ValueError, "'tiny' has no loss", "gradients", "leave out"):
        run_study(task, ["taylor_fo"], seeds=2)
    task = dataclasses.replace(tiny.task, batches=[])
    with raises(ValueError, "'tiny' has no batches", "inputs"):
        run_study(task, ["wanda"], seeds=2)


def test_methods_of_all():
    assert {m.criterion for m in methods_of()} == set(CRITERIA)
    assert [str(m) for m in methods_of()][:2] == ["random:weights", "random:channels"]


SMALL = {"sparsities": [0.5], "seeds": 2}  # and the loop, in which little is compiled


class Stopped(Exception):
    pass


def test_a_stopped_study_goes_on_and_trains_nothing_twice(tmp_path):
    trained = []

    def train(params, seed):
        trained.append(seed)
        return tiny.task.train(params, seed)

    task = dataclasses.replace(tiny.task, train=train, traced=False)

    def stop(done, total, what):
        if done == 5:
            raise Stopped

    with pytest.raises(Stopped):
        run_study(task, ["level", "l1_norm"], folder=tmp_path, progress=stop, **SMALL)
    file = tmp_path / "results.jsonl"
    whole = file.read_bytes()
    assert len(whole.splitlines()) == 5  # a network, and four methods on it
    file.write_bytes(whole + whole.splitlines()[-1][:17])  # killed while it wrote
    found = run_study(task, ["level", "l1_norm"], folder=tmp_path, **SMALL)
    assert trained == [0, 1]
    assert len(file.read_bytes().splitlines()) == 10
    alone = run_study(task, ["level", "l1_norm"], **SMALL)
    for name, outcome in alone.outcomes.items():
        assert np.array_equal(outcome.tuned, found.outcomes[name].tuned)

    trained.clear()
    more = run_study(task, ["taylor_fo"], folder=tmp_path, sparsities=[0.5], seeds=3)
    assert trained == [2]
    assert np.array_equal(
        more.outcomes["random:weights"].tuned[:2], found.outcomes["random:weights"].tuned
    )


def test_results_of_another_study_are_not_mixed_in(tmp_path):
    run_study(tiny.loop, ["level"], folder=tmp_path, **SMALL)
    with raises(ValueError, "sparsities", "[0.5]", "[0.75]", "choose another folder"):
        run_study(tiny.task, ["level"], folder=tmp_path, sparsities=[0.75], seeds=2)
    with raises(ValueError, "epochs 2", "got 7"):
        run_study(tiny.task, ["level"], folder=tmp_path, epochs=7, **SMALL)
    (tmp_path / "results.jsonl").write_text("nothing\n")
    with raises(ValueError, "line 1", "results.jsonl", "remove the line"):
        run_study(tiny.task, ["level"], folder=tmp_path, **SMALL)


def test_the_report_says_what_was_found_and_done(study):
    page = render(report_of(study, ["purepruning study tiny"]))
    assert "tiny: 4 criteria against chance" in page
    assert "of 8 comparisons" in page
    assert "purepruning study tiny" in page
    assert "Made up." in page
    assert "96 of 132 weights" in page
    one = report_of(made(random_on_weights=[1, 5, 9], level_on_weights=[2, 7, 12]))
    (table,) = [s for s in one.sections if s.title == "Every comparison"]
    assert [cell if isinstance(cell, str) else cell[0] for cell in table.rows[0]] == [
        "level",
        "weights",
        "50 %",
        "7 ± 5",
        "+2 [−0.4841, +4.484]",
        "no difference",
        "7 ± 5",
        "50.0 %",
    ]


# The command.

HERE = Path(__file__).parent
LINE = ["tiny:loop", "--pruners", "level,l1_norm", "--sparsities", "0.5", "--seeds", "2"]


def test_a_killed_command_goes_on(tmp_path, capsys, monkeypatch):
    options = {"cwd": HERE, "env": {"JAX_PLATFORMS": "cpu"}}
    process = start("study", *LINE, "--out", tmp_path / "s", **options)
    file, patience = tmp_path / "s/results.jsonl", time.monotonic() + 120
    while not (file.exists() and file.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None or file.exists(), process.communicate()
        assert time.monotonic() < patience
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = file.read_bytes()
    monkeypatch.chdir(HERE)
    monkeypatch.syspath_prepend(HERE)
    found = call(capsys, "study", *LINE, "--out", tmp_path / "s", "--json")
    assert found.status == 0, found.err
    assert file.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    assert len(file.read_text().splitlines()) == 10
    methods = [row["method"] for row in found.json["comparisons"]]
    assert methods == ["random:weights", "random:channels", "level:weights", "l1_norm:channels"]
    page = Path(found.json["report"]).read_text()
    assert "study tiny:loop --pruners level,l1_norm --sparsities 0.5 --seeds 2 --out" in page
    shown = call(capsys, "study", *LINE, "--out", tmp_path / "s")
    assert "random" in shown.out
    assert "report.html" in shown.out


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["digit"], ["'digit'", "package.module:task"]),
        ([*LINE, "--sparsities", "0.5;0.9"], ["--sparsities", "0.5,0.9"]),
        ([*LINE, "--pruners", "levle"], ["'levle'", "'level'"]),
        ([*LINE, "--scope", "model"], ["scope", "'model'"]),
    ],
)
def test_what_is_wrong_is_one_line(line, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(HERE)
    monkeypatch.syspath_prepend(HERE)
    failed(capsys, 1, "study", *line, "--out", tmp_path / "s", says=says)


def test_a_folder_that_cannot_be_written(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(HERE)
    monkeypatch.syspath_prepend(HERE)
    (tmp_path / "file").write_text("")
    failed(capsys, 3, "study", *LINE, "--out", tmp_path / "file" / "s", says=["file"])
