"""Statistics of gradients: what the loss would do if weights were removed, summed over steps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import jax

from purepruning.arguments import instance, shown, some_of
from purepruning.arrays import (
    by_numpy,
    compiled,
    has_values,
    is_torch,
    namespace,
    stop_gradient,
)
from purepruning.config.config import Config, check_config
from purepruning.exact_sum import exact_sum
from purepruning.granularity import NM, Granularity, Grid, fold, grid
from purepruning.layers import Layer
from purepruning.shards import (
    Across,
    box_of,
    is_sharded,
    local,
    local_as,
    of_shard,
    whole,
    zeros_as,
)
from purepruning.stats.accumulate import (
    CompensatedSum,
    WideCount,
    add,
    count,
    empty_total,
)
from purepruning.stats.checks import (
    check_totals,
    gradient_leaves,
    match,
    refuse_non_finite,
    weight_of,
)
from purepruning.stats.merging import merged
from purepruning.trees import flatten
from purepruning.types import Params

Kept = Literal["squares", "grouped", "signed"]


KEPT: tuple[Kept, ...] = ("squares", "grouped", "signed")


class GradientStats(NamedTuple):
    r"""Totals over all steps so far, by layer name; of the units $u$ that a config prunes.

    All are sums over steps of the first-order term $g_i w_i$, by which the loss falls (to first
    order) when weight i is set to zero. A square of a sum is no sum of squares, so what is needed
    must be said before; what is not asked for is an empty dict, and takes no memory. It is kept per
    unit, not per weight: for channels that is next to nothing, and for single weights, where
    ``squares`` and ``grouped`` are the same, two float32 of the weight's shape (compensated sums,
    see :mod:`purepruning.stats.accumulate`) for each of the things kept. Of single weights any
    other granularity's ``squares`` and ``signed`` can be made later, ``grouped`` cannot.

    Arrays have the weight's shape where every unit is a single weight, else ``(stacked, units)``:
    a row for each of the layers stacked in a layer.

    Attributes:
        steps: gradients seen.
        squares: $\sum_t \sum_{i \in u} (g_i w_i)^2$.
        grouped: $\sum_t (\sum_{i \in u} g_i w_i)^2$.
        signed: $\sum_t \sum_{i \in u} g_i w_i$; movement scores are this, times minus the learning
            rate.
    """

    steps: WideCount
    squares: dict[str, CompensatedSum]
    grouped: dict[str, CompensatedSum]
    signed: dict[str, CompensatedSum]


def init(params: Params, config: Config, *, keep: Iterable[Kept] = ("squares",)) -> GradientStats:
    """Returns the statistics of nothing, in the framework and on the devices of ``params``.

    Args:
        params: the model's parameters; only looked at for where they are.
        config: says which layers are watched, and what a unit is.
        keep: which totals are needed: ``"squares"`` for Taylor scores, ``"grouped"`` for grouped
            ones, ``"signed"`` for movement.

    Raises:
        KeyError: a layer's weight is not in ``params``.
        ValueError: ``keep`` names something else.
    """
    kinds = some_of("gradients.init: keep", keep, KEPT)
    check_config("gradients.init", config)
    leaves = flatten(params).leaves
    for layer in config.layers:
        _weight("gradients.init", "params", layer, leaves)

    def sums(kind: Kept) -> dict[str, CompensatedSum]:
        if kind not in kinds:
            return {}
        return {
            x.name: _empty(leaves[x.weight], shape(x, config.granularity)) for x in config.layers
        }

    like = next(iter(leaves.values()), None)
    return GradientStats(empty_total(WideCount, like), *map(sums, KEPT))


def _empty(weight: Any, shape: tuple[int, ...]) -> CompensatedSum:
    """Returns a sum of nothing; of single weights that lie over processes, as they do."""
    return CompensatedSum(zeros_as(weight, shape), zeros_as(weight, shape))


def update(stats: GradientStats, params: Params, grads: Any, config: Config) -> GradientStats:
    """Returns the statistics with one step added: gradients, and the weights they were taken at.

    Runs under ``jit``, ``vmap`` and ``jax.lax.scan``. Products are of float32 and sums within a
    unit exact (:mod:`purepruning.exact_sum`), whatever the precision of weights and gradients; sums
    over steps do not drift. Squares of products below 1e-19 vanish in float32.

    A step is one gradient: those of single examples, micro-batches or devices count for themselves,
    and give other squares than their mean.

    Args:
        stats: the statistics so far, made by :func:`init` with the same layers and granularity.
        params: the parameters *before* the step that follows.
        grads: the gradients of the loss, in the same tree.
        config: as in :func:`init`; its counts do not matter.

    Raises:
        KeyError: a layer's weight is not in ``params`` or has no gradient there (in torch, None if
            the loss does not reach it), or a layer has no statistics.
        TypeError: a gradient is no array of floats.
        ValueError: a shape is wrong, or, where values are known, a weight or gradient is NaN or
            infinite. Under ``jit`` and ``vmap`` NaN goes into the totals, and into the scores made
            of them.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import purepruning as pp
    >>> params = {"fc": jnp.array([[1.0, -2.0], [3.0, 1.0]])}
    >>> layer = pp.make_layer(params, "fc", "Linear", out_axes=1, in_axes=0)
    >>> config = pp.resolve([{"op_types": ["Linear"]}], [layer], granularity="output_channel")
    >>> stats = init(params, config, keep=["squares", "grouped", "signed"])
    >>> grads = jax.grad(lambda p: jnp.sum(p["fc"]))(params)
    >>> stats = update(stats, params, grads, config)
    >>> [total["fc"].high.tolist() for total in stats[1:]]
    [[[10.0, 5.0]], [[16.0, 1.0]], [[4.0, -1.0]]]
    """
    where = "gradients.update"
    check_config(where, config)
    instance(stats, GradientStats, f"{where}: stats", "what gradients.init returned")
    check_totals(where, stats)
    weights, slopes = flatten(params).leaves, gradient_leaves(grads)
    both = {
        layer.name: (
            _weight(where, "params", layer, weights),
            _weight(where, "gradients", layer, slopes),
        )
        for layer in config.layers
    }
    for weight, slope in both.values():
        if not has_values(weight) or is_torch(weight) != is_torch(slope):
            raise TypeError(
                f"{where}: params and gradients must be arrays of one framework, got "
                f"{shown(weight)} and {shown(slope)}"
            )
    shapes = {layer.name: shape(layer, config.granularity) for layer in config.layers}
    keep = tuple(kind for kind in KEPT if getattr(stats, kind))
    if shapes and not keep:
        raise ValueError(f"{where}: the statistics were made for no layers")
    for kind in keep:
        match(where, getattr(stats, kind), shapes)
    refuse_non_finite(where, "a weight or gradient", both)
    grids = {
        x.name: None if _is_single(x, config.granularity) else grid(x, config.granularity)
        for x in config.layers
    }

    def added(totals: dict[str, dict[str, CompensatedSum]], both: dict[str, Any]) -> dict[str, Any]:
        new: dict[str, dict[str, CompensatedSum]] = {kind: {} for kind in keep}
        for name, (weight, slope) in both.items():
            of_layer = compiled(weight, _terms, "g", "keep")
            terms = of_layer(weight, slope, g=grids[name], keep=keep)
            for kind, term in zip(keep, terms, strict=True):
                new[kind][name] = add(totals[kind][name], term)
        return new

    both = {name: tuple(map(stop_gradient, pair)) for name, pair in both.items()}
    old = {kind: {name: getattr(stats, kind)[name] for name in both} for kind in keep}
    weights = {name: weight for name, (weight, _) in both.items()}
    for name, weight in weights.items():
        if is_sharded(weight):
            both[name], grids[name] = _of_shards(where, name, both[name], grids[name])
    new = by_numpy(added, jax.tree.map(local, old), both)
    for kind in keep:
        for name, weight in weights.items():
            if grids[name] is None:
                new[kind][name] = CompensatedSum(*(of_shard(x, weight) for x in new[kind][name]))
    kept = {kind: getattr(stats, kind) | new.get(kind, {}) for kind in KEPT}
    return GradientStats(count(stats.steps, 1), **kept)


def merge(a: GradientStats, b: GradientStats) -> GradientStats:
    """Returns the statistics of what both have seen.

    Exact for steps; associative and commutative for sums too, up to their 47 bits. Where each
    device or process has statistics of its own gradients, adding them leaf by leaf merges them all:
    ``jax.lax.psum(stats, axis)``, or ``torch.distributed.all_reduce`` of every tensor.

    Raises:
        ValueError: they keep different things, or are of different layers or units.
    """
    return merged("gradients", GradientStats, a, b)


def _of_shards(
    where: str, name: str, both: tuple[Any, Any], g: Grid | None
) -> tuple[tuple[Any, Any], Grid | None]:
    """Returns this process's shards of a weight and its gradient, and how they divide into units.

    Blocks, and channels of some grouped layers, need both whole.
    """
    weight, slope = both
    if g is not None and g.is_split:
        return (whole(weight), whole(slope)), g
    box = box_of(weight)
    if not is_sharded(slope):
        raise TypeError(
            f"{where}: the weight of layer {name!r} lies over processes (a DTensor), and its "
            "gradient does not; give the gradients that the parameters have (.grad)"
        )
    mine = local(weight), local_as(weight, slope)
    if g is None:
        return mine, None
    inside = tuple(a // 2 for a in g.inside if a % 2 == 0)
    sizes = tuple(max(n, 1) if a in inside else n for a, n in enumerate(box.sizes))
    if sizes != box.sizes:  # a shard of nothing adds zeros to units of others
        mine = tuple(namespace(x).zeros(sizes, dtype=x.dtype, device=x.device) for x in mine)
    return mine, dataclasses.replace(g, across=Across(box, inside))


def shape(layer: Layer, granularity: Granularity) -> tuple[int, ...]:
    """Returns the shape of the totals of a layer: by weight if those are the units, or by unit."""
    if _is_single(layer, granularity):
        return layer.shape
    g = grid(layer, granularity)
    return g.n_stacked, g.n_units


def _is_single(layer: Layer, granularity: Granularity) -> bool:
    """Whether every unit is a single weight."""
    if isinstance(granularity, NM):
        return True
    g = grid(layer, granularity)
    return g.n_stacked * g.n_units == math.prod(layer.shape)


def _terms(weight: Any, slope: Any, *, g: Grid | None, keep: tuple[Kept, ...]) -> tuple[Any, ...]:
    """Returns what one step adds to each of the totals kept."""
    xp = namespace(weight)
    weight, slope = (xp.astype(stop_gradient(x), xp.float32) for x in (weight, slope))
    term = _rounded(slope * weight)
    result = []
    for kind in keep:
        if kind == "squares":
            square = _rounded(term * term)
            result.append(square if g is None else fold(xp, square, g, exact_sum))
        else:
            total = term if g is None else fold(xp, term, g, exact_sum)
            result.append(total if kind == "signed" else _rounded(total * total))
    return tuple(result)


def _rounded(product: Any) -> Any:
    """Returns a product that compilers do not fuse with the addition that follows.

    Fused, it would be rounded once rather than twice: differently under ``jit`` and without.
    """
    return namespace(product).where(product == 0, 0.0, product)


def _weight(where: str, what: str, layer: Layer, leaves: Mapping[str, Any]) -> Any:
    """Returns the leaf of a layer's weight, checked."""
    x = weight_of(where, what, layer, leaves)
    where = f"{where}: layer {layer.name!r}"
    if what != "params" and not has_values(x):
        raise TypeError(f"{where}: {layer.weight!r} must be an array in {what}, got {shown(x)}")
    if not namespace(x).isdtype(x.dtype, "real floating"):
        raise TypeError(f"{where}: {layer.weight!r} must be floating in {what}, got {shown(x)}")
    return x
