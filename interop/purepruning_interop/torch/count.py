"""Parameters, multiply-adds and activation bytes of a torch module, layer by layer."""

from __future__ import annotations

import math
from typing import Any

import torch

from purepruning.coupling.cost import LayerCost, ModelCost
from purepruning.coupling.flow import Flow
from purepruning_interop.torch.couple import trace
from purepruning_interop.torch.program import Op, Program, check_whole, leaf_names


def count(model: torch.nn.Module, /, *inputs: Any, **kwargs: Any) -> ModelCost:
    """Returns parameters, multiply-adds and activation bytes of ``model(*inputs, **kwargs)``.

    Products of two activations (attention scores) count as well,
    under the name of their module. Buffers are no parameters; a parameter under several names
    counts once.

    Args:
        model, *inputs, **kwargs: as for :func:`couple`.

    Raises:
        TypeError, ValueError: as for :func:`couple`.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Linear(8, 2))
    >>> found = count(model, torch.ones(5, 3))
    >>> found.params, found.macs, [(x.name, x.macs) for x in found.layers]
    (50, 200, [('0', 120), ('1', 80)])
    """
    check_whole("count(model, *inputs)", model)
    flow = Flow()
    program = trace(model, inputs, kwargs, flow).program
    products: dict[str, list[int]] = {}
    for (index, _), product in flow.contractions.items():
        op = program.ops[index]
        name = _layer(product.weights[0]) if product.weights else op.scope or op.name
        row = products.setdefault(name, [0, 0])
        row[0] += _product(product.sizes)
        row[1] += _product(_output(op, program))
    sizes: dict[str, int] = {}
    names = leaf_names(model)
    for path, parameter in model.named_parameters():
        name = _layer(names.get(path, path))
        sizes[name] = sizes.get(name, 0) + parameter.numel()
    order = [*products, *(name for name in sizes if name not in products)]
    return ModelCost(tuple(LayerCost(n, sizes.get(n, 0), *products.get(n, [0, 0])) for n in order))


def _product(sizes: Any) -> int:
    return math.prod(n for n in sizes if isinstance(n, int))


def _output(op: Op, program: Program) -> tuple[Any, ...]:
    aval = program.avals[next(n for n in op.outputs if n is not None)]
    return (*aval.shape, aval.dtype.itemsize)


def _layer(path: str) -> str:
    return path.rpartition(".")[0] or path
