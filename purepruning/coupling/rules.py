"""One rule for every primitive: which method of the flow it is.

``RULES[name](walk, op, operands)`` returns the values of the results. A primitive that is neither
here nor element by element keeps all its operands whole, and is reported.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from purepruning.coupling.flow import Flow, Value, numbers_as_even, whole, without_even
from purepruning.coupling.primitives import ELEMENTWISE, PASSING, SOURCES
from purepruning.coupling.program import Op, Program, elementwise_only, is_floating
from purepruning.coupling.scalars import UNKNOWN

#: Scanned parameters of at most this many layers have units of their own for every layer.
LAYERS = 256


@dataclasses.dataclass
class Trace:
    """What was found of one program: the value of every variable, and the traces of inner programs.

    An operation that runs an inner program once for every layer has one trace for each.
    """

    number: int
    values: dict[int, Value]
    inner: dict[int, list[list[Trace]]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Walk:
    """The state of walking through a program: what rules need besides their operands."""

    flow: Flow
    program: Program
    trace: Trace
    uses: dict[str, int]
    index: int = 0
    counter: list[int] = dataclasses.field(default_factory=lambda: [0])
    depth: int = 0

    @property
    def where(self) -> tuple[int, int]:
        """What the present operation is called in the flow's records."""
        return self.trace.number, self.index

    def enter(self, program: Program, operands: list[Value]) -> tuple[list[Value], Trace]:
        """Returns the results of an inner program, and its trace."""
        return walk(program, operands, self.flow, self.uses, self.counter, self.depth + 1)

    def concrete(self, number: int) -> np.ndarray | None:
        """Returns the array a variable is, if it depends on constants only."""
        return concrete(self.program, number)


def walk(
    program: Program,
    operands: list[Value],
    flow: Flow,
    uses: dict[str, int],
    counter: list[int] | None = None,
    depth: int = 0,
) -> tuple[list[Value], Trace]:
    """Returns the values of a program's results, and of all its variables."""
    counter = [0] if counter is None else counter
    counter[0] += 1
    values = dict(zip(program.inputs, operands, strict=True))
    for number, constant in program.constants.items():
        values[number] = flow.constant(
            program.avals[number].shape,
            np.asarray(constant) if np.ndim(constant) == 0 and _plain(constant) else None,
        )
    trace = Trace(counter[0], values)
    state = Walk(flow, program, trace, uses, 0, counter, depth)
    for index, op in enumerate(program.ops):
        state.index = index
        found = _apply(state, op, [values[n] for n in op.inputs])
        for number, value in zip(op.outputs, found, strict=True):
            values[number] = value
    return [values[n] for n in program.outputs], trace


def _plain(constant: Any) -> bool:
    dtype = getattr(constant, "dtype", None)
    return dtype is None or not jnp.issubdtype(dtype, jax.dtypes.extended)


def _apply(state: Walk, op: Op, operands: list[Value]) -> list[Value]:
    shapes = [state.program.avals[n].shape for n in op.outputs]
    if op.name in ELEMENTWISE:
        return _elementwise(state, op, operands, shapes)
    rule = RULES.get(op.name)
    if op.name.startswith("random_") and rule is None:
        rule = _source if op.name in SOURCES else None
        if rule is None:
            for value in operands:
                state.flow.keep(value, "what keys are made of")
            return [whole(shape) for shape in shapes]
    found = rule(state, op, operands) if rule is not None else None
    if found is None:
        return state.flow.opaque(op.name, operands, shapes)
    return found


def _elementwise(state: Walk, op: Op, operands: list[Value], shapes: list[Any]) -> list[Value]:
    name, flow = ELEMENTWISE[op.name], state.flow
    if len(operands) > 1 and name == "identity":
        return operands
    if op.name == "bitcast_convert_type" and len(shapes[0]) != operands[0].ndim:
        return flow.opaque(op.name, operands, shapes)
    dtypes = [state.program.avals[n].dtype for n in op.inputs]
    result = state.program.avals[op.outputs[0]].dtype
    if name == "not" and jnp.issubdtype(dtypes[0], jnp.integer):
        name = "bits"
    value = flow.elementwise(name, operands, shapes[0], state.where)
    if _rounds(op.name, dtypes, result):
        value = numbers_as_even(value)
    if name == "identity":
        source = operands[0]
        known = source.known if np.size(source.known) == 1 else None
        numeric = not jnp.issubdtype(result, jnp.complexfloating)
        if known is not None and numeric and op.name == "convert_element_type":
            known = np.asarray(known).astype(result)
        leaf = source.leaf if op.name in PASSING else None
        value = dataclasses.replace(value, known=known, leaf=leaf, summed=source.summed)
    elif op.name in ("div", "mul") and len(operands) == 2:
        _note_mean(state, op, operands)
    return [value]


