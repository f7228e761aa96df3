"""The smaller model as a graph, whose sizes are open as far as that is right."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils import _pytree as pytree

from purepruning.coupling.coupling import Coupling
from purepruning.coupling.plan import Plan, units_of_plan
from purepruning.coupling.shrink_report import check_same
from purepruning_interop.torch.couple import Analysis, analyse
from purepruning_interop.torch.emit.graph_module import OpenSize
from purepruning_interop.torch.emit.table import emit
from purepruning_interop.torch.program import Program
from purepruning_interop.torch.tracing.export import Refused
from purepruning_interop.torch.tracing.trace import How
from purepruning_interop.torch.verify import Reference


class Graph(NamedTuple):
    """A graph, and the axes of its inputs that must keep the size of the example."""

    module: torch.fx.GraphModule
    fixed: tuple[str, ...]


def graph_of(
    model: torch.nn.Module,
    coupling: Coupling,
    removed: np.ndarray,
    plan: Plan,
    state: Mapping[str, torch.Tensor],
    reference: Reference,
    norms: str,
) -> Graph:
    """Returns the smaller model as a graph.

    First all sizes of the inputs are left open, then that of the batch, then none. A graph is taken
    if it is right for the example and for other batches. Of other sizes those stay open for which
    it was right wherever the model itself runs, at one other size at least; the graph refuses what
    is left. A module that cannot be exported, since it asks for numbers that it made itself, is
    taken as it was recorded, of fixed sizes.

    Args:
        model: the module, in any mode.
        coupling, removed: its coupling, and which of its units go.
        plan, state: what stays, and the small parameters and buffers.
        reference: the masked model and the example.
        norms: ``"original"`` or ``"kept"``.
    """
    given = reference.given[0]
    names = reference.names
    ways: tuple[How, ...] = ("open", "batch")
    steady = reference.steady()
    for how in ways:
        try:
            args, kwargs = _doubled(given)
            found = analyse(model, args, kwargs, coupling.outputs, how)
            gone = _units(found, coupling, removed, plan)
            closed = _closed(found.program)
            exact = emit(found, gone, plan, state, names, "original", closed)
            if steady:
                wrong = _wrong(exact, found.program, reference, plan)
                if wrong is None:
                    continue
                closed |= wrong
            return Graph(
                emit(found, gone, plan, state, names, norms, closed), _named(found, closed)
            )
        except _NOT_OPEN:
            continue
    try:
        found = analyse(model, given[0], given[1], coupling.outputs, "exported")
    except Refused:  # torch's tracer: ours may have read it
        found = analyse(model, given[0], given[1], coupling.outputs, "recorded")
    gone = _units(found, coupling, removed, plan)
    closed = _closed(found.program)
    return Graph(emit(found, gone, plan, state, names, norms, closed), _named(found, closed))


#: What stands in the way of open sizes: torch raises errors of these classes on symbolic ones.
_NOT_OPEN = (
    OpenSize,
    Refused,
    ValueError,
    RuntimeError,
    AssertionError,
    TypeError,
    KeyError,
    IndexError,
    NotImplementedError,
)


def _units(found: Analysis, coupling: Coupling, removed: np.ndarray, plan: Plan) -> np.ndarray:
    """Returns the units of a program that are removed, which may be numbered in another way.

    Raises:
        ValueError: it has no such units.
    """
    try:
        check_same(coupling, found.coupling)
        return removed
    except ValueError:
        return units_of_plan(found.coupling, plan)


def _closed(program: Program) -> frozenset[Place]:
    """Returns the axes of inputs whose sizes a program holds as numbers."""
    return frozenset(
        (i, a)
        for i, number in enumerate(program.inputs)
        if number is not None
        for a, symbolic in enumerate(program.avals[number].symbolic)
        if not symbolic
    )


def _named(found: Analysis, closed: frozenset[Place]) -> tuple[str, ...]:
    program = found.program
    sizes = {}
    for i, a in closed:
        number = program.inputs[i]
        assert number is not None
        sizes[i, a] = program.avals[number].shape[a]
    return tuple(f"{program.names[i]} axis {a} = {sizes[i, a]}" for i, a in sorted(closed))


def _wrong(
    graph: torch.nn.Module, program: Program, reference: Reference, plan: Plan
) -> frozenset[Place] | None:
    """Returns the open axes that cannot have other sizes, or None if the graph is of no use.

    It is of none where it is wrong for the example or for another batch.
    """
    args, kwargs = reference.given[0]
    order = list(program.in_spec.child(1).context)
    leaves, spec = pytree.tree_flatten((args, {key: kwargs[key] for key in order}))

    def right(axes: Iterable[Place], size: Callable[[int], int]) -> bool | None:
        made = list(leaves)
        for i, a in axes:
            made[i] = _resized(made[i], a, size(leaves[i].shape[a]))
        return reference.agrees(graph, plan, pytree.tree_unflatten(made, spec))

    batch, others = _open_axes(program, leaves)
    if not right((), lambda n: n):
        return None
    if batch and not _stands([right(batch, size) for size in _BATCHES]):
        return None
    wrong: list[Place] = []
    for axes in others:
        if not _stands([right(axes, size) for size in _LENGTHS]):
            wrong += axes
    together = [*batch, *(place for axes in others for place in axes if place not in wrong)]
    if right(together, lambda n: 2 * n) is False:
        wrong = [place for axes in others for place in axes]
    return frozenset(wrong)


#: An axis of an input: the number of the input, and of the axis.
Place = tuple[int, int]

_BATCHES: Sequence[Callable[[int], int]] = (lambda n: n + 1, lambda n: 2 * n + 1)
_LENGTHS: Sequence[Callable[[int], int]] = (
    lambda n: 2 * n,
    lambda n: n + 1,
    lambda n: max(n // 2, 1),
)


def _stands(found: Sequence[bool | None]) -> bool:
    """Whether a graph was right wherever the model runs, and that was somewhere."""
    return True in found and False not in found


def _open_axes(program: Program, leaves: Sequence[Any]) -> tuple[list[Place], list[list[Place]]]:
    """Returns the open axes of the batch, and the others, those of one size together."""
    batch: list[Place] = []
    others: dict[int, list[Place]] = {}
    for i, number in enumerate(program.inputs):
        if number is None:
            continue
        for a, symbolic in enumerate(program.avals[number].symbolic):
            if symbolic and a == 0:
                batch.append((i, a))
            elif symbolic:
                others.setdefault(leaves[i].shape[a], []).append((i, a))
    return batch, list(others.values())


def _resized(x: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    """Returns a tensor repeated along an axis, up to another size of it."""
    return torch.cat([x] * -(-size // x.shape[axis]), axis).narrow(axis, 0, size)


def _doubled(given: Any) -> Any:
    """Returns inputs of a batch of two for those of one: sizes of 1 cannot stay open."""
    tensors = [x for x in pytree.tree_leaves(given) if isinstance(x, torch.Tensor)]
    first = next((t for t in tensors if t.ndim), None)
    if first is None or first.shape[0] != 1:
        return given

    def twice(x: Any) -> Any:
        batched = isinstance(x, torch.Tensor) and x.ndim and x.shape[0] == 1
        return torch.cat([x, x]) if batched else x

    return pytree.tree_map(twice, given)
