"""Scores and counts to masks: exactly k units, the same ones in every framework.

One rule throughout: the units of lowest score are pruned, and of equal scores those that come
first. Positions count in the parameter's own layout (C order); in global scope layers come in the
order of their names, and where layers are stacked, the first of the stack first.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from purepruning import counting, partition
from purepruning.config import Config, Pool
from purepruning.layers import Layer, missing
from purepruning.masks import by_path, spread_mask
from purepruning.namespace import (
    Flat,
    compiled,
    flatten,
    int32,
    is_batched,
    is_concrete,
    is_torch,
    namespace,
    part,
    replicated,
    spans_devices,
    stop_gradient,
)
from purepruning.pieces import HIGHEST, Cut, Piece, ordered_bits
from purepruning.rules import Scope
from purepruning.units import NM, Block, Granularity, Grid, any_of, fold, grid, spread

#: Up to this many elements that are ranked together, copying their scores is as fast as counting.
SMALL = 65_536

LOWEST_FINITE = float(np.finfo(np.float32).min)

#: Up to this many weights in a group of N:M, comparing all pairs is fastest.
PAIRS = 16


class Criterion(NamedTuple):
    """What a pruner ranks by. Scores are float32, and larger ones are more important.

    Layers of one shape are scored by one compiled function, so that scores depend on a layer only
    through its weight, its grid and what ``of`` returns for it.

    Attributes:
        name: the pruner's name, for messages.
        element: ``(weight, own) -> Piece``: how single weights score, for elements and N:M; None if
            the criterion has no such meaning.
        channel: ``(weight, own, grid) -> (members, units)``: how channels score; None if the
            criterion has no such meaning.
        block: the same for blocks.
        of: ``(stats, layer) -> own``: what the statistics say of one layer, a tree of arrays; None
            if the pruner takes ``stats=None``.
    """

    name: str
    element: Callable[[Any, Any], Piece] | None = None
    channel: Callable[[Any, Any, Grid], Any] | None = None
    block: Callable[[Any, Any, Grid], Any] | None = None
    of: Callable[[Any, Layer], Any] | None = None


class _Source(NamedTuple):
    """What a layer is scored from: its weight, what the statistics say of it, and its mask so far.

    The mask is None where nothing is pruned already.
    """

    weight: Any
    own: Any
    keep: Any


class _Score(NamedTuple):
    """How layers are scored: by a criterion; what is pruned already has the lowest score there is.

    Attributes:
        of: the criterion's function for the units of the config.
        inverted: whether the units of highest score are pruned.
    """

    of: Callable[..., Any]
    inverted: bool

    def piece(self, source: _Source) -> Piece:
        """Returns the single weights of a layer, with their scores."""
        piece: Piece = self.of(source.weight, source.own)
        if source.keep is None and not self.inverted:
            return piece
        if source.keep is not None:
            keep = spread_mask(source.keep, source.weight)
            piece = piece._replace(arrays=(*piece.arrays, keep))
        masked = source.keep is not None
        return piece._replace(score=_Adjusted(piece.score, self.inverted, masked))

    def channels(self, source: _Source, g: Grid) -> tuple[Any, Any]:
        """Returns the scores of channels, 0 where pruned already, and which are not (or None)."""
        scores = replicated(self.of(source.weight, source.own, g))
        scores = -scores if self.inverted else scores
        if source.keep is None:
            return scores, None
        whole = spread_mask(source.keep, source.weight)
        keep = replicated(fold(namespace(whole), whole, g, any_of))
        return namespace(scores).where(keep, scores, 0.0), keep

    def units(self, source: _Source, g: Grid) -> Any:
        """Returns the scores of the units of a layer, ``(members, units)``."""
        scores = replicated(self.of(source.weight, source.own, g))
        keep = None
        if source.keep is not None:
            whole = spread_mask(source.keep, source.weight)
            keep = replicated(fold(namespace(whole), whole, g, any_of))
        return _with_lowest(scores, keep, self.inverted)


@dataclasses.dataclass(frozen=True)
class _Adjusted:
    """The score of a piece whose last array is its mask so far, if it is masked."""

    score: Callable[..., Any]
    inverted: bool
    masked: bool

    def __call__(self, arrays: tuple[Any, ...], index: Any, own: Any) -> Any:
        keep = arrays[-1] if self.masked else None
        scores = self.score(arrays[:-1] if self.masked else arrays, index, own)
        return _with_lowest(scores, keep, self.inverted)


class _Plan(NamedTuple):
    """What is static about a call: how to score, and the config without counts."""

    score: _Score
    pools: tuple[Pool, ...]
    scope: Scope
    granularity: Granularity

    @property
    def layers(self) -> tuple[Layer, ...]:
        return tuple(layer for pool in self.pools for layer in pool.layers)

    @property
    def caps(self) -> tuple[int, ...]:
        """The most units each layer may lose; none in layer scope."""
        return self.pools[0].caps if self.scope == "global" else ()


# Masks by parameter path, and by layer name whether one of its scores is NaN.
_Masks = tuple[dict[str, Any], dict[str, Any]]


def prune(criterion: Criterion, params: Any, stats: Any, config: Config) -> Any:
    """Returns the masks of a criterion: True keeps, None is not pruned.

    What the config's masks prune is pruned first (:meth:`purepruning.Config.with_masks`).

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
    if stats is not None and criterion.of is None:
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
    weights = {path: stop_gradient(weight) for path, weight in weights.items()}
    pools = tuple(pool.problem for pool in config.pools)
    plan = _Plan(_Score(score, config.inverted), pools, config.scope, config.granularity)
    counts = {} if isinstance(config.granularity, NM) else checked_counts(config)
    check = all(map(is_concrete, weights.values()))
    before = by_path(config.masks, tree.leaves) if config.masks else {}
    of = criterion.of or (lambda stats, layer: None)
    sources = {
        x.name: _Source(weights[x.weight], of(stats, x), before.get(x.weight))
        for x in config.layers
    }
    solve = _masks if config.allocation is None else functools.partial(_coupled_masks, config)
    masks, has_nan = solve(sources, counts, plan, check)
    nan = [name for name, flag in sorted(has_nan.items()) if is_concrete(flag) and bool(flag)]
    if nan:
        raise ValueError(f"{criterion.name}: scores of layer {', '.join(map(repr, nan))} are NaN")
    return with_biases(masks, tree, config)


