"""The operators and private names of torch that this adapter uses, checked when it is imported.

A torch without one of them is refused at once, rather than in the middle of a model: operators
change their overloads, and private names their place, from one version to the next.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

import torch

from purepruning.versions import RANGES

_OPERATORS = """
    _to_copy.default add.Scalar add.Tensor batch_norm.default bernoulli.p bernoulli_.float
    cat.default constant_pad_nd.default
    conv1d.default conv2d.default conv3d.default copy_.default detach.default detach_.default
    div.Scalar dropout.default dropout_.default expand.default gelu.default group_norm.default
    hardswish.default hardswish_.default hardtanh.default hardtanh_.default index_select.default
    layer_norm.default mul.Tensor neg.default new_full.default permute.default relu.default
    relu6.default relu6_.default relu_.default reshape.default reshape_as.default roll.default
    rsqrt.default select_scatter.default sigmoid.default sigmoid_.default silu.default
    silu_.default slice.Tensor slice_scatter.default split_with_sizes.default sqrt.default
    squeeze.dims sub.Tensor sum.dim_IntList sym_size.int tanh.default tanh_.default transpose.int
    unsqueeze.default
"""

#: Below ``torch``. Operators that only have a rule are not here: such a rule is never asked.
NAMES = (
    "Tensor._base",
    "Tensor._is_view",
    "_C.DisableTorchFunction",
    "_C.DispatchKey.CompositeImplicitAutograd",
    "_decomp.decomposition_table",
    "compiler._is_compiling_flag",
    "compiler._is_exporting_flag",
    "_ops.HigherOrderOperator",
    "_ops.OpOverload",
    "fx.graph._PyTreeCodeGen",
    "fx.graph._PyTreeInfo",
    "nn.modules.batchnorm._NormBase",
    "nn.modules.conv._ConvNd",
    "nn.modules.conv._ConvTransposeNd",
    "nn.modules.instancenorm._InstanceNorm",
    "sparse.SparseSemiStructuredTensorCUTLASS._DTYPE_SHAPE_CONSTRAINTS",
    "sparse._semi_structured_conversions.sparse_semi_structured_from_dense_cutlass",
    "utils._python_dispatch.TorchDispatchMode",
    "utils._python_dispatch._disable_current_modes",
    "utils._pytree._broadcast_to_and_flatten",
    "utils._pytree.tree_flatten",
    "utils._pytree.tree_leaves",
    "utils._pytree.tree_map",
    "utils._pytree.tree_unflatten",
    *(f"ops.aten.{name}" for name in _OPERATORS.split()),
)


def check(names: Iterable[str]) -> None:
    """Checks that torch has these names.

    Args:
        names: dotted, below ``torch``; of an operator with its overload.

    Raises:
        ImportError: it lacks some.
    """
    missing = [f"torch.{name}" for name in names if not _exists(name.split("."))]
    if missing:
        raise ImportError(
            f"purepruning_interop.torch needs {' and '.join(missing)}, which torch "
            f"{torch.__version__} does not have; run: "
            f"pip install 'torch=={RANGES['torch'].newest}.*'"
        )


def _exists(parts: list[str]) -> bool:
    found: Any = torch
    for i, part in enumerate(parts):
        try:
            found = getattr(found, part)
        except AttributeError:
            try:  # a module that nobody has imported yet
                found = importlib.import_module(".".join(["torch", *parts[: i + 1]]))
            except ImportError:
                return False
    return True
