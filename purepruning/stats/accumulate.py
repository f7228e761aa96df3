"""Totals that do not drift: a million steps of 1.0 count a million, in float32 and int32 alone.

Added to a large float32, a small number is rounded or lost. :class:`CompensatedSum` keeps what was
lost in a second float; :class:`WideCount` keeps an integer in two, and is exact. Statistics are
made of these.

Totals of several processes may be merged leaf by leaf too (``psum``, ``all_reduce``): counts stay
exact, and a sum is off by no more than the rounding of adding its larger floats.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np

from purepruning.arguments import instance, shown
from purepruning.arrays import by_numpy, has_values, is_array, is_torch, namespace, zeros

_BITS = 20  # of the lower part of a count: up to 2,048 of them can be added without a carry


class WideCount(NamedTuple):
    """Non-negative integers up to 2**51, as int32 arrays: ``high * 2**20 + low``."""

    high: Any
    low: Any


class CompensatedSum(NamedTuple):
    """Sums of floats, as float32 arrays: ``high + low``, good to about 47 bits.

    Dekker 1971, "A floating-point technique for extending the available precision".
    """

    high: Any
    low: Any


#: By layer name.
Totals: TypeAlias = Mapping[str, WideCount | CompensatedSum]

_Total = TypeVar("_Total", WideCount, CompensatedSum)


def empty_total(kind: type[_Total], like: Any, shape: tuple[int, ...] = ()) -> _Total:
    """Returns a total of nothing, in the framework and on the device of ``like``.

    Its arrays are its own: they may be donated, or reduced in place.
    """
    dtype = "int32" if kind is WideCount else "float32"
    return kind(zeros(like, shape, dtype), zeros(like, shape, dtype))


def count(total: WideCount, n: Any) -> WideCount:
    """Returns the count with ``n`` added: an int, or an int32 array, of at most ``2**31 - 1``."""
    _check("count", WideCount, total)
    whole = isinstance(n, int | np.integer) and not isinstance(n, bool) and 0 <= n < 2**31
    if not whole and not (is_array(n) and namespace(n).isdtype(n.dtype, "integral")):
        raise TypeError(
            f"accumulate.count: n must be an integer of at most 2**31 - 1, got {shown(n)}"
        )
    n = int(n) if whole else n
    _check("count", WideCount, WideCount(n, total.low))
    return merge_counts(total, WideCount(n >> _BITS, n & ((1 << _BITS) - 1)))


def merge_counts(a: WideCount, b: WideCount) -> WideCount:
    """Returns the count of both."""
    _check("merge_counts", WideCount, a, b)

    def merged(a: WideCount, b: WideCount) -> WideCount:
        low = a.low + b.low
        return WideCount(a.high + b.high + (low >> _BITS), low & ((1 << _BITS) - 1))

    return by_numpy(merged, a, b)


def add(total: CompensatedSum, x: Any) -> CompensatedSum:
    """Returns the sum with float32 ``x`` added."""
    _check("add", CompensatedSum, total, CompensatedSum(x, x))
    return by_numpy(_added, total, x)


def _added(total: CompensatedSum, x: Any) -> CompensatedSum:
    high, error = _two_sum(total.high, x)
    return _settled(high, error + total.low)


def merge_sums(a: CompensatedSum, b: CompensatedSum) -> CompensatedSum:
    """Returns the sum of both."""
    _check("merge_sums", CompensatedSum, a, b)

    def merged(a: CompensatedSum, b: CompensatedSum) -> CompensatedSum:
        high, error = _two_sum(a.high, b.high)
        return _settled(high, error + (a.low + b.low))

    return by_numpy(merged, a, b)


def value(total: WideCount | CompensatedSum) -> Any:
    """Returns a count or sum as float32.

    >>> import jax.numpy as jnp
    >>> total = CompensatedSum(jnp.float32(0), jnp.float32(0))
    >>> for _ in range(3):
    ...     total = add(total, jnp.float32(0.1))
    >>> float(value(total))
    0.3
    """
    _check("value", (WideCount, CompensatedSum), total)
    return by_numpy(_value, total)


def _value(total: WideCount | CompensatedSum) -> Any:
    if isinstance(total, CompensatedSum):
        return total.high + total.low
    xp = namespace(total.high)
    return xp.astype(total.high, xp.float32) * 2.0**_BITS + xp.astype(total.low, xp.float32)


def _check(where: str, kind: Any, *totals: Any) -> None:
    """Raises for what is no total of that kind: numbers, or arrays of one framework that fit."""
    where = f"accumulate.{where}: total"
    for total in totals:
        instance(total, kind, where, "a Count or Sum of numbers")
        for part in total:
            dtypes = "integral" if isinstance(total, WideCount) else ("real floating", "integral")
            number = isinstance(part, int | float) and not isinstance(part, bool)
            array = is_array(part) and has_values(part)
            if not number and not (array and namespace(part).isdtype(part.dtype, dtypes)):
                raise TypeError(f"{where}: its parts must be numbers, got {shown(part)}")
            if number and abs(part) >= 2**31:
                raise ValueError(f"{where}: its parts must be below 2**31, got {shown(part)}")
    arrays = [part for total in totals for part in total if is_array(part)]
    if len({is_torch(x) for x in arrays}) > 1:
        raise TypeError(f"{where}: its parts are of two frameworks, JAX and torch")
    try:
        np.broadcast_shapes(*(tuple(x.shape) for x in arrays))
    except ValueError:
        shapes = ", ".join(str(tuple(x.shape)) for x in arrays)
        raise ValueError(f"{where}: its parts have shapes that do not fit: {shapes}") from None


def _two_sum(a: Any, b: Any) -> tuple[Any, Any]:
    """Returns the rounded sum and exactly what the rounding lost (Knuth's TwoSum)."""
    total = a + b
    part = total - a
    return total, _or_zero(total, (a - (total - part)) + (b - part))


def _settled(high: Any, low: Any) -> CompensatedSum:
    """Returns the same sum with ``low`` below the last bit of ``high``."""
    total = high + low
    return CompensatedSum(total, _or_zero(total, low - (total - high)))


def _or_zero(total: Any, rest: Any) -> Any:
    """Returns ``rest`` where it has a meaning: an infinite total has none."""
    xp = namespace(total)
    return xp.where(xp.isfinite(total), rest, 0.0)
