"""What shapes operations return, where that is known without calling them."""

from __future__ import annotations

import math
from typing import Any

import torch

_aten = torch.ops.aten


class Unusual(Exception):
    """Something that export has to look at."""


def shape_of(x: torch.Tensor) -> tuple[Any, ...]:
    """Returns sizes, strides and dtype of a tensor.

    Raises:
        Unusual: it is sparse.
    """
    if x.layout is not torch.strided:
        raise Unusual("a sparse tensor")
    return tuple(x.shape), x.stride(), x.dtype


def empty_tensor(shape: tuple[Any, ...]) -> torch.Tensor:
    """Returns a tensor of such sizes, strides and dtype, without values."""
    size, stride, dtype = shape
    return torch.empty_strided(size, stride, dtype=dtype, device="meta")


def obvious_shape(func: Any, args: Any) -> tuple[Any, ...] | None:
    """Returns the shape of a result of the commonest layers.

    Torch knows it as well, but from Python kernels that are slow, and that import its compiler.
    """
    tensors = [x for x in args if isinstance(x, torch.Tensor)]
    if any(x.dtype is not tensors[0].dtype or not x.is_contiguous() for x in tensors):
        return None
    if not tensors or not tensors[0].is_floating_point():
        return None
    if func in _NORMS and not _NORMS[func](*args):
        return None
    if func in _LIKE_THE_FIRST:
        return shape_of(tensors[0])
    if func not in _CONVOLUTIONS or tensors[0].ndim != tensors[1].ndim:
        return None
    x, kernel = tensors[0].shape, tensors[1].shape
    defaults: tuple[Any, ...] = (None, None, None, [1], [0], [1], 1)
    strides, paddings, dilations, groups = (*args, *defaults[len(args) :])[3:]
    if x[1] != kernel[1] * groups or kernel[0] % groups:
        return None
    if not _fit(kernel[:1], args[2:3]):
        raise Unusual("a bias of other channels")  # which torch overlooks without values
    sizes = [x[0], kernel[0]]
    for i, (size, taps) in enumerate(zip(x[2:], kernel[2:], strict=True)):
        stride, padding, dilation = (n[i % len(n)] for n in (strides, paddings, dilations))
        sizes.append((size + 2 * padding - dilation * (taps - 1) - 1) // stride + 1)
    if min(sizes) < 1:
        return None
    steps = tuple(math.prod(sizes[i + 1 :]) for i in range(len(sizes)))
    return tuple(sizes), steps, tensors[0].dtype


def _fit(shape: Any, parameters: Any) -> bool:
    """Whether the parameters that are there have a shape."""
    return all(x is None or x.shape == shape for x in parameters)


def _batch_norm_fits(x: Any, *rest: Any) -> bool:
    return x.ndim > 1 and x.shape[0] > 0 and _fit(x.shape[1:2], rest[:4])


def _layer_norm_fits(x: Any, shape: Any, *rest: Any) -> bool:
    last = x.shape[-len(shape) :]
    return len(shape) > 0 and list(last) == list(shape) and _fit(last, rest[:2])


def _group_norm_fits(x: Any, groups: int, *rest: Any) -> bool:
    return x.ndim > 1 and groups > 0 and x.shape[1] % groups == 0 and _fit(x.shape[1:2], rest[:2])


_NORMS: dict[Any, Any] = {
    _aten.batch_norm.default: _batch_norm_fits,
    _aten.layer_norm.default: _layer_norm_fits,
    _aten.group_norm.default: _group_norm_fits,
}


_LIKE_THE_FIRST = {
    *_NORMS,
    _aten.dropout.default,
    _aten.gelu.default,
    _aten.hardswish.default,
    _aten.hardtanh.default,
    _aten.relu.default,
    _aten.relu6.default,
    _aten.sigmoid.default,
    _aten.silu.default,
    _aten.tanh.default,
}


_CONVOLUTIONS = {_aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default}


def key_of(x: Any) -> Any:
    """Returns what the shape of a result depends on.

    Raises:
        TypeError: something has no hash.
    """
    if isinstance(x, (list, tuple)):
        return tuple(key_of(y) for y in x)
    if isinstance(x, torch.Tensor):
        return shape_of(x)
    hash(x)
    return type(x), x
