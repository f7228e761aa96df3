"""Exact selection where weights lie over processes: each counts its shard, and counts are added.

Keys are found digit by digit: three passes over the shards count how often each digit occurs among
the keys that have the digits before it, and what is sent is those counts, 8 KiB for each piece and
pass. Ties go by the position in the whole weight, which is found in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from purepruning.arrays import counted, empty, is_numpy, namespace
from purepruning.selection.keys import Piece, ordered_bits
from purepruning.selection.kth_host import CHUNK, HostThreshold, Kth, cuts, ordered
from purepruning.shards import Box, reduced

#: Where a digit of a key begins, and its number of bits, the highest first.
DIGITS = ((21, 11), (10, 11), (0, 10))


class ShardPiece(NamedTuple):
    """A piece of which this process holds a part, and where that lies."""

    piece: Piece
    box: Box


Values = Callable[[], Iterator[Any]]


def local_masks(
    pieces: Sequence[ShardPiece], counts: Sequence[int]
) -> tuple[list[Any], list[bool]]:
    """Returns masks of shards that prune the ``counts[i]`` lowest of piece i, and where NaN is."""
    each = [[i] for i in range(len(pieces))]
    found, nan = _ranked(pieces, _keys(pieces), each, [max(k, 1) for k in counts])
    result = HostThreshold([], [])
    for k, kth in zip(counts, found, strict=True):
        (tie,) = kth.dealt(k) if k else (0,)
        key = kth.key if tie < kth.ties[0] else kth.key + 1
        result.key.append(key if k else -(2**31))
        result.ties.append(tie if k and tie < kth.ties[0] else 0)
    return _kept(pieces, result), nan


def global_masks(
    pieces: Sequence[ShardPiece], budget: int, caps: Sequence[int]
) -> tuple[list[Any], list[bool]]:
    """Returns masks of shards that prune the ``budget`` lowest of all pieces, and where NaN is.

    Only the ``caps[i]`` lowest elements of piece i take part. Ties go to the earlier piece first,
    then to the lower position in the whole weight.
    """
    values = _keys(pieces)
    nan = [False] * len(pieces)

    def kth(which: list[int], k: int) -> Kth:
        some = [pieces[i] for i in which]
        found, bad = _ranked(some, [values[i] for i in which], [list(range(len(which)))], [k])
        for i, flag in zip(which, bad, strict=True):
            nan[i] |= flag
        return found[0]

    if not budget:
        kth(list(range(len(pieces))), 1)
    cut = cuts(budget, caps, kth)
    assert cut is not None
    return _kept(pieces, cut), nan


def _keys(pieces: Sequence[ShardPiece]) -> list[Values]:
    def of(piece: ShardPiece) -> Values:
        return lambda: (keys for _, keys in _chunks(piece))

    return [of(piece) for piece in pieces]


def _places(piece: ShardPiece, key: int) -> Values:
    """Returns where in the whole the elements of a shard are whose key is ``key``."""
    return lambda: (piece.box.index(place[keys == key]) for place, keys in _chunks(piece))


def _ranked(
    pieces: Sequence[ShardPiece],
    values: Sequence[Values],
    groups: Sequence[Sequence[int]],
    ks: Sequence[int],
) -> tuple[list[Kth], list[bool]]:
    """Returns the k-th lowest int32 of each group of pieces, and which pieces have NaN's key.

    Args:
        pieces: what is ranked.
        values: for each piece, the numbers of its shard, a chunk at a time.
        groups: which pieces are ranked together; each is in one group.
        ks: for each group, at least 1.
    """
    boxes = [piece.box for piece in pieces]
    known: list[int | None] = [None] * len(pieces)
    below, ties, ranks, nan = [0] * len(pieces), [0] * len(pieces), list(ks), [False] * len(pieces)
    for shift, bits in DIGITS:
        counts = [
            _histogram(piece, value, prefix, shift, bits)
            for piece, value, prefix in zip(pieces, values, known, strict=True)
        ]
        counts = [np.asarray(x.cpu() if not is_numpy(x) else x) for x in reduced(boxes, counts)]
        if shift == DIGITS[0][0]:
            nan = [bool(count[-1]) for count in counts]  # infinity's digit is a lower one
        for g, some in enumerate(groups):
            ends = np.cumsum(np.sum([counts[i] for i in some], axis=0, dtype=np.int64))
            digit = int(np.searchsorted(ends, ranks[g]))
            ranks[g] -= int(ends[digit - 1]) if digit else 0
            for i in some:
                below[i] += int(counts[i][:digit].sum(dtype=np.int64))
                ties[i] = int(counts[i][digit])
                before = known[i]
                known[i] = digit - 2 ** (bits - 1) if before is None else (before << bits) | digit
    found = []
    for some in groups:
        key = known[some[0]]
        assert key is not None
        found.append(Kth(key, [below[i] for i in some], [ties[i] for i in some]))
    return found, nan


def _histogram(piece: ShardPiece, values: Values, prefix: int | None, shift: int, bits: int) -> Any:
    """Returns how often each digit occurs in a shard, of numbers with the digits before it."""
    like = piece.piece.arrays[0]
    xp = namespace(like)
    n = 2**bits
    result = xp.zeros(n, dtype=xp.int32, **({} if is_numpy(like) else {"device": like.device}))
    for x in values() if piece.box.first else ():
        if prefix is None:
            digits = (x >> shift) + n // 2  # of numbers with a sign
        else:
            digits = (x[(x >> (shift + bits)) == prefix] >> shift) & (n - 1)
        result += counted(xp, digits, n)
    return result


def _kept(pieces: Sequence[ShardPiece], cut: HostThreshold) -> list[Any]:
    """Returns which elements of the shards the cut keeps."""
    tied = [i for i, ties in enumerate(cut.ties) if ties]
    last = dict.fromkeys(range(len(pieces)), -1)
    if tied:
        some = [pieces[i] for i in tied]
        values = [_places(pieces[i], cut.key[i]) for i in tied]
        each = [[j] for j in range(len(tied))]
        found, _ = _ranked(some, values, each, [cut.ties[i] for i in tied])
        last |= {i: kth.key for i, kth in zip(tied, found, strict=True)}
    return [_keep(piece, cut.key[i], last[i]) for i, piece in enumerate(pieces)]


def _keep(piece: ShardPiece, key: int, last: int) -> Any:
    """Returns which elements stay: keys above ``key``, and equal ones behind position ``last``."""
    like = piece.piece.arrays[0]
    xp, size = namespace(like), piece.piece.size
    if is_numpy(like):
        result = empty((size,), np.bool)
    else:
        result = xp.empty(size, dtype=xp.bool, device=like.device)
    start = 0
    for place, keys in _chunks(piece):
        keep = keys >= key
        if last >= 0:
            equal = keys == key
            keep[equal] = piece.box.index(place[equal]) > last
        result[start : start + len(keys)] = keep
        start += len(keys)
    return xp.reshape(result, piece.piece.shape)


def _chunks(piece: ShardPiece) -> Iterator[tuple[Any, Any]]:
    """Yields a chunk at a time of the shard: flat positions in it, and keys."""
    arrays = piece.piece.arrays
    xp = namespace(arrays[0])
    flats = [xp.reshape(a, (-1,)) for a in arrays]
    for start in range(0, piece.piece.size, CHUNK):
        stop = min(start + CHUNK, piece.piece.size)
        kind = {} if is_numpy(arrays[0]) else {"device": arrays[0].device}
        place = xp.arange(start, stop, dtype=xp.int64, **kind)
        index = xp.astype(piece.box.index(place), xp.int32) if piece.piece.indexed else None
        scores = piece.piece.scores(tuple(flat[start:stop] for flat in flats), index)
        keys = ordered(scores) if is_numpy(scores) else None
        yield place, ordered_bits(xp, scores) if keys is None else keys
