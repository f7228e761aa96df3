"""Masks of weights that lie over processes: each process makes the mask of its shard.

Single weights are counted (:mod:`purepruning.selection.kth_shards`). Channels have a score each,
which every process comes to know, and all choose alike. What cannot be scored on shards, such as
blocks that end elsewhere, is put together one layer at a time, and scored by every process.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from purepruning.arrays import as_numpy, by_numpy, copied, int32, is_concrete, namespace
from purepruning.config.config import Config
from purepruning.granularity import NM, Grid, any_of, fold, grid
from purepruning.layers import Layer
from purepruning.masks import spread_mask
from purepruning.selection.biases import bias_masks, has_bias_mask
from purepruning.selection.by_row import row_masks
from purepruning.selection.coupled import coupled_masks
from purepruning.selection.criterion import Criterion, Source, stored, with_lowest
from purepruning.selection.keys import Piece, flat_index, ordered_bits, wrapped
from purepruning.selection.kth_shards import ShardPiece, global_masks, local_masks
from purepruning.selection.nm import nm_masks
from purepruning.selection.problem import Problem, Solved, n_stacked, restack
from purepruning.selection.ranked import masks_of_keys
from purepruning.shards import (
    Across,
    Box,
    agreed,
    box_of,
    laid_out,
    local,
    local_as,
    of_shard,
    reduced,
    whole,
)


def sharded_masks(
    criterion: Criterion,
    sources: dict[str, Source],
    counts: Mapping[str, Any],
    plan: Problem,
    config: Config,
    leaves: Mapping[str, Any],
) -> Solved:
    """Returns the masks of all layers and their biases, and by layer whether a score is NaN.

    Every process of the weights' meshes must call this, with the same counts. Masks lie over
    processes as their parameters do.

    Raises:
        ValueError: a count is not known.
    """
    if not all(map(is_concrete, counts.values())):
        raise ValueError(
            f"{criterion.name}: counts of weights that lie over processes must be known; give the "
            "config counts outside of vmap"
        )
    ks = {name: int(np.asarray(as_numpy(count))) for name, count in counts.items()}
    run = _Run(criterion, plan, config, sources, {}, leaves)
    for layer in config.layers:
        run.boxes[layer.name] = box_of(sources[layer.name].weight)
    if isinstance(plan.granularity, NM):
        found, has_nan = _nm_masks(run)
    elif plan.rows:
        found, has_nan = _of_whole_layers(run, plan.layers, ks)
    elif plan.granularity == "element":
        found, has_nan = _element_masks(run, ks)
    else:
        masks, has_nan = _unit_masks(run, ks)
        return {path: laid_out(mask, leaves[path]) for path, mask in masks.items()}, has_nan
    masks = {path: of_shard(mask, leaves[path]) for path, mask in found.items()}
    return masks | _biases(run, found), has_nan


@dataclasses.dataclass(frozen=True)
class _Run:
    """A call: what is scored, and where this process's shards lie, by layer name."""

    criterion: Criterion
    plan: Problem
    config: Config
    sources: dict[str, Source]
    boxes: dict[str, Box]
    leaves: Mapping[str, Any]

    def shard(self, layer: Layer) -> Source:
        """Returns this process's shard of what a layer is scored from."""
        source = self.sources[layer.name]

        def cut(x: Any) -> Any:
            of_weights = tuple(getattr(x, "shape", ())) == layer.shape
            return as_numpy(local_as(source.weight, x)) if of_weights else as_numpy(whole(x))

        keep = source.keep
        if keep is not None:
            keep = as_numpy(local_as(source.weight, keep))
        return Source(as_numpy(local(source.weight)), jax.tree.map(cut, source.layer_stats), keep)

    def together(self, layer: Layer) -> Source:
        """Returns all that a layer is scored from; every process gets it."""
        source: Source = jax.tree.map(whole, self.sources[layer.name])
        return source

    def on_shards(self, layer: Layer, g: Grid | None) -> bool:
        """Whether the weights, or units, of a layer can be scored on their shards."""
        box = self.boxes[layer.name]
        if not self.criterion.on_shards or g is None:
            return self.criterion.on_shards
        if g.is_split or box.mesh is None:
            return False
        leaves = jax.tree.leaves(self.sources[layer.name].layer_stats)
        units = (g.n_stacked, g.n_units)
        if units not in {tuple(getattr(x, "shape", ())) for x in leaves}:
            return True
        # Statistics by unit must not be taken for those of the weights of some shard.
        return not agreed(box, units in (layer.shape, box.sizes))


