"""Recipes done to small tasks in a folder: beside NumPy, and killed and resumed."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

import purepruning as pp
from purepruning_interop.checkpoints import NotWritten
from purepruning_interop.recipes import read_recipe
from purepruning_interop.runs import RunFolder, Settings, run_recipe, stages_of
from purepruning_interop.runs.work import State, Work
from tests.runs import tasks

pytestmark = pytest.mark.usefixtures("unoptimized", "standard_promotion")

LEVEL = {"use": "level", "rules": [{"sparsity": 0.5, "op_names": ["w"]}]}
AGP = {
    "use": "agp",
    "rules": [{"final_sparsity": 0.5, "end_epoch": 4, "frequency": 2, "op_names": ["w"]}],
}
TICKETS = {
    "use": "lottery_ticket",
    "rules": [{"sparsity": 0.75, "prune_iterations": 2, "op_names": ["w"]}],
}
FILTERS = {"use": "l1_filter", "rules": [{"sparsity": 0.5, "op_names": ["w"]}]}
TAYLOR = {"use": "taylor_fo_weight_filter", "rules": [{"sparsity": 0.25, "op_names": ["w"]}]}
APOZ = {"use": "activation_apoz_rank_filter", "rules": [{"sparsity": 0.25, "op_names": ["w"]}]}
NETADAPT = {"use": "net_adapt", "rules": [{"sparsity": 0.2, "op_types": ["default"]}]}
ADMM = {
    "use": "admm",
    "rules": [{"sparsity": 0.5, "op_names": ["w"]}],
    "args": {"num_iterations": 2, "training_epochs": 2, "row": 0.5},
}
SHRINK = {"use": "shrink"}
AUTO = {
    "use": "auto_compress",
    "rules": [{"sparsity": 0.5, "op_names": ["w", "u"]}],
    "args": {
        "num_iterations": 2,
        "admm_num_iterations": 1,
        "admm_training_epochs": 1,
        "cool_down_rate": 0.2,
    },
}
QAT = {
    "use": "qat",
    "rules": [{"quant_types": ["weight"], "quant_bits": 4, "op_names": ["w"]}],
}


def recipe(*steps, **more):
    return read_recipe({"purepruning": 1, "steps": list(steps), **more})


def toward(w, seed, epochs):
    for _ in range(epochs):
        w = (w + np.asarray(tasks.TARGET) + np.float32(seed / 1000)) / 2
    return w


def without_lowest(w, k):
    w = w.copy()
    w.reshape(-1)[np.argsort(np.abs(w.reshape(-1)), kind="stable")[:k]] = 0
    return w


def test_training_pruning_and_tuning_one_after_the_other(tmp_path):
    found = run_recipe(recipe(LEVEL), tasks.small(), tmp_path, Settings(seed=0, epochs=2))
    w = without_lowest(toward(np.full((8, 4), 0.5, np.float32), 0, 2), 16)
    tuned = np.where(w != 0, toward(w, 1000, 2), 0)
    np.testing.assert_allclose(found.state.params["w"], tuned, rtol=1e-6)
    assert [row["what"] for row in found.history] == ["train", "prune", "tune, 2 epochs"]
    assert [row["density"] for row in found.history] == [1.0, 0.5, 0.5]
    want = -np.abs(tuned - np.asarray(tasks.TARGET)).mean()
    assert found.history[-1]["score"] == pytest.approx(want)
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == found.history
    written = safetensors.numpy.load_file(tmp_path / "weights.safetensors")
    np.testing.assert_array_equal(written["w"], found.state.params["w"])
    masks = pp.load_masks(tmp_path / "masks.safetensors", found.state.params)
    np.testing.assert_array_equal(masks["w"], written["w"] != 0)
    assert read_recipe(tmp_path / "resolved.json").resolved() == recipe(LEVEL).resolved()


def test_steps_add_to_what_is_pruned(tmp_path):
    found = run_recipe(recipe(FILTERS, LEVEL), tasks.small(), tmp_path, Settings(epochs=0))
    w = np.asarray(found.state.params["w"])
    # The target grows along rows, so that the first two columns are the smallest.
    assert (w[:, :2] == 0).all()
    assert (w != 0).sum() == 16


def test_gradual_pruning_prunes_when_it_is_due(tmp_path):
    found = run_recipe(recipe(AGP), tasks.small(), tmp_path, Settings(epochs=0))
    kept = [round(row["density"] * 32) for row in found.history]
    assert [row["what"].endswith("pruned") for row in found.history[1:]] == [
        True,
        False,
        True,
        False,
        False,
    ]
    assert kept[0] == 32
    assert kept[-1] == 16
    assert kept == sorted(kept, reverse=True)


def test_tickets_go_back_to_their_start(tmp_path):
    found = run_recipe(recipe(TICKETS), tasks.small(), tmp_path, Settings(epochs=1))
    start = np.full((8, 4), 0.5, np.float32)
    trained = without_lowest(toward(start, 0, 2), 16)  # half of what is left, twice
    first = np.where(trained != 0, toward(start, 1001, 1), 0)
    second = without_lowest(first, 24)
    want = np.where(second != 0, toward(start, 1002, 1), 0)
    np.testing.assert_allclose(found.state.params["w"], want, rtol=1e-6)


def test_statistics_are_those_of_the_tasks_batches(tmp_path):
    task = tasks.small()
    taylor = run_recipe(recipe(TAYLOR), task, tmp_path / "a", Settings(epochs=0))
    w = np.asarray(toward(np.full((8, 4), 0.5, np.float32), 0, 2))
    grads = jax.grad(tasks._loss)({"w": jnp.asarray(w), "v": jnp.ones((4, 2))}, task.batches[0])
    scores = (np.asarray(grads["w"]) * w) ** 2
    gone = np.flatnonzero((np.asarray(taylor.state.params["w"]) == 0).all(0))
    assert gone.tolist() == [int(scores.sum(0).argmin())]
    apoz = run_recipe(recipe(APOZ), task, tmp_path / "b", Settings(epochs=0))
    # All outputs are positive: ties go to the lower index.
    assert (np.asarray(apoz.state.params["w"]) == 0).all(0).tolist() == [True, False, False, False]


def test_searches_meet_their_budget_and_keep_their_trials(tmp_path):
    settings = Settings(epochs=0, trial_epochs=1)
    found = run_recipe(recipe(NETADAPT), tasks.small(), tmp_path, settings)
    assert found.history[-1]["what"] == "search"
    assert found.history[-1]["density"] <= 0.8
    assert (tmp_path / "search-0" / "trials.jsonl").read_text().count("\n") > 1


def test_admm_pulls_weights_towards_pruned_ones(tmp_path):
    step = {**ADMM, "args": {**ADMM["args"], "base_algo": "level"}}
    found = run_recipe(recipe(step), tasks.square(), tmp_path, Settings(epochs=0))
    whats = ["train", "iteration 1 of 2", "iteration 2 of 2", "prune"]
    assert [row["what"] for row in found.history] == whats
    assert [row["density"] for row in found.history] == [1, 1, 1, 0.5]
    # By hand: two steps of gradient descent on the loss and the penalty, then the projection.
    target = np.asarray(tasks.TARGET)
    w = toward(np.full((8, 4), 0.5, np.float32), 0, 2)
    z, u = w, 0 * w
    for _ in range(2):
        for _ in range(2):
            w = w - np.float32(0.5) * ((w - target) + np.float32(0.5) * (w - z + u))
        z = without_lowest(w + u, 16)
        u = u + w - z
    np.testing.assert_allclose(found.state.params["w"], without_lowest(w, 16), rtol=1e-5)


def test_auto_compress_leaves_what_its_budget_allows_and_writes_it(tmp_path):
    task = tasks.deep()
    found = run_recipe(recipe(AUTO), task, tmp_path, Settings(epochs=1))
    assert [row["what"] for row in found.history[1:4]] == [
        "round 1 of 2: search",
        "round 1 of 2: iteration 1 of 1",
        "round 1 of 2: prune",
    ]
    assert [row["what"] for row in found.history[-2:]] == ["tune, 1 epochs", "shrink"]
    # Of w (8, a), u (a, b) and v (b, 2), 8 * 16 + 16 * 12 + 12 * 2 = 344 before.
    sizes = json.loads((tmp_path / "small.json").read_text())
    a, b = sizes["layers"]["u"]
    assert sizes["params"] == [344, 8 * a + a * b + 2 * b]
    assert sizes["params"][1] <= 172
    # The first round leaves 344 * 0.5 ** 0.5 at most, and no group gets anything back.
    trials = [
        [
            json.loads(x)
            for x in (tmp_path / f"search-0-{i}" / "trials.jsonl").read_text().splitlines()
        ]
        for i in range(2)
    ]
    assert all(row["resource"]["params"] <= 243 for row in trials[0])
    left = [row["density"] for row in found.history]
    assert left[1] == 1 > left[3] > left[6] == left[-1]
    small = pp.rebuild(task.apply, task.init(0), pp.load_plan(found.files["plan"]), jnp.eye(8))
    params = safetensors.numpy.load_file(found.files["small"])
    want = task.apply(found.state.params, jnp.eye(8))
    np.testing.assert_allclose(small.fn(params, jnp.eye(8)), want, rtol=1e-5)


@pytest.mark.parametrize("make", [tasks.small, tasks.smaller_of_torch])
def test_a_smaller_model_computes_what_the_pruned_one_does(tmp_path, make):
    task = make()
    (name, x) = ("w", jnp.ones((3, 8))) if task.traced else ("fc", torch.ones(3, 4))
    step = {"use": "l1_filter", "rules": [{"sparsity": 0.5, "op_names": [name]}]}
    found = run_recipe(recipe(step, SHRINK), task, tmp_path, Settings(epochs=1))
    assert found.history[-1]["what"] == "shrink"
    assert found.history[-1]["score"] == found.history[-2]["score"]
    plan = pp.load_plan(found.files["plan"])
    if task.traced:
        small = pp.rebuild(task.apply, task.init(0), plan, x)
        params = safetensors.numpy.load_file(found.files["small"])
        assert params["w"].shape == (8, 2)
        np.testing.assert_allclose(
            small.fn(params, x), task.apply(found.state.params, x), rtol=1e-6
        )
    else:
        from purepruning_interop.torch import rebuild

        small = rebuild(task.model, plan, *task.inputs).model
        arrays = safetensors.torch.load_file(found.files["small"])
        small.load_state_dict(arrays)
        assert arrays["fc.weight"].shape == (3, 4)
        task.model.load_state_dict(found.state.params)
        torch.testing.assert_close(small(x), task.model(x))


def quantised(w, bits):
    """By hand: the range with zero in it, in 2**bits - 1 steps."""
    low, high = min(w.min(), 0), max(w.max(), 0)
    scale = np.float32((high - low) / (2**bits - 1))
    zero = np.round(-low / scale)
    return (np.clip(np.round(w / scale) + zero, 0, 2**bits - 1) - zero) * scale


def test_quantised_training_and_its_checkpoint(tmp_path):
    task = tasks.square()
    found = run_recipe(recipe(LEVEL, QAT), task, tmp_path, Settings(epochs=2))
    assert found.history[-1]["what"] == "quantise, 2 epochs"
    target = np.asarray(tasks.TARGET)
    w = without_lowest(toward(np.full((8, 4), 0.5, np.float32), 0, 2), 16)
    kept = w != 0
    w = np.where(kept, toward(w, 1000, 2), 0)
    for _ in range(2):  # straight through: the gradient of the quantised weights
        w = np.where(kept, w - np.float32(0.5) * (quantised(w, 4) - target), 0)
    np.testing.assert_allclose(found.state.params["w"], w, rtol=1e-5)
    whole = pp.load_quantized(found.files["quantized"], found.state.params)
    np.testing.assert_allclose(whole.params["w"], quantised(w, 4), rtol=1e-5)
    assert ((np.asarray(whole.params["w"]) != 0) <= kept).all()
    # The score is that of what was written.
    assert found.history[-1]["score"] == pytest.approx(float(task.evaluate(whole.params)))
    calibration = json.loads((tmp_path / "quantized.json").read_text())
    assert calibration["w"]["weight_bits"] == 4


def test_ranges_by_optuna(tmp_path):
    rule = {"sparsity": {"range": [0.25, 0.75], "type": "float"}, "op_names": ["w"]}
    searched = recipe({"use": "level", "rules": [rule]})
    more = {"samples": 6, "by": "optuna"}
    found = run_recipe(searched, tasks.small(), tmp_path, Settings(epochs=0), **more)
    rows = [json.loads(x) for x in (tmp_path / "ranges" / "trials.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    assert found.history[-1]["score"] == pytest.approx(max(row["score"] for row in rows))
    again = run_recipe(searched, tasks.small(), tmp_path, Settings(epochs=0), **more)
    assert again.values == found.values


def test_ranges_are_searched_first(tmp_path):
    choices = {"range": [0.25, 0.75], "type": "choice"}
    rule = {"sparsity": choices, "op_names": ["w"]}
    searched = recipe({"use": "level", "rules": [rule]})
    found = run_recipe(searched, tasks.small(), tmp_path, Settings(epochs=0))
    assert found.values == {"0.sparsity": 0.25}
    assert found.history[-1]["density"] == 0.75
    assert read_recipe(tmp_path / "best.json").ranges == {}
    again = run_recipe(searched, tasks.small(), tmp_path, Settings(epochs=0))
    assert again.history == found.history


def test_torch_tasks(tmp_path):
    rules = [{"sparsity": 0.5, "op_names": ["fc"]}]
    found = run_recipe(
        recipe({"use": "l1_filter", "rules": rules}, framework="torch"),
        tasks.of_torch(),
        tmp_path,
        Settings(epochs=1),
    )
    want = torch.tensor([[0.0, 0, 0, 0], [7.5, 9, 10.5, 12]])
    torch.testing.assert_close(found.state.params["weight"], want)
    assert found.state.params["bias"].tolist() == [0, 3]
    assert (
        run_recipe(
            recipe({"use": "l1_filter", "rules": rules}, framework="torch"),
            tasks.of_torch(),
            tmp_path,
            Settings(epochs=1),
        ).history
        == found.history
    )


class Stopped(Exception):
    pass


STOPPED = {
    "agp and tickets": ((AGP, TICKETS), range(1, 9), (2, 6, 8)),
    "admm and shrink": ((ADMM, SHRINK), range(1, 6), (2,)),
    "auto_compress": ((AUTO,), range(1, 9), ()),
    "level and qat": ((LEVEL, QAT), range(1, 5), (4,)),
}


@pytest.mark.parametrize(
    ("name", "at"),
    [
        pytest.param(name, n, marks=[pytest.mark.full] * (n not in quick))
        for name, (_, numbers, quick) in STOPPED.items()
        for n in numbers
    ],
)
def test_a_run_that_stops_anywhere_goes_on_and_ends_the_same(tmp_path, name, at):
    """Stopped after each stage, and in the middle of the next: the same numbers come out."""
    steps = recipe(*STOPPED[name][0])

    def stop(done, of, what):
        if done == at:
            raise Stopped

    make = tasks.deep if name == "auto_compress" else tasks.small
    whole = run_recipe(steps, make(), tmp_path / "whole", Settings(epochs=1))
    with pytest.raises(Stopped):
        run_recipe(steps, make(), tmp_path / "a", Settings(epochs=1), show=stop)
    with (tmp_path / "a" / "history.jsonl").open("a") as file:
        file.write('{"stage": 99}\n')  # as if it ended between row and state
    seen = []
    found = run_recipe(
        steps,
        make(),
        tmp_path / "a",
        Settings(epochs=1),
        show=lambda done, of, what: seen.append(done),
    )
    assert seen[0] == at

    def numbers(rows):
        return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]

    assert numbers(found.history) == numbers(whole.history)
    files = {p.name for p in (tmp_path / "whole").glob("*.safetensors")}
    assert files == {p.name for p in (tmp_path / "a").glob("*.safetensors")}
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert len(list((tmp_path / "a").glob("state-*"))) == 1


@pytest.mark.parametrize(
    ("step", "task", "says"),
    [
        (TAYLOR, tasks.bare, "needs 'loss' of the task"),
        (APOZ, tasks.bare, "needs 'capture' of the task"),
        ({**TAYLOR, "args": {"statistics_batch_num": 5}}, tasks.small, "has 2 batches"),
        ({**FILTERS, "args": {"dependency_aware": True}}, tasks.bare, "needs 'apply'"),
        (ADMM, tasks.bare, "needs 'minimize' of the task 'small'"),
        (AUTO, tasks.bare, "step 0 .auto_compress.: it needs 'apply'"),
        (QAT, tasks.bare, "needs 'minimize' of the task 'small'"),
        (SHRINK, tasks.small, "no step before prunes any"),
        (
            {"use": "level", "rules": [{"sparsity": 0.5, "op_names": ["x"]}]},
            tasks.small,
            "step 0 .level.: .*rule 0.*'w'",
        ),
    ],
)
def test_what_a_task_cannot_do_is_said_before_anything_runs(tmp_path, step, task, says):
    with pytest.raises(ValueError, match=says):
        run_recipe(recipe(step), task(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        ((LEVEL, SHRINK), r"step 1 .shrink.: it removes whole channels"),
        ((QAT, LEVEL), r"step 0 .qat.: it must be the last step.*behind step 1 .level."),
        ((FILTERS, SHRINK, LEVEL), r"step 1 .shrink.: it must be the last step"),
        (
            (LEVEL, {**QAT, "use": "dorefa"}),
            r"step 1 .dorefa.: dorefa has no integer for zero.*'qat' or 'naive'",
        ),
    ],
)
def test_steps_in_an_order_that_makes_no_sense(tmp_path, steps, says):
    with pytest.raises(ValueError, match=says):
        run_recipe(recipe(*steps), tasks.small(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_tuning_that_revives_pruned_weights_is_the_tasks_mistake(tmp_path):
    """Stages before it are kept; weights that are kept may be NaN."""
    grown = dataclasses.replace(
        tasks.of_torch(),
        tune=lambda params, masks, seed, epochs: {
            n: x.to(torch.bfloat16) + (n == "weight") for n, x in params.items()
        },
    )
    of = recipe({"use": "level", "rules": [{"sparsity": 0.5, "op_names": ["fc"]}]})
    with pytest.raises(ValueError, match=r"'of torch': tune must leave .* 4 of 'weight' are not"):
        run_recipe(of, grown, tmp_path / "grown", Settings(epochs=1))
    rows = (tmp_path / "grown" / "history.jsonl").read_text().splitlines()
    assert [json.loads(row)["what"] for row in rows] == ["train", "prune"]
    state = State({"w": jnp.asarray([jnp.nan, 0.0])}, {"w": jnp.asarray([True, False])})
    work = Work(0, of.steps[0], tasks.deep(), Settings(), state.params, None)
    assert work.tune(state, 0, 1).params is state.params


def test_a_score_that_is_no_number_ends_a_run(tmp_path):
    scores = iter([1.0, float("nan")])
    task = dataclasses.replace(tasks.small(), evaluate=lambda params: next(scores))
    with pytest.raises(ValueError, match="'small': the score after 'prune' of step 0 is NaN"):
        run_recipe(recipe(LEVEL), task, tmp_path, Settings(epochs=0))
    assert not (tmp_path / "weights.safetensors").exists()


def test_frameworks_must_agree(tmp_path):
    with pytest.raises(ValueError, match="'torch', and the task 'small' is of JAX"):
        stages_of(recipe(LEVEL, framework="torch"), tasks.small(), Settings())


def test_a_folder_is_of_one_run(tmp_path):
    run_recipe(recipe(LEVEL), tasks.small(), tmp_path, Settings(epochs=0))
    for other, settings in ((LEVEL, Settings(epochs=1)), (AGP, Settings(epochs=0))):
        with pytest.raises(ValueError, match="asked for something else; name another folder"):
            run_recipe(recipe(other), tasks.small(), tmp_path, settings)
    found = run_recipe(recipe(AGP), tasks.small(), tmp_path, Settings(epochs=0), anew=True)
    assert len(found.history) == 6
    with RunFolder(tmp_path), pytest.raises(ValueError, match="another run is at work"):
        run_recipe(recipe(AGP), tasks.small(), tmp_path, Settings(epochs=0))
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"holds 'thesis.tex' and no run"):
        run_recipe(recipe(LEVEL), tasks.small(), mine)


def test_a_run_goes_on_after_the_disk_was_full(tmp_path, monkeypatch):
    save, calls = pp.save_state, iter(range(100))

    def full(*arguments, **more):
        if next(calls) == 1:
            raise OSError(28, "No space left on device")
        return save(*arguments, **more)

    monkeypatch.setattr(pp, "save_state", full)
    with pytest.raises(NotWritten, match="No space left"):
        run_recipe(recipe(LEVEL), tasks.small(), tmp_path, Settings(epochs=1))
    found = run_recipe(recipe(LEVEL), tasks.small(), tmp_path, Settings(epochs=1))
    whole = run_recipe(recipe(LEVEL), tasks.small(), tmp_path / "w", Settings(epochs=1))
    np.testing.assert_array_equal(found.state.params["w"], whole.state.params["w"])
    assert len(found.history) == 3
