"""Masks and plain parameters out of what ``torch.nn.utils.prune`` leaves in a module."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from purepruning.arguments import wrong_model
from purepruning_interop.torch.program import leaf_names


def masks_from_torch_prune(
    model: torch.nn.Module | Mapping[str, torch.Tensor], /
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Returns ``(masks, state)`` of a model that ``torch.nn.utils.prune`` pruned.

    That stores ``weight_orig`` and ``weight_mask`` in place of ``weight``. Here the mask is a
    boolean tensor under the name of the plain parameter (``conv.weight``), for
    :func:`keep_pruned`, :func:`masked_call` and all of ``purepruning``; ``state`` is the state dict
    of the same model without pruning, with the stored weights before they are masked, for
    ``load_state_dict`` of a model that is built anew. What is given is not changed; tensors of
    ``state`` share its memory.

    Args:
        model: the module, or its state dict, such as a checkpoint.

    Raises:
        TypeError: ``model`` is neither.
        ValueError: nothing of it is pruned so; or a mask holds other numbers than 0 and 1.

    >>> import torch
    >>> from torch.nn.utils import prune
    >>> layer = torch.nn.Linear(2, 2)
    >>> layer.weight.data = torch.tensor([[1.0, 4.0], [3.0, 2.0]])
    >>> masks, state = masks_from_torch_prune(prune.l1_unstructured(layer, "weight", amount=2))
    >>> masks["weight"].tolist(), state["weight"].tolist()
    ([[False, True], [True, False]], [[1.0, 4.0], [3.0, 2.0]])
    """
    where = "masks_from_torch_prune(model)"
    if isinstance(model, torch.nn.Module):
        found = dict(model.state_dict())
        tied = {name for name, first in leaf_names(model).items() if name != first}
    elif isinstance(model, Mapping) and all(isinstance(k, str) for k in model):
        found, tied = dict(model), set()
    else:
        raise wrong_model(where, model, "torch", "a torch.nn.Module instance or a state dict")
    masks: dict[str, torch.Tensor] = {}
    state: dict[str, torch.Tensor] = {}
    for name, tensor in found.items():
        plain, _, kind = name.rpartition("_")
        if kind not in ("orig", "mask") or not {f"{plain}_orig", f"{plain}_mask"} <= found.keys():
            state[name] = tensor
        elif kind == "orig":
            state[plain] = tensor
        elif name not in tied:  # a shared module has its parameter once
            masks[plain] = _boolean(where, name, tensor)
    if not masks:
        raise ValueError(
            f"{where}: nothing is pruned by torch.nn.utils.prune: no name ends with _orig beside "
            "one with _mask; for weights that are zero already, use purepruning.masks_from_zeros"
        )
    return masks, state


def _boolean(where: str, name: str, mask: torch.Tensor) -> torch.Tensor:
    odd = mask[(mask != 0) & (mask != 1)]
    if odd.numel():
        raise ValueError(
            f"{where}: {name!r} must hold 0 and 1, got {float(odd[0])}; multiply it into the "
            "weight and prune with a mask of 0 and 1"
        )
    return mask != 0
