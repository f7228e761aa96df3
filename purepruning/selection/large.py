"""Masks of elements that are too many to copy their scores."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
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
from purepruning.masks import to_numpy
from purepruning.selection.criterion import Source
from purepruning.selection.joined import in_chunks
from purepruning.selection.problem import (
    Problem,
    Solved,
    counts_of_rows,
    kernel_of,
    n_stacked,
    restack,
    unstacked,
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
    if any(map(is_batched, (*piece.arrays, *piece.layer_stats, *counts.values()))):
        return False
    if is_numpy(like) or spans_devices(like):
        return True
    return sum(math.prod(x.shape) for x in plan.layers) > SMALL


def large_masks(
    like: Any, sources: dict[str, Source], counts: dict[str, Any], plan: Problem, check: bool
) -> Solved:
    """Returns the masks of elements whose scores are not copied."""
    some = {layer.name: sources[layer.name] for layer in plan.layers}
    ks = counts_of_rows(like, counts, plan)
    keep, nan = compiled(like, _masks, "plan", "check")(some, ks, plan=plan, check=check)
    has_nan, stops = {}, np.cumsum([n_stacked(layer) for layer in plan.layers])
    if check and is_concrete(nan):
        flags = np.split(to_numpy(nan), stops[:-1])
        has_nan = {x.name: part.any() for x, part in zip(plan.layers, flags, strict=True)}
    masks = {layer.weight: keep[layer.name] for layer in plan.layers if layer.name in keep}
    return masks, has_nan


def _masks(
    sources: dict[str, Source], counts: Any, *, plan: Problem, check: bool
) -> tuple[dict[str, Any], Any]:
    """Returns the masks by name of their layers, and where the scores of pieces hold a NaN.

    There may be no masks where there is a NaN.
    """
    whole = [plan.score.piece(sources[x.name]) for x in plan.layers]
    like = whole[0].arrays[0]
    xp, kernel = namespace(like), kernel_of(like)
    # Where a stack lies over devices, taking a layer out of it would move that layer.
    together = xp is jnp and not all(in_chunks(piece.arrays[0]) for piece in whole)
    by_layer = [
        [piece._replace(stack_axes=x.stack_axes)] if together else unstacked(piece, x.stack_axes)
        for piece, x in zip(whole, plan.layers, strict=True)
    ]
    pieces = [piece for some in by_layer for piece in some]
    if not plan.caps:
        sizes = [
            math.prod(x.shape) // n_stacked(x) for x in plan.layers for _ in range(n_stacked(x))
        ]
        sizes = int32(xp, sizes, like)
        keep, nan = kernel.local_masks(pieces, xp.clip(counts, 0, sizes), check)
    else:
        caps = [n for n, x in zip(plan.caps, plan.layers, strict=True) for _ in range(n_stacked(x))]
        budget = xp.clip(counts[0], 0, sum(caps))
        keep, nan = kernel.global_masks(pieces, budget, int32(xp, caps, like), check)
    if keep is None:
        return {}, nan
    rest = iter(keep)
    return {
        layer.name: next(rest)
        if together
        else restack([next(rest) for _ in some], layer.shape, layer.stack_axes)
        for layer, some in zip(plan.layers, by_layer, strict=True)
    }, nan