# Single weights.
def _element_masks(run: _Run, counts: Mapping[str, int]) -> Solved:
    pieces = {layer.name: _members(run, layer) for layer in run.plan.layers}
    keep: dict[str, list[Any]] = {}
    has_nan: dict[str, bool] = {}
    problems = [run.plan.pools] if run.plan.scope == "layer" else [(p,) for p in run.plan.pools]
    for pools in problems:
        layers = [(pool, layer) for pool in pools for layer in pool.layers]
        some = [piece for _, layer in layers for piece in pieces[layer.name]]
        sizes = [math.prod(piece.box.shape) for piece in some]
        if run.plan.scope == "layer":
            ks = [counts[pool.name] for pool, layer in layers for _ in pieces[layer.name]]
            ks = [min(max(k, 0), size) for k, size in zip(ks, sizes, strict=True)]
            masks, nan = local_masks(some, ks)
        else:
            caps = [
                cap
                for cap, (_, layer) in zip(pools[0].caps, layers, strict=True)
                for _ in pieces[layer.name]
            ]
            budget = min(max(counts[pools[0].name], 0), sum(caps))
            masks, nan = global_masks(some, budget, caps)
        rest, flags = iter(masks), iter(nan)
        for _, layer in layers:
            keep[layer.weight] = _restacked(run, layer, [next(rest) for _ in pieces[layer.name]])
            mine = [next(flags) for _ in pieces[layer.name]]
            has_nan[layer.name] = any(mine)
    return keep, has_nan


def _members(run: _Run, layer: Layer) -> list[ShardPiece]:
    """Returns the shards of all layers stacked in one, of which this process may have none."""
    box = run.boxes[layer.name]
    piece = _piece(run, layer)
    if not layer.stack_axes:
        return [ShardPiece(piece, box)]
    rest = [a for a in range(len(box.shape)) if a not in layer.stack_axes]
    shape = tuple(box.shape[a] for a in rest)
    result = []
    for i, place in enumerate(np.ndindex(*(box.shape[a] for a in layer.stack_axes))):
        at: list[Any] = [slice(None)] * len(box.shape)
        for a, n in zip(layer.stack_axes, place, strict=True):
            at[a] = n - box.start[a]
        inside = all(0 <= at[a] < box.sizes[a] for a in layer.stack_axes)
        if inside:
            arrays = tuple(x[tuple(at)] for x in piece.arrays)
        else:
            arrays = tuple(namespace(x).reshape(x, (-1,))[:0] for x in piece.arrays)
        member = dataclasses.replace(
            box,
            shape=shape,
            start=tuple(box.start[a] for a in rest),
            sizes=tuple(box.sizes[a] if inside else 0 for a in rest),
        )
        offset = wrapped(i * math.prod(shape))
        result.append(ShardPiece(piece._replace(arrays=arrays, offset=offset), member))
    return result


def _restacked(run: _Run, layer: Layer, keep: list[Any]) -> Any:
    sizes = run.boxes[layer.name].sizes
    if layer.stack_axes:
        held = math.prod(sizes[a] for a in layer.stack_axes)
        keep = [mask for mask in keep if math.prod(mask.shape) or 0 in sizes][:held]
    if not keep or 0 in sizes:
        return np.ones(sizes, np.bool)
    return restack(keep, sizes, layer.stack_axes)


def _piece(run: _Run, layer: Layer) -> Piece:
    """Returns the shard of a layer's weights, with their scores."""
    if run.on_shards(layer, None):
        return run.plan.score.piece(run.shard(layer))
    scores = by_numpy(lambda source: _scores(run, source), run.together(layer))
    mine = as_numpy(copied(run.boxes[layer.name].cut(scores)))
    return Piece((mine,), stored, indexed=False)


