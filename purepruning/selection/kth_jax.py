"""Exact selection in JAX by counting, for weights too large to sort or copy.

The k-th smallest of n numbers is the smallest pivot that at least k of them do not exceed. Floats
become integers of the same order, and the pivot is searched with counts alone
(:mod:`purepruning.selection.kth_jax_search`): a first guess from a small sorted sample, then secant
steps inside a bracket. Counting (:mod:`purepruning.selection.kth_jax_counters`) copies nothing; k
may be traced; across devices only counts are summed.

Equal numbers are told apart by position, in one more pass that finds the last one to prune.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from purepruning.selection.keys import HIGHEST, LOWEST, Piece, Threshold
from purepruning.selection.kth_jax_counters import counter_of
from purepruning.selection.kth_jax_search import Bracket, Counter, int32_sum, search


def local_masks(pieces: Sequence[Piece], counts: Array, check: bool) -> tuple[list[Array], Array]:
    """Returns masks that prune the ``counts[i]`` lowest of piece i, and where NaN is.

    Counts, int32 of shape ``(pieces,)``, must lie in ``[0, size of the piece]``. Masks have the
    shapes of the pieces' arrays. The second result says for each piece whether a score is NaN,
    ``(pieces,)``; it is looked for only if ``check``. A piece with stacked layers has as many
    counts, and as many answers.
    """
    count = counter_of(pieces)
    cut, has_nan = _solve(count, counts, None, check)
    return count.kept(cut), has_nan


def global_masks(
    pieces: Sequence[Piece], budget: Array, caps: Array, check: bool
) -> tuple[list[Array], Array]:
    """Returns masks that prune the ``budget`` lowest elements of all, and where NaN is.

    Only the ``caps[i]`` lowest elements of piece i take part, and ``budget`` is at most their sum.
    Ties go to the earlier piece first, then to the lower index. Otherwise as :func:`local_masks`.
    """
    count = counter_of(pieces)
    cut, has_nan = _solve(count, jnp.broadcast_to(budget, caps.shape), caps, check)
    return count.kept(cut), has_nan


def local_cuts(pieces: Sequence[Piece], counts: Array) -> Threshold:
    """Returns the cuts of :func:`local_masks`."""
    return _solve(counter_of(pieces), counts, None, False)[0]


def lowest(keys: Array, budgets: Array, costs: Array | None) -> Array:
    """Returns which keys of each row are pruned: the lowest, as long as they fit into its budget.

    For int32 ``keys (rows, n)`` that are small enough to be copied; ``costs (n,)`` are those of the
    units, 1 if None. Equal keys count in order of position; the first that does not fit ends it.
    """
    place = lax.iota(jnp.int32, keys.shape[1])[None, :]
    return lowest_along(
        keys, budgets[:, None], costs if costs is None else costs[None, :], place, 1
    )


def lowest_along(
    keys: Array, budgets: Array, costs: Array | None, place: Array, axes: int | tuple[int, ...]
) -> Array:
    """Returns the same, where rows lie along ``axes`` of the keys, wherever they are laid out.

    ``place`` is the position in a row; budgets have size 1 along the axes.
    """
    n = math.prod(keys.shape[a] for a in np.atleast_1d(axes))

    def spent(fitting: Array) -> Array:
        counted = fitting if costs is None else jnp.where(fitting, costs, 0)
        return int32_sum(counted, axis=axes, keepdims=True)

    def last_that_fits(values: Array, budget: Array, lo: int, hi: int) -> Array:
        """The largest v in [lo, hi] such that the units with values up to v fit; lo always does."""

        def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
            fits, over = ends
            gap = lax.bitcast_convert_type(over - fits, jnp.uint32)
            middle = fits + lax.bitcast_convert_type(gap >> 1, jnp.int32)
            good = spent(values <= middle) <= budget
            return jnp.where(good, middle, fits), jnp.where(good, over, middle)

        start = (jnp.full_like(budget, lo), jnp.full_like(budget, hi))
        return lax.fori_loop(0, max((hi - lo).bit_length(), 1), halve, start)[0]

    key = last_that_fits(keys, budgets, LOWEST, HIGHEST)
    below = keys <= key
    ties = keys == key + 1
    rest = budgets - spent(below)
    index = last_that_fits(jnp.where(ties, place, n), rest, -1, n)
    return below | (ties & (place <= index))


def _solve(
    count: Counter, target: Array, caps: Array | None, check: bool
) -> tuple[Threshold, Array]:
    sizes, zero = count.sizes, jnp.zeros_like(count.sizes)
    bracket = Bracket(zero + LOWEST, zero + HIGHEST, zero, sizes)
    state = search(count, bracket, target, caps, check)
    bracket, need = state.bracket, state.target - state.bracket.below
    split = (need > 0) & (state.target < bracket.upto)
    index = count.tie_index(bracket.hi, jnp.where(split, need, 0))
    cut = Threshold(jnp.where(need > 0, bracket.hi, bracket.lo), jnp.where(split, index, HIGHEST))
    return cut, state.numbers < sizes
