"""Equinox: the layer table of a model, the outputs of its layers, coupling and shrinking."""

from purepruning.versions import require

require("equinox", __name__)

from purepruning_interop.equinox.capture import capture
from purepruning_interop.equinox.layers import layers
from purepruning_interop.equinox.shrink import couple, function, shrink

__all__ = ["layers", "capture", "couple", "function", "shrink"]
