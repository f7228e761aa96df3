"""Masks from scores that come from anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from purepruning.arguments import missing, shown
from purepruning.arrays import (
    array_like,
    has_values,
    is_array,
    is_torch,
    namespace,
    stop_gradient,
)
from purepruning.config.config import Config
from purepruning.exact_sum import exact_sum
from purepruning.granularity import NM, Granularity, Grid, fold, grid
from purepruning.layers import Layer
from purepruning.selection.criterion import Criterion, by_name
from purepruning.selection.prune import prune
from purepruning.trees import flatten
from purepruning.types import Masks, Params, Scores


def prune_scores(scores: Scores, params: Params, config: Config) -> Masks:
    """Returns the masks that prune the units of lowest score, as :func:`purepruning.prune` does.

    Args:
        scores: for every layer of the config an array of numbers, larger is more important: a tree
            like ``params``, of which other leaves play no part, or a dict by layer name. An array
            of the weight's shape scores single weights; channels and blocks then score the exact
            sum of theirs. Channels and blocks may also have a score each: ``(units,)``, or one axis
            for each axis of the weight that they and stacked layers lie along, in the order of the
            weight's axes with those of stacked layers first.
        params: the parameters, of which shapes and framework matter.
        config: the resolved rules. With a coupling, scores of coupled channels are added;
            see also :func:`purepruning.prune_units`.

    Raises:
        KeyError: a layer has no scores.
        ValueError: scores have a shape that is none of these; scores of single weights are
            missing where such are pruned; or one is NaN.
        TypeError: scores are no array of real numbers, or of torch where the parameters are not.

    >>> import jax.numpy as jnp
    >>> import purepruning as pp
    >>> params = {"fc": jnp.array([[1.0, -2.0, 3.0], [4.0, 0.5, -1.0]])}
    >>> layers = [pp.make_layer(params, "fc", "Linear", out_axes=1, in_axes=0)]
    >>> config = pp.resolve(0.5, layers)
    >>> prune_scores({"fc": -params["fc"]}, params, config)["fc"].astype(int).tolist()
    [[0, 1, 0], [0, 1, 1]]
    >>> config = pp.resolve(0.4, layers, granularity="output_channel")
    >>> prune_scores({"fc": jnp.array([3.0, 1.0, 2.0])}, params, config)["fc"].tolist()
    [[True, False, True]]
    """
    given = {}
    if isinstance(config, Config):  # prune says what is wrong
        given = _by_layer(scores, flatten(params).leaves, config)
    return prune(_GIVEN, params, given, config)


def _by_layer(scores: Any, weights: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """Returns the scores by layer name, checked, on the device of the weights."""
    leaves = flatten(scores).leaves
    found = {}
    for layer in config.layers:
        path = next((p for p in (layer.weight, *layer.names) if p in leaves), None)
        where = f"prune_scores: layer {layer.name!r}"
        if path is None:
            message = f"{where}: scores have neither {layer.weight!r} nor the layer's name"
            raise KeyError(missing(message, layer.weight, leaves))
        x = array_like(weights.get(layer.weight), leaves[path])
        if not is_array(x) or not has_values(x):
            raise TypeError(f"{where}: scores must be an array, got {shown(x)}")
        if is_torch(x) and not is_torch(weights.get(layer.weight)):
            raise TypeError(f"{where}: scores are a torch tensor, and the weight is none")
        if not namespace(x).isdtype(x.dtype, ("real floating", "integral")):
            raise TypeError(f"{where}: scores must be real numbers, got {x.dtype}")
        _check_shape(where, layer, tuple(x.shape), config.granularity)
        found[layer.name] = stop_gradient(x)
    return found


def _check_shape(
    where: str, layer: Layer, shape: tuple[int, ...], granularity: Granularity
) -> None:
    wanted = [layer.shape]
    if granularity != "element" and not isinstance(granularity, NM):
        g = grid(layer, granularity)
        wanted += [tuple(g.split[a] for a in (*g.stack, *g.units)), (g.n_stacked, g.n_units)]
        if g.n_stacked == 1:
            wanted.append((g.n_units,))
    if shape not in wanted:
        shapes = " or ".join(map(str, dict.fromkeys(wanted)))
        raise ValueError(
            f"{where}: for granularity {granularity!r} scores must have shape {shapes}, got {shape}"
        )


def _element(weight: Any, layer_stats: Any) -> Any:
    return layer_stats


def _unit(weight: Any, layer_stats: Any, g: Grid) -> Any:
    xp = namespace(layer_stats)
    if tuple(layer_stats.shape) != tuple(weight.shape):
        return xp.reshape(layer_stats, (g.n_stacked, g.n_units))
    return fold(xp, xp.astype(layer_stats, xp.float32), g, exact_sum)


_GIVEN = Criterion(
    "prune_scores", element=_element, channel=_unit, block=_unit, of=by_name, on_shards=True
)
