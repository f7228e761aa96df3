"""Scores to masks, against stable sorts: by NumPy, and as on other devices.

There, small layers take another path than large ones, which is made to run on small arrays by
shrinking its thresholds. They are read when a function is traced, so each path has a criterion of
its own, which is part of what XLA's cache is keyed by.
"""

import contextlib
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import purepruning as pp
from purepruning import NM, Block, Criterion, Layer
from purepruning.arrays import namespace
from purepruning.granularity import fold
from purepruning.selection import joined, kth_host, kth_jax_counters, kth_torch, prune
from purepruning.selection import large as large_module
from purepruning.selection.keys import Piece
from purepruning.selection.problem import unstacked
from tests import oracle
from tests.messages import raises
from tests.modes import as_jax, as_numpy, as_torch, off_host
from tests.versions import enable_x64

INF, NAN = float("inf"), float("nan")
DEFAULT = {"op_types": ["default"], "allow_empty": True}


# Whole numbers are compared and counted here. What XLA makes of them optimized is in test_laws.py.
pytestmark = pytest.mark.usefixtures("unoptimized")


def scoring():
    """A criterion whose score is the weight itself, and the lowest of a unit that of the unit."""

    def single(arrays, index, layer_stats):
        xp = namespace(arrays[0])
        return xp.astype(arrays[0], xp.float32)

    def unit(weight, layer_stats, g):
        xp = namespace(weight)
        return fold(xp, xp.astype(weight, xp.float32), g, lambda x, axes: xp.sum(x, axis=axes))

    return Criterion("raw", lambda weight, layer_stats: Piece((weight,), single), unit, unit)


@contextlib.contextmanager
def large():
    with (
        mock.patch.multiple(large_module, SMALL=0),
        mock.patch.multiple(kth_jax_counters, CHUNK=64, SMALL_CHUNK=64, SAMPLE=300, GROUP=2),
        mock.patch.multiple(joined, SMALL=64),
        mock.patch.multiple(kth_torch, CHUNK=50, SAMPLE=20),
    ):
        yield


SMALL, LARGE = (scoring(), contextlib.nullcontext), (scoring(), large)
paths = pytest.mark.parametrize("path", [SMALL, LARGE], ids=["small", "large"])


def masks_of(path, params, config):
    """Masks from both frameworks, by NumPy and as on other devices: all have to be the same."""
    criterion, settings = path
    with mock.patch.multiple(kth_host, CHUNK=50, SAMPLE=20, SMALL=30):
        masks = as_numpy(prune.prune(criterion, as_jax(params), None, config))
        others = [prune.prune(criterion, as_torch(params), None, config)]
    with settings(), off_host():
        others += [prune.prune(criterion, f(params), None, config) for f in (as_jax, as_torch)]
    for other in others:
        np.testing.assert_equal(as_numpy(other), masks)
    return masks


def vector(n, name="v"):
    return Layer(name, "Linear", f"{name}.w", (n,))


def kept(path, scores, count):
    """The mask of one layer that loses ``count`` elements."""
    config = pp.resolve([DEFAULT], [vector(len(scores))]).with_counts({"v": count})
    return masks_of(path, {"v.w": np.asarray(scores)}, config)["v.w"]


# Exactly k elements.

SPECIAL = (
    0.0,
    -0.0,
    INF,
    -INF,
    1.0,
    -1.0,
    1e-40,
    -1e-40,
    1e-45,
    2e-45,
    3.4e38,
    -3.4e38,
    1 + 2**-23,
)
SIZES = (1, 64, 65, 129, 200)
few_values = st.sampled_from(SPECIAL)
any_values = st.floats(allow_nan=False, width=32)


@st.composite
def scores_and_count(draw, sizes=SIZES):
    n = draw(st.sampled_from(sizes))
    values = draw(st.one_of(st.just(few_values), st.just(any_values)))
    some = draw(st.lists(values, min_size=1, max_size=n))
    scores = np.resize(np.asarray(some, np.float32), n)
    return scores, draw(st.integers(0, n))


