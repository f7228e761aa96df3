"""Recipes done to small tasks in a folder: beside NumPy, and killed and resumed."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch

import purepruning as pp
from purepruning_interop.checkpoints import NotWritten
from purepruning_interop.recipes import read_recipe
from purepruning_interop.runs import RunFolder, Settings, run_recipe, stages_of
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


@pytest.mark.parametrize(
    "at", [n if n in (2, 6, 8) else pytest.param(n, marks=pytest.mark.full) for n in range(1, 9)]
)
def test_a_run_that_stops_anywhere_goes_on_and_ends_the_same(tmp_path, at):
    """Stopped after each stage, and in the middle of the next: the same numbers come out."""
    steps = recipe(AGP, TICKETS)

    def stop(done, of, what):
        if done == at:
            raise Stopped

    whole = run_recipe(steps, tasks.small(), tmp_path / "whole", Settings(epochs=1))
    with pytest.raises(Stopped):
        run_recipe(steps, tasks.small(), tmp_path / "a", Settings(epochs=1), show=stop)
    with (tmp_path / "a" / "history.jsonl").open("a") as file:
        file.write('{"stage": 99}\n')  # as if it ended between row and state
    seen = []
    found = run_recipe(
        steps,
        tasks.small(),
        tmp_path / "a",
        Settings(epochs=1),
        show=lambda done, of, what: seen.append(done),
    )
    assert seen[0] == at

    def numbers(rows):
        return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]

    assert numbers(found.history) == numbers(whole.history)
    for name in ("weights", "masks"):
        file = f"{name}.safetensors"
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert len(list((tmp_path / "a").glob("state-*"))) == 1


@pytest.mark.parametrize(
    ("step", "task", "says"),
    [
        (TAYLOR, tasks.bare, "needs 'loss' of the task"),
        (APOZ, tasks.bare, "needs 'capture' of the task"),
        ({**TAYLOR, "args": {"statistics_batch_num": 5}}, tasks.small, "has 2 batches"),
        ({**FILTERS, "args": {"dependency_aware": True}}, tasks.bare, "needs 'apply'"),
        ({"use": "admm", "rules": LEVEL["rules"]}, tasks.small, "create_compressor"),
        (
            {
                "use": "dorefa",
                "rules": [{"quant_types": ["weight"], "quant_bits": 8, "op_names": ["w"]}],
            },
            tasks.small,
            "this quantises",
        ),
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
