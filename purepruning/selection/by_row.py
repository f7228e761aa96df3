"""Masks of weights that are compared within the inputs of each output, as many from each."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from purepruning.arrays import (
    compiled,
    empty,
    int32,
    is_numpy,
    laid_out_by,
    namespace,
    replicated,
    spans_devices,
)
from purepruning.layers import Layer
from purepruning.matrices import as_matrices, form, from_matrices
from purepruning.selection import kth_host, kth_jax
from purepruning.selection.criterion import Score, Source
from purepruning.selection.keys import HIGHEST, Piece, flat_index
from purepruning.selection.kth_jax_search import int32_sum
from purepruning.selection.problem import Problem, Solved, kernel_of, n_stacked


def row_masks(sources: dict[str, Source], counts: dict[str, Any], plan: Problem) -> Solved:
    """Returns masks that prune equally many weights of every row of a layer's matrices.

    What of a count is left over after that goes from as many rows, one each: where the next lowest
    score is lowest. So counts are exact, and what a lower count prunes, a higher one prunes too.
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
    xp, f, piece = namespace(source.weight), form("rows", layer), score.piece(source)
    stacks = n_stacked(layer)
    # What the count exceeds a layer's weights by, under jit, takes nothing.
    count = xp.clip(int32(xp, count, source.weight), 0, f.members * f.out * f.columns // stacks)
    if is_numpy(source.weight):
        keep, nan = _on_host(piece, int(count), layer)
    elif spans_devices(source.weight):
        keys = piece.keys(xp)[0]
        return _in_place(keys, count, layer), xp.any(keys == HIGHEST)
    else:
        keys = piece.keys(xp)[0]
        keep, nan = _of_keys(as_matrices(keys, f), count, stacks), xp.any(keys == HIGHEST)
    return from_matrices(xp.reshape(keep, (f.members, f.out, f.columns)), f), nan


def _of_keys(keys: Any, count: Any, stacks: int) -> Any:
    """Returns which weights stay, ``(rows, columns)``, from keys ``(members, out, columns)``."""
    xp, columns = namespace(keys), keys.shape[2]
    rows = xp.reshape(keys, (-1, columns))
    n = rows.shape[0] // stacks
    each, rest = count // n, count % n

    def lowest(count: Any) -> Any:
        return kernel_of(rows).lowest(rows, xp.full_like(rows[:, 0], 0) + count, None)

    pruned = lowest(each)
    one_more = lowest(xp.clip(each + 1, 0, columns)) & ~pruned
    next_key = xp.min(xp.where(one_more, rows, HIGHEST), axis=1)
    left = xp.reshape(xp.any(one_more, axis=1), (stacks, n))
    chosen = _one_more_rows(xp.reshape(next_key, (stacks, n)), left, rest)
    return ~(pruned | (one_more & xp.reshape(chosen, (-1, 1))))


def _in_place(keys: Any, count: Any, layer: Layer) -> Any:
    """Returns which weights stay, in the shape of the keys, which stay on their devices of JAX.

    The rows of each device's part are counted there: only the counts of rows travel, and their next
    keys.
    """
    columns = (*layer.spatial_axes, *layer.in_axes)
    rows = (*layer.stack_axes, *layer.out_axes)
    stacks, sizes = n_stacked(layer), [keys.shape[a] for a in rows]
    n = math.prod(sizes) // stacks
    each, rest = count // n, count % n
    place, none = flat_index(jnp, keys, columns), int32_sum(keys * 0, axis=columns, keepdims=True)

    def lowest(count: Any) -> Any:
        return kth_jax.lowest_along(keys, none + count, None, place, columns)

    def by_stack(x: Any) -> Any:
        left = sorted(rows)
        return replicated(x).transpose([left.index(a) for a in rows]).reshape(stacks, n)

    pruned = lowest(each)
    one_more = lowest(jnp.minimum(each + 1, math.prod(keys.shape[a] for a in columns))) & ~pruned
    next_key = by_stack(jnp.min(jnp.where(one_more, keys, HIGHEST), axis=columns))
    left = by_stack(jnp.any(one_more, axis=columns))
    chosen = _one_more_rows(next_key, left, rest).reshape(sizes)
    order = [rows.index(a) for a in sorted(rows)]
    chosen = jnp.expand_dims(chosen.transpose(order), sorted(columns))
    return ~(pruned | (one_more & laid_out_by(chosen, jax.typeof(none).sharding.spec, none)))


def _one_more_rows(next_key: Any, left: Any, count: Any) -> Any:
    """Returns the rows that lose one more weight: where the next key, ``(stacks, n)``, is lowest.

    ``left`` says which rows have a next one: one that is pruned whole has none.
    """
    xp = namespace(next_key)
    ranked = xp.where(left, xp.clip(next_key, max=HIGHEST - 1), HIGHEST)
    counts = xp.full_like(ranked[:, 0], 0) + count
    return kernel_of(ranked).lowest(ranked, counts, None) & left


def _on_host(piece: Piece, count: int, layer: Layer) -> tuple[np.ndarray, bool]:
    """Returns the same by NumPy, some rows at a time, and whether a score is NaN."""
    f = form("rows", layer)
    rows, stacks = f.members * f.out, n_stacked(layer)
    each, rest = divmod(count, rows // stacks)
    keep = empty((rows, f.columns), np.bool)
    next_key, next_place = np.empty(rows, np.int32), np.empty(rows, np.int64)

    def as_rows(x: np.ndarray) -> np.ndarray:
        return as_matrices(x, f).reshape(rows, f.columns)

    for some, keys in kth_host.keys_of_rows(piece, as_rows):
        if keys is None:
            return keep, True
        _all_but_lowest(keys, each, keep[some])
        if rest:
            behind = np.where(keep[some], keys, HIGHEST)
            next_place[some] = behind.argmin(axis=1)
            next_key[some] = behind.min(axis=1)
    if rest:
        ranked = next_key.reshape(stacks, -1)
        chosen = kth_host.lowest(ranked, np.full(stacks, rest), None).reshape(-1)
        keep[chosen, next_place[chosen]] = False
    return keep, False


def _all_but_lowest(rows: np.ndarray, n: int, keep: np.ndarray) -> None:
    """Writes into ``keep`` all keys of each row but the ``n`` lowest, of equal ones the first."""
    if n in (0, rows.shape[1]):
        keep[...] = n == 0
        return
    last = np.partition(rows, n - 1, axis=1)[:, n - 1 : n]
    np.greater(rows, last, out=keep)
    more = rows.shape[1] - n - np.count_nonzero(keep, axis=1)
    for i in np.flatnonzero(more):  # the last of those that are tied stay
        keep[i, np.flatnonzero(rows[i] == last[i])[-more[i] :]] = True