@paths
@given(case=scores_and_count())
@settings(max_examples=25)
def test_prunes_the_k_lowest(path, case):
    scores, count = case
    np.testing.assert_array_equal(kept(path, scores, count), ~oracle.lowest(scores, count))


@paths
@pytest.mark.parametrize(
    "scores",
    [
        np.zeros(129),
        np.full(129, INF),
        np.resize([0.0, -0.0], 129),
        np.resize([INF, -INF, 0.0], 129),
        np.resize([1e-45, -1e-45, 0.0, 2e-45], 129),
        np.arange(129),
        -np.arange(129),
        np.repeat([3, 1, 2], 43),
        np.r_[np.zeros(64), 1, np.zeros(64)],
        2.0 ** np.linspace(-149, 127, 129),
    ],
    ids=range(10),
)
def test_every_count_of_awkward_scores(path, scores):
    scores = scores.astype(np.float32)
    for count in (0, 1, 2, 42, 63, 64, 65, 66, 127, 128, 129):
        np.testing.assert_array_equal(kept(path, scores, count), ~oracle.lowest(scores, count))


@paths
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_other_dtypes_are_ranked_as_float32(path, dtype):
    rng = np.random.default_rng(0)
    raw = np.r_[rng.normal(size=125), SPECIAL[:4]]
    if dtype == "float64":
        # JAX has no float64 unless asked for.
        config = pp.resolve([DEFAULT], [vector(129)]).with_counts({"v": 50})
        with path[1]():
            mask = prune.prune(path[0], {"v.w": torch.tensor(raw)}, None, config)["v.w"].numpy()
        scores = raw
    else:
        scores = np.asarray(jnp.asarray(raw, dtype))
        mask = kept(path, scores, 50)
    np.testing.assert_array_equal(mask, ~oracle.lowest(scores.astype(np.float32), 50))


def test_subnormals_of_half_precision_have_an_order():
    bits = np.asarray([5, 3, 0x8002, 1, 0, 4], np.uint16)
    for dtype in (np.float16, jnp.bfloat16):
        expected = np.asarray([True, True, False, True, False, True])
        np.testing.assert_array_equal(kept(SMALL, bits.view(dtype), 2), expected)


@paths
def test_nan_is_an_error_in_eager_use(path):
    for scores in ([1.0, NAN] + [0.0] * 127, [-NAN] * 129):
        for convert in (as_jax, as_torch):
            params = convert({"v.w": np.asarray(scores, np.float32)})
            config = pp.resolve([DEFAULT], [vector(129)]).with_counts({"v": 3})
            with path[1](), raises(ValueError, "raw", "'v'", "NaN"):
                prune.prune(path[0], params, None, config)


@paths
def test_nan_ranks_last_where_it_cannot_be_seen(path):
    scores = np.resize(np.asarray([NAN, 1, INF, -NAN, -INF], np.float32), 129)
    config = pp.resolve([DEFAULT], [vector(129)])
    run = jax.jit(lambda p, c: prune.prune(path[0], p, None, config.with_counts({"v": c})))
    for count in (0, 30, 77, 78, 100, 129):
        with path[1]():
            mask = run({"v.w": jnp.asarray(scores)}, count)["v.w"]
        np.testing.assert_array_equal(mask, ~oracle.lowest(scores, count))


def test_nan_takes_part_in_a_budget_that_reaches_it():
    """In global scope it ranks behind all numbers, but before what a cap protects."""
    layers = [vector(4, "a"), vector(2, "b")]
    params = {"a.w": jnp.asarray([1.0, 2.0, 3.0, 4.0]), "b.w": jnp.asarray([NAN, NAN])}
    rules = [DEFAULT | {"max_sparsity_per_layer": {"a": 0.5, "b": 1.0}}]
    config = pp.resolve(rules, layers, scope="global").with_counts({"rule 0": 3})
    for path in (SMALL, (scoring(), large)):
        with path[1]():
            run = jax.jit(functools.partial(prune.prune, path[0]), static_argnums=1)
            masks = as_numpy(run(params, None, config))
        np.testing.assert_equal(masks, {"a.w": [False, False, True, True], "b.w": [False, True]})


