"""How atoms flow through operators that move positions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from purepruning.coupling import reductions, shapes
from purepruning.coupling.removed_values import UNKNOWN
from purepruning.coupling.value import Value
from purepruning_interop.torch.program import Op, Sym
from purepruning_interop.torch.walk import Walk, rules_of


# Shapes.
def _reshape(s: Walk, op: Op) -> list[Value] | None:
    if op.name == "view" and "dtype" in op.args:
        return None
    value = s.value(op.tensors[0])
    reshaped = shapes.reshape(s.flow, value, s.shape(op))
    if value.known is not None and np.size(value.known) == 1:
        reshaped = dataclasses.replace(reshaped, known=value.known)
    return [reshaped]


def _permute(s: Walk, op: Op) -> list[Value] | None:
    value = s.value(op.tensors[0])
    n = value.ndim
    if op.name == "permute":
        order = [d % n for d in op.args["dims"]]
    elif op.name in ("movedim", "moveaxis"):
        ends = [op.args["source"], op.args["destination"]]
        ends = [end if isinstance(end, (list, tuple)) else [end] for end in ends]
        sources, places = ([d % n for d in end] for end in ends)
        order = [d for d in range(n) if d not in sources]
        for place, source in sorted(zip(places, sources, strict=True)):
            order.insert(place, source)
    else:
        order = list(range(n))
        if n > 1 or op.name == "transpose":
            one, other = {
                "transpose": lambda: (op.args["dim0"], op.args["dim1"]),
                "swapaxes": lambda: (op.args["axis0"], op.args["axis1"]),
                "swapdims": lambda: (op.args["dim0"], op.args["dim1"]),
            }.get(op.name, lambda: (-2, -1))()
            if n:
                order[one % n], order[other % n] = order[other % n], order[one % n]
    return [shapes.transpose(s.flow, value, order)]


def _squeeze(s: Walk, op: Op) -> list[Value] | None:
    value = s.value(op.args["self"])
    dims = op.args.get("dim")
    if dims is None:
        dims = list(range(value.ndim))
    dims = [dims] if isinstance(dims, int) else dims
    axes = [d % value.ndim for d in dims if value.ndim and value.shape[d % value.ndim] == 1]
    return [shapes.squeeze(s.flow, value, axes)] if axes else [value]


def _unsqueeze(s: Walk, op: Op) -> list[Value] | None:
    value = s.value(op.args["self"])
    order: list[int | None] = list(range(value.ndim))
    order.insert(op.args["dim"] % (value.ndim + 1), None)
    return [shapes.select_axes(s.flow, value, order)]


def _expand(s: Walk, op: Op) -> list[Value] | None:
    value, shape = s.value(op.args["self"]), s.shape(op)
    n = len(shape) - value.ndim
    return [shapes.broadcast(s.flow, value, shape, range(n, len(shape)))]


def _cat(s: Walk, op: Op) -> list[Value] | None:
    tensors = [x for x in op.args["tensors"] if s.program.avals[x.number].shape != (0,)]
    values = [s.value(x) for x in tensors]
    if len(values) == 1:
        return [values[0]]
    return [shapes.concatenate(s.flow, values, op.args.get("dim", 0) % values[0].ndim)]


def _stack(s: Walk, op: Op) -> list[Value] | None:
    value = s.flow.unify([s.value(x) for x in op.args["tensors"]])
    order: list[int | None] = list(range(value.ndim))
    order.insert(op.args.get("dim", 0) % (value.ndim + 1), None)
    found = shapes.select_axes(s.flow, value, order)
    return [dataclasses.replace(found, shape=s.shape(op), summed=None)]


def _split(s: Walk, op: Op) -> list[Value] | None:
    value = s.value(op.tensors[0])
    axis = op.args.get("dim", 0) % value.ndim
    found, start = [], 0
    for i in range(len(op.outputs)):
        size = s.shape(op, i)[axis]
        found.append(shapes.part(s.flow, value, axis, start, size))
        start = start + size if isinstance(size, int) and isinstance(start, int) else start
    return found


def _unbind(s: Walk, op: Op) -> list[Value] | None:
    value = s.value(op.args["self"])
    axis = op.args.get("dim", 0) % value.ndim
    return [_picked(s, value, axis) for _ in op.outputs]


def _picked(s: Walk, value: Value, axis: int) -> Value:
    s.flow.keep(value, "a position that is picked out", [axis])
    found = shapes.select_axes(s.flow, value, [a for a in range(value.ndim) if a != axis])
    return dataclasses.replace(found, summed=None)


def _select(s: Walk, op: Op) -> list[Value] | None:
    value = s.value(op.args["self"])
    return [_picked(s, value, op.args["dim"] % value.ndim)]


def slice_of(op: Op, n: int) -> tuple[int, int]:
    """Returns start and step of a slice of an axis of ``n`` positions."""
    start, step = op.args.get("start") or 0, op.args.get("step", 1)
    start = start if not isinstance(start, Sym) else start.hint
    return min(max(start + n if start < 0 else start, 0), n), step


def _slice(s: Walk, op: Op) -> list[Value] | None:
    value, shape = s.value(op.args["self"]), s.shape(op)
    axis = op.args.get("dim", 0) % value.ndim
    if op.name == "narrow":
        start, step = op.args["start"], 1
        if not isinstance(start, int):
            return None
        start = start % value.shape[axis] if start < 0 else start
    else:
        if value.shape[axis] is shape[axis] or value.shape[axis] == shape[axis]:
            return [value]
        if value.axes[axis] is None:
            return [shapes.resized(s.flow, value, axis, shape[axis])]
        start, step = slice_of(op, value.shape[axis])
    return [shapes.part(s.flow, value, axis, start, shape[axis], step)]


def _slice_scatter(s: Walk, op: Op) -> list[Value] | None:
    value, source = s.value(op.args["self"]), s.value(op.args["src"])
    axis = op.args.get("dim", 0) % value.ndim
    if op.name == "select_scatter":
        order: list[int | None] = list(range(source.ndim))
        order.insert(axis, None)
        source = shapes.select_axes(s.flow, source, order)
    places = scatter_places(op, value.shape[axis], source.shape[axis])
    if places is None:
        return None
    if (places >= value.shape[axis]).all():
        return [shapes.take(s.flow, source, axis, places - value.shape[axis])]
    joined = shapes.concatenate(s.flow, [value, source], axis)
    return [
        shapes.part(s.flow, joined, axis, 0, value.shape[axis])
        if joined.axes[axis] is None
        else shapes.take(s.flow, joined, axis, places)
    ]


def scatter_places(op: Op, n: Any, size: Any) -> np.ndarray | None:
    """Returns for every position where it comes from in the two tensors behind each other."""
    if not isinstance(n, int) or not isinstance(size, int):
        return None
    places = np.arange(n)
    if op.name == "select_scatter":
        if not isinstance(op.args["index"], int):
            return None
        places[op.args["index"]] = n
    else:
        start, step = slice_of(op, n)
        places[start : start + step * size : step] = n + np.arange(size)
    return places


def _flip(s: Walk, op: Op) -> list[Value] | None:
    value = s.value(op.args["self"])
    dims = {"fliplr": [1], "flipud": [0]}.get(op.name) or op.args["dims"]
    for d in dims:
        axis = d % value.ndim
        if value.axes[axis] is not None:
            value = shapes.take(s.flow, value, axis, np.arange(value.shape[axis])[::-1])
    return [value]


def roll_shifts(op: Op, shape: Sequence[Any]) -> list[tuple[int, Any]] | None:
    """Returns by how much every axis is rolled; None where all are rolled as one."""
    if not op.args["dims"]:
        return None
    shifts = op.args["shifts"]
    return [(d % len(shape), k) for d, k in zip(op.args["dims"], shifts, strict=True)]


def _roll(s: Walk, op: Op) -> list[Value] | None:
    value = s.value(op.args["self"])
    shifts = roll_shifts(op, value.shape)
    if shifts is None:
        return None
    for axis, by in shifts:
        if value.axes[axis] is not None:
            if not isinstance(by, int):
                return None
            value = shapes.take(s.flow, value, axis, np.roll(np.arange(value.shape[axis]), by))
    return [value]


def _repeat(s: Walk, op: Op) -> list[Value] | None:
    value, shape = s.value(op.args["self"]), s.shape(op)
    times = op.args["repeats" if op.name == "repeat" else "dims"]
    new = len(shape) - value.ndim
    value = shapes.select_axes(s.flow, value, [None] * new + list(range(value.ndim)))
    times = [1] * (len(shape) - len(times)) + list(times)
    for axis, k in enumerate(times):
        if isinstance(k, int) and k == 1:
            continue
        if value.axes[axis] is None:
            value = shapes.resized(s.flow, value, axis, shape[axis])
        elif isinstance(k, int):
            value = shapes.take(s.flow, value, axis, np.tile(np.arange(value.shape[axis]), k))
        else:
            return None
    return [value]


def _repeat_interleave(s: Walk, op: Op) -> list[Value] | None:
    if "self" not in op.args:
        return None
    value = s.value(op.args["self"])
    axis, times = op.args["dim"], op.args["repeats"]
    if axis is None or not isinstance(times, int):
        return None
    axis %= value.ndim
    if value.axes[axis] is None:
        return [shapes.resized(s.flow, value, axis, s.shape(op)[axis])]
    return [shapes.take(s.flow, value, axis, np.repeat(np.arange(value.shape[axis]), times))]


def pad_widths(op: Op, ndim: int) -> list[tuple[int, int, int]]:
    """Returns the axes that are padded, with how much before and behind."""
    pads = op.args["pad"] if "pad" in op.args else op.args["padding"]
    pairs = [(pads[i], pads[i + 1]) for i in range(0, len(pads), 2)]
    return [(ndim - 1 - i, low, high) for i, (low, high) in enumerate(pairs)]


def _pad(s: Walk, op: Op) -> list[Value] | None:
    value, shape = s.value(op.args["self"]), s.shape(op)
    constant = op.name == "constant_pad_nd" or op.args.get("mode") == "constant"
    widths = pad_widths(op, value.ndim)
    if not constant or not all(isinstance(n, int) for w in widths for n in w):
        axes = [a for a, low, high in widths if not (_is_zero(low) and _is_zero(high))]
        return [reductions.along_whole(s.flow, value, axes, shape, "padding")]
    fill = op.args.get("value")
    fill = 0.0 if fill is None else float(fill)
    padded = {a for a, low, high in widths if low or high}
    for axis, low, high in widths:
        if low or high:
            value = shapes.pad(s.flow, value, axis, low, high, fill)
    # Padding along one axis also fills positions removed along the others.
    at_removed = tuple(
        d if (np.asarray(d) == fill).all() or padded <= {a} else UNKNOWN
        for a, d in enumerate(value.at_removed)
    )
    return [dataclasses.replace(value, shape=shape, at_removed=at_removed, leaf=None)]


def _is_zero(n: Any) -> bool:
    return isinstance(n, int) and n == 0


def zero(at_removed: Any) -> bool:
    """Whether all removed positions hold zero."""
    return bool((np.asarray(at_removed) == 0.0).all())


RULES = rules_of(
    (
        _reshape,
        "view reshape _unsafe_view flatten unflatten view_as reshape_as "
        "_reshape_alias view_copy ravel",
    ),
    (_permute, "permute transpose t movedim moveaxis swapaxes swapdims mT numpy_T"),
    (_squeeze, "squeeze"),
    (_unsqueeze, "unsqueeze"),
    (_expand, "expand expand_as broadcast_to expand_copy"),
    (_cat, "cat concat concatenate"),
    (_stack, "stack"),
    (
        _split,
        "split split_with_sizes chunk unsafe_split unsafe_chunk split_with_sizes_copy",
    ),
    (_unbind, "unbind"),
    (_select, "select"),
    (_slice, "slice narrow"),
    (_slice_scatter, "slice_scatter select_scatter"),
    (_flip, "flip fliplr flipud"),
    (_roll, "roll"),
    (_repeat, "repeat tile"),
    (_repeat_interleave, "repeat_interleave"),
    (
        _pad,
        "pad constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d "
        "replication_pad1d replication_pad2d replication_pad3d",
    ),
)

#: Those through which the shrunk program can compute what removed positions would hold.
RECOMPUTED = frozenset(
    name
    for name, rule in RULES.items()
    if rule in (_reshape, _permute, _squeeze, _unsqueeze, _expand)
)
