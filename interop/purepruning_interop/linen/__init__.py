"""Flax Linen: the layer table of a model, and the outputs of its layers."""

from purepruning.versions import require

require("flax", __name__)

from purepruning_interop.linen.capture import capture
from purepruning_interop.linen.layers import layers

__all__ = ["layers", "capture"]
