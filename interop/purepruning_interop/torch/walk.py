"""A walk through an ATen program: the value of every tensor, by one rule for each operator."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from purepruning.coupling.flow import Flow
from purepruning.coupling.value import Value, finite_only, whole
from purepruning_interop.torch.operators import PASSING
from purepruning_interop.torch.program import Op, Program, Sym, Var


@dataclasses.dataclass
class Walk:
    """The state of walking through a program: what rules need besides the operation."""

    flow: Flow
    program: Program
    values: dict[int, Value]
    uses: Mapping[str, int]
    folded: Mapping[int, np.ndarray]
    index: int = 0
    label: str = ""
    memory: dict[Any, dict[tuple[str, ...], float]] = dataclasses.field(default_factory=dict)
    parts: dict[int, Value] = dataclasses.field(default_factory=dict)

    def value(self, x: Any) -> Value:
        """Returns what is known of an argument: a tensor, or a number."""
        if isinstance(x, Var):
            return self.values[x.number]
        if isinstance(x, Sym):
            return whole(())
        return whole((), np.asarray(x))

    def shape(self, op: Op, i: int = 0) -> tuple[Any, ...]:
        """Returns the shape of a result."""
        number = op.outputs[i]
        assert number is not None
        return self.program.avals[number].shape

    def where(self, part: str = "") -> tuple[int, str]:
        """What a part of the present operation is called in the flow's records."""
        return self.index, self.label + part

    def concrete(self, x: Any) -> np.ndarray | None:
        """Returns a tensor that depends on constants alone."""
        if not isinstance(x, Var):
            return None if isinstance(x, Sym) or x is None else np.asarray(x)
        return self.folded.get(x.number)


#: ``(walk, operation) -> values of its results``; None where the rule does not cover the case.
Rule = Callable[[Walk, Op], list[Value] | None]


class Rules(NamedTuple):
    """The rules of a walk.

    Attributes:
        by_name: the rule of every operator.
        recomputed: operators through which the shrunk program can compute what removed positions
            would hold.
    """

    by_name: Mapping[str, Rule]
    recomputed: frozenset[str]


def rules_of(*rows: tuple[Rule, str]) -> dict[str, Rule]:
    """Returns rules by operator, from rows of a rule and the names it is for."""
    return {name: rule for rule, names in rows for name in names.split()}


def walk(
    program: Program,
    leaves: Mapping[str, Value],
    flow: Flow,
    uses: Mapping[str, int],
    folded: Mapping[int, np.ndarray],
    rules: Rules,
    label: str = "",
) -> tuple[dict[int, Value], dict[int, Value]]:
    """Returns the values of all tensors of a program, and of channels by groups, by operation.

    Args:
        program: what is walked through.
        leaves: values of parameters and buffers by path.
        flow: where the atoms are.
        uses: how often each leaf is used.
        folded: tensors that depend on constants alone, by number.
        rules: the rule of every operator.
        label: what tells records in the flow from those of another program.
    """
    values: dict[int, Value] = {}
    for number in program.inputs:
        if number is not None:
            values[number] = whole(program.avals[number].shape)
    for number, path in program.leaves.items():
        values[number] = leaves[path]
    for number, tensor in program.constants.items():
        values[number] = flow.constant(tuple(tensor.shape), _uniform(tensor))
    state = Walk(flow, program, values, uses, folded, label=label)
    for index, op in enumerate(program.ops):
        state.index = index
        if op.symbol is not None:
            continue
        for number, value in zip(op.outputs, _apply(state, op, rules), strict=True):
            if number is not None:
                values[number] = value
    return values, state.parts


def _uniform(tensor: torch.Tensor) -> Any:
    if 0 < tensor.numel() <= 1 << 16 and not tensor.is_complex() and tensor.device.type != "meta":
        first = tensor.reshape(-1)[0]
        if bool((tensor == first).all()):
            return np.asarray(first.double().cpu())
    return None


def _apply(state: Walk, op: Op, rules: Rules) -> list[Value]:
    found = None
    if op.name in rules.by_name:
        found = rules.by_name[op.name](state, op)
    if found is None:
        operands = [state.value(v) for v in op.tensors]
        shapes = [() if n is None else state.program.avals[n].shape for n in op.outputs]
        return state.flow.opaque(op.name, operands, shapes)
    if op.name not in rules.recomputed:
        # What the shrunk program cannot compute again is not known.
        found = [
            dataclasses.replace(v, at_removed=tuple(map(finite_only, v.at_removed))) for v in found
        ]
    return found


def leaf_uses(program: Program) -> dict[str, int]:
    """Returns how often each leaf is used, apart from conversions and reordered axes."""
    readers: dict[int, list[Op]] = {}
    for op in program.ops:
        for v in op.tensors:
            readers.setdefault(v.number, []).append(op)
    outputs = [v.number for v in program.outputs if isinstance(v, Var)]

    def uses(number: int) -> int:
        total = outputs.count(number)
        for op in readers.get(number, ()):
            out = op.outputs[0] if op.name in PASSING else None
            total += uses(out) if out is not None else 1
        return total

    return {path: uses(number) for number, path in program.leaves.items()}
