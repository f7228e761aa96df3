"""Slim, APoZ, mean activation and Taylor: hand-computed scores, the laws, and bad input.

The laws are those of ``test_laws``, with statistics that follow the weights.
"""

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
from purepruning.stats import activations, gradients
from tests import oracle
from tests.messages import raises
from tests.modes import as_jax, as_numpy, as_torch

CHANNEL, INPUTS, TILES = "output_channel", "input_channel", Block((3, 2))

WEIGHTED = (
    Layer("conv", "Conv2d", "conv.w", (3, 3, 4, 8), (3,), (2,), bias="conv.b"),
    Layer("fc", "Linear", "fc.w", (12, 10), (1,), (0,), bias="fc.b"),
    Layer("grouped", "Conv2d", "grouped.w", (3, 3, 2, 6), (3,), (2,), groups=2),
    Layer("inner", "Linear", "inner.w", (6, 3, 5), (2,), (0,), stack_axes=(1,)),
    Layer("stack", "Linear", "stack.w", (3, 6, 5), (2,), (1,), stack_axes=(0,), bias="stack.b"),
)
NORMS = (
    Layer("bn", "BatchNorm2d", "bn.w", (20,), (0,), bias="bn.b"),
    Layer("deep", "BatchNorm1d", "deep.w", (3, 16), (1,), stack_axes=(0,), bias="deep.b"),
    Layer("spread", "BatchNorm2d", "spread.w", (1, 1, 12), (2,)),
)
BIASES = {"conv.b": (8,), "fc.b": (10,), "stack.b": (3, 5), "bn.b": (20,), "deep.b": (3, 16)}


# Statistics that follow the weights. Each is a few lines of NumPy, in which a channel's statistics
# depend on its own weights alone.


def as_total(kind, x):
    x = np.asarray(x)
    if kind is pp.stats.accumulate.Count:
        return kind((x >> 20).astype(np.int32), (x & (2**20 - 1)).astype(np.int32))
    return kind(x.astype(np.float32), np.zeros_like(x, np.float32))


POSITIONS = 2001  # so many that hardly any two channels have equally many zeros


