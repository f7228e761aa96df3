"""How atoms flow through gathers, scatters and dynamic slices."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from purepruning.coupling import shapes
from purepruning.coupling.removed_values import UNKNOWN
from purepruning.coupling.value import Value, finite_only, without_uniform
from purepruning.jaxpr.constants import concrete
from purepruning.jaxpr.program import Op, Program
from purepruning.jaxpr.rules.shapes import all_are, same, shape_of
from purepruning.jaxpr.walk import Rule, Walk

SCATTERS = (
    "scatter",
    "scatter-add",
    "scatter_add",
    "scatter-sub",
    "scatter-mul",
    "scatter_mul",
    "scatter-max",
    "scatter_max",
    "scatter-min",
    "scatter_min",
)


def _fills_nothing(op: Op) -> bool:
    """Whether zeros stay zeros: an index out of range gives zero, or NaN in both models alike."""
    fill = op.params["fill_value"]
    if op.params["mode"] != jax.lax.GatherScatterMode.FILL_OR_DROP or fill is None:
        return True
    return bool(fill == 0 or fill != fill)


# Picking positions.
def _gather(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    value, indices = xs
    n = op.params["dimension_numbers"]
    sizes, shape, flow = op.params["slice_sizes"], shape_of(state, op), state.flow
    offset_axes = [
        a
        for a in range(value.ndim)
        if a not in n.collapsed_slice_dims and a not in n.operand_batching_dims
    ]
    batch_out = [d for d in range(len(shape)) if d not in n.offset_dims]
    zeros = _fills_nothing(op)
    axes: list[Any] = [None] * len(shape)
    at_removed: list[Any] = [UNKNOWN] * len(shape)
    batch_axes = list(range(indices.ndim - 1))  # the last axis of the indices holds coordinates
    flow.keep(indices, "coordinates", [indices.ndim - 1])
    for d, a in zip(batch_out, batch_axes, strict=True):
        axes[d] = indices.axes[a]
    for a, b in zip(n.operand_batching_dims, n.start_indices_batching_dims, strict=True):
        flow.atoms.same(value.axes[a], indices.axes[b])
        d = batch_out[b]
        axes[d] = None if value.axes[a] is None else axes[d]
        at_removed[d] = 0.0 if zeros and all_are(value.at_removed[a], 0.0) else UNKNOWN
    for d, a in zip(n.offset_dims, offset_axes, strict=True):
        if same(sizes[a], value.shape[a]):
            axes[d] = value.axes[a]
            at_removed[d] = 0.0 if zeros and all_are(value.at_removed[a], 0.0) else UNKNOWN
        else:
            flow.keep(value, "a part whose place is computed", [a])
    for a in n.collapsed_slice_dims:
        if value.axes[a] is None:
            continue
        known = None
        if len(n.start_index_map) == 1 and n.start_index_map[0] == a:
            known = state.concrete(op.inputs[1])
        if known is not None and known.size and known.ndim == 2:
            positions = known[..., 0]
            if (positions >= 0).all() and (positions < value.shape[a]).all():
                d = batch_out[0]
                axes[d] = value.axes[a][positions]
                line = without_uniform(value).at_removed[a]
                at_removed[d] = np.asarray(line)[positions] if np.ndim(line) else line
                continue
        flow.keep(value, "looked up by index", [a])
    origins = None
    if value.origins is not None:
        flow.sinks.update(o for a in n.collapsed_slice_dims for o in value.origins[a])
        flow.sources.update(o for a in offset_axes for o in value.origins[a])
        if indices.origins is not None:
            found: list[frozenset[tuple[str, int]]] = [frozenset()] * len(shape)
            for d, a in zip(n.offset_dims, offset_axes, strict=True):
                found[d] = value.origins[a]
            origins = tuple(found)
    return [Value(tuple(shape), tuple(axes), tuple(at_removed), None, origins)]


def _scatter(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    value, indices, updates = xs
    n = op.params["dimension_numbers"]
    flow = state.flow
    applied = op.name == "scatter" and not _overwrites(op)
    places = written_places(state.program, op, value, updates)
    if places is not None:
        axis, along, taken = places
        moved = [a for a in range(updates.ndim) if a not in along]
        order = [*moved[:axis], *along, *moved[axis:]]
        flat = shapes.transpose(flow, updates, order)
        size = math.prod(updates.shape[a] for a in along)
        flat = shapes.reshape(flow, flat, (*value.shape[:axis], size, *value.shape[axis + 1 :]))
        return [shapes.take(flow, shapes.concatenate(flow, [value, flat], axis), axis, taken)]
    flow.keep(indices, "coordinates")
    changed = changed_axis(state.program, op, value, updates)
    window = [
        a
        for a in range(value.ndim)
        if a not in n.inserted_window_dims and a not in n.operand_batching_dims
    ]
    axes, at_removed = list(value.axes), list(value.at_removed)
    used = set()
    for u, a in zip(n.update_window_dims, window, strict=True):
        used.add(u)
        if same(updates.shape[u], value.shape[a]):
            flow.atoms.same(value.axes[a], updates.axes[u])
            if updates.axes[u] is None:
                axes[a] = None
            both = all_are(value.at_removed[a], 0.0) and all_are(updates.at_removed[u], 0.0)
            at_removed[a] = 0.0 if both and not applied else UNKNOWN
        else:
            flow.keep(value, "a part that is written to", [a])
            flow.keep(updates, "a part that is written", [u])
            axes[a] = None
    rest = [u for u in range(updates.ndim) if u not in used]
    flow.keep(updates, "written by index", rest)
    for a in (*n.inserted_window_dims, *n.operand_batching_dims):
        if changed is not None and a == changed[0]:  # the other positions are free
            flow.atoms.keep(value.axes[a][changed[1]], "written by index")
            at_removed[a] = finite_only(value.at_removed[a])
        else:
            flow.keep(value, "written by index", [a])
            axes[a] = None
    return [Value(value.shape, tuple(axes), tuple(at_removed))]


def _overwrites(op: Op) -> bool:
    """Whether a scatter does not look at what is there (``at[].apply`` has a function of it)."""
    return op.name == "scatter" and op.params["update_jaxpr"] is None


def changed_axis(
    program: Program, op: Op, value: Value, updates: Value
) -> tuple[int, np.ndarray] | None:
    """Returns the axis that is added to, or the like, at constant positions, and the positions."""
    at = None if _overwrites(op) else _constant_places(program, op, value, updates)
    if at is None or at[0] not in op.params["dimension_numbers"].inserted_window_dims:
        return None
    return at[0], at[2]


def written_places(
    program: Program, op: Op, value: Value, updates: Value
) -> tuple[int, list[int], np.ndarray] | None:
    """Returns where constants say that one axis is overwritten, if that is all a scatter does.

    The axis; the axes of the updates that run along it; and for every position of the axis where it
    is found in the value followed by the updates.
    """
    if not _overwrites(op):
        return None
    found = _constant_places(program, op, value, updates)
    if found is None:
        return None
    axis, along, places = found
    taken = np.arange(value.shape[axis])
    for i, place in enumerate(places):
        taken[place] = value.shape[axis] + i
    return axis, along, taken


def _constant_places(
    program: Program, op: Op, value: Value, updates: Value
) -> tuple[int, list[int], np.ndarray] | None:
    """Returns the axis that a scatter writes to, the axes of updates along it, and positions."""
    n = op.params["dimension_numbers"]
    if n.operand_batching_dims or len(n.scatter_dims_to_operand_dims) != 1:
        return None
    (axis,) = n.scatter_dims_to_operand_dims
    starts = concrete(program, op.inputs[1])
    window = [a for a in range(value.ndim) if a not in n.inserted_window_dims]
    sizes = dict(zip(window, (updates.shape[u] for u in n.update_window_dims), strict=True))
    if starts is None or value.axes[axis] is None or starts.shape[-1:] != (1,):
        return None
    if any(not same(size, value.shape[a]) for a, size in sizes.items() if a != axis):
        return None
    if set(n.inserted_window_dims) - {axis}:
        return None
    along = [u for u in range(updates.ndim) if u not in n.update_window_dims]
    along += [u for u, a in zip(n.update_window_dims, window, strict=True) if a == axis]
    width = sizes.get(axis, 1)
    places = (starts.reshape(-1, 1) + np.arange(width)).reshape(-1)
    if places.size and not (places.min() >= 0 and places.max() < value.shape[axis]):
        return None
    return axis, along, places


def _dynamic_slice(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    value, shape = xs[0], shape_of(state, op)
    for axis in range(value.ndim):
        if same(value.shape[axis], shape[axis]):
            continue
        start = state.concrete(op.inputs[1 + axis])
        if start is not None and value.axes[axis] is not None:
            first = int(np.clip(start, 0, value.shape[axis] - shape[axis]))
            value = shapes.part(state.flow, value, axis, first, shape[axis])
        else:
            state.flow.keep(value, "a part whose place is computed", [axis])
            value = shapes.resized(state.flow, value, axis, shape[axis])
    return [without_uniform(value)]


def _dynamic_update_slice(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    value, update = xs[:2]
    partial = [a for a in range(value.ndim) if not same(value.shape[a], update.shape[a])]
    if len(partial) == 1 and value.axes[partial[0]] is not None:
        start = known_start(state.program, op, partial[0], value, update)
        if start is not None:
            return [shapes.write(state.flow, value, update, partial[0], start)]
    axes, at_removed = list(value.axes), list(value.at_removed)
    for a in range(value.ndim):
        if same(value.shape[a], update.shape[a]):
            state.flow.atoms.same(value.axes[a], update.axes[a])
            if update.axes[a] is None:
                axes[a] = None
            both = all_are(value.at_removed[a], 0.0) and all_are(update.at_removed[a], 0.0)
            at_removed[a] = 0.0 if both else UNKNOWN
        else:
            state.flow.keep(value, "a part that is written to", [a])
            state.flow.keep(update, "a part that is written", [a])
            axes[a] = None
    return [Value(value.shape, tuple(axes), tuple(at_removed))]


def known_start(program: Program, op: Op, axis: int, value: Value, update: Value) -> int | None:
    """Returns where a part is written, if that is a constant."""
    start = concrete(program, op.inputs[2 + axis])
    if start is None:
        return None
    return int(np.clip(start, 0, value.shape[axis] - update.shape[axis]))


RULES: dict[str, Rule] = {
    "gather": _gather,
    **dict.fromkeys(SCATTERS, _scatter),
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
}
