"""One table of pruners x laws x run modes. A new algorithm is a new row, and passes all of it."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import purepruning as pp
from purepruning import NM, Block, Layer
from tests import oracle
from tests.covering import covered, covering
from tests.fast import compiled_quickly, jit_once
from tests.messages import raises
from tests.modes import MODES, OVER_COUNTS, as_jax, as_numpy, as_torch, moved, stacked
from tests.statistics import (
    active,
    magnitudes,
    movement,
    norms,
    nothing,
    seed,
    slopes,
    slopes_of_elements,
)

LAYERS = (
    Layer("conv", "Conv2d", "conv.w", (3, 3, 4, 8), (3,), (2,), bias="conv.b"),
    Layer("fc", "Linear", "fc.w", (12, 10), (1,), (0,), bias="fc.b"),
    Layer("grouped", "Conv2d", "grouped.w", (3, 3, 2, 6), (3,), (2,), groups=2),
    Layer("stack", "Linear", "stack.w", (6, 3, 5), (2,), (0,), stack_axes=(1,), bias="stack.b"),
)
NORMS = (
    Layer("bn", "BatchNorm2d", "bn.w", (20,), (0,), bias="bn.b"),
    Layer("deep", "BatchNorm1d", "deep.w", (3, 16), (1,), stack_axes=(0,), bias="deep.b"),
    Layer("spread", "BatchNorm2d", "spread.w", (1, 1, 12), (2,)),
)
TABLE = LAYERS + NORMS
BIASES = {"conv.b": (8,), "fc.b": (10,), "stack.b": (3, 5), "bn.b": (20,), "deep.b": (3, 16)}


@dataclasses.dataclass(frozen=True)
class Row:
    """One pruner in one configuration, and which laws have a meaning for it.

    Attributes:
        pruner: the function.
        granularity, scope: what the config is resolved with.
        stats: ``(params, layers, granularity) ->`` what the pruner takes besides weights, in NumPy.
        layers: what is pruned of the table.
        channels: the side whose channels can be permuted, their masks following: ``"out"``,
            ``"in"``; None where positions matter.
        scale_free: whether multiplying all weights of a layer by a number changes nothing.
        idempotent: whether pruning what is already pruned to the same count changes nothing.
        portable: whether scores of random floats are bit for bit the same in every framework.
    """

    pruner: Any
    granularity: Any = "element"
    scope: str = "layer"
    stats: Callable[..., Any] = nothing
    layers: tuple[Layer, ...] = LAYERS
    channels: str | None = "out"
    scale_free: bool = True
    idempotent: bool = True
    portable: bool = True

    def __str__(self):
        settings = getattr(self.pruner, "keywords", {})
        parts = [self.name, *settings, self.granularity, self.scope]
        if self.stats is slopes_of_elements:
            parts.append("from elements")
        return "-".join(map(str, parts))

    @property
    def name(self):
        """The pruner's own name."""
        function = getattr(self.pruner, "func", self.pruner)
        return "movement.masks" if function is pp.movement.masks else function.__name__

    def config(self, sparsity=0.4, layers=None, bias="follow"):
        layers = self.layers if layers is None else layers
        rules = [{"op_names": [layer.name for layer in layers]}]
        config = pp.resolve(
            rules, layers, scope=self.scope, granularity=self.granularity, bias=bias
        )
        return config if isinstance(self.granularity, NM) else config.with_sparsity(sparsity)

    def statistics(self, params):
        return self.stats(params, self.layers, self.granularity)


def prune_scores(params, stats, config):
    return pp.prune_scores(stats, params, config)


