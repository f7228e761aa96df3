"""Exact selection in JAX by counting, for weights too large to sort or copy.

The k-th smallest of n numbers is the smallest pivot that at least k of them do not exceed. Floats
become integers of the same order, and the pivot is searched with counts alone: a first guess from a
small sorted sample, then secant steps inside a bracket. A count reads the data once, in chunks that
stay in cache, and copies none of it; k may be traced; across devices only counts are summed.

Equal numbers are told apart by position, in one more pass that finds the last one to prune.

Weights are counted by one loop over their chunks, since a small loop body for every weight would
take XLA several times longer to compile. Small weights are copied into one vector, from which the
loop reads; a large one is read where it is, picked with ``lax.switch``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from purepruning.selection.joined import in_chunks, is_small, joined, kind
from purepruning.selection.keys import HIGHEST, LOWEST, Piece, Threshold, ordered_bits

CHUNK = 262_144  # elements read at a time: 1 MB of float32, so that what is derived stays in cache
SMALL_CHUNK = 65_536  # the same of small pieces
GROUP = 32  # large pieces that share one loop; XLA's compile time grows with the square of it
ROWS = 4  # rows of a chunk summed into one vector of partial counts, see _total
SAMPLE = 16_384  # sorted sample for the first guesses, of all pieces together


def local_masks(pieces: Sequence[Piece], counts: Array, check: bool) -> tuple[list[Array], Array]:
    """Returns masks that prune the ``counts[i]`` lowest of piece i, and where NaN is.

    Counts, int32 of shape ``(pieces,)``, must lie in ``[0, size of the piece]``. Masks have the
    shapes of the pieces' arrays. The second result says for each piece whether a score is NaN,
    ``(pieces,)``; it is looked for only if ``check``.
    """
    counter = _counter(pieces)
    cut, has_nan = _solve(counter, counts, None, check)
    return counter.kept(cut), has_nan


def global_masks(
    pieces: Sequence[Piece], budget: Array, caps: Array, check: bool
) -> tuple[list[Array], Array]:
    """Returns masks that prune the ``budget`` lowest elements of all, and where NaN is.

    Only the ``caps[i]`` lowest elements of piece i take part, and ``budget`` is at most their sum.
    Ties go to the earlier piece first, then to the lower index. Otherwise as :func:`local_masks`.
    """
    counter = _counter(pieces)
    cut, has_nan = _solve(counter, jnp.broadcast_to(budget, caps.shape), caps, check)
    return counter.kept(cut), has_nan


def local_cuts(pieces: Sequence[Piece], counts: Array) -> Threshold:
    """Returns the cuts of :func:`local_masks`."""
    return _solve(_counter(pieces), counts, None, False)[0]


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
        kept: ``cut -> masks``: which elements of each piece stay, in the shape of its arrays.
        sample: sorted keys of each piece, ``(pieces, some)``; None where that is not cheap.
        together: sorted keys of all pieces, ``(1, some)``.
    """

    sizes: Array
    upto: Callable[[Array, Array], Array]
    tie_index: Callable[[Array, Array], Array]
    kept: Callable[[Threshold], list[Array]]
    sample: Array | None = None
    together: Array | None = None