def activity(params, layers):
    """Activation statistics in NumPy, of outputs ``sum(weight * input)``."""
    fields = {field: {} for field in activations.ActivationStats._fields}
    for layer in layers:
        ids = oracle.members(layer) * layer.out_channels + oracle.unit_ids(layer, CHANNEL)
        order = np.argsort(ids.reshape(-1), kind="stable")
        rows = np.float64(params[layer.weight]).reshape(-1)[order]
        rows = rows.reshape(-1, layer.out_channels, rows.size // (ids.max() + 1))
        x = np.random.default_rng(rows.shape[-1]).integers(-3, 4, (rows.shape[-1], POSITIONS))
        y = np.maximum(rows @ x, 0)
        for field, value in {
            "samples": np.asarray(POSITIONS),
            "positions": np.asarray(POSITIONS),
            "zeros": np.sum(y == 0, -1),
            "sums": np.sum(y, -1),
            "magnitudes": np.sum(np.abs(y), -1),
            "squares": np.sum(y * y, -1),
        }.items():
            kind = pp.stats.accumulate.Sum if field[1] in "uaq" else pp.stats.accumulate.Count
            kind = pp.stats.accumulate.Count if field == "samples" else kind
            fields[field][layer.name] = as_total(kind, value)
    return activations.ActivationStats(**fields)


def slopes(params, layers, granularity, keep=gradients.KEPT):
    """Gradient statistics in NumPy: of one step, with gradients of 1 or -1, by turns."""
    kept = {kind: {} for kind in gradients.KEPT}
    for layer in layers:
        single = granularity == "element" or isinstance(granularity, NM)
        term = np.float64(params[layer.weight])
        term = term * np.where(np.arange(term.size) % 3 == 0, -1, 1).reshape(term.shape)

        def unit(x, layer=layer):
            return oracle.unit_sums(x, layer, granularity)

        kept["squares"][layer.name] = term**2 if single else unit(term**2)
        kept["grouped"][layer.name] = term**2 if single else unit(term) ** 2
        kept["signed"][layer.name] = term if single else unit(term)
    Count, Sum = pp.stats.accumulate.Count, pp.stats.accumulate.Sum
    return gradients.GradientStats(
        as_total(Count, 1),
        *({n: as_total(Sum, x) for n, x in kept[k].items()} if k in keep else {} for k in kept),
    )


@dataclasses.dataclass(frozen=True)
class Row:
    """One pruner in one configuration; the fields are those of ``test_laws.Row``.

    ``stats`` makes the statistics from ``(params, layers, granularity)``.
    """

    pruner: Any
    granularity: Any = "element"
    scope: str = "layer"
    stats: Callable[..., Any] = lambda params, layers, granularity: None
    layers: tuple[Layer, ...] = WEIGHTED
    channels: str | None = "out"
    scale_free: bool = True
    idempotent: bool = True

    def __str__(self):
        name = getattr(self.pruner, "__name__", "taylor_fo-grouped")
        return f"{name}-{self.granularity}-{self.scope}"

    def config(self, sparsity=0.4, layers=None, bias="follow"):
        fixed = isinstance(self.granularity, NM)
        layers = self.layers if layers is None else layers
        rule = {"op_names": [x.name for x in layers]} | ({} if fixed else {"sparsity": 0.4})
        config = pp.resolve(
            [rule], layers, scope=self.scope, granularity=self.granularity, bias=bias
        )
        return config if fixed else config.with_sparsity(sparsity)

    def statistics(self, params):
        return self.stats(params, self.layers, self.granularity)


def active(params, layers, granularity):
    return activity(params, layers)


def elements(params, layers, granularity):
    return slopes(params, layers, "element", ["squares"])


grouped = functools.partial(pp.taylor_fo, grouped=True)

ROWS = (
    Row(pp.slim, layers=NORMS),
    Row(pp.slim, scope="global", layers=NORMS),
    Row(pp.slim, CHANNEL, layers=NORMS),
    Row(pp.slim, CHANNEL, "global", layers=NORMS),
    Row(pp.apoz_rank, CHANNEL, stats=active),
    Row(pp.apoz_rank, CHANNEL, "global", stats=active),
    Row(pp.mean_activation_rank, CHANNEL, stats=active),
    Row(pp.mean_activation_rank, CHANNEL, "global", stats=active),
    Row(pp.taylor_fo, stats=slopes),
    Row(pp.taylor_fo, scope="global", stats=slopes),
    Row(pp.taylor_fo, NM(1, 2), stats=slopes),
    Row(pp.taylor_fo, CHANNEL, stats=slopes),
    Row(pp.taylor_fo, CHANNEL, "global", stats=slopes),
    Row(pp.taylor_fo, CHANNEL, stats=elements),
    Row(pp.taylor_fo, INPUTS, stats=slopes, channels="in"),
    Row(pp.taylor_fo, TILES, stats=slopes, channels=None),
    Row(pp.taylor_fo, TILES, "global", stats=slopes, channels=None),
    # The sign of the gradients goes with the position, so permuted channels have other sums.
    Row(grouped, CHANNEL, stats=slopes, channels=None),
    Row(grouped, TILES, stats=slopes, channels=None),
)


def integers(row, seed=0):
    """Distinct magnitudes in random order and signs: sums are exact in float32."""
    rng = np.random.default_rng(seed)
    sizes = [np.prod(layer.shape) for layer in row.layers]
    values = rng.permutation(np.arange(1, sum(sizes) + 1)) * rng.choice([-1, 1], sum(sizes))
    parts = np.split(values.astype(np.float32), np.cumsum(sizes)[:-1])
    weights = {x.weight: p.reshape(x.shape) for x, p in zip(row.layers, parts, strict=True)}
    return weights | {p: np.ones(s, np.float32) for p, s in BIASES.items() if biases(row, p)}


def biases(row, path):
    return path in {layer.bias for layer in row.layers}


# The run modes of ``tests.modes``, with statistics as an argument like any other.


def moved(framework, stats):
    return jax.tree.map(lambda x: framework({"x": x})["x"], stats)


def with_decoys(tree):
    """Every array stacked between others."""
    return jax.tree.map(lambda x: np.stack([x.reshape(-1)[::-1].reshape(x.shape), x, x]), tree)


def counts_with_decoys(config):
    return {name: np.asarray([0, k, k // 2], np.int32) for name, k in config.counts.items()}


def row_of(masks):
    return {path: mask[1] for path, mask in as_numpy(masks).items()}


@functools.cache
def jitted(pruner):
    return jax.jit(pruner)


@functools.cache
def vmapped(pruner, *axes):
    return jax.jit(jax.vmap(pruner, in_axes=axes))


def jax_eager(pruner, params, stats, config):
    return as_numpy(pruner(as_jax(params), moved(as_jax, stats), config))


def jax_jit(pruner, params, stats, config):
    return as_numpy(jitted(pruner)(as_jax(params), stats, config))


def jax_vmap_params(pruner, params, stats, config):
    return row_of(vmapped(pruner, 0, 0, None)(with_decoys(params), with_decoys(stats), config))


def jax_vmap_counts(pruner, params, stats, config):
    config = config.with_counts(counts_with_decoys(config))
    return row_of(vmapped(pruner, None, None, 0)(as_jax(params), stats, config))


def torch_eager(pruner, params, stats, config):
    return as_numpy(pruner(as_torch(params), moved(as_torch, stats), config))


def torch_with_numpy_stats(pruner, params, stats, config):
    return as_numpy(pruner(as_torch(params), stats, config))


def torch_vmap_params(pruner, params, stats, config):
    params, stats = as_torch(with_decoys(params)), moved(as_torch, with_decoys(stats))
    axes = (0, None if stats is None else 0)
    return row_of(torch.func.vmap(lambda p, s: pruner(p, s, config), in_dims=axes)(params, stats))


def torch_vmap_stats(pruner, params, stats, config):
    params, many = as_torch(params), moved(as_torch, with_decoys(stats))
    if not jax.tree.leaves(many):
        return as_numpy(pruner(params, stats, config))
    return row_of(torch.func.vmap(lambda s: pruner(params, s, config))(many))


def torch_vmap_counts(pruner, params, stats, config):
    params, stats = as_torch(params), moved(as_torch, stats)
    counts = as_torch(counts_with_decoys(config))
    return row_of(torch.func.vmap(lambda c: pruner(params, stats, config.with_counts(c)))(counts))


MODES = {
    mode.__name__: mode
    for mode in (
        jax_eager,
        jax_jit,
        jax_vmap_params,
        jax_vmap_counts,
        torch_eager,
        torch_with_numpy_stats,
        torch_vmap_params,
        torch_vmap_stats,
        torch_vmap_counts,
    )
}


def cases(applies=lambda row: True):
    """Every row a law applies to, in every run mode."""
    return pytest.mark.parametrize(
        ("row", "run"),
        [
            pytest.param(row, run, id=f"{i}-{row}-{mode}")
            for i, row in enumerate(ROWS)
            if applies(row)
            for mode, run in MODES.items()
            if not (isinstance(row.granularity, NM) and "counts" in mode)
        ],
    )


rows = pytest.mark.parametrize("row", ROWS, ids=[f"{i}-{row}" for i, row in enumerate(ROWS)])


def prune(row, params, sparsity=0.4, run=jax_eager):
    return run(row.pruner, params, row.statistics(params), row.config(sparsity))


def whole(row, masks):
    """Masks of the weights, broadcast to their shapes."""
    return {x.weight: np.broadcast_to(masks[x.weight], x.shape) for x in row.layers}


def assert_equal(a, b):
    np.testing.assert_equal(a, b)
    assert {path: mask.shape for path, mask in a.items()} == {p: m.shape for p, m in b.items()}


def apply(params, masks):
    return {p: np.where(masks[p], x, np.float32(0)) if p in masks else x for p, x in params.items()}


# The laws.


@cases()
def test_prunes_exactly_as_many_units_as_the_config_says(row, run):
    config, masks = row.config(), prune(row, integers(row), run=run)
    gone, total = {}, 0
    for layer in row.layers:
        mask = whole(row, masks)[layer.weight]
        kept = oracle.unit_sums(mask, layer, row.granularity)
        size = oracle.unit_sums(np.ones(layer.shape), layer, row.granularity)
        if isinstance(row.granularity, NM):
            assert np.all(kept == row.granularity.keep)
            continue
        assert np.all((kept == 0) | (kept == size))
        gone[layer.name] = kept == 0
        total += size.sum()
    if row.scope == "global":
        pruned = sum(int(np.sum(~mask)) for mask in whole(row, masks).values())
        assert 0.3 * total < pruned <= config.counts["rule 0"] == int(0.4 * total)
    elif gone:
        for name, units in gone.items():
            assert config.counts[name] == int(0.4 * units.shape[1])
            assert np.all(units.sum(axis=1) == config.counts[name])


@cases()
def test_is_the_same_in_every_run_mode(row, run):
    params = integers(row, 1)
    assert_equal(prune(row, params, run=run), prune(row, params))
    floats = {p: np.float32(np.sin(x)) for p, x in params.items()}
    assert_equal(prune(row, floats, run=run), prune(row, floats))


@cases(lambda row: not isinstance(row.granularity, NM))
def test_a_higher_count_revives_nothing(row, run):
    params = integers(row, 2)
    before = prune(row, params, 0.0, run)
    assert all(mask.all() for mask in before.values())
    for sparsity in (0.2, 0.45, 0.8):
        masks = prune(row, params, sparsity, run)
        assert all(np.all(masks[path] <= before[path]) for path in masks)
        assert any(not np.array_equal(masks[path], before[path]) for path in masks)
        before = masks


@cases(lambda row: row.channels is not None)
def test_permuted_channels_permute_the_mask(row, run):
    rng, params = np.random.default_rng(3), integers(row, 3)
    masks, moved_masks, shuffled = prune(row, params, run=run), {}, dict(params)
    for layer in row.layers:
        side = "out" if layer.groups > 1 else row.channels
        (axis,) = layer.out_axes if side == "out" else layer.in_axes
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
    params, rng = integers(row, 4), np.random.default_rng(4)
    # In global scope layers are compared, so all are scaled alike. The products are exact.
    factors = {p: 3 if row.scope == "global" else rng.integers(1, 200) for p in params}
    scaled = {p: x * np.float32(factors[p]) for p, x in params.items()}
    assert_equal(prune(row, scaled, run=run), prune(row, params, run=run))


@cases(lambda row: row.idempotent)
def test_pruning_again_to_the_same_count_changes_nothing(row, run):
    params = integers(row, 5)
    masks = prune(row, params, run=run)
    assert_equal(prune(row, apply(params, masks), run=run), masks)


@rows
@pytest.mark.parametrize(
    ("dtype", "run"), [("bfloat16", jax_eager), ("float16", torch_eager)], ids=["jax", "torch"]
)
def test_half_precision_weights_are_ranked_in_float32(row, dtype, run):
    params = {p: x / np.float32(64) for p, x in integers(row, 6).items()}
    half = {p: np.asarray(jnp.asarray(x).astype(dtype)) for p, x in params.items()}
    single = {path: x.astype(np.float32) for path, x in half.items()}
    assert_equal(prune(row, half, run=run), prune(row, single))


@rows
def test_an_empty_config_prunes_nothing(row):
    config = pp.resolve([], row.layers, scope=row.scope, granularity=row.granularity)
    params = integers(row)
    stats = row.statistics(params)
    assert row.pruner(as_jax(params), stats, config) == dict.fromkeys(params)
    assert row.pruner(as_torch(params), stats, config) == {}


@cases(lambda row: row.granularity != INPUTS and not isinstance(row.granularity, NM))
def test_a_bias_is_pruned_where_its_whole_channel_is(row, run):
    masks = prune(row, integers(row, 8), 0.8, run)
    for layer in row.layers:
        if layer.bias is not None:
            keep = oracle.unit_sums(whole(row, masks)[layer.weight], layer, CHANNEL) > 0
            assert np.array_equal(masks[layer.bias], keep.reshape(BIASES[layer.bias]))


@rows
def test_statistics_of_more_layers_serve_a_config_of_fewer(row):
    params = integers(row, 9)
    masks = prune(row, params) if row.scope == "layer" else None
    config = row.config(layers=row.layers[:2])
    got = torch_eager(row.pruner, params, row.statistics(params), config)
    assert set(got) <= {p for x in row.layers[:2] for p in (x.weight, x.bias)}
    if masks:
        assert_equal(got, {path: masks[path] for path in got})


# Scores by hand.

FC = Layer("fc", "Linear", "fc.w", (2, 4), (1,), (0,))
FC_PARAMS = {"fc.w": np.array([[1, 2, 3, 4], [4, -2, 1, 0.5]], np.float32)}
FRAMEWORKS = pytest.mark.parametrize("framework", [as_jax, as_torch], ids=["jax", "torch"])


def config_of(granularity, sparsity, layers=(FC,), **settings):
    rules = [{"sparsity": sparsity, "op_names": [layer.name for layer in layers]}]
    return pp.resolve(rules, layers, granularity=granularity, **settings)


@FRAMEWORKS
def test_activations_rank_channels(framework):
    params, config = framework(FC_PARAMS), config_of(CHANNEL, 0.25)
    outputs = framework(
        {"fc": np.array([[9, -1, 1, 1], [-1, 1, 1, -9], [-1, 1, 1, 2]], np.float32)}
    )
    stats = activations.init(params, config)
    stats = activations.update(stats, outputs, config, activation="relu")
    # Shares of non-zeros 1/3, 2/3, 1, 2/3; means 3, 2/3, 1, 1.
    for sparsity, apoz, mean in (
        (0.25, [0, 1, 1, 1], [1, 0, 1, 1]),
        (0.5, [0, 0, 1, 1], [1, 0, 0, 1]),
        (0.75, [0, 0, 1, 0], [1, 0, 0, 0]),
    ):
        config = config.with_sparsity(sparsity)
        masks = as_numpy(pp.apoz_rank(params, stats, config))
        assert masks["fc.w"].astype(int).tolist() == [apoz]
        masks = as_numpy(pp.mean_activation_rank(params, stats, config))
        assert masks["fc.w"].astype(int).tolist() == [mean]


@FRAMEWORKS
def test_counts_beyond_a_million_are_ranked_exactly(framework):
    count = functools.partial(as_total, pp.stats.accumulate.Count)
    zeros = np.array([[3 * 2**20 + 1, 2**20 - 1, 3 * 2**20, 2**20]])
    nothing = {"fc": as_total(pp.stats.accumulate.Sum, np.zeros((1, 4)))}
    positions = {"fc": count(2**22)}
    stats = activations.ActivationStats(
        positions, positions, {"fc": count(zeros)}, nothing, nothing, nothing
    )
    for sparsity, mask in ((0.25, [0, 1, 1, 1]), (0.5, [0, 1, 0, 1]), (0.75, [0, 1, 0, 0])):
        config = config_of(CHANNEL, sparsity)
        masks = as_numpy(pp.apoz_rank(framework(FC_PARAMS), moved(framework, stats), config))
        assert masks["fc.w"].astype(int).tolist() == [mask]


@FRAMEWORKS
def test_the_mean_is_signed(framework):
    params, config = framework(FC_PARAMS), config_of(CHANNEL, 0.25)
    outputs = framework({"fc": np.array([[3, -9, 1, 2]], np.float32)})
    stats = activations.update(
        activations.init(params, config), outputs, config, activation="identity"
    )
    masks = as_numpy(pp.mean_activation_rank(params, stats, config))
    assert masks["fc.w"].astype(int).tolist() == [[1, 0, 1, 1]]


@FRAMEWORKS
def test_taylor_ranks_by_the_squares_and_grouped_by_the_square(framework):
    params = framework(FC_PARAMS)
    grads = framework({"fc.w": np.array([[1, 2, -1, 2], [-1, 2, 2, 1]], np.float32)})
    # g * w is [[1, 4, -3, 8], [-4, -4, 2, 0.5]]: sums of squares 17, 32, 13, 64.25; squares of sums
    # 9, 0, 1, 72.25.
    config = config_of(CHANNEL, 0.25)
    stats = gradients.init(params, config, keep=["squares", "grouped"])
    stats = gradients.update(stats, params, grads, config)
    assert np.asarray(stats.squares["fc"].high).tolist() == [[17, 32, 13, 64.25]]
    assert np.asarray(stats.grouped["fc"].high).tolist() == [[9, 0, 1, 72.25]]
    for sparsity, plain, whole in (
        (0.25, [1, 1, 0, 1], [1, 0, 1, 1]),
        (0.5, [0, 1, 0, 1], [1, 0, 0, 1]),
    ):
        config = config.with_sparsity(sparsity)
        assert as_numpy(pp.taylor_fo(params, stats, config))["fc.w"].tolist() == [
            list(map(bool, plain))
        ]
        masks = as_numpy(pp.taylor_fo(params, stats, config, grouped=True))
        assert masks["fc.w"].tolist() == [list(map(bool, whole))]
    single = config_of("element", 0.5)
    stats = gradients.update(gradients.init(params, single), params, grads, single)
    for config, mask in (
        (single, [[0, 1, 0, 1], [1, 1, 0, 0]]),
        (config_of(CHANNEL, 0.5), [[0, 1, 0, 1]]),
        (config_of(INPUTS, 0.5), [[1], [0]]),
        (config_of(Block((2, 1)), 0.5), [[0, 0, 1, 1], [1, 1, 0, 0]]),
        (
            pp.resolve([{"op_names": "fc"}], [FC], granularity=NM(1, 2)),
            [[0, 0, 1, 1], [1, 1, 0, 0]],
        ),
    ):
        masks = as_numpy(pp.taylor_fo(params, stats, config))
        assert masks["fc.w"].astype(int).tolist() == mask


def test_taylor_is_the_derivative_of_the_loss_along_a_gate():
    """Grouped and summed over one step, it is the squared derivative to a factor of the unit."""
    params = as_jax({p: x / 4 for p, x in FC_PARAMS.items()})
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32))

    def loss(params, gates):
        return jnp.sum(jnp.tanh(x @ (params["fc.w"] * gates)) ** 3)

    gates = jnp.ones((1, 4))
    config = config_of(CHANNEL, 0.5)
    stats = gradients.init(params, config, keep=["grouped"])
    stats = gradients.update(stats, params, jax.grad(loss)(params, gates), config)
    expected = jax.grad(loss, 1)(params, gates) ** 2
    np.testing.assert_allclose(stats.grouped["fc"].high, expected, rtol=1e-5)


# Slim.

BN = Layer("bn", "BatchNorm2d", "bn.w", (4,), (0,), bias="bn.b")
CONV = Layer("conv", "Conv2d", "conv.w", (4, 3, 2, 2), (0,), (1,), bias="conv.b")
SLIM_PARAMS = {
    "bn.w": np.array([0.5, -2, 0.25, -0.125], np.float32),
    "bn.b": np.ones(4, np.float32),
    "conv.w": np.ones((4, 3, 2, 2), np.float32),
    "conv.b": np.ones(4, np.float32),
}


@FRAMEWORKS
@pytest.mark.parametrize("granularity", ["element", CHANNEL])
def test_slim_prunes_the_smallest_scales_with_their_biases(framework, granularity):
    rules = [{"sparsity": 0.5, "op_types": ["BatchNorm2d"]}]
    config = pp.resolve(rules, [BN, CONV], granularity=granularity)
    masks = as_numpy(pp.slim(framework(SLIM_PARAMS), None, config))
    assert {p: m.astype(int).tolist() for p, m in masks.items()} == {
        "bn.w": [1, 1, 0, 0],
        "bn.b": [1, 1, 0, 0],
    }


@FRAMEWORKS
def test_slim_prunes_what_feeds_the_norm_when_asked(framework):
    rules = [{"sparsity": 0.5, "op_types": ["BatchNorm2d"]}]
    config = pp.resolve(rules, [BN, CONV], scope="global")
    masks = as_numpy(pp.slim(framework(SLIM_PARAMS), None, config, feeds={"bn": CONV}))
    assert masks["conv.w"].shape == (4, 1, 1, 1)
    assert {p: m.reshape(-1).astype(int).tolist() for p, m in masks.items()} == {
        path: [1, 1, 0, 0] for path in SLIM_PARAMS
    }
    kept = pp.resolve(rules, [BN, CONV], bias="keep")
    masks = as_numpy(pp.slim(framework(SLIM_PARAMS), None, kept, feeds={"bn": CONV}))
    assert set(masks) == {"bn.w", "conv.w"}


def test_slim_prunes_what_feeds_norms_in_a_stack():
    norm = Layer("bn", "BatchNorm1d", "bn.w", (2, 3), (1,), stack_axes=(0,))
    dense = Layer("fc", "Linear", "fc.w", (4, 3, 2), (1,), (0,), stack_axes=(2,))
    params = {"bn.w": jnp.array([[1.0, 2, 3], [6, 5, 4]]), "fc.w": jnp.ones((4, 3, 2))}
    config = pp.resolve([{"sparsity": 0.4, "op_names": ["bn"]}], [norm, dense])
    masks = as_numpy(jax.jit(lambda p: pp.slim(p, None, config, feeds={"bn": dense}))(params))
    assert masks["fc.w"][0].astype(int).tolist() == [[0, 1], [1, 1], [1, 0]]


@FRAMEWORKS
def test_the_penalty_is_the_sum_of_scales_and_flat_at_zero(framework):
    scales = np.array([0.5, -0.25, 0.0, 2.0], np.float32)
    layers = [BN, dataclasses.replace(BN, name="bn2", weight="bn2.w")]
    params = framework({"bn.w": scales, "bn2.w": scales * 2})
    expected = {"bn.w": [8, -8, 0, 8], "bn2.w": [8, -8, 0, 8]}

    def penalty(params):
        return pp.slim_penalty(params, layers, scale=8.0)

    grad, value = (jax.grad, penalty) if framework is as_jax else (torch.func.grad, penalty)
    assert float(value(params)) == 8 * 2.75 * 3
    assert {p: g.tolist() for p, g in grad(penalty)(params).items()} == expected
    config = pp.resolve([{"op_types": ["BatchNorm2d"]}], layers)
    assert float(pp.slim_penalty(params, config)) == pytest.approx(1e-4 * 2.75 * 3)


def test_the_penalty_makes_scales_small_and_leaves_pruned_ones():
    params = {"bn.w": jnp.array([1.0, -1.0, 0.0])}
    norm = dataclasses.replace(BN, shape=(3,), bias=None)
    for _ in range(5):
        grads = jax.grad(lambda p: pp.slim_penalty(p, [norm], scale=0.1))(params)
        params = jax.tree.map(lambda p, g: p - g, params, grads)
    np.testing.assert_allclose(params["bn.w"], [0.5, -0.5, 0], rtol=1e-6)


# Bad input: an error that names the layer, before anything is computed.


class Untouchable:
    """Has a shape and a dtype, and nothing to compute with."""

    def __init__(self, shape, dtype="float32"):
        self.shape, self.dtype, self.ndim = shape, jnp.dtype(dtype), len(shape)


def untouchable(row, **changes):
    leaves = {path: Untouchable(x.shape) for path, x in integers(row).items()}
    return {p: x for p, x in (leaves | changes).items() if x is not None}


@rows
@pytest.mark.parametrize("bad", ["shape", "missing", "no-bias", "integer"])
def test_bad_params_raise_before_any_array_work(row, bad):
    layer = row.layers[0]
    changes, error = {
        "shape": ({layer.weight: Untouchable((99, 2))}, ValueError),
        "missing": ({layer.weight: None}, KeyError),
        "no-bias": ({layer.bias: None}, KeyError),
        "integer": ({layer.weight: Untouchable(layer.shape, "int8")}, ValueError),
    }[bad]
    name = getattr(row.pruner, "__name__", "taylor_fo")
    with raises(error, name, f"layer '{layer.name}'", f"'{next(iter(changes))}'"):
        row.pruner(untouchable(row, **changes), row.statistics(integers(row)), row.config())


with_stats = pytest.mark.parametrize(
    "row", [row for row in ROWS if row.layers is WEIGHTED], ids=str
)


@with_stats
def test_bad_statistics_raise_before_any_array_work(row):
    params, config = untouchable(row), row.config()
    good = row.statistics(integers(row))
    name = getattr(row.pruner, "__name__", "taylor_fo")
    with raises(TypeError, name, "NoneType"):
        row.pruner(params, None, config)
    other = slopes if isinstance(good, activations.ActivationStats) else active
    with raises(TypeError, name, type(other(integers(row), row.layers, CHANNEL)).__name__):
        row.pruner(params, other(integers(row), row.layers, CHANNEL), config)
    fewer = type(good)(*(drop(field, "fc") for field in good))
    with raises(KeyError, name, "layer 'fc'"):
        row.pruner(params, fewer, config)
    reshaped = jax.tree.map(lambda x: np.concatenate([x, x], -1) if x.ndim else x, good)
    with raises(ValueError, name, "layer 'conv'", "another model"):
        row.pruner(params, reshaped, config)
    with raises(ValueError, name, "layer 'conv'", "empty"):
        row.pruner(params, jax.tree.map(np.zeros_like, good), config)
    with raises(TypeError, name, "layer 'conv'", "torch"):
        row.pruner(params, moved(as_torch, good), config)


def drop(field, name):
    return {k: v for k, v in field.items() if k != name} if isinstance(field, dict) else field


@pytest.mark.parametrize("pruner", [pp.apoz_rank, pp.mean_activation_rank], ids=str)
@pytest.mark.parametrize("granularity", ["element", INPUTS, TILES])
def test_activations_rank_output_channels_only(pruner, granularity):
    row = Row(pruner, granularity)
    stats = activity(integers(row), WEIGHTED)
    with raises(ValueError, pruner.__name__, f"granularity={granularity!r}"):
        pruner(untouchable(row), stats, row.config())


def test_taylor_needs_what_it_asks_for():
    row = Row(pp.taylor_fo, CHANNEL)
    params = integers(row)
    with raises(ValueError, "'grouped'", "keep"):
        grouped(untouchable(row), slopes(params, WEIGHTED, CHANNEL, ["squares"]), row.config())
    with raises(ValueError, "'squares'", "keep"):
        pp.taylor_fo(untouchable(row), slopes(params, WEIGHTED, CHANNEL, ["grouped"]), row.config())
    # The square of a channel's sum is not to be had from single weights.
    with raises(ValueError, "layer 'conv'", "granularity"):
        grouped(untouchable(row), slopes(params, WEIGHTED, "element"), row.config())
    with raises(ValueError, "layer 'conv'", "granularity"):
        pp.taylor_fo(untouchable(row), slopes(params, WEIGHTED, CHANNEL), Row(None).config())


def test_slim_takes_norms_only():
    config = pp.resolve([{"sparsity": 0.5, "op_names": ["bn", "conv"]}], [BN, CONV])
    with raises(ValueError, "slim", "layer 'conv'", "Conv2d"):
        pp.slim(as_jax(SLIM_PARAMS), None, config)
    with raises(ValueError, "slim_penalty", "layer 'conv'"):
        pp.slim_penalty(as_jax(SLIM_PARAMS), [BN, CONV])
    with raises(KeyError, "layer 'bn'", "'bn.w'"):
        pp.slim_penalty({"conv.w": jnp.ones(3)}, [BN])


def test_a_norm_without_scale_is_an_error_that_names_it():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 2), torch.nn.BatchNorm2d(4, affine=False), torch.nn.BatchNorm2d(4)
    )
    from purepruning_interop.torch import layers

    table = layers(model)
    with raises(ValueError, "'1'", "op_names"):
        pp.resolve([{"sparsity": 0.5, "op_names": ["1"]}], table)
    config = pp.resolve([{"sparsity": 0.5, "op_types": ["BatchNorm2d"]}], table)
    params = {name: p.detach() for name, p in model.named_parameters()}
    with raises(KeyError, "'1'", "scale", "'2'"):
        pp.slim(params, None, config, feeds={"1": table[0]})
    params.pop("2.weight")
    with raises(KeyError, "layer '2'", "'2.weight'"):
        pp.slim(params, None, config)


