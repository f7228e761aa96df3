"""How atoms flow through sums, and through what must see all positions of an axis."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from purepruning.coupling import shapes
from purepruning.coupling.atoms import Axis
from purepruning.coupling.flow import Flow
from purepruning.coupling.removed_values import UNKNOWN
from purepruning.coupling.value import (
    Summed,
    Value,
    as_line,
    is_zero,
    near,
)


def reduce_sum(flow: Flow, value: Value, axes: Sequence[int], where: Any) -> Value:
    """Returns the sum over some axes; ``where`` names the operation for the shrunk program.

    Removed positions that hold zero leave it as it is. Where they hold something that can be
    computed, the operation is a statistic, which the shrunk program corrects.
    """
    summed: list[Axis] = []
    corrected = []
    for a in axes:
        x = flow.atoms.resolve(value.axes[a])
        if x is None:
            continue
        at_removed = np.broadcast_to(as_line(value.at_removed[a]), (len(x),))
        lost = np.isnan(at_removed)
        if lost.any():
            flow.atoms.keep(x[lost], "summed, and not zero where it is masked")
            x = flow.atoms.resolve(value.axes[a])
            if x is None:
                continue
        if (at_removed[~lost] != 0.0).any():
            corrected.append(a)
        if value.origins is not None:  # of a kernel, which is normed by what it reads too
            flow.nonzero.update(value.origins[a])
        summed.append(x)
    if corrected:
        flow.statistics[where] = tuple(value.axes[a] for a in corrected)
    rest = [a for a in range(value.ndim) if a not in set(axes)]
    found = shapes.select_axes(flow, value, rest)
    at_removed_left = tuple(d if is_zero(d) else UNKNOWN for d in found.at_removed)
    lengths = tuple(value.shape[a] for a in axes)
    mark = None
    if summed and all(isinstance(n, int) for n in lengths):
        mark = Summed(math.prod(lengths), tuple(value.axes[a] for a in axes), lengths)
    return dataclasses.replace(found, at_removed=at_removed_left, summed=mark)


def scaled_sum(flow: Flow, value: Value, factor: float, where: Any) -> Summed | None:
    """Notes that a sum is divided by the number of its terms; returns what it ran over."""
    s = value.summed
    if s is None or not (near(factor, s.size) or near(factor, s.size - 1)):
        return None
    flow.means[where] = s
    return s


def reduce_whole(flow: Flow, value: Value, axes: Sequence[int], what: str) -> Value:
    """Returns a reduction that must see all positions of its axes (max, argmax, any)."""
    flow.keep(value, what, axes)
    rest = [a for a in range(value.ndim) if a not in set(axes)]
    found = shapes.select_axes(flow, value, rest)
    keeps = "max" in what or "min" in what or "average" in what
    at_removed = tuple(
        d if keeps and np.ndim(d) == 0 and d == 0.0 else UNKNOWN for d in found.at_removed
    )
    return dataclasses.replace(found, at_removed=at_removed, summed=None)


def reduce_extreme(flow: Flow, value: Value, axes: Sequence[int], what: str, sign: int) -> Value:
    """Returns a maximum (``sign`` 1) or minimum (-1) over some axes.

    Removed zeros change no maximum of what is nowhere below zero, as in the scale of a quantised
    weight. Any other must see all positions, those of activations too: a softmax follows them.
    """
    of_weights = value.origins is not None
    if value.sign != sign or not of_weights or not all(is_zero(value.at_removed[a]) for a in axes):
        return reduce_whole(flow, value, axes, what)
    rest = [a for a in range(value.ndim) if a not in set(axes)]
    found = shapes.select_axes(flow, value, rest)
    at_removed = tuple(d if is_zero(d) else UNKNOWN for d in found.at_removed)
    return dataclasses.replace(found, at_removed=at_removed, summed=None, sign=sign)


def running_sum(flow: Flow, value: Value, axis: int, where: Any) -> Value:
    """Returns cumulative sums along an axis: exact where removed positions hold zero."""
    x = flow.atoms.resolve(value.axes[axis])
    if x is not None:
        at_removed = np.broadcast_to(as_line(value.at_removed[axis]), (len(x),))
        flow.atoms.keep(x[at_removed != 0.0], "in a running sum, and not zero where it is masked")
    at_removed_out = [d if is_zero(d) else UNKNOWN for d in value.at_removed]
    at_removed_out[axis] = UNKNOWN
    return Value(value.shape, value.axes, tuple(at_removed_out), None, value.origins)


def along_whole(
    flow: Flow,
    value: Value,
    axes: Sequence[int],
    shape: Sequence[Any],
    what: str,
    zeros: bool = True,
) -> Value:
    """Returns an operation within some axes (a window, a sort), position by position of others.

    ``zeros``: whether it makes zeros of nothing but zeros, as what is linear or a maximum does.
    """
    flow.keep(value, what, axes)
    kept = set(axes)
    found = tuple(None if a in kept else value.axes[a] for a in range(value.ndim))
    zero = tuple(
        d if zeros and is_zero(d) and a not in kept else UNKNOWN
        for a, d in enumerate(value.at_removed)
    )
    return Value(tuple(shape), found, zero, None, None)
