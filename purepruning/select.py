"""Scores and counts to masks: exactly k units, the same ones in every framework.

One rule throughout: the units of lowest score are pruned, and of equal scores those that come
first. Positions count in the parameter's own layout (C order); in global scope layers come in the
order of their names, and where layers are stacked, the first of the stack first.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

from purepruning import counting, partition
from purepruning.config import BiasRule, Config, Pool
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
    stop_gradient,
)
from purepruning.pieces import HIGHEST, Piece, ordered_bits
from purepruning.rules import Scope
from purepruning.units import NM, Block, Granularity, Grid, fold, grid, spread

#: Up to this many elements that are ranked together, copying their scores is as fast as counting.
SMALL = 65_536

#: Up to this many weights in a group of N:M, comparing all pairs is fastest.
PAIRS = 16


class Criterion(NamedTuple):
    """What a pruner ranks by. Scores are float32, and larger ones are more important.

    Attributes:
        name: the pruner's name, for messages.
        element: ``(layer, weight, stats) -> Piece``: how single weights score, for elements and
            N:M; None if the criterion has no such meaning.
        channel: ``(layer, grid, weight, stats) -> (members, units)``: how channels score; None if
            the criterion has no such meaning.
        block: the same for blocks.
        needs_stats: whether ``stats`` have a meaning; a pruner that needs none takes None.
    """

    name: str
    element: Callable[[Layer, Any, Any], Piece] | None = None
    channel: Callable[[Layer, Grid, Any, Any], Any] | None = None
    block: Callable[[Layer, Grid, Any, Any], Any] | None = None
    needs_stats: bool = False


class _Plan(NamedTuple):
    """What is static about a call: the criterion's way to score, and the config without counts."""

    score: Callable[..., Any]
    pools: tuple[Pool, ...]
    scope: Scope
    granularity: Granularity
    bias: BiasRule


# Masks by parameter path, and by layer name whether one of its scores is NaN.
_Masks = tuple[dict[str, Any], dict[str, Any]]


def prune(criterion: Criterion, params: Any, stats: Any, config: Config) -> Any:
    """Returns the masks of a criterion: True keeps, None is not pruned.

    Masks broadcast to their parameters. The tree is that of ``params``; of a flat dict of torch
    tensors only the pruned ones are named, since ``torch.func.vmap`` cannot return None.

    Raises:
        KeyError: a layer's parameter is not in ``params``.
        TypeError: ``config`` is no config, there are stats where there should be none, a parameter
            is no array, or a count is no integer.
        ValueError: the criterion has no meaning for the config's granularity; a parameter has
            another shape or is not a float; a count is missing, outside the layer's units, or
            empties a layer whose rule does not allow it; a score is NaN, where values are known.
            Under ``jit`` and ``vmap`` they are not: counts are then clipped to the units there are,
            and NaN ranks above infinity, so that it stays in the weights to be seen.
    """
    if not isinstance(config, Config):
        raise TypeError(
            f"{criterion.name}: arguments are (params, stats, config), and config is what resolve "
            f"returned; got {type(config).__name__}"
        )
    if stats is not None and not criterion.needs_stats:
        raise TypeError(f"{criterion.name} takes stats=None, got {type(stats).__name__}")
    score = _score_of(criterion, config.granularity)
    tree = flatten(params)
    if set(tree.leaves) == {""} and not hasattr(params, "shape"):
        raise TypeError(
            f"{criterion.name}: params must be a tree of arrays or a dict of tensors by name "
            f"(dict(model.named_parameters())), got {type(params).__name__}"
        )
    weights = weights_of(criterion.name, tree.leaves, config)
    if not weights:
        return tree.rebuild({})
    pools = tuple(pool.problem for pool in config.pools)
    plan = _Plan(score, pools, config.scope, config.granularity, config.bias)
    counts = {} if isinstance(config.granularity, NM) else _counts(config)
    like = next(iter(weights.values()))
    check = all(map(is_concrete, weights.values()))
    masks, has_nan = compiled(like, _masks, "plan", "check")(
        weights, stats, counts, plan=plan, check=check
    )
    nan = [name for name, flag in sorted(has_nan.items()) if is_concrete(flag) and bool(flag)]
    if nan:
        raise ValueError(f"{criterion.name}: scores of layer {', '.join(map(repr, nan))} are NaN")
    for path in masks.keys() - weights.keys():
        masks[path] = namespace(like).reshape(masks[path], tuple(tree.leaves[path].shape))
    return tree.rebuild(masks)


