"""Scores and counts to masks: exactly k units, the same ones in every framework.

One rule throughout: the units of lowest score are pruned, and of equal scores those that come first.
Positions count in the parameter's own layout (C order); in global scope layers come in the order of
their names, and where layers are stacked, the first of the stack first.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

from purepruning import counting, partition
from purepruning.config import BiasRule, Config, Pool, Scope
from purepruning.layers import Layer, missing
from purepruning.namespace import (
    compiled,
    flatten,
    int32,
    is_batched,
    is_concrete,
    is_torch,
    namespace,
    replicated,
    spans_devices,
)
from purepruning.pieces import HIGHEST, Piece, ordered_bits
from purepruning.units import NM, Granularity, Grid, fold, grid, spread

#: Up to this many elements in a pool, ranking whole copies of the scores is as fast as counting.
SMALL = 65_536


class Criterion(NamedTuple):
    """What a pruner ranks by. Larger scores are more important; all are float32.

    Attributes:
        name: the pruner's name, for messages.
        element: ``(layer, weight, stats) -> Piece``: scores single weights, without computing them
            yet; None if the criterion has no such meaning.
        unit: ``(layer, grid, weight, stats) -> (members, units)``: scores channels and blocks; None
            if the criterion has no such meaning.
        refuses: granularities that ``unit`` has no meaning for, by class or name.
    """

    name: str
    element: Callable[[Layer, Any, Any], Piece] | None = None
    unit: Callable[[Layer, Grid, Any, Any], Any] | None = None
    refuses: tuple[Any, ...] = ()


class _Plan(NamedTuple):
    """The static part of a config."""

    pools: tuple[Pool, ...]
    scope: Scope
    granularity: Granularity
    bias: BiasRule


def prune(criterion: Criterion, params: Any, stats: Any, config: Config) -> Any:
    """Returns the masks of a criterion: True keeps, None is not pruned.

    Masks broadcast to their parameters. The tree is that of ``params``; of a flat dict of torch
    tensors only the pruned ones are named, since ``torch.func.vmap`` cannot return None.

    Raises:
        KeyError: a layer's parameter is not in ``params``.
        ValueError: a parameter has another shape or is not a float; a count is missing, outside the
            layer's units, or empties a layer whose rule does not allow it; a score is NaN, where
            values are known. Under ``jit`` and ``vmap`` they are not: counts are then clipped to the
            units there are, and NaN ranks above infinity, so that it stays in the weights to be seen.
    """
    tree = flatten(params)
    weights = _weights(criterion, tree.leaves, config)
    if not weights:
        return tree.rebuild({})
    like = next(iter(weights.values()))
    check = all(map(is_concrete, weights.values()))
    plan = _Plan(config.pools, config.scope, config.granularity, config.bias)
    counts = {} if isinstance(plan.granularity, NM) else _counts(config)
    run = compiled(like, _masks, "criterion", "plan", "check")
    masks, bad = run(weights, stats, counts, criterion=criterion, plan=plan, check=check)
    nan = [name for name, flag in sorted(bad.items()) if is_concrete(flag) and bool(flag)]
    if nan:
        raise ValueError(f"{criterion.name}: scores of layer {', '.join(map(repr, nan))} are NaN")
    if plan.bias == "follow":
        biases = {x.bias: tuple(tree.leaves[x.bias].shape) for x in config.layers if x.bias in masks}
        for path, shape in biases.items():
            masks[path] = namespace(like).reshape(masks[path], shape)
    return tree.rebuild(masks)


def _weights(criterion: Criterion, leaves: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """Returns the weights that are pruned, checked against the config."""
    granularity = config.granularity
    kind = granularity if isinstance(granularity, str) else type(granularity)
    elements = kind in ("element", NM)
    if (criterion.element if elements else criterion.unit) is None or kind in criterion.refuses:
        wanted = "'element' or NM" if criterion.unit is None else "channels or blocks"
        raise ValueError(
            f"{criterion.name} ranks {wanted}, but the config was resolved with "
            f"granularity={granularity!r}"
        )
    weights = {}
    for layer in config.layers:
        paths = [layer.weight]
        if config.bias == "follow" and layer.bias is not None:
            paths.append(layer.bias)
        for path in paths:
            if path not in leaves:
                hint = "" if path == layer.weight else " (resolve with bias='keep' to leave it out)"
                message = f"{criterion.name}: layer {layer.name!r}: params have no {path!r}{hint}"
                raise KeyError(missing(message, path, leaves))
        weight = leaves[layer.weight]
        shape = tuple(getattr(weight, "shape", ()))
        if shape != layer.shape:
            raise ValueError(
                f"{criterion.name}: layer {layer.name!r}: the layer table gives {layer.weight!r} shape "
                f"{layer.shape}, but in params it has {shape}"
            )
        xp = namespace(weight)
        if not xp.isdtype(weight.dtype, "real floating"):
            raise ValueError(
                f"{criterion.name}: layer {layer.name!r}: {layer.weight!r} must be floating, "
                f"got {weight.dtype}"
            )
        weights[layer.weight] = weight
    return weights


def _counts(config: Config) -> dict[str, Any]:
    for pool in config.pools:
        count = config.counts[pool.name]
        if count is None:
            raise ValueError(
                f"rule {pool.rule} gives no sparsity for {pool.name!r}; name one in the rule or call "
                "config.with_sparsity(...)"
            )
        if not is_concrete(count):
            continue
        if getattr(count, "ndim", 0):
            raise ValueError(
                f"the count of pool {pool.name!r} has shape {tuple(count.shape)}: map over it with vmap"
            )
        most = pool.size if pool.allow_empty or pool.caps is not None else pool.size - 1
        if not 0 <= int(count) <= max(most, 0):
            raise ValueError(
                f"the count of pool {pool.name!r} must lie in [0, {most}], got {int(count)}; it has "
                f"{pool.size} units, and its rule does not allow to empty it"
            )
    return config.counts


def _masks(
    weights: dict[str, Any],
    stats: Any,
    counts: dict[str, Any],
    *,
    criterion: Criterion,
    plan: _Plan,
    check: bool,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns masks by path, and by layer whether some score is NaN; traceable."""
    if isinstance(plan.granularity, NM):
        masks, bad = _nm_masks(weights, stats, criterion, plan)
    elif plan.granularity == "element":
        masks, bad = _element_masks(weights, stats, counts, criterion, plan, check)
    else:
        masks, bad = _unit_masks(weights, stats, counts, criterion, plan)
    if plan.bias == "follow":
        for pool in plan.pools:
            for layer in pool.layers:
                keep = _bias_mask(layer, masks[layer.weight], plan.granularity)
                if keep is not None:
                    masks[layer.bias] = keep
    return masks, bad


