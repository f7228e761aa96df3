"""Pruning by blocks of the Fisher matrix, and their statistics, by oracles in float64.

The oracles are the paper's: the inverse gradient by gradient, and the inverse itself.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import purepruning as pp
from purepruning import NM, Block, Layer
from purepruning.matrices import as_matrices, form
from purepruning.stats import fisher_blocks
from tests import oracle
from tests.messages import raises
from tests.modes import as_jax, as_torch, moved, off_host, stacked

# Compiled, every one takes a second or more.
full = pytest.mark.full

LAYERS = (
    Layer("conv", "Conv1d", "conv.w", (3, 4, 6), (2,), (1,), bias="conv.b"),
    Layer("grouped", "Conv1d", "grouped.w", (3, 4, 6), (2,), (1,), groups=2),
    Layer("stack", "Linear", "stack.w", (8, 2, 5), (2,), (0,), stack_axes=(1,)),
)
SIZE, SAMPLES, DAMPING = 12, 30, 0.1
ELEMENT, PAIRS, TILES = "element", NM(1, 2), Block((1, 2))


@dataclasses.dataclass(frozen=True)
class Row:
    granularity: Any = ELEMENT
    scope: str = "layer"

    def __str__(self):
        return f"{self.granularity}-{self.scope}"

    def config(self, sparsity=0.5):
        rules = [{"op_names": [layer.name for layer in LAYERS]}]
        config = pp.resolve(rules, LAYERS, granularity=self.granularity, scope=self.scope)
        return config if isinstance(self.granularity, NM) else config.with_sparsity(sparsity)


ROWS = [Row(), Row(scope="global"), Row(PAIRS), Row(TILES), Row(TILES, "global")]
rows = pytest.mark.parametrize("row", ROWS, ids=str)


def params(seed=0):
    rng = np.random.default_rng(seed)
    found = {x.weight: rng.normal(size=x.shape).astype(np.float32) for x in LAYERS}
    return found | {"conv.b": np.ones(6, np.float32)}


def gradients(seed=1):
    """Whole numbers, whose sums of products are exact."""
    rng = np.random.default_rng(seed)
    return {x.weight: rng.integers(-3, 4, (SAMPLES, *x.shape)).astype(np.float32) for x in LAYERS}


def numpy(tree):
    return jax.tree.map(np.asarray, tree)


@functools.cache
def statistics(seed=1):
    given = as_jax(params())
    stats = fisher_blocks.init(given, LAYERS, size=SIZE)
    return numpy(fisher_blocks.update(stats, as_jax(gradients(seed)), LAYERS))


def run(row, framework=as_jax, weights=None, config=None, jit=False):
    pruner = jax.jit(pp.obert) if jit else pp.obert
    weights = params() if weights is None else weights
    stats = moved(framework, statistics())
    new, masks = pruner(framework(weights), stats, config or row.config(), damping=DAMPING)
    return [{p: np.asarray(x) for p, x in tree.items() if x is not None} for tree in (new, masks)]


def assert_alike(found, expected):
    """Matrices are inverted in every order; masks agree, weights to 1e-4."""
    np.testing.assert_equal(found[1], expected[1])
    for path in expected[0]:
        np.testing.assert_allclose(found[0][path], expected[0][path], atol=1e-4)


def blocks_of(layer, x):
    """Weights, or gradients of all samples, as blocks: ``(members, blocks, size)``."""
    f = form("test", layer)
    flat = np.float64(as_matrices(x, f)).reshape(f.members, -1)
    flat = np.pad(flat, ((0, 0), (0, -flat.shape[1] % SIZE)))
    return flat.reshape(f.members, -1, SIZE)


def back(layer, x):
    f = form("test", layer)
    flat = x.reshape(f.members, -1)[:, : f.out * f.columns]
    split = flat.reshape([f.split[a] for a in f.order])
    return split.transpose(np.argsort(f.order)).reshape(layer.shape)


@functools.cache
def inverses(layer):
    """The inverse of the damped Fisher matrix of every block, gradient by gradient."""
    each = np.stack([blocks_of(layer, g) for g in gradients()[layer.weight]])
    fisher = np.einsum("nmbi,nmbj->mbij", each, each) / SAMPLES + DAMPING * np.eye(SIZE)
    inverse = np.zeros_like(fisher) + np.eye(SIZE) / DAMPING
    for g in each:
        v = np.einsum("mbij,mbj->mbi", inverse, g)
        down = SAMPLES + np.einsum("mbi,mbi->mb", g, v)[..., None, None]
        inverse -= np.einsum("mbi,mbj->mbij", v, v) / down
    np.testing.assert_allclose(inverse, np.linalg.inv(fisher), atol=1e-9)
    return inverse


def scores(layer, width):
    """What the units of a layer score, in the weight's shape."""
    w, inverse = blocks_of(layer, params()[layer.weight]), inverses(layer)
    found = np.zeros_like(w)
    for i in range(0, SIZE, width):
        own, some = inverse[:, :, i : i + width, i : i + width], w[:, :, i : i + width]
        found[:, :, i : i + width] = (
            0.5 * np.einsum("mbi,mbij,mbj->mb", some, np.linalg.inv(own), some)[..., None]
        )
    return back(layer, found)