CHANNEL, INPUTS, TILES = "output_channel", "input_channel", Block((3, 2))
ROWS = (
    Row(pp.level),
    Row(pp.level, scope="global"),
    Row(pp.level, NM(1, 2)),
    Row(pp.l1_norm, CHANNEL),
    Row(pp.l1_norm, CHANNEL, "global"),
    Row(pp.l1_norm, INPUTS, channels="in"),
    Row(pp.l1_norm, TILES, channels=None),
    Row(pp.l1_norm, TILES, "global", channels=None),
    Row(pp.l2_norm, CHANNEL),
    Row(pp.l2_norm, INPUTS, "global", channels="in"),
    Row(pp.l2_norm, TILES, channels=None),
    # A pruned channel sits at the origin, which changes its distance to the others. The inner
    # products of random floats are rounded, and every matrix product in its own order.
    Row(pp.fpgm, CHANNEL, idempotent=False, portable=False),
    Row(pp.fpgm, CHANNEL, "global", idempotent=False, portable=False),
    Row(pp.fpgm, INPUTS, channels="in", idempotent=False, portable=False),
    # A unit's score depends on its position alone.
    Row(pp.random_pruning, stats=seed(5), channels=None),
    Row(pp.random_pruning, scope="global", stats=seed(2**31 + 7), channels=None),
    Row(pp.random_pruning, CHANNEL, stats=seed(0), channels=None),
    Row(pp.random_pruning, NM(1, 2), stats=seed(1), channels=None),
    Row(pp.slim, scope="global", layers=NORMS),
    Row(pp.slim, CHANNEL, layers=NORMS),
    Row(pp.apoz_rank, CHANNEL, stats=active),
    Row(pp.apoz_rank, CHANNEL, "global", stats=active),
    Row(pp.mean_activation_rank, CHANNEL, stats=active),
    Row(pp.taylor_fo, stats=slopes),
    Row(pp.taylor_fo, NM(1, 2), stats=slopes),
    Row(pp.taylor_fo, CHANNEL, stats=slopes),
    Row(pp.taylor_fo, CHANNEL, "global", stats=slopes),
    Row(pp.taylor_fo, CHANNEL, stats=slopes_of_elements),
    Row(pp.taylor_fo, INPUTS, stats=slopes, channels="in"),
    Row(pp.taylor_fo, TILES, "global", stats=slopes, channels=None),
    # The sign of the gradients goes with the position, so permuted channels have other sums.
    Row(functools.partial(pp.taylor_fo, grouped=True), CHANNEL, stats=slopes, channels=None),
    Row(pp.fisher, scope="global", stats=slopes_of_elements),
    Row(pp.snip, scope="global", stats=slopes),
    Row(pp.snip, CHANNEL, stats=slopes, channels=None),
    # Scores are signed: what is pruned already, of score 0, is not the least.
    Row(pp.grasp, stats=slopes, channels=None, idempotent=False),
    Row(pp.synflow, NM(1, 2), stats=slopes),
    Row(pp.wanda, stats=norms),
    Row(pp.wanda, NM(1, 2), stats=norms),
    # Sums over the outputs of a group change with what is in the group.
    Row(pp.ria, stats=norms, channels=None),
    Row(pp.ria, TILES, stats=norms, channels=None),
    Row(pp.movement.masks, stats=movement),
    Row(pp.movement.masks, NM(1, 2), stats=movement),
    Row(pp.movement.masks, CHANNEL, "global", stats=movement),
    Row(pp.movement.masks, TILES, stats=movement, channels=None),
    Row(prune_scores, stats=magnitudes),
    Row(prune_scores, CHANNEL, "global", stats=magnitudes),
    Row(prune_scores, TILES, stats=magnitudes, channels=None),
)
#: A layer's units take the same way for all criteria of a family, so that these run with --full.
MORE = (
    Row(functools.partial(pp.fisher, damping=1.0), CHANNEL, stats=slopes_of_elements),
    Row(pp.wanda, CHANNEL, "global", stats=norms),
)
EVERY_ROW = ROWS + MORE


#: All kinds of selection. Where that alone matters, XLA compiles these rows, each for seconds.
SELECTIONS = (*ROWS[:5], ROWS[7])


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled():
    """Linux lets a process map only so many regions, and every compiled function takes some."""
    yield
    jax.clear_caches()


def integers(seed=0):
    """Distinct magnitudes in random order and signs: sums are exact in float32."""
    rng = np.random.default_rng(seed)
    sizes = [np.prod(layer.shape) for layer in TABLE]
    values = rng.permutation(np.arange(1, sum(sizes) + 1)) * rng.choice([-1, 1], sum(sizes))
    parts = np.split(values.astype(np.float32), np.cumsum(sizes)[:-1])
    weights = {x.weight: p.reshape(x.shape) for x, p in zip(TABLE, parts, strict=True)}
    return weights | {path: np.ones(shape, np.float32) for path, shape in BIASES.items()}


def floats(seed=0):
    rng = np.random.default_rng(seed)
    normal = {x.weight: rng.normal(size=x.shape).astype(np.float32) for x in TABLE}
    return normal | {path: np.ones(shape, np.float32) for path, shape in BIASES.items()}


def marks(row):
    return [pytest.mark.full] if row in MORE else []


def each(*parts):
    """Cases of a row, and maybe a mode, as parameters."""
    return [
        pytest.param(*case, id="-".join(map(str, case)), marks=marks(case[0])) for case in parts
    ]


def cases(applies=lambda row: True):
    """Every row a law applies to, in both frameworks; others give the same, which is a law too."""
    return pytest.mark.parametrize(
        ("row", "run"),
        [
            pytest.param(row, MODES[mode], id=f"{row}-{mode}", marks=marks(row))
            for row in EVERY_ROW
            if applies(row)
            for mode in ("jax_eager", "torch_eager")
        ],
    )


def needs_stats(row):
    """Whether the pruner looks at statistics rather than at weights."""
    return row.stats is not nothing and row.pruner is not pp.random_pruning


