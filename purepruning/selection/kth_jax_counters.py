"""How elements are counted in JAX: a chunk at a time in one loop, or every piece in its shape.

A count reads the data once, in chunks that stay in cache, and copies none of it. One loop goes over
the chunks of many weights, since a small loop body for every weight would take XLA several times
longer to compile. Small weights are copied into one vector, from which the loop reads; a large one
is read where it is, picked with ``lax.switch``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from purepruning.arrays import laid_out_by, replicated
from purepruning.selection.joined import in_chunks, is_small, joined, kind
from purepruning.selection.keys import (
    HIGHEST,
    Piece,
    Threshold,
    flat_index,
    ordered_bits,
    wrapped,
)
from purepruning.selection.kth_jax_search import Bracket, Counter, int32_sum, search

CHUNK = 262_144  # elements read at a time: 1 MB of float32, so that what is derived stays in cache
SMALL_CHUNK = 65_536  # the same of small pieces
GROUP = 32  # large pieces that share one loop; XLA's compile time grows with the square of it
ROWS = 4  # rows of a chunk summed into one vector of partial counts, see _total
SAMPLE = 16_384  # sorted sample for the first guesses, of all pieces together


def counter_of(pieces: Sequence[Piece]) -> Counter:
    """Returns how the pieces are counted, on the devices they are on."""
    if not all(in_chunks(piece.arrays[0]) for piece in pieces):
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
    return Counter(
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


def _whole(pieces: Sequence[Piece]) -> Counter:
    """Counts every piece in its own shape, unsliced: over many devices, or where reductions fuse.

    Sharded weights stay where they are; each device counts its part and the counts are summed. A
    stack of layers is one piece here: no layer leaves the device, or the stage, that it is on.
    """
    numbers = [math.prod(p.shape[a] for a in p.stack_axes) for p in pieces]
    starts = np.cumsum([0, *numbers])

    def upto(key: Array, active: Array) -> Array:
        counts = [_in_stacks(p, _keys(p)[0] <= _over(p, k)) for p, k in _split(key)]
        return jnp.where(active, jnp.concatenate(counts), 0)

    def tie_index(key: Array, need: Array) -> Array:
        def ties(last: Array, active: Array) -> Array:
            counts = []
            for (piece, k), (_, i) in zip(_split(key), _split(last), strict=True):
                bits, index = _keys(piece)
                tied = (bits == _over(piece, k)) & (index <= _over(piece, i))
                counts.append(_in_stacks(piece, tied))
            return jnp.where(active, jnp.concatenate(counts), 0)

        counter = Counter(sizes, ties, tie_index, kept)
        start = Bracket(0 * sizes - 1, sizes - 1, 0 * sizes, 0 * sizes + HIGHEST)
        return search(counter, start, need, None, False).bracket.hi

    def kept(cut: Threshold) -> list[Array]:
        found = []
        for (piece, k), (_, i) in zip(_split(cut.key), _split(cut.index), strict=True):
            one = Threshold((_over(piece, k),), (_over(piece, i),))
            found.append(one.keeps(0, *_keys(piece)))
        return found

    def _split(rows: Array) -> list[tuple[Piece, Array]]:
        return [(p, rows[a:b]) for p, a, b in zip(pieces, starts, starts[1:], strict=False)]

    each = [p.size // n for p, n in zip(pieces, numbers, strict=True)]
    sizes = jnp.asarray(np.repeat(each, numbers), jnp.int32)
    return Counter(sizes, upto, tie_index, kept)


def _keys(piece: Piece) -> tuple[Array, Array]:
    """Returns the ordered bits of all scores, and the flat indices within each stacked layer."""
    if not piece.stack_axes:
        return piece.keys(jnp)
    like, shape, stacks = piece.arrays[0], piece.shape, piece.stack_axes
    rest = tuple(a for a in range(len(shape)) if a not in stacks)
    index = flat_index(jnp, like, rest)
    size = math.prod(shape[a] for a in rest)
    # A score is told the index in the whole stack, as that of a layer which is taken out of it.
    whole = index + flat_index(jnp, like, stacks) * wrapped(size)
    return ordered_bits(jnp, piece.scores(piece.arrays, whole)), index


def _over(piece: Piece, rows: Array) -> Array:
    """Returns one number for each stacked layer, as it is spread over the piece and laid out."""
    shape = [piece.shape[a] if a in piece.stack_axes else 1 for a in range(len(piece.shape))]
    order = [sorted(piece.stack_axes).index(a) for a in piece.stack_axes]
    stacked = rows.reshape([piece.shape[a] for a in piece.stack_axes])
    moved = stacked.transpose([order.index(a) for a in range(len(order))]).reshape(shape)
    spec = jax.typeof(piece.arrays[0]).sharding.spec
    return laid_out_by(
        moved, [spec[a] if n > 1 else None for a, n in enumerate(shape)], piece.arrays[0]
    )


def _in_stacks(piece: Piece, counted: Array) -> Array:
    """Returns the number of True in each stacked layer, on every device."""
    rest = tuple(a for a in range(counted.ndim) if a not in piece.stack_axes)
    left = sorted(piece.stack_axes)
    sums = replicated(int32_sum(counted, axis=rest))
    return sums.transpose([left.index(a) for a in piece.stack_axes]).reshape(-1)


def _chunked(loop: _Loop) -> Counter:
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
                reached = int32_sum(ties & (place <= middle)) >= n
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

    return Counter(sizes, upto, tie_index, kept)


def _total(counted: Array) -> Array:
    """Returns the number of True in a vector, 3x faster than ``sum`` on a CPU.

    Rows are added elementwise, which vectorises; the barrier keeps XLA from fusing both sums into
    one that does not.
    """
    rows = ROWS if counted.shape[0] % ROWS == 0 else 1
    return int32_sum(lax.optimization_barrier(int32_sum(counted.reshape(rows, -1), axis=0)))


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
