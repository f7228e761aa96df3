"""PyTorch: layer tables, outputs of layers, masked training, coupling, shrinking and costs."""

from purepruning.versions import require

require("torch", __name__)
require("array-api-compat", __name__)

from purepruning_interop.torch import internals

internals.check(internals.NAMES)

from purepruning_interop.torch.batch_norms import batch_norms
from purepruning_interop.torch.capture import activations, capture, replace
from purepruning_interop.torch.count import count
from purepruning_interop.torch.couple import couple
from purepruning_interop.torch.depth import drop_blocks
from purepruning_interop.torch.export_onnx import export_onnx
from purepruning_interop.torch.import_prune import masks_from_torch_prune
from purepruning_interop.torch.layers import layers
from purepruning_interop.torch.semi_structured import to_semi_structured
from purepruning_interop.torch.shrink import rebuild, shrink
from purepruning_interop.torch.sparse import sparse_training
from purepruning_interop.torch.stream import blocks_in_turn
from purepruning_interop.torch.training import apply_, keep_pruned, masked_call
from purepruning_interop.torch.unpickling import allow

allow()

__all__ = [
    "layers",
    "activations",
    "capture",
    "replace",
    "batch_norms",
    "apply_",
    "keep_pruned",
    "masked_call",
    "sparse_training",
    "masks_from_torch_prune",
    "couple",
    "count",
    "shrink",
    "rebuild",
    "drop_blocks",
    "blocks_in_turn",
    "export_onnx",
    "to_semi_structured",
]