# Traced counts, transformations.


def ladder(n=129, seed=0):
    return np.random.default_rng(seed).integers(0, 40, n).astype(np.float32)


COUNTS = np.asarray([0, 1, 64, 65, 100, 129], np.int32)


@paths
def test_one_compiled_function_for_all_counts(path):
    config, scores = pp.resolve([DEFAULT], [vector(129)]), ladder()
    run = jax.jit(lambda p, c: prune.prune(path[0], p, None, c))
    with path[1]():
        for count in COUNTS:
            mask = run({"v.w": jnp.asarray(scores)}, config.with_counts({"v": int(count)}))["v.w"]
            np.testing.assert_array_equal(mask, ~oracle.lowest(scores, count))
    assert run._cache_size() == 1


@paths
def test_scan_over_counts(path):
    config, scores = pp.resolve([DEFAULT], [vector(129)]), ladder()

    def step(params, count):
        masks = prune.prune(path[0], params, None, config.with_counts({"v": count}))
        return params, masks["v.w"]

    with path[1]():
        _, masks = jax.jit(lambda p, c: lax.scan(step, p, c))({"v.w": jnp.asarray(scores)}, COUNTS)
    for mask, count in zip(masks, COUNTS, strict=True):
        np.testing.assert_array_equal(mask, ~oracle.lowest(scores, count))


@paths
def test_vmap_over_counts_and_params(path):
    config = pp.resolve([DEFAULT], [vector(129)])
    scores = np.stack([ladder(seed=s) for s in range(len(COUNTS))])
    expected = np.stack([~oracle.lowest(s, k) for s, k in zip(scores, COUNTS, strict=True)])

    def run(params, counts):
        return prune.prune(path[0], params, None, config.with_counts(counts))

    with path[1]():
        stacked = {"v.w": jnp.asarray(scores)}, {"v": jnp.asarray(COUNTS)}
        np.testing.assert_array_equal(jax.vmap(run)(*stacked)["v.w"], expected)
        row = {"v.w": stacked[0]["v.w"][2]}
        over_counts = jax.vmap(run, in_axes=(None, 0))(row, stacked[1])["v.w"]
        np.testing.assert_array_equal(over_counts[2], expected[2])
        stacked = {"v.w": torch.tensor(scores)}, {"v": torch.tensor(COUNTS)}
        np.testing.assert_array_equal(torch.func.vmap(run)(*stacked)["v.w"], expected)
        row = {"v.w": stacked[0]["v.w"][2]}
        over_counts = torch.func.vmap(run, in_dims=(None, 0))(row, stacked[1])["v.w"]
        np.testing.assert_array_equal(over_counts[2], expected[2])
        nested = torch.func.vmap(torch.func.vmap(run, in_dims=(None, 0)), in_dims=(0, None))
        every = nested(*stacked)["v.w"]
        assert every.shape == (6, 6, 129)
        np.testing.assert_array_equal(every[range(6), range(6)], expected)


def test_counts_out_of_range_are_clipped_where_they_cannot_be_seen():
    config, scores = pp.resolve([DEFAULT], [vector(129)]), ladder()
    for path in (SMALL, LARGE):

        @jax.jit
        def run(p, count, path=path):
            return prune.prune(path[0], p, None, config.with_counts({"v": count}))

        with path[1]():
            for count, left in ((-5, 129), (500, 0), (2**31 - 1, 0), (-(2**31), 129)):
                masks = run({"v.w": jnp.asarray(scores)}, count)
                assert masks["v.w"].sum() == left