def _score_of(criterion: Criterion, granularity: Granularity) -> Callable[..., Any]:
    if granularity == "element" or isinstance(granularity, NM):
        score: Callable[..., Any] | None = criterion.element
    else:
        score = criterion.block if isinstance(granularity, Block) else criterion.channel
    if score is None:
        kinds = {"elements or NM": criterion.element, "channels": criterion.channel}
        kinds["blocks"] = criterion.block
        wanted = ", ".join(kind for kind, known in kinds.items() if known)
        raise ValueError(
            f"{criterion.name} ranks {wanted}, but the config was resolved with "
            f"granularity={granularity!r}"
        )
    return score


def weights_of(pruner: str, leaves: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """Returns the weights that are pruned, by path, checked against the config.

    Raises:
        KeyError, TypeError, ValueError: as :func:`prune` says of parameters and config.
    """
    if not isinstance(config, Config):
        raise TypeError(
            f"{pruner}: config must be what resolve returned, got {type(config).__name__}"
        )
    weights = {}
    for layer in config.layers:
        where = f"{pruner}: layer {layer.name!r}"
        if layer.weight not in leaves:
            raise KeyError(
                missing(f"{where}: params have no {layer.weight!r}", layer.weight, leaves)
            )
        if config.bias == "follow" and layer.bias is not None and layer.bias not in leaves:
            message = (
                f"{where}: params have no {layer.bias!r} (bias='keep' in resolve leaves it out)"
            )
            raise KeyError(missing(message, layer.bias, leaves))
        weight = leaves[layer.weight]
        if not hasattr(weight, "shape") or not hasattr(weight, "dtype"):
            raise TypeError(f"{where}: {layer.weight!r} is no array, but {weight!r}")
        shape = tuple(weight.shape)
        if shape != layer.shape:
            raise ValueError(
                f"{where}: {layer.weight!r} has shape {shape} in params, but {layer.shape} in the "
                "layer table"
            )
        if not namespace(weight).isdtype(weight.dtype, "real floating"):
            raise ValueError(f"{where}: {layer.weight!r} must be floating, got {weight.dtype}")
        if config.bias == "follow" and layer.bias is not None:
            size = math.prod(getattr(leaves[layer.bias], "shape", ()))
            if size != grid(layer, "output_channel").n_members * layer.out_channels:
                raise ValueError(
                    f"{where}: {layer.bias!r} has {size} elements in params, but the layer table "
                    f"gives the layer {layer.out_channels} output channels"
                )
        weights[layer.weight] = weight
    return weights


def _counts(config: Config) -> dict[str, Any]:
    """Returns the counts, checked as far as they are known."""
    for pool in config.pools:
        count = config.counts[pool.name]
        if count is None:
            raise ValueError(
                f"rule {pool.rule} gives no sparsity for {pool.name!r}; name one in the rule or "
                "call config.with_sparsity(...)"
            )
        if not _is_integer(count):
            raise TypeError(f"the count of {pool.name!r} must be an integer, got {count!r}")
        if not is_concrete(count):
            continue
        if getattr(count, "ndim", 0):
            raise ValueError(
                f"the count of {pool.name!r} has shape {tuple(count.shape)}; map over it with vmap"
            )
        if not 0 <= int(count) <= pool.most:
            why = "max_sparsity_per_layer" if pool.caps else "'allow_empty': True"
            raise ValueError(
                f"the count of {pool.name!r} must lie in [0, {pool.most}], got {int(count)}; its "
                f"size is {pool.size}, and how much of it can go depends on the rule's {why}"
            )
    return config.counts


def _is_integer(count: Any) -> bool:
    if hasattr(count, "dtype"):
        return namespace(count).isdtype(count.dtype, "integral")
    return isinstance(count, int) and not isinstance(count, bool)


# From here on everything is traceable.


def _masks(
    weights: dict[str, Any], stats: Any, counts: dict[str, Any], *, plan: _Plan, check: bool
) -> _Masks:
    weights = {path: stop_gradient(weight) for path, weight in weights.items()}
    if isinstance(plan.granularity, NM):
        masks, has_nan = _nm_masks(weights, stats, plan, plan.granularity)
    else:
        masks, has_nan = {}, {}
        # In layer scope all pools are solved side by side; in global scope each is one problem.
        problems = [plan.pools] if plan.scope == "layer" else [(pool,) for pool in plan.pools]
        solve = _element_masks if plan.granularity == "element" else _unit_masks
        for pools in problems:
            some = solve(weights, stats, counts, plan._replace(pools=pools), check)
            masks |= some[0]
            has_nan |= some[1]
    if plan.bias == "follow":
        masks |= bias_masks([x for p in plan.pools for x in p.layers], masks, plan.granularity)
    return masks, has_nan


def _kernel(like: Any) -> ModuleType:
    """Returns the module that selects best in the framework of ``like``; both find the same."""
    return partition if is_torch(like) else counting


# Single elements.


def _element_masks(
    weights: dict[str, Any], stats: Any, counts: dict[str, Any], plan: _Plan, check: bool
) -> _Masks:
    pieces: list[Piece] = []
    ks: list[Any] = []
    caps: list[int] = []
    members = {}
    for pool in plan.pools:
        for i, layer in enumerate(pool.layers):
            parts = _members(plan.score(layer, weights[layer.weight], stats), layer)
            pieces += parts
            ks += [counts[pool.name]] * len(parts)
            caps += [pool.caps[i]] * len(parts) if plan.scope == "global" else []
            members[layer] = len(parts)
    xp = namespace(pieces[0].arrays[0])
    keep, nan = _keep_elements(xp, pieces, ks, caps, check)
    masks, has_nan, start = {}, {}, 0
    for layer, n in members.items():
        masks[layer.weight] = _restack(xp, keep[start : start + n], layer)
        has_nan[layer.name] = functools.reduce(operator.or_, nan[start : start + n])
        start += n
    return masks, has_nan


def _members(piece: Piece, layer: Layer) -> list[Piece]:
    """Returns one piece for each of the layers stacked in this one."""
    if not layer.stack_axes:
        return [piece]
    xp = namespace(piece.arrays[0])
    rest = tuple(a for a in range(len(layer.shape)) if a not in layer.stack_axes)
    shape = tuple(layer.shape[a] for a in rest)
    order = (*layer.stack_axes, *rest)
    stacks = [xp.reshape(xp.permute_dims(x, order), (-1, *shape)) for x in piece.arrays]
    size = math.prod(shape)

    def member(i: int) -> Piece:
        def score(arrays: tuple[Any, ...], index: Any) -> Any:
            return piece.score(arrays, index + i * size)

        return Piece(tuple(stack[i, ...] for stack in stacks), score)

    return [member(i) for i in range(stacks[0].shape[0])]


def _restack(xp: Any, keep: Sequence[Any], layer: Layer) -> Any:
    if not layer.stack_axes:
        return keep[0]
    rest = tuple(a for a in range(len(layer.shape)) if a not in layer.stack_axes)
    order = (*layer.stack_axes, *rest)
    stacked = xp.reshape(xp.stack(list(keep)), tuple(layer.shape[a] for a in order))
    return xp.permute_dims(stacked, tuple(order.index(a) for a in range(len(order))))


def _keep_elements(
    xp: Any, pieces: list[Piece], ks: list[Any], caps: list[int], check: bool
) -> tuple[list[Any], list[Any]]:
    """Returns which elements of each piece stay, and whether its scores hold a NaN.

    Without caps each piece loses its own count; with caps they share the first one.
    """
    like = pieces[0].arrays[0]
    sizes = [p.size for p in pieces]
    if caps:
        budgets = [xp.clip(int32(xp, ks[0], like), 0, sum(caps))]
    else:
        budgets = [xp.clip(int32(xp, k, like), 0, n) for k, n in zip(ks, sizes, strict=True)]
    small = sum(sizes) <= SMALL and not spans_devices(like)
    if small or any(is_batched(x) for p in pieces for x in (*p.arrays, *budgets)):
        keys = [xp.reshape(p.keys(xp)[0], (1, -1)) for p in pieces]
        pruned = _lowest(xp, keys, budgets, caps, [1] * len(keys))
        keep = [xp.reshape(~rows, p.shape) for rows, p in zip(pruned, pieces, strict=True)]
        return keep, [xp.any(k == HIGHEST) for k in keys]
    kernel = _kernel(like)
    if caps:
        cut, nan = kernel.global_cuts(pieces, budgets[0], int32(xp, caps, like), check)
    else:
        cut, nan = kernel.local_cuts(pieces, xp.stack(budgets), check)
    return [kernel.kept(piece, cut, i) for i, piece in enumerate(pieces)], list(nan)


# Channels and blocks.


def _unit_masks(
    weights: dict[str, Any], stats: Any, counts: dict[str, Any], plan: _Plan, check: bool
) -> _Masks:
    layers = [layer for pool in plan.pools for layer in pool.layers]
    grids = [grid(layer, plan.granularity) for layer in layers]
    xp = namespace(weights[layers[0].weight])
    keys, has_nan = [], {}
    for layer, g in zip(layers, grids, strict=True):
        scores = replicated(plan.score(layer, g, weights[layer.weight], stats))
        keys.append(ordered_bits(xp, scores))
        has_nan[layer.name] = xp.any(keys[-1] == HIGHEST)
    budgets = [int32(xp, counts[pool.name], keys[0]) for pool in plan.pools]
    caps: list[int] = []
    if plan.scope == "global":
        caps = list(plan.pools[0].caps)
    else:
        budgets = [xp.clip(k, 0, g.n_units) for k, g in zip(budgets, grids, strict=True)]
    pruned = _lowest(xp, keys, budgets, caps, [g.cost for g in grids])
    masks = {x.weight: spread(xp, ~p, g) for x, p, g in zip(layers, pruned, grids, strict=True)}
    return masks, has_nan


def _lowest(
    xp: Any, keys: list[Any], budgets: list[Any], caps: list[int], costs: list[Any]
) -> list[Any]:
    """Returns which units of each ``(members, units)`` array of keys are pruned.

    Without caps every row loses as many units as its array's budget says. With caps all arrays
    share one budget, to which units are charged at their cost, and a row loses at most its cap of
    units.
    """
    if not caps:
        return _lowest_in_rows(xp, keys, budgets)
    # Units beyond their layer's cap take no part: they rank last, behind NaN, and stay.
    within = _lowest_in_rows(xp, keys, [int32(xp, cap, keys[0]) for cap in caps])
    flat_keys, flat_costs = [], []
    for k, cost, allowed in zip(keys, costs, within, strict=True):
        ranked = xp.where(allowed, xp.clip(k, max=HIGHEST - 1), HIGHEST)
        flat_keys.append(xp.reshape(ranked, (1, -1)))
        each = int32(xp, cost, k)
        each = xp.reshape(each, (1, -1)) if each.ndim else each
        flat_costs.append(xp.reshape(xp.broadcast_to(each, k.shape), (-1,)))
    together = _kernel(keys[0]).lowest(
        xp.concat(flat_keys, axis=1), xp.reshape(budgets[0], (1,)), xp.concat(flat_costs)
    )
    pruned, start = [], 0
    for k, allowed in zip(keys, within, strict=True):
        n = math.prod(k.shape)
        pruned.append(allowed & xp.reshape(together[0, start : start + n], k.shape))
        start += n
    return pruned


def _lowest_in_rows(xp: Any, keys: list[Any], counts: list[Any]) -> list[Any]:
    """Returns the ``counts[i]`` lowest of each row of ``keys[i]``; equally long rows together."""
    pruned: list[Any] = [None] * len(keys)
    for width in sorted({k.shape[1] for k in keys}):
        which = [i for i, k in enumerate(keys) if k.shape[1] == width]
        rows = xp.concat([keys[i] for i in which])
        ks = xp.concat([xp.broadcast_to(counts[i], (keys[i].shape[0],)) for i in which])
        lowest, start = _kernel(rows).lowest(rows, ks, None), 0
        for i in which:
            n = keys[i].shape[0]
            pruned[i] = lowest[start : start + n, :]
            start += n
    return pruned


# N:M.


def _nm_masks(weights: dict[str, Any], stats: Any, plan: _Plan, nm: NM) -> _Masks:
    masks, has_nan = {}, {}
    for pool in plan.pools:
        for layer in pool.layers:
            piece = plan.score(layer, weights[layer.weight], stats)
            xp = namespace(piece.arrays[0])
            last = layer.in_axes == tuple(range(len(layer.shape)))[-len(layer.in_axes) :]
            if is_torch(piece.arrays[0]) and is_concrete(piece.arrays[0]) and last:
                keep = functools.partial(_highest_of_groups, axis=1, nm=nm)
                mask, nan = partition.by_rows(piece, nm.of, keep)
            else:
                keys, _ = piece.keys(xp)
                mask, nan = _keep_nm(xp, keys, layer, nm), xp.any(keys == HIGHEST)
            masks[layer.weight], has_nan[layer.name] = mask, nan
    return masks, has_nan


def _keep_nm(xp: Any, keys: Any, layer: Layer, nm: NM) -> Any:
    """Returns the mask that keeps the highest of every group."""
    rest = tuple(a for a in range(keys.ndim) if a not in layer.in_axes)
    lead = tuple(a for a in rest if a < layer.in_axes[0])
    order = (*lead, *layer.in_axes, *(a for a in rest if a not in lead))
    moved = xp.permute_dims(keys, order)
    before, after = moved.shape[: len(lead)], moved.shape[len(lead) + len(layer.in_axes) :]
    groups = xp.reshape(moved, (*before, -1, nm.of, *after))
    mask = xp.reshape(_highest_of_groups(groups, len(before) + 1, nm), moved.shape)
    return xp.permute_dims(mask, tuple(order.index(a) for a in range(keys.ndim)))


def _highest_of_groups(groups: Any, axis: int, nm: NM) -> Any:
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
    lowest = _kernel(rows).lowest(rows, count, None)
    return xp.moveaxis(xp.reshape(~lowest, last.shape), -1, axis)


# Biases.


def bias_masks(
    layers: Sequence[Layer], masks: Mapping[str, Any], granularity: Granularity
) -> dict[str, Any]:
    """Returns the masks of biases, flat, that follow those of the weights."""
    biases: dict[str, Any] = {}
    for layer in layers:
        keep = _bias_mask(layer, masks[layer.weight], granularity)
        if keep is not None and layer.bias is not None:
            # A bias that layers share stays as long as one of them needs it.
            shared = biases.get(layer.bias)
            biases[layer.bias] = keep if shared is None else keep | shared
    return biases


def _bias_mask(layer: Layer, mask: Any, granularity: Granularity) -> Any:
    """Returns which biases stay, flat: those of channels with some weight left.

    None if the layer has no bias, or if no channel can lose all its weights.
    """
    if layer.bias is None or not layer.out_axes:
        return None
    if isinstance(granularity, NM) or (granularity == "input_channel" and layer.groups == 1):
        return None
    xp = namespace(mask)
    whole = xp.broadcast_to(mask, layer.shape)
    keep = fold(xp, whole, grid(layer, "output_channel"), lambda m, axes: xp.any(m, axis=axes))
    return xp.reshape(keep, (-1,))
