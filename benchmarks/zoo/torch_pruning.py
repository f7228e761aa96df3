"""Torch-Pruning on one model, and whether what comes out computes the masked original.

Half of the channels by the L1 norm of their group, with nothing said but which layers make the
outputs. Torch-Pruning has no masks, but an entry of a parameter survived if and only if its value
is still there, when all values are distinct: everything else is set to zero in a copy of the
original. A norm over a pruned axis, which Torch-Pruning makes a smaller norm, is applied in that
copy to the channels that survived. Right couplings then differ by 1e-15, wrong ones by percents.
"""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

EXACT = 1e-9  # relative, in float64


def judge(
    model: nn.Module, inputs: tuple[Any, ...], note: Callable[..., None]
) -> tuple[nn.Module | None, nn.Module]:
    """Prunes a copy of the model and notes seconds and status; returns the copy and the model.

    ``note`` is called after every stage, so that what a later one never ends is still known.
    """
    import torch_pruning as tp

    model = model.double()
    inputs = tuple(x.double() if _is_float(x) else x for x in inputs)
    original, pruned = model, copy.deepcopy(model)
    stage = "building"
    try:
        start = time.process_time()
        pruner = tp.pruner.BasePruner(
            pruned,
            inputs,
            importance=tp.importance.GroupMagnitudeImportance(p=1),
            pruning_ratio=0.5,
            ignored_layers=output_layers(pruned, inputs),
        )
        note(build_s=time.process_time() - start, status="no end while pruning")
        stage = "pruning"
        start = time.process_time()
        pruner.step()
        note(prune_s=time.process_time() - start)
        stage = "forward"
        with torch.no_grad():
            got = _tensors(pruned(*inputs))
    except Exception as error:
        note(status=f"error while {stage}", error=f"{type(error).__name__}: {str(error)[:300]}")
        return None, original
    with torch.no_grad():
        plain = _tensors(original(*inputs))
        expected = _tensors(masked(original, pruned)(*inputs))
    if not any(a.shape != b.shape for a, b in _pairs(original, pruned)):
        note(status="nothing pruned")
    elif [x.shape for x in got] != [x.shape for x in plain]:
        note(status="other output shape")
    else:
        wrong = max(_distance(a, b) for a, b in zip(expected, got, strict=True))
        moved = max(_distance(a, b) for a, b in zip(plain, got, strict=True))
        status = "exact" if wrong < EXACT else "another function"
        note(status=status, difference=wrong, change_by_pruning=moved)
    return pruned, original


def output_layers(model: nn.Module, inputs: tuple[Any, ...]) -> list[nn.Module]:
    """Returns for every output the last layer that was called and has as many channels as it.

    Of several outputs that wide it is as many layers; if no layer is, the last one called.
    """
    called: list[nn.Module] = []
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) or _is_convolution(m)]
    hooks = [m.register_forward_hook(lambda m, *_: called.append(m)) for m in layers]
    with torch.no_grad():
        outputs = _tensors(model(*inputs))
    for hook in hooks:
        hook.remove()
    widths = Counter(output.shape[1 if output.ndim > 3 else -1] for output in outputs)
    found = {}
    for width, times in widths.items():
        fitting = list({id(m): m for m in called if m.weight.shape[0] == width}.values())
        for layer in fitting[-times:] or called[-1:]:
            found[id(layer)] = layer
    return list(found.values())


def masked(original: nn.Module, pruned: nn.Module) -> nn.Module:
    """Returns the original with zeros wherever the pruned model has lost a value."""
    kept = {}
    model = copy.deepcopy(original)
    smaller = dict(pruned.named_parameters(remove_duplicate=False))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in smaller and smaller[name].shape != parameter.shape:
            kept[name] = survivors(parameter.detach().numpy(), smaller[name].detach().numpy())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in kept:
                parameter *= torch.from_numpy(kept[name])
    modules = dict(pruned.named_modules())
    for path, module in model.named_modules():
        mask = kept.get(f"{path}.weight")
        mixes = "Norm" in type(module).__name__ and "Batch" not in type(module).__name__
        if mixes and mask is not None and mask.size == max(mask.shape):  # a scale per channel
            module.forward = _on_survivors(modules[path], torch.from_numpy(mask.reshape(-1)))
    return model


def survivors(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Returns which entries of ``before`` occur in ``after``: some of its rows and columns."""
    found = np.isin(before, after)
    whole = np.ones_like(found)
    for axis in range(found.ndim):
        others = tuple(a for a in range(found.ndim) if a != axis)
        whole &= found.any(axis=others, keepdims=True)
    if not np.array_equal(found, whole) or found.sum() != after.size:
        raise ValueError(f"{before.shape} to {after.shape} is not a choice of rows and columns")
    return found


def _on_survivors(norm: nn.Module, kept: torch.Tensor) -> Callable[..., torch.Tensor]:
    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        first = isinstance(norm, nn.GroupNorm) or type(norm).__name__.endswith("2d")
        axis = 1 if first or x.shape[-1] != kept.numel() else x.ndim - 1
        small = norm(x.movedim(axis, -1)[..., kept].movedim(-1, axis), *args, **kwargs)
        whole = torch.zeros_like(x).movedim(axis, -1)
        whole[..., kept] = small.movedim(axis, -1)
        return whole.movedim(-1, axis)

    return forward


def _pairs(first: nn.Module, second: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    others: Mapping[str, torch.Tensor] = dict(second.named_parameters(remove_duplicate=False))
    return [(p, others[name]) for name, p in first.named_parameters() if name in others]


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.numel() == 0:
        return 0.0
    distance = float((a - b).abs().max() / a.abs().max().clamp(min=1e-30))
    return float("inf") if distance != distance else distance


def _tensors(outputs: Any) -> list[torch.Tensor]:
    return [x for x in pytree.tree_leaves(outputs) if _is_float(x)]


def _is_float(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd)