def test_parameters_that_require_gradients_are_fine():
    config = pp.resolve([DEFAULT], [vector(129)]).with_counts({"v": 50})
    for path in (SMALL, LARGE):
        weight = torch.nn.Parameter(torch.tensor(ladder()))
        with path[1]():
            mask = prune.prune(path[0], {"v.w": weight}, None, config)["v.w"]
        np.testing.assert_array_equal(mask, ~oracle.lowest(ladder(), 50))
        assert not mask.requires_grad


# Several layers.

LAYERS = (vector(130, "a"), vector(5, "b"), vector(64, "c"), vector(200, "d"), vector(1, "e"))


def several(seed, ties=40):
    rng = np.random.default_rng(seed)
    return {
        x.weight: rng.integers(-ties, ties, x.shape).astype(np.float32) / (1 + i)
        for i, x in enumerate(LAYERS)
    }


@paths
@pytest.mark.parametrize("seed", range(3))
def test_layers_side_by_side(path, seed):
    params, rng = several(seed), np.random.default_rng(seed)
    counts = {x.name: int(rng.integers(0, x.shape[0] + 1)) for x in LAYERS}
    config = pp.resolve([DEFAULT], LAYERS).with_counts(counts)
    masks = masks_of(path, params, config)
    for layer in LAYERS:
        expected = ~oracle.lowest(params[layer.weight], counts[layer.name])
        np.testing.assert_array_equal(masks[layer.weight], expected)


def caps_of(config):
    return [
        cap
        for pool in config.pools
        for layer, cap in zip(pool.layers, pool.caps, strict=True)
        for _ in range(oracle.members(layer).max() + 1)
    ]


@paths
@given(
    seed=st.integers(0, 99),
    ties=st.sampled_from([1, 3, 40]),
    share=st.floats(0, 1),
    caps=st.sampled_from([1.0, {"a": 0.1, "d": 0.3, "b": 0.0}]),
)
@settings(max_examples=12)
def test_layers_together(path, seed, ties, share, caps):
    params = several(seed, ties)
    rules = [DEFAULT | {"max_sparsity_per_layer": caps}]
    config = pp.resolve(rules, LAYERS, scope="global")
    caps = caps_of(config)
    budget = int(share * sum(caps))
    masks = masks_of(path, params, config.with_counts({"rule 0": budget}))
    expected = oracle.lowest_together([params[x.weight] for x in LAYERS], budget, caps)
    for layer, pruned in zip(LAYERS, expected, strict=True):
        np.testing.assert_array_equal(masks[layer.weight], ~pruned)
    assert sum(np.sum(~mask) for mask in masks.values()) == budget


@paths
def test_equal_scores_go_by_layer_name_then_position(path):
    params = {x.weight: np.ones(x.shape, np.float32) for x in LAYERS}
    rules = [DEFAULT | {"max_sparsity_per_layer": {"a": 0.5, "b": 0.6, "e": 1.0}}]
    config = pp.resolve(rules, LAYERS[::-1], scope="global").with_counts({"rule 0": 65 + 3 + 10})
    masks = masks_of(path, params, config)
    assert [int(np.sum(~masks[x.weight])) for x in LAYERS] == [65, 3, 10, 0, 0]
    for mask in masks.values():
        assert np.all(mask[:-1] <= mask[1:])


def test_by_default_no_layer_loses_more_than_99_percent():
    params = several(1)
    params["a.w"] -= 1000
    config = pp.resolve([DEFAULT | {"sparsity": 0.4}], LAYERS, scope="global")
    assert config.counts == {"rule 0": 160}
    masks = masks_of(SMALL, params, config)
    assert np.sum(~masks["a.w"]) == 128 == int(0.99 * 130)
    assert sum(np.sum(~mask) for mask in masks.values()) == 160


