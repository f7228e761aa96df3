"""Training a pruned torch module: masked calls, and an optimizer hook for ordinary loops.

The module itself is never touched: no parameter is renamed, no buffer added, no forward replaced.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from purepruning.arguments import flag, instance, missing, shown
from purepruning.masks import apply_masks, by_path
from purepruning.shards import is_sharded, local, local_as
from purepruning_interop.torch.program import check, is_fully_sharded

Masks = Mapping[str, torch.Tensor]


#: A module, or the tensors themselves by name, as the functional style holds them.
Model = torch.nn.Module | Mapping[str, torch.Tensor]


def masked_call(
    model: torch.nn.Module,
    masks: Masks,
    *args: Any,
    params: Mapping[str, torch.Tensor] | None = None,
    **kwargs: Any,
) -> Any:
    """Returns ``model(*args, **kwargs)`` with pruned weights taken as zero.

    Gradients of pruned weights are exactly zero, for the model's own parameters (``backward``) as
    for ``params`` (``torch.func.grad``, ``vmap``, ``jvp``). Nothing is written to the model, except
    what its own forward writes (running statistics, but for those that masks name). A shared
    parameter is masked in all its places, under the name that ``model.named_parameters()`` has.

    Args:
        model: any module.
        masks: boolean tensors by name of a parameter or buffer; those without one are used whole.
        *args: arguments of the model.
        params: parameters and buffers by name to use in place of the model's own, as in
            ``torch.func.functional_call``; those it does not name are the model's.
        **kwargs: keyword arguments of the model.

    Raises:
        KeyError: a mask, or an entry of ``params``, names no parameter.
        ValueError: a mask does not broadcast to its parameter, or lies on another device.
        TypeError: a mask is not boolean.

    >>> import torch
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> masks = {"weight": torch.tensor([[True, False]])}
    >>> masked_call(model, masks, torch.tensor([[3.0, 5.0]])).sum().backward()
    >>> model.weight.grad.tolist()
    [[3.0, 0.0]]
    """
    check("masked_call(model, masks, *args)", model)
    if any(map(is_fully_sharded, model.modules())):
        raise ValueError(
            "masked_call: parts of the model are sharded by fully_shard, which puts its own "
            "parameters in for a call; begin with apply_, and keep pruned weights at zero by "
            "keep_pruned"
        )
    own = _tensors(model)
    tensors = "a dict of tensors by name"
    instance(masks, Mapping, "masked_call: masks", tensors)
    if params is not None:
        instance(params, Mapping, "masked_call: params", tensors)
    given = dict(params or {})
    known = {*(name for name, _ in model.named_parameters(remove_duplicate=False))}
    known |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
    for name in given:
        if name not in known:
            raise KeyError(missing(f"params: the model has no {name!r}", name, sorted(known)))
        if not isinstance(given[name], torch.Tensor):
            raise TypeError(
                f"masked_call: params: {name!r} must be a tensor, got {shown(given[name])}"
            )
    by_path(masks, own | given)
    masked = {name: given.get(name, own.get(name)) for name in masks}
    values = given | apply_masks(masked, masks)
    return torch.func.functional_call(model, values, args, kwargs)


@torch.no_grad()
def apply_(model: Model, masks: Masks) -> None:
    """Writes zeros into the pruned weights of ``model``, in place; returns nothing.

    Once, at this moment: training may move them again, see :func:`keep_pruned`.

    Raises:
        KeyError, ValueError, TypeError: as :func:`masked_call`; nothing is then written.

    >>> import torch
    >>> model = torch.nn.Linear(2, 2)
    >>> apply_(model, {"bias": torch.tensor([True, False])})
    >>> model.bias[1].item()
    0.0
    """
    for parameter, mask in _pairs("apply_(model, masks)", model, masks):
        mine = local_as(parameter, mask) if is_sharded(parameter) else mask
        local(parameter).masked_fill_(~mine, 0)


def keep_pruned(
    model: Model,
    masks: Masks,
    optimizer: torch.optim.Optimizer,
    *,
    zero_moments: bool = False,
) -> KeepPruned:
    """Returns a handle; until it is removed, every optimizer step ends with pruned weights at zero.

    A hook on the optimizer (``register_step_post_hook``) writes the zeros, so neither momentum nor
    weight decay gets past it, in any optimizer. The model is left alone: its ``state_dict``, a copy
    and a pickle of it know nothing of masks. Before the first step nothing is written; call
    :func:`apply_` to begin with pruned weights. Gradients are not masked; use :func:`masked_call`
    where that matters (a clipped global norm).

    A step costs one pass over the masked weights; for it the masks are held as integers, as many
    bytes as the weights have (where a mask broadcasts, as many as it has elements).

    A copied or unpickled optimizer has no hook, as torch copies none; call this again for it. The
    parameters are those that ``model`` has now; where the optimizer must be made anew (after
    ``load_state_dict(assign=True)``), so must this. Several optimizers need one call each.

    Args:
        model: the module whose names the masks use, or a dict of (stacked) tensors by name.
        masks: boolean tensors by parameter name.
        optimizer: it must hold at least one masked parameter. A wrapper (Accelerate's, say) that
            has the torch optimizer as its attribute ``optimizer`` may stand for it.
        zero_moments: also set the optimizer's state of pruned weights to zero, in every state
            tensor of the parameter's shape, so that a weight that comes back starts anew.

    Raises:
        KeyError, ValueError, TypeError: as :func:`masked_call`.
        ValueError: the optimizer holds no masked parameter; it belongs to another model.
        TypeError: ``optimizer`` is none, nor holds one.

    >>> import torch
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> with keep_pruned(model, {"weight": torch.tensor([[True, False]])}, optimizer):
    ...     model(torch.ones(1, 2)).sum().backward()
    ...     optimizer.step()
    >>> model.weight[0, 1].item()
    0.0
    """
    flag(zero_moments, "keep_pruned: zero_moments")
    return KeepPruned(model, masks, optimizer, zero_moments)


class KeepPruned:
    """What :func:`keep_pruned` returns: removes its hook, or gives it other masks.

    A context manager, which removes the hook at the end.
    """

    def __init__(
        self,
        model: Model,
        masks: Masks,
        optimizer: torch.optim.Optimizer,
        zero_moments: bool,
    ) -> None:
        inner = _innermost(optimizer)
        self._model, self._zero_moments = model, zero_moments
        self._held = {p for group in inner.param_groups for p in group["params"]}
        self.set_masks(masks)
        self._hook = inner.register_step_post_hook(self._after_step)

    def set_masks(self, masks: Masks) -> None:
        """Takes other masks from the next step on.

        Raises:
            KeyError, ValueError, TypeError: as :func:`keep_pruned`; the old masks then stay.
        """
        pairs = _pairs("keep_pruned(model, masks, optimizer)", self._model, masks)
        if masks and not any(parameter in self._held for parameter, _ in pairs):
            raise ValueError(
                "keep_pruned: the optimizer holds none of the masked parameters; was it made for "
                "another model, or for a copy?"
            )
        self._pairs = [(parameter, _bits(mask, parameter)) for parameter, mask in pairs]

    def remove(self) -> None:
        """Removes the hook; removing it again does nothing."""
        self._hook.remove()

    def __enter__(self) -> KeepPruned:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for i, (parameter, bits) in enumerate(self._pairs):
            if not _fits(
                bits, local(parameter)
            ):  # the model may have moved since, or has another dtype
                bits = _integers(bits.to(parameter.device) != 0, parameter)
                self._pairs[i] = parameter, bits
            _clear(parameter, bits)
            if self._zero_moments:
                for value in optimizer.state.get(parameter, {}).values():
                    # A scalar of the state is a step count, even if the parameter is one too.
                    if torch.is_tensor(value) and value.ndim and value.shape == parameter.shape:
                        _clear(value, bits)


def _innermost(optimizer: Any) -> torch.optim.Optimizer:
    """Returns the optimizer itself, or the one inside of wrappers, whose steps theirs end in.

    A wrapper (Accelerate's, say) may be a subclass of torch's that was never initialised as one.

    Raises:
        TypeError: there is none.
    """
    inner = optimizer
    while not (isinstance(inner, torch.optim.Optimizer) and "param_groups" in vars(inner)):
        if type(optimizer).__module__.startswith("optax"):
            raise TypeError(
                "keep_pruned: optimizer is an Optax transform; use purepruning.keep_pruned(masks, "
                "optimizer) for it"
            )
        if not hasattr(inner, "optimizer"):
            raise TypeError(
                "keep_pruned: optimizer must be a torch.optim.Optimizer, or hold one as its "
                f"attribute 'optimizer', got {type(optimizer).__name__}; pass the torch optimizer "
                "that takes the steps"
            )
        inner = inner.optimizer
    return inner


# Masks as integers of the weight's width, all ones where kept and zero where pruned: "and" writes
# +0.0 over NaN and -0.0 too, and takes a twentieth of the time of `masked_fill_` on a CPU.

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(mask: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Returns what to combine the bits of ``parameter`` with, so that pruned ones are zero.

    Of a parameter that lies over processes, those of this process's shard.
    """
    mine = local_as(parameter, mask) if is_sharded(parameter) else mask
    return _integers(mine, parameter)


def _integers(mask: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    # There is no integer as wide as complex128; such weights are filled.
    return mask.to(_INTEGERS.get(parameter.element_size(), torch.int8)).neg()


def _fits(bits: torch.Tensor, tensor: torch.Tensor) -> bool:
    return bits.device == tensor.device and bits.element_size() == tensor.element_size()


def _clear(tensor: torch.Tensor, bits: torch.Tensor) -> None:
    """Writes zeros into ``tensor``, or this process's shard of it, where ``bits`` are zero."""
    tensor = local(tensor)
    if _fits(bits, tensor):
        tensor.detach().view(bits.dtype).bitwise_and_(bits)
    else:
        tensor.masked_fill_(bits.to(tensor.device) == 0, 0)


def _tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Returns parameters and buffers by name: complete masks have those of statistics too."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _pairs(where: str, model: Model, masks: Masks) -> list[tuple[torch.Tensor, torch.Tensor]]:
    if not isinstance(model, Mapping):
        check(where, model)
    params = dict(model) if isinstance(model, Mapping) else _tensors(model)
    return [(params[name], mask) for name, mask in by_path(masks, params).items()]
