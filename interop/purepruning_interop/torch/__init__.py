"""The adapter for PyTorch."""

from purepruning_interop.torch.layers import layers

__all__ = ["layers"]
