"""The k-th lowest in NumPy, against sorts: shares what it is asked with the counting in JAX."""

from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from purepruning.selection import kth_host
from purepruning.selection.keys import Piece, ordered_bits
from tests import oracle
from tests.selection.test_kth_jax import INF, NAN, SIZES, problems, shared_oracle

shares = st.lists(st.floats(0, 1), min_size=6, max_size=6)


@pytest.fixture(autouse=True, scope="module")
def _small_chunks():
    with mock.patch.multiple(kth_host, CHUNK=50, SAMPLE=40, SMALL=60):
        yield


def first(arrays, index, layer_stats):
    return arrays[0]


def pieces(scores):
    return [Piece((s,), first) for s in scores]


def pruned(masks):
    return [~mask for mask in masks]


def has_nan(scores):
    return [bool(np.isnan(s).any()) for s in scores]


@given(scores=problems(), shares=shares)
@settings(max_examples=100)
def test_every_piece_loses_its_own_lowest(scores, shares):
    counts = [round(s * n) for s, n in zip(shares, SIZES, strict=False)]
    some = pieces(scores)
    masks, nan = kth_host.local_masks(some, counts, True)
    assert nan == has_nan(scores)
    assert (masks is None) == any(nan)
    for got, s, count in zip(pruned(masks or []), scores, counts, strict=False):
        np.testing.assert_array_equal(got, oracle.lowest(s, count))


@given(scores=problems(), shares=shares)
@settings(max_examples=100)
def test_pieces_share_a_budget(scores, shares):
    caps = [round(s * n) for s, n in zip(shares, SIZES, strict=False)]
    budget = round(shares[5] * sum(caps))
    some = pieces(scores)
    masks, nan = kth_host.global_masks(some, budget, caps, True)
    assert nan == has_nan(scores)
    expected = shared_oracle(scores, budget, caps)
    for got, want in zip(pruned(masks or []), expected, strict=False):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("n", [1, 49, 50, 51, 5000])
@pytest.mark.parametrize("kind", ["equal", "ascending", "descending", "wide", "two", "mostly 0"])
def test_samples_that_mislead(n, kind):
    """The sample is spread over positions: scores that depend on position are its worst case."""
    scores = {
        "equal": np.ones(n),
        "ascending": np.arange(n),
        "descending": -np.arange(n),
        "wide": np.exp(np.linspace(-80, 80, n)) * (-1) ** np.arange(n),
        "two": np.arange(n) % 2,
        "mostly 0": np.maximum(np.arange(n) - 0.9 * n, 0),
    }[kind].astype(np.float32)
    for count in sorted({0, 1, n // 3, n // 2, int(0.9 * n), n - 1, n}):
        some = pieces([scores])
        masks, _ = kth_host.local_masks(some, [count], False)
        np.testing.assert_array_equal(pruned(masks)[0], oracle.lowest(scores, count))


@pytest.mark.parametrize("by", [-10, 10])
def test_a_sample_that_misses_the_cut(by):
    """What is sampled lies apart from all else: the bracket is widened until it holds the cut."""
    scores, drawn = np.random.default_rng(0).random(5000).astype(np.float32) + 10, []

    def score(arrays, index, layer_stats):
        drawn.append(index)
        return arrays[0]

    kth_host._sample([Piece((scores,), score)], 5000)
    scores[drawn[0]] += by
    assert 30 <= len(drawn[0]) <= 42
    for count in (30, 43, 2500, 4950, 4999):
        some = pieces([scores])
        masks, _ = kth_host.local_masks(some, [count], False)
        np.testing.assert_array_equal(pruned(masks)[0], oracle.lowest(scores, count))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8999, 0.9, 0.95])
def test_copies_little_however_many_are_equal(share):
    rng = np.random.default_rng(1)
    scores = rng.random(20_000).astype(np.float32)
    scores[rng.random(20_000) < 0.9] = 0
    copied, look = [], kth_host._look

    def watched(*args):
        near = look(*args)
        copied.append(sum(len(part) for parts in near.inside for part in parts))
        return near

    with mock.patch.multiple(kth_host, SAMPLE=2000, CHUNK=1000, _look=watched):
        masks, _ = kth_host.local_masks(pieces([scores]), [int(share * 20_000)], True)
    got = ~masks[0]
    np.testing.assert_array_equal(got, oracle.lowest(scores, int(share * 20_000)))
    assert sum(copied) < 3000


def test_strided_and_read_only_weights_count_in_their_own_order():
    base = np.random.default_rng(0).integers(0, 9, (30, 40)).astype(np.float32)
    base.flags.writeable = False
    some = pieces([base.T])
    masks, _ = kth_host.local_masks(some, [500], False)
    np.testing.assert_array_equal(pruned(masks)[0], oracle.lowest(base.T, 500))


def test_the_index_of_an_element_is_that_in_the_piece_and_its_offset():
    def score(arrays, index, layer_stats):
        return abs(index - 107).astype(np.float32)

    some = [Piece((np.zeros(130, np.float32),), score, offset=7)]
    masks, _ = kth_host.local_masks(some, [3], True)
    assert np.flatnonzero(pruned(masks)[0]).tolist() == [99, 100, 101]


def test_keys_have_the_order_of_those_of_jax():
    values = np.asarray([-INF, -1, -1e-45, -0.0, 0, 1e-45, 1, INF], np.float32)
    np.testing.assert_array_equal(
        kth_host.ordered(values), ordered_bits(jnp, jnp.asarray(values)), strict=True
    )
    for nan in (NAN, -NAN):
        for other in (1, -1):
            assert kth_host.ordered(np.asarray([nan, other], np.float32)) is None


def test_lowest_spends_a_budget():
    keys = np.asarray([[5, 1, 1, 9, 1], [2, 2, 2, 2, 2]], np.int32)
    some = kth_host.lowest(keys, np.asarray([4, 0]), np.asarray([7, 2, 1, 1, 2]))
    assert some.astype(int).tolist() == [[0, 1, 1, 0, 0], [0, 0, 0, 0, 0]]
    some = kth_host.lowest(keys, np.asarray([4, 2]), None)
    assert some.astype(int).tolist() == [[1, 1, 1, 0, 1], [1, 1, 0, 0, 0]]
