"""Exact selection in NumPy: copy the few elements near the cut, and rank only those.

A sorted sample brackets the key to cut at. One pass over the elements counts those up to the
bracket and copies those inside, less than one in a hundred; where many elements share one key, they
are counted and not copied. A second pass makes the masks. Both read a chunk at a time, so that what
is derived from it stays in cache, and nothing is compiled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from purepruning.arrays import NUMPY, empty
from purepruning.selection.keys import HIGHEST, INFINITY, LOWEST, Piece, flat_index

CHUNK = 131_072  # elements read at a time: 512 KiB of float32
SAMPLE = 65_536  # at most so many elements bracket the cut, of all pieces together
SMALL = 32_768  # up to so many elements are ranked as they are


class HostThreshold(NamedTuple):
    """What to prune of each piece: keys below ``key``, and of equal ones the first ``ties``."""

    key: list[int]
    ties: list[int]


def local_cuts(pieces: Sequence[Piece], counts: Any) -> list[HostThreshold | None]:
    """Returns the cuts of :func:`local_masks`, one for each piece; None where there is a NaN."""
    return [_solve([p], int(k), [p.size]) for p, k in zip(pieces, counts, strict=True)]


def local_masks(
    pieces: Sequence[Piece], counts: Any, check: bool
) -> tuple[list[np.ndarray] | None, list[bool]]:
    """Returns masks that prune the ``counts[i]`` lowest of piece i, and where NaN is.

    Masks have the shapes of the pieces' arrays; where there is a NaN there are none. It is looked
    for whether ``check`` or not.
    """
    cuts = local_cuts(pieces, counts)
    if None in cuts:
        return None, [_has_nan(piece) for piece in pieces]
    masks = [_kept(piece, cut, 0) for piece, cut in zip(pieces, cuts, strict=True) if cut]
    return masks, [False] * len(pieces)


def global_masks(
    pieces: Sequence[Piece], budget: Any, caps: Any, check: bool
) -> tuple[list[np.ndarray] | None, list[bool]]:
    """Returns masks that prune the ``budget`` lowest elements of all, and where NaN is.

    Only the ``caps[i]`` lowest elements of piece i take part, and ``budget`` is at most their sum.
    Ties go to the earlier piece first, then to the lower index. Otherwise as :func:`local_masks`.
    """
    cut = _solve(pieces, int(budget), [int(c) for c in caps])
    if cut is None:
        return None, [_has_nan(piece) for piece in pieces]
    masks = [_kept(piece, cut, i) for i, piece in enumerate(pieces)]
    return masks, [False] * len(pieces)


def _kept(piece: Piece, cut: HostThreshold, i: int) -> np.ndarray:
    """Returns which elements of piece i the cut keeps, in the shape of its arrays."""
    result = empty((piece.size,), np.bool)
    key, ties = cut.key[i], cut.ties[i]
    for start, keys in _chunks(piece):
        assert keys is not None  # where there is a NaN, there is no cut
        part = result[start : start + len(keys)]
        np.greater_equal(keys, key, out=part)
        if ties:
            first = np.flatnonzero(keys == key)[:ties]
            part[first] = False
            ties -= len(first)
    return result.reshape(piece.shape)


def lowest(keys: np.ndarray, budgets: np.ndarray, costs: np.ndarray | None) -> np.ndarray:
    """Returns which keys of each row are pruned: the lowest, as long as they fit into its budget.

    For int32 ``keys (rows, n)``; ``costs (n,)`` are those of the units, 1 if None. Equal keys count
    in order of position; the first that does not fit ends it.
    """
    if costs is None and len(keys) < keys.shape[1]:
        return np.stack([_lowest_of_row(*row) for row in zip(keys, budgets, strict=True)])
    order = np.argsort(keys, axis=1, kind="stable")
    spent = np.cumsum(np.ones_like(keys) if costs is None else costs[order], axis=1)
    result = np.empty(keys.shape, np.bool)
    np.put_along_axis(result, order, spent <= budgets[:, None], axis=1)
    return result


def by_groups(
    piece: Piece,
    grouped: Callable[[np.ndarray], np.ndarray],
    axis: int,
    choose: Callable[[np.ndarray], np.ndarray],
) -> tuple[np.ndarray, bool]:
    """Returns ``choose`` of the keys of all groups, as ``grouped`` shapes them; if one is NaN.

    Args:
        piece: what is ranked.
        grouped: how arrays in the piece's shape are divided into groups.
        axis: the axis that lies inside a group, behind the one that counts groups.
        choose: keys to booleans of their shape, in which the axis inside a group comes first.
    """
    arrays = [grouped(a) for a in piece.arrays]
    index = grouped(flat_index(NUMPY, piece.arrays[0])) if piece.indexed else None
    shape = arrays[0].shape
    flat = (
        math.prod(shape[: axis - 1]),
        shape[axis - 1],
        shape[axis],
        math.prod(shape[axis + 1 :]),
    )
    result = empty(flat, np.bool)
    for part in _blocks(flat):
        some = tuple(a.reshape(flat)[part] for a in arrays)
        keys = ordered(piece.scores(some, None if index is None else index.reshape(flat)[part]))
        if keys is None:
            return result.reshape(shape), True
        first = np.ascontiguousarray(np.moveaxis(keys, 2, 0))
        result[part] = np.moveaxis(choose(first), 0, 2)
    return result.reshape(shape), False


def keys_of_rows(
    piece: Piece, as_rows: Callable[[np.ndarray], np.ndarray]
) -> Iterator[tuple[slice, np.ndarray | None]]:
    """Yields some rows at a time: which, and their keys, None if there is a NaN.

    Args:
        piece: what is ranked.
        as_rows: from arrays in the piece's shape to ``(rows, columns)``.
    """
    arrays = [as_rows(a) for a in piece.arrays]
    index = as_rows(flat_index(NUMPY, piece.arrays[0])) if piece.indexed else None
    n, columns = arrays[0].shape
    # Where rows are not dense in memory, several share what is read with an element of one.
    step = max(CHUNK // columns, 16)
    for start in range(0, n, step):
        some = slice(start, start + step)
        parts = tuple(_dense(a[some]) for a in arrays)
        yield some, ordered(piece.scores(parts, None if index is None else index[some]))


def _dense(rows: np.ndarray) -> np.ndarray:
    """Returns rows that are dense in memory each, however they lie to each other."""
    return rows if rows.strides[1] == rows.itemsize else np.ascontiguousarray(rows)


def _blocks(shape: tuple[int, int, int, int]) -> Iterator[tuple[slice, slice]]:
    """Yields parts of the first two axes, of some ``CHUNK`` elements each."""
    rows, columns, *rest = shape
    wide = max(CHUNK // math.prod(rest), 1)
    high = max(wide // columns, 1)
    for i in range(0, rows, high):
        for j in range(0, columns, wide):
            yield slice(i, i + high), slice(j, j + wide)


def _lowest_of_row(keys: np.ndarray, count: int) -> np.ndarray:
    if not count:
        return np.zeros(keys.shape, np.bool)
    key = np.partition(keys, count - 1)[count - 1]
    pruned = keys < key
    pruned[np.flatnonzero(keys == key)[: count - np.count_nonzero(pruned)]] = True
    return pruned


class _Near(NamedTuple):
    """Pieces seen from a bracket: how many keys are up to its lower end, and those inside."""

    upto: list[int]
    inside: list[list[np.ndarray]]


class Kth(NamedTuple):
    """The key to cut at: how many keys of each piece are below it, and how many equal it."""

    key: int
    below: list[int]
    ties: list[int]

    def dealt(self, budget: int) -> list[int]:
        """Returns how many of the ties of each piece are pruned; earlier pieces come first."""
        rest, result = budget - sum(self.below), []
        for tie in self.ties:
            result.append(min(tie, rest))
            rest -= result[-1]
        return result


def _solve(pieces: Sequence[Piece], budget: int, caps: list[int]) -> HostThreshold | None:
    """Returns the cuts; None if there is a NaN."""
    if not budget:
        nothing = HostThreshold([LOWEST] * len(pieces), [0] * len(pieces))
        return None if any(map(_has_nan, pieces)) else nothing
    return cuts(budget, caps, lambda free, k: _kth([pieces[i] for i in free], k))


def cuts(
    budget: int, caps: Sequence[int], kth: Callable[[list[int], int], Kth | None]
) -> HostThreshold | None:
    """Returns where pieces are cut that share a budget; one that reaches its cap is cut there.

    ``kth(which, k)`` finds the k-th lowest key of some of the pieces, k at least 1; None if there
    is a NaN, and then there are no cuts.
    """
    keys, ties = [LOWEST] * len(caps), [0] * len(caps)
    free = list(range(len(caps)))
    while free and budget:
        found = kth(free, budget)
        if found is None:
            return None
        dealt = found.dealt(budget)
        parts = list(zip(free, found.below, found.ties, dealt, strict=True))
        full = [i for i, below, _, d in parts if below + d > caps[i]]
        if not full:
            for i, _, tie, d in parts:
                keys[i], ties[i] = (found.key, d) if d < tie else (found.key + 1, 0)
            break
        for i in full:
            if caps[i]:
                alone = kth([i], caps[i])
                assert alone is not None
                (d,) = alone.dealt(caps[i])
                keys[i], ties[i] = (alone.key, d) if d < alone.ties[0] else (alone.key + 1, 0)
            budget -= caps[i]
            free.remove(i)
    return HostThreshold(keys, ties)


def _kth(pieces: Sequence[Piece], k: int) -> Kth | None:
    """Returns the k-th lowest key of all pieces, k at least 1; None if there is a NaN."""
    size = sum(p.size for p in pieces)
    sample = _sample(pieces, size)
    if sample is None:
        return None
    m, share = len(sample), k / size
    spread = 4 * (m * share * (1 - share)) ** 0.5 + 2
    least, most = -INFINITY - 1, INFINITY + 1
    while True:
        first, last = int(m * share - spread), int(m * share + spread)
        low = max(int(sample[first]), least) if first >= 0 else least
        high = min(int(sample[last]), most) if last < m else most
        if low < high:
            near = _look(pieces, low, high)
            if near is None:
                return None
            rank = k - sum(near.upto)
            inside = np.concatenate([part for parts in near.inside for part in parts])
            if 0 < rank <= len(inside):
                inside.partition(rank - 1)
                key = int(inside[rank - 1])
                below = [
                    n + sum(int(np.count_nonzero(part < key)) for part in parts)
                    for n, parts in zip(*near, strict=True)
                ]
                ties = [sum(int(np.count_nonzero(p == key)) for p in ps) for ps in near.inside]
                return Kth(key, below, ties)
            low = low if rank <= 0 else high
        # Not between two samples: many elements may share the key of one.
        found = _share(pieces, low)
        if found is None:
            return None
        fewer = sum(found.below)
        if fewer < k <= fewer + sum(found.ties):
            return found
        least, most = (least, low) if k <= fewer else (low, most)
        spread *= 4


def _look(pieces: Sequence[Piece], low: int, high: int) -> _Near | None:
    near = _Near([], [])
    for piece in pieces:
        upto, inside = 0, []
        for _, keys in _chunks(piece):
            if keys is None:
                return None
            lower = keys <= low
            upto += int(np.count_nonzero(lower))
            inside.append(keys[np.greater(keys < high, lower, out=lower)])
        near.upto.append(upto)
        near.inside.append(inside)
    return near


def _share(pieces: Sequence[Piece], key: int) -> Kth | None:
    found = Kth(key, [], [])
    for piece in pieces:
        below = ties = 0
        for _, keys in _chunks(piece):
            if keys is None:
                return None
            below += int(np.count_nonzero(keys < key))
            ties += int(np.count_nonzero(keys == key))
        found.below.append(below)
        found.ties.append(ties)
    return found


def _has_nan(piece: Piece) -> bool:
    return any(keys is None for _, keys in _chunks(piece))


def _chunks(piece: Piece) -> Iterator[tuple[int, np.ndarray | None]]:
    """Yields a chunk at a time of the piece: its first flat index, and its keys."""
    flats = [a.reshape(-1) for a in piece.arrays]
    for start in range(0, piece.size, CHUNK):
        stop = min(start + CHUNK, piece.size)
        index = np.arange(start, stop, dtype=np.int32) if piece.indexed else None
        yield start, ordered(piece.scores(tuple(flat[start:stop] for flat in flats), index))


def ordered(scores: np.ndarray) -> np.ndarray | None:
    """Returns int32 in the order of float32 ``scores``, both zeros as 0; None if one is NaN."""
    bits = scores.view(np.int32)
    if bits.view(np.uint32).max(initial=0) <= INFINITY:
        return bits
    if np.isnan(scores).any():
        return None
    sign = bits >> 31
    return (bits ^ (sign & HIGHEST)) - sign


def _sample(pieces: Sequence[Piece], size: int) -> np.ndarray | None:
    """Returns sorted keys spread over all pieces: they speed the search, never decide it."""
    if size <= SMALL:
        return np.zeros(0, np.int32)
    step = size // min(SAMPLE, int(size ** (2 / 3)))
    keys = []
    for piece in pieces:
        place = np.arange(piece.size // step, dtype=np.int64)
        index = place * step + (place * 2654435761 >> 8) % step
        parts = tuple(a.reshape(-1)[index] for a in piece.arrays)
        some = ordered(piece.scores(parts, index.astype(np.int32)))
        if some is None:
            return None
        keys.append(some)
    return np.sort(np.concatenate(keys))
