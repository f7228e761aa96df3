"""Pruners that change what stays: a table of them x laws x run modes, and each by its own oracle.

An oracle is the paper's algorithm in float64, column by column.
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
from purepruning.stats import inputs
from tests import oracle
from tests.messages import raises
from tests.modes import as_jax, as_torch, moved, off_host, stacked
from tests.statistics import fed

pytestmark = pytest.mark.usefixtures("unoptimized")

# Compiled, every one takes a second or more.
full = pytest.mark.full

LAYERS = (
    Layer("conv", "Conv1d", "conv.w", (3, 4, 6), (2,), (1,), bias="conv.b"),
    Layer("grouped", "Conv1d", "grouped.w", (3, 4, 6), (2,), (1,), groups=2),
    Layer("stack", "Linear", "stack.w", (8, 2, 6), (2,), (0,), stack_axes=(1,)),
)
ELEMENT, PAIRS, TILES = "element", NM(1, 2), Block((3, 2))


@dataclasses.dataclass(frozen=True)
class Row:
    """One pruner in one granularity."""

    pruner: Any
    granularity: Any = ELEMENT

    def __str__(self):
        return f"{self.pruner.__name__}-{self.granularity}"

    def config(self, sparsity=0.5, layers=LAYERS):
        rules = [{"op_names": [layer.name for layer in layers]}]
        config = pp.resolve(rules, layers, granularity=self.granularity)
        return config if isinstance(self.granularity, NM) else config.with_sparsity(sparsity)


ROWS = [
    Row(pruner, granularity)
    for pruner in (pp.sparse_gpt, pp.obc, pp.alps)
    for granularity in (ELEMENT, PAIRS, TILES)
]
rows = pytest.mark.parametrize("row", ROWS, ids=str)


def params(seed=0):
    rng = np.random.default_rng(seed)
    found = {x.weight: rng.normal(size=x.shape).astype(np.float32) for x in LAYERS}
    return found | {"conv.b": np.ones(6, np.float32)}


STATS = fed(None, LAYERS)


def numpy(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float32) if x.dtype != bool else x, tree)


def run(row, framework=as_jax, weights=None, config=None, jit=False):
    pruner = jax.jit(row.pruner) if jit else row.pruner
    weights = params() if weights is None else weights
    new, masks = pruner(framework(weights), moved(framework, STATS), config or row.config())
    arrays = [{p: np.asarray(x) for p, x in tree.items() if x is not None} for tree in (new, masks)]
    return arrays


def assert_alike(a, b):
    np.testing.assert_equal(a[1], b[1])
    for path in a[0]:
        np.testing.assert_allclose(a[0][path], b[0][path], rtol=2e-3, atol=2e-3)


@rows
@pytest.mark.parametrize("framework", [as_jax, as_torch])
def test_prunes_exactly_as_many_units_as_the_config_says(row, framework):
    new, masks = run(row, framework)
    for layer in LAYERS:
        mask = np.broadcast_to(masks[layer.weight], layer.shape)
        assert np.all(new[layer.weight][~mask] == 0)
        kept = oracle.unit_sums(mask, layer, row.granularity)
        if isinstance(row.granularity, NM):
            assert np.all(kept == 1)
            continue
        size = oracle.unit_sums(np.ones(layer.shape), layer, row.granularity)
        assert np.all((kept == 0) | (kept == size))
        assert np.all((kept == 0).sum(1) == row.config().counts[layer.name])


@rows
def test_is_the_same_in_torch_and_off_the_host(row):
    """Products of matrices are rounded in every order; masks agree, weights to 2e-3."""
    expected = run(row)
    assert_alike(run(row, as_torch), expected)
    with off_host():
        assert_alike(run(row, as_torch), expected)


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=str(row), marks=() if row in (ROWS[0], ROWS[4]) else full)
        for row in ROWS
    ],
)
def test_is_the_same_compiled(row):
    assert_alike(run(row, jit=True), run(row))


@pytest.mark.parametrize(
    "row",
    [pytest.param(row, id=str(row), marks=() if row is ROWS[1] else full) for row in ROWS],
)
def test_can_be_mapped_over_weights_and_statistics(row):
    weights, stats = as_jax(stacked(params())), moved(as_jax, stacked(STATS))
    config = row.config()
    new, masks = jax.vmap(lambda p, s: row.pruner(p, s, config))(weights, stats)
    middle = [{p: np.asarray(x)[1] for p, x in t.items() if x is not None} for t in (new, masks)]
    assert_alike(middle, run(row))


@pytest.mark.parametrize("row", [row for row in ROWS if row.granularity == ELEMENT], ids=str)
def test_counts_can_be_mapped_over_in_torch(row):
    weights, stats = as_torch(params()), moved(as_torch, STATS)
    config = row.config()
    counts = {n: torch.tensor([0, k]) for n, k in config.counts.items()}
    both = torch.func.vmap(lambda c: row.pruner(weights, stats, config.with_counts(c)))(counts)
    middle = [{p: x[1].numpy() for p, x in tree.items()} for tree in both]
    expected = run(row)
    middle[0]["conv.b"] = expected[0]["conv.b"]
    assert_alike(middle, expected)


@rows
def test_nothing_pruned_is_nothing_changed_and_dtypes_stay(row):
    if not isinstance(row.granularity, NM):
        new, masks = run(row, config=row.config(0.0))
        assert all(mask.all() for mask in masks.values())
        for path, x in params().items():
            np.testing.assert_allclose(new[path], x, atol=2e-2 if row.pruner is pp.alps else 2e-4)
    half = {p: np.asarray(jnp.asarray(x).astype("bfloat16")) for p, x in params().items()}
    new, masks = row.pruner(as_torch(half), moved(as_torch, STATS), row.config())
    assert {x.dtype for x in new.values()} == {torch.bfloat16}
    single = {path: x.astype(np.float32) for path, x in half.items()}
    np.testing.assert_equal({p: m.numpy() for p, m in masks.items()}, run(row, weights=single)[1])


@rows
def test_an_empty_config_changes_nothing(row):
    config = pp.resolve([], LAYERS, granularity=row.granularity)
    weights = as_jax(params())
    new, masks = row.pruner(weights, STATS, config)
    assert new is weights
    assert masks == dict.fromkeys(weights)


@rows
def test_what_cannot_be_rebuilt_is_refused(row):
    name, weights = row.pruner.__name__, as_jax(params())

    def refuses(error, *parts, stats=STATS, config=None):
        with raises(error, name, *parts):
            row.pruner(weights, stats, config or row.config())

    refuses(TypeError, "stats.inputs", stats=None)
    refuses(ValueError, "'grams'", stats=fed(None, LAYERS, keep=("squares",)))
    refuses(ValueError, "empty", stats=jax.tree.map(np.zeros_like, STATS))
    masks = pp.level(weights, None, pp.resolve(0.5, LAYERS))
    refuses(ValueError, "masks", config=row.config().with_masks(masks))
    if row.granularity == ELEMENT:
        refuses(ValueError, "scope='layer'", config=pp.resolve(0.5, LAYERS, scope="global"))
        channels = pp.resolve(0.5, LAYERS, granularity="output_channel")
        refuses(ValueError, "output_channel", config=channels)
        refuses(ValueError, "divide", config=pp.resolve(0.5, LAYERS, granularity=Block((4, 2))))
    weights = as_jax({**params(), "stack.w": np.full((8, 2, 6), np.inf, np.float32)})
    refuses(ValueError, "layer 'stack'", "damping")


@pytest.mark.parametrize("framework", [as_jax, as_torch])
def test_errors_of_nan_are_refused(framework):
    w, _, layer, stats = problem()
    w = w.copy()
    w[2, 3] = np.nan
    config = pp.resolve([{"op_types": ["Linear"]}], [layer])
    with raises(ValueError, "obc_errors", "layer 'fc'", "NaN"):
        pp.obc_errors(framework({"w": w}), moved(framework, stats), config)


# One matrix, and what is right for it.

OUT, COLUMNS = 6, 40
LAYER = Layer("fc", "Linear", "w", (OUT, COLUMNS), (0,), (1,))


@functools.cache
def problem(columns=COLUMNS, seed=0):
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(OUT, columns)).astype(np.float32)
    mix = rng.normal(size=(columns, columns)) / np.sqrt(columns) + np.eye(columns)
    x = (rng.normal(size=(3 * columns, columns)) @ mix).astype(np.float32)
    layer = dataclasses.replace(LAYER, shape=w.shape)
    stats = inputs.init(as_jax({"w": w}), [layer], keep=["grams"])
    return w, x, layer, inputs.update(stats, as_jax({"fc": x}), [layer])


def solved(pruner, columns=COLUMNS, granularity=ELEMENT, sparsity=0.5, **options):
    w, _, layer, stats = problem(columns)
    rules = [{"op_types": ["Linear"]}]
    config = pp.resolve(rules, [layer], granularity=granularity)
    if not isinstance(granularity, NM):
        config = config.with_sparsity(sparsity)
    new, masks = pruner(as_jax({"w": w}), stats, config, **options)
    return np.asarray(new["w"], np.float64), np.asarray(masks["w"])


def hessian(x, damping):
    h = np.float64(x).T @ np.float64(x)
    return h + damping * np.mean(np.diag(h)) * np.eye(len(h))


def plain_sparse_gpt(w, h, wide, sparsity=None, nm=None):
    """The paper's algorithm: the factor of the inverse, one column at a time."""
    w = np.float64(w)
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    n, k = w.shape[1], int(sparsity * w.size) if nm is None else 0
    keep = np.ones(w.shape, bool)
    for j in range(n):
        if nm is None and j % wide == 0:
            stop = min(j + wide, n)
            scores = (w[:, j:stop] / np.diag(upper)[j:stop]) ** 2
            count = k * stop // n - k * j // n
            keep[:, j:stop] = ~oracle.lowest(scores.T, count).T
        if nm is not None and j % nm.of == 0:
            scores = (w[:, j : j + nm.of] / np.diag(upper)[j : j + nm.of]) ** 2
            rank = np.argsort(np.argsort(scores, axis=1, kind="stable"), axis=1)
            keep[:, j : j + nm.of] = rank >= nm.of - nm.keep
        error = np.where(keep[:, j], 0, w[:, j] / upper[j, j])
        w[:, j:] -= np.outer(error, upper[j, j:])
        w[:, j] *= keep[:, j]
    return w, keep


