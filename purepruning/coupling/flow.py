"""How atoms flow through operations: one method for every kind of operation, for any front end.

A front end (jaxprs here, exported graphs in the torch adapter) walks its program and calls these
methods with the :class:`Value` of every operand; what it gets back describes the result. No array
of the program is ever computed.

Besides atoms a value knows what its elements are at removed positions when the parameters are
masked instead of removed: zero, some other known number, computed from what is kept (``EVEN``), or
anything (``UNKNOWN``). A sum over removed positions is left alone where they are zero, corrected by
the shrunk program where they are known or even, and keeps its axis whole where they are unknown.
That is what makes the masked and the shrunk model one function.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from purepruning.coupling import scalars
from purepruning.coupling.atoms import KEPT, Atoms, Axis
from purepruning.coupling.scalars import EVEN, UNKNOWN

Dead = float | np.ndarray

#: Whether a parameter's axis is produced by its layer, contracted with the layer's input, or
#: neither (a scale, a bias, a table).
SOURCE, SINK, COMPANION = "source", "sink", "companion"


@dataclasses.dataclass(frozen=True)
class Value:
    """What is known of one array of the program.

    Attributes:
        shape: its shape; an axis that stays whole may have a symbolic size.
        axes: for every axis its atoms, or None if it stays whole.
        dead: for every axis the value at removed positions, one number or one for each position.
        known: the array itself, where it depends on constants only and is small.
        origins: for every axis the axes of parameters it comes from, ``(path, axis)``; None if the
            array depends on an input.
        leaf: ``(path, permutation)`` if it is a parameter, its axes at most reordered.
        summed: for a sum over axes that may shrink: what it ran over, see :class:`Summed`.
    """

    shape: tuple[Any, ...]
    axes: tuple[Axis, ...]
    dead: tuple[Dead, ...] = ()
    known: Any = None
    origins: tuple[frozenset[tuple[str, int]], ...] | None = None
    leaf: tuple[str, tuple[int, ...]] | None = None
    summed: Summed | None = None

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


class Flow:
    """The atoms of one program, and what every kind of operation does to them."""

    def __init__(self) -> None:
        self.atoms = Atoms()
        self.contractions: dict[Any, Contraction] = {}
        self.sinks: set[tuple[str, int]] = set()
        self.sources: set[tuple[str, int]] = set()
        self.heads: list[np.ndarray] = []
        self.head_positions: list[np.ndarray] = []
        self.unknown: dict[str, int] = {}
        self.even: list[np.ndarray] = []
        self.ragged: dict[tuple[str, int], tuple[int, np.ndarray]] = {}
        self.statistics: dict[Any, tuple[Axis, ...]] = {}
        self.means: dict[Any, Summed] = {}

    # Where values come from.

    def leaf(self, path: str, shape: Sequence[int], prunable: bool) -> Value:
        """Returns a parameter: one atom for every position of every axis longer than 1."""
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
            (0.0,) * len(axes),
            None,
            origins,
            (path, tuple(range(len(shape)))),
        )

    def constant(self, shape: Sequence[Any], known: Any = None) -> Value:
        """Returns an array that does not depend on inputs: cut wherever it must be."""
        axes = tuple(self.atoms.fresh(n) if _long(n) else None for n in shape)
        dead: tuple[Dead, ...] = (UNKNOWN,) * len(shape)
        if known is not None and np.size(known):
            first = np.asarray(known).reshape(-1)[0]
            if np.ndim(known) == 0 or (np.asarray(known) == first).all():
                dead = (float(first) if np.isreal(first) else UNKNOWN,) * len(shape)
        return Value(tuple(shape), axes, dead, known, origins=tuple(frozenset() for _ in shape))

    def keep(self, value: Value, reason: str, axes: Iterable[int] | None = None) -> None:
        """Keeps the given axes of a value whole, or all of them."""
        for a in range(value.ndim) if axes is None else axes:
            if value.axes[a] is not None:
                self.atoms.keep(value.axes[a], reason)

    def opaque(self, name: str, operands: Sequence[Value], shapes: Sequence[Any]) -> list[Value]:
        """Returns the results of an operation nothing is known of: all its operands stay whole."""
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
        what computes a number from numbers, where ``name`` stands for none in :mod:`scalars`.
        """
        n = len(shape)
        axes: list[Axis] = [None] * n
        taken = [False] * n
        for value in operands:
            for a in range(value.ndim):
                d = a + n - value.ndim
                if _is_one(value.shape[a]) and not _is_one(shape[d]):
                    self.keep(value, "a size of 1", [a])
                    continue
                axis = value.axes[a]
                if not taken[d]:
                    axes[d], taken[d] = axis, True
                elif axes[d] is not axis:
                    self.atoms.same(axes[d], axis)
                    if axis is None:
                        axes[d] = None
        dead: list[Dead] = []
        for d in range(n):
            if axes[d] is None:
                dead.append(UNKNOWN)
                continue
            parts = [_dead_of(v, d + v.ndim - n, shape[d]) for v in operands]
            broken = scalars.breaks(name, parts, function)
            if broken.any():  # not a number, nor zero after it is multiplied by zero
                x = self.atoms.resolve(axes[d])
                if x is not None:
                    self.atoms.keep(
                        x[np.broadcast_to(broken, len(x))], "no number where it is masked"
                    )
            dead.append(scalars.evaluate(name, parts, function))
        origins = self._joint_origins(operands, n)
        return Value(tuple(shape), tuple(axes), tuple(dead), None, origins)

    def _joint_origins(
        self, operands: Sequence[Value], n: int
    ) -> tuple[frozenset[tuple[str, int]], ...] | None:
        if any(v.origins is None for v in operands):
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
        dead = tuple(
            scalars.meet([_dead_of(v, a, first.shape[a]) for v in values])
            for a in range(first.ndim)
        )
        return Value(first.shape, tuple(axes), dead)

    # Moving axes.

    def transpose(self, value: Value, order: Sequence[int]) -> Value:
        """Returns the value with its axes reordered."""
        leaf = value.leaf and (value.leaf[0], tuple(value.leaf[1][a] for a in order))
        return dataclasses.replace(
            value,
            shape=tuple(value.shape[a] for a in order),
            axes=tuple(value.axes[a] for a in order),
            dead=tuple(value.dead[a] for a in order),
            known=None,
            origins=None if value.origins is None else tuple(value.origins[a] for a in order),
            leaf=leaf,
        )

    def squeeze(self, value: Value, axes: Sequence[int]) -> Value:
        """Returns the value without the given axes of size 1."""
        self.keep(value, "a position that is picked out", axes)
        return self.select_axes(value, [a for a in range(value.ndim) if a not in set(axes)])

    def select_axes(self, value: Value, axes: Sequence[int | None], sizes: Any = None) -> Value:
        """Returns the value with only some of its axes; None stands for a new one of size 1."""
        pick = list(axes)
        return Value(
            tuple(1 if a is None else value.shape[a] for a in pick),
            tuple(None if a is None else value.axes[a] for a in pick),
            tuple(UNKNOWN if a is None else value.dead[a] for a in pick),
            None,
            None
            if value.origins is None
            else tuple(frozenset() if a is None else value.origins[a] for a in pick),
            summed=value.summed,
        )

    def broadcast(self, value: Value, shape: Sequence[Any], dims: Sequence[int]) -> Value:
        """Returns the value with axis i at place ``dims[i]`` of ``shape``; the rest is repeated."""
        place = {d: a for a, d in enumerate(dims)}
        uniform = _uniform(value)
        axes: list[Axis] = []
        dead: list[Dead] = []
        origins: list[frozenset[tuple[str, int]]] = []
        for d, n in enumerate(shape):
            a = place.get(d)
            origin = frozenset() if a is None or value.origins is None else value.origins[a]
            if a is not None and (not _is_one(value.shape[a]) or _is_one(n)):
                axes.append(value.axes[a])
                dead.append(value.dead[a])
            else:
                if a is not None:
                    self.keep(value, "a size of 1", [a])
                axes.append(self.atoms.fresh(n) if _long(n) else None)
                dead.append(EVEN if uniform is None else uniform)
            origins.append(origin)
        return Value(
            tuple(shape),
            tuple(axes),
            tuple(dead),
            None,
            None if value.origins is None else tuple(origins),
            summed=value.summed,
        )

    def reshape(self, value: Value, shape: Sequence[Any]) -> Value:
        """Returns the value in another shape: axes merge into products and split into factors."""
        axes: list[Axis] = [None] * len(shape)
        dead: list[Dead] = [UNKNOWN] * len(shape)
        origins: list[frozenset[tuple[str, int]]] = [frozenset()] * len(shape)
        only_ones = True
        for old, new in blocks(value.shape, shape):
            origin = frozenset().union(*((value.origins or ())[a] for a in old if value.origins))
            for d in new:
                origins[d] = origin
            if len(old) == 1 and len(new) == 1:
                axes[new[0]], dead[new[0]] = value.axes[old[0]], value.dead[old[0]]
                continue
            only_ones = only_ones and not (old and new)
            if not new:
                self.keep(value, "a size of 1", old)
                continue
            if not old or all(value.axes[a] is None for a in old):
                continue
            sizes = [value.shape[a] for a in old]
            if not all(isinstance(n, int) for n in (*sizes, *(shape[d] for d in new))):
                self.keep(value, "a reshape of a size that is not known", old)
                continue
            merged = self.atoms.merge([value.axes[a] for a in old], sizes)
            lines = [value.dead[a] for a in old if value.axes[a] is not None]
            common: Dead = UNKNOWN
            if all((np.asarray(x) == np.asarray(lines[0]).flat[0]).all() for x in lines):
                common = _finite(scalars.meet([float(np.asarray(x).flat[0]) for x in lines]))
            parts = [merged] if len(new) == 1 else self.atoms.split(merged, [shape[d] for d in new])
            for d, part in zip(new, parts, strict=True):
                axes[d], dead[d] = part, common
        return Value(
            tuple(shape),
            tuple(axes),
            tuple(dead),
            None,
            None if value.origins is None else tuple(origins),
            summed=value.summed if only_ones else None,
        )

    def split_axis(self, value: Value, axis: int, sizes: Sequence[int], reason: str) -> list[Axis]:
        """Returns an axis of a value as axes of the given sizes, which it is the product of."""
        return self.atoms.split(value.axes[axis], sizes, reason)

    # Copying positions.

    def take(self, value: Value, axis: int, positions: np.ndarray) -> Value:
        """Returns the value with only the given positions of an axis, in that order."""
        axes, shape = list(value.axes), list(value.shape)
        dead = [_finite(d) for d in value.dead]
        if (along := axes[axis]) is not None:
            axes[axis] = along[positions]
        if np.ndim(dead[axis]):
            dead[axis] = np.asarray(dead[axis])[positions]
        shape[axis] = len(positions)
        return dataclasses.replace(
            value,
            shape=tuple(shape),
            axes=tuple(axes),
            dead=tuple(dead),
            known=None,
            leaf=None,
            summed=None,
        )

    def resized(self, value: Value, axis: int, size: Any) -> Value:
        """Returns the value with another size of an axis that stays whole."""
        shape, axes = list(value.shape), list(value.axes)
        shape[axis], axes[axis] = size, None
        return dataclasses.replace(
            value,
            shape=tuple(shape),
            axes=tuple(axes),
            dead=tuple(_finite(d) for d in value.dead),
            known=None,
            leaf=None,
            summed=None,
        )

    def part(self, value: Value, axis: int, start: int, size: int, step: int = 1) -> Value:
        """Returns a strided part of an axis."""
        if value.axes[axis] is None:
            return self.resized(value, axis, size)
        return self.take(value, axis, start + step * np.arange(size))

    def concatenate(self, values: Sequence[Value], axis: int) -> Value:
        """Returns the values one behind the other along an axis."""
        rest = [a for a in range(values[0].ndim) if a != axis]
        axes: list[Axis] = list(values[0].axes)
        dead: list[Dead] = list(values[0].dead)
        for a in rest:
            for other in values[1:]:
                self.atoms.same(axes[a], other.axes[a])
                if other.axes[a] is None:
                    axes[a] = None
            dead[a] = scalars.meet([_dead_of(v, a, v.shape[a]) for v in values])
        sizes = [v.shape[axis] for v in values]
        if not all(isinstance(n, int | np.integer) for n in sizes):
            for v in values:
                self.keep(v, "behind a size that is not known", [axis])
            axes[axis], dead[axis] = None, UNKNOWN
        elif all(v.axes[axis] is None for v in values):
            axes[axis], dead[axis] = None, UNKNOWN
        else:
            parts = [self.atoms.resolve(v.axes[axis]) for v in values]
            width = max(1 if p is None else p.shape[1] for p in parts)
            axes[axis] = np.concatenate(
                [
                    np.zeros((n, width), np.int64)
                    if p is None
                    else np.pad(p, ((0, 0), (0, width - p.shape[1])))
                    for p, n in zip(parts, sizes, strict=True)
                ]
            )
            lines = [_finite(v.dead[axis]) for v in values]
            if all(np.ndim(x) == 0 and _equal(x, lines[0]) for x in lines):
                dead[axis] = lines[0]
            else:
                dead[axis] = np.concatenate(
                    [np.broadcast_to(_spread(x), (n,)) for x, n in zip(lines, sizes, strict=True)]
                )
        shape = list(values[0].shape)
        shape[axis] = sum(sizes)
        return Value(
            tuple(shape),
            tuple(axes),
            tuple(dead),
            None,
            self._joint_origins(values, len(shape)),
        )

    def write(self, value: Value, update: Value, axis: int, start: int) -> Value:
        """Returns the value with a part of an axis replaced."""
        stop, n = start + update.shape[axis], value.shape[axis]
        parts = [update]
        if start:
            parts.insert(0, self.part(value, axis, 0, start))
        if stop < n:
            parts.append(self.part(value, axis, stop, n - stop))
        return self.concatenate(parts, axis)

    def pad(self, value: Value, axis: int, low: int, high: int, fill: float | None) -> Value:
        """Returns the value with positions added before and behind those of an axis.

        The new positions may go by themselves. Negative numbers take positions away.
        """
        if low < 0 or high < 0:
            start = max(-low, 0)
            value = self.part(value, axis, start, value.shape[axis] - start - max(-high, 0))
        low, high = max(low, 0), max(high, 0)
        parts = [value]
        for n, front in ((low, True), (high, False)):
            if not n:
                continue
            if value.axes[axis] is None:
                parts = [self.resized(parts[0], axis, parts[0].shape[axis] + n)]
                continue
            shape = [*value.shape]
            shape[axis] = n
            edge = Value(
                tuple(shape),
                tuple(
                    self.atoms.fresh(n) if a == axis else value.axes[a] for a in range(value.ndim)
                ),
                tuple(
                    (UNKNOWN if fill is None else float(fill)) if a == axis else value.dead[a]
                    for a in range(value.ndim)
                ),
                None,
                tuple(frozenset() for _ in shape),
            )
            # Along the other axes an edge is as full as the value itself.
            parts = [edge, *parts] if front else [*parts, edge]
        return parts[0] if len(parts) == 1 else self.concatenate(parts, axis)

    # Sums.

    def reduce_sum(self, value: Value, axes: Sequence[int], where: Any) -> Value:
        """Returns the sum over some axes; ``where`` names the operation for the shrunk program.

        Removed positions that hold zero leave it as it is. Where they hold something that can be
        computed, the operation is a statistic, which the shrunk program corrects.
        """
        summed: list[Axis] = []
        corrected = []
        for a in axes:
            x = self.atoms.resolve(value.axes[a])
            if x is None:
                continue
            dead = np.broadcast_to(_spread(value.dead[a]), (len(x),))
            lost = np.isnan(dead)
            if lost.any():
                self.atoms.keep(x[lost], "summed, and not zero where it is masked")
                x = self.atoms.resolve(value.axes[a])
                if x is None:
                    continue
            if (dead[~lost] != 0.0).any():
                corrected.append(a)
            summed.append(x)
        if corrected:
            self.statistics[where] = tuple(value.axes[a] for a in corrected)
        rest = [a for a in range(value.ndim) if a not in set(axes)]
        found = self.select_axes(value, rest)
        dead_left = tuple(d if _is_zero(d) else UNKNOWN for d in found.dead)
        lengths = tuple(value.shape[a] for a in axes)
        mark = None
        if summed and all(isinstance(n, int) for n in lengths):
            mark = Summed(math.prod(lengths), tuple(value.axes[a] for a in axes), lengths)
        return dataclasses.replace(found, dead=dead_left, summed=mark)

    def scaled_sum(self, value: Value, factor: float, where: Any) -> Summed | None:
        """Notes that a sum is divided by the number of its terms; returns what it ran over."""
        s = value.summed
        if s is None or not (_near(factor, s.size) or _near(factor, s.size - 1)):
            return None
        self.means[where] = s
        return s

    def reduce_whole(self, value: Value, axes: Sequence[int], what: str) -> Value:
        """Returns a reduction that must see all positions of its axes (max, argmax, any)."""
        self.keep(value, what, axes)
        rest = [a for a in range(value.ndim) if a not in set(axes)]
        found = self.select_axes(value, rest)
        keeps = "max" in what or "min" in what or "average" in what
        dead = tuple(d if keeps and np.ndim(d) == 0 and d == 0.0 else UNKNOWN for d in found.dead)
        return dataclasses.replace(found, dead=dead, summed=None)

    def running_sum(self, value: Value, axis: int, where: Any) -> Value:
        """Returns cumulative sums along an axis: exact where removed positions hold zero."""
        x = self.atoms.resolve(value.axes[axis])
        if x is not None:
            dead = np.broadcast_to(_spread(value.dead[axis]), (len(x),))
            self.atoms.keep(x[dead != 0.0], "in a running sum, and not zero where it is masked")
        dead_out = [d if _is_zero(d) else UNKNOWN for d in value.dead]
        dead_out[axis] = UNKNOWN
        return Value(value.shape, value.axes, tuple(dead_out), None, value.origins)

    def along_whole(
        self,
        value: Value,
        axes: Sequence[int],
        shape: Sequence[Any],
        what: str,
        zeros: bool = True,
    ) -> Value:
        """Returns an operation within some axes (a window, a sort), position by position of others.

        ``zeros``: whether it makes zeros of nothing but zeros, as what is linear or a maximum does.
        """
        self.keep(value, what, axes)
        kept = set(axes)
        found = tuple(None if a in kept else value.axes[a] for a in range(value.ndim))
        zero = tuple(
            d if zeros and _is_zero(d) and a not in kept else UNKNOWN
            for a, d in enumerate(value.dead)
        )
        return Value(tuple(shape), found, zero, None, None)

    # Products.

    def contract(
        self,
        left: Value,
        right: Value,
        contracted: Sequence[tuple[int, int]],
        batch: Sequence[tuple[int, int]],
        where: Any,
    ) -> Value:
        """Returns the product of two arrays: batch axes first, then those of left, of right."""
        for a, b in contracted:
            self.atoms.same(left.axes[a], right.axes[b], "contracted together")
            self._check_contracted(left, a, right, b)
        for a, b in batch:
            self.atoms.same(left.axes[a], right.axes[b], "contracted together")
        self._roles(left, {a for a, _ in contracted}, {a for a, _ in batch}, right)
        self._roles(right, {b for _, b in contracted}, {b for _, b in batch}, left)
        if left.origins is None and right.origins is None:
            heads = [left.axes[a] for a, _ in batch if left.axes[a] is not None]
            if heads:
                used = {a for a, _ in batch}
                self.heads += heads  # type: ignore[arg-type]
                self.head_positions += [
                    x for a, x in enumerate(left.axes) if x is not None and a not in used
                ]
                used = {b for _, b in batch}
                self.head_positions += [
                    x for b, x in enumerate(right.axes) if x is not None and b not in used
                ]
        free_left = [
            a for a in range(left.ndim) if a not in {x for p in (contracted, batch) for x, _ in p}
        ]
        free_right = [
            b for b in range(right.ndim) if b not in {y for p in (contracted, batch) for _, y in p}
        ]
        axes = [None if right.axes[b] is None else left.axes[a] for a, b in batch]
        dead: list[Dead] = [
            0.0 if _is_zero(left.dead[a]) or _is_zero(right.dead[b]) else UNKNOWN for a, b in batch
        ]
        shape = [left.shape[a] for a, _ in batch]
        for value, free in ((left, free_left), (right, free_right)):
            axes += [value.axes[a] for a in free]
            dead += [_through_product(value.dead[a]) for a in free]
            shape += [value.shape[a] for a in free]
        self.contractions[where] = Contraction(
            (*shape, *(left.shape[a] for a, _ in contracted)),
            (*axes, *(left.axes[a] for a, _ in contracted)),
            _weights(left, right),
        )
        return Value(
            tuple(shape), tuple(axes), tuple(dead), None, _no_origins(left, right, len(shape))
        )

    def _check_contracted(self, left: Value, a: int, right: Value, b: int) -> None:
        x = self.atoms.resolve(left.axes[a])
        if x is None or right.axes[b] is None:
            return
        n = len(x)
        one = np.broadcast_to(_spread(left.dead[a]), (n,))
        two = np.broadcast_to(_spread(right.dead[b]), (n,))
        lost = (one != 0.0) & (two != 0.0)
        if lost.any():
            self.atoms.keep(x[lost], "contracted, and not zero where it is masked")

    def _roles(self, value: Value, contracted: set[int], batch: set[int], other: Value) -> None:
        if value.origins is None:
            return
        for a, origin in enumerate(value.origins):
            (self.sinks if a in contracted else self.sources).update(origin)

    def convolve(
        self,
        left: Value,
        right: Value,
        *,
        left_axes: tuple[int, int],
        right_axes: tuple[int, int],
        groups: int,
        shape: Sequence[Any],
        out_axes: tuple[int, int],
        where: Any,
        once: bool,
        transposed: bool = False,
    ) -> Value:
        """Returns a convolution. Taps and spatial axes stay whole; channels couple by groups.

        With groups, the kernel's stored inputs belong to another group for every block of its
        outputs. Where the kernel is a parameter used nowhere else (``once``), each group loses
        inputs and outputs of its own, equally many in all groups; otherwise all groups lose the
        same positions, or whole groups go.

        Args:
            left, right: input and kernel.
            left_axes, out_axes: batch and channel axis of input and output.
            right_axes: output and input axis of the kernel.
            groups: number of groups.
            shape: shape of the output.
            where: what the front end calls the operation.
            once: whether this is the only use of the kernel.
            transposed: whether the kernel stores all inputs and the outputs of one group.
        """
        batch, feature = left_axes
        out, into = right_axes
        self.keep(left, "a spatial axis", [a for a in range(left.ndim) if a not in left_axes])
        self.keep(right, "taps of a kernel", [a for a in range(right.ndim) if a not in right_axes])
        self._roles(right, {into}, set(), left)
        if groups == 1:
            self.atoms.same(left.axes[feature], right.axes[into], "contracted together")
            self._check_contracted(left, feature, right, into)
            channels, per_group = right.axes[out], left.axes[feature]
            per_size = left.shape[feature]
        else:
            channels, per_group, per_size = self._grouped(
                left, feature, right, out, into, groups, once, transposed
            )
        axes: list[Axis] = [None] * len(shape)
        dead: list[Dead] = [UNKNOWN] * len(shape)
        axes[out_axes[0]], dead[out_axes[0]] = left.axes[batch], _zero_or_unknown(left.dead[batch])
        axes[out_axes[1]] = channels
        dead[out_axes[1]] = 0.0 if _is_zero(right.dead[out]) else UNKNOWN
        taps = [right.shape[a] for a in range(right.ndim) if a not in right_axes]
        # Transposed convolutions multiply at every position of the input, others of the output.
        spatial = (
            [left.shape[a] for a in range(left.ndim) if a not in left_axes]
            if transposed
            else [n for d, n in enumerate(shape) if d not in out_axes]
        )
        sizes = (shape[out_axes[0]], *spatial, *taps, shape[out_axes[1]], per_size)
        self.contractions[where] = Contraction(
            sizes,
            (axes[out_axes[0]], *(None,) * (len(spatial) + len(taps)), channels, per_group),
            _weights(left, right),
        )
        return Value(tuple(shape), tuple(axes), tuple(dead))

    def _grouped(
        self,
        left: Value,
        feature: int,
        right: Value,
        out: int,
        into: int,
        groups: int,
        once: bool,
        transposed: bool,
    ) -> tuple[Axis, Axis, int]:
        """Couples the channels of a grouped convolution; returns those of its output."""
        atoms = self.atoms
        # The kernel stores one of its sides per group: ``shared`` is that side, ``full`` the other.
        full, shared = (into, out) if transposed else (out, into)
        n_full, n_shared = right.shape[full] // groups, right.shape[shared]
        inputs = left.axes[feature]
        if transposed:
            outputs: Axis = atoms.fresh(groups * n_shared)
            atoms.same(inputs, right.axes[full], "contracted together")
            ends = (outputs, inputs)
        else:
            outputs = right.axes[full]
            ends = (inputs, outputs)
        n_in = n_full if transposed else n_shared
        if n_shared == 1 and n_full == 1:
            atoms.same(ends[0], right.axes[full], "a channel and its own kernel")
            return right.axes[full], None, 1
        known = [atoms.resolve(x) for x in ends]
        direct = right.leaf is not None and once and n_shared > 1 and n_full > 1
        if direct and all(x is not None and _free(x) for x in known):
            path, order = right.leaf  # type: ignore[misc]
            stored = known[0].reshape(groups, n_shared, 1)  # type: ignore[union-attr]
            self.ragged[path, order[shared]] = (order[full], stored)
            atoms.keep(right.axes[shared], "stored per group")
            self.even += [x.reshape(groups, -1) for x in known]  # type: ignore[union-attr]
            return outputs, stored[0], n_in
        first = atoms.split(ends[0], (groups, n_shared), "groups of a convolution")
        second = atoms.split(right.axes[full], (groups, n_full), "groups of a convolution")
        atoms.same(first[0], second[0], "groups of a convolution")
        atoms.same(first[1], right.axes[shared], "positions in a group")
        return outputs, first[1] if not transposed else second[1], n_in


