"""Exact selection in JAX by counting, for weights too large to sort or copy.

The k-th smallest of n numbers is the smallest pivot that at least k of them do not exceed. Floats
become integers of the same order, and the pivot is searched with counts alone: a first guess from a
small sorted sample, then secant steps inside a bracket. A count reads the data once, in chunks that
stay in cache, and copies none of it; k may be traced; across devices only counts are summed.

Equal numbers are told apart by position, in one more pass that finds the last one to prune.

All weights are counted by one loop over their chunks, which picks the weight with ``lax.switch``: one
small loop body per weight would take XLA several times longer to compile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from purepruning.pieces import HIGHEST, LOWEST, Cut, Piece, ordered_bits

CHUNK = 262_144  # elements read at a time: 1 MB of float32, so that what is derived stays in cache
GROUP = 16  # pieces that share one loop; XLA's compile time grows with the square of it
ROWS = 4  # rows of a chunk summed into one vector of partial counts, see _total
SAMPLE = 16_384  # sorted sample for the first guesses, of all pieces together


def local_cuts(pieces: Sequence[Piece], counts: Array) -> Cut:
    """Returns the cuts that prune the ``counts[i]`` lowest elements of piece i; arrays ``(pieces,)``.

    Counts, int32 of shape ``(pieces,)``, must lie in ``[0, size of the piece]``.
    """
    counter = _counter(pieces)
    return _finish(counter, counts, _unknown(counter.sizes, len(pieces)))


def global_cuts(pieces: Sequence[Piece], budget: Array, caps: Array) -> Cut:
    """Returns each piece's part of the ``budget`` lowest elements of all pieces together.

    Only the ``caps[i]`` lowest elements of piece i take part, and ``budget`` is at most their sum.
    Ties go to the earlier piece first, then to the lower index.
    """
    counter = _counter(pieces)

    def together(counts: Array) -> Array:
        return jnp.sum(jnp.minimum(counts, caps), keepdims=True)

    sample = None if counter.sample is None else jnp.sort(counter.sample.reshape(1, -1), axis=1)
    target = jnp.reshape(budget, (1,))
    shared = _search(counter, target, _unknown(counter.sizes, 1), together, sample)
    # Equal scores at the cut are dealt out in the order of the pieces.
    below, upto = jnp.minimum(shared.below, caps), jnp.minimum(shared.upto, caps)
    ties = upto - below
    counts = below + jnp.clip(target - jnp.sum(below) - (jnp.cumsum(ties) - ties), 0, ties)
    # A piece at its cap is cut below the shared bracket, every other one inside it.
    capped = counts < shared.below
    bracket = _Bracket(
        lo=jnp.where(capped, LOWEST, shared.lo),
        hi=jnp.where(capped, shared.lo, shared.hi),
        below=jnp.where(capped, 0, shared.below),
        upto=jnp.where(capped, shared.below, shared.upto),
    )
    return _finish(counter, counts, bracket)


def has_nan(pieces: Sequence[Piece]) -> Array:
    """Returns for each piece whether some score is NaN, ``(pieces,)`` bool."""
    counter = _counter(pieces)
    everything = jnp.full_like(counter.sizes, HIGHEST - 1)
    return counter.count(everything, everything > 0) < counter.sizes


def pruned(piece: Piece, cut: Cut, i: int) -> Array:
    """Returns which elements of piece i the cut prunes, in the shape of its arrays."""
    return cut.prunes(i, *piece.keys(jnp))


def lowest(keys: Array, budgets: Array, costs: Array | None) -> Array:
    """Returns which keys of each row are pruned: the lowest, as long as they fit into its budget.

    For int32 ``keys (rows, n)`` that are small enough to be copied; ``costs (n,)`` are those of the
    units, 1 if None. Equal keys count in order of position; the first that does not fit ends it.
    """
    cost = jnp.ones(keys.shape[1], jnp.int32) if costs is None else costs

    def last_that_fits(values: Array, budget: Array, lo: int, hi: int) -> Array:
        """The largest v in [lo, hi] such that the units with values up to v fit; lo always does."""

        def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
            fits, over = ends
            gap = lax.bitcast_convert_type(over - fits, jnp.uint32)
            middle = fits + lax.bitcast_convert_type(gap >> 1, jnp.int32)
            spent = jnp.sum(jnp.where(values <= middle[:, None], cost[None, :], 0), axis=1)
            good = spent <= budget
            return jnp.where(good, middle, fits), jnp.where(good, over, middle)

        start = (jnp.full_like(budget, lo), jnp.full_like(budget, hi))
        return lax.fori_loop(0, max((hi - lo).bit_length(), 1), halve, start)[0]

    key = last_that_fits(keys, budgets, LOWEST, HIGHEST)[:, None]
    below = keys <= key
    ties = keys == key + 1
    rest = budgets - jnp.sum(jnp.where(below, cost[None, :], 0), axis=1)
    place = lax.iota(jnp.int32, keys.shape[1])[None, :]
    order = jnp.where(ties, place, keys.shape[1])
    index = last_that_fits(order, rest, -1, keys.shape[1])[:, None]
    return below | (ties & (place <= index))


# The search.


class _Bracket(NamedTuple):
    """The key to cut at lies in ``(lo, hi]``; ``below`` and ``upto`` count the keys up to either end.

    The ends are ``(problems,)``, the counts ``(pieces,)``: pieces may share one problem.
    """

    lo: Array
    hi: Array
    below: Array
    upto: Array


class _State(NamedTuple):
    bracket: _Bracket
    pivot: Array
    count: Array
    last_pivot: Array
    last_count: Array
    step: Array


class _Counter(NamedTuple):
    """How pieces are counted on the device they are on.

    Attributes:
        sizes: elements of each piece.
        count: ``(keys, active) -> counts``, all ``(pieces,)``: elements up to the key, 0 if inactive.
        tie_index: ``(keys, need) -> index``: flat index of the need-th element equal to the key.
        sample: sorted keys of each piece, ``(pieces, some)``; None where that is not cheap.
    """

    sizes: Array
    count: Callable[[Array, Array], Array]
    tie_index: Callable[[Array, Array], Array]
    sample: Array | None


def _unknown(sizes: Array, problems: int) -> _Bracket:
    lo = jnp.full(problems, LOWEST, jnp.int32)
    return _Bracket(lo, jnp.full(problems, HIGHEST, jnp.int32), jnp.zeros_like(sizes), sizes)


def _finish(counter: _Counter, counts: Array, bracket: _Bracket) -> Cut:
    """Returns the cuts of pieces that each prune their own ``counts``, known to lie in ``bracket``."""
    bracket = _search(counter, counts, bracket, lambda c: c, counter.sample)
    need = counts - bracket.below
    split = (need > 0) & (counts < bracket.upto)
    index = counter.tie_index(bracket.hi, jnp.where(split, need, 0))
    return Cut(jnp.where(need > 0, bracket.hi, bracket.lo), jnp.where(split, index, HIGHEST))


def _search(
    counter: _Counter,
    target: Array,
    bracket: _Bracket,
    gather: Callable[[Array], Array],
    sample: Array | None,
) -> _Bracket:
    """Returns brackets closed around the smallest key whose gathered count reaches the target.

    Closed means that ``hi - lo`` is 1 or that one end prunes exactly the target. ``gather`` turns
    counts ``(pieces,)`` into those of the problems, ``(problems,)``.
    """
    pieces, total = counter.sizes.shape, gather(counter.sizes)

    def is_open(b: _Bracket) -> Array:
        return (gather(b.below) < target) & (target < gather(b.upto)) & (b.lo < b.hi - 1)

    def step(s: _State) -> _State:
        b, active = s.bracket, is_open(s.bracket)
        pivot = _guess(s, target, total, gather, sample)
        counts = counter.count(jnp.broadcast_to(pivot, pieces), jnp.broadcast_to(active, pieces))
        count = gather(counts)
        low, high = active & (count < target), active & (count >= target)
        bracket = _Bracket(
            lo=jnp.where(low, pivot, b.lo),
            hi=jnp.where(high, pivot, b.hi),
            below=jnp.where(low, counts, b.below),
            upto=jnp.where(high, counts, b.upto),
        )
        return _State(bracket, pivot, count, s.pivot, s.count, s.step + 1)

    zero = jnp.zeros_like(target)
    state = _State(bracket, zero, zero, zero, zero, jnp.int32(0))
    return lax.while_loop(lambda s: jnp.any(is_open(s.bracket)), step, state).bracket


def _guess(
    s: _State,
    target: Array,
    total: Array,
    gather: Callable[[Array], Array],
    sample: Array | None,
) -> Array:
    """Returns the next pivots ``(problems,)``, strictly inside their brackets."""
    lo, hi = s.bracket.lo, s.bracket.hi
    below, upto = gather(s.bracket.below), gather(s.bracket.upto)
    width = lax.bitcast_convert_type(hi - lo, jnp.uint32)  # may exceed the range of int32
    middle = lo + lax.bitcast_convert_type(width >> 1, jnp.int32)
    share = (target - below).astype(jnp.float32) / (upto - below).astype(jnp.float32)
    along = jnp.minimum(width.astype(jnp.float32) * jnp.clip(share, 0.0, 1.0), 2.0**32 - 256)
    between = lo + lax.bitcast_convert_type(along.astype(jnp.uint32), jnp.int32)
    # A secant through the last two counts, moving by at least one key.
    missing = (target - s.count).astype(jnp.float32)
    rise = (s.count - s.last_count).astype(jnp.float32)
    run = (s.pivot - s.last_pivot).astype(jnp.float32)
    move = missing * run / jnp.where(rise == 0, jnp.inf, rise)
    move = jnp.where(jnp.abs(move) < 1, jnp.sign(missing), jnp.round(jnp.clip(move, -1e9, 1e9)))
    secant = s.pivot + move.astype(jnp.int32)
    pivot = jnp.where((lo < secant) & (secant < hi) & (s.step >= 2), secant, between)
    pivot = jnp.where((s.step >= 8) & (s.step % 2 == 1), middle, pivot)
    if sample is not None:
        near, repeated = _from_sample(s, target, total, sample)
        pivot = jnp.where((s.step < 2) | (repeated & (s.step < 12)), near, pivot)
    return jnp.maximum(jnp.minimum(pivot, hi - 1), lo + 1)


def _from_sample(s: _State, target: Array, total: Array, sample: Array) -> tuple[Array, Array]:
    """Returns the sampled key nearest to the target's rank, and whether it was sampled repeatedly.

    A repeated key is one that many elements share; interpolating between such keys gets nowhere.
    """
    width = sample.shape[1]
    reached = jnp.sum(sample <= s.pivot[:, None], axis=1, dtype=jnp.int32) - 1
    reached, count = (jnp.where(s.step == 0, 0, x) for x in (reached, s.count))
    share = (target - count).astype(jnp.float32) / jnp.maximum(total, 1).astype(jnp.float32)
    rank = jnp.clip(reached + jnp.ceil(share * width).astype(jnp.int32), 0, width - 1)
    around = jnp.clip(rank[:, None] + jnp.asarray([-1, 0, 1]), 0, width - 1)
    before, near, after = jnp.take_along_axis(sample, around, axis=1).T
    repeated = ((before == near) & (rank > 0)) | ((near == after) & (rank < width - 1))
    return near, repeated


# Counting.


def _counter(pieces: Sequence[Piece]) -> _Counter:
    if jax.default_backend() != "cpu" or jax.device_count() > 1:
        return _whole(pieces)
    groups = [_chunked(pieces[i : i + GROUP]) for i in range(0, len(pieces), GROUP)]
    ends = [min(i + GROUP, len(pieces)) for i in range(0, len(pieces), GROUP)]

    def join(parts: Sequence[Callable[[Array, Array], Array]]) -> Callable[[Array, Array], Array]:
        def joined(*vectors: Array) -> Array:
            cut = zip(*(jnp.split(v, ends[:-1]) for v in vectors), strict=True)
            return jnp.concatenate([part(*c) for part, c in zip(parts, cut, strict=True)])

        return joined

    return _Counter(
        sizes=jnp.concatenate([g.sizes for g in groups]),
        count=join([g.count for g in groups]),
        tie_index=join([g.tie_index for g in groups]),
        sample=_sample(pieces),
    )


def _whole(pieces: Sequence[Piece]) -> _Counter:
    """Counts every piece in its own shape, unsliced: over many devices, or where reductions fuse.

    Sharded weights stay where they are; each device counts its part and the counts are summed.
    """

    def count(key: Array, active: Array) -> Array:
        counts = [jnp.sum(p.keys(jnp)[0] <= k, dtype=jnp.int32) for p, k in zip(pieces, key, strict=True)]
        return jnp.where(active, jnp.stack(counts), 0)

    def tie_index(key: Array, need: Array) -> Array:
        def ties(last: Array, active: Array) -> Array:
            counts = []
            for i, piece in enumerate(pieces):
                bits, index = piece.keys(jnp)
                counts.append(jnp.sum((bits == key[i]) & (index <= last[i]), dtype=jnp.int32))
            return jnp.where(active, jnp.stack(counts), 0)

        counter = _Counter(sizes, ties, tie_index, None)
        start = _Bracket(jnp.full_like(sizes, -1), sizes - 1, 0 * sizes, 0 * sizes + HIGHEST)
        return _search(counter, need, start, lambda c: c, None).hi

    sizes = jnp.asarray([p.size for p in pieces], jnp.int32)
    return _Counter(sizes, count, tie_index, None)


def _chunked(pieces: Sequence[Piece]) -> _Counter:
    """Counts chunk by chunk, so that nothing derived from a weight is ever written to memory."""
    flats = [tuple(a.reshape(-1) for a in p.arrays) for p in pieces]
    lengths, starts, owners = [], [], []
    for i, piece in enumerate(pieces):
        chunks = -(-piece.size // CHUNK)
        length = min(-(-piece.size // (chunks * 64)) * 64, piece.size)  # whole vectors in every row
        lengths.append(length)
        starts += [j * length for j in range(chunks)]
        owners += [i] * chunks
    start_of, owner_of = jnp.asarray(starts, jnp.int32), jnp.asarray(owners, jnp.int32)
    sizes = jnp.asarray([p.size for p in pieces], jnp.int32)

    def chunk(i: int, start: Array) -> tuple[Array, Array, Array]:
        """Keys of one chunk, which of them no earlier chunk has read, and its first flat index."""
        length = lengths[i]
        place = lax.iota(jnp.int32, length)
        first = jnp.minimum(start, pieces[i].size - length)
        parts = tuple(lax.dynamic_slice(flat, (first,), (length,)) for flat in flats[i])
        bits = ordered_bits(jnp, pieces[i].score(parts, first + place))
        return bits, place >= start - first, first

    def count(key: Array, active: Array) -> Array:
        def branch(i: int, start: Array) -> Array:
            bits, fresh, _ = chunk(i, start)
            rows = ROWS if lengths[i] % ROWS == 0 else 1
            return _total(((bits <= key[i]) & fresh).reshape(rows, -1))

        branches = [functools.partial(branch, i) for i in range(len(pieces))]

        def add(j: Array, counts: Array) -> Array:
            owner = owner_of[j]
            counted = lax.cond(
                active[owner], lambda: lax.switch(owner, branches, start_of[j]), lambda: jnp.int32(0)
            )
            return counts.at[owner].add(counted)

        return lax.fori_loop(0, len(owners), add, jnp.zeros_like(sizes))

    def tie_index(key: Array, need: Array) -> Array:
        widest = -(-max(lengths) // ROWS) * ROWS

        def branch(i: int, start: Array) -> tuple[Array, Array]:
            bits, fresh, first = chunk(i, start)
            return jnp.pad((bits == key[i]) & fresh, (0, widest - lengths[i])), first

        branches = [functools.partial(branch, i) for i in range(len(pieces))]
        place = lax.iota(jnp.int32, widest)

        def nth(ties: Array, n: Array) -> Array:
            def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
                lo, hi = ends
                middle = (lo + hi) // 2
                reached = jnp.sum(ties & (place <= middle), dtype=jnp.int32) >= n
                return jnp.where(reached, lo, middle), jnp.where(reached, middle, hi)

            ends = (jnp.int32(-1), jnp.int32(widest - 1))
            return lax.fori_loop(0, widest.bit_length(), halve, ends)[1]

        def visit(j: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
            owner = owner_of[j]

            def look() -> tuple[Array, Array]:
                seen, found = state
                ties, first = lax.switch(owner, branches, start_of[j])
                more = _total(ties.reshape(ROWS, -1))
                rest = need[owner] - seen[owner]
                here = (0 < rest) & (rest <= more)
                index = lax.cond(here, lambda: first + nth(ties, rest), lambda: found[owner])
                return seen.at[owner].add(more), found.at[owner].set(index)

            return lax.cond(need[owner] > state[0][owner], look, lambda: state)

        return lax.fori_loop(0, len(owners), visit, (0 * sizes, 0 * sizes))[1]

    return _Counter(sizes, count, tie_index, None)


def _total(counted: Array) -> Array:
    """Returns the number of True in a ``(rows, columns)`` array, 3x faster than ``sum`` on a CPU.

    Rows are added elementwise, which vectorises; the barrier keeps XLA from fusing both sums into
    one that does not.
    """
    columns = lax.optimization_barrier(jnp.sum(counted, axis=0, dtype=jnp.int32))
    return jnp.sum(columns, dtype=jnp.int32)


def _sample(pieces: Sequence[Piece]) -> Array:
    """Returns sorted keys from every piece, evenly spread: they speed the search, never decide it."""
    width = max(SAMPLE // len(pieces), 256)
    place = lax.iota(jnp.uint32, width)
    scattered = (place * jnp.uint32(2654435761)) >> 8

    def row(i: int) -> Array:
        size = pieces[i].size
        stride = max(size // width, 1)
        index = ((place * stride + scattered % stride) % size).astype(jnp.int32)
        parts = tuple(a.reshape(-1)[index] for a in pieces[i].arrays)
        return ordered_bits(jnp, pieces[i].score(parts, index))

    return jnp.sort(jnp.stack([row(i) for i in range(len(pieces))]), axis=1)
