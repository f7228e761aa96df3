"""Statistics of blocks: how far each block of a residual stream turns what it is given."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from purepruning.arguments import instance, ordered, shown, whole_number
from purepruning.arrays import (
    by_numpy,
    has_values,
    is_array,
    is_torch,
    namespace,
    sqrt,
    stop_gradient,
)
from purepruning.exact_sum import exact_sum
from purepruning.stats.accumulate import CompensatedSum, WideCount, add, count, empty_total
from purepruning.stats.checks import check_totals, refuse_non_finite
from purepruning.stats.merging import merged
from purepruning.trees import flatten
from purepruning.types import Array, Params

MOST = 4096  # blocks


class BlockStats(NamedTuple):
    """Totals over all positions seen so far, such as tokens.

    Attributes:
        positions: how many they are.
        cosines: of every block, the sum of the cosines between its input and output, ``(blocks,)``.
    """

    positions: WideCount
    cosines: CompensatedSum


def init(params: Params, n_blocks: int) -> BlockStats:
    """Returns the statistics of nothing, in the framework and on the device of ``params``.

    Raises:
        TypeError: ``params`` hold no array, or ``n_blocks`` is no integer.
        ValueError: ``n_blocks`` is not from 1 to 4,096.
    """
    n = whole_number(n_blocks, "blocks.init: n_blocks", 1, MOST)
    like = next((x for x in flatten(params).leaves.values() if is_array(x)), None)
    if like is None:
        raise TypeError("blocks.init: params hold no array; give the parameters of the model")
    return BlockStats(empty_total(WideCount, like), empty_total(CompensatedSum, like, (n,)))


def update(stats: BlockStats, states: Sequence[Array] | Array) -> BlockStats:
    r"""Returns the statistics with one batch added.

    Of block i the cosine of a position is that of the stream before and behind it,
    $\frac{\langle h_i, h_{i+1} \rangle}{\lVert h_i \rVert \lVert h_{i+1} \rVert}$, and 0 where one
    of them is zero. Runs under ``jit``, ``vmap`` and ``jax.lax.scan``.

    Args:
        stats: the statistics so far.
        states: the stream before the first block, between blocks, and behind the last one, before
            any final norm: a sequence of arrays ``(..., channels)``, one more than there are
            blocks, or one array ``(blocks + 1, ..., channels)``.

    Raises:
        TypeError: a state is no array of floats, or of another framework than the statistics.
        ValueError: there are other than one more states than blocks, their shapes differ, or one is
            NaN or infinite, where values are known.

    >>> import jax.numpy as jnp
    >>> states = [jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 2.0]]), jnp.array([[0.0, 3.0]])]
    >>> update(init({"w": jnp.ones(1)}, 2), states).cosines.high.tolist()
    [0.0, 1.0]
    """
    where = "blocks.update"
    instance(stats, BlockStats, f"{where}: stats", "what blocks.init returned")
    check_totals(where, stats)
    some: list[Any] = list(ordered(states, f"{where}: states", "arrays, one more than blocks"))
    n = stats.cosines.high.shape[0]
    if len(some) != n + 1:
        raise ValueError(
            f"{where}: states must be {n + 1}, one before each of {n} blocks and one behind the "
            f"last, got {len(some)}; give those of every block"
        )
    for i, x in enumerate(some):
        _check(f"{where}: state {i}", x, some[0], stats)
    refuse_non_finite(where, "the stream", {"blocks": some})

    def turned(stats: BlockStats, some: list[Any]) -> BlockStats:
        cosines = [_cosines(a, b) for a, b in itertools.pairwise(some)]
        xp, positions = namespace(cosines[0]), math.prod(some[0].shape[:-1])
        return BlockStats(count(stats.positions, positions), add(stats.cosines, xp.stack(cosines)))

    return by_numpy(turned, stats, [stop_gradient(x) for x in some])


def merge(a: BlockStats, b: BlockStats) -> BlockStats:
    """Returns the statistics of what both have seen; leaf by leaf, as those of other modules.

    Raises:
        TypeError: one is no statistics of blocks.
        ValueError: they are of different numbers of blocks.
    """
    for stats in (a, b):
        instance(stats, BlockStats, "blocks.merge: stats", "what blocks.init returned")
    check_totals("blocks.merge", a)
    check_totals("blocks.merge", b)
    sizes = [x.cosines.high.shape[0] for x in (a, b)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"blocks.merge: statistics of {sizes[0]} and of {sizes[1]} blocks")
    return merged("blocks", BlockStats, a, b)


def _check(where: str, x: Any, first: Any, stats: BlockStats) -> None:
    if not (is_array(x) and has_values(x)) or not x.ndim:
        raise TypeError(f"{where} must be an array (..., channels), got {shown(x)}")
    if not namespace(x).isdtype(x.dtype, "real floating"):
        raise TypeError(f"{where} must be floating, got {x.dtype}")
    if is_torch(x) != is_torch(stats.cosines.high):
        raise TypeError(
            f"{where} and the statistics are of two frameworks, JAX and torch; make them by init "
            "of the parameters that the model runs with"
        )
    if x.shape != first.shape:
        raise ValueError(
            f"{where} has shape {tuple(x.shape)}, and the first one {tuple(first.shape)}; the "
            "stream keeps its width from block to block"
        )


def _cosines(a: Any, b: Any) -> Any:
    """Returns the sum of the cosines of all positions."""
    xp = namespace(a)
    a, b = (xp.reshape(xp.astype(x, xp.float32), (-1, x.shape[-1])) for x in (a, b))
    product, one, other = (exact_sum(x * y, (1,)) for x, y in ((a, b), (a, a), (b, b)))
    lengths = sqrt(one) * sqrt(other)
    cosines = xp.where(lengths > 0, product / xp.where(lengths > 0, lengths, 1.0), 0.0)
    return exact_sum(cosines, (0,))
