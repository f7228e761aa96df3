"""The layer table of a torch module."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
import torch.fx
from torch.nn.utils import parametrize

from purepruning.layers import Layer, Window
from purepruning_interop._table import Owner, Param, Weight, out_in, per_channel, rows, window
from purepruning_interop.torch.program import check


def layers(model: torch.nn.Module, /, *inputs: Any, **kwargs: Any) -> tuple[Layer, ...]:
    """Returns the layer table of ``model``: one row per weight, in the order of its modules.

    Paths are the keys of ``dict(model.named_parameters())``, names those of
    ``model.named_modules()``. A module reached in several ways, and a parameter that several
    modules hold (``head.weight is embedding.weight``), are one row; the further names are aliases.
    A module of several weights (an LSTM) has one row for each, named ``lstm.weight_ih_l0``, with
    ``lstm`` as alias. Nothing is computed; the model may be on the meta device.

    Where ``torch.nn.utils.parametrizations`` or ``torch.nn.utils.prune`` compute the weight from
    one raw parameter, the row is of that one (``conv.parametrizations.weight.original``,
    ``conv.weight_orig``), with the axes of the weight. Where there are several (``weight_norm``),
    each is a parameter without known axes.

    Experts that ``transformers`` stacks in one parameter are a row for each of its matrices
    (``mlp.experts.down_proj``), of stacked layers: each expert is pruned as a layer of its own.

    A floating-point parameter of two axes or more in a module of another class is a row without
    output and input axes, of the class's name as type, under its own dotted name with the module's
    as alias. What a known class holds besides its weight and bias is such a row with an empty type
    and no alias. Of fewer axes, and norms without a weight, are no rows. The weight of a module
    that is itself the root goes by the name of the parameter (``"weight"``).

    A graph that :func:`shrink` made has the rows of the module that it was made of, with the sizes
    that are left.

    Args:
        model: the module.
        *inputs, **kwargs: have no effect, for nothing is called; they are here so that the
            arguments of :func:`couple` can be passed.

    Raises:
        TypeError: ``model`` is no ``torch.nn.Module``.
        ValueError: a lazy module has not seen its first input.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3, groups=2), torch.nn.BatchNorm2d(8))
    >>> for layer in layers(model):
    ...     print(layer.name, layer.type, layer.weight, layer.out_axes, layer.in_axes, layer.groups)
    0 Conv2d 0.weight (0,) (1,) 2
    1 BatchNorm2d 1.weight (0,) () 1
    """
    check("layers(model)", model)
    if isinstance(model, torch.fx.GraphModule) and TABLE in model.meta:
        return _of_graph(model)
    names: dict[torch.nn.Module, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        names[module].append(name)
    paths = {parameter: path for path, parameter in model.named_parameters()}
    for parameter, path in paths.items():
        if isinstance(parameter, torch.nn.parameter.UninitializedParameter):
            layer = path.rpartition(".")[0]
            raise ValueError(
                f"layers(model): layer {layer!r} ({type(model.get_submodule(layer)).__name__}) has "
                f"no shape yet; call the model once, so that {path!r} is initialised"
            )

    owners = []
    for module, dotted in names.items():
        params = _params(module, paths)
        if params:
            class_name = parametrize.type_before_parametrizations(module).__name__
            weights, others = _weights(module)
            owners.append(Owner(tuple(dotted), class_name, params, weights, others))
    floats = {
        path: tuple(parameter.shape)
        for parameter, path in paths.items()
        if parameter.is_floating_point() or parameter.is_complex()
    }
    return rows(owners, floats)


#: Where a graph keeps the table of the module that it was made of.
TABLE = "purepruning.layers"


def remember(graph: torch.fx.GraphModule, table: tuple[Layer, ...]) -> None:
    """Notes in a graph what its parameters are the weights of; copies have it too."""
    graph.meta[TABLE] = table


def _of_graph(graph: torch.fx.GraphModule) -> tuple[Layer, ...]:
    shapes = {name: tuple(p.shape) for name, p in graph.named_parameters()}
    return tuple(_resized(x, shapes[x.weight]) for x in graph.meta[TABLE] if x.weight in shapes)


def _resized(layer: Layer, shape: tuple[int, ...]) -> Layer:
    """Returns the row of a weight of another size; what is depthwise stays so."""
    groups = layer.groups
    if groups > 1 and len(layer.out_axes) == 1 and groups == layer.shape[layer.out_axes[0]]:
        groups = shape[layer.out_axes[0]]
    return dataclasses.replace(layer, shape=shape, groups=groups)


def _params(module: torch.nn.Module, paths: Mapping[torch.nn.Parameter, str]) -> dict[str, Param]:
    """Returns the parameters of a module by the name its class knows them under."""
    own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
    if isinstance(module, parametrize.ParametrizationList):
        own.pop("original", None)  # the module around knows what it is
    own = {name.removesuffix("_orig"): p for name, p in own.items()}
    if parametrize.is_parametrized(module):
        for name, raw in module.get_submodule("parametrizations").named_children():
            if isinstance(original := getattr(raw, "original", None), torch.nn.Parameter):
                own[name] = original
    return {name: Param(paths[p], tuple(p.shape)) for name, p in own.items() if p in paths}


def _weights(module: torch.nn.Module) -> tuple[tuple[Weight, ...], tuple[str, ...]]:
    """Returns the weights a module's class defines, and its parameters that are no weight's."""
    nn = torch.nn
    match module:
        case nn.Linear():
            weight = out_in("weight", "Linear", (None, None), bias="bias")
        case nn.modules.conv._ConvTransposeNd():
            # (in, out / groups, *taps): what is stored per group is the output side
            rank = len(module.kernel_size)
            sizes = (None,) * (2 + rank)
            type_ = f"ConvTranspose{rank}d"
            weight = Weight("weight", type_, sizes, (1,), (0,), (), module.groups, "out", "bias")
        case nn.modules.conv._ConvNd():
            rank = len(module.kernel_size)
            sizes = (None,) * (2 + rank)
            weight = out_in("weight", f"Conv{rank}d", sizes, bias="bias", groups=module.groups)
            weight = weight._replace(window=_window(module))
        case nn.Bilinear():
            weight = Weight("weight", "Bilinear", (None,) * 3, (0,), (1, 2), bias="bias")
        case nn.Embedding() | nn.EmbeddingBag():
            type_ = "Embedding" if isinstance(module, nn.Embedding) else "EmbeddingBag"
            weight = Weight("weight", type_, (None, None), out_axes=(1,), in_axes=(0,))
        case nn.PReLU():
            weight = per_channel("weight", "PReLU", (None,), output=1)
        case nn.modules.batchnorm._NormBase():
            type_ = _norm_type(module)
            # A batch norm takes batches only; an instance norm may be called without one.
            instance = {f"InstanceNorm{d}d": -1 - d for d in (1, 2, 3)}
            axis = instance.get(type_, 1)
            weight = per_channel("weight", type_, (None,), bias="bias", output=axis)
        case nn.LayerNorm() | nn.RMSNorm():
            type_ = "LayerNorm" if isinstance(module, nn.LayerNorm) else "RMSNorm"
            sizes = (None,) * len(module.normalized_shape)
            weight = per_channel("weight", type_, sizes, bias="bias")
        case nn.GroupNorm():
            weight = per_channel("weight", "GroupNorm", (None,), bias="bias", output=1)
        case nn.MultiheadAttention():
            whole = out_in(
                "in_proj_weight", "MultiheadAttention", (None, None), bias="in_proj_bias"
            )
            parts = [
                out_in(f"{part}_proj_weight", "MultiheadAttention", (None, None)) for part in "qkv"
            ]
            return (whole, *parts), ("in_proj_bias", "bias_k", "bias_v")
        case nn.RNNBase() | nn.RNNCellBase():
            return _recurrent(module), ()
        case _ if isinstance(getattr(module, "is_transposed", None), bool):
            return _experts(module), ()
        case _:
            return (), ()
    return (weight,), ("bias",)


def _experts(module: Any) -> tuple[Weight, ...]:
    """Returns the matrices of experts that are stacked in one parameter each, expert by expert.

    As the experts of ``transformers`` are since version 5, which say of themselves whether they
    are stored ``(experts, out, in)`` or, transposed, ``(experts, in, out)``.
    """
    out, in_ = ((2,), (1,)) if module.is_transposed else ((1,), (2,))
    stacked = (name for name, x in module.named_parameters(recurse=False) if name.endswith("proj"))
    return tuple(
        Weight(name, "Linear", (None,) * 3, out, in_, batch_axes=(0,), bias=f"{name}_bias")
        for name in stacked
    )


def _window(module: Any) -> Window | None:
    """Returns how a convolution moves; None where it pads with something else than zeros."""
    if module.padding_mode != "zeros":
        return None
    padding: Any = module.padding
    if padding == "same":  # of strides 1; what is odd goes behind
        totals = [d * (k - 1) for k, d in zip(module.kernel_size, module.dilation, strict=True)]
        padding = [(total // 2, total - total // 2) for total in totals]
    elif padding == "valid":
        padding = "VALID"
    return window(len(module.kernel_size), module.stride, padding, module.dilation)


def _norm_type(module: torch.nn.Module) -> str:
    """Returns the type of a batch or instance norm; the rank is known where a class states it."""
    classes = [c.__name__.removeprefix("Lazy") for c in type(module).__mro__]
    ranked = [c for c in classes if c[:-2] in ("BatchNorm", "InstanceNorm")]
    instance = isinstance(module, torch.nn.modules.instancenorm._InstanceNorm)
    return ranked[0] if ranked else "InstanceNorm" if instance else "BatchNorm"


def _recurrent(module: torch.nn.Module) -> tuple[Weight, ...]:
    kinds = {
        "LSTM": torch.nn.LSTM | torch.nn.LSTMCell,
        "GRU": torch.nn.GRU | torch.nn.GRUCell,
    }
    type_ = next((name for name, kind in kinds.items() if isinstance(module, kind)), "RNN")
    names = [name for name, _ in module.named_parameters(recurse=False)]
    return tuple(
        out_in(name, type_, (None, None), bias=name.replace("weight", "bias"))
        for name in names
        if name.startswith("weight_")
    )