# Single elements.


def _element_masks(
    weights: dict[str, Any],
    stats: Any,
    counts: dict[str, Any],
    criterion: Criterion,
    plan: _Plan,
    check: bool,
) -> tuple[dict[str, Any], dict[str, Any]]:
    masks, bad = {}, {}
    alone = [[pool] for pool in plan.pools]
    # In layer scope all pools are solved side by side; in global scope each is one problem.
    for pools in [list(plan.pools)] if plan.scope == "layer" else alone:
        layers = [layer for pool in pools for layer in pool.layers]
        pieces, ks = [], []
        for pool in pools:
            for layer in pool.layers:
                members = _members(criterion.element(layer, weights[layer.weight], stats), layer)
                pieces += members
                ks += [counts.get(pool.name)] * len(members)
        xp = namespace(pieces[0].arrays[0])
        keep, nan = _keep_elements(xp, pieces, ks, pools[0] if plan.scope == "global" else None, check)
        for layer in layers:
            n = math.prod(layer.shape[a] for a in layer.stack_axes)
            masks[layer.weight] = _restack(xp, keep[:n], layer)
            bad[layer.name] = functools.reduce(operator.or_, nan[:n])
            keep, nan = keep[n:], nan[n:]
    return masks, bad


def _members(piece: Piece, layer: Layer) -> list[Piece]:
    """Returns one piece for each of the layers stacked in this one."""
    if not layer.stack_axes:
        return [piece]
    xp = namespace(piece.arrays[0])
    rest = tuple(a for a in range(len(layer.shape)) if a not in layer.stack_axes)
    shape = tuple(layer.shape[a] for a in rest)
    flat = [
        xp.reshape(xp.permute_dims(x, (*layer.stack_axes, *rest)), (-1, *shape)) for x in piece.arrays
    ]
    return [
        Piece(
            tuple(x[i, ...] for x in flat),
            lambda arrays, index, start=i * math.prod(shape): piece.score(arrays, index + start),
        )
        for i in range(flat[0].shape[0])
    ]