def test_bad_feeds_of_slim():
    config = pp.resolve([{"sparsity": 0.5, "op_types": ["BatchNorm2d"]}], [BN, CONV])
    params = as_jax(SLIM_PARAMS)
    with raises(TypeError, "'bn'", "layer table", "'conv'"):
        pp.slim(params, None, config, feeds={"bn": "conv"})
    wide = Layer("conv", "Conv2d", "conv.w", (8, 3, 2, 2), (0,), (1,))
    with raises(ValueError, "layer 'conv'", "8", "4"):
        pp.slim(params | {"conv.w": jnp.ones(wide.shape)}, None, config, feeds={"bn": wide})
    with raises(ValueError, "layer 'conv'", "(8, 3, 2, 2)", "(4, 3, 2, 2)"):
        pp.slim(params, None, config, feeds={"bn": wide})
    with raises(KeyError, "layer 'conv'", "'conv.b'"):
        pp.slim(
            {p: x for p, x in params.items() if p != "conv.b"}, None, config, feeds={"bn": CONV}
        )
    two = [BN, dataclasses.replace(BN, name="bn2", weight="bn2.w", bias=None)]
    config = pp.resolve([{"sparsity": 0.5, "op_types": ["BatchNorm2d"]}], two)
    with raises(ValueError, "layer 'conv'", "two norms"):
        pp.slim(params | {"bn2.w": jnp.ones(4)}, None, config, feeds={"bn": CONV, "bn2": CONV})