def _rounds(name: str, dtypes: Sequence[Any], result: Any) -> bool:
    """Whether an operation may give another number than it does with real numbers."""
    if name == "convert_element_type":
        with jax.numpy_dtype_promotion("standard"):
            return bool(jnp.promote_types(dtypes[0], result) != result)
    return name in ("round", "reduce_precision") or (
        jnp.issubdtype(result, jnp.integer) and jnp.issubdtype(dtypes[-1], jnp.integer)
    )


def _note_mean(state: Walk, op: Op, operands: list[Value]) -> None:
    left, right = operands
    for value, by in ((left, right), (right, left)) if op.name == "mul" else ((left, right),):
        if value.summed is None:
            continue
        known = by.known if by.known is not None else _uniform_of(by)
        if known is None or np.size(known) != 1:
            continue
        factor = float(np.asarray(known).reshape(()))
        if factor == 0:
            continue
        state.flow.scaled_sum(value, factor if op.name == "div" else 1 / factor, state.where)
        return


def _uniform_of(value: Value) -> float | None:
    numbers = {float(d) for d in value.dead if np.ndim(d) == 0}
    if value.ndim and len(numbers) == 1 and math.isfinite(found := numbers.pop()):
        return found if value.origins is not None and not any(value.origins) else None
    return None


# Shapes.


