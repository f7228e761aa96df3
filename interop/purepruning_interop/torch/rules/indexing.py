"""How atoms flow through embeddings, gathers and scatters."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from purepruning.coupling import shapes
from purepruning.coupling.removed_values import UNKNOWN
from purepruning.coupling.value import Value
from purepruning_interop.torch.program import Op, Var
from purepruning_interop.torch.rules.norms import rest, unused
from purepruning_interop.torch.rules.shapes import zero
from purepruning_interop.torch.walk import Walk, rules_of


# Picking positions.
def _embedding(s: Walk, op: Op) -> list[Value] | None:
    table, indices = s.value(op.args["weight"]), s.value(op.args["indices"])
    s.flow.keep(table, "looked up by index", [0])
    s.flow.keep(indices, "coordinates")
    if table.origins is not None:
        s.flow.sinks.update(table.origins[0])
        s.flow.sources.update(table.origins[1])
    n = indices.ndim
    origins = None
    if table.origins is not None and indices.origins is not None:
        origins = (*(frozenset(),) * n, table.origins[1])
    return [
        Value(
            s.shape(op),
            (*(None,) * n, table.axes[1]),
            (*(UNKNOWN,) * n, 0.0 if zero(table.at_removed[1]) else UNKNOWN),
            None,
            origins,
        )
    ]


def _embedding_bag(s: Walk, op: Op) -> list[Value] | None:
    table = s.value(op.args["weight"])
    s.flow.keep(table, "looked up by index", [0])
    for key in ("indices", "offsets", "per_sample_weights"):
        if isinstance(op.args.get(key), Var):
            s.flow.keep(s.value(op.args[key]), "coordinates")
    if not unused(s, op):
        return None
    if table.origins is not None:
        s.flow.sinks.update(table.origins[0])
        s.flow.sources.update(table.origins[1])
    at_removed = (UNKNOWN, 0.0 if zero(table.at_removed[1]) else UNKNOWN)
    return rest(s, op, Value(s.shape(op), (None, table.axes[1]), at_removed))


def _index_select(s: Walk, op: Op) -> list[Value] | None:
    value = s.value(op.args["self"])
    axis = op.args["dim"] % value.ndim
    places = known_places(s.concrete(op.args["index"]), value.shape[axis])
    if value.axes[axis] is None:
        return [shapes.resized(s.flow, value, axis, s.shape(op)[axis])]
    if places is None or places.ndim != 1:
        s.flow.keep(value, "looked up by index", [axis])
        s.flow.keep(s.value(op.args["index"]), "coordinates")
        return [shapes.resized(s.flow, value, axis, s.shape(op)[axis])]
    return [shapes.take(s.flow, value, axis, places)]


def known_places(known: np.ndarray | None, n: Any) -> np.ndarray | None:
    """Returns positions an index means, or None where they are not known whole numbers."""
    if known is None or known.dtype.kind not in "iu" or not known.size:
        return None
    places = np.where(known < 0, known + n, known).astype(np.int64)
    return places if (places >= 0).all() and (places < n).all() else None


def index_axes(op: Op) -> list[int]:
    """Returns the axes that are indexed by tensors."""
    return [a for a, index in enumerate(op.args["indices"]) if index is not None]


def boolean(s: Walk, index: Var) -> bool:
    """Whether an index chooses by booleans: as many axes as they have become one."""
    return s.program.avals[index.number].dtype in (torch.bool, torch.uint8)


def _spread(value: Value, before: int, after: int) -> Value:
    """Returns a value between axes of size one."""
    lead, trail = (None,) * before, (None,) * after
    return Value(
        (*(1,) * before, *value.shape, *(1,) * after),
        (*lead, *value.axes, *trail),
        (*(UNKNOWN,) * before, *value.at_removed, *(UNKNOWN,) * after),
    )


def _index(s: Walk, op: Op) -> list[Value] | None:
    value = s.value(op.args["self"])
    axes, shape = index_axes(op), s.shape(op)
    indices = [op.args["indices"][a] for a in axes]
    values = [s.value(i) for i in indices]
    choosing = any(boolean(s, i) for i in indices)
    if choosing and len(indices) > 1:
        return None
    for one in values:
        s.flow.keep(one, "coordinates")
    if choosing:  # all axes that the booleans have become one
        axes = list(range(axes[0], axes[0] + values[0].ndim))
    elif len(axes) == 1:
        places = known_places(s.concrete(indices[0]), value.shape[axes[0]])
        if places is not None and places.ndim == 1 and value.axes[axes[0]] is not None:
            return [shapes.take(s.flow, value, axes[0], places)]
    s.flow.keep(value, "looked up by index", axes)
    rank = 1 if choosing else max(v.ndim for v in values)
    rest = [a for a in range(value.ndim) if a not in axes]
    together = axes == list(range(axes[0], axes[0] + len(axes)))
    place = axes[0] if together else 0
    order: list[int | None] = [*rest[:place], *[None] * rank, *rest[place:]]
    if value.origins is not None:
        s.flow.sinks.update(o for a in axes for o in value.origins[a])
        s.flow.sources.update(o for a in rest for o in value.origins[a])
    found = shapes.select_axes(s.flow, value, order)
    at_removed = tuple(
        0.0 if zero(d) and a is not None else UNKNOWN
        for d, a in zip(found.at_removed, order, strict=True)
    )
    return [dataclasses.replace(found, shape=shape, at_removed=at_removed, leaf=None, summed=None)]


def _gather(s: Walk, op: Op) -> list[Value] | None:
    """Everything along the axis stays; along others, positions face each other."""
    value, index = s.value(op.args["self"]), s.value(op.args["index"])
    axis = op.args["dim"] % value.ndim
    s.flow.keep(value, "looked up by index", [axis])
    s.flow.keep(index, "coordinates", [axis])
    axes: list[Any] = []
    for a in range(value.ndim):
        same = value.shape[a] is index.shape[a] or value.shape[a] == index.shape[a]
        if a != axis and same:
            s.flow.atoms.same(value.axes[a], index.axes[a])
            axes.append(None if value.axes[a] is None else index.axes[a])
        else:
            s.flow.keep(value, "a part whose place is computed", [a])
            s.flow.keep(index, "coordinates", [a])
            axes.append(None)
    at_removed = tuple(
        0.0 if x is not None and zero(d) else UNKNOWN
        for x, d in zip(axes, value.at_removed, strict=True)
    )
    return [Value(index.shape, tuple(axes), at_removed)]


def _index_put(s: Walk, op: Op) -> list[Value] | None:
    value, update = s.value(op.args["self"]), s.value(op.args["values"])
    axes = index_axes(op)
    indices = [op.args["indices"][a] for a in axes]
    if any(boolean(s, i) for i in indices):
        if len(indices) > 1:
            return None
        choice = s.value(indices[0])
        lead, after = axes[0], value.ndim - axes[0] - choice.ndim
        if update.ndim <= after and not op.args.get("accumulate"):
            spread = _spread(choice, lead, after)
            return [s.flow.elementwise("select_n", [spread, value, update], s.shape(op), s.where())]
        axes = list(range(lead, lead + choice.ndim))
    for index in indices:
        s.flow.keep(s.value(index), "coordinates")
    s.flow.keep(value, "written by index", axes)
    rest = [a for a in range(value.ndim) if a not in axes]
    trailing = rest and rest[-1] == value.ndim - 1 and rest == list(range(len(axes), value.ndim))
    found, at_removed = list(value.axes), list(value.at_removed)
    for a in rest:
        u = a - value.ndim + update.ndim
        if trailing and u >= 0 and update.shape[u] == value.shape[a]:
            s.flow.atoms.same(found[a], update.axes[u])
            found[a] = None if update.axes[u] is None else found[a]
            at_removed[a] = 0.0 if zero(at_removed[a]) and zero(update.at_removed[u]) else UNKNOWN
        elif trailing and (u < 0 or update.shape[u] == 1) and found[a] is not None:
            at_removed[a] = UNKNOWN
        else:
            s.flow.keep(value, "written by index", [a])
            s.flow.keep(update, "written by index")
            found[a] = None
    for a in axes:
        found[a] = None
    for u in range(update.ndim - len(rest) if trailing else 0):
        s.flow.keep(update, "written by index", [u])
    return [Value(value.shape, tuple(found), tuple(at_removed))]


def _scatter(s: Walk, op: Op) -> list[Value] | None:
    """Rows written or added at places along one axis; other axes face each other."""
    value, index = s.value(op.args["self"]), s.value(op.args["index"])
    if not value.ndim:
        return None
    axis = op.args["dim"] % value.ndim
    given = next((op.args[k] for k in ("src", "source", "value") if k in op.args), None)
    update = s.value(given) if isinstance(given, Var) else None
    facing = [v for v in (index, update) if v is not None and v.ndim == value.ndim]
    s.flow.keep(value, "written by index", [axis])
    for other in (v for v in (index, update) if v is not None):
        s.flow.keep(other, "written by index", [axis] if other.ndim == value.ndim else None)
    axes, at_removed = list(value.axes), list(value.at_removed)
    axes[axis] = None
    for a in range(value.ndim):
        if a == axis:
            continue
        for other in facing:
            same = value.shape[a] is other.shape[a] or value.shape[a] == other.shape[a]
            if same:
                s.flow.atoms.same(axes[a], other.axes[a])
                axes[a] = None if other.axes[a] is None else axes[a]
            else:
                s.flow.keep(value, "written by index", [a])
                s.flow.keep(other, "written by index", [a])
                axes[a] = None
        zeros = update is not None and update.ndim == value.ndim and zero(update.at_removed[a])
        at_removed[a] = 0.0 if zeros and zero(value.at_removed[a]) else UNKNOWN
    return [Value(value.shape, tuple(axes), tuple(at_removed))]


def _renormalised(s: Walk, op: Op) -> list[Value] | None:
    """Rows scaled by their norms, to which zeros add nothing."""
    table = s.value(op.args["self"])
    s.flow.keep(table, "looked up by index", [0])
    if not zero(table.at_removed[1]):
        return None
    return [dataclasses.replace(table, leaf=None)]


RULES = rules_of(
    (_renormalised, "embedding_renorm"),
    (_embedding, "embedding"),
    (_embedding_bag, "embedding_bag _embedding_bag _embedding_bag_forward_only"),
    (_index_select, "index_select"),
    (_index, "index"),
    (_gather, "gather"),
    (_index_put, "index_put _unsafe_index_put"),
    (
        _scatter,
        "scatter scatter_add scatter_reduce index_add index_copy index_fill index_reduce",
    ),
)
