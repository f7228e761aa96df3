r"""Fake quantisation: numbers as the nearest integers times a scale, gradients straight through.

Every operation is rounded alike in JAX (compiled or not), torch and NumPy, so that results are the
same bit for bit: numbers are multiplied by the reciprocal of the scale, to which XLA would turn a
division anyway, and are rounded before the zero point is added, as ONNX and integer kernels do.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from purepruning.arguments import floats, is_number, scalar, shown, whole_number
from purepruning.arrays import is_torch, namespace, stop_gradient
from purepruning.types import Array

#: A smaller scale, as of a channel that is pruned, is 1: its reciprocal would be infinite.
_SMALLEST = 2.0**-120


class Scale(NamedTuple):
    """How integers stand for numbers: ``scale * (integer - zero_point)``.

    Both float32, and of one shape; zero points are whole numbers.
    """

    scale: Any
    zero_point: Any


def affine(smallest: Array, largest: Array, low: int, high: int) -> Scale:
    r"""Returns the scale by which ``low`` to ``high`` cover a range, with zero an integer of it.

    $$s = \frac{\max(r_{max}, 0) - \min(r_{min}, 0)}{high - low}, \qquad
      z = low - \mathrm{round}(\min(r_{min}, 0) / s)$$

    Where the range is zero, the scale is 1. Jacob et al. 2017, arXiv:1712.05877.

    Args:
        smallest, largest: the ends of the ranges, float32, both of one shape, which is that of
            scales and zero points too.
        low, high: the smallest and the largest integer.

    >>> import numpy as np
    >>> [float(x) for x in affine(np.float32(-3), np.float32(4.65), 0, 255)]
    [0.03, 100.0]
    """
    _check_range("affine", smallest, largest, low, high)
    xp = namespace(smallest)
    zero = xp.zeros_like(smallest)
    smallest, largest = xp.minimum(smallest, zero), xp.maximum(largest, zero)
    scale = _or_one((largest - smallest) * (1 / (high - low)))
    return Scale(scale, xp.clip(low - xp.round(smallest * (1 / scale)), low, high))


def symmetric(smallest: Array, largest: Array, low: int, high: int) -> Scale:
    r"""Returns the scale by which ``low`` to ``high`` cover a range made symmetric.

    $$s = \frac{2 \max(|r_{min}|, |r_{max}|)}{high - low}, \qquad z = \frac{low + high}{2}$$

    Where the range is zero, the scale is 1. Arguments and shapes are those of :func:`affine`.

    >>> import numpy as np
    >>> [float(x) for x in symmetric(np.float32(-3), np.float32(2.54), -127, 127)]
    [0.0236220, 0.0]
    """
    _check_range("symmetric", smallest, largest, low, high)
    xp = namespace(smallest)
    scale = _or_one(xp.maximum(xp.abs(smallest), xp.abs(largest)) * (2 / (high - low)))
    return Scale(scale, xp.full_like(scale, (low + high) // 2))


def fake_quantize(x: Array, scale: Any, zero_point: Any, low: int, high: int) -> Any:
    r"""Returns ``x`` as integers from ``low`` to ``high`` can hold it, in float, of its dtype.

    $$\hat x = s \, (\mathrm{clip}(\mathrm{round}(x / s) + z, low, high) - z), \qquad
      \frac{\partial L}{\partial x} :=
      \begin{cases}
        \partial L / \partial \hat x & low \le \mathrm{round}(x / s) + z \le high \\
        0 & \text{elsewhere}
      \end{cases}$$

    Halves are rounded to even. The gradient passes where the integer was not clipped, so at the
    ends of the range too; scale and zero point have none. Computed in float32. A zero stays zero,
    since zero points are integers of the range; NaN stays NaN.

    Args:
        x: any array.
        scale, zero_point: scalars, or arrays of as many axes as ``x`` that broadcast to it.
        low, high: the smallest and the largest integer.

    Raises:
        TypeError: ``x`` is no array of floats.
        ValueError: the scale is a number that is not positive, or ``low`` is not below ``high``.

    >>> import jax.numpy as jnp
    >>> fake_quantize(jnp.array([-2.0, 0.3, 0.7, 9.0]), 0.5, 2, 0, 7).tolist()
    [-1.0, 0.5, 0.5, 2.5]
    """
    floats(x, "fake_quantize: x")
    _check_levels("fake_quantize", low, high)
    scale = checked_scale(scale, "fake_quantize: scale", x)
    xp = namespace(x)
    wide = xp.astype(x, xp.float32)
    constant = stop_gradient(wide)
    scale, zero_point = stop_gradient(scale), stop_gradient(zero_point)
    whole = xp.round(constant * (1 / scale)) + zero_point
    clipped = xp.clip(whole, low, high)
    through = xp.where(whole == clipped, wide - constant, 0.0)  # zero, with a derivative of one
    # A zero is one anyway; said so, it is seen where the coupling of channels is read off.
    value = xp.where(constant == 0, 0.0, (clipped - zero_point) * scale)
    return xp.astype(value + through, x.dtype)


def to_integers(x: Array, scale: Any, zero_point: Any, low: int, high: int) -> Any:
    """Returns the integers that stand for ``x``, as int32; see :func:`fake_quantize`."""
    xp = namespace(x)
    whole = xp.round(xp.astype(x, xp.float32) * (1 / scale)) + zero_point
    return xp.astype(xp.clip(whole, low, high), xp.int32)


def round_through(x: Array) -> Any:
    """Returns the nearest whole numbers, halves to even; their derivative is taken as one.

    >>> import jax, jax.numpy as jnp
    >>> jax.value_and_grad(round_through)(jnp.float32(1.6))
    (Array(2., dtype=float32...), Array(1., dtype=float32...))
    """
    xp = namespace(x)
    constant = stop_gradient(x)
    return xp.round(constant) + (x - constant)


def _check_range(where: str, smallest: Any, largest: Any, low: Any, high: Any) -> None:
    for name, x in (("smallest", smallest), ("largest", largest)):
        if not is_number(x):
            floats(x, f"{where}: {name}")
    _check_levels(where, low, high)


def checked_scale(scale: Any, where: str, x: Any) -> Any:
    """Returns a scale of ``x``: a positive number, or an array of floats of its framework."""
    if is_number(scale):
        scale = scalar(scale, where)
    if isinstance(scale, float):
        return scale
    check_fits(scale, where, x)
    return scale


def check_fits(value: Any, where: str, x: Any) -> None:
    """Raises for what is no array of floats, of the framework of ``x``, that broadcasts to it."""
    floats(value, where)
    if is_torch(value) != is_torch(x) and (is_torch(value) or isinstance(value, jax.Array)):
        raise TypeError(f"{where} is of another framework than x, got {shown(value)}")
    shape = tuple(value.shape)
    fits = len(shape) == x.ndim and all(a in (1, b) for a, b in zip(shape, x.shape, strict=True))
    if shape and not fits:
        raise ValueError(
            f"{where} has shape {shape}, which does not broadcast to that of x, {tuple(x.shape)}; "
            "give a scalar, or as many axes as x has, of size 1 or its own"
        )


def _check_levels(where: str, low: Any, high: Any) -> None:
    smallest = whole_number(low, f"{where}: low", -(2**31), 2**31 - 2)
    whole_number(high, f"{where}: high", smallest + 1, 2**31 - 1)


def _or_one(scale: Any) -> Any:
    return namespace(scale).where(scale < _SMALLEST, 1.0, scale)