# NaN.


@FRAMEWORKS
def test_nan_scores_are_an_error_that_names_the_layer(framework):
    scales = SLIM_PARAMS | {"bn.w": np.array([1, np.nan, 2, 3], np.float32)}
    config = pp.resolve([{"sparsity": 0.5, "op_types": ["BatchNorm2d"]}], [BN, CONV])
    with raises(ValueError, "slim", "'bn'", "NaN"):
        pp.slim(framework(scales), None, config)
    row = Row(pp.taylor_fo, CHANNEL)
    stats = slopes(integers(row), WEIGHTED, CHANNEL)
    stats.squares["fc"].high[0, 3] = np.nan
    with raises(ValueError, "taylor_fo", "'fc'", "NaN"):
        pp.taylor_fo(framework(integers(row)), stats, row.config())
    stats = activity(integers(row), WEIGHTED)
    stats.sums["fc"].high[0, 3] = np.nan
    with raises(ValueError, "mean_activation_rank", "'fc'", "NaN"):
        pp.mean_activation_rank(framework(integers(row)), stats, row.config())


def test_nan_and_empty_statistics_that_cannot_be_seen_keep_the_channel():
    row = Row(pp.mean_activation_rank, CHANNEL)
    params = integers(row)
    stats = activity(params, WEIGHTED)
    stats.sums["fc"].high[0, 3] = np.nan
    masks = jax_jit(row.pruner, params, stats, row.config(0.9))
    assert masks["fc.w"][:, 3].all()
    empty = jax.tree.map(np.zeros_like, stats)
    masks = jax_jit(pp.apoz_rank, params, empty, row.config(0.5))
    assert masks["fc.w"][0].tolist() == [False] * 5 + [True] * 5  # all NaN: the first go first