def _scores(run: _Run, source: Source) -> Any:
    piece = run.plan.score.piece(source)
    index = flat_index(namespace(piece.arrays[0]), piece.arrays[0]) if piece.indexed else None
    return piece.scores(piece.arrays, index)


# What needs layers whole: N:M with groups that end elsewhere, rows.
def _of_whole_layers(run: _Run, layers: tuple[Layer, ...], counts: Mapping[str, int]) -> Solved:
    masks: dict[str, Any] = {}
    has_nan: dict[str, bool] = {}
    for layer in layers:
        alone = _alone(run.plan, layer)

        def solve(source: Source, alone: Problem = alone, layer: Layer = layer) -> Solved:
            sources = {layer.name: source}
            if isinstance(alone.granularity, NM):
                return nm_masks(sources, alone, alone.granularity)
            return row_masks(sources, dict(counts), alone)

        found, nan = by_numpy(solve, run.together(layer))
        masks[layer.weight] = copied(run.boxes[layer.name].cut(found[layer.weight]))
        has_nan |= {name: bool(flag) for name, flag in nan.items()}
    return masks, has_nan


def _nm_masks(run: _Run) -> Solved:
    nm = run.plan.granularity
    assert isinstance(nm, NM)
    masks, flags, boxes = {}, {}, []
    split = []
    for layer in run.plan.layers:
        if not _has_groups(run, layer, nm):
            split.append(layer)
            continue
        box = run.boxes[layer.name]
        source = run.shard(layer)
        if 0 in box.sizes:
            keep, nan = np.ones(box.sizes, np.bool), False
        else:
            found, nans = nm_masks({layer.name: source}, _alone(run.plan, layer), nm)
            keep, nan = found[layer.weight], nans[layer.name]
        masks[layer.weight] = keep
        flags[layer.name] = np.asarray([bool(nan)], np.int32)
        boxes.append(box)
    together = dict(zip(flags, reduced(boxes, list(flags.values())), strict=True))
    has_nan = {name: bool(n[0]) for name, n in together.items()}
    more = _of_whole_layers(run, tuple(split), {})
    return masks | more[0], has_nan | more[1]


def _alone(plan: Problem, layer: Layer) -> Problem:
    """Returns the problem of one layer."""
    pool = next(pool for pool in plan.pools if layer in pool.layers)
    return plan._replace(pools=(dataclasses.replace(pool, layers=(layer,)),))


def _has_groups(run: _Run, layer: Layer, nm: NM) -> bool:
    """Whether all groups of a layer lie whole on some process; the same on every process."""
    box = run.boxes[layer.name]
    if not run.criterion.on_shards:
        return False
    whole_axes = all(box.sizes[a] == box.shape[a] for a in layer.in_axes)
    (axis,) = layer.in_axes if len(layer.in_axes) == 1 else (None,)
    ends = axis is not None and not (box.start[axis] % nm.of or box.sizes[axis] % nm.of)
    return not agreed(box, not (whole_axes or ends or 0 in box.sizes))


# Channels and blocks.
def _unit_masks(run: _Run, counts: Mapping[str, int]) -> Solved:
    """Returns whole masks, which broadcast, and those of biases."""
    config = run.config
    grids = {layer.name: grid(layer, config.granularity) for layer in config.layers}
    scores, keeps = {}, {}
    for layer in config.layers:
        scores[layer.name], keep = _unit_scores(run, layer, grids[layer.name])
        if keep is not None:
            keeps[layer.name] = keep
    inverted = run.plan.score.inverted
    xp = namespace(next(iter(scores.values())))
    if config.allocation is not None:
        for name in scores:
            adjusted = -scores[name] if inverted else scores[name]
            scores[name] = xp.where(keeps[name], adjusted, 0.0) if name in keeps else adjusted
        has_nan = {name: bool(xp.any(x != x)) for name, x in scores.items()}
        if any(has_nan.values()):
            return {}, has_nan
        found = coupled_masks(scores, keeps, grids, counts, config, run.leaves)
        return _with_biases(run, found), has_nan
    masks: dict[str, Any] = {}
    has_nan = {}
    problems = [run.plan.pools] if run.plan.scope == "layer" else [(p,) for p in run.plan.pools]
    for pools in problems:
        layers = [layer for pool in pools for layer in pool.layers]
        keys = xp.concat(
            [
                xp.reshape(with_lowest(scores[x.name], keeps.get(x.name), inverted), (-1,))
                for x in layers
            ]
        )
        ks = [counts[pool.name] for pool in pools for x in pool.layers for _ in range(n_stacked(x))]
        by_name, nan = masks_of_keys(
            ordered_bits(xp, keys),
            int32(xp, np.asarray(ks, np.int32), keys),
            {x.name: grids[x.name] for x in layers},
            run.plan._replace(pools=pools).caps,
            True,
        )
        masks |= {layer.weight: by_name[layer.name] for layer in layers}
        has_nan |= {name: bool(flag) for name, flag in nan.items()}
    return _with_biases(run, masks), has_nan


