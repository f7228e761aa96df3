"""Flax NNX: the layer table of a model, the outputs of its layers, coupling and shrinking."""

from purepruning.versions import require

require("flax", __name__)

from purepruning_interop.nnx.capture import capture
from purepruning_interop.nnx.layers import layers
from purepruning_interop.nnx.shrink import couple, function, shrink

__all__ = ["layers", "capture", "couple", "function", "shrink"]
