"""Sums that do not depend on the order of addition.

A float32 sum differs in its last bit with the order of its terms, and every framework, compiler,
layout and device count has its own order. Where such sums rank channels, near-ties then fall
differently. Here the terms are cut into integers, whose sums are exact, and only the total is
rounded: the same bits everywhere.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from purepruning.arrays import bits_float, float_bits, int32, namespace


def exact_sum(
    values: Any, axes: tuple[int, ...], times: np.ndarray | None = None, across: Any = None
) -> Any:
    """Returns the sums of float32 ``values`` over ``axes``, bit for bit the same in any order.

    Where ``times`` is given, whole numbers that broadcast to the sums with their axes kept, every
    term of a sum counts so many times. Where terms lie over several processes, ``across``
    (:class:`purepruning.shards.Across`) adds theirs; every process then gets the whole sums.

    With M the largest magnitude among the n terms of a sum, repeated ones included, every term is
    cut into integer limbs of b bits below M, b = 30 - log2(n), so that the int32 sum of each limb
    is exact; enough limbs are kept that what is cut off is less than 2**-24 M. The result is within
    a unit in the last place or two of the true sum of non-negative terms. A sum over NaN or
    infinity is NaN or infinity. Terms below 2**-126 count as zero, since some devices flush them,
    and a sum is rounded to multiples of 2**-126.
    """
    xp = namespace(values)
    axes = tuple(a % values.ndim for a in axes)
    n = math.prod(values.shape[a] for a in axes) if across is None else across.terms
    if n == 0 or (not axes and times is None):
        return xp.sum(values, axis=axes) if axes else values
    top = largest_magnitude(values, axes, across)
    bits, limbs = limbs_of(n * (1 if times is None else int(times.max())))
    scale, unscale = power_of_two_scale(top, bits, 126 - bits * (limbs - 1))
    rest = values * scale
    totals = []
    for _ in range(limbs):
        limb = xp.astype(rest, xp.int32)
        total = xp.sum(limb, axis=axes, keepdims=True, dtype=xp.int32) if axes else limb
        totals.append(total if times is None else total * int32(xp, times, total))
        rest = (rest - xp.astype(limb, xp.float32)) * 2.0**bits
    totals = totals if across is None else across.totals(totals)
    result = total_of_limbs(totals, 2.0**-bits)
    result = xp.where(xp.isfinite(top), result * unscale, top)
    return xp.reshape(result, tuple(n for a, n in enumerate(values.shape) if a not in axes))


def largest_magnitude(values: Any, axes: tuple[int, ...], across: Any = None) -> Any:
    """Returns the largest of float32 magnitudes over ``axes``, which are kept; NaN if one is NaN.

    As integers, which have the same order, NaN above infinity: XLA's maxima of floats on a CPU
    leave out NaN where it takes them from a library (jaxlib 0.10, 512 terms of 8 sums).
    """
    xp = namespace(values)
    bits = float_bits(xp, values) & 0x7FFFFFFF
    bits = xp.max(bits, axis=axes, keepdims=True) if axes else bits
    return bits_float(xp, bits if across is None else across.totals([bits], "MAX")[0])


def limbs_of(n: int) -> tuple[int, int]:
    """Returns how many bits the limbs of n terms have, and how many limbs there are."""
    log_n = (n - 1).bit_length()
    bits = min(30 - log_n, 23)
    return bits, -(-(24 + log_n) // bits)


def total_of_limbs(totals: list[Any], step: Any) -> Any:
    """Returns the float32 sum of int32 sums of limbs, each ``step`` times the one before it."""
    xp = namespace(totals[0])
    result = xp.astype(totals[-1], xp.float32)
    for total in reversed(totals[:-1]):
        result = xp.astype(total, xp.float32) + result * step
    return result


def power_of_two_scale(top: Any, bits: Any, largest: Any) -> tuple[Any, Any]:
    """Returns powers of two ``scale`` and ``1 / scale`` with ``scale * top < 2**bits``.

    ``top`` is non-negative float32, below 2**126 where ``bits`` is 0. ``scale * top`` is at least
    ``2**(bits - 1)`` too, unless that needs a scale above ``2**largest``. Scaling by it rounds
    nothing.
    """
    xp = namespace(top)
    exponent = float_bits(xp, top) >> 23
    field = xp.clip(bits + 253 - exponent, 1, 127 + largest)
    return bits_float(xp, field << 23), bits_float(xp, (254 - field) << 23)
