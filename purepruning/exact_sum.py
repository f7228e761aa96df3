"""Sums that do not depend on the order of addition.

A float32 sum differs in its last bit with the order of its terms, and every framework, compiler,
layout and device count has its own order. Where such sums rank channels, near-ties then fall
differently. Here the terms are cut into integers, whose sums are exact, and only the total is
rounded: the same bits everywhere.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

import numpy as np

from purepruning.arrays import NUMPY, bits_float, float_bits, int32, namespace

_ELEMENTS = 2**17  # that NumPy looks at at a time
_FEW = 32  # neighbours that NumPy adds faster as slices


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
    return sum_of_terms(_itself, (values,), axes, times, across)


def sum_of_terms(
    terms: Callable[..., Any],
    arrays: tuple[Any, ...],
    axes: tuple[int, ...],
    times: np.ndarray | None = None,
    across: Any = None,
) -> Any:
    """Returns :func:`exact_sum` of the float32 ``terms(*arrays)``, which NumPy computes in parts.

    ``terms`` works element by element. All arrays have as many axes, and broadcast to the first.
    """
    xp, shape = namespace(arrays[0]), arrays[0].shape
    axes = tuple(a % len(shape) for a in axes)
    n = math.prod(shape[a] for a in axes) if across is None else across.terms
    if n == 0 or (not axes and times is None):
        values = terms(*arrays)
        return xp.sum(values, axis=axes) if axes else values
    bits, limbs = limbs_of(n * (1 if times is None else int(times.max())))

    def total(*parts: Any) -> Any:
        some, often = (parts, None) if times is None else (parts[:-1], parts[-1])
        top = largest_magnitude(terms, some, axes, across)
        scale, unscale = power_of_two_scale(top, bits, 126 - bits * (limbs - 1))
        totals = _limbs(terms, some, scale, axes, bits, limbs)
        totals = totals if often is None else [t * int32(xp, often, t) for t in totals]
        totals = totals if across is None else across.totals(totals)
        result = total_of_limbs(totals, 2.0**-bits)
        return xp.where(xp.isfinite(top), result * unscale, top)

    result = by_sums(total, arrays if times is None else (*arrays, times), axes)
    return xp.reshape(result, tuple(n for a, n in enumerate(shape) if a not in axes))


def largest_magnitude(
    terms: Callable[..., Any], arrays: tuple[Any, ...], axes: tuple[int, ...], across: Any = None
) -> Any:
    """Returns the largest magnitude of float32 ``terms(*arrays)``; NaN if one is NaN.

    It is taken over ``axes``, which are kept; see :func:`sum_of_terms`. Magnitudes are compared as
    integers, which have the same order, NaN above infinity: XLA's maxima of floats on a CPU leave
    out NaN where it takes them from a library (jaxlib 0.10, 512 terms of 8 sums).
    """
    xp = namespace(arrays[0])

    def bits_of(*parts: Any) -> Iterator[Any]:
        yield float_bits(xp, terms(*parts)) & 0x7FFFFFFF

    bits = _reduced(bits_of, arrays, axes, 1, "maximum")
    return bits_float(xp, (bits if across is None else across.totals(bits, "MAX"))[0])


def _limbs(
    terms: Callable[..., Any],
    arrays: tuple[Any, ...],
    scale: Any,
    axes: tuple[int, ...],
    bits: int,
    limbs: int,
) -> list[Any]:
    """Returns the int32 sums of all limbs of the scaled terms, the highest first."""
    xp = namespace(scale)

    def cut(scale: Any, *parts: Any) -> Iterator[Any]:
        rest = terms(*parts) * scale
        for i in range(limbs):
            limb = xp.astype(rest, xp.int32)
            yield limb
            if i + 1 < limbs:
                rest = (rest - xp.astype(limb, xp.float32)) * 2.0**bits

    return _reduced(cut, (scale, *arrays), axes, limbs, "add")


def _itself(values: Any) -> Any:
    return values


# NumPy goes over arrays in parts, so that what it computes stays in the cache of a processor, and
# large weights are not copied.
def by_sums(total: Callable[..., Any], arrays: tuple[Any, ...], axes: tuple[int, ...]) -> Any:
    """Returns float32 ``total(*arrays)``, computed by NumPy for some sums at a time.

    They are over ``axes``, which it keeps; over none it works element by element.
    """
    if namespace(arrays[0]) is not NUMPY:
        return total(*arrays)
    kept = tuple(1 if a in axes else n for a, n in enumerate(_common(arrays)))
    if math.prod(kept) <= _ELEMENTS:
        return total(*arrays)
    result = np.empty(kept, np.float32)
    for at in _parts(kept):
        at = tuple(slice(None) if a in axes else s for a, s in enumerate(at))
        result[at] = total(*(_within(x, at) for x in arrays))
    return result


def _reduced(
    function: Callable[..., Iterator[Any]],
    arrays: tuple[Any, ...],
    axes: tuple[int, ...],
    n: int,
    how: str,
) -> list[Any]:
    """Returns the n int32 arrays of ``function(*arrays)``, reduced over ``axes``, which are kept.

    Args:
        function: works element by element.
        arrays: broadcast to the shape that is reduced.
        axes: of that shape.
        n: how many arrays there are.
        how: ``"add"``, or of numbers that are not negative ``"maximum"``.
    """
    xp = namespace(arrays[0])
    if xp is not NUMPY:
        most = functools.partial(xp.max, axis=axes, keepdims=True)
        total = functools.partial(xp.sum, axis=axes, keepdims=True, dtype=xp.int32)
        return [(most if how == "maximum" else total)(x) if axes else x for x in function(*arrays)]
    combine, shape = getattr(np, how), _common(arrays)
    kept = tuple(1 if a in axes else size for a, size in enumerate(shape))
    results = [np.zeros(kept, np.int32) for _ in range(n)]
    for at in _parts(shape):
        for result, x in zip(results, function(*(_within(a, at) for a in arrays)), strict=True):
            mine = _within(result, at)
            combine(mine, _reduced_part(combine, x, axes), out=mine)
    return results


def _common(arrays: tuple[Any, ...]) -> tuple[int, ...]:
    return np.broadcast_shapes(*(x.shape for x in arrays))


def _parts(shape: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Yields where parts of an array lie, which together are all of it."""
    rest = math.prod(shape[1:])
    if math.prod(shape) <= _ELEMENTS:
        yield tuple(slice(None) for _ in shape)
    elif rest > _ELEMENTS:
        for i in range(shape[0]):
            yield from ((slice(i, i + 1), *more) for more in _parts(shape[1:]))
    else:
        rows = _ELEMENTS // rest
        for i in range(0, shape[0], rows):
            yield (slice(i, i + rows), *(slice(None) for _ in shape[1:]))


def _within(x: Any, at: tuple[slice, ...]) -> Any:
    """Returns the part of an array that broadcasts to a part at a place."""
    return x[tuple(s if n > 1 else slice(None) for s, n in zip(at, x.shape, strict=True))]


def _reduced_part(combine: Any, x: Any, axes: tuple[int, ...]) -> Any:
    """Returns what NumPy's ``combine.reduce`` does, with axes kept, in its faster ways."""
    kept = tuple(1 if a in axes else n for a, n in enumerate(x.shape))
    sizes = [(a in axes, n) for a, n in enumerate(x.shape) if n != 1]
    groups = [(inside, [n for _, n in some]) for inside, some in groupby(sizes, lambda s: s[0])]
    x = x.reshape([math.prod(some) for _, some in groups])
    for axis, (inside, _) in enumerate(groups):
        if inside and axis + 1 == len(groups) and x.shape[axis] <= _FEW:
            x = functools.reduce(combine, (x[..., i : i + 1] for i in range(x.shape[axis])))
        elif inside:
            x = combine.reduce(x, axis=axis, keepdims=True, dtype=x.dtype)
    return x.reshape(kept)


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