def _broadcast(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    return [state.flow.broadcast(xs[0], _shape(state, op), op.params["broadcast_dimensions"])]


def _reshape(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    if op.params.get("dimensions") is not None:
        return None
    return [state.flow.reshape(xs[0], _shape(state, op))]


def _transpose(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    return [state.flow.transpose(xs[0], op.params["permutation"])]


def _squeeze(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    return [state.flow.squeeze(xs[0], op.params["dimensions"])]


def _expand_dims(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    return [state.flow.reshape(xs[0], _shape(state, op))]


def _rev(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    value = xs[0]
    for axis in op.params["dimensions"]:
        if value.axes[axis] is not None:
            value = state.flow.take(value, axis, np.arange(value.shape[axis])[::-1])
    return [value]


def _concatenate(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    return [state.flow.concatenate(xs, op.params["dimension"])]


def _stack(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    axis = op.params["axis"]
    value = state.flow.unify(xs)
    order: list[int | None] = [*range(value.ndim)]
    order.insert(axis, None)
    found = state.flow.select_axes(value, order)
    return [
        dataclasses.replace(
            found,
            shape=_shape(state, op),
            dead=tuple(UNKNOWN if a is None else value.dead[a] for a in order),
        )
    ]


def _unstack(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    found = state.flow.squeeze(state.flow.part(xs[0], op.params["axis"], 0, 1), [op.params["axis"]])
    state.flow.keep(xs[0], "a position that is picked out", [op.params["axis"]])
    return [found] * len(op.outputs)


def _split(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    found, start = [], 0
    for size in op.params["sizes"]:
        found.append(state.flow.part(xs[0], op.params["axis"], start, size))
        start += size
    return found


def _slice(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    value, shape = xs[0], _shape(state, op)
    strides = op.params["strides"] or (1,) * value.ndim
    for axis, start in enumerate(op.params["start_indices"]):
        if not _same(value.shape[axis], shape[axis]):
            value = state.flow.part(value, axis, start, shape[axis], strides[axis])
    return [value]


def _tile(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    value = xs[0]
    for axis, times in enumerate(op.params["reps"]):
        if times == 1:
            continue
        if value.axes[axis] is None:
            value = state.flow.resized(value, axis, value.shape[axis] * times)
        else:
            value = state.flow.take(value, axis, np.tile(np.arange(value.shape[axis]), times))
    return [value]


def _pad(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    value, filler = xs
    fill = None if filler.known is None else float(filler.known)
    for axis, (low, high, inside) in enumerate(op.params["padding_config"]):
        if inside:
            state.flow.keep(value, "padding between positions", [axis])
            value = state.flow.resized(value, axis, _shape(state, op)[axis])
        elif low or high:
            value = state.flow.pad(value, axis, low, high, fill)
    # Padding along one axis also fills positions removed along the others.
    padded = [a for a, c in enumerate(op.params["padding_config"]) if max(c) > 0]
    dead = tuple(
        d if (fill is not None and _all(d, fill)) or set(padded) <= {a} else UNKNOWN
        for a, d in enumerate(value.dead)
    )
    return [dataclasses.replace(value, dead=dead, leaf=None)]


def _all(dead: Any, number: float) -> bool:
    return bool((np.asarray(dead) == number).all())


# Reductions.


def _reduce_sum(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    return [state.flow.reduce_sum(xs[0], op.params["axes"], state.where)]


def _reduce_whole(what: str) -> Callable[..., list[Value] | None]:
    def rule(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
        return [state.flow.reduce_whole(x, op.params["axes"], what) for x in xs]

    return rule


def _running_sum(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    return [state.flow.running_sum(xs[0], op.params["axis"], state.where)]


def _along(what: str, key: str) -> Callable[..., list[Value] | None]:
    def rule(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
        if len(xs) > 1:
            joint = state.flow.unify(xs)
            xs = [dataclasses.replace(x, axes=joint.axes) for x in xs]
        shapes = [state.program.avals[n].shape for n in op.outputs]
        axis = op.params.get(key, -1) % max(xs[0].ndim, 1)
        source = xs if len(xs) == len(shapes) else [xs[0]] * len(shapes)
        # Sums of exponentials of zeros are logarithms, and the indices of zeros are 0, 1, 2, ...
        return [
            state.flow.along_whole(
                x, [axis], s, what, op.name != "cumlogsumexp" and (op.name != "top_k" or i == 0)
            )
            for i, (x, s) in enumerate(zip(source, shapes, strict=True))
        ]

    return rule


def _fft(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    n = len(op.params["fft_lengths"])
    axes = range(xs[0].ndim - n, xs[0].ndim)
    return [state.flow.along_whole(xs[0], axes, _shape(state, op), "a Fourier transform")]


def _window(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    if len(xs) > 1:
        return None
    sizes = op.params["window_dimensions"]
    strides = op.params["window_strides"]
    axes = [
        a
        for a, n in enumerate(sizes)
        if n != 1 or strides[a] != 1 or not _same(xs[0].shape[a], _shape(state, op)[a])
    ]
    return [state.flow.along_whole(xs[0], axes, _shape(state, op), "a window")]


# Products.


def _dot_general(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    (left, right), (batch_left, batch_right) = op.params["dimension_numbers"]
    pairs = list(zip(left, right, strict=True))
    batch = list(zip(batch_left, batch_right, strict=True))
    return [state.flow.contract(xs[0], xs[1], pairs, batch, state.where)]


def _convolution(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    if op.params["batch_group_count"] != 1:
        return None
    numbers = op.params["dimension_numbers"]
    left, right, out = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
    once = xs[1].leaf is not None and state.uses.get(xs[1].leaf[0], 0) == 1 and state.depth == 0
    return [
        state.flow.convolve(
            xs[0],
            xs[1],
            left_axes=(left[0], left[1]),
            right_axes=(right[0], right[1]),
            groups=op.params["feature_group_count"],
            shape=_shape(state, op),
            out_axes=(out[0], out[1]),
            where=state.where,
            once=once,
        )
    ]


# Picking positions.


def _gather(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    value, indices = xs
    n = op.params["dimension_numbers"]
    sizes, shape, flow = op.params["slice_sizes"], _shape(state, op), state.flow
    offset_axes = [
        a
        for a in range(value.ndim)
        if a not in n.collapsed_slice_dims and a not in n.operand_batching_dims
    ]
    batch_out = [d for d in range(len(shape)) if d not in n.offset_dims]
    axes: list[Any] = [None] * len(shape)
    dead: list[Any] = [UNKNOWN] * len(shape)
    batch_axes = list(range(indices.ndim - 1))  # the last axis of the indices holds coordinates
    flow.keep(indices, "coordinates", [indices.ndim - 1])
    for d, a in zip(batch_out, batch_axes, strict=True):
        axes[d] = indices.axes[a]
    for a, b in zip(n.operand_batching_dims, n.start_indices_batching_dims, strict=True):
        flow.atoms.same(value.axes[a], indices.axes[b])
        d = batch_out[b]
        axes[d] = None if value.axes[a] is None else axes[d]
        dead[d] = 0.0 if _all(value.dead[a], 0.0) and not op.params["fill_value"] else UNKNOWN
    for d, a in zip(n.offset_dims, offset_axes, strict=True):
        if _same(sizes[a], value.shape[a]):
            axes[d] = value.axes[a]
            dead[d] = 0.0 if _all(value.dead[a], 0.0) and not op.params["fill_value"] else UNKNOWN
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
                line = without_even(value).dead[a]
                dead[d] = np.asarray(line)[positions] if np.ndim(line) else line
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
    return [Value(tuple(shape), tuple(axes), tuple(dead), None, origins)]


def _scatter(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    value, indices, updates = xs
    n = op.params["dimension_numbers"]
    flow = state.flow
    if op.name == "scatter" and op.params["update_jaxpr"] is not None:
        return None  # scatter_apply: a function of what is there
    places = written_places(state.program, op, value, updates)
    if places is not None:
        axis, along, taken = places
        moved = [a for a in range(updates.ndim) if a not in along]
        order = [*moved[:axis], *along, *moved[axis:]]
        flat = flow.transpose(updates, order)
        size = math.prod(updates.shape[a] for a in along)
        flat = flow.reshape(flat, (*value.shape[:axis], size, *value.shape[axis + 1 :]))
        return [flow.take(flow.concatenate([value, flat], axis), axis, taken)]
    flow.keep(indices, "coordinates")
    window = [
        a
        for a in range(value.ndim)
        if a not in n.inserted_window_dims and a not in n.operand_batching_dims
    ]
    axes, dead = list(value.axes), list(value.dead)
    used = set()
    for u, a in zip(n.update_window_dims, window, strict=True):
        used.add(u)
        if _same(updates.shape[u], value.shape[a]):
            flow.atoms.same(value.axes[a], updates.axes[u])
            if updates.axes[u] is None:
                axes[a] = None
            both = _all(value.dead[a], 0.0) and _all(updates.dead[u], 0.0)
            dead[a] = 0.0 if both else UNKNOWN
        else:
            flow.keep(value, "a part that is written to", [a])
            flow.keep(updates, "a part that is written", [u])
            axes[a] = None
    rest = [u for u in range(updates.ndim) if u not in used]
    flow.keep(updates, "written by index", rest)
    for a in (*n.inserted_window_dims, *n.operand_batching_dims):
        flow.keep(value, "written by index", [a])
        axes[a] = None
    return [Value(value.shape, tuple(axes), tuple(dead))]


def written_places(
    program: Program, op: Op, value: Value, updates: Value
) -> tuple[int, list[int], np.ndarray] | None:
    """Returns where constants say that one axis is overwritten, if that is all a scatter does.

    The axis; the axes of the updates that run along it; and for every position of the axis where it
    is found in the value followed by the updates.
    """
    n = op.params["dimension_numbers"]
    if op.name != "scatter" or n.operand_batching_dims or len(n.scatter_dims_to_operand_dims) != 1:
        return None
    (axis,) = n.scatter_dims_to_operand_dims
    starts = concrete(program, op.inputs[1])
    window = [a for a in range(value.ndim) if a not in n.inserted_window_dims]
    sizes = dict(zip(window, (updates.shape[u] for u in n.update_window_dims), strict=True))
    if starts is None or value.axes[axis] is None or starts.shape[-1:] != (1,):
        return None
    if any(not _same(size, value.shape[a]) for a, size in sizes.items() if a != axis):
        return None
    if set(n.inserted_window_dims) - {axis}:
        return None
    along = [u for u in range(updates.ndim) if u not in n.update_window_dims]
    along += [u for u, a in zip(n.update_window_dims, window, strict=True) if a == axis]
    width = sizes.get(axis, 1)
    places = (starts.reshape(-1, 1) + np.arange(width)).reshape(-1)
    if places.size and not (places.min() >= 0 and places.max() < value.shape[axis]):
        return None
    taken = np.arange(value.shape[axis])
    for i, place in enumerate(places):
        taken[place] = value.shape[axis] + i
    return axis, along, taken


def _dynamic_slice(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    value, shape = xs[0], _shape(state, op)
    for axis in range(value.ndim):
        if _same(value.shape[axis], shape[axis]):
            continue
        start = state.concrete(op.inputs[1 + axis])
        if start is not None and value.axes[axis] is not None:
            first = int(np.clip(start, 0, value.shape[axis] - shape[axis]))
            value = state.flow.part(value, axis, first, shape[axis])
        else:
            state.flow.keep(value, "a part whose place is computed", [axis])
            value = state.flow.resized(value, axis, shape[axis])
    return [without_even(value)]


def _dynamic_update_slice(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    value, update = xs[:2]
    partial = [a for a in range(value.ndim) if not _same(value.shape[a], update.shape[a])]
    if len(partial) == 1 and value.axes[partial[0]] is not None:
        start = known_start(state.program, op, partial[0], value, update)
        if start is not None:
            return [state.flow.write(value, update, partial[0], start)]
    axes, dead = list(value.axes), list(value.dead)
    for a in range(value.ndim):
        if _same(value.shape[a], update.shape[a]):
            state.flow.atoms.same(value.axes[a], update.axes[a])
            if update.axes[a] is None:
                axes[a] = None
            both = _all(value.dead[a], 0.0) and _all(update.dead[a], 0.0)
            dead[a] = 0.0 if both else UNKNOWN
        else:
            state.flow.keep(value, "a part that is written to", [a])
            state.flow.keep(update, "a part that is written", [a])
            axes[a] = None
    return [Value(value.shape, tuple(axes), tuple(dead))]


def known_start(program: Program, op: Op, axis: int, value: Value, update: Value) -> int | None:
    """Returns where a part is written, if that is a constant."""
    start = concrete(program, op.inputs[2 + axis])
    if start is None:
        return None
    return int(np.clip(start, 0, value.shape[axis] - update.shape[axis]))


def _source(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    for value in xs:
        state.flow.keep(value, "what random numbers are drawn from")
    return [state.flow.constant(state.program.avals[n].shape) for n in op.outputs]


# Programs inside programs.


def _call(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    if not elementwise_only(op.inner[0]):
        xs = [without_even(x) for x in xs]
    found, trace = state.enter(op.inner[0], xs)
    state.trace.inner[state.index] = [[trace]]
    return found if elementwise_only(op.inner[0]) else [without_even(x) for x in found]


def _custom_jvp(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    found = _call(state, op, xs)
    if found is None or len(op.inner) == 1:
        return found
    # The tangents are like what they are tangents of; what they hold is not known.
    slopes = [_slope(x) for x in _differentiable(state, op.inputs, xs)]
    derivative, trace = state.enter(op.inner[1], [*(without_even(x) for x in xs), *slopes])
    state.trace.inner[state.index].append([trace])
    for result, slope in zip(_differentiable(state, op.outputs, found), derivative, strict=True):
        state.flow.unify([result, slope], "a derivative")
    return found


def _custom_vjp(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    found = _call(state, op, xs)
    if found is None or len(op.inner) == 1:
        return found
    slopes = [_slope(x) for x in _differentiable(state, op.outputs, found)]
    derivative, trace = state.enter(op.inner[1], [*(without_even(x) for x in xs), *slopes])
    state.trace.inner[state.index].append([trace])
    for operand, slope in zip(_differentiable(state, op.inputs, xs), derivative, strict=True):
        state.flow.unify([operand, slope], "a derivative")
    return found


def _slope(value: Value) -> Value:
    return Value(value.shape, value.axes, (UNKNOWN,) * value.ndim)


def _differentiable(state: Walk, numbers: Sequence[int], values: list[Value]) -> list[Value]:
    return [v for n, v in zip(numbers, values, strict=True) if is_floating(state.program.avals[n])]


def _cond(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    state.flow.keep(xs[0], "what a branch is chosen by")
    given = [without_even(x) for x in xs[1:]]
    branches = [state.enter(program, given) for program in op.inner]
    state.trace.inner[state.index] = [[trace] for _, trace in branches]
    return [
        state.flow.unify(list(values)) for values in zip(*(v for v, _ in branches), strict=True)
    ]


def _while(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    n, m = op.params["cond_nconsts"], op.params["body_nconsts"]
    xs = [without_even(x) for x in xs]
    cond_consts, body_consts, carry = xs[:n], xs[n : n + m], _carried(xs[n + m :])
    for _ in range(8):
        conditions, cond_trace = state.enter(op.inner[0], [*cond_consts, *carry])
        state.flow.keep(conditions[0], "what a loop ends by")
        found, trace = state.enter(op.inner[1], [*body_consts, *carry])
        state.trace.inner[state.index] = [[cond_trace], [trace]]
        joined = [
            state.flow.unify([a, b], "carried by a loop") for a, b in zip(carry, found, strict=True)
        ]
        if _settled(carry, joined):
            return joined
        carry = joined
    return None


def _scan(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    n, m = op.params["num_consts"], op.params["num_carry"]
    length, flow = op.params["length"], state.flow
    xs = [without_even(x) for x in xs]
    consts, carry, scanned = xs[:n], _carried(xs[n : n + m]), xs[n + m :]
    own = {
        i: x.leaf
        for i, x in enumerate(scanned)
        if x.leaf is not None
        and state.uses.get(x.leaf[0], 0) == 1
        and state.depth == 0
        and isinstance(length, int)
        and 1 < length <= LAYERS
    }
    for x in scanned:
        flow.keep(x, "an axis that is scanned over", [0])
    slices: list[list[Value]] = []
    for _layer in range(length if own else 1):
        one = []
        for i, x in enumerate(scanned):
            inner = flow.select_axes(x, range(1, x.ndim))
            if i in own:
                axes = tuple(flow.atoms.fresh(k) if k > 1 else None for k in x.shape[1:])
                inner = dataclasses.replace(inner, axes=axes)
            one.append(inner)
        slices.append(one)
    for i, (path, order) in own.items():
        for a in range(1, scanned[i].ndim):
            if scanned[i].axes[a] is None:
                continue
            stacked = np.stack([np.asarray(s[i].axes[a - 1]) for s in slices])
            flow.ragged[path, order[a]] = (order[0], stacked)
            flow.atoms.keep(scanned[i].axes[a], "of its own for every layer")
            flow.even.append(stacked[..., 0])
    for _ in range(8):
        start, traces, outputs = carry, [], []
        for one in slices:
            found, trace = state.enter(op.inner[0], [*consts, *carry, *one])
            traces.append(trace)
            carry = [
                flow.unify([a, b], "carried by a loop")
                for a, b in zip(carry, found[:m], strict=True)
            ]
            outputs.append(found[m:])
        state.trace.inner[state.index] = [traces]
        if _settled(start, carry):
            break
    else:
        return None
    stacked_out = []
    for values in zip(*outputs, strict=True):
        one_value = flow.unify(list(values), "stacked by a loop")
        stacked_out.append(
            Value(
                (length, *one_value.shape),
                (None, *one_value.axes),
                (UNKNOWN, *one_value.dead),
            )
        )
    return [*carry, *stacked_out]


def _carried(values: list[Value]) -> list[Value]:
    return [
        Value(v.shape, v.axes, tuple(0.0 if _all(d, 0.0) else UNKNOWN for d in v.dead))
        for v in values
    ]


def _settled(before: list[Value], after: list[Value]) -> bool:
    return all(
        np.array_equal(np.asarray(c, float), np.asarray(d, float), equal_nan=True)
        for a, b in zip(before, after, strict=True)
        for c, d, x in zip(a.dead, b.dead, b.axes, strict=True)
        if x is not None
    )


def _integer_pow(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    name = "positive_pow" if op.params["y"] > 0 else "power"
    name = "square" if op.params["y"] == 2 else name
    return [state.flow.elementwise(name, xs, _shape(state, op), state.where)]


def _shape(state: Walk, op: Op) -> tuple[Any, ...]:
    return tuple(state.program.avals[op.outputs[0]].shape)


def _same(a: Any, b: Any) -> bool:
    return a is b or bool(a == b)


RULES: dict[str, Callable[..., list[Value] | None]] = {
    "integer_pow": _integer_pow,
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
    "reduce_sum": _reduce_sum,
    "reduce_max": _reduce_whole("a maximum over it"),
    "reduce_min": _reduce_whole("a minimum over it"),
    "reduce_prod": _reduce_whole("a product over it"),
    "reduce_and": _reduce_whole("all over it"),
    "reduce_or": _reduce_whole("any over it"),
    "reduce_xor": _reduce_whole("xor over it"),
    "argmax": _reduce_whole("an argmax over it"),
    "argmin": _reduce_whole("an argmin over it"),
    "cumsum": _running_sum,
    "cumprod": _along("a running product", "axis"),
    "cummax": _along("a running maximum", "axis"),
    "cummin": _along("a running minimum", "axis"),
    "cumlogsumexp": _along("a running sum of exponentials", "axis"),
    "sort": _along("a sort", "dimension"),
    "top_k": _along("a sort", "axis"),
    "fft": _fft,
    "reduce_window_max": _window,
    "reduce_window_min": _window,
    "reduce_window_sum": _window,
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
    "gather": _gather,
    "scatter": _scatter,
    "scatter-add": _scatter,
    "scatter_add": _scatter,
    "scatter-mul": _scatter,
    "scatter-max": _scatter,
    "scatter-min": _scatter,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "iota": _source,
    "random_bits": _source,
    "random_gamma": _source,
    "rng_uniform": _source,
    "cond": _cond,
    "while": _while,
    "scan": _scan,
    "remat2": _call,
    "checkpoint": _call,
    "custom_jvp_call": _custom_jvp,
    "custom_vjp_call": _custom_vjp,
}


def leaf_uses(program: Program, paths: dict[int, str]) -> dict[str, int]:
    """Returns how often each parameter is used, apart from conversions and reordered axes."""
    readers: dict[int, list[Op]] = {}
    for op in program.ops:
        for number in dict.fromkeys(op.inputs):
            readers.setdefault(number, []).append(op)
    outputs = collections.Counter(program.outputs)

    def uses(number: int) -> int:
        total = outputs[number]
        for op in readers.get(number, ()):
            if op.name in PASSING:
                total += uses(op.outputs[0])
            elif op.name in ("remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call"):
                total += 2  # inside, an operation is not told from another by its program alone
            else:
                total += op.inputs.count(number)
        return total

    return {path: uses(number) for number, path in paths.items()}


def concrete(program: Program, number: int, limit: int = 1 << 20) -> np.ndarray | None:
    """Returns the array a variable is, if it depends on constants only and is not large."""
    if number in program.constants:
        return np.asarray(program.constants[number])
    makers = {out: op for op in program.ops for out in op.outputs}
    memory: dict[int, Any] = dict(program.constants)

    def known(n: int) -> bool:
        stack, seen = [n], set()
        while stack:
            n = stack.pop()
            if n in memory or n in seen:
                continue
            seen.add(n)
            if n not in makers or makers[n].inner:
                return False
            shape = program.avals[n].shape
            if not all(isinstance(k, int) for k in shape) or math.prod(shape) > limit:
                return False
            stack += makers[n].inputs
        return True

    def evaluate(n: int) -> Any:
        if n not in memory:
            op = makers[n]
            found = op.primitive.bind(*(evaluate(i) for i in op.inputs), **op.params)
            for out, value in zip(
                op.outputs, found if op.primitive.multiple_results else [found], strict=True
            ):
                memory[out] = value
        return memory[n]

    if not known(number):
        return None
    with jax.ensure_compile_time_eval():
        try:
            return np.asarray(evaluate(number))
        except Exception:  # a key, or a primitive that cannot run alone: not a constant to us
            return None
