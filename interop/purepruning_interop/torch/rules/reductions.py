"""How atoms flow through reductions, running sums and windows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from purepruning.coupling import reductions, shapes
from purepruning.coupling.removed_values import UNKNOWN
from purepruning.coupling.value import Value
from purepruning_interop.torch.program import Op, numel
from purepruning_interop.torch.rules.elementwise import elementwise, number
from purepruning_interop.torch.walk import Walk, rules_of


# Reductions.
def dims_of(op: Op, ndim: int, key: str = "dim") -> list[int]:
    """Returns the axes an operation goes over; all where it names none."""
    dims = op.args.get(key)
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return list(range(ndim))
    return [d % ndim for d in (dims if isinstance(dims, (list, tuple)) else [dims])] if ndim else []


def kept_dims(s: Walk, value: Value, axes: Sequence[int], keep: Any, ndim: int) -> Value:
    """Returns a reduced value with its axes back as axes of size 1, if ``keep``."""
    if not keep:
        return value
    rest = iter(range(value.ndim))
    return shapes.select_axes(
        s.flow, value, [None if a in set(axes) else next(rest) for a in range(ndim)]
    )


def _sum(s: Walk, op: Op) -> list[Value] | None:
    value = s.value(op.args["self"])
    axes = dims_of(op, value.ndim)
    total = reductions.reduce_sum(s.flow, value, axes, s.where("sum"))
    return [kept_dims(s, total, axes, op.args.get("keepdim"), value.ndim)]


def _mean(s: Walk, op: Op) -> list[Value] | None:
    value = s.value(op.args["self"])
    axes = dims_of(op, value.ndim)
    mean = mean_over(s, value, axes, "")
    return [kept_dims(s, mean, axes, op.args.get("keepdim"), value.ndim)]


def mean_over(s: Walk, value: Value, axes: Sequence[int], part: str, fewer: int = 0) -> Value:
    """Returns the mean over some axes."""
    total = reductions.reduce_sum(s.flow, value, axes, s.where(f"{part}sum"))
    n = numel([value.shape[a] for a in axes])
    if n:
        reductions.scaled_sum(s.flow, total, n - fewer, s.where(f"{part}mean"))
    return dataclasses.replace(total, summed=None)


def moments(
    s: Walk, value: Value, axes: Sequence[int], fewer: int = 0, part: str = ""
) -> tuple[Value, Value, Value]:
    """Returns mean, variance and what is left after the mean is taken off, all axes kept."""
    mean = kept_dims(s, mean_over(s, value, axes, f"{part}mean "), axes, True, value.ndim)
    centred = s.flow.elementwise("sub", [value, mean], value.shape)
    squares = s.flow.elementwise("square", [centred], value.shape)
    variance = mean_over(s, squares, axes, f"{part}variance ", fewer)
    return mean, kept_dims(s, variance, axes, True, value.ndim), centred


def _var(s: Walk, op: Op) -> list[Value] | None:
    value = s.value(op.args["self"])
    axes = dims_of(op, value.ndim)
    correction = op.args.get("correction")
    if "unbiased" in op.args:
        correction = int(op.args["unbiased"])
    correction = 1 if correction is None else correction
    if not isinstance(correction, int):
        return None
    mean, variance, _ = moments(s, value, axes, correction)
    if "std" in op.name:
        variance = number(s, math.sqrt, variance, "sqrt")
    found = [variance, mean] if "mean" in op.name else [variance]
    if not op.args.get("keepdim"):
        found = [
            shapes.select_axes(s.flow, v, [a for a in range(v.ndim) if a not in axes])
            for v in found
        ]
    return found


def _vector_norm(s: Walk, op: Op) -> list[Value] | None:
    value = s.value(op.args["self"])
    order = op.args.get("ord", op.args.get("p"))
    axes = dims_of(op, value.ndim)
    if order is None:
        order = 2
    if not isinstance(order, (int, float)) or order <= 0 or math.isinf(order):
        return None
    for a in axes:  # zeros add nothing; anything else stays
        keep_unless_zero(s, value, a, "in a norm, and not zero where it is masked")
    total = reductions.reduce_sum(s.flow, value, axes, s.where("sum"))
    root = number(s, lambda x: 0.0 if x == 0 else math.nan, total, "root")
    return [kept_dims(s, root, axes, op.args.get("keepdim"), value.ndim)]


def keep_unless_zero(s: Walk, value: Value, axis: int, reason: str) -> None:
    """Keeps the positions of an axis that do not hold zero where they are masked."""
    x = s.flow.atoms.resolve(value.axes[axis])
    if x is not None:
        at_removed = np.broadcast_to(
            np.atleast_1d(np.asarray(value.at_removed[axis], float)), (len(x),)
        )
        if (at_removed != 0.0).any():
            s.flow.atoms.keep(x[at_removed != 0.0], reason)


def _reduce_whole(what: str) -> Callable[[Walk, Op], list[Value] | None]:
    def rule(s: Walk, op: Op) -> list[Value] | None:
        if "other" in op.args:  # the maximum of two tensors
            return elementwise(s, op)
        value = s.value(op.args["self"])
        axes = dims_of(op, value.ndim)
        found = reductions.reduce_whole(s.flow, value, axes, what)
        found = kept_dims(s, found, axes, op.args.get("keepdim"), value.ndim)
        return [found] + [unknown(found)] * (len(op.outputs) - 1)

    return rule


def unknown(value: Value) -> Value:
    """Returns a value with nothing known at removed positions."""
    return dataclasses.replace(value, at_removed=(UNKNOWN,) * value.ndim, known=None, summed=None)


def _running_sum(s: Walk, op: Op) -> list[Value] | None:
    value = s.value(op.args["self"])
    if not value.ndim:
        return [value]
    return [reductions.running_sum(s.flow, value, op.args["dim"] % value.ndim, s.where())]


def _along(what: str, key: str = "dim", linear: bool = True) -> Callable[..., list[Value] | None]:
    def rule(s: Walk, op: Op) -> list[Value] | None:
        value = s.value(op.args["self"])
        axis = op.args.get(key)
        axes = [] if not value.ndim else [(-1 if axis is None else axis) % value.ndim]
        return _along_whole(s, op, value, axes, what, linear)

    return rule


def _within(rank: int | None, what: str, linear: bool = True) -> Callable[..., list[Value] | None]:
    """A rule for what happens within the last axes, position by position of the others."""

    def rule(s: Walk, op: Op) -> list[Value] | None:
        value = s.value(op.args["self"] if "self" in op.args else op.args["input"])
        k = rank if rank is not None else value.ndim - 2
        axes = list(range(value.ndim - k, value.ndim))
        return _along_whole(s, op, value, axes, what, linear)

    return rule


def _along_whole(
    s: Walk, op: Op, value: Value, axes: list[int], what: str, linear: bool
) -> list[Value]:
    """Returns the results of what mixes positions of some axes; zeros stay zeros if linear."""
    found = []
    for i in range(len(op.outputs)):
        one = reductions.along_whole(s.flow, value, axes, s.shape(op, i), what)
        found.append(one if linear and i == 0 else unknown(one))
    return found


RULES = rules_of(
    (_sum, "sum"),
    (_mean, "mean"),
    (_var, "var std var_mean std_mean"),
    (_vector_norm, "linalg_vector_norm norm"),
    (_reduce_whole("a maximum over it"), "amax max"),
    (_reduce_whole("a minimum over it"), "amin min"),
    (_reduce_whole("a product over it"), "prod"),
    (_reduce_whole("any over it"), "any all"),
    (_reduce_whole("an index of the greatest"), "argmax argmin"),
    (_reduce_whole("a sum of exponentials over it"), "logsumexp"),
    (_reduce_whole("a median over it"), "median nanmedian mode"),
    (_running_sum, "cumsum"),
    (
        _along("a softmax over it", linear=False),
        "softmax _softmax log_softmax _log_softmax _safe_softmax softmin",
    ),
    (_along("a running product", linear=False), "cumprod cummax cummin logcumsumexp"),
    (_along("a difference"), "diff"),
    (_along("a sort", linear=False), "sort topk argsort kthvalue"),
    *(
        (
            _within(rank, "a window"),
            f"max_pool{rank}d max_pool{rank}d_with_indices avg_pool{rank}d "
            f"adaptive_avg_pool{rank}d _adaptive_avg_pool{rank}d adaptive_max_pool{rank}d",
        )
        for rank in (1, 2, 3)
    ),
    (
        _within(None, "a resized axis"),
        "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d "
        "upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d _upsample_nearest_exact1d "
        "_upsample_nearest_exact2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa",
    ),
    (_within(2, "a triangle"), "tril triu"),
)
