"""What the masked model holds at removed positions, as nodes, for statistics that run over them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx

from purepruning.coupling.removal import WITHOUT, axis_before
from purepruning.coupling.value import Value
from purepruning_interop.torch.emit.emitter import Emitter
from purepruning_interop.torch.emit.graph_module import aten
from purepruning_interop.torch.program import Op, Var


def at_removed(e: Emitter, value: Value, axis: int, aval: Any, number: int | None) -> fx.Node:
    """Returns what the masked model holds at removed positions of an axis.

    The node has all axes of the tensor, or broadcasts to them; along ``axis`` it has one position
    for each removed one, or a single one for all of them.

    Args:
        e: the emission.
        value, axis: what is known of the tensor, and the axis.
        aval: its dtype.
        number: the tensor; None for one that is no tensor of the program, whose removed positions
            hold numbers.

    Raises:
        NotImplementedError: it cannot be computed again.
    """
    kept = e.s.kept(value.axes[axis])
    assert kept is not None
    gone = np.setdiff1d(np.arange(value.shape[axis]), kept)
    known = np.atleast_1d(np.asarray(value.at_removed[axis], float))
    known = known if len(known) == 1 else known[gone]
    if np.isfinite(known).all():
        shape = [1] * value.ndim
        shape[axis] = len(known)
        return e.constant(torch.as_tensor(known.reshape(shape)).to(aval.dtype))
    assert number is not None
    op = e.makers[number]
    source = op.tensors[0]
    old = e.value(source)
    if op.name in _MOVED:
        order = _order_of(op, old)
        if order is None:
            raise NotImplementedError(f"no value at removed positions through {op.name}; {WITHOUT}")
        return e.call(aten.permute.default, _of(e, source, order[axis]), order)
    if op.name in ("expand", "expand_as", "broadcast_to", "copy"):
        return _spread(e, op, value, axis)
    if op.name in _RESHAPES:
        return _reshaped(e, source, value, axis)
    return _elementwise(e, op, value, axis)


def _of(e: Emitter, x: Var, axis: int) -> fx.Node:
    return at_removed(e, e.value(x), axis, e.program.avals[x.number], x.number)


def _reshaped(e: Emitter, source: Var, value: Value, axis: int) -> fx.Node:
    old = e.value(source)
    place = axis_before(old.shape, value.shape, axis)
    whole = [-1 if d == place else e.size(source.number, d) for d in range(old.ndim)]
    full = e.call(aten.expand.default, _of(e, source, place), whole)
    shape: list[Any] = list(e.s.shape(value))
    shape[axis] = -1
    return e.call(aten.reshape.default, full, shape)


def _spread(e: Emitter, op: Op, value: Value, axis: int) -> fx.Node:
    source = op.args["src"] if op.name == "copy" else op.args["self"]
    old = e.value(source)
    lead = value.ndim - old.ndim
    a = axis - lead
    part = e.node(source.number) if a < 0 or old.shape[a] == 1 else _of(e, source, a)
    for _ in range(lead):
        part = e.call(aten.unsqueeze.default, part, 0)
    return part


def _elementwise(e: Emitter, op: Op, value: Value, axis: int) -> fx.Node:
    changes = {}
    for key, x in op.args.items():
        if not isinstance(x, Var):
            continue
        mine = e.value(x)
        a = axis - (value.ndim - mine.ndim)
        alike = a < 0 or mine.shape[a] == 1 or mine.axes[a] is None
        changes[key] = e.node(x.number) if alike else _of(e, x, a)
    return e.as_is(op, **changes)


_MOVED = {"permute", "transpose", "t", "movedim", "swapaxes", "mT", "numpy_T"}


_RESHAPES = {
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as",
    "reshape_as",
}  # fmt: skip


def _order_of(op: Op, old: Value) -> list[int] | None:
    """Returns which axis of the operand each axis is."""
    n = old.ndim
    if op.name == "permute":
        return [d % n for d in op.args["dims"]]
    order = list(range(n))
    if op.name == "transpose":
        a, b = op.args["dim0"] % n, op.args["dim1"] % n
    elif op.name in ("t", "mT", "numpy_T") and n == 2:
        a, b = 0, 1
    else:
        return None
    order[a], order[b] = order[b], order[a]
    return order