rows = pytest.mark.parametrize("row", each(*zip(EVERY_ROW)))
# Where nothing depends on the scope or on what the weights are, some of the rows are enough.
layer_rows = pytest.mark.parametrize(
    "row",
    each(
        *((x,) for x in EVERY_ROW if x.scope == "layer" and x.pruner is not pp.random_pruning),
    ),
)
# Scores are a plain dict; test_movement.py and test_criteria_of_users.py have what is wrong there.
WITH_STATS = [x for x in EVERY_ROW if needs_stats(x) and x.stats not in (movement, magnitudes)]
SOME_WITH_STATS = [x for x in WITH_STATS if x not in MORE]
with_stats = pytest.mark.parametrize("row", each(*zip(WITH_STATS)))
counted = pytest.mark.parametrize(
    "row", each(*((row,) for row in EVERY_ROW if not isinstance(row.granularity, NM)))
)


def prune(row, params, sparsity=0.4, run=MODES["jax_eager"]):
    return run(row.pruner, params, row.statistics(params), row.config(sparsity))


def whole(row, masks):
    """Masks of the weights, broadcast to their shapes."""
    return {x.weight: np.broadcast_to(masks[x.weight], x.shape) for x in row.layers}


def equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[path], b[path]) for path in a)


def assert_equal(a, b):
    np.testing.assert_equal(a, b)
    assert {path: mask.shape for path, mask in a.items()} == {p: m.shape for p, m in b.items()}


def apply(params, masks):
    return {p: np.where(masks[p], x, np.float32(0)) if p in masks else x for p, x in params.items()}


def pruned_units(row, masks):
    """``(stacked, units)`` of each layer: which units have lost all their weights."""
    gone = {}
    for layer in row.layers:
        mask = whole(row, masks)[layer.weight]
        kept = oracle.unit_sums(mask, layer, row.granularity)
        size = oracle.unit_sums(np.ones(layer.shape), layer, row.granularity)
        assert isinstance(row.granularity, NM) or np.all((kept == 0) | (kept == size))
        gone[layer.name] = kept == 0
    return gone


# The laws.


@cases()
def test_prunes_exactly_as_many_units_as_the_config_says(row, run):
    config, masks = row.config(), prune(row, integers(), run=run)
    if isinstance(row.granularity, NM):
        for layer in row.layers:
            kept = oracle.unit_sums(whole(row, masks)[layer.weight], layer, row.granularity)
            assert np.all(kept == row.granularity.keep)
        return
    gone = pruned_units(row, masks)
    if row.scope == "layer":
        assert config.counts.keys() == gone.keys()
        for name, units in gone.items():
            assert np.all(units.sum(axis=1) == config.counts[name])
            assert 0 < config.counts[name] == int(0.4 * units.shape[1])
        return
    pruned = sum(int(np.sum(~mask)) for mask in whole(row, masks).values())
    sizes = [oracle.unit_sums(np.ones(x.shape), x, row.granularity) for x in row.layers]
    largest, total = max(s.max() for s in sizes), sum(s.sum() for s in sizes)
    assert config.counts["rule 0"] - largest < pruned <= config.counts["rule 0"] == int(0.4 * total)


def is_run(row, mode):
    """N:M has no counts to map over; ``SELECTIONS`` are all that differs in eager JAX elsewhere."""
    if mode == "jax_device":
        return row in SELECTIONS
    return not (isinstance(row.granularity, NM) and mode in OVER_COUNTS)


def parts(row, *mode):
    """What of a row can go wrong in one run mode and not in another."""
    pruner = (row.name, *getattr(row.pruner, "keywords", ()), row.stats is slopes_of_elements)
    return pruner, row.granularity, row.scope, *mode


EVERY_RUN = [(row, mode) for row in EVERY_ROW for mode in MODES if is_run(row, mode)]
RUNS = [(row, mode) for row, mode in EVERY_RUN if row not in MORE]
COMPILED = [(row, mode) for row, mode in RUNS if mode.startswith(("jax_jit", "jax_vmap"))]


# What compiles, for a second each, is run for every pair of pruner, granularity, scope and mode.
@pytest.mark.parametrize(
    ("row", "mode"),
    covered(
        EVERY_RUN,
        [*covering(COMPILED, factors=parts), *(run for run in RUNS if run not in COMPILED)],
        [f"{row}-{mode}" for row, mode in EVERY_RUN],
    ),
)
def test_is_the_same_in_every_run_mode(row, mode):
    """For integers, and for random floats where rounding is the same in every framework.

    Where counts alone are mapped over, scores are computed as in the other compiled modes, and so
    XLA's own optimisations are left out.
    """
    quickly = compiled_quickly() if mode == "jax_vmap_counts" else contextlib.nullcontext()
    for params in (integers(1), floats()) if row.portable else (integers(1),):
        with quickly:
            masks = prune(row, params, run=MODES[mode])
        assert_equal(masks, prune(row, params))


@cases(lambda row: not isinstance(row.granularity, NM))
def test_a_higher_count_revives_nothing(row, run):
    before = prune(row, integers(2), 0.0, run)
    assert all(mask.all() for mask in before.values())
    for sparsity in (0.2, 0.45, 0.75):
        masks = prune(row, integers(2), sparsity, run)
        assert all(np.all(masks[path] <= before[path]) for path in masks)
        assert not equal(masks, before)
        before = masks


