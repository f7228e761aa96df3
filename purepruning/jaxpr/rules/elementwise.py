"""How atoms flow through element-wise primitives."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from purepruning.coupling import reductions
from purepruning.coupling.value import Value, numbers_as_uniform
from purepruning.jaxpr.primitives import ELEMENTWISE, PASSING
from purepruning.jaxpr.program import Op
from purepruning.jaxpr.rules.shapes import shape_of
from purepruning.jaxpr.walk import Rule, Walk


def _elementwise(state: Walk, op: Op, operands: list[Value]) -> list[Value]:
    shapes = [state.program.avals[n].shape for n in op.outputs]
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
        value = numbers_as_uniform(value)
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
    if op.name == "abs" or (op.name in _SIGNS and any(_is_zero(v.known) for v in operands)):
        value = dataclasses.replace(value, sign=_SIGNS[op.name])
    if value.ndim == 0 and op.name in _NUMBERS and all(v.known is not None for v in operands):
        numbers = [np.asarray(v.known) for v in operands]
        value = dataclasses.replace(value, known=_NUMBERS[op.name](*numbers).astype(result))
    return [value]


#: The sign of a magnitude, and of the larger or smaller of a number and zero.
_SIGNS = {"abs": 1, "max": 1, "min": -1}


def _is_zero(known: Any) -> bool:
    return known is not None and bool(np.all(np.asarray(known) == 0))


#: What is computed of numbers that are known, such as a divisor of N - 1.
_NUMBERS: dict[str, Callable[..., np.ndarray]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "max": np.maximum,
    "min": np.minimum,
    "neg": np.negative,
}


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
        reductions.scaled_sum(
            state.flow, value, factor if op.name == "div" else 1 / factor, state.where
        )
        return


def _uniform_of(value: Value) -> float | None:
    numbers = {float(d) for d in value.at_removed if np.ndim(d) == 0}
    if value.ndim and len(numbers) == 1 and math.isfinite(found := numbers.pop()):
        return found if value.origins is not None and not any(value.origins) else None
    return None


def _integer_pow(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    name = "positive_pow" if op.params["y"] > 0 else "power"
    name = "square" if op.params["y"] == 2 else name
    return [state.flow.elementwise(name, xs, shape_of(state, op), state.where)]


RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    "integer_pow": _integer_pow,
}
