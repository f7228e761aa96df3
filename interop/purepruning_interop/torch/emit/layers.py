"""Layers with smaller sizes: convolutions, normalisations, statistics, attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from purepruning_interop.torch.emit.emitter import Emitter
from purepruning_interop.torch.emit.graph_module import aten
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
    if all(e.s.kept(value.axes[a]) is None for a in axes):
        return None
    if e.norms == "kept":
        return e.as_is(op, normalized_shape=list(e.shape(x.number)[-k:]))
    aval = e.program.avals[x.number]
    if op.name.endswith("rms_norm"):
        n = e.count(value, axes, e.sizes(x.number))
        node = e.small(x)
        masked, axis, gone = e.masked_over(value, axes, aval, x.number)
        square = None if masked is None else e.call(aten.mul.Tensor, masked, masked)
        squares = e.call(aten.mul.Tensor, node, node)
        total = e.total(squares, square, axes, axis, gone, e.sizes(x.number))
        variance = e.call(aten.div.Scalar, total, n)
        eps = op.args["eps"]
        eps = torch.finfo(aval.dtype).eps if eps is None else eps
        found = _normalised(e, node, variance, eps)
        return [_scaled(e, found, op.args["weight"], None)]
    _, variance, centred = e.moments(e.small(x), value, axes, 0, aval, x.number, e.sizes(x.number))
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
    count = split.shape[1] if groups is None else len(groups)
    if groups is None and positions is None:
        return None
    if positions is None or e.norms == "kept":
        return e.as_is(op, num_groups=count)
    ndim = len(e.shape(x.number))
    sizes = e.sizes(x.number)
    shape = [sizes[0], count, len(positions), *sizes[2:]]
    node = e.call(aten.reshape.default, e.small(x), shape)
    _, variance, centred = e.moments(
        node, split, list(range(2, split.ndim)), 0, e.program.avals[x.number], None, shape
    )
    found = _normalised(e, centred, variance, op.args["eps"])
    found = e.call(aten.reshape.default, found, [sizes[0], count * len(positions), *sizes[2:]])
    return [_scaled(e, found, op.args["weight"], op.args["bias"], ndim - 2)]


def _batch_norm(e: Emitter, op: Op) -> Any:
    x = op.args["input"]
    value = e.value(x)
    own = op.args.get("use_input_stats", op.args.get("training", False))
    if not own and op.args.get("running_mean") is not None:
        return None
    axes = [a for a in range(value.ndim) if a > 1 or (a == 0 and op.name != "instance_norm")]
    if all(e.s.kept(value.axes[a]) is None for a in axes) or e.norms == "kept":
        return None
    _, variance, centred = e.moments(
        e.small(x), value, axes, 0, e.program.avals[x.number], x.number, e.sizes(x.number)
    )
    found = _normalised(e, centred, variance, op.args["eps"])
    return [_scaled(e, found, op.args["weight"], op.args["bias"], value.ndim - 2)]


def _mean(e: Emitter, op: Op) -> Any:
    x = op.args["self"]
    value = e.value(x)
    axes = dims_of(op, value.ndim)
    if e.norms == "kept" or all(e.s.kept(value.axes[a]) is None for a in axes):
        return None
    masked, axis, gone = e.masked_over(value, axes, e.program.avals[x.number], x.number)
    if op.name == "sum" and masked is None:
        return None
    keep = bool(op.args.get("keepdim"))
    sizes = e.sizes(x.number)
    total = e.total(e.small(x), masked, axes, axis, gone, sizes, keep)
    if op.name == "mean":
        total = e.call(aten.div.Scalar, total, e.count(value, axes, sizes))
    dtype = op.args.get("dtype")
    return total if dtype is None else e.call(aten._to_copy.default, total, dtype=dtype)


def _var(e: Emitter, op: Op) -> Any:
    x = op.args["self"]
    value = e.value(x)
    axes = dims_of(op, value.ndim)
    if e.norms == "kept" or all(e.s.kept(value.axes[a]) is None for a in axes):
        return None
    correction = int(op.args["unbiased"]) if "unbiased" in op.args else op.args.get("correction")
    mean, variance, _ = e.moments(
        e.small(x),
        value,
        axes,
        1 if correction is None else correction,
        e.program.avals[x.number],
        x.number,
        e.sizes(x.number),
    )
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
