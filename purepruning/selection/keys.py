"""What exact selection works on: elements with a score, and the cut that divides them.

Scores are never sorted as floats. :func:`ordered_bits` turns them into integers of the same order,
the same in every framework; a :class:`Cut` names the last integer to prune and, among equal ones,
the last position.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from purepruning.arrays import NUMPY, float_bits, iota

LOWEST = -(2**31)  # below every key


HIGHEST = 2**31 - 1  # the key of NaN


#: The key of infinity. As unsigned numbers, NaN and all that is negative lie beyond it.
INFINITY = 0x7F800000


class Piece(NamedTuple):
    """Elements that are ranked, and how.

    Attributes:
        arrays: what the scores are made of, arrays of one shape.
        score: ``(arrays, flat indices, layer_stats) -> float32``, element by element; called on
            parts of them. A function of a module, not made anew for every piece: pieces that
            share it are compiled together.
        layer_stats: what else goes into the scores of this piece, a tree of scalars.
        offset: the first element's index, as ``score`` is told it.
        indexed: whether the score depends on the index; where not, it may be None.
        stack_axes: axes of the arrays that count stacked layers, each of which is ranked for
            itself: only :mod:`purepruning.selection.kth_jax_counters` knows such pieces, where it
            counts every piece in its shape. Elsewhere each stacked layer is a piece.
    """

    arrays: tuple[Any, ...]
    score: Callable[[tuple[Any, ...], Any, Any], Any]
    layer_stats: Any = ()
    offset: Any = 0
    indexed: bool = True
    stack_axes: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of every array."""
        return tuple(self.arrays[0].shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def keys(self, xp: Any) -> tuple[Any, Any]:
        """Returns the ordered bits of all scores, and the flat indices, in the arrays' shape."""
        index = flat_index(xp, self.arrays[0])
        return ordered_bits(xp, self.scores(self.arrays, index)), index

    def scores(self, arrays: tuple[Any, ...], index: Any) -> Any:
        """Returns the scores of the elements at ``index``, from these parts of the arrays."""
        return self.score(arrays, None if index is None else index + self.offset, self.layer_stats)


class Threshold(NamedTuple):
    """What to prune of each piece: keys below ``key``, equal ones up to flat index ``index``."""

    key: Any
    index: Any

    def keeps(self, i: Any, bits: Any, index: Any) -> Any:
        """Returns which elements of piece i stay, from their keys and flat indices."""
        above = bits > self.key[i]
        if isinstance(self.index[i], int) and self.index[i] == HIGHEST:
            return above
        return above | ((bits == self.key[i]) & (index > self.index[i]))


def ordered_bits(xp: Any, score: Any) -> Any:
    """Returns int32 in the order of float32 ``score``: both zeros are 0, all NaNs the highest."""
    bits = float_bits(xp, score)
    if xp is NUMPY and bits.view(np.uint32).max(initial=0) <= INFINITY:
        return bits
    return xp.where(score != score, HIGHEST, xp.where(bits < 0, LOWEST - bits, bits))


def flat_index(xp: Any, like: Any, axes: tuple[int, ...] | None = None) -> Any:
    """Returns the position of every element in C order, int32, in the shape of ``like``.

    Of ``axes`` alone, in their order, where they are given. Beyond ``2**31 - 1``, in stacks of
    large layers, positions go on from ``-2**31``.
    """
    shape = tuple(like.shape)
    axes = tuple(range(len(shape))) if axes is None else axes
    index = xp.zeros_like(like, dtype=xp.int32)
    for i, axis in enumerate(axes):
        along = [1] * len(shape)
        along[axis] = shape[axis]
        place = xp.reshape(iota(xp, shape[axis], like), tuple(along))
        index = index + place * wrapped(math.prod(shape[a] for a in axes[i + 1 :]))
    return index


def wrapped(n: int) -> int:
    """Returns the int32 that ``n`` overflows to: where positions go on, those of noise do too."""
    return (n + 2**31) % 2**32 - 2**31
