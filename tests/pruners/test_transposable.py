"""Transposable N:M: every block's best pattern, found by trying all of them one by one."""

import itertools

import jax
import numpy as np
import pytest
import torch

import purepruning as pp
from purepruning import NM, Layer
from purepruning.matrices import as_matrices, form
from purepruning.pruners.transposable import patterns
from tests.messages import raises
from tests.modes import as_jax, as_torch, off_host

LAYERS = (
    Layer("fc", "Linear", "fc", (8, 12), (1,), (0,)),
    Layer("conv", "Conv2d", "conv", (8, 4, 2, 2), (0,), (1,)),
    Layer("grouped", "Conv1d", "grouped", (3, 4, 8), (2,), (1,), groups=2),
    Layer("stack", "Linear", "stack", (2, 4, 8), (2,), (1,), stack_axes=(0,)),
)


def params(seed=0):
    rng = np.random.default_rng(seed)
    return {x.weight: rng.integers(-9, 10, x.shape).astype(np.float32) for x in LAYERS}


def config(nm, layers=LAYERS):
    return pp.resolve([{"op_types": ["default"]}], layers, granularity=nm)


def test_there_are_ninety_patterns_of_two_in_four():
    found = patterns(NM(2, 4))
    assert found.shape == (90, 16)
    assert len({tuple(p) for p in found}) == 90
    assert [tuple(p) for p in found] == sorted(tuple(p) for p in found)
    assert len(patterns(NM(1, 4))) == 24
    assert len(patterns(NM(1, 3))) == 6


def best(block, nm):
    """The first of the best patterns, by looking at each."""
    n = len(block)
    rows = [tuple(int(i in c) for i in range(n)) for c in itertools.combinations(range(n), nm.keep)]
    top = None
    for some in itertools.product(sorted(rows), repeat=n):
        pattern = np.asarray(some)
        if np.all(pattern.sum(0) == nm.keep):
            total = float((pattern * np.abs(block)).sum())
            if top is None or total > top[0]:
                top = total, pattern
    return top[1] == 1


@pytest.mark.parametrize("nm", [NM(2, 4), NM(1, 4), NM(1, 2)], ids=str)
def test_every_block_has_its_best_pattern(nm):
    weights = params()
    found = pp.transposable(as_jax(weights), None, config(nm))
    by_torch = pp.transposable(as_torch(weights), None, config(nm))
    compiled = jax.jit(lambda p: pp.transposable(p, None, config(nm)))(as_jax(weights))
    with off_host():
        elsewhere = pp.transposable(as_torch(weights), None, config(nm))
    for layer in LAYERS:
        f, n = form("test", layer), nm.of
        mask = np.asarray(found[layer.weight])
        for other in (by_torch, compiled, elsewhere):
            np.testing.assert_array_equal(np.asarray(other[layer.weight]), mask)
        matrices, masks = as_matrices(weights[layer.weight], f), as_matrices(mask, f)
        for m, i, j in itertools.product(*map(range, (f.members, f.out // n, f.columns // n))):
            at = (m, slice(n * i, n * i + n), slice(n * j, n * j + n))
            np.testing.assert_array_equal(masks[at], best(matrices[at], nm))


def test_random_blocks_keep_what_the_paper_says():
    """Of Gaussian blocks about 94.3 % of what 2:4 along rows alone keeps."""
    rng = np.random.default_rng(0)
    weight = {"fc": rng.normal(size=(400, 400)).astype(np.float32)}
    layer = [Layer("fc", "Linear", "fc", (400, 400), (1,), (0,))]
    both, rows = (
        p(as_jax(weight), None, config(NM(2, 4), layer)) for p in (pp.transposable, pp.level)
    )
    kept = [np.abs(weight["fc"])[np.asarray(m["fc"])].sum() for m in (both, rows)]
    assert 0.938 < kept[0] / kept[1] < 0.948


def test_maps_over_weights():
    weights = {p: np.stack([x, -2 * x[::-1]]) for p, x in params().items()}
    found = jax.vmap(lambda p: pp.transposable(p, None, config(NM(2, 4))))(as_jax(weights))
    by_torch = torch.func.vmap(lambda p: pp.transposable(p, None, config(NM(2, 4))))(
        as_torch(weights)
    )
    for i in range(2):
        one = {path: x[i] for path, x in weights.items()}
        expected = pp.transposable(as_jax(one), None, config(NM(2, 4)))
        for path, mask in expected.items():
            np.testing.assert_array_equal(found[path][i], mask)
            np.testing.assert_array_equal(by_torch[path][i].numpy(), mask)


def test_what_has_no_such_pattern_is_refused():
    weights = as_jax(params())

    def refuses(error, *parts, of=None, stats=None, given=weights):
        with raises(error, "transposable", *parts):
            pp.transposable(given, stats, of or config(NM(2, 4)))

    refuses(ValueError, "'element'", "NM(keep=2, of=4)", of=pp.resolve(0.5, LAYERS))
    refuses(ValueError, "up to 4", of=config(NM(2, 8), LAYERS[:1]))
    odd = Layer("fc", "Linear", "fc", (8, 6), (1,), (0,))
    refuses(
        ValueError,
        "layer 'fc'",
        "6 outputs",
        "exclude it",
        of=config(NM(2, 4), [odd]),
        given=as_jax({"fc": np.ones((8, 6), np.float32)}),
    )
    refuses(TypeError, "stats=None", stats=5)
    refuses(ValueError, "masks", of=config(NM(2, 4)).with_masks({"fc": np.ones((8, 12), bool)}))
    bad = {**params(), "fc": np.full((8, 12), np.nan, np.float32)}
    refuses(ValueError, "layer 'fc'", "NaN", given=as_jax(bad))
