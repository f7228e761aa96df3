"""What of a program depends on constants alone, computed: indices, tables, masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from purepruning_interop.torch.program import Op, Program, Sym, Var, numel

#: Larger tensors are not computed.
LIMIT = 1 << 20


NOT_CONSTANT = frozenset(
    [
        "rand",
        "randn",
        "rand_like",
        "randn_like",
        "randint",
        "randint_like",
        "bernoulli",
        "normal",
        "multinomial",
        "randperm",
        "empty",
        "empty_like",
        "new_empty",
        "empty_strided",
        "dropout",
        "native_dropout",
    ]
)


def fold(program: Program, state: Mapping[str, torch.Tensor]) -> dict[int, np.ndarray]:
    """Returns all tensors that depend on constants alone and are small, by number.

    Buffers that hold whole numbers or truth values count as constants: they are never cut.

    Args:
        program: the program.
        state: the state dict, for those buffers.
    """
    tensors: dict[int, torch.Tensor] = {}
    for number, constant in program.constants.items():
        if _real(constant) and constant.numel() <= LIMIT:
            tensors[number] = constant
    for number, path in program.leaves.items():
        buffer = state[path]
        if _real(buffer) and not buffer.is_floating_point() and buffer.numel() <= LIMIT:
            tensors[number] = buffer.detach()
    with torch.no_grad():
        for op in program.ops:
            found = _evaluate(op, tensors, program) if _constant(op, tensors) else None
            for out, tensor in zip(op.outputs, found or (), strict=False):
                if out is not None:
                    tensors[out] = tensor
    return {n: t.detach().cpu().numpy() for n, t in tensors.items() if t.dtype in _NUMPY}


_NUMPY = {
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float32,
    torch.float64,
    torch.float16,
}


def _real(tensor: torch.Tensor) -> bool:
    return tensor.device.type != "meta" and type(tensor) in (torch.Tensor, torch.nn.Parameter)


def _constant(op: Op, tensors: Mapping[int, torch.Tensor]) -> bool:
    return (
        op.symbol is None
        and op.name not in NOT_CONSTANT
        and all(v.number in tensors for v in op.tensors)
    )


def _evaluate(op: Op, tensors: Mapping[int, torch.Tensor], program: Program) -> Any:
    for number in op.outputs:
        if number is None:
            return None
        aval = program.avals[number]
        size = numel(aval.shape)
        if size is None or size > LIMIT or any(aval.symbolic):
            return None
    leaves = pytree.tree_leaves(op.args, is_leaf=lambda x: isinstance(x, (Var, Sym)))
    if any(isinstance(x, Sym) for x in leaves):
        return None
    given = {k: _filled(v, tensors) for k, v in op.args.items()}
    try:
        found = op.target(
            *(v for k, v in given.items() if k not in op.keywords),
            **{k: v for k, v in given.items() if k in op.keywords},
        )
    except (RuntimeError, ValueError, IndexError):  # cannot run here: not known
        return None
    return [found] if op.single else list(found)


def _filled(x: Any, tensors: Mapping[int, torch.Tensor]) -> Any:
    if isinstance(x, Var):
        return tensors[x.number]
    if isinstance(x, (list, tuple)):
        return [_filled(y, tensors) for y in x]
    if isinstance(x, torch.device) and x.type == "meta":  # a model of shapes makes its tables there
        return torch.device("cpu")
    return x
