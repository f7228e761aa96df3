"""The k-th lowest by counting, against sorts: in chunks, or whole as over several devices."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from purepruning.selection import joined, kth_jax, kth_jax_counters
from purepruning.selection.keys import HIGHEST, LOWEST, Piece, ordered_bits
from tests import oracle

pytestmark = pytest.mark.usefixtures("unoptimized")

SIZES = (1, 64, 65, 130, 500)
INF, NAN = np.inf, np.nan


def piece(scores):
    return Piece((jnp.asarray(scores, jnp.float32),), lambda arrays, index, layer_stats: arrays[0])


SIZES_OF_CHUNKS = {"CHUNK": 64, "SMALL_CHUNK": 64, "SAMPLE": 256}
#: No chunks, or chunks of 64 over pieces that all are small, or two small and three large ones.
HOWS = {
    "whole": {"in_chunks": lambda like: False},
    "small": {},
    "both": {"GROUP": 2},
}
hows = pytest.mark.parametrize("how", HOWS)


@functools.cache
def solver(how, shared):
    """Masks of what is pruned, and NaN flags, from scores, counts and caps; compiled once."""

    def solve(scores, counts, caps):
        pieces = [piece(s) for s in scores]
        if shared:
            masks, nan = kth_jax.global_masks(pieces, counts[0], caps, True)
        else:
            masks, nan = kth_jax.local_masks(pieces, counts, True)
        return [~mask for mask in masks], nan

    def traced(*args):
        small = {"whole": 0, "small": 10**6, "both": 64}[how]
        with (
            mock.patch.multiple(
                kth_jax_counters, CHUNK=64, SMALL_CHUNK=64, SAMPLE=256, **HOWS[how]
            ),
            mock.patch.object(joined, "SMALL", small),
        ):
            return solve(*args)

    return jax.jit(traced)


def run(how, shared, scores, counts, caps=None):
    caps = SIZES if caps is None else caps
    counts, caps = jnp.asarray(counts, jnp.int32), jnp.asarray(caps, jnp.int32)
    pruned, nan = solver(how, shared)([jnp.asarray(s) for s in scores], counts, caps)
    return [np.asarray(p) for p in pruned], np.asarray(nan)


special = st.sampled_from([0.0, -0.0, INF, -INF, NAN, 1.0, -1.0, 1e-45, -1e-45, 2.0])
anything = st.floats(width=32)


@st.composite
def problems(draw):
    scores = []
    for n in SIZES:
        values = draw(st.sampled_from([special, anything]))
        some = draw(st.lists(values, min_size=1, max_size=20))
        scores.append(np.resize(np.asarray(some, np.float32), n))
    return scores


@hows
@given(scores=problems(), shares=st.lists(st.floats(0, 1), min_size=5, max_size=5))
@settings(max_examples=10)
def test_every_piece_loses_its_own_lowest(how, scores, shares):
    counts = [round(s * n) for s, n in zip(shares, SIZES, strict=True)]
    pruned, nan = run(how, False, scores, counts)
    for got, s, count in zip(pruned, scores, counts, strict=True):
        np.testing.assert_array_equal(got, oracle.lowest(s, count))
    np.testing.assert_array_equal(nan, [np.isnan(s).any() for s in scores])


def shared_oracle(scores, budget, caps):
    order = [np.argsort(s, kind="stable")[:cap] for s, cap in zip(scores, caps, strict=True)]
    values = np.concatenate([s[o] for s, o in zip(scores, order, strict=True)])
    owner = np.repeat(range(len(scores)), [len(o) for o in order])
    place = np.concatenate(order)
    first = np.lexsort((place, owner, values))[:budget]
    pruned = [np.zeros(len(s), bool) for s in scores]
    for i, j in zip(owner[first], place[first], strict=True):
        pruned[i][j] = True
    return pruned


@hows
@given(scores=problems(), shares=st.lists(st.floats(0, 1), min_size=6, max_size=6))
@settings(max_examples=10)
def test_pieces_share_a_budget(how, scores, shares):
    caps = [round(s * n) for s, n in zip(shares[:5], SIZES, strict=True)]
    budget = round(shares[5] * sum(caps))
    pruned, nan = run(how, True, scores, [budget], caps)
    for got, expected in zip(pruned, shared_oracle(scores, budget, caps), strict=True):
        np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(nan, [np.isnan(s).any() for s in scores])


@hows
def test_equal_scores_everywhere(how):
    scores = [np.zeros(n, np.float32) for n in SIZES]
    for counts in ((0, 1, 65, 64, 499), (1, 64, 0, 129, 1)):
        pruned, _ = run(how, False, scores, counts)
        assert [np.flatnonzero(p).tolist() for p in pruned] == [list(range(k)) for k in counts]
    pruned, _ = run(how, True, scores, [150], (1, 10, 65, 130, 500))
    assert [int(p.sum()) for p in pruned] == [1, 10, 65, 74, 0]


@pytest.mark.parametrize("dense", [True, False])
def test_few_counts_suffice(dense):
    """A count reads all weights, so there should be few; an unlucky sample makes it twenty."""
    n = kth_jax_counters.SMALL_CHUNK  # so that a count reads one chunk
    rng = np.random.default_rng(0)
    scores = np.abs(rng.normal(size=n)) if dense else rng.normal(size=n) ** 9
    reads = 0

    def score(arrays, index, layer_stats):
        jax.debug.callback(note)
        return arrays[0]

    def note():
        nonlocal reads
        reads += 1

    data = Piece((jnp.asarray(scores, jnp.float32),), score)
    cut = kth_jax.local_cuts([data], jnp.asarray([n // 3]))
    jax.block_until_ready(cut)
    jax.effects_barrier()
    assert 1 < reads <= 32


def test_ordered_bits_have_the_order_of_the_scores():
    values = np.asarray([-INF, -3.4e38, -1, -1e-45, 0, 1e-45, 1e-38, 1, 3.4e38, INF], np.float32)
    bits = np.asarray(ordered_bits(jnp, jnp.asarray(values)))
    assert np.all(np.diff(bits.astype(np.int64)) > 0)
    signed = ordered_bits(jnp, jnp.asarray([0.0, -0.0, NAN, -NAN]))
    assert signed.tolist() == [0, 0, HIGHEST, HIGHEST]
    assert bits.min() > LOWEST
    assert bits.max() < HIGHEST


def test_lowest_spends_a_budget():
    keys = jnp.asarray([[5, 1, 1, 9, 1], [2, 2, 2, 2, 2]], jnp.int32)
    pruned = kth_jax.lowest(keys, jnp.asarray([4, 0]), jnp.asarray([7, 2, 1, 1, 2]))
    assert pruned.astype(int).tolist() == [[0, 1, 1, 0, 0], [0, 0, 0, 0, 0]]
    pruned = kth_jax.lowest(keys, jnp.asarray([4, 2]), None)
    assert pruned.astype(int).tolist() == [[1, 1, 1, 0, 1], [1, 1, 0, 0, 0]]