def _unit_scores(run: _Run, layer: Layer, g: Grid) -> tuple[Any, Any]:
    """Returns the scores of all units of a layer, and which are not pruned already, or None."""
    if not run.on_shards(layer, g):
        return _scored(run, run.together(layer), g)
    box = run.boxes[layer.name]
    inside = tuple(a // 2 for a in g.inside if a % 2 == 0)
    sizes = tuple(max(n, 1) if a in inside else n for a, n in enumerate(box.sizes))
    source = run.shard(layer)
    if sizes != box.sizes:  # a shard of nothing adds zeros to units of others

        def nothing(x: Any) -> Any:
            fits = tuple(getattr(x, "shape", ())) == box.sizes
            return namespace(x).zeros(sizes, dtype=x.dtype) if fits else x

        source = jax.tree.map(nothing, source)
    return _scored(run, source, dataclasses.replace(g, across=Across(box, inside)))


def _scored(run: _Run, source: Source, g: Grid) -> tuple[Any, Any]:
    def scored(source: Source) -> tuple[Any, Any]:
        scores = run.plan.score.of(source.weight, source.layer_stats, g)
        if source.keep is None:
            return scores, None
        keep = spread_mask(source.keep, source.weight)
        return scores, fold(namespace(keep), keep, g, any_of)

    found: tuple[Any, Any] = jax.tree.map(as_numpy, by_numpy(scored, source))
    return found


# Biases.
def _with_biases(run: _Run, masks: dict[str, Any]) -> dict[str, Any]:
    """Returns whole masks with those of biases."""
    if run.config.bias != "follow":
        return masks
    biases = bias_masks(run.config.layers, masks, run.config.granularity)
    return masks | {
        path: namespace(mask).reshape(mask, tuple(run.leaves[path].shape))
        for path, mask in biases.items()
    }


def _biases(run: _Run, masks: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the masks of biases from those of this process's shards of weights."""
    if run.config.bias != "follow":
        return {}
    found: dict[str, Any] = {}
    for layer in run.config.layers:
        if layer.bias is None or not has_bias_mask(layer, run.config.granularity):
            continue
        keep = _bias_mask(run, layer, masks[layer.weight])
        found[layer.bias] = found[layer.bias] | keep if layer.bias in found else keep
    return {
        path: laid_out(
            namespace(keep).reshape(keep, tuple(run.leaves[path].shape)), run.leaves[path]
        )
        for path, keep in found.items()
    }


def _bias_mask(run: _Run, layer: Layer, mask: Any) -> Any:
    """Returns which biases stay, flat: those of channels with a weight left in some shard."""
    g, box = grid(layer, "output_channel"), run.boxes[layer.name]
    mask = as_numpy(mask)
    if g.is_split:
        mask = as_numpy(whole(of_shard(mask, run.leaves[layer.weight])))
    elif box.mesh is not None:
        inside = tuple(a // 2 for a in g.inside if a % 2 == 0)
        g = dataclasses.replace(g, across=Across(box, inside))
        if any(box.sizes[a] == 0 for a in inside):
            sizes = tuple(max(n, 1) if a in inside else n for a, n in enumerate(box.sizes))
            mask = np.zeros(sizes, np.bool)
    xp = namespace(mask)
    return xp.reshape(fold(xp, mask, g, any_of), (-1,))
