"""Recipes on parameters alone, in JAX and torch: a layer table in place of a module."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch

from purepruning_interop.recipes import create_compressor
from tests.messages import raises
from tests.study import tiny

pytestmark = pytest.mark.usefixtures("standard_promotion", "unoptimized")

RNG = np.random.default_rng(0)
PARAMS = {
    "a": RNG.normal(size=(8, 12)).astype(np.float32),
    "b": RNG.normal(size=(12, 3)).astype(np.float32),
}
LAYERS = tiny.layers()
X = tiny.X[:16]


def step_of(use, rule):
    rule = {"op_names": ["a"], "op_types": ["Linear"], **rule}
    return {"purepruning": 1, "steps": [{"use": use, "rules": [rule]}]}


def tree(framework):
    make = jnp.asarray if framework == "jax" else torch.tensor
    return {n: make(x) for n, x in PARAMS.items()}


def columns_of(params):
    """Returns which channels of the first layer are gone."""
    return set(np.flatnonzero((np.asarray(params["a"]) == 0).all(0)))


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_parameters_alone_are_pruned_and_left_as_they_were(framework, tmp_path):
    given = tree(framework)
    compressor = create_compressor(given, step_of("level", {"sparsity": 0.5}), layers=LAYERS)
    pruned = compressor.compress()
    cut = np.sort(np.abs(PARAMS["a"]).ravel())[48]
    expected = np.where(np.abs(PARAMS["a"]) >= cut, PARAMS["a"], 0)
    assert np.array_equal(np.asarray(pruned["a"]), expected)
    assert np.array_equal(np.asarray(given["a"]), PARAMS["a"])
    trained = {n: x + 1 for n, x in pruned.items()}
    assert np.array_equal(np.asarray(compressor.step(trained)["a"]) == 0, expected == 0)
    files = compressor.export_model("m.safetensors", "masks.safetensors", str(tmp_path))
    saved = safetensors.numpy.load_file(files["model"])
    assert np.array_equal(saved["a"] == 0, expected == 0)


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_gradients_are_those_of_a_loss(framework):
    task = tiny.task if framework == "jax" else tiny.torch_task()
    step = step_of("taylor_fo_weight_filter", {"sparsity": 0.5})
    given = {"layers": LAYERS, "data": task.batches, "loss": task.loss}
    compressor = create_compressor(tree(framework), step, statistics_batch_num=2, **given)
    score = 0
    for batch in tiny.task.batches:
        score = score + (np.asarray(jax.grad(tiny.loss)(PARAMS, batch)["a"]) * PARAMS["a"]) ** 2
    assert columns_of(compressor.compress()) == set(np.argsort(score.sum(0))[:6])


def test_outputs_come_from_a_function():
    step = step_of("activation_mean_rank_filter", {"sparsity": 0.5})
    given = {"layers": LAYERS, "data": [(X,)]}

    def capture(params, x):
        return {"a": x @ params["a"]}

    pruned = create_compressor(tree("jax"), step, capture=capture, **given).compress()
    mean = np.maximum(X @ PARAMS["a"], 0).mean(0)
    assert columns_of(pruned) == set(np.argsort(mean)[:6])
    with raises(TypeError, "capture="):
        create_compressor(tree("jax"), step, **given).compress()


def test_a_function_is_shrunk():
    step = step_of("l1_filter", {"sparsity": 0.5})
    compressor = create_compressor(tree("jax"), step, layers=LAYERS, apply=tiny.apply, inputs=(X,))
    pruned = compressor.compress()
    small = compressor.apply_speedup()
    assert {n: x.shape for n, x in small.params.items()} == {"a": (8, 6), "b": (6, 3)}
    assert np.allclose(small.fn(small.params, X), tiny.apply(pruned, X), atol=1e-5)
    assert compressor.count_flops_params((1, 8))[:2] == (8 * 12 + 12 * 3, 8 * 12 + 12 * 3)
    with raises(TypeError, "apply="):
        create_compressor(tree("jax"), step, layers=LAYERS, inputs=(X,)).count_flops_params((1, 8))


def test_a_search_evaluates_the_tree_as_it_is():
    seen = []

    def evaluate(params):
        seen.append(len(columns_of(params)))
        return -seen[-1]

    step = step_of("sensitivity", {"sparsity": 0.5})
    given = {"layers": LAYERS, "evaluator": evaluate, "sparsity_per_iter": 0.25}
    create_compressor(tree("jax"), step, **given).compress()
    assert seen[0] == 0
    assert max(seen) >= 3


def test_what_parameters_alone_cannot_do():
    step = step_of("qat", {"quant_types": ["weight"], "quant_bits": 8})
    with raises(ValueError, "qat", "modules", "give a module"):
        create_compressor(tree("jax"), step, layers=LAYERS)
    with raises(TypeError, "layers="):
        create_compressor(tree("jax"), step_of("level", {"sparsity": 0.5}))
    with raises(TypeError, "layers="):
        create_compressor(tree("jax"), step_of("level", {"sparsity": 0.5}), apply=tiny.apply)
