"""How atoms flow through normalisations."""

from __future__ import annotations

import math
from typing import Any

from purepruning.coupling import shapes
from purepruning.coupling.value import Value, whole
from purepruning_interop.torch.program import Op
from purepruning_interop.torch.rules.elementwise import along_channel, number
from purepruning_interop.torch.rules.reductions import kept_dims, mean_over, moments
from purepruning_interop.torch.walk import Walk, rules_of


# Norms.
def _scale(s: Walk, value: Value, weight: Value | None, bias: Value | None) -> Value:
    if weight is not None:
        value = s.flow.elementwise("mul", [value, weight], value.shape)
    if bias is not None:
        value = s.flow.elementwise("add", [value, bias], value.shape)
    return value


def optional(s: Walk, x: Any) -> Value | None:
    """Returns the value of an argument that may be None."""
    return None if x is None else s.value(x)


def _normalised(s: Walk, centred: Value, variance: Value, eps: float) -> Value:
    inverse = number(
        s,
        lambda v: 1 / math.sqrt(v + eps) if v + eps > 0 else math.inf,
        variance,
        "inverse deviation",
    )
    return s.flow.elementwise("mul", [centred, inverse], centred.shape)


def rest(s: Walk, op: Op, value: Value) -> list[Value]:
    """Returns the result, and what else an operation returns, of which nothing is known."""
    return [
        value,
        *(whole(()) if n is None else whole(s.program.avals[n].shape) for n in op.outputs[1:]),
    ]


def unused(s: Walk, op: Op) -> bool:
    """Whether only the first result of an operation is used."""
    rest = {n for n in op.outputs[1:] if n is not None}
    return not rest or not any(
        v.number in rest for o in s.program.ops[s.index + 1 :] for v in o.tensors
    )


def _layer_norm(s: Walk, op: Op) -> list[Value] | None:
    value = s.value(op.args["input"])
    if not unused(s, op):
        return None
    axes = list(range(value.ndim - len(op.args["normalized_shape"]), value.ndim))
    _, variance, centred = moments(s, value, axes)
    found = _normalised(s, centred, variance, op.args["eps"])
    weight, bias = (optional(s, op.args[k]) for k in ("weight", "bias"))
    return rest(s, op, _scale(s, found, weight, bias))


def _rms_norm(s: Walk, op: Op) -> list[Value] | None:
    value = s.value(op.args["input"])
    if not unused(s, op):
        return None
    axes = list(range(value.ndim - len(op.args["normalized_shape"]), value.ndim))
    squares = s.flow.elementwise("square", [value], value.shape)
    mean = kept_dims(s, mean_over(s, squares, axes, "square "), axes, True, value.ndim)
    eps = op.args["eps"]
    eps = 1e-7 if eps is None else eps
    found = _normalised(s, value, mean, eps)
    return rest(s, op, _scale(s, found, optional(s, op.args["weight"]), None))


def _group_norm(s: Walk, op: Op) -> list[Value] | None:
    value = s.value(op.args["input"])
    groups = op.args.get("num_groups", op.args.get("group"))
    if not unused(s, op) or not isinstance(groups, int):
        return None
    n, channels, *spatial = value.shape
    split = shapes.reshape(s.flow, value, (n, groups, channels // groups, *spatial))
    s.parts[s.index] = split
    _, variance, centred = moments(s, split, list(range(2, split.ndim)))
    found = shapes.reshape(s.flow, _normalised(s, centred, variance, op.args["eps"]), value.shape)
    weight, bias = (optional(s, op.args[k]) for k in ("weight", "bias"))
    scales = [v and along_channel(s, v, value.ndim, 1) for v in (weight, bias)]
    return rest(s, op, _scale(s, found, *scales))


def _batch_norm(s: Walk, op: Op) -> list[Value] | None:
    value = s.value(op.args["input"])
    if not unused(s, op):
        return None
    weight, bias, mean, variance = (
        (v := optional(s, op.args.get(k))) and along_channel(s, v, value.ndim, 1)
        for k in ("weight", "bias", "running_mean", "running_var")
    )
    own = op.args.get("use_input_stats", op.args.get("training", mean is None))
    if own or mean is None or variance is None:
        instance = op.name == "instance_norm"
        axes = [a for a in range(value.ndim) if a > 1 or (a == 0 and not instance)]
        _, variance, centred = moments(s, value, axes)
    else:
        centred = s.flow.elementwise("sub", [value, mean], value.shape)
    found = _normalised(s, centred, variance, op.args["eps"])
    return rest(s, op, _scale(s, found, weight, bias))


# Products.
def shifted(s: Walk, value: Value, bias: Any) -> Value:
    """Returns a value with a bias added, if there is one."""
    return value if bias is None else s.flow.elementwise("add", [value, s.value(bias)], value.shape)


RULES = rules_of(
    (_layer_norm, "layer_norm native_layer_norm"),
    (_rms_norm, "rms_norm _fused_rms_norm"),
    (_group_norm, "group_norm"),
    (
        _batch_norm,
        "batch_norm instance_norm _native_batch_norm_legit_no_training "
        "_native_batch_norm_legit native_batch_norm cudnn_batch_norm",
    ),
)