def _solve(
    counter: _Counter, target: Array, caps: Array | None, check: bool
) -> tuple[Threshold, Array]:
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
    if not in_chunks():
        return _whole(pieces)
    loops = _loops(pieces)
    counters = [_chunked(loop) for loop in loops]
    order = np.argsort(np.concatenate([loop.which for loop in loops]))

    def join(parts: Sequence[Callable[[Array, Array], Array]]) -> Callable[[Array, Array], Array]:
        def of_all(a: Array, b: Array) -> Array:
            done = [
                part(a[loop.which], b[loop.which]) for part, loop in zip(parts, loops, strict=True)
            ]
            return jnp.concatenate(done)[order]

        return of_all

    def kept(cut: Threshold) -> list[Array]:
        done = [
            mask
            for counter, loop in zip(counters, loops, strict=True)
            for mask in counter.kept(Threshold(cut.key[loop.which], cut.index[loop.which]))
        ]
        return [done[i] for i in order]

    width = max(SAMPLE // len(pieces), 256)
    sample = jnp.concatenate([_sample(loop, width) for loop in loops])[order]
    return _Counter(
        sizes=jnp.asarray([p.size for p in pieces], jnp.int32),
        upto=join([c.upto for c in counters]),
        tie_index=join([c.tie_index for c in counters]),
        kept=kept,
        sample=sample,
        together=jnp.sort(sample.reshape(1, -1)),
    )


class _Loop(NamedTuple):
    """Pieces that are read by one loop, a chunk at a time.

    Attributes:
        which: numbers of the pieces, ``(pieces,)``.
        sizes: elements of each.
        length: elements of a chunk.
        sources: what is read: vectors that hold one large piece, or many small ones in a row.
        source: which of them each piece is in, ``(pieces,)``.
        begin: where it begins there.
        pieces: what is read; the score of the first is that of all.
        layer_stats: what else goes into the scores, with one row for each piece.
        offset: the first index of each piece, as its score is told it.
    """

    which: np.ndarray
    sizes: np.ndarray
    length: int
    sources: list[tuple[Array, ...]]
    source: np.ndarray
    begin: np.ndarray
    pieces: list[Piece]
    layer_stats: Any
    offset: Array


def _loops(pieces: Sequence[Piece]) -> list[_Loop]:
    """Returns the loops that read the pieces: those scored alike share one.

    Small pieces are copied into one vector, so that one loop body serves them all; a large one is
    read where it is, and costs its loop a branch.
    """
    alike: dict[Any, list[int]] = {}
    for i, piece in enumerate(pieces):
        alike.setdefault((kind(piece), is_small(piece)), []).append(i)
    loops = []
    for (_, small), group in alike.items():
        most = len(group) if small else GROUP
        for i in range(0, len(group), most):
            loops.append(_loop(pieces, np.asarray(group[i : i + most]), small))
    return loops


def _loop(pieces: Sequence[Piece], which: np.ndarray, small: bool) -> _Loop:
    mine = [pieces[i] for i in which]
    sizes = np.asarray([p.size for p in mine], np.int32)
    flat = [tuple(a.reshape(-1) for a in p.arrays) for p in mine]
    begin, source, length = np.zeros_like(sizes), np.arange(len(mine), dtype=np.int32), CHUNK
    if small:
        length = SMALL_CHUNK
        flat = [joined(flat, length)]  # behind the last piece is room for a whole chunk
        begin, source = np.cumsum(sizes, dtype=np.int32) - sizes, 0 * source
    stats = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(p.layer_stats for p in mine))
    offset = jnp.stack([jnp.asarray(p.offset, jnp.int32) for p in mine])
    return _Loop(which, sizes, length, flat, source, begin, mine, stats, offset)


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

        counter = _Counter(sizes, ties, tie_index, kept)
        start = _Bracket(0 * sizes - 1, sizes - 1, 0 * sizes, 0 * sizes + HIGHEST)
        return _search(counter, start, need, None, False).bracket.hi

    def kept(cut: Threshold) -> list[Array]:
        return [cut.keeps(i, *piece.keys(jnp)) for i, piece in enumerate(pieces)]

    sizes = jnp.asarray([p.size for p in pieces], jnp.int32)
    return _Counter(sizes, upto, tie_index, kept)


