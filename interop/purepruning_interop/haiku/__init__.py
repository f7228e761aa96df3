"""Haiku: layer tables, outputs of layers, coupling, shrinking and costs of a function."""

from purepruning.versions import require

require("dm-haiku", __name__)

from purepruning_interop.haiku.batch_norms import batch_norms
from purepruning_interop.haiku.capture import activations, capture, replace
from purepruning_interop.haiku.layers import layers
from purepruning_interop.haiku.shrink import count, couple, function, rebuild, shrink

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
