"""How atoms flow from primitives that make arrays of sizes, from random keys, and to debuggers."""

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


def _shown(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    """What is only looked at, by ``jax.debug``: it sees the smaller arrays."""
    return None if op.outputs else []


RULES: dict[str, Rule] = {
    **dict.fromkeys(("debug_callback", "debug_print", "inspect_sharding"), _shown),
    **dict.fromkeys(SOURCES, _source),
    "rng_uniform": _source,
    "random_": _keys,
}
