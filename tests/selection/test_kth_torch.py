"""The k-th lowest in torch, against sorts: shares what it is asked with the counting in JAX."""

from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from purepruning.selection import kth_torch
from purepruning.selection.keys import HIGHEST, Piece, ordered_bits
from tests import oracle
from tests.selection.test_kth_jax import INF, NAN, SIZES, problems, shared_oracle

shares = st.lists(st.floats(0, 1), min_size=6, max_size=6)


@pytest.fixture(autouse=True, scope="module")
def _small_chunks():
    with mock.patch.multiple(kth_torch, CHUNK=50, SAMPLE=40):
        yield


def pieces(scores):
    return [Piece((torch.tensor(s),), lambda arrays, index, layer_stats: arrays[0]) for s in scores]


def pruned(masks):
    return [~mask.numpy() for mask in masks]


@given(scores=problems(), shares=shares)
@settings(max_examples=100)
def test_every_piece_loses_its_own_lowest(scores, shares):
    counts = [round(s * n) for s, n in zip(shares, SIZES, strict=False)]
    some = pieces(scores)
    masks, nan = kth_torch.local_masks(some, torch.tensor(counts), True)
    for got, s, count in zip(pruned(masks), scores, counts, strict=True):
        np.testing.assert_array_equal(got, oracle.lowest(s, count))
    np.testing.assert_array_equal(nan, [np.isnan(s).any() for s in scores])


@given(scores=problems(), shares=shares)
@settings(max_examples=100)
def test_pieces_share_a_budget(scores, shares):
    caps = [round(s * n) for s, n in zip(shares, SIZES, strict=False)]
    budget = round(shares[5] * sum(caps))
    some = pieces(scores)
    masks, _ = kth_torch.global_masks(some, torch.tensor(budget), torch.tensor(caps), True)
    expected = shared_oracle(scores, budget, caps)
    for got, want in zip(pruned(masks), expected, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("n", [1, 49, 50, 51, 5000])
@pytest.mark.parametrize("kind", ["equal", "ascending", "descending", "wide", "two"])
def test_samples_that_mislead(n, kind):
    """The sample is spread over positions: scores that depend on position are its worst case."""
    scores = {
        "equal": np.ones(n),
        "ascending": np.arange(n),
        "descending": -np.arange(n),
        "wide": np.exp(np.linspace(-80, 80, n)) * (-1) ** np.arange(n),
        "two": np.arange(n) % 2,
    }[kind].astype(np.float32)
    for count in sorted({0, 1, n // 3, n // 2, n - 1, n}):
        some = pieces([scores])
        masks, _ = kth_torch.local_masks(some, [count], False)
        np.testing.assert_array_equal(pruned(masks)[0], oracle.lowest(scores, count))


def test_a_sample_that_misses_the_cut():
    """What is sampled lies below all else: the bracket has to be widened until it holds the cut."""
    scores, drawn = np.random.default_rng(0).random(5000).astype(np.float32) + 10, []

    def score(arrays, index, layer_stats):
        drawn.append(index)
        return arrays[0]

    kth_torch._sample(torch, [Piece((torch.tensor(scores),), score)])
    scores[drawn[0].numpy()] -= 10
    assert np.sum(scores < 1) == 40
    for count in (30, 41, 2500, 4999):
        some = pieces([scores])
        masks, _ = kth_torch.local_masks(some, [count], False)
        np.testing.assert_array_equal(pruned(masks)[0], oracle.lowest(scores, count))


def test_strided_weights_count_in_their_own_order():
    base = np.random.default_rng(0).integers(0, 9, (30, 40)).astype(np.float32)
    turned = torch.tensor(base).T
    some = [Piece((turned,), lambda arrays, index, layer_stats: arrays[0])]
    masks, _ = kth_torch.local_masks(some, [500], False)
    np.testing.assert_array_equal(pruned(masks)[0], oracle.lowest(base.T, 500))


def test_ordered_bits_are_those_of_jax():
    values = np.asarray([-INF, -1, -1e-45, -0.0, 0, 1e-45, 1, INF, NAN, -NAN], np.float32)
    expected = ordered_bits(jnp, jnp.asarray(values))
    by_torch = ordered_bits(torch, torch.tensor(values))
    np.testing.assert_array_equal(by_torch.numpy(), expected)
    assert by_torch[-1] == HIGHEST


def test_lowest_spends_a_budget():
    keys = torch.tensor([[5, 1, 1, 9, 1], [2, 2, 2, 2, 2]], dtype=torch.int32)
    some = kth_torch.lowest(keys, torch.tensor([4, 0]), torch.tensor([7, 2, 1, 1, 2]))
    assert some.int().tolist() == [[0, 1, 1, 0, 0], [0, 0, 0, 0, 0]]
    some = kth_torch.lowest(keys, torch.tensor([4, 2]), None)
    assert some.int().tolist() == [[1, 1, 1, 0, 1], [1, 1, 0, 0, 0]]