def with_biases(masks: dict[str, Any], tree: Flat, config: Config) -> Any:
    """Returns a tree of the masks of all layers, by path of their weights, and of their biases."""
    if config.bias == "follow":
        biases = bias_masks(config.layers, masks, config.granularity)
        for path, mask in biases.items():
            masks[path] = namespace(mask).reshape(mask, tuple(tree.leaves[path].shape))
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


def checked_counts(config: Config) -> dict[str, Any]:
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
            capped = pool.caps or pool.total is not None
            why = "max_sparsity_per_layer" if capped else "'allow_empty': True"
            raise ValueError(
                f"the count of {pool.name!r} must lie in [0, {pool.most}], got {int(count)}; its "
                f"size is {pool.size}, and how much of it can go depends on the rule's {why}"
            )
        if pool.allowed is not None and int(count) not in pool.allowed:
            raise ValueError(
                f"the count of {pool.name!r} must be one that round_to and min_channels allow: "
                f"{', '.join(map(str, pool.allowed[:8]))}{', ...' * (len(pool.allowed) > 8)}; "
                f"got {int(count)}"
            )
    return config.counts


def _is_integer(count: Any) -> bool:
    if hasattr(count, "dtype"):
        return namespace(count).isdtype(count.dtype, "integral")
    return isinstance(count, int) and not isinstance(count, bool)


# From here on everything is traceable. What is done layer by layer is compiled for itself: an eager
# call then compiles it once for all layers of one shape.


def _masks(sources: dict[str, _Source], counts: dict[str, Any], plan: _Plan, check: bool) -> _Masks:
    if isinstance(plan.granularity, NM):
        return _nm_masks(sources, plan, plan.granularity)
    # In layer scope all pools are solved side by side; in global scope each is one problem.
    problems = [plan.pools] if plan.scope == "layer" else [(pool,) for pool in plan.pools]
    masks: dict[str, Any] = {}
    has_nan: dict[str, Any] = {}
    for pools in problems:
        problem = plan._replace(pools=pools)
        first = sources[problem.layers[0].name]
        solve = _cut_masks if _is_large(first, problem, counts) else _ranked_masks
        some = solve(first.weight, sources, counts, problem, check)
        masks |= some[0]
        has_nan |= some[1]
    return masks, has_nan