def test_rules_have_budgets_of_their_own():
    params = several(2)
    rules = [DEFAULT, {"op_names": ["a", "c"], "allow_empty": True}]
    config = pp.resolve(rules, LAYERS, scope="global").with_counts({"rule 0": 50, "rule 1": 7})
    masks = masks_of(SMALL, params, config)
    for names, budget in ((["b", "d", "e"], 50), (["a", "c"], 7)):
        mine = [x for x in LAYERS if x.name in names]
        caps = [int(0.99 * x.shape[0]) for x in mine]
        expected = oracle.lowest_together([params[x.weight] for x in mine], budget, caps)
        for layer, pruned in zip(mine, expected, strict=True):
            np.testing.assert_array_equal(masks[layer.weight], ~pruned)


# Stacked layers.

STACKS = (
    Layer("front", "Linear", "front.w", (2, 6, 5), (2,), (1,), stack_axes=(0,)),
    Layer("middle", "Linear", "middle.w", (6, 3, 5), (2,), (0,), stack_axes=(1,)),
    Layer("twice", "Linear", "twice.w", (4, 2, 15, 1), (2,), (0,), stack_axes=(1, 3)),
)


def stacks(seed):
    rng = np.random.default_rng(seed)
    return {x.weight: rng.integers(-30, 30, x.shape).astype(np.float32) for x in STACKS}


def expected_masks(layers, params, granularity, counts):
    """What layer scope prunes: of every stack member its own lowest units."""
    masks = {}
    for layer in layers:
        scores = oracle.unit_sums(params[layer.weight], layer, granularity)
        pruned = np.stack([oracle.lowest(row, counts[layer.name]) for row in scores])
        masks[layer.weight] = oracle.spread(pruned, layer, granularity)
    return masks


def whole(masks, layers):
    return {x.weight: np.broadcast_to(masks[x.weight], x.shape) for x in layers}


@paths
@pytest.mark.parametrize("granularity", ["element", "output_channel", "input_channel"])
def test_every_stacked_layer_is_pruned_on_its_own(path, granularity):
    params = stacks(0)
    config = pp.resolve([DEFAULT | {"sparsity": 0.4}], STACKS, granularity=granularity)
    masks = masks_of(path, params, config)
    expected = expected_masks(STACKS, params, granularity, config.counts)
    np.testing.assert_equal(whole(masks, STACKS), expected)


@paths
@pytest.mark.parametrize("caps", [0.4, {"middle": 0.1}])
def test_stacked_layers_together(path, caps):
    params = stacks(1)
    rules = [DEFAULT | {"sparsity": 0.3, "max_sparsity_per_layer": caps}]
    config = pp.resolve(rules, STACKS, scope="global")
    rows = [r for x in STACKS for r in oracle.unit_sums(params[x.weight], x, "element")]
    expected = oracle.lowest_together(rows, config.counts["rule 0"], caps_of(config))
    masks = masks_of(path, params, config)
    for layer in STACKS:
        n = oracle.members(layer).max() + 1
        pruned, expected = np.stack(expected[:n]), expected[n:]
        want = oracle.spread(pruned, layer, "element")
        np.testing.assert_array_equal(masks[layer.weight], want)


# Channels and blocks.

SHAPED = (
    Layer("conv", "Conv2d", "conv.w", (3, 3, 4, 8), (3,), (2,), bias="conv.b"),
    Layer("fc", "Linear", "fc.w", (10, 12), (0,), (1,)),
    Layer("general", "Linear", "general.w", (4, 3, 2, 5), (1, 3), (0, 2)),
    Layer("grouped", "Conv2d", "grouped.w", (6, 2, 3, 3), (0,), (1,), groups=3),
    Layer("transposed", "ConvTranspose2d", "t.w", (6, 2, 3, 3), (1,), (0,), (), 2, "out"),
    *STACKS[:2],
)
BIAS = {"conv.b": np.zeros(8, np.float32)}


def shaped(seed, ties=9):
    rng = np.random.default_rng(seed)
    return BIAS | {x.weight: rng.integers(-ties, ties, x.shape).astype(np.float32) for x in SHAPED}


UNITS = (
    "output_channel",
    "input_channel",
    Block((2, 2)),
    Block((3,)),
    Block((-1, 2)),
    Block((1, 1, 2)),
    Block((100, 1)),
)


