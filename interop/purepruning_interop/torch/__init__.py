"""The adapter for PyTorch."""

from purepruning_interop.torch.layers import layers
from purepruning_interop.torch.training import apply_, keep_pruned, masked_call

__all__ = ["layers", "apply_", "keep_pruned", "masked_call"]