@cases(lambda row: row.channels is not None)
def test_permuted_channels_permute_the_mask(row, run):
    # At the cut, no two channels of these weights tie, which would then be told apart by position.
    rng, params = np.random.default_rng(3), integers(5)
    masks, moved_masks, shuffled = prune(row, params, run=run), {}, dict(params)
    for layer in row.layers:
        side = "out" if layer.groups > 1 else row.channels
        (axis,) = layer.out_axes if side == "out" else layer.in_axes
        # Input channels of a grouped convolution belong to groups, which must not mix.
        order = rng.permutation(layer.shape[axis])
        if layer.groups > 1 and row.channels == "in":
            order = np.arange(layer.shape[axis])
        shuffled[layer.weight] = np.take(params[layer.weight], order, axis)
        moved_masks[layer.weight] = np.take(whole(row, masks)[layer.weight], order, axis)
        if layer.bias in masks:
            moved_masks[layer.bias] = masks[layer.bias]
            if side == "out":
                moved_masks[layer.bias] = np.take(masks[layer.bias], order, -1)
    got = prune(row, shuffled, run=run)
    assert_equal(got | whole(row, got), moved_masks)


@cases(lambda row: row.scale_free)
def test_scaling_changes_nothing(row, run):
    params = integers(4)
    # In global scope layers are compared, so all are scaled alike. The products are exact.
    factors = dict.fromkeys(params, 3) if row.scope == "global" else {}
    rng = np.random.default_rng(4)
    scaled = {p: x * np.float32(factors.get(p) or rng.integers(1, 200)) for p, x in params.items()}
    assert_equal(prune(row, scaled, run=run), prune(row, params, run=run))


@cases(lambda row: row.idempotent)
def test_pruning_again_to_the_same_count_changes_nothing(row, run):
    params = floats(5)
    masks = prune(row, params, run=run)
    assert_equal(prune(row, apply(params, masks), run=run), masks)


@pytest.mark.parametrize(
    ("row", "mode"),
    each(
        *((row, mode) for row in EVERY_ROW for mode in ("torch_eager", "torch_vmap")),
        *((row, mode) for row in SELECTIONS for mode in ("jax_device", "torch_device")),
        (ROWS[0], "jax_vmap_params"),
    ),
)
def test_what_is_pruned_stays_pruned(row, mode):
    """Other weights, of which other units would go; those that went are part of the count."""
    before = prune(row, integers(2), 0.3)
    convert = as_torch if mode.startswith("torch") else as_jax
    config = row.config(0.6).with_masks(convert(before))
    masks = MODES[mode](row.pruner, integers(7), row.statistics(integers(7)), config)
    assert all(np.all(masks[path] <= before[path]) for path in masks)
    if isinstance(row.granularity, NM):
        assert_equal(masks, before)
    elif row.scope == "layer":
        for name, units in pruned_units(row, masks).items():
            assert np.all(units.sum(axis=1) == config.counts[name])
    else:
        # A unit is charged at its weights, so that a new one may not fit where another did.
        alone = prune(row, integers(7), 0.6)
        gone, without = (
            sum(int(np.sum(~m)) for m in whole(row, x).values()) for x in (masks, alone)
        )
        assert abs(gone - without) <= 36
        assert gone <= config.counts["rule 0"]


@pytest.mark.parametrize(
    ("row", "mode"),
    each(
        *(
            (row, mode)
            for row in EVERY_ROW
            for mode in ("torch_eager", "torch_device", "jax_device")
            if row.scope == "layer" and row.granularity != NM(1, 2)
            if mode == "torch_eager" or row in SELECTIONS
        )
    ),
)
def test_inverted_scores_prune_the_most_important(row, mode):
    """Of the units that stay at one count, exactly those go at the count of the others."""
    config, rest = row.config(0.4), row.config()
    sizes = {pool.name: pool.size for pool in config.pools}
    rest = rest.with_counts({name: sizes[name] - k for name, k in config.counts.items()})
    params = integers(3)
    stats = row.statistics(params)
    expected = pruned_units(row, MODES[mode](row.pruner, params, stats, rest))
    inverted = pp.invert_scores(row.pruner)
    got = pruned_units(row, MODES[mode](inverted, params, stats, config))
    for name, units in expected.items():
        np.testing.assert_array_equal(got[name], ~units)


@layer_rows
@pytest.mark.parametrize(
    ("dtype", "mode"),
    [("bfloat16", "jax_eager"), ("bfloat16", "torch_eager"), ("float16", "torch_eager")],
)
def test_half_precision_is_scored_in_float32(row, dtype, mode):
    half = {p: np.asarray(jnp.asarray(x).astype(dtype)) for p, x in floats(6).items()}
    single = {path: x.astype(np.float32) for path, x in half.items()}
    assert_equal(prune(row, half, run=MODES[mode]), prune(row, single, run=MODES[mode]))