def repaired(layer, mask):
    """Optimal brain surgeon of all that goes of a block together."""
    w, inverse = blocks_of(layer, params()[layer.weight]), inverses(layer)
    keep = blocks_of(layer, mask) > 0
    for at in np.ndindex(w.shape[:2]):
        gone = np.flatnonzero(~keep[at])
        own = inverse[at][np.ix_(gone, gone)]
        w[at] -= inverse[at][:, gone] @ np.linalg.solve(own, w[at][gone])
        w[at][gone] = 0
    return back(layer, w)


@rows
@pytest.mark.parametrize("framework", [as_jax, as_torch])
def test_is_the_papers_algorithm(row, framework):
    new, masks = run(row, framework)
    width = 2 if row.granularity == TILES else 1
    config = row.config()
    ranked = [(x, scores(x, width)) for x in LAYERS]
    for pool in (LAYERS,) if row.scope == "global" else tuple((x,) for x in LAYERS):
        keeps = [np.broadcast_to(masks[x.weight], x.shape) for x in pool]
        own = [s for x, s in ranked if x in pool]
        if isinstance(row.granularity, NM):
            for x, keep, s in zip(pool, keeps, own, strict=True):
                f = form("test", x)
                s, keep = (as_matrices(y, f).reshape(-1, 2) for y in (s, keep))
                np.testing.assert_array_equal(keep, s >= s.max(1, keepdims=True))
            continue
        if row.scope == "global":
            gone = sum(int((~keep).sum()) for keep in keeps)
            assert gone == sum(config.counts.values())  # of weights, not of blocks
            least = min(s[keep].min() for s, keep in zip(own, keeps, strict=True))
            assert max(s[~keep].max() for s, keep in zip(own, keeps, strict=True)) <= least
            continue
        (keep,), (s,), (x,) = keeps, own, pool
        members = oracle.members(x)
        for member in range(members.max() + 1):
            here = members == member
            here = np.broadcast_to(here, x.shape)
            assert (here & ~keep).sum() == width * config.counts[x.name]
            assert s[here & ~keep].max() <= s[here & keep].min()
    for x in LAYERS:
        keep = np.broadcast_to(masks[x.weight], x.shape)
        np.testing.assert_allclose(new[x.weight], repaired(x, keep), atol=2e-4)


@rows
def test_is_the_same_in_torch_and_off_the_host(row):
    expected = run(row)
    assert_alike(run(row, as_torch), expected)
    with off_host():
        assert_alike(run(row, as_torch), expected)


@pytest.mark.parametrize(
    "row", [pytest.param(x, id=str(x), marks=() if x is ROWS[0] else full) for x in ROWS]
)
def test_is_the_same_compiled(row):
    assert_alike(run(row, jit=True), run(row))


