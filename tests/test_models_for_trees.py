"""Models where parameters, layer tables or masks are expected: the right function is named."""

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import keras
import optax
import pytest
import torch
from flax import linen, nnx

import purepruning as pp
from purepruning import Layer
from tests.messages import raises

MODELS = {
    "torch": torch.nn.Sequential(torch.nn.Linear(3, 4)),
    "nnx": nnx.Linear(3, 4, rngs=nnx.Rngs(0)),
    "linen": linen.Dense(4),
    "keras": keras.layers.Dense(4),
    "haiku": hk.transform(lambda x: hk.Linear(4)(x)),
}
REMEDY = {
    "torch": "dict(model.named_parameters())",
    "nnx": "nnx.state(model, nnx.Param)",
    "linen": "model.init",
    "keras": "purepruning_interop.keras.params(model)",
    "haiku": "init returned",
}
CONFIG = pp.resolve(0.5, [Layer("fc", "Linear", "kernel", (3, 4), (1,), (0,))])
MASKS = {"kernel": jnp.ones((3, 4), bool)}
TAKES_PARAMS = {
    "level": lambda m: pp.level(m, None, CONFIG),
    "prune_scores": lambda m: pp.prune_scores(MASKS, m, CONFIG),
    "masks_from_zeros": lambda m: pp.masks_from_zeros(m, CONFIG),
    "expand": lambda m: pp.expand(MASKS, m),
    "density": lambda m: pp.density(MASKS, m),
    "masks": lambda m: pp.apply_masks(MASKS, m),
    "merge_masks": lambda m: pp.merge_masks(MASKS, m),
    "invert": pp.invert,
    "summarize": lambda m: pp.summarize(m, MASKS, CONFIG.layers),
    "make_layer": lambda m: pp.make_layer(m, "kernel", "Linear", out_axes=1),
    "lottery": lambda m: pp.lottery(pp.level, CONFIG, rounds=1).init({"params": m}),
    "admm": lambda m: pp.admm.init(m, CONFIG),
    "movement": lambda m: pp.movement.init(m, CONFIG),
    "statistics": lambda m: pp.stats.gradients.init(m, CONFIG),
    "get_masks": lambda m: pp.get_masks(pp.keep_pruned(MASKS).init(MASKS), m),
    "leaf_paths": pp.leaf_paths,
}


@pytest.mark.parametrize("adapter", MODELS)
@pytest.mark.parametrize("function", TAKES_PARAMS)
def test_a_model_is_no_tree(function, adapter):
    model = MODELS[adapter]
    with raises(TypeError, type(model).__name__, REMEDY[adapter]):
        TAKES_PARAMS[function](model)


@pytest.mark.parametrize("adapter", ["nnx", "linen", "keras", "haiku"])
def test_apply_masks_takes_no_model(adapter):
    with raises(TypeError, REMEDY[adapter]):
        pp.apply_masks(MODELS[adapter], MASKS)


def test_apply_masks_names_that_of_modules():
    with raises(TypeError, "Sequential", "purepruning_interop.torch.apply_(model, masks)"):
        pp.apply_masks(MODELS["torch"], MASKS)


@pytest.mark.parametrize("adapter", [*MODELS, "equinox"])
def test_a_model_is_no_layer_table(adapter):
    model = MODELS.get(adapter) or eqx.nn.Linear(3, 4, key=jax.random.key(0))
    for call in (
        lambda: pp.resolve(0.5, model),
        lambda: pp.from_nni("level", [{"sparsity": 0.5}], model),
    ):
        with raises(TypeError, type(model).__name__, f"purepruning_interop.{adapter}.layers"):
            call()


def test_keep_pruned_names_that_of_modules():
    model = MODELS["torch"]
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    named = "purepruning_interop.torch.keep_pruned(model, masks, optimizer)"
    for arguments in ((model, MASKS, sgd), (model, MASKS), (model,), (MASKS, sgd)):
        with raises(TypeError, "Optax", named):
            pp.keep_pruned(*arguments)
    with raises(TypeError, named):
        pp.prune_on_schedule(pp.level, pp.one_shot(), CONFIG, sgd)
    with raises(TypeError, "masks", "Linear", "keep_pruned(masks, optimizer)"):
        pp.keep_pruned(MODELS["nnx"], MASKS, optax.sgd(0.1))
    with raises(TypeError, "(masks, inner)", "3 arguments"):
        pp.keep_pruned(MASKS, optax.sgd(0.1), MASKS)
    with raises(TypeError, "inner", "Optax", "float"):
        pp.keep_pruned(MASKS, 0.1)
    assert isinstance(pp.keep_pruned(MASKS, optax.MultiSteps(optax.sgd(0.1), 2)), tuple)


@pytest.mark.parametrize("adapter", ["torch", "nnx", "linen"])
def test_structure_names_the_function_of_the_adapter(adapter):
    model, x = MODELS[adapter], jnp.ones((1, 3))
    calls = {
        "couple": lambda: pp.couple(model, x),
        "count": lambda: pp.count(model, x),
        "shrink": lambda: pp.shrink(model, MASKS, None, x),
        "rebuild": lambda: pp.rebuild(model, None, x),
    }
    for name, call in calls.items():
        with raises(TypeError, type(model).__name__, f"purepruning_interop.{adapter}.{name}"):
            call()


def test_tensors_of_torch_are_not_traced():
    params, x = {"w": torch.ones(3, 4)}, jnp.ones((1, 3))
    with raises(TypeError, "params: 'w'", "purepruning_interop.torch"):
        pp.couple(lambda p, x: x @ p["w"], params, x)
    with raises(TypeError, "an input", "purepruning_interop.torch"):
        pp.couple(lambda p, x: x @ p["w"], {"w": jnp.ones((3, 4))}, torch.ones(1, 3))
    with raises(TypeError, "Sequential", "named_parameters"):
        pp.couple(lambda p, x: x, MODELS["torch"], x)


def test_modules_of_equinox_are_trees():
    model = eqx.nn.Linear(3, 4, key=jax.random.key(0))
    config = pp.resolve(0.5, [Layer("fc", "Linear", "weight", (4, 3), (0,), (1,))])
    masks = pp.level(model, None, config)
    assert int((~masks.weight).sum()) == 6
    assert int((pp.apply_masks(model, masks).weight == 0).sum()) == 6
    pp.keep_pruned(masks)
