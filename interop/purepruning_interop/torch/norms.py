"""Norms of fewer positions that divide by as many as there were.

They stand in for the norms of a module whose width shrinks: what was removed counts as zero, as it
does in the masked model. Parameters, state dicts and settings are those of a smaller norm.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def with_divisor(module: nn.Module, before: int, after: int) -> nn.Module | None:
    """Returns a smaller norm that divides by the number of positions that there were.

    Args:
        module: the norm, with parameters that are cut already; its tensors are taken over.
        before, after: how many positions a statistic ran over, and how many are left of them.

    Returns None for what is no norm. A module of another class than torch's is taken for a root
    mean square norm, ``w * x / sqrt(mean(x**2) + eps)`` or the like, which a scale of ``x``
    corrects; whether it is one, a run of the model has to show.
    """
    own: Any = next((base for norm, base in _BASES.items() if isinstance(module, norm)), None)
    cls: Any = type(module)
    if own is not None:
        plain = any(cls.forward is norm.forward for norm in _BASES)
        cls = own if plain else _between(cls, own)
    elif any(module.children()) or not any(p.ndim == 1 for p in module.parameters()):
        return None
    else:
        cls = _derived(cls, _Scaled)
    found: Any = cls.__new__(cls)
    found.__dict__.update(module.__dict__)
    found.before, found.after = before, after
    return found


class _Full(nn.Module):
    """What norms with an original divisor have in common."""

    before: int
    after: int

    def extra_repr(self) -> str:
        """Returns the settings."""
        settings = (super().extra_repr(), f"removed={self.before - self.after} of {self.before}")
        return ", ".join(part for part in settings if part)

    def _normalised(self, x: torch.Tensor, axes: list[int], centred: bool) -> torch.Tensor:
        """Returns a tensor normalised over axes that hold ``after`` of ``before`` positions."""
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        left = 1
        for axis in axes:
            left = left * x.shape[axis]
        n = left * self.before / self.after
        gone = n - left
        total = wide.square().sum(axes, keepdim=True)
        if centred:
            mean = wide.sum(axes, keepdim=True) / n
            wide = wide - mean
            total = wide.square().sum(axes, keepdim=True) + gone * mean.square()
        eps: Any = self.eps
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        return wide * torch.rsqrt(total / n + eps)


def _affine(x: torch.Tensor, weight: Any, bias: Any, like: torch.Tensor) -> torch.Tensor:
    """Returns a normalised tensor scaled and shifted, in the dtype of ``like``."""
    if weight is not None:
        x = x * weight
    if bias is not None:
        x = x + bias
    return x.to(like.dtype)


class LayerNorm(_Full, nn.LayerNorm):
    """A layer norm in which what was removed counts as zero."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Returns the normalised tensor."""
        axes = list(range(-len(self.normalized_shape), 0))
        return _affine(self._normalised(input, axes, True), self.weight, self.bias, input)


class RMSNorm(_Full, nn.RMSNorm):
    """A root mean square norm in which what was removed counts as zero."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the normalised tensor."""
        axes = list(range(-len(self.normalized_shape), 0))
        return _affine(self._normalised(x, axes, False), self.weight, None, x)


class GroupNorm(_Full, nn.GroupNorm):
    """A group norm in which what was removed of every group counts as zero."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Returns the normalised tensor."""
        grouped = input.unflatten(1, (self.num_groups, -1))
        found = self._normalised(grouped, list(range(2, grouped.ndim)), True).flatten(1, 2)
        shape = (-1, *[1] * (input.ndim - 2))
        weight, bias = (x if x is None else x.view(shape) for x in (self.weight, self.bias))
        return _affine(found, weight, bias, input)


class _Scaled(_Full):
    """A root mean square norm of any class, given numbers whose mean square is the right one."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Returns the normalised tensor."""
        scale = math.sqrt(self.after / self.before)
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        found = super().forward(wide * scale, *args, **kwargs)
        return (found / scale).to(x.dtype)


_BASES: Mapping[Any, Any] = {
    nn.LayerNorm: LayerNorm,
    nn.RMSNorm: RMSNorm,
    nn.GroupNorm: GroupNorm,
}


@functools.cache
def _between(cls: Any, own: Any) -> Any:
    """Returns a class derived from a norm's whose own ``super().forward`` is the corrected one."""
    return type(cls.__name__, (cls, own), {"__reduce__": _reduce, "of": (cls, own)})


@functools.cache
def _derived(cls: Any, own: Any) -> Any:
    """Returns a class derived from a norm's that corrects what its forward is given."""
    return type(cls.__name__, (own, cls), {"__reduce__": _reduce, "of": (cls, own)})


def _reduce(self: Any) -> Any:
    return _made, self.of, self.__dict__


def _made(cls: Any, own: Any) -> Any:
    """Returns an empty norm, for copies and pickles."""
    made = _derived(cls, own) if own is _Scaled else _between(cls, own)
    return made.__new__(made)
