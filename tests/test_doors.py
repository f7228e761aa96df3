"""Numbers, counts and trees that no function may take, one by one: each is refused by name."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import purepruning as pp
from purepruning.stats import activations
from purepruning.training import movement
from tests.explore import world
from tests.messages import raises

pytestmark = pytest.mark.usefixtures("standard_promotion")


@functools.cache
def sides():
    return world.sides()


def counted(count):
    """A config with a count that ``with_counts`` would not have taken."""
    config = sides()[0].config
    return dataclasses.replace(config, counts={**config.counts, "a": count})


@pytest.mark.parametrize(
    ("count", "error"), [(-5, ValueError), (10**12, ValueError), ("5", TypeError), (1.9, TypeError)]
)
def test_counts(count, error):
    run = {"begin_step": 1, "end_step": 3}
    for take in (
        lambda c: movement.schedule(c, 4, **run),
        lambda c: pp.agp(end_step=4).init(c),
        pp.search.annealing,
        lambda c: pp.level(sides()[0].params, None, c),
    ):
        with raises(error, "the count of 'a'", "got"):
            take(counted(count))


@pytest.mark.parametrize(
    "make",
    [
        lambda: pp.agp(end_step=2**31 - 2).init(sides()[0].config),
        lambda: pp.linear(end_step=10**7).init(sides()[0].config),
        lambda: pp.lottery(pp.level, sides()[0].config, rounds=2**31 - 2),
        lambda: movement.ramp(2**33, begin_step=1, end_step=2**32),
        lambda: movement.ramp(2**31 - 2, begin_step=1, end_step=2**30),
        lambda: movement.schedule(sides()[0].config, 2**31 - 2, begin_step=1, end_step=2**30),
    ],
)
def test_tables_that_would_fill_the_memory(make):
    with raises(ValueError, "at most", "1"):
        make()


def test_steps_of_schedules_are_whole():
    schedule = pp.Schedule(lambda pool, final: [(0.5, 0.1), (1.9, final)])
    with raises(TypeError, "'a'", "step must be an integer", "0.5"):
        schedule.init(sides()[0].config)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"aliases": "ab"}, "aliases"),
        ({"bias": 5}, "bias"),
        ({"in_axes": (0.5,)}, "in_axes"),
        ({"shape": (True, 6)}, "shape"),
    ],
)
def test_rows_of_a_table(change, word):
    row = {"name": "w", "type": "Linear", "weight": "w", "shape": (4, 6)}
    with raises(TypeError, "layer 'w'", word):
        pp.Layer(**{**row, "out_axes": (1,), "in_axes": (0,), **change})


@pytest.mark.parametrize("scale", [-1, np.nan, 1j, np.ones(3)])
def test_scales_of_penalties(scale):
    for side in sides():
        with raises((TypeError, ValueError), "slim_penalty: scale"):
            pp.slim_penalty(side.params, side.norms, scale=scale)
        with raises((TypeError, ValueError), "group_penalty: scale"):
            pp.group_penalty(side.params, side.coupled, scale=scale)


def test_scores_of_a_search_are_real():
    search = pp.search.annealing(sides()[0].config)
    state, _ = search.propose(search.init(jax.random.key(0)))
    for score in (1 + 5j, "1", None):
        with raises((TypeError, ValueError), "score"):
            search.accept(state, score)


def test_weights_are_no_masks():
    for side in sides():
        with raises(TypeError, "masks", "boolean"):
            pp.shuffle_masks(side.params, side.config, 5)


def test_no_layer_is_counted_twice():
    for side in sides():
        stats = activations.init(side.params, side.layers)
        with raises(ValueError, "two rows have the name 'a'"):
            table = side.layers + side.layers[:1]
            activations.update(stats, side.outputs, table, activation="relu")


def test_scores_of_one_framework_are_not_for_parameters_of_the_other():
    scores = np.arange(1.0, world.coupling().n_units + 1, dtype=np.float32)
    one, other = sides()
    with raises(TypeError, "scores are of torch", "JAX"):
        pp.prune_units(torch.tensor(scores), one.params, one.coupled)
    with raises(TypeError, "scores are of JAX", "torch"):
        pp.prune_units(jnp.asarray(scores), other.params, other.coupled)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("convert", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr])
def test_sparse_tensors(convert):
    side = sides()[1]
    params = {**side.params, "a.w": convert(side.params["a.w"])}
    for call in (
        lambda: pp.level(params, None, side.config),
        lambda: pp.l1_norm(params, None, side.channels),
        lambda: pp.l1_norm(params, None, side.coupled),
        lambda: pp.apply_masks(params, side.masks),
        lambda: pp.prune_scores(params, side.params, side.config),
    ):
        with raises(TypeError, "'a", "not dense", "to_dense()"):
            call()


def test_parameters_that_a_coupling_needs():
    for side in sides():
        flat = side.of(world.values())
        params = {k: v for k, v in flat.items() if k not in ("b", "b.w")}
        with raises(KeyError, "params have no 'b.w'"):
            pp.group_norm(params, None, side.coupled)
        with raises(KeyError, "params have no 'a.w'"):
            pp.group_norm({}, None, side.coupled)


def test_stacks_of_more_weights_than_int32_are_pruned_each():
    row = pp.Layer("w", "Linear", "w", (80, 8192, 28672), (2,), (1,), stack_axes=(0,))
    config = pp.resolve([{"sparsity": 0.5, "op_types": ["Linear"]}], [row])
    assert config.counts["w"] == 8192 * 28672 // 2
    params = {"w": jax.ShapeDtypeStruct(row.shape, "float32")}
    for pruner, stats in ((pp.level, None), (pp.random_pruning, 5)):
        masks = jax.eval_shape(lambda p, f=pruner, s=stats: f(p, s, config), params)
        assert masks["w"].shape == row.shape
