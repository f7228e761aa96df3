"""Channel scores to masks where channels are coupled: units are ranked, and their channels go.

Everything here works on static index arrays of an :class:`Allocation`, under ``jit`` and ``vmap``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from purepruning.arrays import compiled, int32, is_concrete, is_torch, namespace
from purepruning.config.allocation import Allocation, UnitSet
from purepruning.config.budget import LIMB, carried, limbs
from purepruning.config.config import Config
from purepruning.exact_sum import exact_sum
from purepruning.granularity import Grid, spread
from purepruning.selection.criterion import LOWEST_FINITE
from purepruning.selection.keys import LOWEST, ordered_bits
from purepruning.selection.rows import lowest_of_rows


def coupled_masks(
    scores: Mapping[str, Any],
    keeps: Mapping[str, Any],
    grids: Mapping[str, Grid],
    counts: Mapping[str, Any],
    config: Config,
    leaves: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns the masks of a config with a coupling, by path.

    Args:
        scores: by layer name, the float32 scores of its channels, ``(stacked, channels)``; larger
            ones are more important.
        keeps: by layer name, which channels are not pruned already; layers may be missing.
        grids: by layer name, how its weight divides.
        counts: by pool name.
        config: the config, for everything else.
        leaves: the parameters by path.

    Raises:
        ValueError: the budget cannot be met, where values are known.
    """
    allocation = config.allocation
    assert allocation is not None
    flat = joined(scores, allocation, 0.0)
    keep = None
    if keeps:
        xp = namespace(flat)
        marks = {
            name: keeps[name] if name in keeps else xp.ones_like(scores[name], dtype=xp.bool)
            for name in allocation.layers
        }
        keep = joined(marks, allocation, False)
    units = compiled(flat, _unit_scores, "allocation")(flat, allocation=allocation)
    return masks_of_units(units, keep, grids, counts, config, leaves)


