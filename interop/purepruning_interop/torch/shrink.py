"""The smaller module: the user's own class where that computes the same, else its graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from purepruning.arguments import one_of
from purepruning.coupling.coupling import Coupling, check_coupling
from purepruning.coupling.plan import Plan, plan_of, units_of_plan
from purepruning.coupling.removal import Removal
from purepruning.coupling.shrink_report import (
    Kind,
    Norms,
    ShrinkReport,
    Shrunk,
    check_plan,
    check_same,
)
from purepruning.coupling.unit_masks import Chosen, Conflicts
from purepruning.masks import apply_masks, merge_masks
from purepruning.types import Masks
from purepruning_interop.torch.couple import Analysis, analyse
from purepruning_interop.torch.graphs import graph_of
from purepruning_interop.torch.layers import layers, remember
from purepruning_interop.torch.pretrained import configured
from purepruning_interop.torch.program import Var, check_whole, leaf_names
from purepruning_interop.torch.surgery import cut_modules, with_divisors
from purepruning_interop.torch.tracing.trace import asks_for_mode
from purepruning_interop.torch.uses import Uses, uses_of
from purepruning_interop.torch.verify import Reference, with_state


def shrink(
    model: torch.nn.Module,
    masks: Masks,
    coupling: Coupling,
    /,
    *inputs: Any,
    norms: Norms = "original",
    conflicts: Conflicts = "keep",
    **kwargs: Any,
) -> Shrunk:
    """Returns a smaller module that computes what the masked one does.

    First the user's own class is tried: a copy with cut parameters and corrected attributes
    (``in_features``, ``groups``, ``num_heads``, ...). It is returned if it runs and agrees with
    the masked original: in float64, whatever the dtype of the model. Otherwise the result is a
    ``torch.fx.GraphModule``: the exported program with other sizes, and parameters under their
    names. Both have the keys of the original's state dict, and can be copied, trained further,
    compiled and exported. A graph switches dropouts and batch norms with ``train()``; attention
    dropout it has none.

    The complete masks of the report name statistics too, so that
    ``apply_(model.state_dict(), report.masks)`` makes a model the masked one.

    Args:
        model: the module that was coupled. It stays as it is.
        masks: masks of any pruner, or of :meth:`purepruning.Coupling.masks`, by name.
        coupling: what :func:`couple` returned for it.
        *inputs, **kwargs: example inputs, as for the module. Their batch size may change later,
            unless the report says otherwise. Keywords ``norms`` and ``conflicts`` of its own cannot
            be given; make a module around it.
        norms: what a mean over an axis that shrinks divides by: ``"original"`` keeps the number of
            positions there were: the masked model exactly. ``"kept"`` averages over what is kept,
            as a natively smaller ``LayerNorm`` does.
        conflicts: as in :func:`purepruning.shrink`.

    Raises:
        TypeError: ``model`` is no module, or ``coupling`` no coupling.
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
    >>> shrink(model, masks, coupling, torch.ones(1, 3)).model
    Sequential(
      (0): Linear(in_features=3, out_features=4, bias=True)
      (1): Linear(in_features=4, out_features=2, bias=True)
    )
    """
    check_whole("shrink(model, masks, coupling, *inputs)", model)
    one_of("norms", norms, ("original", "kept"))
    check_coupling("shrink", coupling)
    names = leaf_names(model)
    leaves = _leaves(model, names)
    masks = _canonical(masks, names)
    _check_leaves(coupling, leaves)
    chosen = coupling.chosen(masks, leaves, conflicts=conflicts)
    complete = merge_masks(coupling.masks(np.flatnonzero(chosen.removed), leaves), masks)
    masked = apply_masks(leaves, complete)
    result = _build(model, coupling, chosen.removed, masked, complete, (inputs, kwargs), norms)
    return _shrunk(model, coupling, chosen, complete, result, norms)


def rebuild(
    model: torch.nn.Module,
    plan: Plan,
    /,
    *inputs: Any,
    norms: Norms = "original",
    **kwargs: Any,
) -> Shrunk:
    """Returns what :func:`shrink` returned, again, from the plan of its report.

    The weights of the small model are then put in with ``load_state_dict``; those of ``model`` are
    cut, and do not matter. Needs no pickle: :func:`purepruning.save_plan` writes the plan,
    ``safetensors`` or ``torch.save`` the state dict.

    Args:
        model: the full model, as it is built.
        plan: of the report, maybe from a file (:func:`purepruning.load_plan`).
        *inputs, norms, **kwargs: as for :func:`shrink`.

    Raises:
        TypeError: ``model`` is no module, or ``plan`` no plan.
        ValueError: the plan does not belong to this model; an unknown option.

    >>> import torch
    >>> from purepruning_interop.torch import couple
    >>> def build():
    ...     return torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Linear(8, 2))
    >>> model, x = build(), torch.ones(1, 3)
    >>> coupling = couple(model, x)
    >>> masks = coupling.masks([1, 2, 3, 4], dict(model.named_parameters()))
    >>> small = shrink(model, masks, coupling, x)
    >>> again = rebuild(build(), small.report.plan, x).model
    >>> again.load_state_dict(small.model.state_dict())
    <All keys matched successfully>
    """
    check_whole("rebuild(model, plan, *inputs)", model)
    one_of("norms", norms, ("original", "kept"))
    check_plan(plan)
    leaves = _leaves(model, leaf_names(model))
    coupling, removed = _fitted(model, plan, inputs, kwargs)
    masks = coupling.masks(np.flatnonzero(removed), leaves)
    masked = apply_masks(leaves, masks)
    result = _build(model, coupling, removed, masked, masks, (inputs, kwargs), norms)
    return _shrunk(model, coupling, Chosen(removed, (), ()), masks, result, norms)


def _fitted(
    model: torch.nn.Module, plan: Plan, inputs: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Coupling, np.ndarray]:
    """Returns the coupling that a plan fits and its units, whichever outputs were to stay whole."""
    coupling = analyse(model, inputs, kwargs, True).coupling
    try:
        return coupling, units_of_plan(coupling, plan)
    except ValueError:
        coupling = analyse(model, inputs, kwargs, False).coupling
        return coupling, units_of_plan(coupling, plan)


def _shrunk(
    model: torch.nn.Module,
    coupling: Coupling,
    chosen: Chosen,
    masks: Any,
    result: _Built,
    norms: Norms,
) -> Shrunk:
    small = result.model
    report = ShrinkReport(
        result.plan,
        masks,
        (_size(model), _size(small)),
        (coupling.cost()[1], coupling.cost(chosen.removed)[1]),
        norms,
        coupling.statistics,
        chosen.restored,
        chosen.extended,
        result.kind,
        result.reason,
        result.deviation,
        result.fixed,
        leaf_names(model),
        result.replaced,
        result.config,
    )

    def fn(params: Mapping[str, torch.Tensor], *inputs: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(small, dict(params), inputs, kwargs)

    return Shrunk(small, fn, dict(small.named_parameters()), report)


def _size(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


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
    kind: Kind
    reason: str
    deviation: float | None
    fixed: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    config: str = ""


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
    _refuse_empty_kernels(plan)
    names = leaf_names(model)
    state = _cut_state(model, plan, masked, names)
    found = analyse(model, *given, coupling.outputs)
    check_same(coupling, found.coupling)
    _refuse_branches(found)
    outputs = None if coupling.outputs is True else _cut_outputs(found, removed)
    reference = Reference(model, masked, complete, names, given, outputs)
    uses = uses_of(found, removed)
    own: torch.nn.Module | None = None
    try:
        own = cut_modules(model, plan, state, names, coupling, uses)
        own.train(model.training)
        for mine, theirs in zip(own.modules(), model.modules(), strict=True):
            mine.training = theirs.training
    except Exception as error:  # copies and attributes are code of the model's classes
        why = f"its own class cannot be cut: {type(error).__name__}: {error}"
    if own is not None:
        divided = uses.means if norms == "original" else {}
        for candidate, config in configured(own, plan, coupling, divided):
            deviation, why, replaced = _own_class(candidate, plan, reference, uses, norms)
            if deviation is not None:
                less = _in_training(candidate, model, reference)
                return _Built(candidate, plan, "module", less, deviation, (), replaced, config)
    graph = graph_of(model, coupling, removed, plan, state, reference, norms)
    graph.module.train(model.training)
    remember(graph.module, layers(model if own is None else own))
    deviation = None
    if norms == "kept":
        if own is not None:  # compared with what averages over what is kept
            deviation, own_why = reference.compare(own, plan, graph.module)
            if deviation is not None:
                less = _in_training(own, model, reference)
                return _Built(own, plan, "module", less, deviation)
            why = own_why
    else:
        deviation, trouble = reference.compare(graph.module, plan)
        if deviation is None and reference.steady():
            raise RuntimeError(
                f"the shrunk graph of {type(model).__name__} does not compute what the masked "
                f"model does: {trouble}. That is a bug of this library"
            )
    lost = found.training_only
    if lost is None:
        why += "; the graph is that of eval mode, since training mode cannot be read"
    elif lost:
        why += f"; the graph lacks what only training uses: {', '.join(sorted(lost))}"
    return _Built(graph.module, plan, "graph", why, deviation, graph.fixed)


def _refuse_empty_kernels(plan: Plan) -> None:
    """Raises ValueError where a residual branch goes whose convolutions would have no channels."""
    for path in plan.cuts:
        shape = plan.shape(path)
        if len(shape) > 3 and 0 in shape:
            raise ValueError(
                f"a residual branch goes, and {path!r} would be of shape {shape}, but torch has no "
                "convolutions without channels; leave its layers out of rules with 'units': "
                "'branch', or take the block away by purepruning_interop.torch.drop_blocks"
            )


def _refuse_branches(found: Analysis) -> None:
    """Raises ValueError where an operation calls programs, which nothing here can look into."""
    for op in found.program.ops:
        if any(isinstance(x, torch.fx.GraphModule) for x in op.args.values()):
            raise ValueError(
                f"shrink: the model calls torch.{op.name}, whose branches are programs of their "
                "own, so that a smaller model cannot be compared with the masked one; shrink the "
                "modules before and behind it, one at a time"
            )


def _in_training(own: torch.nn.Module, model: torch.nn.Module, reference: Reference) -> str:
    """Returns what a result of the model's own class cannot do in training mode."""
    return reference.training(own) if asks_for_mode(model) else ""


def _own_class(
    own: torch.nn.Module, plan: Plan, reference: Reference, uses: Uses, norms: str
) -> tuple[float | None, str, tuple[str, ...]]:
    """Returns how far the cut model is off, or why it cannot be, and which norms were replaced.

    With ``norms="kept"`` it is compared with other norms than it has, which keep the divisor: what
    agrees but for those is what averages over what is kept.
    """
    divided, replaced = own, tuple(uses.means)
    if norms == "kept" and replaced:
        divided, replaced = with_state(own, {}, leaf_names(own)), ()
    if reason := with_divisors(divided, uses.means):
        return None, reason, ()
    deviation, why = reference.compare(divided, plan)
    return deviation, why, replaced


def _cut_outputs(found: Analysis, removed: np.ndarray) -> list[list[tuple[int, np.ndarray]]]:
    """Returns for every output the axes that shrink, and which of their positions stay."""
    removal = Removal(found.flow, removed[found.numbers], "original")
    cuts = []
    for out in found.program.outputs:
        axes = found.values[out.number].axes if isinstance(out, Var) else ()
        kept = [(a, removal.kept(axis)) for a, axis in enumerate(axes)]
        cuts.append([(a, positions) for a, positions in kept if positions is not None])
    return cuts


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
