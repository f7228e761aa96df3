"""The coupling of any torch module, read off the operations that it calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils import _pytree as pytree

from purepruning.coupling.build import build
from purepruning.coupling.coupling import Coupling
from purepruning.coupling.flow import Flow
from purepruning.coupling.value import Value
from purepruning_interop.torch.operators import IDENTITY
from purepruning_interop.torch.program import Program, Size, Var, check_whole, leaf_names
from purepruning_interop.torch.rules.table import RULES, known_operators
from purepruning_interop.torch.tracing.fold_constants import fold
from purepruning_interop.torch.tracing.trace import (
    How,
    asks_for_mode,
    program_of,
    training_program_of,
)
from purepruning_interop.torch.walk import leaf_uses, walk


class Analysis(NamedTuple):
    """What is known of a module: its program, and the value of every tensor.

    ``training_only`` are the leaves that only training mode uses; None where it cannot be read.
    """

    program: Program
    values: dict[int, Value]
    parts: dict[int, Value]
    flow: Flow
    folded: Mapping[int, np.ndarray]
    coupling: Coupling
    numbers: np.ndarray  # unit of every atom
    training_only: frozenset[str] | None


def couple(model: torch.nn.Module, /, *inputs: Any, outputs: Any = True, **kwargs: Any) -> Coupling:
    """Returns which channels of which parameters and buffers of a module are coupled.

    The module is called in eval mode and on tensors without values, and its ATen operations are
    recorded; where that cannot be done for certain (writes to memory that has other names, tensors
    that the forward pass leaves in attributes), ``torch.export`` reads it. It comes back as it was.
    It is called in training mode as well: what is used in training only, such as an auxiliary head,
    is coupled too. Where that call cannot be recorded, such parameters stay whole and the reason
    says so. Every position of every axis of a floating-point parameter or buffer starts as a unit
    of its own, and each operation says which of them coincide, come apart into factors, or must
    stay. An operation without a rule keeps what it touches and is reported: less is pruned, and
    results stay equal.

    Leaves go by their names in the state dict. A tensor under several names (tied weights, shared
    modules) is one leaf under the first of them. Statistics of batch norms are leaves as well.
    Buffers of whole numbers are never cut; where one is an index, its values are used.

    Args:
        model: any module whose control flow does not depend on data.
        *inputs, **kwargs: example inputs, as for the module. A keyword ``outputs`` of its own
            cannot be given; make a module around it.
        outputs: tree of booleans, a prefix of the module's result: whether it stays whole (True) or
            may shrink along with the parameters (False), as features that another model reads.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: ``outputs`` is no prefix of the result; or ``torch.export`` refuses the model,
            for instance where its control flow depends on data; the message names the line.

    >>> import torch
    >>> model = torch.nn.Sequential(
    ...     torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)
    ... )
    >>> coupling = couple(model, torch.ones(1, 3))
    >>> [(f.name, len(f), [m.path for m in f.axes]) for f in coupling.families]
    [('0.weight[0]', 8, ['0.bias', '0.weight', '2.weight'])]
    """
    check_whole("couple(model, *inputs)", model)
    return analyse(model, inputs, kwargs, outputs).coupling


class Traced(NamedTuple):
    """A program that was walked through, and its leaves; else as in :class:`Analysis`."""

    program: Program
    leaves: dict[str, Value]
    values: dict[int, Value]
    parts: dict[int, Value]
    folded: Mapping[int, np.ndarray]
    training_only: frozenset[str] | None


def trace(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    flow: Flow,
    how: How = "recorded",
) -> Traced:
    """Returns the program of ``model(*args, **kwargs)``, walked through with a flow."""
    program = program_of(model, args, kwargs, known_operators(), how)
    state = model.state_dict(keep_vars=True)
    leaves: dict[str, Value] = {}
    tables = _zero_points(program) | _mask_buffers(state)
    for path in sorted(set(leaf_names(model).values())):
        floating, table = state[path].is_floating_point(), path in tables
        value = flow.leaf(path, tuple(state[path].shape), floating or table, table=table)
        leaves[path] = value
    used = _used_leaves(program)
    training_only: frozenset[str] | None = frozenset()
    training, unused = None, "not used"
    if asks_for_mode(model):
        training = training_program_of(model, args, kwargs, known_operators())
        if training is None:
            training_only = None
            unused = "not used in eval mode, and training mode cannot be read"
        else:
            training_only = frozenset(_used_leaves(training) - used)
            if not training_only and _operations(training) == _operations(program):
                training = None
    for path, value in leaves.items():
        if path not in used and path not in (training_only or ()):
            flow.keep(value, unused)
    folded = fold(program, state)
    values, parts = walk(program, leaves, flow, leaf_uses(program), folded, RULES)
    if training is not None:
        _walk_training(training, leaves, flow, fold(training, state))
    for product in flow.contractions.values():  # what depends on data is counted once
        product.sizes = tuple(1 if isinstance(n, Size) else n for n in product.sizes)
    return Traced(program, leaves, values, parts, folded, training_only)


def _used_leaves(program: Program) -> set[str]:
    """Returns the paths of the leaves that a program reads or writes."""
    read = {v.number for op in program.ops for v in op.tensors}
    read.update(v.number for v in program.outputs if isinstance(v, Var))
    read.update(program.mutations)
    return {path for number, path in program.leaves.items() if number in read}


def _mask_buffers(state: Mapping[str, torch.Tensor]) -> set[str]:
    """Returns the buffers by which ``torch.nn.utils.prune`` multiplies: no layer's own weights."""
    ends = "_mask", "_orig"
    return {p for p in state if p.endswith(ends[0]) and p.removesuffix(ends[0]) + ends[1] in state}