def _restack(xp: Any, keep: list[Any], layer: Layer) -> Any:
    if not layer.stack_axes:
        return keep[0]
    rest = tuple(a for a in range(len(layer.shape)) if a not in layer.stack_axes)
    order = (*layer.stack_axes, *rest)
    stacked = xp.reshape(xp.stack(keep), tuple(layer.shape[a] for a in order))
    return xp.permute_dims(stacked, tuple(order.index(a) for a in range(len(order))))


def _keep_elements(
    xp: Any, pieces: list[Piece], ks: list[Any], pool: Pool | None, check: bool
) -> tuple[list[Any], list[Any]]:
    like = pieces[0].arrays[0]
    sizes = [p.size for p in pieces]
    if pool is None:
        budgets = [xp.clip(int32(xp, k, like), 0, n) for k, n in zip(ks, sizes, strict=True)]
        caps = None
    else:
        per_layer = [math.prod(x.shape[a] for a in x.stack_axes) for x in pool.layers]
        caps = [c for c, n in zip(pool.caps, per_layer, strict=True) for _ in range(n)]
        budgets = [xp.clip(int32(xp, ks[0], like), 0, sum(caps))]
    small = sum(sizes) <= SMALL and not spans_devices(like)
    if small or any(is_batched(x) for p in pieces for x in (*p.arrays, *budgets)):
        keys = [xp.reshape(p.keys(xp)[0], (1, -1)) for p in pieces]
        nan = [xp.any(k == HIGHEST) for k in keys]
        pruned = _lowest_of(xp, keys, budgets, caps, [1] * len(keys))
        return [xp.reshape(~p, x.shape) for p, x in zip(pruned, pieces, strict=True)], nan
    kernel = _kernel(like)
    if caps is None:
        cut, nan = kernel.local_cuts(pieces, xp.stack(budgets), check)
    else:
        cut, nan = kernel.global_cuts(pieces, budgets[0], int32(xp, caps, like), check)
    return [~kernel.pruned(piece, cut, i) for i, piece in enumerate(pieces)], list(nan)


def _kernel(like: Any) -> ModuleType:
    """Returns the module that selects best in the framework of ``like``; both find the same units."""
    return partition if is_torch(like) else counting


def _lowest_of(
    xp: Any, keys: list[Any], budgets: list[Any], caps: list[int] | None, costs: list[Any]
) -> list[Any]:
    """Returns which units of each ``(members, units)`` array of keys are pruned.

    Without caps every row loses as many units as its array's budget. With caps all arrays share one
    budget, which units are charged to at their cost, and a row loses at most its cap of units.
    """
    if caps is None:
        return _rows(xp, keys, budgets)
    rooms = _rows(xp, keys, [int32(xp, cap, keys[0]) for cap in caps])
    flat = [xp.reshape(xp.where(r, k, HIGHEST), (1, -1)) for r, k in zip(rooms, keys, strict=True)]
    cost = xp.concat(
        [xp.reshape(xp.broadcast_to(int32(xp, c, k), k.shape), (-1,)) for c, k in zip(costs, keys, strict=True)]
    )
    pruned = _kernel(cost).lowest(xp.concat(flat, axis=1), xp.reshape(budgets[0], (1,)), cost)[0, :]
    result, start = [], 0
    for room, k in zip(rooms, keys, strict=True):
        n = math.prod(k.shape)
        result.append(room & xp.reshape(pruned[start : start + n], k.shape))
        start += n
    return result


def _rows(xp: Any, keys: list[Any], counts: list[Any]) -> list[Any]:
    """Returns the ``counts[i]`` lowest of each row of ``keys[i]``; equally long rows are solved together."""
    result: list[Any] = [None] * len(keys)
    for width in sorted({k.shape[1] for k in keys}):
        which = [i for i, k in enumerate(keys) if k.shape[1] == width]
        rows = xp.concat([keys[i] for i in which])
        ks = xp.concat([xp.broadcast_to(xp.reshape(counts[i], (1,)), (keys[i].shape[0],)) for i in which])
        pruned, start = _kernel(rows).lowest(rows, ks, None), 0
        for i in which:
            n = keys[i].shape[0]
            result[i] = pruned[start : start + n, :]
            start += n
    return result