@rows
def test_the_order_of_params_and_layers_changes_nothing(row):
    params = integers(7)
    config = row.config(layers=row.layers[::-1])
    turned = dict(reversed(params.items()))
    for run in (MODES["jax_eager"], MODES["torch_eager"]):
        got = run(row.pruner, turned, row.statistics(params), config)
        assert_equal(got, prune(row, params))


@rows
def test_an_empty_config_prunes_nothing(row):
    config = pp.resolve([], TABLE, scope=row.scope, granularity=row.granularity)
    params = integers()
    stats = row.statistics(params)
    masks = row.pruner(as_jax(params), stats, config)
    assert masks == dict.fromkeys(params)
    assert row.pruner(as_torch(params), stats, config) == {}


@layer_rows
def test_unpruned_leaves_have_no_mask(row):
    some = row.layers[:2]
    # Statistics may be of more layers than are pruned.
    params, stats = integers(), row.statistics(integers())
    tree = {"whole": as_jax(params), "scale": jnp.ones(3), "steps": jnp.int32(4)}
    layers = tuple(
        dataclasses.replace(x, weight=f"whole.{x.weight}", bias=f"whole.{x.bias}") for x in some
    )
    masks = row.pruner(tree, moved(as_jax, stats), row.config(layers=layers))
    assert jax.tree.structure(masks, is_leaf=lambda x: x is None) == jax.tree.structure(tree)
    expected = {x.weight for x in some}
    if row.granularity != INPUTS and not isinstance(row.granularity, NM):
        expected |= {x.bias for x in some}
    assert set(as_numpy(masks)) == {f"whole.{path}" for path in expected}
    torch_masks = row.pruner(as_torch(params), moved(as_torch, stats), row.config(layers=some))
    assert set(torch_masks) == expected
    assert all(mask.dtype == torch.bool for mask in torch_masks.values())
    assert all(mask.dtype == jnp.bool for mask in jax.tree.leaves(masks))


@cases(lambda row: row.granularity not in (INPUTS,) and not isinstance(row.granularity, NM))
def test_a_bias_is_pruned_where_its_whole_channel_is(row, run):
    masks = prune(row, integers(8), 0.75, run)
    for layer in row.layers:
        if layer.bias is not None:
            keep = oracle.unit_sums(whole(row, masks)[layer.weight], layer, CHANNEL) > 0
            assert np.array_equal(masks[layer.bias], keep.reshape(BIASES[layer.bias]))


@layer_rows
def test_a_bias_can_be_left_alone(row):
    params = integers(8)
    weights = {path: x for path, x in params.items() if path not in BIASES}
    masks = prune(row, params)
    for run in (MODES["jax_eager"], MODES["torch_eager"]):
        kept = run(row.pruner, weights, row.statistics(params), row.config(bias="keep"))
        assert_equal(kept, {x.weight: masks[x.weight] for x in row.layers})


# Statistics are arguments like any other.


@pytest.mark.parametrize(
    ("row", "framework"),
    covered(
        [(row, framework) for row in WITH_STATS for framework in ("jax", "torch")],
        [(row, "torch") for row in SOME_WITH_STATS]
        + [(row, "jax") for (row,) in covering(zip(SOME_WITH_STATS), factors=parts, strength=1)],
        [f"{row}-{framework}" for row in WITH_STATS for framework in ("jax", "torch")],
    ),
)
def test_statistics_alone_can_be_mapped_over(row, framework):
    params, config = integers(1), row.config()
    stats = stacked(row.statistics(params))
    if framework == "jax":
        weights = as_jax(params)
        masks = jit_once(jax.vmap(lambda s: row.pruner(weights, s, config)))(stats)
    else:
        weights = as_torch(params)
        mapped = torch.func.vmap(lambda s: row.pruner(weights, s, config))
        masks = mapped(moved(as_torch, stats))
    assert_equal({p: mask[1] for p, mask in as_numpy(masks).items()}, prune(row, params))


@with_stats
def test_statistics_in_numpy_serve_either_framework(row):
    """As they come back from a checkpoint."""
    params = integers(1)
    for framework in (as_jax, as_torch):
        masks = row.pruner(framework(params), row.statistics(params), row.config())
        assert_equal(as_numpy(masks), prune(row, params))


# Bad input raises before anything is computed: the leaves here cannot be computed with.


def shape_only(shape, dtype="float32"):
    """Has a shape and a dtype, and nothing to compute with."""
    return jax.ShapeDtypeStruct(shape, dtype)


def untouchable(**changes):
    leaves = {path: shape_only(x.shape) for path, x in integers().items()}
    return {p: x for p, x in (leaves | changes).items() if x is not None}


