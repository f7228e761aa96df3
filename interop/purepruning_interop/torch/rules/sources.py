"""How atoms flow from operators that make tensors of sizes."""

from __future__ import annotations

import numpy as np

from purepruning.coupling import shapes
from purepruning.coupling.value import Value
from purepruning_interop.torch.program import Op
from purepruning_interop.torch.walk import Walk, rules_of


def _source(s: Walk, op: Op) -> list[Value] | None:
    fill = {
        "zeros": 0.0,
        "new_zeros": 0.0,
        "zeros_like": 0.0,
        "ones": 1.0,
        "new_ones": 1.0,
        "ones_like": 1.0,
    }.get(op.name, op.args.get("fill_value"))
    if op.name in ("scalar_tensor",):
        fill = op.args["s"]
    known = np.asarray(float(fill)) if isinstance(fill, (int, float)) else None
    return [s.flow.constant(s.shape(op), known)]


def _fill(s: Walk, op: Op) -> list[Value] | None:
    """A tensor overwritten with one number."""
    value = op.args.get("value", 0)
    if isinstance(value, (int, float)):
        return [s.flow.constant(s.shape(op), np.asarray(float(value)))]
    return [shapes.broadcast(s.flow, s.value(value), s.shape(op), [])]


def _drawn(s: Walk, op: Op) -> list[Value] | None:
    """A tensor of random numbers."""
    return [s.flow.constant(s.shape(op))]


RULES = rules_of(
    (
        _source,
        "zeros ones full empty new_zeros new_ones new_full new_empty zeros_like "
        "ones_like full_like empty_like arange linspace scalar_tensor eye "
        "tril_indices triu_indices hann_window hamming_window",
    ),
    (_drawn, "rand randn"),
    (_fill, "fill zero"),
)

#: Operators that make tensors from sizes alone.
SOURCES = frozenset(name for name, rule in RULES.items() if rule is not _fill)