def _coupled_masks(
    config: Config, sources: dict[str, _Source], counts: dict[str, Any], plan: _Plan, check: bool
) -> _Masks:
    from purepruning.coupling.selection import coupled_masks

    score = compiled(next(iter(sources.values())).weight, _channel_scores, "score", "g")
    scores, keeps, has_nan, grids = {}, {}, {}, {}
    for layer in config.layers:
        name, g = layer.name, grid(layer, config.granularity)
        scores[name], keep, has_nan[name] = score(sources[name], score=plan.score, g=g)
        grids[name] = g
        if keep is not None:
            keeps[name] = keep
    masks = coupled_masks(scores, keeps, grids, counts, config)
    return {x.weight: masks[x.name] for x in config.layers}, has_nan if check else {}


def _channel_scores(source: _Source, *, score: _Score, g: Grid) -> tuple[Any, Any, Any]:
    """Returns what :meth:`_Score.channels` does, and whether a score is NaN."""
    scores, keep = score.channels(source, g)
    return scores, keep, namespace(scores).any(scores != scores)


def _is_large(source: _Source, plan: _Plan, counts: dict[str, Any]) -> bool:
    """Whether there are too many scores to copy, and they may be looked at more than once."""
    if plan.granularity != "element":
        return False
    # Statistics may be mapped over where weights are not.
    piece = plan.score.piece(source)
    like = piece.arrays[0]
    if any(map(is_batched, (*piece.arrays, *piece.own, *counts.values()))):
        return False
    return spans_devices(like) or sum(math.prod(x.shape) for x in plan.layers) > SMALL


def _kernel(like: Any) -> ModuleType:
    """Returns the module that selects best in the framework of ``like``; both find the same."""
    return partition if is_torch(like) else counting


def _n_members(layer: Layer) -> int:
    return math.prod(layer.shape[a] for a in layer.stack_axes)


def _counts_of_rows(like: Any, counts: dict[str, Any], plan: _Plan) -> Any:
    """Returns how many units go: ``(rows,)``, of every layer and each of those stacked in it."""
    pools = [(pool.name, _n_members(layer)) for pool in plan.pools for layer in pool.layers]
    known = [counts[name] for name, n in pools for _ in range(n)]
    xp = namespace(like)
    if all(isinstance(count, int) for count in known):
        return int32(xp, np.asarray(known, np.int32), like)
    return xp.stack([int32(xp, count, like) for count in known])


# Units whose scores are copied: channels, blocks, and the elements of small layers.


def _ranked_masks(
    like: Any, sources: dict[str, _Source], counts: dict[str, Any], plan: _Plan, check: bool
) -> _Masks:
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
    ks = _counts_of_rows(like, counts, plan)
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


def _element_keys(
    source: _Source, *, score: _Score, stack_axes: tuple[int, ...]
) -> tuple[Any, Any]:
    """Returns the ordered scores of all weights, ``(members, weights)``, and whether one is NaN."""
    xp = namespace(source.weight)
    pieces = _members(score.piece(source), stack_axes)
    keys = xp.concat([xp.reshape(piece.keys(xp)[0], (1, -1)) for piece in pieces])
    return keys, xp.any(keys == HIGHEST)


def _unit_keys(source: _Source, *, score: _Score, g: Grid) -> tuple[Any, Any]:
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
    together = _kernel(flat).lowest(ranked[None, :], counts[:1], cost)
    return within & together[0, :]


#: Rows of so few units in all are searched together, however long each is.
_FEW = 1 << 18