@pytest.mark.parametrize("granularity", UNITS, ids=str)
@pytest.mark.parametrize("ties", [1, 9])
def test_units_of_every_layer(granularity, ties):
    layers = [x for x in SHAPED if not isinstance(granularity, Block) or len(granularity.shape) < 3]
    layers = layers or [x for x in SHAPED if x.spatial_axes]
    params = shaped(3, ties)
    config = pp.resolve([DEFAULT | {"sparsity": 0.45}], layers, granularity=granularity)
    masks = masks_of(SMALL, params, config)
    expected = expected_masks(layers, params, granularity, config.counts)
    np.testing.assert_equal(whole(masks, layers), expected)


@pytest.mark.parametrize("granularity", UNITS[:5], ids=str)
@pytest.mark.parametrize("ties", [1, 9])
def test_units_together_as_long_as_they_fit(granularity, ties):
    params = shaped(4, ties)
    rules = [DEFAULT | {"max_sparsity_per_layer": {"conv": 0.25, "fc": 0.0}}]
    config = pp.resolve(rules, SHAPED, scope="global", granularity=granularity)
    layers = config.pools[0].layers
    rows, costs = [], []
    for layer in layers:
        rows += list(oracle.unit_sums(params[layer.weight], layer, granularity))
        costs += list(oracle.unit_sums(np.ones(layer.shape), layer, granularity).astype(int))
    for budget in (0, 1, 17, 100, 333, 400, config.pools[0].most):
        masks = masks_of(SMALL, params, config.with_counts({"rule 0": budget}))
        expected = oracle.lowest_together(rows, budget, caps_of(config), costs)
        for layer in layers:
            n = oracle.members(layer).max() + 1
            pruned, expected = np.stack(expected[:n]), expected[n:]
            want = oracle.spread(pruned, layer, granularity)
            np.testing.assert_array_equal(np.broadcast_to(masks[layer.weight], layer.shape), want)


def test_the_first_unit_that_does_not_fit_ends_it():
    """By hand, units of 8 and of 2 weights: where the next 8 do not fit, no later 2 is taken."""
    layers = [
        Layer("a", "Linear", "a.w", (3, 8), (0,), (1,)),
        Layer("b", "Linear", "b.w", (3, 2), (0,), (1,)),
    ]
    params = {
        "a.w": np.outer([1, 3, 9], np.ones(8)).astype(np.float32) / 8,
        "b.w": np.outer([2, 4, 5], np.ones(2)).astype(np.float32) / 2,
    }
    rules = [DEFAULT | {"max_sparsity_per_layer": 1.0}]
    config = pp.resolve(rules, layers, scope="global", granularity="output_channel")
    for budget, a, b in [
        (7, [1, 1, 1], [1, 1, 1]),
        (8, [0, 1, 1], [1, 1, 1]),
        (11, [0, 1, 1], [0, 1, 1]),
        (17, [0, 1, 1], [0, 1, 1]),
        (18, [0, 0, 1], [0, 1, 1]),
        (20, [0, 0, 1], [0, 0, 1]),
        (22, [0, 0, 1], [0, 0, 0]),
        (29, [0, 0, 1], [0, 0, 0]),
        (30, [0, 0, 0], [0, 0, 0]),
    ]:
        masks = masks_of(SMALL, params, config.with_counts({"rule 0": budget}))
        got = {path: mask[:, 0].astype(int).tolist() for path, mask in masks.items()}
        assert got == {"a.w": a, "b.w": b}, budget


# N:M.

TABLE = (
    Layer("dense", "Linear", "w", (16, 3), (1,), (0,)),
    Layer("linear", "Linear", "w", (3, 16), (0,), (1,)),
    Layer("hwio", "Conv2d", "w", (2, 3, 8, 3), (3,), (2,)),
    Layer("oihw", "Conv2d", "w", (3, 8, 2, 3), (0,), (1,)),
    Layer("general", "Linear", "w", (4, 8, 3), (2,), (0, 1)),
    Layer("apart", "Linear", "w", (4, 3, 8), (1,), (0, 2)),
    Layer("stacked", "Linear", "w", (8, 2, 3), (2,), (0,), stack_axes=(1,)),
)


