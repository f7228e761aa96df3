"""Keras models with fewer channels, built anew from the configurations of their layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import keras

import purepruning as pp
from purepruning_interop._native import Change
from purepruning_interop.keras.variables import variables
from purepruning_interop.keras.walk import walk


class Unfit(Exception):
    """Why there is no smaller model of these classes."""


def smaller(model: Any, plan: pp.Plan) -> Any:
    """Returns a model of the same layers, named alike, with the sizes that a plan leaves.

    Its weights are drawn anew; the model stays as it is.

    Raises:
        Unfit: the model's class names no sizes in its configuration, or refuses these.
    """
    names = {id(held.layer): held.names[0] for held in walk(model)}

    def made(layer: Any) -> Any:
        if id(layer) not in names:  # an operation such as x + y, which has no weights
            return layer.from_config(layer.get_config())
        if isinstance(layer, keras.layers.Lambda):  # a function, which no configuration holds
            return layer
        return type(layer).from_config(_config(layer, names[id(layer)], plan))

    if not isinstance(model, keras.Sequential | keras.Model) or not _is_graph(model):
        raise Unfit(f"the configuration of {type(model).__name__} names no sizes of its layers")
    try:
        return keras.models.clone_model(model, clone_function=made, recursive=True)
    except Exception as error:  # layers check their arguments in any way
        line = f"it cannot be built: {type(error).__name__}: {error}".splitlines()[0]
        raise Unfit(line) from error


def fits(made: Any, params: Mapping[str, Any]) -> None:
    """Checks that a model has variables of these paths and shapes.

    Raises:
        Unfit: it has not.
    """
    found = {path: tuple(v.shape) for path, v in variables(made).items()}
    if found.keys() != params.keys():
        raise Unfit("its configuration gives other layers")
    for path, array in params.items():
        if found[path] != tuple(array.shape):
            raise Unfit(
                f"its configuration gives {path!r} the shape {found[path]}, not "
                f"{tuple(array.shape)}"
            )


def _is_graph(model: Any) -> bool:
    """Whether a model is made of layers that its configuration lists: sequential or functional."""
    return isinstance(model, keras.Sequential) or hasattr(model, "operations")


def _config(layer: Any, name: str, plan: pp.Plan) -> dict[str, Any]:
    """Returns the configuration of a layer with the sizes that a plan leaves."""
    config = layer.get_config()
    inside: dict[str, Any] = {"layer": getattr(layer, "layer", None)}
    if isinstance(layer, keras.layers.Bidirectional):
        inside = {"layer": layer.forward_layer, "backward_layer": layer.backward_layer}
    elif type(layer) is keras.layers.RNN:
        inside = {"cell": layer.cell}
    for key, inner in inside.items():
        if isinstance(config.get(key), dict):
            _into(config[key], inner, f"{name}/{inner.name}", plan)
    return config | _sizes(layer, name, plan)


def _into(held: dict[str, Any], layer: Any, name: str, plan: pp.Plan) -> None:
    """Writes sizes into the configuration of a layer that another's holds."""
    held.pop("build_config", None)  # sizes of inputs as they were
    for inner, cell in zip(
        getattr(layer, "cells", ()), held["config"].get("cells", ()), strict=True
    ):
        _into(cell, inner, f"{name}/{inner.name}", plan)
    held["config"] |= _sizes(layer, name, plan)


def _sizes(layer: Any, name: str, plan: pp.Plan) -> dict[str, Any]:
    change = Change(plan, f"{name}/")
    for cls in type(layer).__mro__:
        if cls.__name__ in _RULES:
            return _RULES[cls.__name__](layer, change)
    return {}


def _dense(layer: Any, c: Change) -> dict[str, Any]:
    shape = c.shape("kernel")
    return {"units": shape[-1]} if shape else {}


def _einsum(layer: Any, c: Change) -> dict[str, Any]:
    shape = c.shape("kernel")
    if shape is None:
        return {}
    letters, result = layer.equation.replace(" ", "").split(",")[1].split("->")
    sizes = dict(zip(reversed(letters), reversed(shape), strict=False))
    full = list(layer.get_config()["output_shape"])
    for i, letter in enumerate(reversed(result), start=1):
        if letter in sizes and letter != "." and i <= len(full) and full[-i] is not None:
            full[-i] = sizes[letter]
    return {"output_shape": tuple(full)}


def _conv(layer: Any, c: Change) -> dict[str, Any]:
    shape = c.shape("kernel")
    if shape is None:
        return {}
    groups = c.conv_groups("kernel", layer.groups, (-1, -2))
    return {"filters": shape[-1], "groups": groups}


def _conv_transpose(layer: Any, c: Change) -> dict[str, Any]:
    shape = c.shape("kernel")
    return {"filters": shape[-2]} if shape else {}


def _depthwise(layer: Any, c: Change) -> dict[str, Any]:
    shape = c.shape("kernel")
    return {"depth_multiplier": shape[-1]} if shape else {}


def _separable(layer: Any, c: Change) -> dict[str, Any]:
    depthwise, pointwise = c.shape("depthwise_kernel"), c.shape("pointwise_kernel")
    if depthwise is None or pointwise is None:
        return {}
    return {"depth_multiplier": depthwise[-1], "filters": pointwise[-1]}


def _embedding(layer: Any, c: Change) -> dict[str, Any]:
    shape = c.shape("embeddings")
    return {"input_dim": shape[0], "output_dim": shape[1]} if shape else {}


def _cell(layer: Any, c: Change) -> dict[str, Any]:
    shape = c.shape("recurrent_kernel")
    return {"units": shape[0]} if shape else {}


def _recurrent(layer: Any, c: Change) -> dict[str, Any]:
    shape = c.shape(f"{layer.cell.name}/recurrent_kernel")
    return {"units": shape[0]} if shape else {}


def _group_norm(layer: Any, c: Change) -> dict[str, Any]:
    name = next((n for n in ("gamma", "beta") if c.shape(n)), None)
    if name is None or layer.groups == -1:
        return {}
    return {"groups": c.groups(name, layer.groups)[0]}


def _attention(layer: Any, c: Change) -> dict[str, Any]:
    query, value, out = (c.shape(f"{n}/kernel") for n in ("query", "value", "attention_output"))
    if query is None or value is None or out is None:
        return {}
    sizes = {"num_heads": query[1], "key_dim": query[2], "value_dim": value[2]}
    return sizes | ({"output_shape": out[2:]} if layer.get_config()["output_shape"] else {})


def _grouped_attention(layer: Any, c: Change) -> dict[str, Any]:
    query, key = c.shape("query/kernel"), c.shape("key/kernel")
    if query is None or key is None:
        return {}
    return {
        "head_dim": query[2],
        "num_query_heads": query[1],
        "num_key_value_heads": key[1],
    }


_RULES: dict[str, Callable[[Any, Change], dict[str, Any]]] = {
    "Dense": _dense,
    "EinsumDense": _einsum,
    "BaseConv": _conv,
    "BaseConvTranspose": _conv_transpose,
    "BaseDepthwiseConv": _depthwise,
    "BaseSeparableConv": _separable,
    "Embedding": _embedding,
    "SimpleRNN": _recurrent,
    "GRU": _recurrent,
    "LSTM": _recurrent,
    "SimpleRNNCell": _cell,
    "GRUCell": _cell,
    "LSTMCell": _cell,
    "GroupNormalization": _group_norm,
    "MultiHeadAttention": _attention,
    "GroupedQueryAttention": _grouped_attention,
}
