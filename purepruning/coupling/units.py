"""The units of a coupling as data: families, the axes they lie in, and what cannot be pruned."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from purepruning.coupling.atoms import Axis


@dataclasses.dataclass(frozen=True)
class Coupled:
    """One parameter: which units every position of every axis depends on.

    Attributes:
        shape: its shape.
        units: for every axis an int array ``(n, k)``, the units of each position filled up with 0;
            or ``(blocks, n, k)`` where positions differ from block to block of another axis; or
            None where the axis cannot be pruned.
        by: for every axis the axis whose blocks its positions differ by, or None.
        roles: for every axis ``"source"`` (its layer makes these channels), ``"sink"`` (it reads
            them) or ``"companion"`` (a scale, a bias, a statistic, a table); where nothing can go,
            also ``"tap"`` (of a kernel) and ``"stack"`` (the layers that a loop runs over).
        nonzero: for every axis whether it reads channels that are not zero once what makes, scales
            and shifts them is masked, as behind a sigmoid.
        table: whether it holds integers or booleans, which are cut and never masked.
        depthwise: whether it is a kernel that reads and makes the same channels, each by itself.
    """

    shape: tuple[int, ...]
    units: tuple[Axis, ...]
    by: tuple[int | None, ...]
    roles: tuple[str, ...]
    nonzero: tuple[bool, ...]
    table: bool = False
    depthwise: bool = False

    def kept(self, axis: int, removed: np.ndarray) -> np.ndarray | None:
        """Returns which positions of an axis stay, ``(n,)`` or ``(blocks, n)``; None for all."""
        units = self.units[axis]
        if units is None:
            return None
        keep: np.ndarray = np.logical_not(removed[units].any(-1))
        return None if keep.all() else keep


@dataclasses.dataclass(frozen=True)
class FamilyAxis:
    """Where a family lies in one parameter: the axis, its role, and positions of each unit."""

    path: str
    axis: int
    role: str
    positions: int


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """Units of one kind: they lie in the same axes of the same parameters.

    Attributes:
        name: the first parameter that makes these channels, and its axis.
        kind: ``"channel"``; of an axis in two factors ``"block"`` (a group of channels that goes
            whole) or ``"position"`` (the same position of every block); ``"head"`` and
            ``"head_position"`` where those are the heads of an attention and the positions within;
            ``"expert"`` where they are the experts of a mixture, stacked in one array.
        units: int array of the units' numbers.
        axes: the axes they lie in.
    """

    name: str
    kind: str
    units: np.ndarray
    axes: tuple[FamilyAxis, ...]

    def __len__(self) -> int:
        return len(self.units)


@dataclasses.dataclass(frozen=True)
class FrozenAxis:
    """Positions of a parameter's axis that stay, and why."""

    path: str
    axis: int
    positions: int
    reason: str


@dataclasses.dataclass(frozen=True, eq=False)
class Product:
    """A contraction or convolution: its multiply-adds are the product of its sizes.

    Attributes:
        weights: the parameters it multiplies by; empty for two activations.
        constant: the product of the sizes that never change.
        units: for every other axis the units of its positions.
    """

    weights: tuple[str, ...]
    constant: Any
    units: tuple[np.ndarray, ...]
