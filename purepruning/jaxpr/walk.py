"""A walk through a jaxpr: the value of every variable, by one rule for each primitive."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from purepruning.coupling.flow import Flow
from purepruning.coupling.value import Value
from purepruning.jaxpr.constants import concrete
from purepruning.jaxpr.primitives import PASSING
from purepruning.jaxpr.program import Op, Program


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
    rules: Mapping[str, Rule]
    index: int = 0
    counter: list[int] = dataclasses.field(default_factory=lambda: [0])
    depth: int = 0

    @property
    def where(self) -> tuple[int, int]:
        """What the present operation is called in the flow's records."""
        return self.trace.number, self.index

    def enter(self, program: Program, operands: list[Value]) -> tuple[list[Value], Trace]:
        """Returns the results of an inner program, and its trace."""
        return walk(
            program, operands, self.flow, self.uses, self.rules, self.counter, self.depth + 1
        )

    def concrete(self, number: int) -> np.ndarray | None:
        """Returns the array a variable is, if it depends on constants only."""
        return concrete(self.program, number)


#: ``(walk, operation, operands) -> values of its results``; None where the rule does not cover it.
Rule = Callable[[Walk, Op, list[Value]], list[Value] | None]


def walk(
    program: Program,
    operands: list[Value],
    flow: Flow,
    uses: dict[str, int],
    rules: Mapping[str, Rule],
    counter: list[int] | None = None,
    depth: int = 0,
) -> tuple[list[Value], Trace]:
    """Returns the values of a program's results, and of all its variables.

    Args:
        program: what is walked through.
        operands: the values of its inputs.
        flow: where the atoms are.
        uses: how often each parameter is used.
        rules: the rule of every primitive; ``"random_"`` is that of all with such a name.
        counter: the number of programs walked through so far.
        depth: how many programs this one lies in.
    """
    counter = [0] if counter is None else counter
    counter[0] += 1
    values = dict(zip(program.inputs, operands, strict=True))
    for number, constant in program.constants.items():
        values[number] = flow.constant(
            program.avals[number].shape,
            np.asarray(constant) if np.ndim(constant) == 0 and _plain(constant) else None,
        )
    trace = Trace(counter[0], values)
    state = Walk(flow, program, trace, uses, rules, 0, counter, depth)
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
    rule = state.rules.get(op.name)
    if rule is None and op.name.startswith("random_"):
        rule = state.rules["random_"]
    found = rule(state, op, operands) if rule is not None else None
    if found is None:
        shapes = [state.program.avals[n].shape for n in op.outputs]
        return state.flow.opaque(op.name, operands, shapes)
    return found


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
            elif op.inner and not _is_read_inside(op, number):
                continue
            elif op.name in ("remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call"):
                total += 2  # inside, an operation is not told from another by its program alone
            else:
                total += op.inputs.count(number)
        return total

    return {path: uses(number) for number, path in paths.items()}


def _is_read_inside(op: Op, number: int) -> bool:
    """Whether a program inside an operation reads one of its operands."""
    if op.name == "while":
        n, m = op.params["cond_nconsts"], op.params["body_nconsts"]
        carry = op.inputs[n + m :]
        given = [(*op.inputs[:n], *carry), (*op.inputs[n : n + m], *carry)]
        if number in carry:
            return True
    elif op.name == "cond":
        given = [op.inputs[1:]] * len(op.inner)
        if number == op.inputs[0]:
            return True
    else:
        # A derivative reads no parameter that its function does not.
        given = [op.inputs]
    return any(
        name == number and _is_read(program, inner)
        for program, names in zip(op.inner, given, strict=False)
        for name, inner in zip(names, program.inputs, strict=False)
    )


def _is_read(program: Program, number: int) -> bool:
    if number in program.outputs:
        return True
    return any(
        number in op.inputs and (not op.inner or _is_read_inside(op, number)) for op in program.ops
    )
