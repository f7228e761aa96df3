"""How atoms flow where positions move: reshapes, slices, concatenations, broadcasts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from purepruning.coupling import removed_values
from purepruning.coupling.atoms import NUMBER, Axis, filled
from purepruning.coupling.flow import Flow
from purepruning.coupling.removed_values import UNIFORM, UNKNOWN
from purepruning.coupling.value import (
    AtRemoved,
    Value,
    as_line,
    at_removed_of,
    equal,
    finite_only,
    is_long,
    is_one,
    uniform_of,
)


def reshape(flow: Flow, value: Value, shape: Sequence[Any]) -> Value:
    """Returns the value in another shape: axes merge into products and split into factors."""
    if any(isinstance(n, int) and n == 0 for n in shape):
        return flow.constant(shape, np.zeros(()))  # without elements, nothing ties its axes
    axes: list[Axis] = [None] * len(shape)
    at_removed: list[AtRemoved] = [UNKNOWN] * len(shape)
    origins: list[frozenset[tuple[str, int]]] = [frozenset()] * len(shape)
    only_ones = True
    for old, new in blocks(value.shape, shape):
        origin = frozenset().union(*((value.origins or ())[a] for a in old if value.origins))
        for d in new:
            origins[d] = origin
        if len(old) == 1 and len(new) == 1:
            axes[new[0]], at_removed[new[0]] = value.axes[old[0]], value.at_removed[old[0]]
            continue
        only_ones = only_ones and not (old and new)
        if not new:
            flow.keep(value, "a size of 1", old)
            continue
        if not old or all(value.axes[a] is None for a in old):
            continue
        sizes = [value.shape[a] for a in old]
        if not all(isinstance(n, int) for n in (*sizes, *(shape[d] for d in new))):
            flow.keep(value, "a reshape of a size that is not known", old)
            continue
        merged = flow.atoms.merge([value.axes[a] for a in old], sizes)
        lines = [value.at_removed[a] for a in old if value.axes[a] is not None]
        common: AtRemoved = UNKNOWN
        if all((np.asarray(x) == np.asarray(lines[0]).flat[0]).all() for x in lines):
            common = finite_only(removed_values.meet([float(np.asarray(x).flat[0]) for x in lines]))
        parts = [merged] if len(new) == 1 else flow.atoms.split(merged, [shape[d] for d in new])
        for d, part in zip(new, parts, strict=True):
            axes[d], at_removed[d] = part, common
    return Value(
        tuple(shape),
        tuple(axes),
        tuple(at_removed),
        None,
        None if value.origins is None else tuple(origins),
        summed=value.summed if only_ones else None,
    )


def split_axis(
    flow: Flow, value: Value, axis: int, sizes: Sequence[int], reason: str
) -> list[Axis]:
    """Returns an axis of a value as axes of the given sizes, which it is the product of."""
    return flow.atoms.split(value.axes[axis], sizes, reason)


def take(flow: Flow, value: Value, axis: int, positions: np.ndarray) -> Value:
    """Returns the value with only the given positions of an axis, in that order."""
    axes, shape = list(value.axes), list(value.shape)
    at_removed = [finite_only(d) for d in value.at_removed]
    if (along := axes[axis]) is not None:
        axes[axis] = along[positions]
    if np.ndim(at_removed[axis]):
        at_removed[axis] = np.asarray(at_removed[axis])[positions]
    shape[axis] = len(positions)
    return dataclasses.replace(
        value,
        shape=tuple(shape),
        axes=tuple(axes),
        at_removed=tuple(at_removed),
        known=None,
        leaf=None,
        summed=None,
    )


def resized(flow: Flow, value: Value, axis: int, size: Any) -> Value:
    """Returns the value with another size of an axis that cannot be pruned."""
    shape, axes = list(value.shape), list(value.axes)
    shape[axis], axes[axis] = size, None
    return dataclasses.replace(
        value,
        shape=tuple(shape),
        axes=tuple(axes),
        at_removed=tuple(finite_only(d) for d in value.at_removed),
        known=None,
        leaf=None,
        summed=None,
    )


def part(flow: Flow, value: Value, axis: int, start: int, size: Any, step: int = 1) -> Value:
    """Returns a strided part of an axis, which stays whole if ``size`` is not known."""
    if value.axes[axis] is not None and not isinstance(size, int | np.integer):
        flow.keep(value, "a part of it is taken whose size depends on data", [axis])
        return resized(flow, value, axis, size)
    if value.axes[axis] is None:
        return resized(flow, value, axis, size)
    return take(flow, value, axis, start + step * np.arange(size))


def concatenate(flow: Flow, values: Sequence[Value], axis: int) -> Value:
    """Returns the values one behind the other along an axis."""
    rest = [a for a in range(values[0].ndim) if a != axis]
    axes: list[Axis] = list(values[0].axes)
    at_removed: list[AtRemoved] = list(values[0].at_removed)
    for a in rest:
        for other in values[1:]:
            flow.atoms.same(axes[a], other.axes[a])
            if other.axes[a] is None:
                axes[a] = None
        at_removed[a] = removed_values.meet([at_removed_of(v, a, v.shape[a]) for v in values])
    sizes = [v.shape[axis] for v in values]
    if not all(isinstance(n, int | np.integer) for n in sizes):
        for v in values:
            flow.keep(v, "behind a size that is not known", [axis])
        axes[axis], at_removed[axis] = None, UNKNOWN
    elif all(v.axes[axis] is None for v in values):
        axes[axis], at_removed[axis] = None, UNKNOWN
    else:
        parts = [flow.atoms.resolve(v.axes[axis]) for v in values]
        width = max(1 if p is None else p.shape[1] for p in parts)
        axes[axis] = np.concatenate(
            [
                np.zeros((n, width), NUMBER) if p is None else filled(p, width)
                for p, n in zip(parts, sizes, strict=True)
            ]
        )
        lines = [finite_only(v.at_removed[axis]) for v in values]
        if all(np.ndim(x) == 0 and equal(x, lines[0]) for x in lines):
            at_removed[axis] = lines[0]
        else:
            at_removed[axis] = np.concatenate(
                [np.broadcast_to(as_line(x), (n,)) for x, n in zip(lines, sizes, strict=True)]
            )
    shape = list(values[0].shape)
    shape[axis] = sum(sizes)
    return Value(
        tuple(shape),
        tuple(axes),
        tuple(at_removed),
        None,
        flow.joint_origins(values, len(shape)),
    )


def write(flow: Flow, value: Value, update: Value, axis: int, start: int) -> Value:
    """Returns the value with a part of an axis replaced."""
    stop, n = start + update.shape[axis], value.shape[axis]
    parts = [update]
    if start:
        parts.insert(0, part(flow, value, axis, 0, start))
    if stop < n:
        parts.append(part(flow, value, axis, stop, n - stop))
    return concatenate(flow, parts, axis)


def pad(flow: Flow, value: Value, axis: int, low: int, high: int, fill: float | None) -> Value:
    """Returns the value with positions added before and behind those of an axis.

    The new positions may go by themselves. Negative numbers take positions away.
    """
    if low < 0 or high < 0:
        start = max(-low, 0)
        value = part(flow, value, axis, start, value.shape[axis] - start - max(-high, 0))
    low, high = max(low, 0), max(high, 0)
    parts = [value]
    for n, front in ((low, True), (high, False)):
        if not n:
            continue
        if value.axes[axis] is None:
            parts = [resized(flow, parts[0], axis, parts[0].shape[axis] + n)]
            continue
        shape = [*value.shape]
        shape[axis] = n
        edge = Value(
            tuple(shape),
            tuple(flow.atoms.fresh(n) if a == axis else value.axes[a] for a in range(value.ndim)),
            tuple(
                (UNKNOWN if fill is None else float(fill)) if a == axis else value.at_removed[a]
                for a in range(value.ndim)
            ),
            None,
            tuple(frozenset() for _ in shape),
        )
        # Along the other axes an edge is as full as the value itflow.
        parts = [edge, *parts] if front else [*parts, edge]
    return parts[0] if len(parts) == 1 else concatenate(flow, parts, axis)


def transpose(flow: Flow, value: Value, order: Sequence[int]) -> Value:
    """Returns the value with its axes reordered."""
    leaf = value.leaf and (value.leaf[0], tuple(value.leaf[1][a] for a in order))
    return dataclasses.replace(
        value,
        shape=tuple(value.shape[a] for a in order),
        axes=tuple(value.axes[a] for a in order),
        at_removed=tuple(value.at_removed[a] for a in order),
        known=None,
        origins=None if value.origins is None else tuple(value.origins[a] for a in order),
        leaf=leaf,
    )


def squeeze(flow: Flow, value: Value, axes: Sequence[int]) -> Value:
    """Returns the value without the given axes of size 1."""
    flow.keep(value, "a position that is picked out", axes)
    return select_axes(flow, value, [a for a in range(value.ndim) if a not in set(axes)])


def select_axes(flow: Flow, value: Value, axes: Sequence[int | None], sizes: Any = None) -> Value:
    """Returns the value with only some of its axes; None stands for a new one of size 1."""
    pick = list(axes)
    return Value(
        tuple(1 if a is None else value.shape[a] for a in pick),
        tuple(None if a is None else value.axes[a] for a in pick),
        tuple(UNKNOWN if a is None else value.at_removed[a] for a in pick),
        None,
        None
        if value.origins is None
        else tuple(frozenset() if a is None else value.origins[a] for a in pick),
        summed=value.summed,
    )


def broadcast(flow: Flow, value: Value, shape: Sequence[Any], dims: Sequence[int]) -> Value:
    """Returns the value with axis i at place ``dims[i]`` of ``shape``; the rest is repeated."""
    place = {d: a for a, d in enumerate(dims)}
    uniform = uniform_of(value)
    axes: list[Axis] = []
    at_removed: list[AtRemoved] = []
    origins: list[frozenset[tuple[str, int]]] = []
    for d, n in enumerate(shape):
        a = place.get(d)
        origin = frozenset() if a is None or value.origins is None else value.origins[a]
        if a is not None and (not is_one(value.shape[a]) or is_one(n)):
            axes.append(value.axes[a])
            at_removed.append(value.at_removed[a])
        else:
            if a is not None:
                flow.keep(value, "a size of 1", [a])
            axes.append(flow.atoms.fresh(n) if is_long(n) else None)
            at_removed.append(UNIFORM if uniform is None else uniform)
        origins.append(origin)
    return Value(
        tuple(shape),
        tuple(axes),
        tuple(at_removed),
        None,
        None if value.origins is None else tuple(origins),
        summed=value.summed,
    )


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
        if i < len(old) and is_one(old[i]):
            found.append(([i], []))
            i += 1
            continue
        if j < len(new) and is_one(new[j]):
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
    except Exception:  # each kind of symbolic sizes has an error of its own
        return True
