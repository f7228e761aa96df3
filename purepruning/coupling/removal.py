"""What a removal of units leaves of the values of a program."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from purepruning.coupling.atoms import Axis
from purepruning.coupling.flow import Flow
from purepruning.coupling.shapes import blocks
from purepruning.coupling.value import Value

#: What to do about a statistic that cannot be corrected.
WITHOUT = 'shrink with norms="kept", which needs no such value, or leave the layer before it out'


@dataclasses.dataclass
class Removal:
    """What goes, and what a mean means.

    Attributes:
        flow: the atoms of the program.
        removed: boolean by atom.
        norms: ``"original"`` keeps divisors and corrects statistics, ``"kept"`` averages over what
            is kept.
        later: numbers of programs that are walked through only when they run.
    """

    flow: Flow
    removed: np.ndarray
    norms: str
    later: list[int] = dataclasses.field(default_factory=lambda: [1 << 40])
    _kept: dict[int, tuple[Any, np.ndarray | None]] = dataclasses.field(default_factory=dict)

    def kept(self, axis: Axis) -> np.ndarray | None:
        """Returns the positions of an axis that stay; None for all."""
        if axis is None:
            return None
        if id(axis) not in self._kept:
            x = self.flow.atoms.resolve(axis)
            keep = None if x is None else ~self._is_removed(x).any(-1)
            found = None if keep is None or keep.all() else np.flatnonzero(keep)
            self._kept[id(axis)] = (axis, found)  # the axis, so that its id stays taken
        return self._kept[id(axis)][1]

    def _is_removed(self, x: np.ndarray) -> np.ndarray:
        # Atoms made since are of derivatives: what is removed of them is one with an older atom.
        old = x < len(self.removed)
        return self.removed[np.where(old, x, 0)] & old

    def touched(self, value: Value) -> bool:
        """Whether the value loses anything."""
        return any(self.kept(a) is not None for a in value.axes)

    def shape(self, value: Value) -> tuple[Any, ...]:
        """Returns the shape of what is left of a value."""
        return self.sizes(value.shape, value.axes)

    def sizes(self, shape: Sequence[Any], axes: Sequence[Axis]) -> tuple[Any, ...]:
        """Returns how many positions of each axis are left."""
        kept = [self.kept(axis) for axis in axes]
        return tuple(n if k is None else len(k) for n, k in zip(shape, kept, strict=True))


def axis_before(old: Sequence[Any], new: Sequence[Any], axis: int) -> int:
    """Returns which axis of what is reshaped an axis of the result is.

    Raises:
        NotImplementedError: it is none of them, since the reshape made it of several.
    """
    for left, right in blocks(old, new):
        if right == [axis] and len(left) == 1:
            return left[0]
    raise NotImplementedError(
        f"no value at removed positions of an axis that a reshape made; {WITHOUT}"
    )
