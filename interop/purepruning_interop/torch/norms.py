"""Norms of fewer positions that divide by as many as there were.

They stand in for the norms of a module whose width shrinks: what was removed counts as zero, as it
does in the masked model. Parameters, state dicts and settings are those of a smaller norm.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


def with_divisor(module: nn.Module, before: int, after: int) -> nn.Module | None:
    """Returns a smaller norm that divides by the number of positions that there were.

    Args:
        module: the norm, with parameters that are cut already; its tensors are taken over.
        before, after: how many positions a statistic ran over, and how many are left of them.

    Returns None for what is no norm. A module of another class than torch's is taken for a root
    mean square norm, ``w * x / sqrt(mean(x**2) + eps)`` or the like, which a scale of ``x``
    corrects; whether it is one, a run of the model has to show.
    """
    if isinstance(module, _Full):  # of an earlier round
        again = copy.copy(module)
        again.after = after
        return again
    own: Any = next((base for norm, base in _BASES.items() if isinstance(module, norm)), None)
    cls: Any = type(module)
    if own is not None:
        plain = any(cls.forward is norm.forward for norm in _BASES)
        cls = own if plain else _derived(cls, _Calling)
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

    def _normalised(
        self, x: torch.Tensor, axes: list[int], centred: bool, eps: float | None
    ) -> torch.Tensor:
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
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        return wide * torch.rsqrt(total / n + eps)

    def layer_norm(
        self,
        input: torch.Tensor,
        normalized_shape: Sequence[int],
        weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        eps: float = 1e-5,
    ) -> torch.Tensor:
        """Returns what :func:`torch.nn.functional.layer_norm` does of the whole width."""
        axes = list(range(-len(normalized_shape), 0))
        return _affine(self._normalised(input, axes, True, eps), weight, bias, input)

    def rms_norm(
        self,
        input: torch.Tensor,
        normalized_shape: Sequence[int],
        weight: torch.Tensor | None = None,
        eps: float | None = None,
    ) -> torch.Tensor:
        """Returns what :func:`torch.nn.functional.rms_norm` does of the whole width."""
        axes = list(range(-len(normalized_shape), 0))
        return _affine(self._normalised(input, axes, False, eps), weight, None, input)

    def group_norm(
        self,
        input: torch.Tensor,
        num_groups: int,
        weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        eps: float = 1e-5,
    ) -> torch.Tensor:
        """Returns what :func:`torch.nn.functional.group_norm` does of whole groups."""
        grouped = input.unflatten(1, (num_groups, -1))
        found = self._normalised(grouped, list(range(2, grouped.ndim)), True, eps).flatten(1, 2)
        shape = (-1, *[1] * (input.ndim - 2))
        weight, bias = (x if x is None else x.view(shape) for x in (weight, bias))
        return _affine(found, weight, bias, input)


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
        return self.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(_Full, nn.RMSNorm):
    """A root mean square norm in which what was removed counts as zero."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the normalised tensor."""
        return self.rms_norm(x, self.normalized_shape, self.weight, self.eps)


class GroupNorm(_Full, nn.GroupNorm):
    """A group norm in which what was removed of every group counts as zero."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Returns the normalised tensor."""
        return self.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


class _Calling(_Full):
    """A norm of a class with a forward of its own, whose calls of torch's norms are replaced."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the forward does, with other norms in it."""
        with _Replacing(self):
            return super().forward(*args, **kwargs)


class _Replacing(TorchFunctionMode):
    """Replaces calls of torch's norms by those of a module that counts what was removed."""

    def __init__(self, module: _Full) -> None:
        super().__init__()
        self.own = {
            nn.functional.layer_norm: module.layer_norm,
            nn.functional.rms_norm: module.rms_norm,
            nn.functional.group_norm: module.group_norm,
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.own.get(func, func)(*args, **(kwargs or {}))


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
def _derived(cls: Any, own: Any) -> Any:
    """Returns a class derived from a norm's, whose forward another one is put around."""
    return type(cls.__name__, (own, cls), {"__reduce__": _reduce, "of": (cls, own)})


def _reduce(self: Any) -> Any:
    return _made, self.of, self.__dict__


def _made(cls: Any, own: Any) -> Any:
    """Returns an empty norm, for copies and pickles."""
    made = _derived(cls, own)
    return made.__new__(made)