def bad_leaves(layer):
    """What is wrong, which leaf it is, the error and what its message says."""
    weight, shape = layer.weight, layer.shape
    return {
        "shape": (weight, shape_only((9, *shape)), ValueError, (str((9, *shape)), str(shape))),
        "no-weight": (weight, None, KeyError, ("nearest",)),
        "no-bias": (layer.bias, None, KeyError, ("bias='keep'",)),
        "integer": (weight, shape_only(shape, "int8"), ValueError, ("int8",)),
        "boolean": (weight, shape_only(shape, "bool"), ValueError, ("bool",)),
    }


@rows
@pytest.mark.parametrize("bad", bad_leaves(LAYERS[1]))
def test_bad_params_raise_before_any_array_work(row, bad):
    layer = row.layers[1]
    path, leaf, error, parts = bad_leaves(layer)[bad]
    with raises(error, row.name, f"layer '{layer.name}'", f"'{path}'", *parts):
        row.pruner(untouchable(**{path: leaf}), row.statistics(integers()), row.config())


@with_stats
def test_bad_statistics_raise_before_any_array_work(row):
    good, config = row.statistics(integers()), row.config()

    def refuses(stats, error, *parts):
        with raises(error, row.name, *parts):
            row.pruner(untouchable(), stats, config)

    def without_fc(field):
        return {k: v for k, v in field.items() if k != "fc"} if isinstance(field, dict) else field

    other = slopes if row.stats is active else active
    other = other(integers(), LAYERS, CHANNEL)
    refuses(None, TypeError, "got None")
    refuses(other, TypeError, type(other).__name__)
    refuses(type(good)(*map(without_fc, good)), KeyError, "layer 'fc'")
    wider = jax.tree.map(lambda x: np.concatenate([x, x], -1) if x.ndim else x, good)
    refuses(wider, ValueError, "layer 'conv'", "another model")
    refuses(jax.tree.map(np.zeros_like, good), ValueError, "layer 'conv'", "empty")
    refuses(moved(as_torch, good), TypeError, "layer 'conv'", "torch")


@pytest.mark.parametrize("row", [x for x in ROWS if x.stats is nothing], ids=str)
def test_statistics_without_a_meaning_raise_before_any_array_work(row):
    for stats, got in ((5, "got 5"), (active(integers(), LAYERS), "got ActivationStats")):
        with raises(TypeError, row.name, "stats=None", got):
            row.pruner(untouchable(), stats, row.config())


@counted
def test_bad_counts_raise_before_any_array_work(row):
    config = row.config()
    pool = config.pools[-1]

    def refuses(count, error, *parts):
        with raises(error, f"'{pool.name}'", *parts):
            changed = config.with_counts({**config.counts, pool.name: count})
            row.pruner(untouchable(), row.statistics(integers()), changed)

    refuses(None, ValueError, "with_sparsity")
    refuses(-1, ValueError, "[0, ", "-1")
    refuses(pool.size + 1, ValueError, "[0, ", pool.size + 1)
    if row.scope == "layer":
        refuses(pool.size, ValueError, "allow_empty")
    refuses(2.0, TypeError, "integer", "2.0")
    refuses(True, TypeError, "integer", "True")
    refuses(np.float32(1), TypeError, "integer", "float32")
    refuses(np.asarray([1, 2]), ValueError, "(2,)", "vmap")


@pytest.mark.parametrize(
    ("pruner", "granularity", "stats"),
    [
        (pp.level, CHANNEL, nothing),
        (pp.l1_norm, "element", nothing),
        (pp.l2_norm, "element", nothing),
        (pp.fpgm, "element", nothing),
        (pp.fpgm, TILES, nothing),
        *(
            (p, g, active)
            for p in (pp.apoz_rank, pp.mean_activation_rank)
            for g in ("element", INPUTS, TILES)
        ),
    ],
)
def test_a_granularity_without_meaning_raises_before_any_array_work(pruner, granularity, stats):
    row = Row(pruner, granularity, stats=stats)
    with raises(ValueError, row.name, f"granularity={granularity!r}"):
        row.pruner(untouchable(), row.statistics(integers()), row.config())


# NaN.


# Neither a hash nor a count is ever NaN.
of_floats = [row for row in EVERY_ROW if row.pruner not in (pp.random_pruning, pp.apoz_rank)]


@pytest.mark.parametrize("row", each(*zip(of_floats)))
def test_nan_is_an_error_that_names_its_layers(row):
    params, layers = integers(), (row.layers[1], row.layers[-1])
    for layer in layers:
        params[layer.weight].reshape(-1)[7] = np.nan
    names = ", ".join(repr(layer.name) for layer in layers)
    for run in (MODES["jax_eager"], MODES["torch_eager"]):
        with raises(ValueError, row.name, names, "NaN"):
            prune(row, params, run=run)


