"""What is zero in a tensor: its density, N:M groups, whole channels."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from purepruning.layers import Layer

_GROUPS = (2, 4, 8, 16)


class Pattern(NamedTuple):
    """Where the zeros of a weight are.

    Attributes:
        nonzero: how many elements are not zero.
        size: how many there are.
        nm: ``(n, m)`` where no ``m`` in a row along the inputs have more than ``n`` that are not
            zero: the smallest such ratio, and of it the smallest ``m``; None where there is none.
        empty_outputs: how many output channels are zero as a whole.
    """

    nonzero: int
    size: int
    nm: tuple[int, int] | None
    empty_outputs: int

    @property
    def density(self) -> float:
        """Fraction that is not zero."""
        return self.nonzero / self.size if self.size else 1.0


def pattern_of(weight: np.ndarray, layer: Layer | None = None) -> Pattern:
    """Returns where the zeros of a weight are; without a layer, how many there are.

    >>> layer = Layer("fc", "Linear", "fc.weight", (1, 8), (0,), (1,))
    >>> pattern_of(np.array([[0, 1, 2, 0, 0, 0, 3, 4.0]]), layer).nm
    (2, 4)
    """
    kept = _not_zero(weight)
    nonzero = int(np.count_nonzero(kept))
    if layer is None or nonzero == kept.size or not kept.ndim:
        return Pattern(nonzero, kept.size, None, 0)
    empty = 0
    if layer.out_axes:
        others = tuple(a for a in range(kept.ndim) if a not in (*layer.out_axes, *layer.stack_axes))
        empty = int(np.count_nonzero(~kept.any(axis=others)))
    return Pattern(nonzero, kept.size, _nm(kept, layer), empty)


def _not_zero(x: np.ndarray) -> np.ndarray:
    if x.dtype.itemsize <= 2 and x.dtype.kind not in "iub":  # floats that NumPy is slow with
        bits: Any = x.view(np.uint16 if x.dtype.itemsize == 2 else np.uint8)
        sign = 1 << (8 * x.dtype.itemsize - 1)
        found: np.ndarray = (bits & (sign - 1)) != 0
        return found
    return np.asarray(x != 0)


def _nm(kept: np.ndarray, layer: Layer) -> tuple[int, int] | None:
    if not layer.in_axes or not kept.any():
        return None
    rest = [a for a in range(kept.ndim) if a not in layer.in_axes]
    length = math.prod(kept.shape[a] for a in layer.in_axes)
    rows = np.transpose(kept, (*rest, *layer.in_axes)).reshape(-1, length)
    best = None
    for m in _GROUPS:
        if length % m:
            continue
        in_groups: Any = sum(rows[:, i::m].view(np.uint8) for i in range(m))
        most = int(in_groups.max())
        if most < m and (best is None or most / m < best[0] / best[1]):
            best = (most, m)
    return best
