"""How atoms flow through primitives that move positions."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from purepruning.coupling import shapes
from purepruning.coupling.removed_values import UNKNOWN
from purepruning.coupling.value import Value
from purepruning.jaxpr.program import Op
from purepruning.jaxpr.walk import Rule, Walk


# Shapes.
def _broadcast(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    return [
        shapes.broadcast(state.flow, xs[0], shape_of(state, op), op.params["broadcast_dimensions"])
    ]


def _reshape(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    value, order = xs[0], op.params.get("dimensions")
    if order is not None:
        value = shapes.transpose(state.flow, value, order)
    return [shapes.reshape(state.flow, value, shape_of(state, op))]


def _transpose(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    return [shapes.transpose(state.flow, xs[0], op.params["permutation"])]


def _squeeze(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    return [shapes.squeeze(state.flow, xs[0], op.params["dimensions"])]


def _expand_dims(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    return [shapes.reshape(state.flow, xs[0], shape_of(state, op))]


def _rev(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    value = xs[0]
    for axis in op.params["dimensions"]:
        if value.axes[axis] is not None:
            value = shapes.take(state.flow, value, axis, np.arange(value.shape[axis])[::-1])
    return [value]


def _concatenate(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    return [shapes.concatenate(state.flow, xs, op.params["dimension"])]


def _stack(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    axis = op.params["axis"]
    value = state.flow.unify(xs)
    order: list[int | None] = [*range(value.ndim)]
    order.insert(axis, None)
    found = shapes.select_axes(state.flow, value, order)
    return [
        dataclasses.replace(
            found,
            shape=shape_of(state, op),
            at_removed=tuple(UNKNOWN if a is None else value.at_removed[a] for a in order),
        )
    ]


def _unstack(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    found = shapes.squeeze(
        state.flow, shapes.part(state.flow, xs[0], op.params["axis"], 0, 1), [op.params["axis"]]
    )
    state.flow.keep(xs[0], "a position that is picked out", [op.params["axis"]])
    return [found] * len(op.outputs)


def _split(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    found, start = [], 0
    for size in op.params["sizes"]:
        found.append(shapes.part(state.flow, xs[0], op.params["axis"], start, size))
        start += size
    return found


def _slice(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    value, shape = xs[0], shape_of(state, op)
    strides = op.params["strides"] or (1,) * value.ndim
    for axis, start in enumerate(op.params["start_indices"]):
        if not same(value.shape[axis], shape[axis]):
            value = shapes.part(state.flow, value, axis, start, shape[axis], strides[axis])
    return [value]


def _tile(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    value = xs[0]
    for axis, times in enumerate(op.params["reps"]):
        if times == 1:
            continue
        if value.axes[axis] is None:
            value = shapes.resized(state.flow, value, axis, value.shape[axis] * times)
        else:
            value = shapes.take(
                state.flow, value, axis, np.tile(np.arange(value.shape[axis]), times)
            )
    return [value]


def _filled_with(filler: Value) -> float | None:
    """Returns the number that fills, where it is known and real."""
    known = filler.known
    if known is None or (np.iscomplexobj(known) and np.imag(known) != 0):
        return None
    return float(np.real(known))


def _pad(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    value, filler = xs
    fill = _filled_with(filler)
    for axis, (low, high, inside) in enumerate(op.params["padding_config"]):
        if inside:
            state.flow.keep(value, "padding between positions", [axis])
            value = shapes.resized(state.flow, value, axis, shape_of(state, op)[axis])
        elif low or high:
            value = shapes.pad(state.flow, value, axis, low, high, fill)
    # Padding along one axis also fills positions removed along the others.
    padded = [a for a, c in enumerate(op.params["padding_config"]) if max(c) > 0]
    at_removed = tuple(
        d if (fill is not None and all_are(d, fill)) or set(padded) <= {a} else UNKNOWN
        for a, d in enumerate(value.at_removed)
    )
    return [dataclasses.replace(value, at_removed=at_removed, leaf=None)]


def all_are(at_removed: Any, number: float) -> bool:
    """Whether all removed positions hold a number."""
    return bool((np.asarray(at_removed) == number).all())


def shape_of(state: Walk, op: Op) -> tuple[Any, ...]:
    """Returns the shape of the first result of an operation."""
    return tuple(state.program.avals[op.outputs[0]].shape)


def same(a: Any, b: Any) -> bool:
    """Whether two sizes are equal; symbolic ones too."""
    return a is b or bool(a == b)


RULES: dict[str, Rule] = {
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "expand_dims": _expand_dims,
    "rev": _rev,
    "concatenate": _concatenate,
    "stack": _stack,
    "split": _split,
    "unstack": _unstack,
    "slice": _slice,
    "tile": _tile,
    "pad": _pad,
}
