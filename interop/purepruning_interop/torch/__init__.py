"""The adapter for PyTorch."""

from purepruning_interop.torch.capture import capture
from purepruning_interop.torch.layers import layers

__all__ = ["layers", "capture"]