@pytest.mark.parametrize("columns", [40, 300])
@pytest.mark.parametrize("nm", [None, NM(2, 4)])
def test_sparse_gpt_is_the_papers_algorithm(columns, nm):
    w, x, _, _ = problem(columns)
    wide = min(128, -(-columns // 16) * 16)
    expected, keep = plain_sparse_gpt(w, hessian(x, 0.01), wide, 0.5, nm)
    new, mask = solved(pp.sparse_gpt, columns, ELEMENT if nm is None else nm)
    np.testing.assert_array_equal(mask, keep)
    np.testing.assert_allclose(new, expected, atol=2e-3)


def plain_obs(w, h):
    """Order and added errors of removing all weights of one row, by optimal brain surgeon."""
    w, inverse, left = np.float64(w), np.linalg.inv(h), list(range(len(w)))
    order, added, weights = [], [], [w.copy()]
    while left:
        p = min(left, key=lambda i: w[i] ** 2 / inverse[i, i])
        added.append(w[p] ** 2 / inverse[p, p])
        w = w - w[p] / inverse[p, p] * inverse[:, p]
        inverse = inverse - np.outer(inverse[:, p], inverse[p]) / inverse[p, p]
        left.remove(p)
        w[p], inverse[p], inverse[:, p] = 0, 0, 0
        order.append(p)
        weights.append(w.copy())
    return order, np.asarray(added), weights


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.8])
def test_obc_is_greedy_over_all_rows(sparsity):
    w, x, _, _ = problem()
    h = hessian(x, 1e-4)
    traces = [plain_obs(row, h) for row in w]
    taken = [0] * OUT
    for _ in range(int(sparsity * w.size)):  # the next always goes where it adds least
        row = min(
            (r for r in range(OUT) if taken[r] < COLUMNS), key=lambda r: traces[r][1][taken[r]]
        )
        taken[row] += 1
    expected = np.stack([traces[r][2][taken[r]] for r in range(OUT)])
    new, mask = solved(pp.obc, sparsity=sparsity)
    np.testing.assert_array_equal(mask, expected != 0)
    np.testing.assert_allclose(new, expected, atol=1e-3)


