"""The adapter for Keras: the layer table of a model."""

from __future__ import annotations

import math
from typing import Any

import keras

from purepruning.layers import Layer, Window
from purepruning_interop._table import (
    Owner,
    Param,
    Shape,
    Weight,
    einsum,
    float_shapes,
    in_out,
    per_channel,
    ranked,
    rows,
    window,
)
from purepruning_interop.keras.walk import Held, check, walk


def layers(model: Any, /, *inputs: Any, **kwargs: Any) -> tuple[Layer, ...]:
    """Returns the layer table of ``model``: one row per weight, in the order of its layers.

    Names are those of the layers, joined by ``/`` where layers hold layers
    (``"encoder/attention/query"``); that of the model itself is left out, and ``layer.path`` is an
    alias. A separable convolution and a recurrent cell are two rows, named by their weights
    (``"sep/pointwise_kernel"``), with the layer's name as alias. A layer that is shared is one row,
    whose further names are aliases.

    Projections of attention are ``"Linear"``, their axes factored into heads; depthwise
    convolutions are convolutions with as many groups as channels; cells are ``"RNN"``, ``"GRU"``
    and ``"LSTM"``. A trainable variable of two axes or more in a layer of another class is a row
    without output and input axes, of the class's name as type; what a known class holds besides its
    weight and bias is such a row with an empty type. Norms without a scale are no rows.

    Args:
        model: a built model or layer: functional, sequential or subclassed.
        *inputs, **kwargs: have no effect, for nothing is called; they are here so that the
            arguments of :func:`couple` can be passed.

    Raises:
        TypeError: ``model`` is no Keras layer.
        ValueError: it has no variables yet, since it has not been called.

    >>> import keras
    >>> model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3, name="conv1")])
    >>> (layer,) = layers(model)
    >>> layer.name, layer.type, layer.weight, layer.out_axes, layer.in_axes
    ('conv1', 'Conv2d', 'conv1/kernel', (3,), (2,))
    """
    check("layers(model)", model)
    found = walk(model)
    cells = {
        id(held.layer.cell): held.names
        for held in found
        if isinstance(held.layer, keras.layers.RNN) and hasattr(held.layer, "cell")
    }
    names = {name for held in found for name in held.names}
    owners = []
    floats: dict[str, Shape] = {}
    for held in found:
        shapes = {v.name: tuple(v.shape) for v in held.variables.values()}
        weights, others = _weights(held.layer, shapes)
        params = {v.name: Param(path, tuple(v.shape)) for path, v in held.variables.items()}
        floats |= float_shapes({path: held.variables[path].value for path in held.trained})
        aliases = (*cells.get(id(held.layer), ()), *_paths(held, names))
        owned = (*held.names, *(a for a in aliases if a not in held.names))
        class_name = type(held.layer).__name__
        owners.append(Owner(owned, class_name, params, weights, others, joint="/"))
    return rows(owners, floats)


def _paths(held: Held, names: set[str]) -> tuple[str, ...]:
    """Returns ``layer.path`` of a layer, unless another one goes by that name."""
    path = held.layer.path
    return (path,) if held.names[0] and path and path not in names else ()