def blocks(old: Sequence[Any], new: Sequence[Any]) -> list[tuple[list[int], list[int]]]:
    """Returns which axes of a reshape correspond: the smallest groups of equal product.

    Axes of size 1 on either side stand alone, facing nothing.
    """
    found: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        if i < len(old) and j < len(new) and _same_size(old[i], new[j]):
            found.append(([i], [j]))
            i, j = i + 1, j + 1
            continue
        if i < len(old) and _is_one(old[i]):
            found.append(([i], []))
            i += 1
            continue
        if j < len(new) and _is_one(new[j]):
            found.append(([], [j]))
            j += 1
            continue
        left, right = [i], [j]
        if i >= len(old) or j >= len(new):
            found.append((list(range(i, len(old))), list(range(j, len(new)))))
            break
        a, b = old[i], new[j]
        i, j = i + 1, j + 1
        while not _same_size(a, b) and (i < len(old) or j < len(new)):
            grow_left = j >= len(new) or (i < len(old) and _less(a, b))
            if grow_left:
                a = a * old[i]
                left.append(i)
                i += 1
            else:
                b = b * new[j]
                right.append(j)
                j += 1
        found.append((left, right))
    return found


def _same_size(a: Any, b: Any) -> bool:
    return a is b or bool(a == b)