@pytest.mark.parametrize("layer", TABLE, ids=lambda x: x.name)
@pytest.mark.parametrize("nm", [NM(1, 2), NM(2, 4), NM(3, 4), NM(1, 8), NM(5, 8)], ids=str)
@pytest.mark.parametrize("ties", [2, 1000])
def test_n_of_m_against_a_sort_of_every_group(layer, nm, ties):
    rng = np.random.default_rng(5)
    params = {"w": rng.integers(-ties, ties, layer.shape).astype(np.float32)}
    config = pp.resolve([{"op_types": ["default"]}], [layer], granularity=nm)
    assert config.counts == {}
    mask = masks_of(SMALL, params, config)["w"]
    ids, which = oracle.unit_ids(layer, nm), oracle.members(layer)
    expected = np.ones(layer.shape, bool)
    for member in range(which.max() + 1):
        for group in range(ids.max() + 1):
            at = np.nonzero((ids == group) & (which == member))
            expected[at] = ~oracle.lowest(params["w"][at], nm.of - nm.keep)
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("of", [16, 17, 64, 300])
def test_n_of_m_of_large_groups(of):
    layer = Layer("dense", "Linear", "w", (2 * of, 3), (1,), (0,))
    params = {"w": np.random.default_rng(6).integers(0, of, layer.shape).astype(np.float32)}
    config = pp.resolve([{"op_types": ["default"]}], [layer], granularity=NM(of - 3, of))
    groups = params["w"].reshape(2, of, 3)
    order = np.argsort(groups, axis=1, kind="stable")
    expected = np.ones_like(groups, bool)
    np.put_along_axis(expected, order[:, :3], False, axis=1)
    np.testing.assert_array_equal(masks_of(SMALL, params, config)["w"], expected.reshape(-1, 3))


def test_n_of_m_hand_example():
    layer = Layer("dense", "Linear", "w", (4, 2), (1,), (0,))
    params = {"w": np.asarray([[1, 5], [-7, 5], [3, 5], [2, -5]], np.float32)}
    config = pp.resolve([{"op_types": ["default"]}], [layer], granularity=NM(2, 4))
    mask = as_numpy(pp.level(as_jax(params), None, config))["w"]
    np.testing.assert_array_equal(mask, [[0, 0], [1, 0], [1, 1], [0, 1]])


# As large as real layers.


@pytest.mark.usefixtures("threads")
def test_more_weights_than_float32_can_count():
    rng = np.random.default_rng(7)
    layers = (vector(17_000_003, "a"), vector(1_900_000, "b"))
    params = {x.weight: rng.integers(0, 1000, x.shape).astype(np.float32) for x in layers}
    config = pp.resolve([{"op_types": ["default"], "sparsity": 0.501}], layers, scope="global")
    paths, count = [x.weight for x in layers], config.counts["rule 0"]
    by_jax = as_numpy(pp.level(as_jax(params), None, config))
    by_torch = as_numpy(pp.level(as_torch(params), None, config))
    together = np.concatenate([params[path] for path in paths])
    cut = np.partition(together, count - 1)[count - 1]
    pruned = together < cut
    pruned[np.flatnonzero(together == cut)[: count - pruned.sum()]] = True
    assert pruned.sum() == count
    for masks in (by_jax, by_torch):
        got = np.concatenate([masks[path] for path in paths])
        assert np.array_equal(got, ~pruned)