def _weights(layer: Any, shapes: dict[str, Shape]) -> tuple[tuple[Weight, ...], tuple[str, ...]]:
    """Returns the weights a layer's class defines, and its variables that are no weight's."""
    of = keras.layers
    kernel = shapes.get("kernel", ())
    weight: Weight
    match layer:
        case of.Dense():
            weight = in_out("kernel", "Linear", kernel, bias="bias")
        case of.EinsumDense():
            weight = _einsum(layer, kernel, shapes.get("bias"))
        case of.Conv1D() | of.Conv2D() | of.Conv3D():
            rank = len(kernel) - 2
            weight = in_out("kernel", f"Conv{rank}d", kernel, bias="bias", groups=layer.groups)
            weight = _placed(weight, layer)._replace(window=_window(layer, kernel))
        case of.Conv1DTranspose() | of.Conv2DTranspose() | of.Conv3DTranspose():
            type_ = f"ConvTranspose{len(kernel) - 2}d"
            weight = _placed(in_out("kernel", type_, kernel, bias="bias", swapped=True), layer)
        case of.DepthwiseConv1D() | of.DepthwiseConv2D():
            weight = _depthwise("kernel", layer, kernel)._replace(bias="bias")
        case of.SeparableConv1D() | of.SeparableConv2D():
            depthwise = _depthwise("depthwise_kernel", layer, shapes["depthwise_kernel"])
            shape = shapes["pointwise_kernel"]
            type_ = f"Conv{len(shape) - 2}d"
            pointwise = in_out("pointwise_kernel", type_, shape, bias="bias")
            ones = (1,) * (len(shape) - 2)
            pointwise = _placed(pointwise, layer)._replace(window=Window(ones, "VALID", ones))
            return (depthwise._replace(output=()), pointwise), ("bias",)
        case of.Embedding():
            weight = in_out("embeddings", "Embedding", shapes["embeddings"])
        case of.SimpleRNNCell():
            return _cell("RNN", shapes), ("bias",)
        case of.GRUCell():
            return _cell("GRU", shapes), ("bias",)
        case of.LSTMCell():
            return _cell("LSTM", shapes), ("bias",)
        case of.BatchNormalization():
            ndim = getattr(layer.input_spec, "ndim", None)
            type_ = ranked("BatchNorm", ndim)
            weight = _norm("gamma", type_, shapes, layer.axis)
        case of.LayerNormalization():
            weight = _norm("gamma", "LayerNorm", shapes, layer.axis)
        case of.GroupNormalization():
            weight = _norm("gamma", "GroupNorm", shapes, layer.axis)
        case of.RMSNormalization():
            weight = _norm("scale", "RMSNorm", shapes, layer.axis)
        case of.PReLU():
            weight = per_channel("alpha", "PReLU", shapes["alpha"])
        case _:
            return (), ()
    return (weight,), ("bias", "beta")


def _placed(weight: Weight, layer: Any) -> Weight:
    """Returns a convolution's weight with the place of its channels in the output."""
    first = layer.data_format == "channels_first"
    return weight._replace(output=(1 - len(weight.sizes) if first else -1,))


def _depthwise(param: str, layer: Any, shape: Shape) -> Weight:
    """Returns the kernel ``(*taps, channels, multiplier)`` of a depthwise convolution.

    A channel has as many outputs as the multiplier says, which are neighbours in the output. So
    there both axes index outputs, in one axis of it; of a single output each, the last axis is that
    of the one input that it has.
    """
    rank = len(shape) - 2
    channels, many = rank, shape[-1] > 1
    weight = Weight(
        param,
        f"Conv{rank}d",
        shape,
        out_axes=(channels, channels + 1) if many else (channels,),
        in_axes=() if many else (channels + 1,),
        groups=shape[-2],
        output=(),
        window=_window(layer, shape),
    )
    return weight if many else _placed(weight, layer)


def _window(layer: Any, kernel: Shape) -> Window | None:
    rank = len(kernel) - 2
    padding: Any = layer.padding.upper()
    apart = layer.dilation_rate
    if padding == "CAUSAL":
        step = apart if isinstance(apart, int) else apart[0]
        padding = ((step * (kernel[0] - 1), 0),)
    return window(rank, layer.strides, padding, apart)


def _einsum(layer: Any, kernel: Shape, bias: Shape | None) -> Weight:
    weight = einsum("kernel", layer.equation, kernel, bias="bias")
    size = math.prod(kernel[a] for a in (*weight.batch_axes, *weight.out_axes))
    # One that belongs to some axes of the output only, or to others too, is no weight's.
    return weight if bias and math.prod(bias) == size else weight._replace(bias=None)


def _cell(type_: str, shapes: dict[str, Shape]) -> tuple[Weight, ...]:
    """Returns the two kernels of a recurrent cell; a GRU may have two biases in one variable."""
    kernel = shapes["kernel"]
    bias = "bias" if shapes.get("bias") == kernel[-1:] else None
    return (
        in_out("kernel", type_, kernel, bias=bias)._replace(output=()),
        in_out("recurrent_kernel", type_, shapes["recurrent_kernel"])._replace(output=()),
    )


def _norm(param: str, type_: str, shapes: dict[str, Shape], axis: Any) -> Weight:
    axes = tuple(axis) if isinstance(axis, list | tuple) else axis
    return per_channel(param, type_, shapes.get(param, ()), bias="beta", output=axes)
