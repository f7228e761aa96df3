"""What is known of one array of a program: its atoms, and what it holds at removed positions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from purepruning.coupling.atoms import KEPT, Axis, all_differ
from purepruning.coupling.removed_values import UNIFORM, UNKNOWN

AtRemoved = float | np.ndarray


#: Whether a parameter's axis is produced by its layer, contracted with the layer's input, or
#: neither (a scale, a bias, a table); the taps of a kernel, and the layers that a loop runs over.
SOURCE, SINK, COMPANION, TAP, STACK = "source", "sink", "companion", "tap", "stack"


@dataclasses.dataclass(frozen=True)
class Value:
    """What is known of one array of the program.

    Attributes:
        shape: its shape; an axis that cannot be pruned may have a symbolic size.
        axes: for every axis its atoms, or None if it cannot be pruned.
        at_removed: for every axis the value at removed positions: one number, or one for each.
        known: the array itself, where it depends on constants only and is small.
        origins: for every axis the axes of parameters it comes from, ``(path, axis)``; None if the
            array depends on an input.
        leaf: ``(path, permutation)`` if it is a parameter, its axes at most reordered.
        summed: for a sum over axes that may shrink: what it ran over, see :class:`Summed`.
        sign: 1 where no number is below zero, -1 where none is above, 0 where that is not known.
    """

    shape: tuple[Any, ...]
    axes: tuple[Axis, ...]
    at_removed: tuple[AtRemoved, ...] = ()
    known: Any = None
    origins: tuple[frozenset[tuple[str, int]], ...] | None = None
    leaf: tuple[str, tuple[int, ...]] | None = None
    summed: Summed | None = None
    sign: int = 0

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)


@dataclasses.dataclass(frozen=True)
class Summed:
    """What a sum ran over: the sizes, and the axes among them that may shrink."""

    size: int
    axes: tuple[Axis, ...]
    lengths: tuple[int, ...]


def whole(shape: Sequence[Any], known: Any = None) -> Value:
    """Returns a value of which nothing is ever removed."""
    n = len(shape)
    return Value(tuple(shape), (None,) * n, (UNKNOWN,) * n, known)


@dataclasses.dataclass
class Contraction:
    """A product of two arrays, for counting: its cost is the product of its axes' sizes.

    Attributes:
        sizes: sizes of all axes that are multiplied out, each once.
        axes: the atoms of those axes.
        weights: the parameters on either side.
    """

    sizes: tuple[Any, ...]
    axes: tuple[Axis, ...]
    weights: tuple[str, ...]


def is_one(n: Any) -> bool:
    """Whether a size is 1."""
    return isinstance(n, int) and n == 1


def is_long(n: Any) -> bool:
    """Whether a size is known and more than 1."""
    return isinstance(n, int) and n > 1


def as_line(at_removed: AtRemoved) -> np.ndarray:
    """Returns the values at removed positions as a vector."""
    return np.atleast_1d(np.asarray(at_removed, float))


def is_zero(at_removed: AtRemoved) -> bool:
    """Whether all removed positions hold zero."""
    return bool((np.asarray(at_removed) == 0.0).all())


def finite_only(at_removed: AtRemoved) -> AtRemoved:
    """Returns the values with unknown in place of what is no finite number."""
    if np.ndim(at_removed):
        return np.where(np.isfinite(at_removed), at_removed, UNKNOWN)
    return at_removed if math.isfinite(float(at_removed)) else UNKNOWN


def without_uniform(value: Value) -> Value:
    """Returns the value knowing only numbers: what is computed elsewhere is not known here."""
    return dataclasses.replace(
        value, at_removed=tuple(finite_only(d) for d in value.at_removed), summed=None
    )


def numbers_as_uniform(value: Value) -> Value:
    """Returns the value after an operation of integers, or one that rounds: the program does it."""
    found: list[AtRemoved] = []
    for d in value.at_removed:
        number = np.isfinite(d) & (np.asarray(d) != 0.0)
        found.append(np.where(number, UNIFORM, d) if np.ndim(d) else UNIFORM if number else d)
    return dataclasses.replace(value, at_removed=tuple(found))


def through_product(at_removed: AtRemoved) -> AtRemoved:
    """Zero stays zero in a product with what is kept; what can be computed still can."""
    if is_zero(at_removed):
        return 0.0
    return UNKNOWN if np.isnan(at_removed).any() else UNIFORM


def zero_or_unknown(at_removed: AtRemoved) -> AtRemoved:
    """Returns zeros, and unknown in place of all else."""
    return (
        np.where(np.asarray(at_removed) == 0.0, 0.0, UNKNOWN)
        if np.ndim(at_removed)
        else (0.0 if at_removed == 0.0 else UNKNOWN)
    )


def equal(a: Any, b: Any) -> bool:
    """Whether two numbers are equal, or both NaN."""
    return bool(a == b) or (a != a and b != b)


def near(a: float, b: float) -> bool:
    """Whether two numbers agree to rounding."""
    return abs(a - b) <= 1e-6 * abs(b)


def is_free(axis: np.ndarray) -> bool:
    """Whether no position is coupled to another one of the axis."""
    atoms = axis[axis != KEPT]
    return axis.shape[1] == 1 and all_differ(atoms)


def uniform_of(value: Value) -> float | None:
    """Returns the number that fills the value, where it is known."""
    if value.known is not None and np.size(value.known):
        flat = np.asarray(value.known).reshape(-1)
        if flat.dtype.kind in "fiub" or flat.dtype.kind == "V":
            try:
                first = float(flat[0])
            except (TypeError, ValueError):
                return None
            if (flat == flat[0]).all() and math.isfinite(first):
                return first
    return None


def at_removed_of(value: Value, axis: int, n: Any) -> AtRemoved:
    """Returns what a value holds at removed positions of an axis it is broadcast along."""
    if axis >= 0 and (not is_one(value.shape[axis]) or is_one(n)) and value.axes[axis] is not None:
        return value.at_removed[axis]
    uniform = uniform_of(value)
    return UNIFORM if uniform is None else uniform


def weights_of(*values: Value) -> tuple[str, ...]:
    """Returns the parameters that some values are made of."""
    paths = {p for v in values if v.origins is not None for o in v.origins for p, _ in o - MADE}
    return tuple(sorted(paths))


#: The origin of axes of a product of parameters: they belong to none of them.
MADE: frozenset[tuple[str, int]] = frozenset([("", 0)])


def made_of_parameters(left: Value, right: Value, n: int) -> Any:
    """Returns the origins of a product of parameters; None where one is an activation."""
    return None if left.origins is None or right.origins is None else (MADE,) * n


def is_shifted(values: Sequence[Value]) -> bool:
    """Whether a bias or a scale meets a product of parameters: the product is an activation.

    So are the queries that a layer makes of learned tokens. What is added to a weight, as two
    small factors are, has the weight's axes instead.
    """
    if not any(v.origins and all(o >= MADE for o in v.origins) for v in values):
        return False
    others = [[o - MADE for o in v.origins] for v in values if v.origins is not None]
    return any(any(o) and not all(o) for o in others)