def lowest_of_rows(xp: Any, keys: list[Any], counts: Any) -> Any:
    """Returns the ``counts[i]`` lowest of row i of all ``keys``, in one vector of their units."""
    widths = [k.shape[1] for k in keys]
    row_widths = np.repeat(widths, [k.shape[0] for k in keys])
    starts = np.cumsum(row_widths) - row_widths
    pruned, start = [], 0
    place = np.zeros(int(np.sum(row_widths)), np.int64)
    for group in _similar(row_widths):
        # Rows of similar length together: what is filled in ranks last, behind NaN, and stays.
        longest = max(group)
        rows = xp.concat([_filled(xp, k, longest) for k in keys if k.shape[1] in group])
        which = np.flatnonzero(np.isin(row_widths, list(group)))
        few = xp.take(counts, int32(xp, which, counts))
        pruned.append(xp.reshape(_kernel(rows).lowest(rows, few, None), (-1,)))
        for width in group:
            mine, along = np.flatnonzero(row_widths[which] == width)[:, None], np.arange(width)
            place[starts[which[mine]] + along] = start + mine * longest + along
        start += len(which) * longest
    return xp.take(xp.concat(pruned), int32(xp, place, counts))


def _similar(row_widths: np.ndarray) -> list[set[int]]:
    """Returns which rows are searched together: compiling one search takes as long as running many.

    Rows are filled up to the longest of their group, four times at most, where that is little.
    """
    groups: list[set[int]] = []
    for width in sorted(set(row_widths.tolist()), reverse=True):
        last = groups[-1] if groups else set()
        rows = np.isin(row_widths, [*last, width]).sum()
        if last and (max(last) <= 4 * width or rows * max(last) <= _FEW):
            last.add(width)
        else:
            groups.append({width})
    return groups


def _filled(xp: Any, keys: Any, width: int) -> Any:
    """Returns rows of the given width, with the highest of all keys behind their own."""
    more = width - keys.shape[1]
    if not more:
        return keys
    return xp.concat(
        [keys, xp.broadcast_to(xp.full_like(keys[:, :1], HIGHEST), (keys.shape[0], more))], axis=1
    )


def _unit_mask(pruned: Any, start: Any, *, g: Grid) -> Any:
    """Returns the mask of a layer whose units begin at ``start`` in the vector of all."""
    xp = namespace(pruned)
    own = part(pruned, start, g.n_members * g.n_units)
    return spread(xp, xp.reshape(~own, (g.n_members, g.n_units)), g)


# Elements that are too many to copy their scores.


def _cut_masks(
    like: Any, sources: dict[str, _Source], counts: dict[str, Any], plan: _Plan, check: bool
) -> _Masks:
    some = {layer.name: sources[layer.name] for layer in plan.layers}
    ks = _counts_of_rows(like, counts, plan)
    cuts, nan = compiled(like, _cuts, "plan", "check")(some, ks, plan=plan, check=check)
    mask = compiled(like, _cut_mask, "score", "stack_axes")
    masks, has_nan, start = {}, {}, 0
    flags = np.asarray(nan) if check and is_concrete(nan) else None
    for layer in plan.layers:
        masks[layer.weight] = mask(
            some[layer.name], cuts, start, score=plan.score, stack_axes=layer.stack_axes
        )
        stop = start + _n_members(layer)
        if flags is not None:
            has_nan[layer.name] = flags[start:stop].any()
        start = stop
    return masks, has_nan


def _cuts(sources: dict[str, _Source], counts: Any, *, plan: _Plan, check: bool) -> tuple[Cut, Any]:
    """Returns where to cut the pieces, and where their scores hold a NaN."""
    pieces = [
        piece
        for layer in plan.layers
        for piece in _members(plan.score.piece(sources[layer.name]), layer.stack_axes)
    ]
    like = pieces[0].arrays[0]
    xp, kernel = namespace(like), _kernel(like)
    if not plan.caps:
        sizes = int32(xp, [p.size for p in pieces], like)
        return kernel.local_cuts(pieces, xp.clip(counts, 0, sizes), check)
    caps = [n for n, x in zip(plan.caps, plan.layers, strict=True) for _ in range(_n_members(x))]
    budget = xp.clip(counts[0], 0, sum(caps))
    return kernel.global_cuts(pieces, budget, int32(xp, caps, like), check)


def _cut_mask(
    source: _Source, cut: Cut, start: Any, *, score: _Score, stack_axes: tuple[int, ...]
) -> Any:
    """Returns the mask of a layer whose pieces are cut as ``cut`` says from ``start`` on."""
    piece = score.piece(source)
    keep = [
        _kernel(p.arrays[0]).kept(p, cut, start + i)
        for i, p in enumerate(_members(piece, stack_axes))
    ]
    return _restack(keep, piece.shape, stack_axes)