def test_one_removal_is_the_closed_form():
    """Of one output: w - w_p / [H^-1]_pp H^-1_:,p, at the least w_p^2 / [H^-1]_pp."""
    w, x, _, _ = problem()
    layer = dataclasses.replace(LAYER, shape=(1, COLUMNS))
    stats = inputs.init(as_jax({"w": w[:1]}), [layer], keep=["grams"])
    stats = inputs.update(stats, as_jax({"fc": x}), [layer])
    config = pp.resolve([{"op_types": ["Linear"]}], [layer]).with_counts({"fc": 1})
    new, _ = pp.obc(as_jax({"w": w[:1]}), stats, config)
    inverse = np.linalg.inv(hessian(x, 1e-4))
    p = np.argmin(w[0] ** 2 / np.diag(inverse))
    expected = w[0] - w[0, p] / inverse[p, p] * inverse[:, p]
    expected[p] = 0
    np.testing.assert_allclose(np.asarray(new["w"])[0], expected, atol=1e-4)


def test_the_whole_trajectory_of_errors():
    w, x, layer, stats = problem()
    config = pp.resolve([{"op_types": ["Linear"]}], [layer])
    for framework in (as_jax, as_torch):
        found = pp.obc_errors(framework({"w": w}), moved(framework, stats), config)["fc"]
        expected = [np.cumsum([0, *plain_obs(row, hessian(x, 1e-4))[1]]) for row in w]
        np.testing.assert_allclose(np.asarray(found)[0], expected, rtol=2e-3)
    h = hessian(x, 1e-4)
    everything = np.einsum("rc,cd,rd->r", w, h, w)
    np.testing.assert_allclose(np.asarray(found)[0, :, -1], everything, rtol=1e-3)