def test_can_be_mapped_over():
    weights, stats = as_jax(stacked(params())), moved(as_jax, stacked(statistics()))
    config = Row().config()
    both = jax.vmap(lambda p, s: pp.obert(p, s, config, damping=DAMPING))(weights, stats)
    expected = run(Row())
    for tree, known in zip(both, expected, strict=True):
        for path, x in known.items():
            np.testing.assert_allclose(np.asarray(tree[path])[1], x, atol=1e-4)
    counts = {n: torch.tensor([0, k]) for n, k in config.counts.items()}
    weights, stats = as_torch(params()), moved(as_torch, statistics())
    masks = torch.func.vmap(
        lambda c: pp.obert(weights, stats, config.with_counts(c), damping=DAMPING)[1]
    )(counts)
    for path, x in expected[1].items():
        np.testing.assert_array_equal(masks[path][1].numpy(), x)


@rows
def test_nothing_pruned_is_nothing_changed_and_dtypes_stay(row):
    if not isinstance(row.granularity, NM):
        new, masks = run(row, config=row.config(0.0))
        assert all(mask.all() for mask in masks.values())
        np.testing.assert_equal(new, params())
    half = {p: np.asarray(jnp.asarray(x).astype("bfloat16")) for p, x in params().items()}
    new, _ = pp.obert(as_torch(half), moved(as_torch, statistics()), row.config(), damping=1.0)
    assert {x.dtype for x in new.values()} == {torch.bfloat16}


def test_higher_counts_revive_nothing_and_masks_go_on():
    """A pruned model, whose gradients are zero where it is, stays pruned there."""
    row = Row(scope="global")
    low, high = (run(row, config=row.config(s))[1] for s in (0.3, 0.6))
    assert all(np.all(low[path] | ~high[path]) for path in low)
    weights, grads = as_jax(params()), gradients()
    weights = pp.apply_masks(weights, as_jax(low))
    grads = as_jax({path: g * low[path] for path, g in grads.items()})
    stats = fisher_blocks.update(fisher_blocks.init(weights, LAYERS, size=SIZE), grads, LAYERS)
    config = row.config(0.6).with_masks(as_jax(low))
    new, masks = pp.obert(weights, stats, config, damping=DAMPING)
    gone = sum(int((~np.asarray(masks[x.weight])).sum()) for x in LAYERS)
    assert gone == sum(config.counts.values())
    for x in LAYERS:
        assert not np.any(np.asarray(masks[x.weight]) & ~low[x.weight])
        assert not np.any(np.asarray(new[x.weight])[~low[x.weight]])


def test_the_loss_of_a_regression_rises_less_than_by_magnitude():
    """Where gradients are those of a least squares problem, the Fisher matrix knows it."""
    rng = np.random.default_rng(3)
    mix = rng.normal(size=(40, 40)) * rng.uniform(0.1, 2, 40)
    x = (rng.normal(size=(400, 40)) @ mix).astype(np.float32)
    w = rng.normal(size=(1, 40)).astype(np.float32)
    y = x @ w[0] + rng.normal(size=400).astype(np.float32)
    layer = Layer("fc", "Linear", "w", (1, 40), (0,), (1,))

    def loss(p, x, y):
        return 0.5 * jnp.mean((x @ p["w"][0] - y) ** 2)

    best = {"w": jnp.asarray(np.linalg.lstsq(x, y, rcond=None)[0][None])}
    grads = jax.vmap(lambda x, y: jax.grad(loss)(best, x[None], y[None]))(x, y)
    stats = fisher_blocks.update(fisher_blocks.init(best, [layer], size=40), grads, [layer])
    config = pp.resolve(0.6, [layer])
    new, masks = pp.obert(best, stats, config, damping=1e-4)
    alone = pp.apply_masks(best, masks)
    magnitude = pp.apply_masks(best, pp.level(best, None, config))
    assert loss(new, x, y) < loss(alone, x, y) < loss(magnitude, x, y)
    assert loss(new, x, y) < 0.3 * loss(magnitude, x, y)


