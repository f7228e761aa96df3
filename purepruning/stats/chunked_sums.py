"""Sums over a large array on a CPU: a chunk at a time, in one pass over memory.

Under XLA, a reduction of something derived from an array writes that something to memory first:
zeros, sum, sum of magnitudes and of squares of 4 million activations take 17 ms and 32 MB. A loop
over slices, which adds chunks elementwise and reduces only the last total, takes 1 ms and 0.5 MB.
In torch every operation is a pass over memory, of which there are a dozen; those over a chunk stay
in cache.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from purepruning.arrays import is_batched, is_torch, namespace

CHUNK = 32_768  # elements at a time, so that their totals stay in cache


STEPS = 256  # chunks at most, so that the rounding errors of their addition stay small


ENOUGH = 16  # steps for which an axis is worth looping over


Terms = Callable[[Any], tuple[Any, ...]]


def pays_off(x: Any) -> bool:
    """Whether :func:`sums` is the fastest way for ``x``; if it spans devices, slices move data."""
    if math.prod(x.shape) <= CHUNK:
        return False
    if is_torch(x):
        return x.device.type == "cpu" and not is_batched(x)
    one_cpu = jax.default_backend() == "cpu" and jax.device_count() == 1
    return isinstance(x, jax.Array) and one_cpu


def sums(x: Any, axes: tuple[int, ...], terms: Terms) -> tuple[Any, ...]:
    """Returns the sums of the elementwise ``terms(x)`` over all axes of ``x`` but ``axes``.

    Axes of the results are in the order of ``x``.
    """
    return (_of_slices if is_torch(x) else _of_chunks)(x, axes, terms)


def _of_slices(x: Any, axes: tuple[int, ...], terms: Terms) -> tuple[Any, ...]:
    """Returns the sums in torch: slices of the first axis that is summed over."""
    xp = namespace(x)
    rest = tuple(a for a in range(x.ndim) if a not in axes)
    before = (slice(None),) * rest[0]
    k = _length(x.shape[rest[0]], math.prod(x.shape))

    def part(begin: int) -> tuple[Any, ...]:
        slices = terms(x[(*before, slice(begin, begin + k))])
        return tuple(xp.sum(t, axis=rest, dtype=t.dtype) for t in slices)

    totals = part(0)
    for begin in range(k, x.shape[rest[0]], k):
        totals = tuple(t + u for t, u in zip(totals, part(begin), strict=True))
    return totals


def _of_chunks(x: Array, axes: tuple[int, ...], terms: Terms) -> tuple[Array, ...]:
    """Returns the sums in JAX: chunks of a run of neighbouring axes, added elementwise."""
    start, stop = _run(x.shape, axes)
    n = math.prod(x.shape[start:stop])
    flat = jnp.reshape(x, (*x.shape[:start], n, *x.shape[stop:]))
    kept = [a if a < start else a - (stop - start) + 1 for a in axes]
    rest = tuple(a for a in range(flat.ndim) if a not in kept)
    k = _length(n, x.size)

    def part(begin: Any, length: int) -> tuple[Array, ...]:
        return terms(lax.dynamic_slice_in_dim(flat, begin, length, start))

    def add(i: Any, totals: tuple[Array, ...]) -> tuple[Array, ...]:
        return tuple(t + u for t, u in zip(totals, part(i * k, k), strict=True))

    def summed(terms: tuple[Array, ...]) -> tuple[Array, ...]:
        return tuple(jnp.sum(t, axis=rest, dtype=t.dtype) for t in terms)

    result = summed(lax.fori_loop(1, n // k, add, part(0, k)))
    if left := n % k:
        result = tuple(t + u for t, u in zip(result, summed(part(n - left, left)), strict=True))
    return result


def _length(n: int, size: int) -> int:
    """Returns how many of n slices, of an array of ``size`` elements, are a chunk."""
    return min(n, max(1, max(CHUNK, size // STEPS) * n // size))


def _run(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, int]:
    """Returns the neighbouring axes to loop over: the first that are enough, else the most."""
    ends = [-1, *sorted(axes), len(shape)]
    runs = [(a + 1, b) for a, b in itertools.pairwise(ends) if a + 1 < b]
    sizes = {run: math.prod(shape[slice(*run)]) for run in runs}
    return next((run for run in runs if sizes[run] >= ENOUGH), max(runs, key=sizes.__getitem__))
