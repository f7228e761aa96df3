"""The smaller module: the user's own class where that computes the same, else its graph."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils import _pytree as pytree

from purepruning.arguments import one_of
from purepruning.coupling.coupling import Coupling
from purepruning.coupling.plan import Plan, plan_of
from purepruning.coupling.shrink_report import Norms, ShrinkReport, check_coupling, check_same
from purepruning.coupling.unit_masks import Conflicts
from purepruning.masks import apply_masks, merge_masks
from purepruning_interop.torch.couple import analyse
from purepruning_interop.torch.emit.graph_module import OpenSize
from purepruning_interop.torch.emit.table import emit
from purepruning_interop.torch.program import leaf_names
from purepruning_interop.torch.surgery import cut_modules
from purepruning_interop.torch.tracing.export import Refused
from purepruning_interop.torch.verify import Reference


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TorchShrinkReport(ShrinkReport):
    """What a shrunk module lost, and what it is.

    The complete masks name statistics too, so that ``apply_(model.state_dict(), report.masks)``
    makes a model the masked one.

    Attributes:
        kind: ``"module"``, the user's own class with smaller layers, or ``"graph"``, its exported
            program with other sizes.
        why: why it is a graph, or how well the module agrees.
        deviation: largest difference to the reference in float64 (in the model's own dtype if it
            does not run in float64), relative to its largest output.
        names: the leaf that every name of the state dict stands for.
        dynamic: whether the batch size of a graph is open; modules are as open as they were.
    """

    kind: str = "module"
    why: str = ""
    deviation: float = 0.0
    dynamic: bool = True
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        what = {"module": "the model's own class", "graph": "a graph of its operations"}[self.kind]
        batch = "" if self.dynamic else "; for one batch size only"
        return "\n".join([super().__str__(), f"result: {what} ({self.why}){batch}"])


class ShrunkModule(NamedTuple):
    """What :func:`shrink` returns.

    Attributes:
        model: the smaller module.
        report: what was removed, and how.
    """

    model: torch.nn.Module
    report: TorchShrinkReport


def shrink(
    model: torch.nn.Module,
    masks: Any,
    coupling: Coupling,
    *inputs: Any,
    norms: Norms = "original",
    conflicts: Conflicts = "keep",
    **kwargs: Any,
) -> ShrunkModule:
    """Returns a smaller module that computes what the masked one does, and a report.

    First the user's own class is tried: a copy with cut parameters and corrected attributes
    (``in_features``, ``groups``, ``num_heads``, ...). It is returned if it runs and, in float64,
    agrees with the masked original. Otherwise the result is a ``torch.fx.GraphModule``: the
    exported program with other sizes, and parameters under their names. Both have the keys of the
    original's state dict, and can be copied, trained further, compiled and exported. A graph
    switches dropouts and batch norms with ``train()``; attention dropout it has none.

    Args:
        model: the module that was coupled. It stays as it is.
        masks: masks of any pruner, or of :meth:`purepruning.Coupling.masks`, by name.
        coupling: what :func:`couple` returned for it.
        *inputs, **kwargs: example inputs, as for the module. Their batch size may change later,
            unless the report says otherwise.
        norms: what a mean over an axis that shrinks divides by: ``"original"`` keeps the number of
            positions there were: the masked model exactly. ``"kept"`` averages over what is kept,
            as a natively smaller ``LayerNorm`` does.
        conflicts: as in :func:`purepruning.shrink`.

    Raises:
        ValueError: masks that disagree, so that no unit can be removed or with
            ``conflicts="refuse"``; uneven groups; an axis that would be emptied; another model
            than was coupled; an unknown option; ``torch.export`` refuses the model.
        KeyError: a mask names no parameter.
        RuntimeError: the result does not compute what the masked model does.

    >>> import torch
    >>> from purepruning_interop.torch import couple
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Linear(8, 2))
    >>> coupling = couple(model, torch.ones(1, 3))
    >>> masks = coupling.masks([1, 2, 3, 4], dict(model.named_parameters()))
    >>> small, report = shrink(model, masks, coupling, torch.ones(1, 3))
    >>> small
    Sequential(
      (0): Linear(in_features=3, out_features=4, bias=True)
      (1): Linear(in_features=4, out_features=2, bias=True)
    )
    """
    one_of("norms", norms, ("original", "kept"))
    check_coupling(coupling)
    names = leaf_names(model)
    leaves = _leaves(model, names)
    masks = _canonical(masks, names)
    _check_leaves(coupling, leaves)
    chosen = coupling.chosen(masks, leaves, conflicts=conflicts)
    complete = merge_masks(coupling.masks(np.flatnonzero(chosen.removed), leaves), masks)
    masked = apply_masks(leaves, masks)
    result = _build(model, coupling, chosen.removed, masked, complete, (inputs, kwargs), norms)
    report = TorchShrinkReport(
        result.plan,
        complete,
        (_size(model), _size(result.model)),
        (coupling.cost()[1], coupling.cost(chosen.removed)[1]),
        norms,
        coupling.statistics,
        chosen.restored,
        chosen.extended,
        result.kind,
        result.why,
        result.deviation,
        result.dynamic,
        names,
    )
    return ShrunkModule(result.model, report)


def _size(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def rebuild(
    model: torch.nn.Module,
    plan: Plan,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    *inputs: Any,
    norms: Norms = "original",
    **kwargs: Any,
) -> torch.nn.Module:
    """Returns the small module again, from its class, a plan and the state dict of the small one.

    Needs no pickle: :meth:`purepruning.Plan.save` writes the plan, ``safetensors`` or
    ``torch.save`` the state dict.

    Args:
        model: the full model, as it is built; its values do not matter with a ``state_dict``.
        plan: of the report of :func:`shrink`.
        state_dict: of the small module; without one, the values of ``model`` are cut.
        *inputs, **kwargs: example inputs, as for :func:`shrink`.
        norms: as it was for :func:`shrink`.

    Raises:
        ValueError: the plan does not belong to this model.
        RuntimeError: the state dict does not fit.
    """
    one_of("norms", norms, ("original", "kept"))
    names = leaf_names(model)
    leaves = _leaves(model, names)
    if {p: tuple(x.shape) for p, x in leaves.items()} != dict(plan.shapes):
        raise ValueError("plan does not belong to this model: its parameters have other shapes")
    found = analyse(model, inputs, kwargs)
    removed = np.zeros(found.coupling.n_units + 1, bool)
    removed[[u for u in plan.removed if u < len(removed)]] = True
    again = plan_of(found.coupling, removed)
    if not _same_cuts(plan, again):
        raise ValueError("plan does not belong to this model: it couples other channels")
    masks = found.coupling.masks(np.flatnonzero(removed), leaves)
    masked = apply_masks(leaves, masks)
    result = _build(model, found.coupling, removed, masked, masks, (inputs, kwargs), norms)
    if state_dict is not None:
        result.model.load_state_dict(state_dict)
    return result.model


def _same_cuts(one: Plan, other: Plan) -> bool:
    return one.cuts.keys() == other.cuts.keys() and all(
        len(a) == len(b)
        and all(
            x.axis == y.axis and x.by == y.by and np.array_equal(x.positions, y.positions)
            for x, y in zip(a, b, strict=True)
        )
        for a, b in ((one.cuts[path], other.cuts[path]) for path in one.cuts)
    )


def _leaves(model: torch.nn.Module, names: Mapping[str, str]) -> dict[str, torch.Tensor]:
    state = model.state_dict(keep_vars=True)
    return {path: state[path].detach() for path in dict.fromkeys(names.values())}


def _canonical(masks: Any, names: Mapping[str, str]) -> Any:
    """Returns masks by the first names of tied parameters."""
    if not isinstance(masks, Mapping) or not any(names.get(k, k) != k for k in masks):
        return masks
    parts: list[dict[str, Any]] = [{}, {}]
    for name, mask in masks.items():
        parts[names.get(name, name) != name][names.get(name, name)] = mask
    first, second = ({k: v for k, v in p.items() if v is not None} for p in parts)
    both = {k: first[k] & second[k] for k in first.keys() & second.keys()}
    return {**first, **second, **both}


def _check_leaves(coupling: Coupling, leaves: Mapping[str, torch.Tensor]) -> None:
    for path, leaf in coupling.leaves.items():
        found = leaves.get(path)
        if found is None or tuple(found.shape) != leaf.shape:
            came = "nothing" if found is None else f"shape {tuple(found.shape)}"
            raise ValueError(
                f"coupling does not belong to this model: {path!r} has {came}, but {leaf.shape} "
                "when it was coupled"
            )


# Building.
class _Built(NamedTuple):
    model: torch.nn.Module
    plan: Plan
    kind: str
    why: str
    deviation: float
    dynamic: bool


def _build(
    model: torch.nn.Module,
    coupling: Coupling,
    removed: np.ndarray,
    masked: Mapping[str, torch.Tensor],
    complete: Any,
    given: tuple[tuple[Any, ...], dict[str, Any]],
    norms: str,
) -> _Built:
    plan = plan_of(coupling, removed)
    names = leaf_names(model)
    state = _cut_state(model, plan, masked, names)
    own: torch.nn.Module | None = None
    try:
        own = cut_modules(model, plan, state, names, coupling)
        own.train(model.training)
        for mine, theirs in zip(own.modules(), model.modules(), strict=True):
            mine.training = theirs.training
    except Exception as error:
        why = f"its own class cannot be cut: {type(error).__name__}: {error}"
    reference = Reference(model, complete, names, given)
    if own is not None:
        deviation, why = reference.compare(own, plan)
        if deviation is not None:
            return _Built(own, plan, "module", f"agrees to {deviation:.0e}", deviation, True)
    graph, dynamic = _graph(model, coupling, removed, plan, state, names, given, norms)
    graph.train(model.training)
    if norms == "kept":
        if own is not None:  # compared with what averages over what is kept
            deviation, own_why = reference.compare(own, plan, graph)
            if deviation is not None:
                return _Built(own, plan, "module", f"agrees to {deviation:.0e}", deviation, True)
            why = own_why
        return _Built(graph, plan, "graph", why, 0.0, dynamic)
    deviation, trouble = reference.compare(graph, plan)
    if deviation is None:
        if reference.steady():
            raise RuntimeError(
                f"the shrunk graph of {type(model).__name__} does not compute what the masked "
                f"model does: {trouble}. That is a bug of this library"
            )
        deviation = float("nan")
    return _Built(graph, plan, "graph", why, deviation, dynamic)


def _cut_state(
    model: torch.nn.Module,
    plan: Plan,
    masked: Mapping[str, torch.Tensor],
    names: Mapping[str, str],
) -> dict[str, torch.Tensor]:
    """Returns new tensors by path, parameters again as parameters."""
    full = model.state_dict(keep_vars=True)
    cut = plan.apply({path: x.detach() for path, x in masked.items()})
    found: dict[str, torch.Tensor] = {}
    for path, tensor in cut.items():
        old = full[path]
        new = tensor.detach().clone(memory_format=torch.contiguous_format)
        if isinstance(old, torch.nn.Parameter):
            new = torch.nn.Parameter(new, requires_grad=old.requires_grad)
        found[path] = new
    return found


def _graph(
    model: torch.nn.Module,
    coupling: Coupling,
    removed: np.ndarray,
    plan: Plan,
    state: Mapping[str, torch.Tensor],
    names: Mapping[str, str],
    given: tuple[tuple[Any, ...], dict[str, Any]],
    norms: str,
) -> tuple[torch.nn.Module, bool]:
    """Returns the graph, of open batch size where that can be had."""
    args, kwargs = given
    try:
        doubled, keywords = _doubled(args, kwargs)
        found = analyse(model, doubled, keywords, "open")
        check_same(coupling, found.coupling)
        graph = emit(found, removed, plan, state, names, norms)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            copy.deepcopy(graph).eval()(*args, **kwargs)
        return graph, True
    except (
        OpenSize,
        Refused,
        ValueError,
        RuntimeError,
        AssertionError,
        TypeError,
        KeyError,
        IndexError,
        NotImplementedError,
    ):
        pass
    found = analyse(model, args, kwargs, "exported")
    check_same(coupling, found.coupling)
    return emit(found, removed, plan, state, names, norms), False


def _doubled(args: Any, kwargs: Any) -> Any:
    """Returns inputs of a batch of two for those of one: sizes of 1 cannot stay open."""
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    first = next((t for t in tensors if t.ndim), None)
    if first is None or first.shape[0] != 1:
        return args, kwargs

    def twice(x: Any) -> Any:
        batched = isinstance(x, torch.Tensor) and x.ndim and x.shape[0] == 1
        return torch.cat([x, x]) if batched else x

    return pytree.tree_map(twice, args), pytree.tree_map(twice, kwargs)
