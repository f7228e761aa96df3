"""Sums of many layers in two loops: bit for bit those of every layer for itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import purepruning as pp
from purepruning.exact_sum import exact_sum
from purepruning.granularity import fold, grid
from purepruning.selection import ranked, unit_sums
from purepruning.selection.keys import Piece

INF, NAN = np.inf, np.nan

#: Weights as Flax and as PyTorch store them, matrices, one unit, one weight to a unit, and more
#: units and more terms than a tile has.
SHAPES = (
    ("Conv2d", (3, 3, 5, 7), (3,), (2,)),
    ("Conv2d", (6, 4, 3, 2), (0,), (1,)),
    ("Linear", (9, 4), (1,), (0,)),
    ("Linear", (4, 9), (0,), (1,)),
    ("Linear", (70, 1), (1,), (0,)),
    ("Linear", (1, 8), (1,), (0,)),
    ("Linear", (600, 67), (1,), (0,)),
    ("Linear", (130, 513), (0,), (1,)),
    ("Conv2d", (1, 1, 24, 65), (3,), (2,)),
    ("DenseGeneral", (5, 3, 2), (1, 2), (0,)),
)


def layers():
    return [
        pp.Layer(f"l{i}", kind, f"l{i}.w", shape, out_axes=out, in_axes=into)
        for i, (kind, shape, out, into) in enumerate(SHAPES)
    ]


def weights(seed=0):
    rng = np.random.default_rng(seed)
    # Magnitudes far apart within a unit, where the order of addition would show.
    return {
        x.weight: (rng.normal(size=x.shape) * np.exp(rng.normal(size=x.shape) * 9)).astype("f4")
        for x in layers()
    }


def magnitude(arrays, index, layer_stats):
    return jnp.abs(arrays[0].astype(jnp.float32))


def bits(x):
    return np.asarray(x).view(np.int32)


@pytest.mark.parametrize("granularity", ["output_channel", "input_channel"])
@pytest.mark.parametrize("x64", [False, True])
def test_sums_are_those_of_exact_sum(granularity, x64):
    params, grids = weights(), [grid(x, granularity) for x in layers()]
    for x, value in zip(layers(), (NAN, INF, -INF, 1e-45, 1e-39, 0.0, 3e38), strict=False):
        params[x.weight].reshape(-1)[-1] = value
    params["l2.w"][:, 0] = 0
    keeps = {path: np.random.default_rng(1).random(w.shape) < 0.1 for path, w in params.items()}
    places = [unit_sums.runs(g) for g in grids]
    assert all(places)

    with jax.enable_x64(x64):

        @jax.jit
        def both(params, keeps):
            pieces = [Piece((w,), magnitude) for w in params.values()]
            return unit_sums.unit_sums(pieces, places, list(keeps.values()))

        sums, kept = both(params, keeps)
    start = 0
    for g, w, keep in zip(grids, params.values(), keeps.values(), strict=True):
        mine = slice(start, start + g.n_units)
        with np.errstate(all="ignore"):
            expected = fold(np, np.abs(w), g, exact_sum)[0]
        np.testing.assert_array_equal(bits(sums[mine]), bits(expected))
        expected = fold(np, keep, g, lambda x, axes: x.any(axis=axes))[0]
        np.testing.assert_array_equal(kept[mine], expected)
        start = mine.stop
    assert start == len(sums) == len(kept)


@pytest.mark.parametrize(
    "layer",
    [
        pp.Layer("c", "Conv2d", "c", (4, 3, 3, 8), (0, 3), (2,)),  # units far apart
        pp.Layer("c", "Linear", "c", (2, 4, 8), (2,), (1,), stack_axes=(0,)),
        pp.Layer("c", "BatchNorm", "c", (8,), (0,)),  # nothing is summed
    ],
)
def test_layers_that_are_summed_for_themselves(layer):
    assert unit_sums.runs(grid(layer, "output_channel")) is None


@pytest.mark.parametrize(("dtype", "scope"), [("float32", "layer"), ("bfloat16", "global")])
@pytest.mark.usefixtures("unoptimized")
def test_masks_are_those_of_every_layer_for_itself(monkeypatch, dtype, scope):
    """Between layers that are summed together are some that are not, by shape and by dtype."""
    monkeypatch.setattr(ranked, "FEW", 2)
    table = layers()
    table.insert(3, pp.Layer("l20", "Linear", "l20.w", (3, 4, 6), (2,), (1,), stack_axes=(0,)))
    params = weights() | {"l20.w": np.random.default_rng(2).normal(size=(3, 4, 6)).astype("f4")}
    params = {path: jnp.asarray(w, dtype) for path, w in params.items()}
    params["l4.w"] = params["l4.w"].astype("float16")
    rules = [{"op_types": ["default"], "sparsity": 0.6}]
    config = pp.resolve(rules, table, scope=scope, granularity="output_channel")
    prune = functools.partial(pp.l1_norm, stats=None)
    before = prune(params, config=config.with_sparsity(0.3))
    some = {path: mask for path, mask in before.items() if path != "l7.w"}
    for now in (config, config.with_masks(some)):
        by_numpy = prune(params, config=now)
        compiled = jax.jit(prune)(params, config=now)
        for path, mask in by_numpy.items():
            np.testing.assert_array_equal(compiled[path], mask)
