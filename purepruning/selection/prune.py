"""A criterion and a config to masks: checks what came, and sends every layer to its kernel."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

from purepruning.arguments import instance, missing, shown
from purepruning.arrays import (
    by_numpy,
    compiled,
    framework_of,
    has_values,
    is_array,
    is_concrete,
    namespace,
    stop_gradient,
)
from purepruning.config.config import Config, check_config, check_count, check_countable
from purepruning.granularity import NM, Block, Grid, grid
from purepruning.masks import by_path
from purepruning.selection.biases import with_biases
from purepruning.selection.by_row import row_masks
from purepruning.selection.criterion import Checked, Criterion, Score, Source
from purepruning.selection.large import is_large, large_masks
from purepruning.selection.nm import nm_masks
from purepruning.selection.problem import Problem, Solved
from purepruning.selection.ranked import ranked_masks
from purepruning.shards import is_sharded, refuse_sharded
from purepruning.trees import flatten
from purepruning.types import Masks, Params, Stats


def prune(criterion: Criterion, params: Params, stats: Stats, config: Config) -> Masks:
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
    expected = "a Criterion, such as pp.Criterion('mine', channel=function)"
    instance(criterion, Criterion, "prune: criterion", expected)
    check_config(criterion.name, config)
    if stats is not None and criterion.of is None:
        raise TypeError(f"{criterion.name} takes stats=None, got {shown(stats)}")
    score = _score_of(criterion, config)
    tree = flatten(params)
    if set(tree.leaves) == {""} and not hasattr(params, "shape"):
        raise TypeError(
            f"{criterion.name}: params must be a tree of arrays or a dict of tensors by name "
            f"(dict(model.named_parameters())), got {shown(params)}"
        )
    weights = weights_of(criterion.name, tree.leaves, config, sharded=True)
    if not weights:
        return tree.rebuild({})
    framework = framework_of(next(iter(weights.values())))
    score = dataclasses.replace(score, framework=framework)
    weights = {path: stop_gradient(weight) for path, weight in weights.items()}
    pools = tuple(pool.problem for pool in config.pools)
    terms = None
    if criterion.terms is not None and not isinstance(config.granularity, Block):
        terms = Checked(criterion.name, "terms", criterion.terms, framework)
    plan = Problem(
        Score(score, config.inverted, terms),
        pools,
        config.scope,
        config.granularity,
        criterion.rows and config.granularity == "element" and config.scope == "layer",
    )
    counts = {} if isinstance(config.granularity, NM) else checked_counts(criterion.name, config)
    check_values(criterion.name, weights)
    before = by_path(config.masks, tree.leaves) if config.masks else {}
    of = criterion.of or (lambda stats, layer: None)
    sources = {
        x.name: Source(weights[x.weight], of(stats, x), before.get(x.weight)) for x in config.layers
    }

    if any(map(is_sharded, weights.values())):
        from purepruning.selection.sharded import sharded_masks

        masks, has_nan = sharded_masks(criterion, sources, counts, plan, config, tree.leaves)
        _refuse_nan(criterion.name, has_nan)
        return tree.rebuild(masks)

    def solve(sources: dict[str, Source], counts: dict[str, Any]) -> dict[str, Any]:
        check = all(is_concrete(source.weight) for source in sources.values())
        coupled = functools.partial(_coupled_masks, config, tree.leaves)
        how = _masks if config.allocation is None else coupled
        masks, has_nan = how(sources, counts, plan, check)
        _refuse_nan(criterion.name, has_nan)
        return with_biases(masks, tree, config)

    return tree.rebuild(by_numpy(solve, sources, counts))


def _refuse_nan(name: str, has_nan: Mapping[str, Any]) -> None:
    nan = [layer for layer, flag in sorted(has_nan.items()) if is_concrete(flag) and bool(flag)]
    if nan:
        raise ValueError(f"{name}: scores of layer {', '.join(map(repr, nan))} are NaN")


def _score_of(criterion: Criterion, config: Config) -> Checked:
    granularity = config.granularity
    in_units = granularity != "element" and not isinstance(granularity, NM)
    field = "block" if isinstance(granularity, Block) else "channel"
    field = field if in_units else "element"
    score = getattr(criterion, field)
    if score is None:
        kinds = {"single weights or NM": criterion.element, "channels": criterion.channel}
        kinds["blocks"] = criterion.block
        ranks = " and ".join(kind for kind, known in kinds.items() if known) or "nothing"
        do = "resolve without granularity, or rank channels by their norm (pp.l1_norm)"
        if criterion.channel is not None:
            do = "give resolve granularity='output_channel'"
        raise ValueError(
            f"{criterion.name} ranks {ranks}, but the config has granularity={granularity!r}; {do}"
        )
    if in_units and criterion.rank is not None and config.allocation is None:
        field, score = "rank", criterion.rank
    return Checked(criterion.name, field, score)


def weights_of(
    pruner: str, leaves: Mapping[str, Any], config: Config, *, sharded: bool = False
) -> dict[str, Any]:
    """Returns the weights that are pruned, by path, checked against the config.

    ``sharded`` says that they may lie over processes.

    Raises:
        KeyError, TypeError, ValueError: as :func:`prune` says of parameters and config.
    """
    check_config(pruner, config)
    if not sharded:
        refuse_sharded(pruner, {x.weight: leaves.get(x.weight) for x in config.layers})
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
        if not is_array(weight):
            raise TypeError(f"{where}: {layer.weight!r} is no array, but {shown(weight)}")
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
            if size != grid(layer, "output_channel").n_stacked * layer.out_channels:
                raise ValueError(
                    f"{where}: {layer.bias!r} has {size} elements in params, but the layer table "
                    f"gives the layer {layer.out_channels} output channels"
                )
        weights[layer.weight] = weight
    return weights


def check_values(pruner: str, weights: Mapping[str, Any]) -> None:
    """Raises TypeError for a weight that is only a shape."""
    for path, weight in weights.items():
        if not has_values(weight):
            raise TypeError(f"{pruner}: {path!r} has no values in params, only a shape")


def checked_counts(pruner: str, config: Config) -> dict[str, Any]:
    """Returns the counts, checked as far as they are known."""
    for pool in config.pools:
        count = config.counts[pool.name]
        check_count(pruner, pool, count)
        check_countable(pruner, pool)
        if getattr(count, "ndim", 0):
            raise ValueError(
                f"{pruner}: the count of {pool.name!r} has shape {tuple(count.shape)}; map over it "
                "with vmap"
            )
    return config.counts


# From here on everything is traceable. What is done layer by layer is compiled for itself: an eager
# call then compiles it once for all layers of one shape.
def _masks(
    sources: dict[str, Source], counts: dict[str, Any], plan: Problem, check: bool
) -> Solved:
    if isinstance(plan.granularity, NM):
        return nm_masks(sources, plan, plan.granularity)
    if plan.rows:
        return row_masks(sources, counts, plan)
    # In layer scope all pools are solved side by side; in global scope each is one problem.
    problems = [plan.pools] if plan.scope == "layer" else [(pool,) for pool in plan.pools]
    masks: dict[str, Any] = {}
    has_nan: dict[str, Any] = {}
    for pools in problems:
        problem = plan._replace(pools=pools)
        first = sources[problem.layers[0].name]
        solve = large_masks if is_large(first, problem, counts) else ranked_masks
        some = solve(first.weight, sources, counts, problem, check)
        masks |= some[0]
        has_nan |= some[1]
    return masks, has_nan


def _coupled_masks(
    config: Config,
    leaves: Mapping[str, Any],
    sources: dict[str, Source],
    counts: dict[str, Any],
    plan: Problem,
    check: bool,
) -> Solved:
    from purepruning.selection.coupled import coupled_masks

    score = compiled(next(iter(sources.values())).weight, _channel_scores, "score", "g")
    scores, keeps, has_nan, grids = {}, {}, {}, {}
    for layer in config.layers:
        name, g = layer.name, grid(layer, config.granularity)
        scores[name], keep, has_nan[name] = score(sources[name], score=plan.score, g=g)
        grids[name] = g
        if keep is not None:
            keeps[name] = keep
    masks = coupled_masks(scores, keeps, grids, counts, config, leaves)
    return masks, has_nan if check else {}


def _channel_scores(source: Source, *, score: Score, g: Grid) -> tuple[Any, Any, Any]:
    """Returns what :meth:`_Score.channels` does, and whether a score is NaN."""
    scores, keep = score.channels(source, g)
    return scores, keep, namespace(scores).any(scores != scores)
