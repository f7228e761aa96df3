"""Layers with smaller sizes: convolutions, normalisations, statistics, attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from purepruning_interop.torch.emit.emitter import Emitter
from purepruning_interop.torch.emit.graph_module import aten
from purepruning_interop.torch.emit.statistics import (
    Over,
    count,
    loses_none,
    missing,
    moments,
    over,
    total,
)
from purepruning_interop.torch.program import Op, Var
from purepruning_interop.torch.rules.reductions import dims_of


def _convolution(e: Emitter, op: Op) -> Any:
    groups = op.args["groups"]
    if groups == 1:
        return None
    weight, number = op.args["weight"], op.outputs[0]
    assert number is not None
    value = e.value(weight)
    shape = e.s.shape(value)
    if value.leaf is not None:
        path, order = value.leaf
        full = e.plan.shape(path)
        shape = tuple(full[a] for a in order)
    transposed = "transpose" in op.name or op.args.get("transposed", False)
    rank = len(shape) - 2
    if transposed:
        channels = e.shape(number)[-1 - rank]
    else:
        channels = e.shape(op.args["input"].number)[-1 - rank]
    return e.as_is(op, groups=channels // shape[1])


def _layer_norm(e: Emitter, op: Op) -> Any:
    x, k = op.args["input"], len(op.args["normalized_shape"])
    value = e.value(x)
    axes = list(range(value.ndim - k, value.ndim))
    if loses_none(e, value, axes):
        return None
    if e.norms == "kept":
        return e.as_is(op, normalized_shape=list(e.shape(x.number)[-k:]))
    normed = over(e, x, axes)
    if op.name.endswith("rms_norm"):
        node, gone = normed.node, missing(e, normed)
        square = None if gone is None else e.call(aten.mul.Tensor, gone, gone)
        squares = e.call(aten.mul.Tensor, node, node)
        variance = e.call(aten.div.Scalar, total(e, normed, squares, square), count(e, normed))
        eps = op.args["eps"]
        eps = torch.finfo(normed.aval.dtype).eps if eps is None else eps
        found = _normalised(e, node, variance, eps)
        return [_scaled(e, found, op.args["weight"], None)]
    _, variance, centred = moments(e, normed)
    found = _normalised(e, centred, variance, op.args["eps"])
    return [_scaled(e, found, op.args["weight"], op.args["bias"])]


def _normalised(e: Emitter, centred: fx.Node, variance: fx.Node, eps: float) -> fx.Node:
    inverse = e.call(aten.rsqrt.default, e.call(aten.add.Scalar, variance, eps))
    return e.call(aten.mul.Tensor, centred, inverse)


def _scaled(
    e: Emitter, node: fx.Node, weight: Var | None, bias: Var | None, lift: int = 0
) -> fx.Node:
    """Returns a normalised tensor scaled and shifted; ``lift`` axes come behind the channels."""

    def lifted(x: Var) -> fx.Node:
        found = e.small(x)
        return e.call(aten.reshape.default, found, [-1] + [1] * lift) if lift else found

    if weight is not None:
        node = e.call(aten.mul.Tensor, node, lifted(weight))
    if bias is not None:
        node = e.call(aten.add.Tensor, node, lifted(bias))
    return node


def _group_norm(e: Emitter, op: Op) -> Any:
    split, x = e.found.parts[e.index], op.args["input"]
    groups, positions = e.s.kept(split.axes[1]), e.s.kept(split.axes[2])
    left = split.shape[1] if groups is None else len(groups)
    if groups is None and positions is None:
        return None
    if positions is None or e.norms == "kept":
        return e.as_is(op, num_groups=left)
    ndim = len(e.shape(x.number))
    sizes = e.sizes(x.number)
    shape = [sizes[0], left, len(positions), *sizes[2:]]
    node = e.call(aten.reshape.default, e.small(x), shape)
    aval = e.program.avals[x.number]
    grouped = Over(node, shape, split, list(range(2, split.ndim)), aval)
    _, variance, centred = moments(e, grouped)
    found = _normalised(e, centred, variance, op.args["eps"])
    found = e.call(aten.reshape.default, found, [sizes[0], left * len(positions), *sizes[2:]])
    return [_scaled(e, found, op.args["weight"], op.args["bias"], ndim - 2)]


def _batch_norm(e: Emitter, op: Op) -> Any:
    x = op.args["input"]
    value = e.value(x)
    own = op.args.get("use_input_stats", op.args.get("training", False))
    if not own and op.args.get("running_mean") is not None:
        return None
    axes = [a for a in range(value.ndim) if a > 1 or (a == 0 and op.name != "instance_norm")]
    if loses_none(e, value, axes) or e.norms == "kept":
        return None
    _, variance, centred = moments(e, over(e, x, axes))
    found = _normalised(e, centred, variance, op.args["eps"])
    return [_scaled(e, found, op.args["weight"], op.args["bias"], value.ndim - 2)]


def _mean(e: Emitter, op: Op) -> Any:
    x = op.args["self"]
    value = e.value(x)
    axes = dims_of(op, value.ndim)
    if e.norms == "kept" or loses_none(e, value, axes):
        return None
    summed = over(e, x, axes)
    gone = missing(e, summed)
    if op.name == "sum" and gone is None:
        return None
    found = total(e, summed, summed.node, gone, bool(op.args.get("keepdim")))
    if op.name == "mean":
        found = e.call(aten.div.Scalar, found, count(e, summed))
    dtype = op.args.get("dtype")
    return found if dtype is None else e.call(aten._to_copy.default, found, dtype=dtype)


def _var(e: Emitter, op: Op) -> Any:
    x = op.args["self"]
    value = e.value(x)
    axes = dims_of(op, value.ndim)
    if e.norms == "kept" or loses_none(e, value, axes):
        return None
    correction = int(op.args["unbiased"]) if "unbiased" in op.args else op.args.get("correction")
    mean, variance, _ = moments(e, over(e, x, axes), 1 if correction is None else correction)
    if "std" in op.name:
        variance = e.call(aten.sqrt.default, variance)
    found = [variance, mean] if "mean" in op.name else [variance]
    if not op.args.get("keepdim"):
        found = [e.call(aten.squeeze.dims, node, axes) for node in found]
    return found


def _attention(e: Emitter, op: Op) -> Any:
    query = e.value(op.args["query"])
    if e.s.kept(query.axes[-1]) is None or op.args.get("scale") is not None:
        return None
    return e.as_is(op, scale=query.shape[-1] ** -0.5)  # the temperature stays
