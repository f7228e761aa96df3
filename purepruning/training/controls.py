"""What a ticket is compared with: the controls that tell whether its mask, or its weights, matter.

Frankle et al. 2021, arXiv:2009.08576; Su et al. 2020, arXiv:2009.11094. The fourth control, random
masks of the same layer densities, is :func:`purepruning.random_pruning` with the same config: its
counts are those of the layers (in global scope, :func:`shuffle_masks` keeps each layer's share).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from purepruning.arguments import function
from purepruning.arrays import by_numpy, has_values, iota, is_array, namespace, replicated
from purepruning.config.config import Config, Pruner, check_config
from purepruning.granularity import NM, any_of, fold, grid, spread
from purepruning.masks import check_mask, named_masks
from purepruning.random_bits import key_words, noise, own_words
from purepruning.selection.biases import bias_masks
from purepruning.selection.keys import ordered_bits
from purepruning.trees import flatten
from purepruning.types import Masks, Params


def reinitialize(params: Params, key: Any) -> Params:
    """Returns ``params`` with the values of every array in random order.

    Of freshly initialised parameters that is another draw from the same distribution, wherever the
    values of an array are independent draws from one (all usual initialisers but orthogonal ones),
    without knowing which; a model's own ``init`` with another key does the same. The order
    depends on the key and the parameter's path, and is the same in every framework.

    Args:
        params: parameters, at initialisation.
        key: as in :func:`purepruning.random_pruning`.

    Raises:
        TypeError, ValueError: ``key`` is no random key.

    >>> import jax.numpy as jnp
    >>> reinitialize({"w": jnp.arange(6).reshape(2, 3)}, 1)["w"].tolist()
    [[0, 3, 4], [1, 2, 5]]
    """
    words, tree = key_words(key), flatten(params)
    shuffled = {}
    for path, x in tree.leaves.items():
        if not is_array(x):
            shuffled[path] = x
            continue
        if not has_values(x):
            raise TypeError(f"reinitialize: params: {path!r} has no values, only a shape")
        shuffled[path] = by_numpy(_reordered, x, own_words(words, path))
    return tree.rebuild(shuffled)


def _reordered(x: Any, words: tuple[Any, Any, int]) -> Any:
    xp = namespace(x)
    return xp.reshape(_shuffled(xp.reshape(replicated(x), (1, -1)), words), tuple(x.shape))


def shuffle_masks(masks: Masks, config: Config, key: Any) -> Masks:
    """Returns masks that prune as many units of every layer as ``masks`` do, but random ones.

    Units are those of the config; of stacked layers each keeps its number. Biases follow. The order
    depends on the key and the layer's name, and is the same in every framework.

    Args:
        masks: masks that a pruner made with ``config``.
        config: the resolved rules; its counts do not matter.
        key: as in :func:`purepruning.random_pruning`.

    Raises:
        KeyError: a layer of the config has no mask.
        ValueError: the config is of N:M, whose groups have fixed numbers; or a mask does not fit.
        TypeError, ValueError: ``key`` is no random key.

    >>> import jax.numpy as jnp
    >>> import purepruning as pp
    >>> layer = pp.Layer("fc", "Linear", "w", (1, 6), out_axes=(1,), in_axes=(0,))
    >>> config = pp.resolve([{"sparsity": 0.5, "op_types": ["Linear"]}], [layer])
    >>> masks = {"w": jnp.array([[True, True, True, False, False, False]])}
    >>> shuffle_masks(masks, config, 1)["w"].astype(int).tolist()
    [[0, 0, 1, 1, 1, 0]]
    """
    check_config("shuffle_masks", config)
    if isinstance(config.granularity, NM):
        raise ValueError(f"shuffle_masks: {config.granularity} keeps a number in every group")
    if config.allocation is not None:
        raise ValueError("shuffle_masks shuffles every layer alone, not coupled channels")
    words, tree = key_words(key), flatten(masks)
    named = named_masks(masks)
    for layer in config.layers:
        if layer.weight not in named:
            raise KeyError(f"shuffle_masks: layer {layer.name!r}: masks have no {layer.weight!r}")
        check_mask(layer.weight, named[layer.weight], layer.shape)

    def shuffled(old: dict[str, Any], words: tuple[Any, Any]) -> dict[str, Any]:
        new = {}
        for layer in config.layers:
            mask, g = replicated(old[layer.weight]), grid(layer, config.granularity)
            xp = namespace(mask)
            rows = fold(xp, xp.broadcast_to(mask, layer.shape), g, any_of)
            new[layer.weight] = spread(xp, _shuffled(rows, own_words(words, layer.name)), g)
        biases = bias_masks(config.layers, new, config.granularity)
        return new | {
            path: namespace(bias).reshape(bias, tuple(named[path].shape))
            for path, bias in biases.items()
            if path in named
        }

    return tree.rebuild(named | by_numpy(shuffled, named, words))


def invert_scores(pruner: Pruner) -> Pruner:
    """Returns the pruner that prunes the units of highest score instead of the lowest.

    >>> import jax.numpy as jnp
    >>> import purepruning as pp
    >>> params = {"w": jnp.array([[1.0, -2.0, 3.0]])}
    >>> layer = pp.make_layer(params, "w", "Linear", out_axes=1, in_axes=0)
    >>> config = pp.resolve([{"sparsity": 0.4, "op_types": ["Linear"]}], [layer])
    >>> invert_scores(pp.level)(params, None, config)["w"].tolist()
    [[True, True, False]]
    """
    function(pruner, "invert_scores: pruner", "a function (params, stats, config) -> masks")

    def inverted(params: Any, stats: Any, config: Config) -> Any:
        check_config("invert_scores", config)
        return pruner(params, stats, dataclasses.replace(config, inverted=not config.inverted))

    return inverted


def _shuffled(rows: Any, words: tuple[Any, Any, int]) -> Any:
    """Returns ``(stacked, units)`` with every row in a random order of its own."""
    xp, size = namespace(rows), math.prod(rows.shape)
    index = xp.reshape(iota(xp, size, rows), tuple(rows.shape))
    order = xp.argsort(ordered_bits(xp, noise(index, words)), axis=1, stable=True)
    return xp.take_along_axis(rows, order, axis=1)
