"""How atoms flow through operations: one method for every kind of operation, for any front end.

A front end (jaxprs here, exported graphs in the torch adapter) walks its program and calls these
methods with the :class:`Value` of every operand; what it gets back describes the result. No array
of the program is ever computed.

Besides atoms a value knows what its elements are at removed positions when the parameters are
masked instead of removed: zero, some other known number, the same at all of them (``UNIFORM``), or
anything (``UNKNOWN``). A sum over removed positions is left alone where they are zero, corrected by
the shrunk program where they are known or uniform, and keeps its axis whole where they are unknown.
That is what makes the masked and the shrunk model one function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from purepruning.coupling import removed_values
from purepruning.coupling.atoms import Atoms, Axis
from purepruning.coupling.removed_values import UNKNOWN
from purepruning.coupling.value import (
    AtRemoved,
    Contraction,
    Summed,
    Value,
    at_removed_of,
    is_long,
    is_one,
    is_shifted,
    whole,
)


class Flow:
    """The atoms of one program, and what every kind of operation does to them."""

    def __init__(self) -> None:
        self.atoms = Atoms()
        self.contractions: dict[Any, Contraction] = {}
        self.sinks: set[tuple[str, int]] = set()
        self.sources: set[tuple[str, int]] = set()
        self.taps: set[tuple[str, int]] = set()
        self.stacks: set[tuple[str, int]] = set()
        self.nonzero: set[tuple[str, int]] = set()
        self.tables: set[str] = set()
        self.depthwise: set[str] = set()
        self.heads: list[np.ndarray] = []
        self.head_positions: list[np.ndarray] = []
        self.unknown: dict[str, int] = {}
        self.equal_parts: list[np.ndarray] = []
        self.by_block: dict[tuple[str, int], tuple[int, np.ndarray]] = {}
        self.statistics: dict[Any, tuple[Axis, ...]] = {}
        self.means: dict[Any, Summed] = {}

    # Where values come from.

    def leaf(
        self, path: str, shape: Sequence[int], prunable: bool, *, table: bool = False
    ) -> Value:
        """Returns a parameter: one atom for every position of every axis longer than 1.

        A ``table``, of integers or booleans, is cut along with what it is used for, never masked.
        """
        if table:
            self.tables.add(path)
        axes = []
        for n in shape:
            axis = self.atoms.fresh(n) if n > 1 else None
            if not prunable:
                self.atoms.keep(axis, "a parameter that is not floating")
            axes.append(axis)
        origins = tuple(frozenset([(path, a)]) for a in range(len(shape)))
        return Value(
            tuple(shape),
            tuple(axes),
            (UNKNOWN if table else 0.0,) * len(axes),
            None,
            origins,
            (path, tuple(range(len(shape)))),
        )

    def constant(self, shape: Sequence[Any], known: Any = None) -> Value:
        """Returns an array that does not depend on inputs: cut wherever it must be."""
        axes = tuple(self.atoms.fresh(n) if is_long(n) else None for n in shape)
        at_removed: tuple[AtRemoved, ...] = (UNKNOWN,) * len(shape)
        if known is not None and np.size(known):
            first = np.asarray(known).reshape(-1)[0]
            if np.ndim(known) == 0 or (np.asarray(known) == first).all():
                at_removed = (float(np.real(first)) if np.isreal(first) else UNKNOWN,) * len(shape)
        return Value(
            tuple(shape), axes, at_removed, known, origins=tuple(frozenset() for _ in shape)
        )

    def keep(self, value: Value, reason: str, axes: Iterable[int] | None = None) -> None:
        """Keeps the given axes of a value whole, or all of them."""
        for a in range(value.ndim) if axes is None else axes:
            if value.axes[a] is not None:
                self.atoms.keep(value.axes[a], reason)

    def opaque(self, name: str, operands: Sequence[Value], shapes: Sequence[Any]) -> list[Value]:
        """Returns the results of an unknown operation: none of its operands can be pruned."""
        if any(axis is not None for value in operands for axis in value.axes):
            self.unknown[name] = self.unknown.get(name, 0) + 1
        for value in operands:
            self.keep(value, f"operand of {name}, for which there is no rule")
        return [whole(shape) for shape in shapes]

    # Element by element.

    def elementwise(
        self,
        name: str,
        operands: Sequence[Value],
        shape: Sequence[Any],
        where: Any = None,
        function: Callable[..., float] | None = None,
    ) -> Value:
        """Returns the result of a function applied element by element.

        Operands broadcast from the right; axes of size 1 and scalars take no part. ``function`` is
        what computes a number from numbers, where ``name`` has none in
        :mod:`purepruning.coupling.removed_values`.
        """
        n = len(shape)
        axes: list[Axis] = [None] * n
        taken = [False] * n
        for value in operands:
            for a in range(value.ndim):
                d = a + n - value.ndim
                if is_one(value.shape[a]) and not is_one(shape[d]):
                    self.keep(value, "a size of 1", [a])
                    continue
                axis = value.axes[a]
                if not taken[d]:
                    axes[d], taken[d] = axis, True
                elif axes[d] is not axis:
                    self.atoms.same(axes[d], axis)
                    if axis is None:
                        axes[d] = None
        at_removed: list[AtRemoved] = []
        for d in range(n):
            if axes[d] is None:
                at_removed.append(UNKNOWN)
                continue
            parts = [at_removed_of(v, d + v.ndim - n, shape[d]) for v in operands]
            broken = removed_values.breaks(name, parts, function)
            if broken.any():  # not a number, nor zero after it is multiplied by zero
                x = self.atoms.resolve(axes[d])
                if x is not None:
                    self.atoms.keep(
                        x[np.broadcast_to(broken, len(x))], "no number where it is masked"
                    )
            at_removed.append(removed_values.evaluate(name, parts, function))
        origins = self.joint_origins(operands, n)
        return Value(tuple(shape), tuple(axes), tuple(at_removed), None, origins)

    def joint_origins(
        self, operands: Sequence[Value], n: int
    ) -> tuple[frozenset[tuple[str, int]], ...] | None:
        """Returns the origins of the axes of a result, from those of what it is made of."""
        if any(v.origins is None for v in operands) or is_shifted(operands):
            return None
        found: list[frozenset[tuple[str, int]]] = [frozenset()] * n
        for v in operands:
            for a, origin in enumerate(v.origins or ()):
                found[a + n - v.ndim] |= origin
        return tuple(found)

    def unify(self, values: Sequence[Value], reason: str = "two axes coincide") -> Value:
        """Returns one value for what may be any of several of one shape (branches, carries)."""
        first = values[0]
        axes = list(first.axes)
        for other in values[1:]:
            for a in range(first.ndim):
                self.atoms.same(axes[a], other.axes[a], reason)
                if other.axes[a] is None:
                    axes[a] = None
        at_removed = tuple(
            removed_values.meet([at_removed_of(v, a, first.shape[a]) for v in values])
            for a in range(first.ndim)
        )
        return Value(first.shape, tuple(axes), at_removed)