@pytest.mark.parametrize("granularity", [ELEMENT, NM(2, 4), Block((2, 4))], ids=str)
def test_errors_are_in_the_known_order(granularity):
    """Magnitude, then columns in order, then the best order or the best support."""
    w, x, layer, _ = problem()
    h = hessian(x, 0)

    def error(new):
        return float(np.einsum("rc,cd,rd->", w - new, h, w - new))

    rules = [{"op_types": ["Linear"]}]
    config = pp.resolve(rules, [layer], granularity=granularity)
    pruner = pp.level
    if not isinstance(granularity, NM):
        config = config.with_sparsity(0.6)
        pruner = pp.level if granularity == ELEMENT else pp.l1_norm
    mask = np.asarray(pruner(as_jax({"w": w}), None, config)["w"])
    by_columns, greedy, support = (
        error(solved(p, granularity=granularity, sparsity=0.6)[0])
        for p in (pp.sparse_gpt, pp.obc, pp.alps)
    )
    assert greedy < by_columns < error(w * mask)
    assert support < by_columns


def test_columns_that_are_never_fed_go_first():
    w, x, layer, _ = problem()
    x = x.copy()
    x[:, :20] = 0
    stats = inputs.init(as_jax({"w": w}), [layer], keep=["grams"])
    stats = inputs.update(stats, as_jax({"fc": x}), [layer])
    for pruner in (pp.obc, pp.alps):
        _, masks = pruner(as_jax({"w": w}), stats, pp.resolve(0.5, [layer]))
        assert not np.asarray(masks["w"])[:, :20].any()


def test_groups_of_a_convolution_are_matrices_of_their_own():
    """A grouped convolution is pruned as its groups are, each as a linear layer."""
    layer = LAYERS[1]
    weight = params()["grouped.w"]
    new, masks = run(ROWS[0])
    f = form("test", layer)
    whole, mask = as_matrices(new["grouped.w"], f), as_matrices(masks["grouped.w"], f)
    for m, rows_of in enumerate(as_matrices(weight, f)):
        gram = np.asarray(STATS.grams["grouped"].high, np.float64)[m]
        h = gram + 0.01 * np.mean(np.diag(gram)) * np.eye(len(gram))
        expected, keep = plain_sparse_gpt(rows_of, h, 16, 0.5)
        np.testing.assert_array_equal(mask[m], keep)
        np.testing.assert_allclose(whole[m], expected, atol=2e-3)