def _zero_points(program: Program) -> set[str]:
    """Returns the paths of integers that go with scales: those of quantised channels."""
    read = [op.args["zero_point"] for op in program.ops if "zero_point" in op.args]
    paths = {program.leaves.get(v.number): v for v in read if isinstance(v, Var)}
    return {
        path
        for path, v in paths.items()
        if path is not None and not program.avals[v.number].dtype.is_floating_point
    }


def _operations(program: Program) -> list[str]:
    """Returns the operations of a program, without what only draws random numbers."""
    return [op.name for op in program.ops if op.name not in IDENTITY]


def _walk_training(
    program: Program, leaves: Mapping[str, Value], flow: Flow, folded: Mapping[int, np.ndarray]
) -> None:
    """Couples what is used in training only: what costs and divides is that of eval mode."""
    before = dict(flow.contractions), dict(flow.statistics), dict(flow.means)
    values, _ = walk(program, leaves, flow, leaf_uses(program), folded, RULES, "training ")
    for out in program.outputs:
        if isinstance(out, Var):
            flow.keep(values[out.number], "an output")
    flow.contractions, flow.statistics, flow.means = before


def analyse(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    outputs: Any = True,
    how: How = "recorded",
) -> Analysis:
    """Returns the program of ``model(*args, **kwargs)`` with the atoms of every tensor."""
    flow = Flow()
    program, leaves, values, parts, folded, training_only = trace(model, args, kwargs, flow, how)
    for out, stays in zip(program.outputs, _whole(program, outputs), strict=True):
        if stays and isinstance(out, Var):
            flow.keep(values[out.number], "an output")
    for number, out in program.mutations.items():
        flow.unify([values[number], values[out.number]], "overwritten")
    coupling, numbers = build(
        flow,
        {path: v.shape for path, v in leaves.items()},
        {path: v.axes for path, v in leaves.items()},
        times=dict.fromkeys([*flow.contractions, *flow.statistics], 1),
        outputs=outputs,
    )
    return Analysis(program, values, parts, flow, folded, coupling, numbers, training_only)


def _whole(program: Program, outputs: Any) -> list[bool]:
    """Returns for every output of a program whether it stays whole."""
    if isinstance(outputs, bool):  # no object of the result's class need be made
        return [outputs] * len(program.outputs)
    flags = pytree._broadcast_to_and_flatten(outputs, program.out_spec)
    if flags is None:
        raise ValueError(
            f"outputs must be a tree of booleans, a prefix of the result; {outputs!r} is none of "
            f"{program.out_spec}"
        )
    if not all(isinstance(flag, bool) for flag in flags):
        raise TypeError(f"outputs must hold booleans, got {outputs!r}")
    return flags
