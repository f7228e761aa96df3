"""Masks of biases: a bias stays while some weight of its output channel does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from purepruning.arrays import compiled, namespace
from purepruning.config.config import Config
from purepruning.granularity import NM, Granularity, Grid, any_of, fold, grid
from purepruning.layers import Layer
from purepruning.trees import Flat


def with_biases(masks: dict[str, Any], tree: Flat, config: Config) -> dict[str, Any]:
    """Returns the masks of all layers, by path of their weights, and those of their biases."""
    if config.bias != "follow":
        return masks
    biases = bias_masks(config.layers, masks, config.granularity)
    return masks | {
        path: namespace(mask).reshape(mask, tuple(tree.leaves[path].shape))
        for path, mask in biases.items()
    }


# Biases.
def bias_masks(
    layers: Sequence[Layer], masks: Mapping[str, Any], granularity: Granularity
) -> dict[str, Any]:
    """Returns which biases stay, flat and by path: those of channels with some weight left.

    Layers in which no channel can lose all its weights keep their biases, which are left out.
    """
    found: dict[str, Any] = {}
    for layer in layers:
        if layer.bias is None or not has_bias_mask(layer, granularity):
            continue
        mask = masks[layer.weight]
        keep = compiled(mask, _bias_mask, "g")(mask, g=grid(layer, "output_channel"))
        # A bias that layers share stays as long as one of them needs it.
        found[layer.bias] = keep if layer.bias not in found else found[layer.bias] | keep
    return found


def has_bias_mask(layer: Layer, granularity: Granularity) -> bool:
    """Whether a channel of the layer can lose all its weights, and its bias with them."""
    rows = isinstance(granularity, NM) or (granularity == "input_channel" and layer.groups == 1)
    return bool(layer.out_axes) and not rows


def _bias_mask(mask: Any, *, g: Grid) -> Any:
    xp = namespace(mask)
    return xp.reshape(fold(xp, xp.broadcast_to(mask, g.shape), g, any_of), (-1,))