def _chunked(loop: _Loop) -> _Counter:
    """Counts a chunk of elements at a time, so that what is derived from them stays in cache."""
    length, total = loop.length, -(-loop.sizes // loop.length)
    owner_of = jnp.asarray(np.repeat(np.arange(len(total), dtype=np.int32), total))
    start_of = jnp.asarray(np.concatenate([np.arange(n) * length for n in total]), jnp.int32)
    sizes, source, begin = map(jnp.asarray, (loop.sizes, loop.source, loop.begin))
    n_chunks = int(total.sum())
    place = lax.iota(jnp.int32, length)

    def reader(arrays: tuple[Array, ...]) -> Callable[[Array], tuple[Array, ...]]:
        return lambda first: tuple(lax.dynamic_slice(a, (first,), (length,)) for a in arrays)

    readers = [reader(arrays) for arrays in loop.sources]

    def read(j: Array) -> tuple[Array, Array, Array]:
        """Returns the keys of a chunk, which of them no other chunk has, and its first index."""
        owner, start = owner_of[j], start_of[j]
        first = jnp.minimum(start, jnp.maximum(sizes[owner] - length, 0))
        parts = lax.switch(source[owner], readers, begin[owner] + first)
        stats = jax.tree.map(lambda leaf: leaf[owner], loop.layer_stats)
        piece = Piece(parts, loop.pieces[0].score, stats, loop.offset[owner])
        fresh = (place >= start - first) & (place < sizes[owner])
        return ordered_bits(jnp, piece.scores(parts, first + place)), fresh, first

    def upto(key: Array, active: Array) -> Array:
        def add(j: Array, counts: Array) -> Array:
            owner = owner_of[j]

            def count() -> Array:
                keys, fresh, _ = read(j)
                return _total((keys <= key[owner]) & fresh)

            return counts.at[owner].add(lax.cond(active[owner], count, lambda: jnp.int32(0)))

        return lax.fori_loop(0, n_chunks, add, jnp.zeros_like(sizes))

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

        return lax.fori_loop(0, n_chunks, visit, (0 * sizes, 0 * sizes))[1]

    def kept(cut: Threshold) -> list[Array]:
        if len(loop.sources) > 1 or len(loop.pieces) == 1:
            return [cut.keeps(i, *piece.keys(jnp)) for i, piece in enumerate(loop.pieces)]

        def write(j: Array, masks: Array) -> Array:
            owner = owner_of[j]
            keys, _, first = read(j)
            mask = cut.keeps(owner, keys, first + place)
            # What a chunk reads of the next piece is written again by that piece's own chunks.
            return lax.dynamic_update_slice(masks, mask, (begin[owner] + first,))

        room = jnp.zeros(loop.sources[0][0].shape, bool)
        masks = lax.fori_loop(0, n_chunks, write, room)
        return [
            masks[i : i + piece.size].reshape(piece.shape)
            for i, piece in zip(loop.begin.tolist(), loop.pieces, strict=True)
        ]

    return _Counter(sizes, upto, tie_index, kept)


def _total(counted: Array) -> Array:
    """Returns the number of True in a vector, 3x faster than ``sum`` on a CPU.

    Rows are added elementwise, which vectorises; the barrier keeps XLA from fusing both sums into
    one that does not.
    """
    rows = ROWS if counted.shape[0] % ROWS == 0 else 1
    return _sum(lax.optimization_barrier(_sum(counted.reshape(rows, -1), axis=0)))


def _sample(loop: _Loop, width: int) -> Array:
    """Returns sorted keys from every piece, evenly spread; they only speed the search up."""
    place = lax.iota(jnp.uint32, width)[None, :]
    scattered = (place * jnp.uint32(2654435761)) >> 8
    stride = jnp.asarray(np.maximum(loop.sizes // width, 1), jnp.uint32)[:, None]
    index = (place * stride + scattered % stride) % jnp.asarray(loop.sizes, jnp.uint32)[:, None]
    index = index.astype(jnp.int32)
    at = index + loop.begin[:, None]
    if len(loop.sources) == 1:
        parts = tuple(a[at] for a in loop.sources[0])
    else:
        rows = [[a[row] for a in arrays] for arrays, row in zip(loop.sources, at, strict=True)]
        parts = tuple(map(jnp.stack, zip(*rows, strict=True)))
    stats = jax.tree.map(lambda leaf: leaf[:, None], loop.layer_stats)
    piece = Piece(parts, loop.pieces[0].score, stats, loop.offset[:, None])
    return jnp.sort(ordered_bits(jnp, piece.scores(parts, index)), axis=1)
