"""Masks of units whose scores are copied: channels, blocks, and elements of small layers."""

from __future__ import annotations

from typing import Any

import numpy as np

from purepruning.arrays import compiled, int32, is_batched, namespace
from purepruning.granularity import Grid, grid, spread
from purepruning.selection.criterion import Score, Source
from purepruning.selection.joined import is_small, kind
from purepruning.selection.keys import HIGHEST, ordered_bits
from purepruning.selection.problem import Problem, Solved, counts_of_rows, kernel_of, unstacked
from purepruning.selection.rows import lowest_of_rows
from purepruning.selection.unit_sums import Runs, runs

#: More layers than these are summed together, where they can.
FEW = 8


def ranked_masks(
    like: Any, sources: dict[str, Source], counts: dict[str, Any], plan: Problem, check: bool
) -> Solved:
    """Returns the masks of units whose scores are copied."""
    some = {layer.name: sources[layer.name] for layer in plan.layers}
    ks = counts_of_rows(like, counts, plan)
    keep, has_nan = compiled(like, _masks, "plan", "check")(some, ks, plan=plan, check=check)
    return {layer.weight: keep[layer.name] for layer in plan.layers}, has_nan


def _masks(sources: dict[str, Source], counts: Any, *, plan: Problem, check: bool) -> Solved:
    """Returns the masks by name of their layers, and whether the scores of a layer hold a NaN."""
    grids = {layer.name: grid(layer, plan.granularity) for layer in plan.layers}
    if plan.granularity == "element":
        keys = _element_keys(sources, plan)
    else:
        keys = _unit_keys(sources, plan.score, grids)
    return masks_of_keys(keys, counts, grids, plan.caps, check)


def masks_of_keys(
    keys: Any, counts: Any, grids: dict[str, Grid], caps: tuple[int, ...], check: bool
) -> Solved:
    """Returns the masks by name of their layers, from the keys of all units in one vector."""
    pruned = _lowest(keys, counts, caps=caps, grids=tuple(grids.values()))
    masks, has_nan, start = {}, {}, 0
    xp = namespace(keys)
    for name, g in grids.items():
        mine = slice(start, start + g.n_stacked * g.n_units)
        masks[name] = spread(xp, xp.reshape(~pruned[mine], (g.n_stacked, g.n_units)), g)
        if check:
            has_nan[name] = xp.any(keys[mine] == HIGHEST)
        start = mine.stop
    return masks, has_nan


def _element_keys(sources: dict[str, Source], plan: Problem) -> Any:
    """Returns the ordered scores of all weights, one layer after the other."""
    pieces = [
        piece
        for x in plan.layers
        for piece in unstacked(plan.score.piece(sources[x.name]), x.stack_axes)
    ]
    xp = namespace(pieces[0].arrays[0])
    return xp.concat([xp.reshape(piece.keys(xp)[0], (-1,)) for piece in pieces])


def _unit_keys(sources: dict[str, Source], score: Score, grids: dict[str, Grid]) -> Any:
    """Returns the ordered scores of all units, one layer after the other."""
    xp = namespace(next(iter(sources.values())).weight)
    scores, order = [], []
    for places in _summed_together(sources, score, grids):
        scores.append(score.sums([sources[name] for name in places], list(places.values())))
        order += list(places)
    for name in grids:
        if name not in order:
            scores.append(xp.reshape(score.units(sources[name], grids[name]), (-1,)))
            order.append(name)
    keys = ordered_bits(xp, xp.concat(scores) if len(scores) > 1 else scores[0])
    if order == list(grids):
        return keys
    sizes = {name: grids[name].n_stacked * grids[name].n_units for name in order}
    starts = dict(zip(order, np.cumsum([0, *sizes.values()]), strict=False))
    place = np.concatenate([starts[name] + np.arange(sizes[name]) for name in grids])
    return xp.take(keys, int32(xp, place, keys))


def _summed_together(
    sources: dict[str, Source], score: Score, grids: dict[str, Grid]
) -> list[dict[str, Runs]]:
    """Returns the layers that the same loops sum, by name where their units lie.

    For few layers, sums one by one compile as fast.
    """
    alike: dict[Any, dict[str, Runs]] = {}
    for name, g in grids.items():
        place = None if score.terms is None else runs(g)
        if score.terms is None or place is None:
            continue
        weight, layer_stats, keep = sources[name]
        piece = score.terms(weight, layer_stats)
        arrays = piece.arrays if keep is None else (*piece.arrays, keep)
        if is_small(piece) and not any(map(is_batched, arrays)):
            alike.setdefault((kind(piece), keep is None), {})[name] = place
    return [places for places in alike.values() if len(places) > FEW]


def _lowest(keys: Any, counts: Any, *, caps: tuple[int, ...], grids: tuple[Grid, ...]) -> Any:
    """Returns which units are pruned, those of all layers in one vector.

    Without caps every row of a layer loses its count. With caps all layers share the first count,
    to which units are charged at their cost, and a row loses at most its layer's cap of units.
    """
    xp = namespace(keys)
    widths = [g.n_units for g in grids for _ in range(g.n_stacked)]
    if not caps:
        return lowest_of_rows(xp, keys, widths, xp.clip(counts, 0, int32(xp, widths, counts)))
    # Units beyond their layer's cap take no part: they rank last, behind NaN, and stay.
    most = [cap for cap, g in zip(caps, grids, strict=True) for _ in range(g.n_stacked)]
    within = lowest_of_rows(xp, keys, widths, int32(xp, most, counts))
    ranked = xp.where(within, xp.clip(keys, max=HIGHEST - 1), HIGHEST)
    costs = [np.broadcast_to(g.cost, (g.n_stacked, g.n_units)).reshape(-1) for g in grids]
    cost = int32(xp, np.concatenate(costs), counts)
    together = kernel_of(keys).lowest(ranked[None, :], counts[:1], cost)
    return within & together[0, :]