def _less(a: Any, b: Any) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a < b
    # Of symbolic sizes, the one that divides the other is the smaller.
    try:
        return bool(a % b != 0)
    except Exception:
        return True


def _is_one(n: Any) -> bool:
    return isinstance(n, int) and n == 1


def _long(n: Any) -> bool:
    return isinstance(n, int) and n > 1


def _spread(dead: Dead) -> np.ndarray:
    return np.atleast_1d(np.asarray(dead, float))


def _is_zero(dead: Dead) -> bool:
    return bool((np.asarray(dead) == 0.0).all())


def _finite(dead: Dead) -> Dead:
    if np.ndim(dead):
        return np.where(np.isfinite(dead), dead, UNKNOWN)
    return dead if math.isfinite(float(dead)) else UNKNOWN


def without_even(value: Value) -> Value:
    """Returns the value knowing only numbers: what is computed elsewhere is not known here."""
    return dataclasses.replace(value, dead=tuple(_finite(d) for d in value.dead), summed=None)


def numbers_as_even(value: Value) -> Value:
    """Returns the value after an operation of integers, or one that rounds: the program does it."""
    found: list[Dead] = []
    for d in value.dead:
        number = np.isfinite(d) & (np.asarray(d) != 0.0)
        found.append(np.where(number, EVEN, d) if np.ndim(d) else EVEN if number else d)
    return dataclasses.replace(value, dead=tuple(found))


