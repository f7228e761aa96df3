"""How atoms flow through programs inside programs: calls, branches, loops."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from purepruning.coupling import shapes
from purepruning.coupling.removed_values import UNKNOWN
from purepruning.coupling.value import Value, without_uniform
from purepruning.jaxpr.internals import scan_sizes
from purepruning.jaxpr.program import Op, elementwise_only, is_floating
from purepruning.jaxpr.rules.shapes import all_are
from purepruning.jaxpr.walk import Rule, Walk

#: Scanned parameters of at most this many layers have units of their own for every layer.
LAYERS = 256


# Programs inside programs.
def _call(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    if not elementwise_only(op.inner[0]):
        xs = [without_uniform(x) for x in xs]
    found, trace = state.enter(op.inner[0], xs)
    state.trace.inner[state.index] = [[trace]]
    return found if elementwise_only(op.inner[0]) else [without_uniform(x) for x in found]


def _custom(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    """A custom derivative: from tangents of operands to those of results, or the way back."""
    found = _call(state, op, xs)
    if found is None or len(op.inner) == 1:
        return found
    operands = _differentiable(state, op.inputs, xs)
    results = _differentiable(state, op.outputs, found)
    forward = op.name == "custom_jvp_call"
    start, end = (operands, results) if forward else (results, operands)
    # The tangents are like what they are tangents of; what they hold is not known.
    slopes = [_slope(x) for x in start]
    derivative, trace = state.enter(op.inner[1], [*(without_uniform(x) for x in xs), *slopes])
    state.trace.inner[state.index].append([trace])
    for value, slope in zip(end, derivative, strict=True):
        state.flow.unify([value, slope], "a derivative")
    return found


def _slope(value: Value) -> Value:
    return Value(value.shape, value.axes, (UNKNOWN,) * value.ndim)


def _differentiable(state: Walk, numbers: Sequence[int], values: list[Value]) -> list[Value]:
    return [v for n, v in zip(numbers, values, strict=True) if is_floating(state.program.avals[n])]


def _cond(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    state.flow.keep(xs[0], "what a branch is chosen by")
    given = [without_uniform(x) for x in xs[1:]]
    branches = [state.enter(program, given) for program in op.inner]
    state.trace.inner[state.index] = [[trace] for _, trace in branches]
    return [
        state.flow.unify(list(values)) for values in zip(*(v for v, _ in branches), strict=True)
    ]


def _while(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    n, m = op.params["cond_nconsts"], op.params["body_nconsts"]
    xs = [without_uniform(x) for x in xs]
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
    n, m = scan_sizes(op.params)
    length, flow = op.params["length"], state.flow
    xs = [without_uniform(x) for x in xs]
    consts, carry, scanned = xs[:n], _carried(xs[n : n + m]), xs[n + m :]
    own = {
        i: x.leaf
        for i, x in enumerate(scanned)
        if x.leaf is not None
        and is_floating(state.program.avals[op.inputs[n + m + i]])
        and state.uses.get(x.leaf[0], 0) == 1
        and state.depth == 0
        and isinstance(length, int)
        and 1 < length <= LAYERS
    }
    for x in scanned:
        flow.keep(x, "an axis that is scanned over", [0])
        if x.origins is not None:
            flow.stacks.update(x.origins[0])
    slices: list[list[Value]] = []
    for _layer in range(length if own else 1):
        one = []
        for i, x in enumerate(scanned):
            inner = shapes.select_axes(flow, x, range(1, x.ndim))
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
            flow.by_block[path, order[a]] = (order[0], stacked)
            flow.atoms.keep(scanned[i].axes[a], "of its own for every layer")
            flow.equal_parts.append(stacked[..., 0])
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
                (UNKNOWN, *one_value.at_removed),
            )
        )
    return [*carry, *stacked_out]


def _carried(values: list[Value]) -> list[Value]:
    return [
        Value(v.shape, v.axes, tuple(0.0 if all_are(d, 0.0) else UNKNOWN for d in v.at_removed))
        for v in values
    ]


def _settled(before: list[Value], after: list[Value]) -> bool:
    return all(
        np.array_equal(np.asarray(c, float), np.asarray(d, float), equal_nan=True)
        for a, b in zip(before, after, strict=True)
        for c, d, x in zip(a.at_removed, b.at_removed, b.axes, strict=True)
        if x is not None
    )


RULES: dict[str, Rule] = {
    "cond": _cond,
    "while": _while,
    "scan": _scan,
    "remat2": _call,
    "checkpoint": _call,
    "custom_jvp_call": _custom,
    "custom_vjp_call": _custom,
}