def test_what_cannot_be_pruned_is_refused():
    weights = as_jax(params())

    def refuses(error, *parts, stats=None, config=None, **options):
        with raises(error, "obert", *parts):
            stats = moved(as_jax, statistics()) if stats is None else stats
            pp.obert(weights, stats, config or Row().config(), **options)

    refuses(TypeError, "fisher_blocks", stats="none")
    refuses(ValueError, "empty", stats=fisher_blocks.init(weights, LAYERS))
    channels = pp.resolve(0.5, LAYERS, granularity="output_channel")
    refuses(ValueError, "output_channel", "resolve without", config=channels)
    for shape, part in (((2, 2), "one output"), ((3, 1), "one output"), ((1, 3), "divide")):
        refuses(ValueError, part, config=pp.resolve(0.5, LAYERS, granularity=Block(shape)))
    refuses(ValueError, "damping", damping=-1.0)
    singular = statistics()
    zeros = {name: jax.tree.map(np.zeros_like, x) for name, x in singular.outers.items()}
    refuses(ValueError, "larger damping", stats=singular._replace(outers=zeros), damping=0.0)
    config = pp.resolve([], LAYERS)
    new, masks = pp.obert(weights, statistics(), config)
    assert new is weights
    assert masks == dict.fromkeys(weights)


# Statistics.


@pytest.mark.parametrize("framework", [as_jax, as_torch])
def test_outers_are_sums_over_gradients_one_by_one_or_together(framework):
    given, grads = framework(params()), gradients()
    stats = fisher_blocks.init(given, LAYERS, size=SIZE)
    both = [stats, stats]
    for i in range(SAMPLES):
        one = framework({path: g[i] for path, g in grads.items()})
        both[i % 2] = fisher_blocks.update(both[i % 2], one, LAYERS)
    merged = fisher_blocks.merge(*both)
    together = fisher_blocks.update(stats, framework(grads), LAYERS)
    for layer in LAYERS:
        each = np.stack([blocks_of(layer, g) for g in grads[layer.weight]])
        expected = np.einsum("nmbi,nmbj->mbij", each, each)
        for found in (merged, together):
            np.testing.assert_array_equal(np.asarray(found.outers[layer.name].high), expected)
            assert int(found.steps.low) == SAMPLES
    sizes = fisher_blocks.memory(LAYERS, size=SIZE)
    for name, total in merged.outers.items():
        assert sizes[name] == sum(np.asarray(x).nbytes for x in total)


def test_updates_run_compiled():
    given, grads = as_jax(params()), as_jax(gradients())
    stats = fisher_blocks.init(given, LAYERS, size=SIZE)

    @jax.jit
    def all_(stats, grads):
        def step(stats, g):
            return fisher_blocks.update(stats, g, LAYERS), None

        return jax.lax.scan(step, stats, grads)[0]

    for found, expected in zip(
        jax.tree.leaves(all_(stats, grads)), jax.tree.leaves(statistics()), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(found), expected)


def test_gradients_that_do_not_fit_are_refused():
    stats = moved(as_jax, statistics())
    grads = gradients()

    def refuses(error, *parts, **change):
        with raises(error, "fisher_blocks.update", *parts):
            fisher_blocks.update(stats, as_jax(grads | change), LAYERS)

    refuses(ValueError, "batches of different sizes", **{"conv.w": grads["conv.w"][:3]})
    refuses(ValueError, "'conv.w' has shape", **{"conv.w": grads["conv.w"][..., :3]})
    refuses(
        ValueError, "'grouped'", "NaN", **{"grouped.w": np.full_like(grads["grouped.w"], np.nan)}
    )
    missing = {path: g for path, g in grads.items() if path != "stack.w"}
    with raises(KeyError, "fisher_blocks.update", "'stack.w'"):
        fisher_blocks.update(stats, as_jax(missing), LAYERS)
    with raises(TypeError, "two frameworks"):
        fisher_blocks.update(stats, as_torch(grads), LAYERS)
