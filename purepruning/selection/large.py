"""Masks of elements that are too many to copy their scores."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from purepruning.arrays import (
    compiled,
    int32,
    is_batched,
    is_concrete,
    is_numpy,
    namespace,
    spans_devices,
)
from purepruning.selection.criterion import Score, Source
from purepruning.selection.keys import Threshold
from purepruning.selection.problem import (
    Problem,
    Solved,
    counts_of_rows,
    kernel_of,
    members,
    n_members,
    restack,
)

#: Up to this many elements that are ranked together, copying their scores is as fast as counting.
SMALL = 65_536


def is_large(source: Source, plan: Problem, counts: dict[str, Any]) -> bool:
    """Whether there are too many scores to copy, and they may be looked at more than once."""
    if plan.granularity != "element":
        return False
    # Statistics may be mapped over where weights are not.
    piece = plan.score.piece(source)
    like = piece.arrays[0]
    if any(map(is_batched, (*piece.arrays, *piece.own, *counts.values()))):
        return False
    if is_numpy(like) or spans_devices(like):
        return True
    return sum(math.prod(x.shape) for x in plan.layers) > SMALL


# Elements that are too many to copy their scores.
def large_masks(
    like: Any, sources: dict[str, Source], counts: dict[str, Any], plan: Problem, check: bool
) -> Solved:
    """Returns the masks of elements whose scores are not copied."""
    some = {layer.name: sources[layer.name] for layer in plan.layers}
    ks = counts_of_rows(like, counts, plan)
    cuts, nan = compiled(like, _thresholds, "plan", "check")(some, ks, plan=plan, check=check)
    mask = compiled(like, _large_mask, "score", "stack_axes")
    starts = np.cumsum([0, *map(n_members, plan.layers)]).tolist()
    has_nan = {}
    if check and is_concrete(nan):
        flags = np.split(np.asarray(nan), starts[1:-1])
        has_nan = {x.name: part.any() for x, part in zip(plan.layers, flags, strict=True)}
    if any(has_nan.values()):
        return {}, has_nan
    masks = {
        x.weight: mask(some[x.name], cuts, start, score=plan.score, stack_axes=x.stack_axes)
        for x, start in zip(plan.layers, starts, strict=False)
    }
    return masks, has_nan


def _thresholds(
    sources: dict[str, Source], counts: Any, *, plan: Problem, check: bool
) -> tuple[Threshold, Any]:
    """Returns where to cut the pieces, and where their scores hold a NaN."""
    pieces = [
        piece
        for layer in plan.layers
        for piece in members(plan.score.piece(sources[layer.name]), layer.stack_axes)
    ]
    like = pieces[0].arrays[0]
    xp, kernel = namespace(like), kernel_of(like)
    if not plan.caps:
        sizes = int32(xp, [p.size for p in pieces], like)
        return kernel.local_cuts(pieces, xp.clip(counts, 0, sizes), check)
    caps = [n for n, x in zip(plan.caps, plan.layers, strict=True) for _ in range(n_members(x))]
    budget = xp.clip(counts[0], 0, sum(caps))
    return kernel.global_cuts(pieces, budget, int32(xp, caps, like), check)


def _large_mask(
    source: Source, cut: Threshold, start: Any, *, score: Score, stack_axes: tuple[int, ...]
) -> Any:
    """Returns the mask of a layer whose pieces are cut as ``cut`` says from ``start`` on."""
    piece = score.piece(source)
    keep = [
        kernel_of(p.arrays[0]).kept(p, cut, start + i)
        for i, p in enumerate(members(piece, stack_axes))
    ]
    return restack(keep, piece.shape, stack_axes)