def _members(piece: Piece, stack_axes: tuple[int, ...]) -> list[Piece]:
    """Returns one piece for each of the layers stacked in this one."""
    if not stack_axes:
        return [piece]
    xp = namespace(piece.arrays[0])
    rest = tuple(a for a in range(len(piece.shape)) if a not in stack_axes)
    shape = tuple(piece.shape[a] for a in rest)
    order, size = (*stack_axes, *rest), math.prod(shape)
    stacks = [xp.reshape(xp.permute_dims(x, order), (-1, *shape)) for x in piece.arrays]
    return [
        piece._replace(arrays=tuple(stack[i, ...] for stack in stacks), offset=i * size)
        for i in range(stacks[0].shape[0])
    ]


def _restack(keep: Sequence[Any], shape: tuple[int, ...], stack_axes: tuple[int, ...]) -> Any:
    """Returns one array of ``shape`` from those of the layers stacked in it."""
    if not stack_axes:
        return keep[0]
    xp = namespace(keep[0])
    order = (*stack_axes, *(a for a in range(len(shape)) if a not in stack_axes))
    stacked = xp.reshape(xp.stack(list(keep)), tuple(shape[a] for a in order))
    return xp.permute_dims(stacked, tuple(order.index(a) for a in range(len(order))))


# N:M.


def _nm_masks(sources: dict[str, _Source], plan: _Plan, nm: NM) -> _Masks:
    masks, has_nan = {}, {}
    for layer in plan.layers:
        source = sources[layer.name]
        masks[layer.weight], has_nan[layer.name] = compiled(
            source.weight, _nm_mask, "score", "in_axes", "nm"
        )(source, score=plan.score, in_axes=layer.in_axes, nm=nm)
    return masks, has_nan


def _nm_mask(
    source: _Source, *, score: _Score, in_axes: tuple[int, ...], nm: NM
) -> tuple[Any, Any]:
    """Returns the mask that keeps the highest of every group, and whether a score is NaN."""
    piece = score.piece(source)
    ndim = len(piece.shape)
    if is_torch(source.weight) and is_concrete(source.weight) and in_axes[-1] == ndim - 1:
        keep = functools.partial(_highest_of_groups, axis=1, nm=nm)
        return partition.by_rows(piece, nm.of, keep)
    xp = namespace(source.weight)
    keys, _ = piece.keys(xp)
    rest = tuple(a for a in range(ndim) if a not in in_axes)
    lead = tuple(a for a in rest if a < in_axes[0])
    order = (*lead, *in_axes, *(a for a in rest if a not in lead))
    moved = xp.permute_dims(keys, order)
    before, after = moved.shape[: len(lead)], moved.shape[len(lead) + len(in_axes) :]
    groups = xp.reshape(moved, (*before, -1, nm.of, *after))
    mask = xp.reshape(_highest_of_groups(groups, len(before) + 1, nm), moved.shape)
    keep = xp.permute_dims(mask, tuple(order.index(a) for a in range(ndim)))
    return keep, xp.any(keys == HIGHEST)


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
    """Returns which biases stay, flat and by path: those of channels with some weight left.

    Layers in which no channel can lose all its weights keep their biases, which are left out.
    """
    found: dict[str, Any] = {}
    for layer in layers:
        rows = isinstance(granularity, NM) or (granularity == "input_channel" and layer.groups == 1)
        if layer.bias is None or not layer.out_axes or rows:
            continue
        mask = masks[layer.weight]
        keep = compiled(mask, _bias_mask, "g")(mask, g=grid(layer, "output_channel"))
        # A bias that layers share stays as long as one of them needs it.
        found[layer.bias] = keep if layer.bias not in found else found[layer.bias] | keep
    return found


def _bias_mask(mask: Any, *, g: Grid) -> Any:
    xp = namespace(mask)
    return xp.reshape(fold(xp, xp.broadcast_to(mask, g.shape), g, any_of), (-1,))


def _with_lowest(scores: Any, keep: Any, inverted: bool) -> Any:
    scores = -scores if inverted else scores
    if keep is None:
        return scores
    xp = namespace(scores)
    # Scores of -inf still rank above what is pruned already.
    return xp.where(keep, xp.clip(scores, min=LOWEST_FINITE), -math.inf)
