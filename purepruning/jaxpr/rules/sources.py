"""How atoms flow from primitives that make arrays of sizes, and from random keys."""

from __future__ import annotations

from purepruning.coupling.value import Value, whole
from purepruning.jaxpr.primitives import SOURCES
from purepruning.jaxpr.program import Op
from purepruning.jaxpr.walk import Rule, Walk


def _source(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    for value in xs:
        state.flow.keep(value, "what random numbers are drawn from")
    return [state.flow.constant(state.program.avals[n].shape) for n in op.outputs]


def _keys(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    for value in xs:
        state.flow.keep(value, "what keys are made of")
    return [whole(state.program.avals[n].shape) for n in op.outputs]


RULES: dict[str, Rule] = {
    **dict.fromkeys(SOURCES, _source),
    "rng_uniform": _source,
    "random_": _keys,
}
