"""Masks of units whose scores are copied: channels, blocks, and elements of small layers."""

from __future__ import annotations

from typing import Any

import numpy as np

from purepruning.arrays import compiled, int32, namespace, part
from purepruning.granularity import Grid, grid, spread
from purepruning.selection.criterion import Score, Source
from purepruning.selection.keys import HIGHEST, ordered_bits
from purepruning.selection.problem import Problem, Solved, counts_of_rows, kernel_of, members
from purepruning.selection.rows import lowest_of_rows


# Units whose scores are copied: channels, blocks, and the elements of small layers.
def ranked_masks(
    like: Any, sources: dict[str, Source], counts: dict[str, Any], plan: Problem, check: bool
) -> Solved:
    """Returns the masks of units whose scores are copied."""
    grids = tuple(grid(layer, plan.granularity) for layer in plan.layers)
    if plan.granularity == "element":
        of_elements = compiled(like, _element_keys, "score", "stack_axes")
        scored = [
            of_elements(sources[x.name], score=plan.score, stack_axes=x.stack_axes)
            for x in plan.layers
        ]
    else:
        of_units = compiled(like, _unit_keys, "score", "g")
        scored = [
            of_units(sources[x.name], score=plan.score, g=g)
            for x, g in zip(plan.layers, grids, strict=True)
        ]
    ks = counts_of_rows(like, counts, plan)
    pruned = compiled(like, _lowest, "caps", "grids")(
        [keys for keys, _ in scored], ks, caps=plan.caps, grids=grids
    )
    mask = compiled(like, _unit_mask, "g")
    masks, start = {}, 0
    for layer, g in zip(plan.layers, grids, strict=True):
        masks[layer.weight] = mask(pruned, start, g=g)
        start += g.n_members * g.n_units
    nan = {x.name: flag for x, (_, flag) in zip(plan.layers, scored, strict=True)}
    return masks, nan if check else {}


def _element_keys(source: Source, *, score: Score, stack_axes: tuple[int, ...]) -> tuple[Any, Any]:
    """Returns the ordered scores of all weights, ``(members, weights)``, and whether one is NaN."""
    xp = namespace(source.weight)
    pieces = members(score.piece(source), stack_axes)
    keys = xp.concat([xp.reshape(piece.keys(xp)[0], (1, -1)) for piece in pieces])
    return keys, xp.any(keys == HIGHEST)


def _unit_keys(source: Source, *, score: Score, g: Grid) -> tuple[Any, Any]:
    """Returns the ordered scores of all units, ``(members, units)``, and whether one is NaN."""
    keys = ordered_bits(namespace(source.weight), score.units(source, g))
    return keys, namespace(keys).any(keys == HIGHEST)


def _lowest(keys: list[Any], counts: Any, *, caps: tuple[int, ...], grids: tuple[Grid, ...]) -> Any:
    """Returns which units are pruned, those of all layers in one vector.

    Without caps every row of a layer loses its count. With caps all layers share the first count,
    to which units are charged at their cost, and a row loses at most its layer's cap of units.
    """
    xp = namespace(keys[0])
    if not caps:
        most = [g.n_units for g in grids for _ in range(g.n_members)]
        return lowest_of_rows(xp, keys, xp.clip(counts, 0, int32(xp, most, counts)))
    # Units beyond their layer's cap take no part: they rank last, behind NaN, and stay.
    most = [cap for cap, g in zip(caps, grids, strict=True) for _ in range(g.n_members)]
    within = lowest_of_rows(xp, keys, int32(xp, most, counts))
    flat = xp.concat([xp.reshape(k, (-1,)) for k in keys])
    ranked = xp.where(within, xp.clip(flat, max=HIGHEST - 1), HIGHEST)
    costs = [np.broadcast_to(g.cost, (g.n_members, g.n_units)).reshape(-1) for g in grids]
    cost = int32(xp, np.concatenate(costs), counts)
    together = kernel_of(flat).lowest(ranked[None, :], counts[:1], cost)
    return within & together[0, :]


def _unit_mask(pruned: Any, start: Any, *, g: Grid) -> Any:
    """Returns the mask of a layer whose units begin at ``start`` in the vector of all."""
    xp = namespace(pruned)
    own = part(pruned, start, g.n_members * g.n_units)
    return spread(xp, xp.reshape(~own, (g.n_members, g.n_units)), g)
