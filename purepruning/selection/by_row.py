"""Masks of weights that are compared within the inputs of each output, as many from each."""

from __future__ import annotations

from typing import Any

import numpy as np

from purepruning.arrays import compiled, int32, is_numpy, namespace, replicated
from purepruning.layers import Layer
from purepruning.matrices import as_matrices, form, from_matrices
from purepruning.selection.criterion import Score, Source
from purepruning.selection.keys import HIGHEST
from purepruning.selection.problem import Problem, Solved, kernel_of, n_stacked


def row_masks(sources: dict[str, Source], counts: dict[str, Any], plan: Problem) -> Solved:
    """Returns masks that prune equally many weights of every row of a layer's matrices.

    What of a count is left over after that goes from as many rows, one each: where the next lowest
    score is lowest. So counts are exact, and a higher one revives nothing.
    """
    masks, has_nan = {}, {}
    for pool in plan.pools:
        (layer,) = pool.layers
        source = sources[layer.name]
        masks[layer.weight], has_nan[layer.name] = compiled(
            source.weight, _row_mask, "score", "layer"
        )(source, counts[pool.name], score=plan.score, layer=layer)
    return masks, has_nan


def _row_mask(source: Source, count: Any, *, score: Score, layer: Layer) -> tuple[Any, Any]:
    """Returns the mask of a layer, and whether a score is NaN."""
    xp, f = namespace(source.weight), form("rows", layer)
    keys = replicated(score.piece(source).keys(xp)[0])
    stacks, n = n_stacked(layer), f.members * f.out // n_stacked(layer)
    rows = xp.reshape(as_matrices(keys, f), (stacks * n, f.columns))
    # What the count exceeds a layer's weights by, under jit, takes nothing.
    count = xp.clip(int32(xp, count, keys), 0, n * f.columns)
    each, rest = count // n, count % n
    pruned = _lowest(rows, each)
    one_more = _lowest(rows, xp.clip(each + 1, 0, f.columns)) & ~pruned
    next_key = xp.min(xp.where(one_more, rows, HIGHEST), axis=1)
    # A row that is pruned whole has no next one.
    left = xp.reshape(xp.any(one_more, axis=1), (stacks, n))
    ranked = xp.where(left, xp.clip(xp.reshape(next_key, (stacks, n)), max=HIGHEST - 1), HIGHEST)
    chosen = kernel_of(rows).lowest(ranked, xp.full_like(ranked[:, 0], 0) + rest, None) & left
    pruned = pruned | (one_more & xp.reshape(chosen, (-1, 1)))
    keep = xp.reshape(~pruned, (f.members, f.out, f.columns))
    return from_matrices(keep, f), xp.any(keys == HIGHEST)


def _lowest(rows: Any, count: Any) -> Any:
    """Returns which keys of each row are the ``count`` lowest, of equal ones the first."""
    if not is_numpy(rows):
        counts = namespace(rows).full_like(rows[:, 0], 0) + count
        return kernel_of(rows).lowest(rows, counts, None)
    n = int(count)
    if n in (0, rows.shape[1]):
        return np.full(rows.shape, n > 0)
    last = np.partition(rows, n - 1, axis=1)[:, n - 1 : n]
    below, equal = rows < last, rows == last
    missing = n - np.count_nonzero(below, axis=1)
    tied = np.flatnonzero(np.count_nonzero(equal, axis=1) > missing)
    equal[tied] &= np.cumsum(equal[tied], axis=1) <= missing[tied, None]
    return below | equal
