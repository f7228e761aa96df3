"""N:M masks: of every group of consecutive weights the highest stay."""

from __future__ import annotations

import functools
from typing import Any

from purepruning.arrays import (
    compiled,
    has_whole_groups,
    is_numpy,
    merge_axes,
    namespace,
    replicated,
    split_axis,
)
from purepruning.granularity import NM
from purepruning.masks import spread_mask
from purepruning.selection import kth_host
from purepruning.selection.criterion import Score, Source
from purepruning.selection.keys import HIGHEST
from purepruning.selection.problem import Problem, Solved, kernel_of

#: Up to this many weights in a group of N:M, comparing all pairs is fastest.
PAIRS = 16


# N:M.
def nm_masks(sources: dict[str, Source], plan: Problem, nm: NM) -> Solved:
    """Returns the N:M masks of all layers."""
    masks, has_nan = {}, {}
    for layer in plan.layers:
        source = sources[layer.name]
        masks[layer.weight], has_nan[layer.name] = compiled(
            source.weight, _nm_mask, "score", "in_axes", "nm"
        )(source, score=plan.score, in_axes=layer.in_axes, nm=nm)
    return masks, has_nan


def _nm_mask(source: Source, *, score: Score, in_axes: tuple[int, ...], nm: NM) -> tuple[Any, Any]:
    """Returns the mask that keeps the highest of every group, and whether a score is NaN."""
    xp, piece = namespace(source.weight), score.piece(source)
    ndim = len(piece.shape)
    rest = tuple(a for a in range(ndim) if a not in in_axes)
    lead = tuple(a for a in rest if a < in_axes[0])
    order = (*lead, *in_axes, *(a for a in rest if a not in lead))
    moved = tuple(piece.shape[a] for a in order)
    axis = len(lead) + 1

    def grouped(x: Any) -> Any:
        return split_axis(xp.permute_dims(x, order), axis - 1, len(in_axes), nm.of)

    if is_numpy(source.weight):
        choose = functools.partial(highest_of_groups, axis=0, nm=nm)
        mask, nan = kth_host.by_groups(piece, grouped, axis, choose)
    else:
        keys = piece.keys(xp)[0]
        nan = xp.any(keys == HIGHEST)
        # An explicit mesh allows no reshape that merges axes of which one lies over devices.
        if len(in_axes) > 1 or nm.of > PAIRS:
            keys = replicated(keys)
        elif not has_whole_groups(keys, in_axes[0], nm.of):
            keys = replicated(keys, in_axes)
        mask = highest_of_groups(grouped(keys), axis, nm)
    mask = merge_axes(mask, axis - 1, moved) if len(in_axes) == 1 else xp.reshape(mask, moved)
    mask = xp.permute_dims(mask, tuple(order.index(a) for a in range(ndim)))
    return spread_mask(mask, source.weight), nan


def highest_of_groups(groups: Any, axis: int, nm: NM) -> Any:
    """Returns which of the ``nm.of`` keys along ``axis`` are among the ``nm.keep`` highest."""
    choose = _highest_of_pairs if nm.of <= PAIRS else _highest_of_rows
    return choose(namespace(groups), groups, axis, nm)


def _highest_of_pairs(xp: Any, groups: Any, axis: int, nm: NM) -> Any:
    """Returns the same, by comparing all pairs of a group."""
    at = [groups[(*(slice(None),) * axis, i)] for i in range(nm.of)]
    # Of equal keys the earlier one is lower: the rank of j counts the i before it that do not
    # exceed it, and the i behind it that are not reached by it.
    not_above = {
        (i, j): xp.astype(at[i] <= at[j], xp.uint8) for j in range(nm.of) for i in range(j)
    }
    keep = []
    for j in range(nm.of):
        rank = nm.of - 1 - j
        for i in range(j):
            rank = rank + not_above[i, j]
        for i in range(j + 1, nm.of):
            rank = rank - not_above[j, i]
        keep.append(rank >= nm.of - nm.keep)
    return xp.stack(keep, axis=axis)


def _highest_of_rows(xp: Any, groups: Any, axis: int, nm: NM) -> Any:
    """Returns the same, by ranking every group: comparing pairs takes the square of its size."""
    last = xp.moveaxis(groups, axis, -1)
    rows = xp.reshape(last, (-1, nm.of))
    count = xp.full_like(rows[:, 0], nm.of - nm.keep)
    lowest = kernel_of(rows).lowest(rows, count, None)
    return xp.moveaxis(xp.reshape(~lowest, last.shape), -1, axis)