@pytest.mark.parametrize("row", ROWS[:2], ids=str)
@pytest.mark.parametrize("mode", ["jax_jit", "jax_vmap_params", "torch_vmap"])
def test_nan_that_cannot_be_seen_stays_in_the_weights(row, mode):
    params = floats(9)
    params["fc.w"][0, :4] = np.nan
    params["fc.w"][1, :4] = np.inf
    masks = prune(row, params, 0.9, MODES[mode])
    assert masks["fc.w"][0, :4].all()


# Norms are the same in every framework, layout and mode also for random floats.


@pytest.mark.parametrize("pruner", [pp.l1_norm, pp.l2_norm])
@pytest.mark.parametrize("granularity", ["output_channel", "input_channel", Block((2, 3))], ids=str)
def test_norms_do_not_depend_on_the_layout(pruner, granularity):
    rng = np.random.default_rng(10)
    oihw = rng.normal(size=(60, 40, 3, 3)).astype(np.float32)
    # Near-ties: every channel again, permuted inside, so that only the order of addition differs.
    oihw[30:] = oihw[:30, ::-1, ::-1, ::-1]
    oihw[:, 20:] = oihw[::-1, :20, :, ::-1]
    hwio = np.ascontiguousarray(oihw.transpose(2, 3, 1, 0))
    by_torch = Layer("conv", "Conv2d", "w", oihw.shape, (0,), (1,))
    by_flax = Layer("conv", "Conv2d", "w", hwio.shape, (3,), (2,))
    masks = []
    for layer, weight in ((by_torch, oihw), (by_flax, hwio)):
        rules = [{"op_types": ["Conv2d"], "sparsity": 0.37}]
        config = pp.resolve(rules, [layer], granularity=granularity)
        for mode in ("jax_eager", "torch_eager", "torch_vmap"):
            mask = MODES[mode](pruner, {"w": weight}, None, config)["w"]
            mask = np.broadcast_to(mask, layer.shape)
            masks.append(mask if layer is by_torch else mask.transpose(3, 2, 0, 1))
    if isinstance(granularity, Block):  # its tiles count in the layout's own order among ties
        masks = masks[:3]
    for mask in masks[1:]:
        np.testing.assert_array_equal(mask, masks[0])


def rows_of(values):
    return {"w": np.asarray(values, np.float32)}


ROWS_LAYER = Layer("fc", "Linear", "w", (5, 3), (0,), (1,))


@pytest.mark.parametrize(
    ("pruner", "weight", "order"),
    [
        (pp.l1_norm, [[1, 1, 1], [2, -2, 0], [0, 0, 2], [0, 0, 0], [9, 9, 9]], [3, 2, 0, 1]),
        (pp.l2_norm, [[1, 1, 1], [2, -2, 0], [0, 0, 2], [0, 0, 0], [9, 9, 9]], [3, 0, 2, 1]),
        # Squares of these overflow or vanish in float32, the norms do not.
        (pp.l2_norm, [[3e30] * 3, [2e30] * 3, [1e30] * 3, [4e30] * 3, [9e30] * 3], [2, 1, 0, 3]),
        (pp.l2_norm, [[3e-30] * 3, [2e-30] * 3, [1e-30] * 3, [4e-30] * 3, [1] * 3], [2, 1, 0, 3]),
        # Sums of distances 109, 106, 104, 107: the median is nearest to all others together.
        (pp.fpgm, [[0, 0, 0], [1, 0, 0], [3, 0, 0], [6, 0, 0], [99, 0, 0]], [2, 1, 3, 0]),
    ],
)
def test_channels_go_in_this_order(pruner, weight, order):
    rules = [{"op_types": ["Linear"], "sparsity": 0.0}]
    config = pp.resolve(rules, [ROWS_LAYER], granularity="output_channel")
    for mode in ("jax_eager", "torch_eager"):
        for count in range(5):
            changed = config.with_counts({"fc": count})
            mask = MODES[mode](pruner, rows_of(weight), None, changed)["w"]
            assert sorted(np.flatnonzero(~mask[:, 0])) == sorted(order[:count])


def test_blocks_at_the_edge_are_ranked_by_their_mean():
    """5 x 3 in blocks of 2 x 2: edge blocks of 2 and of 1 weights count as if they were whole."""
    layer = Layer("fc", "Linear", "w", (5, 3), (0,), (1,))
    weight = np.asarray(
        [[4, 4, 1], [4, 4, 1], [2, 2, 6], [2, 2, 6], [5, 5, 3]], np.float32
    )  # means 4, 1; 2, 6; 5, 3
    rules = [{"op_types": ["Linear"], "sparsity": 0.0}]
    config = pp.resolve(rules, [layer], granularity=Block((2, 2)))
    for pruner in (pp.l1_norm, pp.l2_norm):
        for mode in ("jax_eager", "torch_eager"):
            for count in range(6):
                changed = config.with_counts({"fc": count})
                mask = MODES[mode](pruner, {"w": weight}, None, changed)["w"]
                np.testing.assert_array_equal(mask, weight > count)