def test_layers_of_one_table_may_have_different_dtypes():
    params = several(8)
    mixed = {
        path: np.asarray(jnp.asarray(x, "bfloat16")) if path < "c" else x
        for path, x in params.items()
    }
    config = pp.resolve([DEFAULT | {"sparsity": 0.5}], LAYERS, scope="global")
    masks = masks_of(LARGE, mixed, config)
    scores = [mixed[x.weight].astype(np.float32) for x in LAYERS]
    expected = oracle.lowest_together(scores, config.counts["rule 0"], caps_of(config))
    for layer, pruned in zip(LAYERS, expected, strict=True):
        np.testing.assert_array_equal(masks[layer.weight], ~pruned)


@pytest.mark.parametrize("pruner", [pp.level, pp.random_pruning])
def test_stacks_of_more_weights_than_int32_counts(pruner):
    """Nothing is computed: the weights of 80 scanned layers would take 38 GB."""
    shape = (80, 8192, 28672)
    layer = Layer("w", "Linear", "w", shape, (2,), (1,), stack_axes=(0,))
    config = pp.resolve(0.5, [layer])
    stats = None if pruner is pp.level else 3
    params = {"w": jax.ShapeDtypeStruct(shape, "bfloat16")}
    masks = jax.eval_shape(lambda params: pruner(params, stats, config), params)
    assert masks["w"].shape == shape
    # Positions go on from layer to layer, and from the largest int32 to the smallest.
    one = np.broadcast_to(np.float32(1), shape)
    offsets = [piece.offset for piece in unstacked(Piece((one,), None), (0,))]
    assert offsets[:2] == [0, 8192 * 28672]
    assert offsets[10] == 10 * 8192 * 28672 - 2**32
    assert len(set(offsets)) == 80


def test_input_axes_that_do_not_lie_side_by_side():
    """By hand: output 0 reads 1 2, 3 7, 8 9 and output 1 reads 4 5, 6 10, 11 12."""
    layer = Layer("w", "Linear", "w", (2, 2, 3), out_axes=(1,), in_axes=(0, 2))
    config = pp.resolve([{"op_types": ["Linear"]}], [layer], granularity=NM(1, 2))
    weight = np.arange(1, 13, dtype=np.float32).reshape(2, 2, 3)
    mask = masks_of(SMALL, {"w": weight}, config)["w"]
    assert mask.astype(int).tolist() == [[[0, 1, 0], [0, 1, 0]], [[1, 0, 1], [1, 0, 1]]]


def test_a_criterion_without_a_meaning_for_a_granularity():
    only_elements = Criterion("single", SMALL[0].element)
    config = pp.resolve([DEFAULT], SHAPED[:1], granularity="output_channel")
    with raises(ValueError, "single", "single weights or NM", "output_channel"):
        prune.prune(only_elements, shaped(0), None, config)


@pytest.mark.parametrize(
    ("pruner", "granularity", "stats"),
    [
        (pp.level, "element", None),
        (pp.l1_norm, "output_channel", None),
        (pp.fpgm, "output_channel", None),
        (pp.random_pruning, "element", 3),
    ],
)
def test_masks_are_the_same_with_64_bit_types(pruner, granularity, stats):
    """JAX sums int32 to int64 then, unless told otherwise."""
    layers, params = SHAPED[1:3], shaped(9)
    rules = [{"op_types": ["default"], "sparsity": 0.4}]
    config = pp.resolve(rules, layers, scope="global", granularity=granularity)
    expected = as_numpy(pruner(as_jax(params), stats, config))
    with enable_x64(True), off_host():
        double = {path: jnp.asarray(x, "float64") for path, x in params.items()}
        np.testing.assert_equal(as_numpy(pruner(double, stats, config)), expected)


def test_counting_is_the_same_with_64_bit_types():
    config = pp.resolve([DEFAULT | {"sparsity": 0.4}], LAYERS[:2], scope="global")
    path = (scoring(), large)
    expected = masks_of(path, several(9), config)
    with enable_x64(True), large(), off_host():
        masks = as_numpy(prune.prune(path[0], as_jax(several(9)), None, config))
    np.testing.assert_equal(masks, expected)