# Channels and blocks.


def _unit_masks(
    weights: dict[str, Any], stats: Any, counts: dict[str, Any], criterion: Criterion, plan: _Plan
) -> tuple[dict[str, Any], dict[str, Any]]:
    masks, bad = {}, {}
    alone = [[pool] for pool in plan.pools]
    for pools in [list(plan.pools)] if plan.scope == "layer" else alone:
        layers = [layer for pool in pools for layer in pool.layers]
        grids = [grid(layer, plan.granularity) for layer in layers]
        xp = namespace(weights[layers[0].weight])
        keys = []
        for layer, g in zip(layers, grids, strict=True):
            scores = replicated(criterion.unit(layer, g, weights[layer.weight], stats))
            keys.append(ordered_bits(xp, scores))
            bad[layer.name] = xp.any(keys[-1] == HIGHEST)
        ks = [int32(xp, counts[pool.name], keys[0]) for pool in pools]
        if plan.scope == "layer":
            budgets = [xp.clip(k, 0, g.n_units) for k, g in zip(ks, grids, strict=True)]
            pruned = _lowest_of(xp, keys, budgets, None, [])
        else:
            pruned = _lowest_of(xp, keys, ks, list(pools[0].caps), [g.cost for g in grids])
        for layer, g, p in zip(layers, grids, pruned, strict=True):
            masks[layer.weight] = spread(xp, ~p, g)
    return masks, bad


# N:M.


def _nm_masks(
    weights: dict[str, Any], stats: Any, criterion: Criterion, plan: _Plan
) -> tuple[dict[str, Any], dict[str, Any]]:
    masks, bad = {}, {}
    for pool in plan.pools:
        (layer,) = pool.layers
        piece = criterion.element(layer, weights[layer.weight], stats)
        xp = namespace(piece.arrays[0])
        keys, _ = piece.keys(xp)
        bad[layer.name] = xp.any(keys == HIGHEST)
        masks[layer.weight] = _keep_nm(xp, keys, layer, plan.granularity)
    return masks, bad


def _keep_nm(xp: Any, keys: Any, layer: Layer, nm: NM) -> Any:
    """Returns the mask that keeps the highest of every group, found by comparing all pairs in it."""
    rest = tuple(a for a in range(keys.ndim) if a not in layer.in_axes)
    lead = rest[: layer.in_axes[0]]
    order = (*lead, *layer.in_axes, *(a for a in rest if a not in lead))
    moved = xp.permute_dims(keys, order)
    before = moved.shape[: len(lead)]
    after = moved.shape[len(lead) + len(layer.in_axes) :]
    groups = xp.reshape(moved, (*before, -1, nm.of, *after))
    at = [groups[(slice(None),) * (len(before) + 1) + (i,)] for i in range(nm.of)]
    keep = []
    for i in range(nm.of):
        # Equal keys: the earlier one is lower.
        lower = [at[j] <= at[i] if j < i else at[j] < at[i] for j in range(nm.of) if j != i]
        rank = xp.astype(lower[0], xp.uint8)
        for one in lower[1:]:
            rank = rank + xp.astype(one, xp.uint8)
        keep.append(rank >= nm.of - nm.keep)
    mask = xp.reshape(xp.stack(keep, axis=len(before) + 1), moved.shape)
    return xp.permute_dims(mask, tuple(order.index(a) for a in range(keys.ndim)))


# Biases.


def _bias_mask(layer: Layer, mask: Any, granularity: Granularity) -> Any:
    """Returns which biases stay, flat: those of output channels with some weight left.

    None if the layer has no bias or no channel can lose all its weights.
    """
    if layer.bias is None or not layer.out_axes:
        return None
    if isinstance(granularity, NM) or granularity == "input_channel":
        return None
    xp = namespace(mask)
    whole = xp.broadcast_to(mask, layer.shape)
    keep = fold(xp, whole, grid(layer, "output_channel"), lambda m, axes: xp.any(m, axis=axes))
    return xp.reshape(keep, (-1,))
