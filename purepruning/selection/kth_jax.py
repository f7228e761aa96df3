"""Exact selection in JAX by counting, for weights too large to sort or copy.

The k-th smallest of n numbers is the smallest pivot that at least k of them do not exceed. Floats
become integers of the same order, and the pivot is searched with counts alone: a first guess from a
small sorted sample, then secant steps inside a bracket. A count reads the data once, in chunks that
stay in cache, and copies none of it; k may be traced; across devices only counts are summed.

Equal numbers are told apart by position, in one more pass that finds the last one to prune.

Weights of similar size are counted by one loop over their chunks, which picks the weight that a
chunk is read from with ``lax.switch``: one small loop body per weight would take XLA several times
longer to compile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from purepruning.selection.keys import HIGHEST, LOWEST, Piece, Threshold, ordered_bits

CHUNK = 262_144  # elements read at a time: 1 MB of float32, so that what is derived stays in cache


LEAST_CHUNK = 1024  # the same of small pieces; between them, steps of 4


GROUP = 32  # pieces that share one loop; XLA's compile time grows with the square of it


ROWS = 4  # rows of a chunk summed into one vector of partial counts, see _total


SAMPLE = 16_384  # sorted sample for the first guesses, of all pieces together


def local_cuts(pieces: Sequence[Piece], counts: Array, check: bool) -> tuple[Threshold, Array]:
    """Returns the cuts that prune the ``counts[i]`` lowest of piece i, and where NaN is.

    Counts, int32 of shape ``(pieces,)``, must lie in ``[0, size of the piece]``. The second result
    says for each piece whether a score is NaN, ``(pieces,)``; it is looked for only if ``check``.
    """
    return _solve(pieces, counts, None, check)


def global_cuts(
    pieces: Sequence[Piece], budget: Array, caps: Array, check: bool
) -> tuple[Threshold, Array]:
    """Returns each piece's part of the ``budget`` lowest elements of all, and where NaN is.

    Only the ``caps[i]`` lowest elements of piece i take part, and ``budget`` is at most their sum.
    Ties go to the earlier piece first, then to the lower index.
    """
    return _solve(pieces, jnp.broadcast_to(budget, caps.shape), caps, check)


def kept(piece: Piece, cut: Threshold, i: int) -> Array:
    """Returns which elements of piece i the cut keeps, in the shape of its arrays."""
    return cut.keeps(i, *piece.keys(jnp))


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
            spent = _sum(jnp.where(values <= middle[:, None], cost[None, :], 0), axis=1)
            good = spent <= budget
            return jnp.where(good, middle, fits), jnp.where(good, over, middle)

        start = (jnp.full_like(budget, lo), jnp.full_like(budget, hi))
        return lax.fori_loop(0, max((hi - lo).bit_length(), 1), halve, start)[0]

    key = last_that_fits(keys, budgets, LOWEST, HIGHEST)[:, None]
    below = keys <= key
    ties = keys == key + 1
    rest = budgets - _sum(jnp.where(below, cost[None, :], 0), axis=1)
    place = lax.iota(jnp.int32, keys.shape[1])[None, :]
    order = jnp.where(ties, place, keys.shape[1])
    index = last_that_fits(order, rest, -1, keys.shape[1])[:, None]
    return below | (ties & (place <= index))


# Where 64-bit types are enabled, a sum of int32 is int64 unless told otherwise.
_sum = functools.partial(jnp.sum, dtype=jnp.int32)


# The search. All pieces are searched side by side, in vectors ``(pieces,)``. In global scope they
# first share one bracket and one target; when it is closed, each is dealt a count of its own, and
# the same loop goes on for those that are not cut exactly yet.
class _Bracket(NamedTuple):
    """The key to cut at lies in ``(lo, hi]``; ``below``, ``upto`` count the keys up to its ends."""

    lo: Array
    hi: Array
    below: Array
    upto: Array


class _State(NamedTuple):
    bracket: _Bracket
    target: Array
    own: Array  # whether every piece has its own target; a scalar
    step: Array  # -1 while NaNs are counted
    numbers: Array  # how many elements of each piece are not NaN
    pivot: Array  # the last two pivots, and what they counted towards the target
    reached: Array
    last_pivot: Array
    last_reached: Array


class _Counter(NamedTuple):
    """How pieces are counted on the device they are on.

    Attributes:
        sizes: elements of each piece.
        upto: ``(keys, active) -> counts``: elements up to the key, 0 where not active.
        tie_index: ``(keys, need) -> index``: flat index of the need-th element equal to the key.
        sample: sorted keys of each piece, ``(pieces, some)``; None where that is not cheap.
        together: sorted keys of all pieces, ``(1, some)``.
    """

    sizes: Array
    upto: Callable[[Array, Array], Array]
    tie_index: Callable[[Array, Array], Array]
    sample: Array | None = None
    together: Array | None = None


def _solve(
    pieces: Sequence[Piece], target: Array, caps: Array | None, check: bool
) -> tuple[Threshold, Array]:
    counter = _counter(pieces)
    sizes, zero = counter.sizes, jnp.zeros_like(counter.sizes)
    bracket = _Bracket(zero + LOWEST, zero + HIGHEST, zero, sizes)
    state = _search(counter, bracket, target, caps, check)
    bracket, need = state.bracket, state.target - state.bracket.below
    split = (need > 0) & (state.target < bracket.upto)
    index = counter.tie_index(bracket.hi, jnp.where(split, need, 0))
    cut = Threshold(jnp.where(need > 0, bracket.hi, bracket.lo), jnp.where(split, index, HIGHEST))
    return cut, state.numbers < sizes


def _search(
    counter: _Counter, bracket: _Bracket, target: Array, caps: Array | None, check: bool
) -> _State:
    """Returns brackets closed around the smallest key whose count reaches the target.

    Closed means that ``hi - lo`` is 1 or that one end counts exactly the target.
    """
    zero = jnp.zeros_like(target)

    def towards(counts: Array, own: Array) -> Array:
        """What counts of the pieces are worth towards their targets."""
        if caps is None:
            return counts
        return jnp.where(own, counts, _sum(jnp.minimum(counts, caps)))

    def is_open(s: _State) -> Array:
        b = s.bracket
        below, upto = towards(b.below, s.own), towards(b.upto, s.own)
        return (s.step < 0) | ((below < s.target) & (s.target < upto) & (b.lo < b.hi - 1))

    def step(s: _State) -> _State:
        b, active = s.bracket, is_open(s)
        pivot = jnp.where(s.step < 0, HIGHEST - 1, _guess(s, towards, counter))
        counts = counter.upto(pivot, active)
        reached = towards(counts, s.own)
        low, high = active & (reached < s.target), active & (reached >= s.target)
        bracket = _Bracket(
            lo=jnp.where(low, pivot, b.lo),
            hi=jnp.where(high, pivot, b.hi),
            below=jnp.where(low, counts, b.below),
            upto=jnp.where(high, counts, b.upto),
        )
        after = s._replace(
            bracket=bracket,
            step=s.step + 1,
            numbers=jnp.where(s.step < 0, counts, s.numbers),
            pivot=pivot,
            reached=reached,
            last_pivot=s.pivot,
            last_reached=s.reached,
        )
        return deal(after)

    def deal(s: _State) -> _State:
        if caps is None:
            return s
        closed = ~s.own & ~jnp.any(is_open(s))
        dealt = _dealt(s, caps)
        return jax.tree.map(lambda new, old: jnp.where(closed, new, old), dealt, s)

    state = _State(
        bracket=bracket,
        target=target,
        own=jnp.asarray(caps is None),
        step=jnp.int32(-1 if check else 0),
        numbers=counter.sizes,
        pivot=zero,
        reached=zero,
        last_pivot=zero,
        last_reached=zero,
    )
    return lax.while_loop(lambda s: jnp.any(is_open(s)), step, deal(state))


def _dealt(s: _State, caps: Array) -> _State:
    """Returns the state in which pieces have their own counts: the shared bracket is closed."""
    b = s.bracket
    below, upto = jnp.minimum(b.below, caps), jnp.minimum(b.upto, caps)
    # Equal scores at the cut go to the pieces in order.
    ties = upto - below
    rest = s.target - _sum(below) - (jnp.cumsum(ties, dtype=jnp.int32) - ties)
    target = below + jnp.clip(rest, 0, ties)
    # A piece at its cap is cut below the shared bracket, every other one inside it.
    capped = target < b.below
    bracket = _Bracket(
        lo=jnp.where(capped, LOWEST, b.lo),
        hi=jnp.where(capped, b.lo, b.hi),
        below=jnp.where(capped, 0, b.below),
        upto=jnp.where(capped, b.below, b.upto),
    )
    return s._replace(bracket=bracket, target=target, own=jnp.asarray(True), step=jnp.int32(0))


def _guess(s: _State, towards: Callable[[Array, Array], Array], counter: _Counter) -> Array:
    """Returns the next pivots, strictly inside their brackets."""
    lo, hi = s.bracket.lo, s.bracket.hi
    below, upto = towards(s.bracket.below, s.own), towards(s.bracket.upto, s.own)
    width = lax.bitcast_convert_type(hi - lo, jnp.uint32)  # may exceed the range of int32
    middle = lo + lax.bitcast_convert_type(width >> 1, jnp.int32)
    share = (s.target - below).astype(jnp.float32) / (upto - below).astype(jnp.float32)
    along = jnp.minimum(width.astype(jnp.float32) * jnp.clip(share, 0.0, 1.0), 2.0**32 - 256)
    between = lo + lax.bitcast_convert_type(along.astype(jnp.uint32), jnp.int32)
    # A secant through the last two counts, moving by at least one key.
    missing = (s.target - s.reached).astype(jnp.float32)
    rise = (s.reached - s.last_reached).astype(jnp.float32)
    run = (s.pivot - s.last_pivot).astype(jnp.float32)
    move = missing * run / jnp.where(rise == 0, jnp.inf, rise)
    move = jnp.where(jnp.abs(move) < 1, jnp.sign(missing), jnp.round(jnp.clip(move, -1e9, 1e9)))
    secant = s.pivot + move.astype(jnp.int32)
    pivot = jnp.where((lo < secant) & (secant < hi) & (s.step >= 2), secant, between)
    pivot = jnp.where((s.step >= 8) & (s.step % 2 == 1), middle, pivot)
    if counter.sample is not None and counter.together is not None:
        total = towards(counter.sizes, s.own)
        near, repeated = _from_sample(s, total, counter.sample)
        if len(counter.sizes) > 1:
            # While pieces share a bracket, they are one: look at the sample of all of them.
            one = jax.tree.map(lambda x: x[:1] if x.ndim else x, s)
            near_all, repeated_all = _from_sample(one, total[:1], counter.together)
            near = jnp.where(s.own, near, near_all)
            repeated = jnp.where(s.own, repeated, repeated_all)
        pivot = jnp.where((s.step < 2) | (repeated & (s.step < 12)), near, pivot)
    return jnp.maximum(jnp.minimum(pivot, hi - 1), lo + 1)


def _from_sample(s: _State, total: Array, sample: Array) -> tuple[Array, Array]:
    """Returns the sampled key nearest to the target's rank, and whether it was sampled repeatedly.

    A repeated key is one that many elements share; interpolating between such keys gets nowhere.
    """
    width = sample.shape[1]
    rank = _sum(sample <= s.pivot[:, None], axis=1) - 1
    rank, reached = (jnp.where(s.step == 0, 0, x) for x in (rank, s.reached))
    share = (s.target - reached).astype(jnp.float32) / jnp.maximum(total, 1).astype(jnp.float32)
    rank = jnp.clip(rank + jnp.ceil(share * width).astype(jnp.int32), 0, width - 1)
    around = jnp.clip(rank[:, None] + jnp.asarray([[-1, 0, 1]], jnp.int32), 0, width - 1)
    before, near, after = jnp.take_along_axis(sample, around, axis=1).T
    repeated = ((before == near) & (rank > 0)) | ((near == after) & (rank < width - 1))
    return near, repeated


# Counting.
def _counter(pieces: Sequence[Piece]) -> _Counter:
    if jax.default_backend() != "cpu" or jax.device_count() > 1:
        return _whole(pieces)
    groups = _groups(pieces)
    counters = [_chunked([pieces[i] for i in group], length) for group, length in groups]
    order = np.concatenate([group for group, _ in groups])

    def join(parts: Sequence[Callable[[Array, Array], Array]]) -> Callable[[Array, Array], Array]:
        def joined(a: Array, b: Array) -> Array:
            done = [
                part(a[np.asarray(group)], b[np.asarray(group)])
                for part, (group, _) in zip(parts, groups, strict=True)
            ]
            return jnp.concatenate(done)[np.argsort(order)]

        return joined

    sample = _sample(pieces)
    return _Counter(
        sizes=jnp.asarray([p.size for p in pieces], jnp.int32),
        upto=join([c.upto for c in counters]),
        tie_index=join([c.tie_index for c in counters]),
        sample=sample,
        together=jnp.sort(sample.reshape(1, -1)),
    )


def _groups(pieces: Sequence[Piece]) -> list[tuple[list[int], int]]:
    """Returns the pieces that share a loop, and how many elements it reads at a time."""
    alike: dict[Any, list[int]] = {}
    for i, piece in enumerate(pieces):
        length = CHUNK
        while length > max(piece.size, LEAST_CHUNK):
            length //= 4
        own = jax.tree.map(jnp.result_type, piece.own)
        kind = (piece.score, tuple(a.dtype for a in piece.arrays), str(own), length)
        alike.setdefault(kind, []).append(i)
    return [
        (group[i : i + GROUP], kind[-1])
        for kind, group in alike.items()
        for i in range(0, len(group), GROUP)
    ]


def _whole(pieces: Sequence[Piece]) -> _Counter:
    """Counts every piece in its own shape, unsliced: over many devices, or where reductions fuse.

    Sharded weights stay where they are; each device counts its part and the counts are summed.
    """

    def upto(key: Array, active: Array) -> Array:
        counts = [_sum(p.keys(jnp)[0] <= k) for p, k in zip(pieces, key, strict=True)]
        return jnp.where(active, jnp.stack(counts), 0)

    def tie_index(key: Array, need: Array) -> Array:
        def ties(last: Array, active: Array) -> Array:
            counts = []
            for i, piece in enumerate(pieces):
                bits, index = piece.keys(jnp)
                counts.append(_sum((bits == key[i]) & (index <= last[i])))
            return jnp.where(active, jnp.stack(counts), 0)

        counter = _Counter(sizes, ties, tie_index)
        start = _Bracket(0 * sizes - 1, sizes - 1, 0 * sizes, 0 * sizes + HIGHEST)
        return _search(counter, start, need, None, False).bracket.hi

    sizes = jnp.asarray([p.size for p in pieces], jnp.int32)
    return _Counter(sizes, upto, tie_index)


def _chunked(pieces: Sequence[Piece], length: int) -> _Counter:
    """Counts ``length`` elements at a time, so that what is derived from them stays in cache."""
    chunks = [-(-p.size // length) for p in pieces]
    start_of = jnp.asarray([i * length for n in chunks for i in range(n)], jnp.int32)
    owner_of = jnp.asarray(np.repeat(np.arange(len(pieces)), chunks), jnp.int32)
    sizes = jnp.asarray([p.size for p in pieces], jnp.int32)
    offsets = jnp.stack([jnp.asarray(p.offset, jnp.int32) for p in pieces])
    owns = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(p.own for p in pieces))
    place = lax.iota(jnp.int32, length)

    def reader(piece: Piece) -> Callable[[Array], tuple[Array, ...]]:
        some = min(length, piece.size)

        def part(array: Array, first: Array) -> Array:
            return jnp.pad(
                lax.dynamic_slice(array.reshape(-1), (first,), (some,)), (0, length - some)
            )

        return lambda first: tuple(part(a, first) for a in piece.arrays)

    readers = [reader(p) for p in pieces]

    def read(j: Array) -> tuple[Array, Array, Array]:
        """Returns the keys of a chunk, which of them no other chunk has, and its first index."""
        owner, start = owner_of[j], start_of[j]
        first = jnp.minimum(start, jnp.maximum(sizes[owner] - length, 0))
        parts = lax.switch(owner, readers, first)
        own = jax.tree.map(lambda leaf: leaf[owner], owns)
        piece = Piece(parts, pieces[0].score, own, offsets[owner])
        fresh = (place >= start - first) & (place < sizes[owner])
        return ordered_bits(jnp, piece.scores(parts, first + place)), fresh, first

    def upto(key: Array, active: Array) -> Array:
        def add(j: Array, counts: Array) -> Array:
            owner = owner_of[j]

            def count() -> Array:
                keys, fresh, _ = read(j)
                return _total((keys <= key[owner]) & fresh)

            return counts.at[owner].add(lax.cond(active[owner], count, lambda: jnp.int32(0)))

        return lax.fori_loop(0, sum(chunks), add, jnp.zeros_like(sizes))

    def tie_index(key: Array, need: Array) -> Array:
        def nth(ties: Array, n: Array) -> Array:
            def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
                lo, hi = ends
                middle = (lo + hi) // 2
                reached = _sum(ties & (place <= middle)) >= n
                return jnp.where(reached, lo, middle), jnp.where(reached, middle, hi)

            ends = (jnp.int32(-1), jnp.int32(length - 1))
            return lax.fori_loop(0, length.bit_length(), halve, ends)[1]

        def visit(j: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
            owner = owner_of[j]

            def look() -> tuple[Array, Array]:
                seen, found = state
                keys, fresh, first = read(j)
                ties = (keys == key[owner]) & fresh
                more = _total(ties)
                rest = need[owner] - seen[owner]
                here = (rest > 0) & (rest <= more)
                index = lax.cond(here, lambda: first + nth(ties, rest), lambda: found[owner])
                return seen.at[owner].add(more), found.at[owner].set(index)

            return lax.cond(need[owner] > state[0][owner], look, lambda: state)

        return lax.fori_loop(0, sum(chunks), visit, (0 * sizes, 0 * sizes))[1]

    return _Counter(sizes, upto, tie_index)


def _total(counted: Array) -> Array:
    """Returns the number of True in a vector, 3x faster than ``sum`` on a CPU.

    Rows are added elementwise, which vectorises; the barrier keeps XLA from fusing both sums into
    one that does not.
    """
    rows = ROWS if counted.shape[0] % ROWS == 0 else 1
    return _sum(lax.optimization_barrier(_sum(counted.reshape(rows, -1), axis=0)))


def _sample(pieces: Sequence[Piece]) -> Array:
    """Returns sorted keys from every piece, evenly spread; they only speed the search up."""
    width = max(SAMPLE // len(pieces), 256)
    place = lax.iota(jnp.uint32, width)
    scattered = (place * jnp.uint32(2654435761)) >> 8

    def row(piece: Piece) -> Array:
        stride = max(piece.size // width, 1)
        index = ((place * stride + scattered % stride) % piece.size).astype(jnp.int32)
        parts = tuple(a.reshape(-1)[index] for a in piece.arrays)
        return ordered_bits(jnp, piece.scores(parts, index))

    return jnp.sort(jnp.stack([row(piece) for piece in pieces]), axis=1)
