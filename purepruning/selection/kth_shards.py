"""Exact selection where weights lie over processes: each counts its shard, and counts are added.

A sample, of which every process sends what it holds, brackets the key that is looked for. One pass
over the shards counts the keys below the bracket and takes those inside. Among them the key is
found digit by digit: two or three passes count how often each digit occurs in the keys that have
the digits before it. Where the key is not in the bracket, they go over all keys. What is sent is
16 KiB of samples for all pieces that are ranked together, and counts, 8 KiB for each piece and
digit. Ties go by the position in the whole weight, whose digits are counted in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from purepruning.arrays import counted, empty, is_numpy, namespace
from purepruning.selection.keys import HIGHEST, LOWEST, Piece, ordered_bits
from purepruning.selection.kth_host import CHUNK, HostThreshold, Kth, cuts, ordered
from purepruning.shards import Box, reduced

BITS = 11  # of a digit
SAMPLE = 4096  # at most so many elements bracket a key
SMALL = 32_768  # of up to so many elements, all are inside of the bracket


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
    found, nan = _kths(pieces, each, [max(k, 1) for k in counts])
    result = HostThreshold([], [])
    for k, kth in zip(counts, found, strict=True):
        (tie,) = kth.dealt(k) if k else (0,)
        key = kth.key if tie < kth.ties[0] else kth.key + 1
        result.key.append(key if k else LOWEST)
        result.ties.append(tie if k and tie < kth.ties[0] else 0)
    return _kept(pieces, result), nan


def global_masks(
    pieces: Sequence[ShardPiece], budget: int, caps: Sequence[int]
) -> tuple[list[Any], list[bool]]:
    """Returns masks of shards that prune the ``budget`` lowest of all pieces, and where NaN is.

    Only the ``caps[i]`` lowest elements of piece i take part. Ties go to the earlier piece first,
    then to the lower position in the whole weight.
    """
    nan = [False] * len(pieces)

    def kth(which: list[int], k: int) -> Kth:
        some = [pieces[i] for i in which]
        found, bad = _kths(some, [list(range(len(which)))], [k])
        for i, flag in zip(which, bad, strict=True):
            nan[i] |= flag
        return found[0]

    if not budget:
        kth(list(range(len(pieces))), 1)
    cut = cuts(budget, caps, kth)
    assert cut is not None
    return _kept(pieces, cut), nan


def _kths(
    pieces: Sequence[ShardPiece], groups: Sequence[Sequence[int]], ks: Sequence[int]
) -> tuple[list[Kth], list[bool]]:
    """Returns the k-th lowest key of each group of pieces, and which pieces have a NaN.

    Args:
        pieces: what is ranked.
        groups: which pieces are ranked together; each is in one group.
        ks: for each group, at least 1.
    """
    brackets = _brackets(pieces, groups, ks)
    near = [_look(piece, *bracket) for piece, bracket in zip(pieces, brackets, strict=True)]
    counts = reduced([piece.box for piece in pieces], [x.counts for x in near])
    found: dict[int, Kth] = {}
    open_groups, ranks, ends = [], [], []
    values: dict[int, Values] = {}
    passed: dict[int, int] = {}
    for g, (some, k) in enumerate(zip(groups, ks, strict=True)):
        below, equal, inside, _ = (int(n) for n in np.sum([counts[i] for i in some], axis=0))
        if below < k <= below + equal:
            each = [[int(counts[i][n]) for i in some] for n in (0, 1)]
            found[g] = Kth(brackets[some[0]][0], *each)
            continue
        is_inside = below + equal < k <= below + equal + inside
        open_groups.append(g)
        ranks.append(k - below - equal if is_inside else k)
        ends.append(brackets[some[0]] if is_inside else (LOWEST, HIGHEST))
        for i in some:
            values[i] = _of(near[i].inside) if is_inside else _keys(pieces[i])
            passed[i] = int(counts[i][0] + counts[i][1]) if is_inside else 0
    at = {i: n for n, i in enumerate(values)}
    within = [[at[i] for i in groups[g]] for g in open_groups]
    rest = _ranked([pieces[i] for i in values], [*values.values()], within, ranks, ends)
    for g, kth in zip(open_groups, rest, strict=True):
        below_of = [passed[i] + n for i, n in zip(groups[g], kth.below, strict=True)]
        found[g] = Kth(kth.key, below_of, kth.ties)
    return [found[g] for g in range(len(groups))], [bool(n[3]) for n in counts]


def _brackets(
    pieces: Sequence[ShardPiece], groups: Sequence[Sequence[int]], ks: Sequence[int]
) -> list[tuple[int, int]]:
    """Returns between which keys that of its group is likely to lie, by piece.

    The same in every process, and however pieces are divided.
    """
    sizes = [math.prod(piece.box.shape) for piece in pieces]
    taken: dict[int, np.ndarray] = {}
    for some in groups:
        size = sum(sizes[i] for i in some)
        for i in some if size > SMALL else ():
            if n := SAMPLE * sizes[i] // size:
                taken[i] = _sample(pieces[i], n)
    sent = reduced([pieces[i].box for i in taken], [*taken.values()])
    samples = dict(zip(taken, sent, strict=True))
    result = [(LOWEST, HIGHEST)] * len(pieces)
    for some, k in zip(groups, ks, strict=True):
        if parts := [samples[i] for i in some if i in samples]:
            sample, share = np.sort(np.concatenate(parts)), k / sum(sizes[i] for i in some)
            m = len(sample)
            spread = 4 * (m * share * (1 - share)) ** 0.5 + 2
            first, last = math.floor(m * share - spread), math.ceil(m * share + spread)
            low = int(sample[first]) if first >= 0 else LOWEST
            high = int(sample[last]) if last < m else HIGHEST
            for i in some:
                result[i] = low, high
    return result


def _sample(piece: ShardPiece, n: int) -> np.ndarray:
    """Returns the keys of n elements spread over the whole; 0 for those of other processes."""
    box, arrays = piece.box, piece.piece.arrays
    place = np.arange(n, dtype=np.int64)
    step = math.prod(box.shape) // n
    place = place * step + (place * 2654435761 >> 8) % step
    at = np.stack(np.unravel_index(place, box.shape)) - np.reshape(box.start, (-1, 1))
    mine = ((at >= 0) & (at < np.reshape(box.sizes, (-1, 1)))).all(0) & box.first
    result = np.zeros(n, np.int32)
    if mine.any():
        xp = namespace(arrays[0])
        flat = np.ravel_multi_index(tuple(at[:, mine]), box.sizes)
        flat = flat if is_numpy(arrays[0]) else xp.asarray(flat, device=arrays[0].device)
        keys = _scored(piece, tuple(xp.reshape(a, (-1,))[flat] for a in arrays), flat)
        result[mine] = keys if is_numpy(keys) else keys.cpu().numpy()
    return result


class _Near(NamedTuple):
    """A shard seen from a bracket.

    Attributes:
        counts: how many keys are below the bracket, equal its lower end and lie inside, and whether
            there is a NaN.
        inside: the keys inside.
    """

    counts: np.ndarray
    inside: list[Any]


def _look(piece: ShardPiece, low: int, high: int) -> _Near:
    """Counts what this process speaks for; others hold the rest."""
    total, found = np.zeros(4, np.int64), []
    for _, keys in _chunks(piece) if piece.box.first else ():
        xp = namespace(keys)
        upto = keys <= low
        equal = int(xp.count_nonzero(keys == low))
        inside = keys[xp.nonzero((keys < high) ^ upto)[0]] if low < high else keys[:0]
        total[:3] += int(xp.count_nonzero(upto)) - equal, equal, len(inside)
        total[3] |= int(xp.max(keys)) == HIGHEST
        found.append(inside)
    return _Near(total, [namespace(found[0]).concat(found)] if found else [])


def _of(arrays: list[Any]) -> Values:
    return lambda: iter(arrays)


def _keys(piece: ShardPiece) -> Values:
    return lambda: (keys for _, keys in _chunks(piece))


def _places(piece: ShardPiece, key: int) -> Values:
    """Returns where in the whole the elements of a shard are whose key is ``key``."""

    def places() -> Iterator[Any]:
        for start, keys in _chunks(piece):
            (equal,) = namespace(keys).nonzero(keys == key)
            yield piece.box.index(equal + start)

    few, n = [], 0
    for some in places():
        few.append(some)
        n += len(some)
        if n > CHUNK:  # found again in every pass rather than kept
            return places
    return _of(few)


def _ranked(
    pieces: Sequence[ShardPiece],
    values: Sequence[Values],
    groups: Sequence[Sequence[int]],
    ks: Sequence[int],
    ends: Sequence[tuple[int, int]],
) -> list[Kth]:
    """Returns the k-th lowest integer of each group of pieces.

    Args:
        pieces: what is ranked.
        values: for each piece, numbers of its shard, a chunk at a time.
        groups: which pieces are ranked together; each is in one group.
        ks: for each group, at least 1.
        ends: for each group, numbers that it lies between; it may have them too.
    """
    digits = [_first_digit(*of) for of in ends]
    below, ties, ranks = [0] * len(pieces), [0] * len(pieces), list(ks)
    open_groups = list(range(len(groups)))
    while open_groups:
        which = [(g, i) for g in open_groups for i in groups[g]]
        counts = [_histogram(pieces[i], values[i], digits[g]) for g, i in which]
        counts = reduced([pieces[i].box for _, i in which], counts)
        known = {
            i: np.asarray(x if is_numpy(x) else x.cpu())
            for (_, i), x in zip(which, counts, strict=True)
        }
        for g in open_groups:
            some = groups[g]
            sums = np.cumsum(np.sum([known[i] for i in some], axis=0, dtype=np.int64))
            n = int(np.searchsorted(sums, ranks[g]))
            ranks[g] -= int(sums[n - 1]) if n else 0
            for i in some:
                below[i] += int(known[i][:n].sum(dtype=np.int64))
                ties[i] = int(known[i][n])
            digits[g] = digits[g].after(n)
        open_groups = [g for g in open_groups if digits[g].shift >= 0]
    return [
        Kth(digit.first, [below[i] for i in some], [ties[i] for i in some])
        for digit, some in zip(digits, groups, strict=True)
    ]


class _Digit(NamedTuple):
    """What is counted of a number in a pass, ``(x >> shift) - first``, below ``2**BITS``.

    Attributes:
        shift: number of the lower bits; negative where all is known.
        first: the number, without the lower bits, whose digit is 0.
        prefix: what is known of the number, and how many bits come after it; None at first.
    """

    shift: int
    first: int
    prefix: tuple[int, int] | None

    def after(self, digit: int) -> _Digit:
        """Returns the next digit of numbers whose digit is ``digit``."""
        known, shift = self.first + digit, max(self.shift - BITS, 0)
        if not self.shift:
            return _Digit(-1, known, None)
        return _Digit(shift, known << (self.shift - shift), (known, self.shift))


def _first_digit(low: int, high: int) -> _Digit:
    """Returns the highest digit of integers from ``low`` to ``high``."""
    shift = next(n for n in range(64) if (high >> n) - (low >> n) < 2**BITS)
    return _Digit(shift, low >> shift, None)


def _histogram(piece: ShardPiece, values: Values, digit: _Digit) -> Any:
    """Returns how often each digit occurs in a shard, of numbers with the digits before it."""
    like = piece.piece.arrays[0]
    xp = namespace(like)
    n = 2**BITS
    result = xp.zeros(n, dtype=xp.int32, **({} if is_numpy(like) else {"device": like.device}))
    for x in values() if piece.box.first else ():
        if digit.prefix is not None:
            known, shift = digit.prefix
            x = x[xp.nonzero((x >> shift) == known)[0]]
        result += counted(xp, (x >> digit.shift) - digit.first, n)
    return result


def _kept(pieces: Sequence[ShardPiece], cut: HostThreshold) -> list[Any]:
    """Returns which elements of the shards the cut keeps."""
    tied = [i for i, ties in enumerate(cut.ties) if ties]
    last = dict.fromkeys(range(len(pieces)), -1)
    if tied:
        some = [pieces[i] for i in tied]
        values = [_places(pieces[i], cut.key[i]) for i in tied]
        each = [[j] for j in range(len(tied))]
        ends = [(0, math.prod(piece.box.shape) - 1) for piece in some]
        found = _ranked(some, values, each, [cut.ties[i] for i in tied], ends)
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
    for start, keys in _chunks(piece):
        keep = keys >= key
        if last >= 0:
            (equal,) = xp.nonzero(keys == key)
            keep[equal] = piece.box.index(equal + start) > last
        result[start : start + len(keys)] = keep
    return xp.reshape(result, piece.piece.shape)


def _chunks(piece: ShardPiece) -> Iterator[tuple[int, Any]]:
    """Yields a chunk at a time of the shard: its first flat position there, and its keys."""
    arrays = piece.piece.arrays
    xp = namespace(arrays[0])
    flats = [xp.reshape(a, (-1,)) for a in arrays]
    kind = {} if is_numpy(arrays[0]) else {"device": arrays[0].device}
    for start in range(0, piece.piece.size, CHUNK):
        stop = min(start + CHUNK, piece.piece.size)
        flat = xp.arange(start, stop, dtype=xp.int64, **kind) if piece.piece.indexed else None
        yield start, _scored(piece, tuple(x[start:stop] for x in flats), flat)


def _scored(piece: ShardPiece, parts: tuple[Any, ...], flat: Any) -> Any:
    """Returns the keys of elements at flat positions in the shard, from these parts of arrays."""
    xp = namespace(parts[0])
    index = xp.astype(piece.box.index(flat), xp.int32) if piece.piece.indexed else None
    scores = piece.piece.scores(parts, index)
    keys = ordered(scores) if is_numpy(scores) else None
    return ordered_bits(xp, scores) if keys is None else keys
