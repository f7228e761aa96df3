"""Statistics over axes that lose positions, as over all positions that there were."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import fx

from purepruning.coupling.value import Value
from purepruning_interop.torch.emit.emitter import Emitter
from purepruning_interop.torch.emit.graph_module import aten
from purepruning_interop.torch.emit.removed_values import at_removed
from purepruning_interop.torch.program import Var


class Over(NamedTuple):
    """A small tensor, and the axes that a statistic of it runs over.

    Of one of them at most, positions are gone that do not hold zero: the rules keep the others.

    Attributes:
        node, sizes: the tensor and its sizes, numbers or nodes.
        value, axes: what is known of it, and the axes.
        aval: its dtype.
        number: the tensor of the program that it is, if it is one.
    """

    node: fx.Node
    sizes: Sequence[Any]
    value: Value
    axes: Sequence[int]
    aval: Any
    number: int | None = None


def over(e: Emitter, x: Var, axes: Sequence[int]) -> Over:
    """Returns a tensor of the program with axes of it."""
    number = x.number
    aval = e.program.avals[number]
    return Over(e.node(number), e.sizes(number), e.value(x), axes, aval, number)


def loses_none(e: Emitter, value: Value, axes: Sequence[int]) -> bool:
    """Whether all positions of some axes stay."""
    return all(e.s.kept(value.axes[a]) is None for a in axes)


def count(e: Emitter, x: Over) -> Any:
    """Returns how many positions there were: a number, or a node where some axes are open."""
    n = math.prod(x.value.shape[a] for a in x.axes if not isinstance(x.sizes[a], fx.Node))
    for a in x.axes:
        if isinstance(x.sizes[a], fx.Node):
            n = e.call(operator.mul, x.sizes[a], n)
    return n


def missing(e: Emitter, x: Over) -> fx.Node | None:
    """Returns the values at removed positions; None for zeros."""
    axis = _axis(e, x)
    if axis is None or not _holds_numbers(x.value, axis):
        return None
    return at_removed(e, x.value, axis, x.aval, x.number)


def total(
    e: Emitter, x: Over, node: fx.Node, gone: fx.Node | None, keepdim: bool = True
) -> fx.Node:
    """Returns a sum over the axes, removed positions included.

    Args:
        e: the emission.
        x: the tensor.
        node: what is summed, computed from it element by element.
        gone: what that is where positions are gone; None for zeros.
        keepdim: whether the axes stay, with size 1.
    """
    found = e.call(aten.sum.dim_IntList, node, list(x.axes), keepdim)
    axis = _axis(e, x)
    if gone is None or axis is None:
        return found
    kept = e.s.kept(x.value.axes[axis])
    assert kept is not None
    whole = [x.sizes[a] if a in x.axes else -1 for a in range(len(x.sizes))]
    whole[axis] = x.value.shape[axis] - len(kept)
    spread = e.call(aten.expand.default, gone, whole)
    more = e.call(aten.sum.dim_IntList, spread, list(x.axes), keepdim)
    return e.call(aten.add.Tensor, found, more)


def moments(e: Emitter, x: Over, fewer: int = 0) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Returns mean, variance and what is left without the mean.

    ``fewer``: by how much less than the number of positions the variance is divided.
    """
    n, gone = count(e, x), missing(e, x)
    mean = e.call(aten.div.Scalar, total(e, x, x.node, gone), n)
    centred = e.call(aten.sub.Tensor, x.node, mean)
    squares = e.call(aten.mul.Tensor, centred, centred)
    away = None
    if _axis(e, x) is not None:
        off = (
            e.call(aten.neg.default, mean) if gone is None else e.call(aten.sub.Tensor, gone, mean)
        )
        away = e.call(aten.mul.Tensor, off, off)
    if fewer:
        n = n - fewer if isinstance(n, int) else e.call(operator.sub, n, fewer)
    variance = e.call(aten.div.Scalar, total(e, x, squares, away), n)
    return mean, variance, centred


def _axis(e: Emitter, x: Over) -> int | None:
    """Returns the axis that loses positions, of several the one that does not hold zero there."""
    shrinks = [a for a in x.axes if e.s.kept(x.value.axes[a]) is not None]
    return max(shrinks, key=lambda a: _holds_numbers(x.value, a), default=None)


def _holds_numbers(value: Value, axis: int) -> bool:
    return not (np.asarray(value.at_removed[axis]) == 0.0).all()