def test_fpgm_in_blocks_of_rows_is_fpgm():
    """More channels than are compared at a time."""
    layer = Layer("fc", "Linear", "w", (700, 6), (0,), (1,))
    weight = np.random.default_rng(11).integers(-50, 50, layer.shape).astype(np.float32)
    distances = np.linalg.norm(weight[:, None] - weight[None, :], axis=2).sum(axis=1)
    rules = [{"op_types": ["Linear"], "sparsity": 0.3}]
    config = pp.resolve(rules, [layer], granularity="output_channel")
    for mode in ("jax_eager", "torch_eager"):
        mask = MODES[mode](pp.fpgm, {"w": weight}, None, config)["w"]
        np.testing.assert_array_equal(mask[:, 0], ~oracle.lowest(distances, 210))


# Random pruning.

RANDOM_LAYER = Layer("fc", "Linear", "w", (20, 30), (0,), (1,))
RANDOM_CONFIG = pp.resolve([{"op_types": ["Linear"], "sparsity": 0.25}], [RANDOM_LAYER])


def test_random_pruning_is_uniform():
    params = {"w": jnp.ones((20, 30))}
    prune_with = jax.jit(jax.vmap(lambda key: pp.random_pruning(params, key, RANDOM_CONFIG)["w"]))
    n = 2000
    pruned = 1 - np.asarray(prune_with(jax.random.split(jax.random.key(0), n))).astype(float)
    assert np.all(pruned.sum(axis=(1, 2)) == 150)
    deviation = (pruned.mean(axis=0) - 0.25) / np.sqrt(0.25 * 0.75 / n)
    assert np.abs(deviation).max() < 4.5  # of 600 positions
    assert 0.85 < deviation.std() < 1.15
    # Nor do neighbours, in position or in key, go together.
    flat = pruned.reshape(n, -1) - 0.25
    for lag in (1, 2, 30):
        assert abs(np.mean(flat[:, lag:] * flat[:, :-lag]) / (0.25 * 0.75)) < 0.01
    seeds = np.asarray(prune_with(jnp.arange(n))).reshape(n, -1) - 0.75
    assert abs(np.mean(seeds[1:] * seeds[:-1]) / (0.25 * 0.75)) < 0.01


def test_every_way_to_give_a_key():
    expected = MODES["jax_eager"](pp.random_pruning, {"w": np.ones((20, 30))}, 7, RANDOM_CONFIG)
    keys = [7, np.int64(7), jax.random.key(7), jax.random.PRNGKey(7), jnp.uint32(7)]
    for framework, more in ((as_jax, []), (as_torch, [torch.tensor(7)])):
        for key in keys + more:
            params = framework({"w": np.ones((20, 30), np.float32)})
            masks = as_numpy(pp.random_pruning(params, key, RANDOM_CONFIG))
            np.testing.assert_equal(masks, expected)
    with raises(TypeError, "random key"):
        pp.random_pruning({"w": jnp.ones((20, 30))}, None, RANDOM_CONFIG)


def test_random_masks_differ_by_key_and_by_layer_but_not_by_company():
    def masks(layers, key):
        params = {x.weight: np.ones(x.shape, np.float32) for x in layers}
        config = pp.resolve([{"op_types": ["Linear"], "sparsity": 0.25}], layers)
        return MODES["jax_eager"](pp.random_pruning, params, key, config)

    twin = dataclasses.replace(RANDOM_LAYER, name="twin", weight="v")
    both = masks([RANDOM_LAYER, twin], 3)
    assert not np.array_equal(both["w"], both["v"])
    np.testing.assert_array_equal(both["w"], masks([RANDOM_LAYER], 3)["w"])
    assert not np.array_equal(both["w"], masks([RANDOM_LAYER], 4)["w"])
    np.testing.assert_array_equal(both["w"], masks([RANDOM_LAYER], jnp.asarray([0, 3]))["w"])
    assert not np.array_equal(both["w"], masks([RANDOM_LAYER], jnp.asarray([1, 3]))["w"])


def test_random_masks_of_stacked_layers_differ():
    layer = Layer("stack", "Linear", "w", (3, 20, 30), (1,), (2,), stack_axes=(0,))
    for granularity in ("element", CHANNEL):
        rules = [{"op_types": ["Linear"], "sparsity": 0.25}]
        config = pp.resolve(rules, [layer], granularity=granularity)
        mask = pp.random_pruning({"w": jnp.ones(layer.shape)}, 3, config)["w"]
        assert not any(bool(jnp.all(mask[i] == mask[i - 1])) for i in range(3))


def test_random_masks_under_torch_vmap_over_keys():
    params = {"w": torch.ones(20, 30)}
    keys = torch.arange(5)
    run = torch.func.vmap(lambda key: pp.random_pruning(params, key, RANDOM_CONFIG))
    masks = run(keys)["w"]
    for key, mask in zip(keys, masks, strict=True):
        expected = pp.random_pruning(params, int(key), RANDOM_CONFIG)["w"]
        assert torch.equal(mask, expected)