def _through_product(dead: Dead) -> Dead:
    """Zero stays zero in a product with what is kept; what can be computed still can."""
    if _is_zero(dead):
        return 0.0
    return UNKNOWN if np.isnan(dead).any() else EVEN


def _zero_or_unknown(dead: Dead) -> Dead:
    return (
        np.where(np.asarray(dead) == 0.0, 0.0, UNKNOWN)
        if np.ndim(dead)
        else (0.0 if dead == 0.0 else UNKNOWN)
    )


def _equal(a: Any, b: Any) -> bool:
    return bool(a == b) or (a != a and b != b)


def _near(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-6 * abs(b)


def _free(axis: np.ndarray) -> bool:
    """Whether no position is coupled to another one of the axis."""
    atoms = axis[axis != KEPT]
    return axis.shape[1] == 1 and len(np.unique(atoms)) == len(atoms)


def _uniform(value: Value) -> float | None:
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


def _dead_of(value: Value, axis: int, n: Any) -> Dead:
    """Returns what a value holds at removed positions of an axis it is broadcast along."""
    if (
        axis >= 0
        and (not _is_one(value.shape[axis]) or _is_one(n))
        and value.axes[axis] is not None
    ):
        return value.dead[axis]
    uniform = _uniform(value)
    return EVEN if uniform is None else uniform


def _weights(*values: Value) -> tuple[str, ...]:
    paths = {p for v in values if v.origins is not None for o in v.origins for p, _ in o}
    return tuple(sorted(paths))


def _no_origins(left: Value, right: Value, n: int) -> Any:
    if left.origins is None or right.origins is None:
        return None
    return tuple(frozenset() for _ in range(n))


Rule = Callable[..., list[Value]]
