"""Haiku: the layer table of a model, and the outputs of its layers."""

from purepruning_interop.haiku.capture import capture
from purepruning_interop.haiku.layers import layers

__all__ = ["layers", "capture"]
