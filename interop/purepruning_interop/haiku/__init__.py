"""Haiku: the layer table of a model, and the outputs of its layers."""

from purepruning.versions import require

require("dm-haiku", __name__)

from purepruning_interop.haiku.capture import capture
from purepruning_interop.haiku.layers import layers

__all__ = ["layers", "capture"]
