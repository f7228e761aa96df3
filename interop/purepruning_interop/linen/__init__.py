"""Flax Linen: layer tables, outputs of layers, coupling, shrinking and costs of a model."""

from purepruning.versions import require

require("flax", __name__)

from purepruning_interop.linen.batch_norms import batch_norms
from purepruning_interop.linen.capture import activations, capture, replace
from purepruning_interop.linen.layers import layers
from purepruning_interop.linen.shrink import count, couple, function, rebuild, shrink

__all__ = [
    "layers",
    "activations",
    "capture",
    "replace",
    "batch_norms",
    "function",
    "couple",
    "count",
    "shrink",
    "rebuild",
]
