"""What a task must give, how one is found by its name, and the digits task."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import purepruning as pp
from purepruning_interop.tasks import Task, find_task
from tests.messages import raises


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Writes modules into the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text)

    return write


@pytest.mark.parametrize(
    ("name", "error", "parts"),
    [
        ("digit", ValueError, ["'digit'", "digits", "package.module:task"]),
        ("tasks_none:", ValueError, ["'tasks_none:'", "write both parts"]),
        ("tasks_none:task", ModuleNotFoundError, ["no module 'tasks_none'"]),
        ("tasks_mine:tsk", AttributeError, ["has no 'tsk'", "'task'"]),
        ("tasks_mine:number", TypeError, ["must be a Task", "int"]),
        ("tasks_mine:nothing", TypeError, ["must be a Task", "NoneType"]),
        ("tasks_lacking:task", ModuleNotFoundError, ["No module named 'not_installed'"]),
    ],
)
def test_names_that_are_no_task(name, error, parts, modules):
    modules("tasks_mine", "number = 5\ndef nothing(): pass\ndef task(): pass\n")
    modules("tasks_lacking", "import not_installed\n")
    with raises(error, *parts):
        find_task(name)


def test_a_task_or_a_function_that_returns_one(modules):
    lines = ["from purepruning_interop.tasks import find_task", "made = find_task('digits')"]
    modules("tasks_given", "\n".join([*lines, "def make(): return made"]))
    assert find_task("tasks_given:made") is find_task("tasks_given:make")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"init": None}, ["'digits'", "init", "function"]),
        ({"loss": 5}, ["'digits'", "loss", "function"]),
        ({"layers": ()}, ["'digits'", "layers", "rows of the layer table"]),
        ({"layers": ["conv1"]}, ["'digits'", "layers"]),
    ],
)
def test_what_is_no_function_or_layer_is_refused(change, parts):
    with raises(TypeError, *parts):
        dataclasses.replace(find_task("digits"), **change)


@functools.cache
def networks():
    task = find_task("digits")
    return task, task.train(task.init(3), 3)


@pytest.fixture
def trained(standard_promotion):  # as a task's own program would run, for Optax needs it
    return networks()


def test_digits_are_learnt(trained):
    task, params = trained
    assert isinstance(task, Task)
    assert [x.name for x in task.layers] == ["conv1", "conv2", "hidden", "classifier"]
    assert 0.95 < float(task.evaluate(params)) < 1
    assert float(task.evaluate(task.init(3))) < 0.3


def test_digits_are_split_without_overlap(trained):
    _, about = trained[0], trained[0].about
    assert "1,347" in about["Data"]
    seen = {np.asarray(x).tobytes() for images, _ in trained[0].batches for x in images}
    assert len(trained[0].batches) == 21
    assert not seen & {np.asarray(x).tobytes() for x in trained[0].inputs[0]}


def test_tuning_keeps_what_is_pruned_at_zero_and_is_the_same_under_vmap(trained):
    task, params = trained
    config = pp.resolve(task.rules, task.layers).with_sparsity(0.9)
    masks = pp.level(params, None, config)
    tuned = task.tune(params, masks, 3, 1)
    for path in ("conv1", "conv2", "hidden"):
        pruned = ~np.asarray(masks[path]["kernel"])
        assert pruned.mean() == pytest.approx(0.9, abs=0.01)
        assert not np.asarray(tuned[path]["kernel"])[pruned].any()
    assert float(task.evaluate(tuned)) > float(task.evaluate(pp.apply_masks(params, masks))) + 0.05

    def one(seed):
        return task.evaluate(task.tune(params, masks, seed, 1))

    both = jax.vmap(one)(jnp.array([3, 4], jnp.int32))
    assert both[0] == pytest.approx(float(task.evaluate(tuned)), abs=0.01)
    assert not np.array_equal(
        task.tune(params, masks, 4, 1)["hidden"]["kernel"], tuned["hidden"]["kernel"]
    )


def test_statistics_of_digits(trained):
    task, params = trained
    images, labels = task.batches[0]
    outputs = task.capture(params, task.batches[0], task.layers, "outputs")
    assert {n: x.shape for n, x in outputs.items()} == {
        "conv1": (64, 4, 4, 32),
        "conv2": (64, 2, 2, 64),
        "hidden": (64, 64),
        "classifier": (64, 10),
    }
    inputs = task.capture(params, task.batches[0], task.layers, "inputs")
    assert np.array_equal(inputs["conv1"][..., 0], images)
    logits = np.asarray(task.apply(params, images), np.float64)
    picked = logits[np.arange(64), labels] - np.log(np.exp(logits).sum(-1))
    assert float(task.loss(params, task.batches[0])) == pytest.approx(-picked.mean(), rel=1e-4)
