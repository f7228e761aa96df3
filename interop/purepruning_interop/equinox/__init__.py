"""Equinox: layer tables, outputs of layers, coupling, shrinking and costs of a model."""

from purepruning.versions import require

require("equinox", __name__)

from purepruning_interop.equinox.batch_norms import batch_norms
from purepruning_interop.equinox.capture import activations, capture, replace
from purepruning_interop.equinox.layers import layers
from purepruning_interop.equinox.shrink import count, couple, function, rebuild, shrink

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
