"""Every layout of axes, at every granularity, on every path, against stable sorts in NumPy.

What goes wrong is wrong for the three together: a short cut of one path, at one granularity, that
takes input axes which end in the last one for adjacent ones. All layouts are one model, of which
every path and granularity is run; scopes and dtypes go along in pairs.
"""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

import purepruning as pp
from purepruning import NM, Block, Layer
from tests import oracle
from tests.covering import covered, covering
from tests.modes import MODES, OVER_COUNTS

pytestmark = pytest.mark.usefixtures("unoptimized")


def layer(name, shape, out_axes, in_axes, **fields):
    return Layer(name, "Linear", name, shape, out_axes, in_axes, **fields)


#: In the order of their names, which is that of ties in global scope.
LAYERS = (
    layer("grouped inputs", (3, 2, 6), (2,), (1,), groups=2),
    layer("grouped outputs", (4, 3, 2), (1,), (0,), groups=2, grouped="out"),
    layer("inputs around outputs", (2, 5, 3), (1,), (0, 2)),
    layer("inputs last", (7, 10), (0,), (1,)),
    layer("outputs around inputs", (3, 4, 2), (0, 2), (1,)),
    layer("outputs last", (3, 1, 4, 5), (3,), (2,)),
    layer("stack inside", (4, 3, 5), (2,), (0,), stack_axes=(1,)),
    layer("taps last", (5, 4, 1, 3), (0,), (1,)),
    layer("two inputs", (2, 3, 5), (2,), (0, 1)),
    layer("two outputs", (6, 2, 3), (1, 2), (0,)),
)
#: A block is compared by its mean: tiles at the edge are halves and quarters of it, exactly.
BLOCK, PAIRS = Block((2, 2)), NM(1, 2)
GRANULARITIES = ("element", "output_channel", "input_channel", BLOCK, PAIRS)
DTYPES = ("float32", "bfloat16", "float16")
EVERY = [
    (mode, granularity, scope, dtype)
    for mode, granularity, scope, dtype in itertools.product(
        MODES, GRANULARITIES, ("layer", "global"), range(len(DTYPES))
    )
    if mode != "jax_device"  # the same code as under jit, in more pieces
    if granularity != PAIRS or (scope == "layer" and mode not in OVER_COUNTS)
]


def weights(granularity, first_dtype):
    """Integers with many ties, in dtypes that take turns; every sum of them is exact."""
    rng = np.random.default_rng(0)
    return {
        x.weight: np.asarray(
            jnp.asarray(rng.integers(-20, 21, x.shape), DTYPES[(first_dtype + i) % len(DTYPES)])
        )
        for i, x in enumerate(LAYERS)
    }


def scores(weight, layer, granularity):
    """``(stacked, units)``."""
    sums = oracle.unit_sums(np.abs(weight.astype(float)), layer, granularity)
    if granularity != BLOCK:
        return sums
    sizes = oracle.unit_sums(np.ones(layer.shape), layer, granularity)
    return sums * (sizes.max() / sizes)


def expected(params, config):
    """Which weights stay."""
    granularity = config.granularity
    if granularity == PAIRS:
        return {x.weight: lower_of_pairs(params[x.weight], x) for x in LAYERS}
    rows = {x.name: scores(params[x.weight], x, granularity) for x in LAYERS}
    if config.scope == "layer":
        pruned = {
            x.name: np.stack([oracle.lowest(row, config.counts[x.name]) for row in rows[x.name]])
            for x in LAYERS
        }
    else:
        members = [(x, i) for x in LAYERS for i in range(len(rows[x.name]))]
        caps = dict(zip([x.name for x in LAYERS], config.pools[0].caps, strict=True))
        costs = {x.name: oracle.unit_sums(np.ones(x.shape), x, granularity) for x in LAYERS}
        found = oracle.lowest_together(
            [rows[x.name][i] for x, i in members],
            config.counts["rule 0"],
            [caps[x.name] for x, _ in members],
            [costs[x.name][i].astype(int) for x, i in members],
        )
        pruned = {
            x.name: np.stack([f for f, (y, _) in zip(found, members, strict=True) if y is x])
            for x in LAYERS
        }
    return {x.weight: oracle.spread(pruned[x.name], x, granularity) for x in LAYERS}


def lower_of_pairs(weight, layer):
    """Of every two weights in a row along the inputs the larger stays, of equal ones the later."""
    members = np.broadcast_to(oracle.members(layer), layer.shape).reshape(-1)
    pairs = oracle.unit_ids(layer, PAIRS).reshape(-1)
    keep = np.ones(weight.size, bool)
    size = np.abs(weight.astype(float)).reshape(-1)
    # Weights of a pair stand in the order of their input axes, in memory too.
    for pair in sorted(set(zip(members, pairs, strict=True))):
        inside = np.flatnonzero((members == pair[0]) & (pairs == pair[1]))
        if len(inside) == 2:
            keep[inside[np.argmin(size[inside])]] = False
    return keep.reshape(layer.shape)


@pytest.mark.parametrize(
    ("mode", "granularity", "scope", "dtype"),
    covered(
        EVERY,
        covering(EVERY, together=[(0, 1)]),
        [f"{mode}-{g}-{scope}-{DTYPES[dtype]}" for mode, g, scope, dtype in EVERY],
    ),
)
def test_masks_of_every_layout(mode, granularity, scope, dtype):
    rules = [{"op_types": ["Linear"]}]
    config = pp.resolve(rules, LAYERS, scope=scope, granularity=granularity)
    if granularity != PAIRS:
        config = config.with_sparsity(0.4)
    params = weights(granularity, dtype)
    pruner = pp.level if granularity in ("element", PAIRS) else pp.l1_norm
    masks = MODES[mode](pruner, params, None, config)
    for x in LAYERS:
        got = np.broadcast_to(masks[x.weight], x.shape)
        np.testing.assert_array_equal(got, expected(params, config)[x.weight], x.name)
