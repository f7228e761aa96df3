"""Network slimming: channels whose normalisation scale is small matter little."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from purepruning.arguments import instance, missing, scalar, shown
from purepruning.arrays import by_numpy, has_values, is_array, namespace
from purepruning.config.config import Config, check_config
from purepruning.granularity import any_of, fold, grid, spread
from purepruning.layers import Layer, Layers
from purepruning.pruners import magnitude
from purepruning.selection.criterion import Criterion
from purepruning.selection.prune import prune
from purepruning.stats.checks import watched
from purepruning.trees import flatten
from purepruning.types import Array, Masks, Params


def slim(
    params: Params, stats: None, config: Config, *, feeds: Mapping[str, Layer] | None = None
) -> Masks:
    r"""Returns masks that prune the channels of smallest normalisation scale.

    $$s_c = |\gamma_c|$$

    For configs of norms (``"op_types": ["BatchNorm2d"]``), of elements or output channels; the
    paper ranks all layers together, ``scope="global"``. With ``stats=None``. A channel's bias is
    pruned with its scale, so that the channel is zero from there on.

    Train with :func:`slim_penalty` first. Liu et al. 2017, arXiv:1708.06519; NNI's Slim pruner up
    to 2.10, whose default is global too. NNI 3.0 ranks separate factors that it trains with an Adam
    of its own, and leaves the bias of pruned channels in place.

    Args:
        params: the parameters.
        stats: None.
        config: the resolved rules.
        feeds: by name of a norm, the layer (a row of the layer table) whose output it scales; those
            layers lose the same output channels, and their biases with ``bias="follow"``.

    Raises:
        ValueError: a layer of the config is no norm, or a layer named in ``feeds`` is pruned twice
            or has not the channels of its norm.
        KeyError: ``feeds`` names what the config does not prune; a norm without a scale is in no
            layer table. See also :func:`purepruning.prune` for the form of the masks, ties, NaN
            and errors.

    >>> import jax.numpy as jnp
    >>> import purepruning as pp
    >>> params = {"norm": jnp.array([0.5, -0.1, 2.0]), "conv": jnp.ones((3, 3, 4, 3))}
    >>> norm = pp.make_layer(params, "norm", "BatchNorm2d", out_axes=0)
    >>> conv = pp.make_layer(params, "conv", "Conv2d", out_axes=3, in_axes=2)
    >>> rules = [{"sparsity": 0.4, "op_types": ["BatchNorm2d"]}]
    >>> config = pp.resolve(rules, [norm, conv], scope="global", granularity="output_channel")
    >>> masks = slim(params, None, config, feeds={"norm": conv})
    >>> masks["norm"].tolist(), masks["conv"].shape, masks["conv"].reshape(-1).tolist()
    ([True, False, True], (1, 1, 1, 3), [True, False, True])
    """
    check_config("slim", config)
    _refuse_others("slim", config.layers)
    tree, feeds = flatten(params), {} if feeds is None else feeds
    instance(feeds, Mapping, "slim: feeds", "a mapping from names of norms to layers")
    pairs = _pairs(config, feeds, tree.leaves)
    masks = prune(_SLIM, params, stats, config)
    if not pairs:
        return masks
    found = flatten(masks).leaves

    def fed(masks: dict[str, Any]) -> dict[str, Any]:
        more = {}
        for norm, layer in pairs:
            xp, keep = namespace(masks[norm.weight]), _kept(norm, masks[norm.weight])
            more[layer.weight] = spread(xp, keep, grid(layer, "output_channel"))
            if config.bias == "follow" and layer.bias is not None:
                more[layer.bias] = xp.reshape(keep, tuple(tree.leaves[layer.bias].shape))
        return more

    return tree.rebuild(found | by_numpy(fed, found))


def slim_penalty(params: Params, layers: Config | Layers, *, scale: float = 1e-4) -> Array:
    r"""Returns the sparsity penalty of network slimming, a float32 scalar to add to the loss.

    $$\lambda \sum_l \sum_c |\gamma_{l,c}|$$

    The derivative at zero is zero, so that pruned scales stay there. The default of ``scale`` is
    the paper's, Liu et al. 2017, arXiv:1708.06519, and NNI 2.10's; NNI 3.0 takes the mean over
    layers.

    Args:
        params: the parameters.
        layers: norms: rows of the layer table, or a config, which stands for those that it prunes.
        scale: λ.

    Raises:
        ValueError: a layer is no norm.
        KeyError: a layer's scale is not in ``params``.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import purepruning as pp
    >>> params = {"norm": jnp.array([0.5, -0.25, 0.0])}
    >>> norm = pp.make_layer(params, "norm", "BatchNorm2d", out_axes=0)
    >>> value, grad = jax.value_and_grad(slim_penalty)(params, [norm], scale=4.0)
    >>> float(value), grad["norm"].tolist()
    (3.0, [4.0, -4.0, 0.0])
    """
    table, leaves = watched("slim_penalty", layers), flatten(params).leaves
    scale = scalar(scale, "slim_penalty: scale", zero=True, like=next(iter(leaves.values()), 0))
    _refuse_others("slim_penalty", table)
    scales = [_weight("slim_penalty", layer, leaves) for layer in table]
    for layer, x in zip(table, scales, strict=True):
        if not has_values(x):
            raise TypeError(f"slim_penalty: {layer.weight!r} has no values in params, only a shape")
    return by_numpy(_penalty, scales, scale)


def _penalty(scales: list[Any], scale: Any) -> Any:
    total: Any = 0.0
    for x in scales:
        xp = namespace(x)
        x = xp.astype(x, xp.float32)
        # |x|, but with derivative 0 at 0 in every framework.
        total = total + xp.sum(x * xp.sign(x))
    return scale * total


def _kept(norm: Layer, mask: Any) -> Any:
    """Returns which channels a norm keeps, ``(stacked, channels)``."""
    xp = namespace(mask)
    whole = xp.broadcast_to(mask, norm.shape)
    return fold(xp, whole, grid(norm, "output_channel"), any_of)


def _refuse_others(where: str, layers: Layers) -> None:
    for layer in layers:
        if "Norm" not in layer.type or layer.in_axes or not layer.out_axes:
            raise ValueError(
                f"{where} ranks the scales of norms, and layer {layer.name!r} is of type "
                f"{layer.type!r}; prune it by slim(..., feeds=...) where it feeds a norm"
            )


def _pairs(
    config: Config, feeds: Mapping[str, Layer], leaves: Mapping[str, Any]
) -> list[tuple[Layer, Layer]]:
    """Returns norms with the layers that feed them, checked."""
    norms = {layer.name: layer for layer in config.layers}
    pairs: list[tuple[Layer, Layer]] = []
    for name, layer in feeds.items():
        if name not in norms:
            message = f"slim: feeds names {name!r}, but no norm of that name with a scale is pruned"
            raise KeyError(missing(message, name, norms))
        instance(layer, Layer, f"slim: feeds[{name!r}]", "a row of the layer table")
        if any(layer.weight == other.weight for _, other in pairs):
            raise ValueError(f"slim: feeds names layer {layer.name!r} for two norms")
        norm = norms[name]
        _weight("slim", layer, leaves)
        if config.bias == "follow" and layer.bias is not None:
            _leaf("slim", layer, layer.bias, leaves)
        sizes = [
            (math.prod(x.shape[a] for a in x.stack_axes), x.out_channels) for x in (norm, layer)
        ]
        if not layer.out_axes or sizes[0] != sizes[1]:
            raise ValueError(
                f"slim: layer {layer.name!r} has {layer.out_channels} output channels, and cannot "
                f"feed {name!r}, which has {norm.out_channels}"
            )
        pairs.append((norm, layer))
    return pairs


def _leaf(where: str, layer: Layer, path: str, leaves: Mapping[str, Any]) -> Any:
    if path not in leaves:
        raise KeyError(
            missing(f"{where}: layer {layer.name!r}: params have no {path!r}", path, leaves)
        )
    return leaves[path]


def _weight(where: str, layer: Layer, leaves: Mapping[str, Any]) -> Any:
    """Returns the weight of a layer, checked against its row."""
    x = _leaf(where, layer, layer.weight, leaves)
    if not is_array(x) or tuple(x.shape) != layer.shape:
        raise ValueError(
            f"{where}: layer {layer.name!r}: {layer.weight!r} must be an array of shape "
            f"{layer.shape} in params, as in the layer table, got {shown(x)}"
        )
    if not namespace(x).isdtype(x.dtype, "real floating"):
        raise TypeError(
            f"{where}: layer {layer.name!r}: {layer.weight!r} must be floating, got {x.dtype}"
        )
    return x


_SLIM = Criterion("slim", element=magnitude.element, channel=magnitude.l1, on_shards=True)
