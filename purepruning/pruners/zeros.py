"""Masks of parameters that are sparse already: the zeros of a checkpoint."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from purepruning.arrays import by_numpy, compiled, int32, is_concrete, namespace, stop_gradient
from purepruning.config.allocation import Allocation
from purepruning.config.config import Config, Pool, check_count
from purepruning.config.rules import Scope
from purepruning.granularity import NM, Grid, any_of, fold, grid, spread
from purepruning.layers import Layer
from purepruning.masks import to_numpy
from purepruning.selection.biases import with_biases
from purepruning.selection.prune import check_values, weights_of
from purepruning.trees import flatten
from purepruning.types import Masks, Params

_NAME = "masks_from_zeros"


def masks_from_zeros(params: Params, config: Config) -> Masks:
    """Returns the masks that ``params`` were pruned with before: what is zero now is pruned.

    An element is pruned if it is 0; a channel or block if all its weights are; with a coupling, a
    unit if all its channels in the config's layers are. A bias is pruned where it is 0 and all
    weights of its output channel are. So :func:`purepruning.apply_masks` changes no parameter. The
    tree is that of a pruner (:func:`purepruning.prune`).

    Sparsities in the config say what is expected: fewer zeros are an error, more are pruned too.
    Leave them out of the rules to take any zeros (``resolve([{}], layers)``). Of units that are
    ranked together (global scope) it is the sum that counts; with a coupling and global scope
    nothing is expected. N:M patterns are checked group by group. Under ``jit`` and ``vmap``, where
    values are not known, nothing is. Masks in the config play no part.

    Raises:
        KeyError, TypeError, ValueError: params and config do not fit, as in
            :func:`purepruning.prune`.
        ValueError: fewer weights or units are zero than the config says; groups of N:M have more
            weights that are not; or all units of a layer are zero, and its rule has no
            ``'allow_empty': True``.

    >>> import jax.numpy as jnp
    >>> import purepruning as pp
    >>> params = {"fc": jnp.array([[0.0, 2.0, 0.0], [0.0, 0.0, 3.0]])}
    >>> layers = [pp.make_layer(params, "fc", "Linear", name="fc", out_axes=1, in_axes=0)]
    >>> masks_from_zeros(params, pp.resolve(0.5, layers))["fc"].astype(int).tolist()
    [[0, 1, 0], [0, 0, 1]]
    >>> config = pp.resolve(0.3, layers, granularity="output_channel")
    >>> masks_from_zeros(params, config)["fc"].tolist()
    [[False, True, True]]
    """
    tree = flatten(params)
    weights = weights_of(_NAME, tree.leaves, config)
    if not weights:
        return tree.rebuild({})
    check_values(_NAME, weights)
    biases = {x.bias: tree.leaves[x.bias] for x in config.layers if x.bias in tree.leaves}

    def find(weights: dict[str, Any], biases: dict[str, Any]) -> dict[str, Any]:
        masks = with_biases(_masks(weights, config), tree, config)
        return {p: m | (biases[p] != 0) if p in biases else m for p, m in masks.items()}

    return tree.rebuild(by_numpy(find, *jax.tree.map(stop_gradient, (weights, biases))))


def _masks(weights: dict[str, Any], config: Config) -> dict[str, Any]:
    """Returns the masks of weights by path, checked against what the config expects."""
    granularity = "element" if isinstance(config.granularity, NM) else config.granularity
    grids = {x.name: grid(x, granularity) for x in config.layers}
    keeps = {x.name: _kept(weights[x.weight], grids[x.name]) for x in config.layers}
    stays = None
    if config.allocation is not None:
        keeps, stays = _coupled(keeps, config.allocation)
    if all(map(is_concrete, keeps.values())):
        _check_counts(config, {n: to_numpy(keep) for n, keep in keeps.items()}, stays, grids)
        if isinstance(config.granularity, NM):
            for layer in config.layers:
                _check_groups(layer, weights[layer.weight], config.granularity)
    return {
        x.weight: spread(namespace(keeps[x.name]), keeps[x.name], grids[x.name])
        for x in config.layers
    }


def _kept(weight: Any, g: Grid) -> Any:
    """Returns which units have a weight that is not zero, ``(stacked, units)``."""
    return compiled(weight, _not_zero, "g")(weight, g=g)


def _not_zero(weight: Any, *, g: Grid) -> Any:
    return fold(namespace(weight), weight != 0, g, any_of)


def _coupled(keeps: dict[str, Any], allocation: Allocation) -> tuple[dict[str, Any], Any]:
    """Returns which channels stay if units go whole, and by place which units stay.

    A unit goes if all channels that go with it are zero.
    """
    flat = [np.reshape(allocation.channels[name], (-1,)) for name in allocation.layers]
    widths = [allocation.channels[name].shape[1] for name in allocation.layers]
    xp, like = namespace(keeps[allocation.layers[0]]), keeps[allocation.layers[0]]
    kept = [
        xp.reshape(keeps[name], (-1,))[:, None] & xp.ones((1, width), dtype=xp.bool)
        for name, width in zip(allocation.layers, widths, strict=True)
    ]
    # How many channels of every unit stay: differences of a running sum, in the order of units.
    places = np.concatenate(flat)
    order = np.argsort(places, kind="stable")
    ends = np.searchsorted(places[order], np.arange(allocation.n_places), side="right")
    total = xp.concat([xp.reshape(x, (-1,)) for x in kept])
    running = xp.cumulative_sum(
        xp.take(xp.astype(total, xp.int32), int32(xp, order, like)), axis=0, include_initial=True
    )
    until = xp.take(running, int32(xp, ends, like))
    since = xp.take(running, int32(xp, np.concatenate([[0], ends[:-1]]), like))
    stays = (until > since) | (int32(xp, np.diff(ends, prepend=0), like) == 0)
    stays = stays | (int32(xp, np.arange(allocation.n_places), like) == 0)
    found = {}
    for name, index, width in zip(allocation.layers, flat, widths, strict=True):
        each = xp.reshape(xp.take(stays, int32(xp, index, like)), (-1, width))
        found[name] = xp.reshape(xp.all(each, axis=1), tuple(keeps[name].shape))
    return found, stays


# What the config expects.
def _check_counts(
    config: Config, keeps: dict[str, np.ndarray], stays: Any, grids: dict[str, Grid]
) -> None:
    for i, pool in enumerate(config.pools):
        for layer in pool.layers:
            if not pool.allow_empty and not keeps[layer.name].any(1).all():
                raise ValueError(
                    f"{_NAME}: all units of layer {layer.name!r} are zero; exclude it, or give its "
                    "rule 'allow_empty': True"
                )
        count = config.counts.get(pool.name)
        if count is not None:
            check_count(_NAME, pool, count)
        if count is None or np.ndim(count) or not is_concrete(count):
            continue
        if config.allocation is not None:
            if config.scope == "global":
                continue
            units = config.allocation.sets[i]
            gone = ~to_numpy(stays)[units.places].reshape(units.units.shape)
            found, spare = int(gone.sum(1).min()), 0
        else:
            found, spare = _found(pool, config.scope, keeps, grids)
        if found + spare < int(count):
            raise ValueError(
                f"{_NAME}: {pool.name!r} has {found} zeros of {pool.size}, and its sparsity says "
                f"{int(count)}; leave the sparsity out of its rule to take the zeros there are"
            )


def _found(
    pool: Pool, scope: Scope, keeps: dict[str, np.ndarray], grids: dict[str, Grid]
) -> tuple[int, int]:
    """Returns how much of a pool is zero, as its count counts, and how much less may be."""
    if scope == "layer":
        (layer,) = pool.layers
        return int((~keeps[layer.name]).sum(1).min()), 0
    costs = [np.broadcast_to(grids[x.name].cost, keeps[x.name].shape) for x in pool.layers]
    gone = (int(c[~keeps[x.name]].sum()) for c, x in zip(costs, pool.layers, strict=True))
    # A pruner stops where the next unit is too large.
    return sum(gone), max(int(cost.max()) for cost in costs) - 1


def _check_groups(layer: Layer, weight: Any, nm: NM) -> None:
    kept = to_numpy(weight != 0)
    inside = range(-len(layer.in_axes), 0)
    rows = np.moveaxis(kept, layer.in_axes, inside).reshape(-1, nm.of)
    wrong = int((rows.sum(1) > nm.keep).sum())
    if wrong:
        raise ValueError(
            f"{_NAME}: {wrong} of {len(rows)} groups of layer {layer.name!r} have more than "
            f"{nm.keep} of {nm.of} weights that are not zero; exclude it, or prune it first"
        )
