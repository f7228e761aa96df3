"""Exact selection in torch, where NumPy cannot be used: on accelerators, and in transformations.

As in :mod:`purepruning.selection.kth_host`, a sorted sample brackets the cut, and one pass over the
weights counts what lies below the bracket and copies what lies inside, about one in a hundred.
Shapes here depend on data, which torch allows in eager use; :func:`lowest` is for
``torch.func.vmap``, which does not. ``xp`` is array-api-compat's
torch, so that this module imports no framework.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from purepruning.arrays import int32, namespace
from purepruning.selection.keys import HIGHEST, LOWEST, Piece, Threshold, ordered_bits

CHUNK = 8_388_608  # elements looked at together: what is derived from them is all that is stored


SAMPLE = 65_536  # sorted sample that brackets the cut, of all pieces together


def local_masks(pieces: Sequence[Piece], counts: Any, check: bool) -> tuple[list[Any], list[Any]]:
    """Returns masks that prune the ``counts[i]`` lowest of piece i, and where NaN is.

    The second result says for each piece whether a score is NaN; it is looked for only if
    ``check``.
    """
    cuts = [_solve([p], int(k), [p.size]) for p, k in zip(pieces, counts, strict=True)]
    masks = [_kept(piece, cut, 0) for piece, cut in zip(pieces, cuts, strict=True)]
    return masks, [check and _has_nan(piece) for piece in pieces]


def global_masks(
    pieces: Sequence[Piece], budget: Any, caps: Any, check: bool
) -> tuple[list[Any], list[Any]]:
    """Returns masks that prune the ``budget`` lowest elements of all, and where NaN is.

    Only the ``caps[i]`` lowest elements of piece i take part, and ``budget`` is at most their sum.
    Ties go to the earlier piece first, then to the lower index.
    """
    cut = _solve(pieces, int(budget), [int(c) for c in caps])
    masks = [_kept(piece, cut, i) for i, piece in enumerate(pieces)]
    return masks, [check and _has_nan(piece) for piece in pieces]


def _kept(piece: Piece, cut: Threshold, i: int) -> Any:
    """Returns which elements of piece i the cut keeps, in the shape of its arrays."""
    xp = namespace(piece.arrays[0])
    result = xp.empty(piece.size, dtype=xp.bool, device=piece.arrays[0].device)
    for index, keys in _chunks(piece):
        start = int(index[0])
        result[start : start + keys.shape[0]] = cut.keeps(i, keys, index)
    return xp.reshape(result, piece.shape)


def lowest(keys: Any, budgets: Any, costs: Any | None) -> Any:
    """Returns which keys of each row are pruned: the lowest, as long as they fit into its budget.

    For int32 ``keys (rows, n)``; ``costs (n,)`` are those of the units, 1 if None. Equal keys count
    in order of position; the first that does not fit ends it.
    """
    xp = namespace(keys)
    order = xp.argsort(keys, axis=1, stable=True)
    unit = xp.ones_like(keys) if costs is None else xp.broadcast_to(costs, keys.shape)
    spent = xp.cumulative_sum(xp.take_along_axis(unit, order, axis=1), axis=1)
    fits = spent <= xp.reshape(budgets, (-1, 1))
    return xp.take_along_axis(fits, xp.argsort(order, axis=1, stable=True), axis=1)


class _Near(NamedTuple):
    """One piece seen from a bracket ``[low, high]``: how many keys are below, the keys inside."""

    below: int
    inside: Any


def _solve(pieces: Sequence[Piece], budget: int, caps: list[int]) -> Threshold:
    """Returns the cuts; a piece that reaches its cap is cut there, the others share the rest."""
    xp = namespace(pieces[0].arrays[0])
    keys, indices = [LOWEST] * len(pieces), [HIGHEST] * len(pieces)
    free = list(range(len(pieces)))
    while free and budget:
        key, near = _kth(xp, [pieces[i] for i in free], budget)
        below = [n.below + int(xp.sum(n.inside < key)) for n in near]
        ties = [int(xp.sum(n.inside == key)) for n in near]
        rest, dealt = budget - sum(below), []
        for tie in ties:
            dealt.append(min(tie, rest))
            rest -= dealt[-1]
        full = [i for i, b, d in zip(free, below, dealt, strict=True) if b + d > caps[i]]
        if not full:
            for i, tie, n in zip(free, ties, dealt, strict=True):
                keys[i], indices[i] = key, _nth_tie(pieces[i], key, n) if n < tie else HIGHEST
            break
        for i in full:
            cut = _solve([pieces[i]], caps[i], [pieces[i].size])
            keys[i], indices[i] = cut.key[0], cut.index[0]
            budget -= caps[i]
            free.remove(i)
    return Threshold(keys, indices)


def _kth(xp: Any, pieces: Sequence[Piece], k: int) -> tuple[int, list[_Near]]:
    """Returns the k-th lowest key of all pieces, and the pieces near it; k is at least 1."""
    sample, share = _sample(xp, pieces), k / sum(p.size for p in pieces)
    m = sample.shape[0]
    spread = 4 * (m * share * (1 - share)) ** 0.5 + 2
    while True:
        first, last = int(m * share - spread), int(m * share + spread)
        low = int(sample[first]) if first >= 0 else LOWEST
        high = int(sample[last]) if last < m else HIGHEST
        near = [_look(xp, piece, low, high) for piece in pieces]
        rank = k - sum(n.below for n in near)
        inside = xp.concat([n.inside for n in near])
        if 0 < rank <= inside.shape[0]:
            return int(xp.kthvalue(inside, rank).values), near
        spread *= 4


def _look(xp: Any, piece: Piece, low: int, high: int) -> _Near:
    below, inside = 0, []
    for _, keys in _chunks(piece):
        below += int(xp.sum(keys < low))
        inside.append(keys[(keys >= low) & (keys <= high)])
    return _Near(below, xp.concat(inside))


def _nth_tie(piece: Piece, key: int, n: int) -> int:
    """Returns the flat index of the n-th element whose key is ``key``; -1 for n = 0."""
    for index, keys in _chunks(piece) if n else ():
        ties = index[keys == key]
        if n <= ties.shape[0]:
            return int(ties[n - 1])
        n -= ties.shape[0]
    return -1


def _has_nan(piece: Piece) -> bool:
    return any(bool((keys == HIGHEST).any()) for _, keys in _chunks(piece))


def _chunks(piece: Piece) -> Iterator[tuple[Any, Any]]:
    """Yields flat indices and keys of the piece, a chunk at a time."""
    xp = namespace(piece.arrays[0])
    flats = [xp.reshape(a, (-1,)) for a in piece.arrays]
    for start in range(0, piece.size, CHUNK):
        stop = min(start + CHUNK, piece.size)
        index = xp.arange(start, stop, dtype=xp.int32, device=flats[0].device)
        scores = piece.scores(tuple(flat[start:stop] for flat in flats), index)
        yield index, ordered_bits(xp, scores)


def _sample(xp: Any, pieces: Sequence[Piece]) -> Any:
    """Returns sorted keys spread over all pieces: they speed the search, never decide it."""
    step = max(sum(p.size for p in pieces) // SAMPLE, 1)
    keys = []
    for piece in pieces:
        like = piece.arrays[0]
        place = xp.arange(max(piece.size // step, 1), dtype=xp.int64, device=like.device)
        index = place * step + (place * 2654435761 >> 8) % step
        parts = tuple(xp.reshape(a, (-1,))[index] for a in piece.arrays)
        keys.append(ordered_bits(xp, piece.scores(parts, int32(xp, index, like))))
    return xp.sort(xp.concat(keys))
