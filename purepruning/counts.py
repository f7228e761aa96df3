"""Fractions to counts: on the host, in float64, where float noise never costs a unit."""

from __future__ import annotations

from typing import Any

import numpy as np

from purepruning.arguments import fraction, whole_number


def count_of(sparsity: float, n: int) -> int:
    """Returns how many of ``n`` units a sparsity prunes: the largest k with ``k / n <= sparsity``.

    The fraction is taken as meant, not as rounded to binary: 0.7 of 10 is 7, 0.29 of 100 is 29, and
    ``1 - 0.9`` of 10 is 1. All counts of the library, in schedules too, come from here.

    >>> count_of(0.7, 10), count_of(0.29, 100), count_of(1 - 0.9, 10), count_of(0.55, 9)
    (7, 29, 1, 4)
    """
    sparsity = fraction(sparsity, "count_of: sparsity")
    n = whole_number(n, "count_of: n", 0, 2**62)
    return int(counts_of(np.float64(sparsity), n))


def counts_of(sparsities: Any, n: Any) -> Any:
    """Returns the same for float64 arrays of fractions and int64 numbers of units, as int64."""
    noise = 8 * np.finfo(np.float64).eps  # a few roundings of a number near 1
    return np.minimum(np.floor(n * (sparsities + noise)).astype(np.int64), n)
