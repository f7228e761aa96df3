"""Batch norms of a torch module that can be folded into the layers in front of them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from purepruning.layers import Layer
from purepruning.quantize import BatchNorm
from purepruning_interop.torch.layers import layers
from purepruning_interop.torch.program import Op, Program, Var, check
from purepruning_interop.torch.rules.table import known_operators
from purepruning_interop.torch.tracing.trace import program_of

_FOLDED = ("linear", "conv1d", "conv2d", "conv3d")
_TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")


def batch_norms(model: torch.nn.Module, /, *inputs: Any, **kwargs: Any) -> tuple[BatchNorm, ...]:
    """Returns a row for every batch norm that alone reads what a linear layer or convolution makes.

    For :func:`purepruning.quantize.fold_batch_norms`. They are read off the operations that the
    module calls in eval mode, as by :func:`couple`, so that functional ones count too. Layers and
    norms that are called several times, or share a parameter with another, are left out, and so
    are weights that are computed (parametrizations), and norms without running statistics. Paths
    are names in the state dict.

    Args:
        model: any module whose control flow does not depend on data.
        *inputs, **kwargs: example inputs, as for the module.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: the module cannot be exported; the message names the line.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    >>> [(norm.layer.name, norm.name) for norm in batch_norms(model, torch.ones(2, 3))]
    [('0', '1')]
    """
    check("batch_norms(model, *inputs)", model)
    program = program_of(model, inputs, kwargs, known_operators())
    reads = Counter(v.number for op in program.ops for v in op.tensors)
    reads.update(v.number for v in program.outputs if isinstance(v, Var))
    reads.update(program.mutations)
    made_by = {number: op for op in program.ops for number in op.outputs if number is not None}
    rows = {row.weight: row for row in layers(model)}
    found = []
    for op in program.ops:
        source = made_by.get(op.args["input"].number) if op.name == "batch_norm" else None
        norm = None if source is None else _row(program, op, source, rows)
        if norm is not None and source is not None and all(reads[n] == 1 for n in _own(op, source)):
            found.append(norm)
    return tuple(found)


def _own(norm: Op, source: Op) -> list[int]:
    """Returns the numbers of the tensors that nothing else may read."""
    read = [v.number for v in norm.tensors]
    return [*read, *(v.number for v in source.tensors if v != source.args["input"])]


def _row(program: Program, op: Op, source: Op, rows: dict[str, Layer]) -> BatchNorm | None:
    """Returns the row of a norm behind an operation; None where that is no layer, or a sum of it.

    The channels of a norm are the second axis.
    """
    if source.name not in (*_FOLDED, *_TRANSPOSED) or op.args["training"]:
        return None

    def path(key: str, of: Op = op) -> str | None:
        given = of.args.get(key)
        return program.leaves.get(given.number) if isinstance(given, Var) else None

    mean, variance, layer = (
        path("running_mean"),
        path("running_var"),
        rows.get(path("weight", source) or ""),
    )
    if mean is None or variance is None or layer is None or layer.bias != path("bias", source):
        return None
    for key in ("weight", "bias"):
        if op.args[key] is not None and path(key) is None:  # computed
            return None
    shape = program.avals[op.args["input"].number].shape
    channels = layer.shape[1 if source.name in _TRANSPOSED else 0]
    if shape[1] != channels or (source.name == "linear" and len(shape) != 2):
        return None
    name = mean.rpartition(".")[0]
    return BatchNorm(name, layer, path("weight"), path("bias"), mean, variance, op.args["eps"])
