"""How atoms flow through recurrent layers."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from purepruning.coupling import products, shapes
from purepruning.coupling.removed_values import UNKNOWN
from purepruning.coupling.value import Value
from purepruning_interop.torch.program import Op
from purepruning_interop.torch.rules.reductions import keep_unless_zero
from purepruning_interop.torch.walk import Walk, rules_of


# Recurrence.
def _recurrent(s: Walk, op: Op) -> list[Value] | None:
    """Returns what a stack of recurrent layers gives: hidden units of all layers are coupled."""
    if "params" not in op.args or "hx" not in op.args or "data" in op.args:
        return None
    gates = {"lstm": 4, "gru": 3}.get(op.name, 1)
    states = op.args["hx"] if isinstance(op.args["hx"], list) else [op.args["hx"]]
    values = [s.value(x) for x in states]
    hidden = values[0].shape[2]
    projected = op.name == "lstm" and values[1].shape[2] != hidden
    biased, layers = op.args["has_biases"], op.args["num_layers"]
    directions = 2 if op.args["bidirectional"] else 1
    params = [s.value(v) for v in op.args["params"]]
    per = len(params) // (layers * directions)
    if per != (4 if biased else 2) + projected:
        return None
    flow = s.flow
    value = s.value(op.args["input"])
    feature = value.ndim - 1
    units = params[1].axes[1]  # columns of the first recurrence
    # Of a projection: what it gives are the units, and what it reads, the cells, are others.
    cells = params[per - 1].axes[1] if projected else units
    n_cells = values[-1].shape[2]
    for i, v in enumerate(values):
        own = cells if i else units
        flow.atoms.same(v.axes[2], own, "hidden units of a recurrence")
        flow.keep(v, "layers of a recurrence", [0, 1])
        keep_unless_zero(s, v, 2, "a state that is not zero where it is masked")
    for axis in range(feature):
        flow.keep(value, "steps of a recurrence", [axis])
    for i in range(layers * directions):
        if i and i % directions == 0:
            value = _hidden(s, value, units, hidden, directions)
        weight, inner, *biases = params[i * per : (i + 1) * per]
        outer = biases.pop() if projected else None
        steps = math.prod(n for n in value.shape[:feature] if isinstance(n, int))
        lead = dataclasses.replace(
            value,
            shape=(steps, value.shape[feature]),
            axes=(None, value.axes[feature]),
            origins=None,
            at_removed=(UNKNOWN, value.at_removed[feature]),
        )
        products.contract(flow, lead, weight, [(1, 1)], [], s.where(f"input {i}"))
        state = Value((steps, hidden), (None, units), (UNKNOWN, 0.0))
        products.contract(flow, state, inner, [(1, 1)], [], s.where(f"state {i}"))
        for v in (weight, inner, *biases):
            rows = shapes.split_axis(flow, v, 0, (gates, n_cells), "gates of a recurrence")
            flow.atoms.keep(rows[0], "gates of a recurrence")
            flow.atoms.same(rows[1], cells, "hidden units of a recurrence")
        if outer is not None:
            cell = Value((steps, n_cells), (None, cells), (UNKNOWN, 0.0))
            products.contract(flow, cell, outer, [(1, 1)], [], s.where(f"projection {i}"))
            flow.atoms.same(outer.axes[0], units, "hidden units of a recurrence")
    found = _hidden(s, value, units, hidden, directions)
    out = dataclasses.replace(found, shape=s.shape(op))
    last = [
        Value(s.shape(op, i), (None, None, units if i == 1 else cells), (UNKNOWN, UNKNOWN, 0.0))
        for i in range(1, len(op.outputs))
    ]
    return [out, *last]


def _hidden(s: Walk, value: Value, units: Any, hidden: int, directions: int) -> Value:
    one = Value(
        (*value.shape[:-1], hidden),
        (*(None,) * (value.ndim - 1), units),
        (*(UNKNOWN,) * (value.ndim - 1), 0.0),
    )
    return shapes.concatenate(s.flow, [one] * directions, value.ndim - 1) if directions > 1 else one


RULES = rules_of(
    (_recurrent, "lstm gru rnn_tanh rnn_relu"),
)