def masks_of_units(
    scores: Any,
    keep: Any,
    grids: Mapping[str, Grid],
    counts: Mapping[str, Any],
    config: Config,
    leaves: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns the same from the scores of the units, in the order of their places from 1.

    ``keep`` says of every channel, and of none at the end, whether it is not pruned already; None
    if none is.
    """
    return masks_of_removed(removed_units(scores, keep, counts, config), grids, config, leaves)


def removed_units(scores: Any, keep: Any, counts: Mapping[str, Any], config: Config) -> Any:
    """Returns which units are pruned, by place; arguments as of :func:`masks_of_units`.

    Raises:
        ValueError: the budget cannot be met, where values are known.
    """
    allocation = config.allocation
    assert allocation is not None
    xp = namespace(scores)
    known = [counts[pool.name] for pool in config.pools]
    if all(isinstance(count, int) for count in known):
        ks = int32(xp, np.asarray(known, np.int32), scores)
    else:
        ks = xp.stack([int32(xp, count, scores) for count in known])
    total = config.pools[0].total
    whole = None if total is None else (total, config.pools[0].step)
    removed, reached = compiled(scores, _pruned, "total", "allocation")(
        scores, keep, ks, total=whole, allocation=allocation
    )
    if reached is not None and is_concrete(reached) and not bool(reached):
        raise ValueError(
            "the model cannot be made as small as the count asks for: all units that may go are "
            "not enough"
        )
    return removed


def masks_of_removed(
    removed: Any, grids: Mapping[str, Grid], config: Config, leaves: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the masks by path from what :func:`removed_units` returned."""
    allocation = config.allocation
    assert allocation is not None
    mask = compiled(removed, _mask, "name", "g", "allocation")
    masks = {
        layer.weight: mask(removed, name=layer.name, g=grids[layer.name], allocation=allocation)
        for layer in config.layers
    }
    return _with_coupled(masks, removed, config, leaves)


def _with_coupled(
    masks: dict[str, Any], removed: Any, config: Config, leaves: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the masks with those of what keeps pruned channels alive.

    That are the scales, shifts and statistics of norms, what makes the channels where only norms
    are selected, and readers of what is not zero. A model that is masked by the result, or trained
    under it, computes what is left when it is shrunk.
    """
    if config.bias != "follow":
        return masks
    allocation = config.allocation
    assert allocation is not None
    mask = compiled(removed, _leaf_mask, "path", "allocation")
    for path, axes in allocation.along.items():
        if path in leaves and axes:
            part = mask(removed, path=path, allocation=allocation)
            masks[path] = masks[path] & part if path in masks else part
    return masks


def _leaf_mask(removed: Any, *, path: str, allocation: Allocation) -> Any:
    """Returns the mask of a parameter that lies in units, broadcastable to it."""
    xp, leaf = namespace(removed), allocation.coupling.leaves[path]
    found = None
    for axis in allocation.along[path]:
        places = allocation.place_of[leaf.units[axis]]
        gone = xp.take(removed, int32(xp, places.reshape(-1), removed))
        keep = ~xp.any(xp.reshape(gone, places.shape), axis=-1)
        shape = [1] * len(leaf.shape)
        shape[axis] = leaf.shape[axis]
        by = leaf.by[axis]
        if by is not None:  # of other positions for every block of another axis
            shape[by] = leaf.shape[by]
            rows = np.repeat(np.arange(len(keep)), leaf.shape[by] // len(keep))
            keep = xp.take(keep, int32(xp, rows, removed), axis=0)
            keep = keep if by < axis else xp.permute_dims(keep, (1, 0))
        part = xp.reshape(keep, tuple(shape))
        found = part if found is None else found & part
    return found


def joined(rows: Mapping[str, Any], allocation: Allocation, last: Any) -> Any:
    """Returns one vector of all channels, and ``last``."""
    first = rows[allocation.layers[0]]
    xp = namespace(first)
    parts = [xp.reshape(rows[name], (-1,)) for name in allocation.layers]
    return xp.concat([*parts, xp.full_like(parts[0][:1], last)])


def _unit_scores(flat: Any, *, allocation: Allocation) -> Any:
    """Returns the scores of all units, those of their channels summed; ``(units,)``."""
    xp = namespace(flat)
    found, order = [], []
    for width in sorted({s.scores.shape[1] for s in allocation.sets}):
        alike = [s for s in allocation.sets if s.scores.shape[1] == width]
        index = np.concatenate([s.scores for s in alike])
        each = xp.take(flat, int32(xp, index.reshape(-1), flat))
        found.append(each if width == 1 else _sum(xp.reshape(each, index.shape)))
        order += [s.places for s in alike]
    back = np.argsort(np.concatenate(order))
    return xp.take(xp.concat(found), int32(xp, back, flat))


def _adjusted(scores: Any, keep: Any, allocation: Allocation) -> Any:
    """Returns the scores, the lowest there is where all channels are pruned already."""
    xp = namespace(scores)
    kept = []
    for s in allocation.sets:
        each = xp.take(keep, int32(xp, s.scores.reshape(-1), scores))
        kept.append(xp.any(xp.reshape(each, s.scores.shape), axis=1))
    # Scores of -inf still rank above what is pruned already.
    return xp.where(xp.concat(kept), xp.clip(scores, min=LOWEST_FINITE), -math.inf)


def _sum(rows: Any) -> Any:
    """Returns the sums of rows, the same in every framework; of infinite terms too."""
    xp = namespace(rows)
    finite = xp.all(xp.isfinite(rows), axis=1)
    exact = exact_sum(xp.where(finite[:, None], rows, 0.0), (1,))
    return xp.where(finite, exact, xp.sum(rows, axis=1))


def _pruned(
    scores: Any, keep: Any, counts: Any, *, total: tuple[int, int] | None, allocation: Allocation
) -> tuple[Any, Any]:
    """Returns which units are pruned, by place, and whether the budget could be met."""
    xp = namespace(scores)
    scores = scores if keep is None else _adjusted(scores, keep, allocation)
    if total is not None:
        return _within_budget(xp, scores, counts[0], total, allocation)
    keys = ordered_bits(xp, scores)
    removed = xp.zeros_like(keys[:1], dtype=xp.bool)
    # What layers lose together first; what some of them lose beyond begins with that.
    sets = list(enumerate(allocation.sets))
    none = xp.zeros_like(keys, dtype=xp.bool)
    first = _lowest(xp, keys, counts, [(i, s) for i, s in sets if s.common is None], none)
    later = [(i, s) for i, s in sets if s.common is not None]
    if later:
        so_far = xp.concat([removed, first])
        gone = xp.concat(
            [
                none[s.places[0] - 1 : s.places[-1]]
                if s.common is None
                else xp.take(so_far, int32(xp, s.common, keys))
                for s in allocation.sets
            ]
        )
        first = first | _lowest(xp, keys, counts, later, gone)
    return xp.concat([removed, first]), None


def _lowest(xp: Any, keys: Any, counts: Any, sets: list[tuple[int, UnitSet]], gone: Any) -> Any:
    """Returns which units of these sets are pruned, of all places; those gone already first."""
    if not sets:
        return xp.zeros_like(keys, dtype=xp.bool)
    rows, widths, each, at = [], [], [], []
    for i, s in sets:
        place = slice(s.start - 1, s.places[-1])
        mine = xp.where(gone[place], LOWEST, keys[place])
        rows.append(mine)
        widths += [s.units.shape[1]] * s.units.shape[0]
        most = int(s.allowed[-1])
        count = xp.clip(counts[i : i + 1], 0, most)
        if len(s.allowed) <= most:
            # Counts that are not allowed come from where they could not be checked.
            down = s.allowed[np.searchsorted(s.allowed, np.arange(most + 1), side="right") - 1]
            count = xp.take(int32(xp, down, counts), count)
        each.append(xp.concat([count] * len(s.units)))
        at.append(np.arange(place.start, place.stop))
    found = lowest_of_rows(xp, xp.concat(rows), widths, xp.concat(each))
    order = np.concatenate(at)
    # Places of other sets stay; they take what is behind the last.
    back = np.full(keys.shape[0], len(order))
    back[order] = np.arange(len(order))
    found = xp.concat([found, xp.zeros_like(found[:1])])
    return xp.take(found, int32(xp, back, keys)) | gone


def _within_budget(
    xp: Any, scores: Any, count: Any, total: tuple[int, int], allocation: Allocation
) -> tuple[Any, Any]:
    """Returns the lowest units that must go for the model to cost at most what is left.

    Parts of a set lose equally many, and a set an allowed count: so units go in steps, ranked by
    the mean score of what goes in one.
    """
    assert allocation.budget is not None
    if allocation.costs is not None:
        # Not divided: XLA makes a product of a quotient by a constant, torch does not.
        share = (1 / np.maximum(allocation.costs, 1.0)).astype(np.float32)
        scores = scores * _like(xp, share, scores)
    ordered = _ranked(xp, scores, allocation)
    steps, step_scores, start = [], [], 0
    for s, (ranks, ranked) in zip(allocation.sets, ordered, strict=True):
        n = len(s.allowed) - 1
        step = np.searchsorted(s.allowed, np.arange(s.units.shape[1]), side="right") - 1
        # Step -1 is none.
        step = np.where(step < n, start + step, -1)
        steps.append(xp.take(int32(xp, step, scores), xp.reshape(ranks, (-1,))))
        step_scores.append(_means(xp, ranked, s.allowed))
        start += n
    if not start:
        return xp.concat([xp.zeros_like(scores[:1], dtype=xp.bool)] * allocation.n_places), None
    keys = ordered_bits(xp, xp.concat(step_scores))
    rank = xp.argsort(xp.argsort(keys, stable=True), stable=True)
    rank = xp.concat([int32(xp, rank, scores), xp.full_like(rank[:1], start, dtype=xp.int32)])
    step = xp.concat(steps)
    never = start
    death = xp.take(rank, xp.where(step < 0, never, step))
    death = xp.concat([xp.full_like(death[:1], never), death])
    n_limbs = allocation.budget.constants.shape[1]
    whole, size = total
    count = xp.clip(count, 0, -(-whole // size))
    # What may be left: the total less what is to be removed, which is at most the total.
    removed = carried([limb * size for limb in _padded(xp, limbs(count, 4), n_limbs)])
    left = _difference(limbs(whole, n_limbs), removed)
    time, reached = allocation.budget.first_within(death, start, left)
    return death < time, reached


def _ranked(xp: Any, scores: Any, allocation: Allocation) -> list[tuple[Any, Any]]:
    """Returns for every set the ranks within its parts, and the scores in their order."""
    found: dict[int, tuple[Any, Any]] = {}
    sets = list(enumerate(allocation.sets))
    for width in sorted({s.units.shape[1] for s in allocation.sets}):
        # Equally long parts together.
        alike = [(i, s) for i, s in sets if s.units.shape[1] == width]
        places = np.concatenate([s.places for _, s in alike]) - 1
        rows = xp.reshape(xp.take(scores, int32(xp, places, scores)), (-1, width))
        order = xp.argsort(ordered_bits(xp, rows), axis=1, stable=True)
        ranked = xp.take_along_axis(rows, order, axis=1)
        ranks = int32(xp, xp.argsort(order, axis=1, stable=True), scores)
        start = 0
        for i, s in alike:
            stop = start + len(s.units)
            found[i] = ranks[start:stop, :], ranked[start:stop, :]
            start = stop
    return [found[i] for i, _ in sets]


def _means(xp: Any, ranked: Any, allowed: np.ndarray) -> Any:
    """Returns the mean score of every step, ``(steps,)``, from ascending ``(parts, size)``."""
    parts, size = ranked.shape
    widths = np.diff(allowed)
    if parts == 1 and np.all(widths == 1):
        return ranked[0, : len(widths)]
    # The last entry is none.
    index = np.full((len(widths), parts * int(widths.max(initial=1))), parts * size)
    for i, (low, high) in enumerate(itertools.pairwise(allowed)):
        inside = np.add.outer(size * np.arange(parts), np.arange(low, high)).reshape(-1)
        index[i, : len(inside)] = inside
    flat = xp.concat([xp.reshape(ranked, (-1,)), xp.zeros_like(ranked[0, :1])])
    each = xp.take(flat, int32(xp, index.reshape(-1), ranked))
    share = _like(xp, (1 / (parts * widths)).astype(np.float32), ranked)
    return _sum(xp.reshape(each, index.shape)) * share


def _like(xp: Any, x: np.ndarray, like: Any) -> Any:
    return xp.asarray(x, device=like.device if is_torch(like) else None)


def _padded(xp: Any, number: list[Any], n: int) -> list[Any]:
    zero = xp.zeros_like(number[0])
    return [*number, *[zero] * n][:n]


def _difference(whole: list[int], part: list[Any]) -> list[Any]:
    """Returns the limbs of a difference; zero where it would be negative."""
    found: list[Any] = []
    borrow: Any = 0
    for a, b in zip(whole, part, strict=True):
        limb = a - b - borrow
        borrow = (limb >> 31) & 1
        found.append(limb + borrow * 2**LIMB)
    return [limb * (1 - borrow) for limb in found]


def _mask(removed: Any, *, name: str, g: Grid, allocation: Allocation) -> Any:
    """Returns the mask of a layer: a channel stays while none of its units is pruned."""
    xp = namespace(removed)
    places = allocation.channels[name]
    gone = xp.reshape(xp.take(removed, int32(xp, places.reshape(-1), removed)), places.shape)
    return spread(xp, xp.reshape(~xp.any(gone, axis=1), (g.n_stacked, g.n_units)), g)
