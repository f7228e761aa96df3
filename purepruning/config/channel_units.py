"""Which units of a coupling the channels of a layer belong to, and which a rule prunes it by."""

from __future__ import annotations

import math

import numpy as np

from purepruning.arguments import missing
from purepruning.config.rules import UNIT_KINDS
from purepruning.coupling.coupling import Coupling
from purepruning.coupling.units import Family
from purepruning.coupling.value import SOURCE
from purepruning.granularity import grid
from purepruning.layers import Layer


def channel_units(
    coupling: Coupling, layer: Layer, where: str = "coupling", *, stacked: bool = False
) -> np.ndarray:
    """Returns the units that each output channel of a layer goes with.

    An int array ``(stacked * channels, k)`` in the order of the layer's grid, filled up with 0;
    with ``stacked``, those that stacked layers are go along.

    Raises:
        KeyError: the coupling has no parameter of that name.
        ValueError: it has another shape, or the layer no output axis.
    """
    if layer.weight not in coupling.leaves:
        message = f"{where}: layer {layer.name!r}: the coupling has no parameter {layer.weight!r}"
        raise KeyError(missing(message, layer.weight, coupling.leaves))
    leaf = coupling.leaves[layer.weight]
    if leaf.shape != layer.shape:
        raise ValueError(
            f"{where}: layer {layer.name!r}: {layer.weight!r} has shape {leaf.shape} in the "
            f"coupling, but {layer.shape} in the layer table"
        )
    try:
        g = grid(layer, "output_channel")
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    order = (*g.stack, *g.units)
    dims = tuple(g.split[a] for a in order)
    parts = []
    for axis in (*(layer.stack_axes if stacked else ()), *layer.out_axes):
        units = leaf.units[axis]
        if units is None:
            continue
        shape = [1] * len(dims)
        shape[order.index(2 * axis)] = dims[order.index(2 * axis)]
        if units.ndim == 3:
            other = leaf.by[axis]
            assert other is not None
            place = order.index(2 * other) if 2 * other in order else -1
            if place < 0 or dims[place] % len(units):
                continue  # its channels are not those of the layer table
            units = np.repeat(units, dims[place] // len(units), 0)
            shape[place] = dims[place]
            if order.index(2 * axis) < place:
                units = units.transpose(1, 0, 2)
        k = units.shape[-1]
        parts.append(np.broadcast_to(units.reshape(*shape, k), (*dims, k)).reshape(-1, k))
    if not parts:
        return np.zeros((math.prod(dims), 1), np.int64)
    return np.concatenate(parts, 1)


def frozen_reason(coupling: Coupling, layer: Layer) -> str:
    """Returns why the output channels of a layer cannot be pruned, as part of a sentence."""
    if not layer.out_axes:
        return "it has no output axis"
    if layer.out_channels == 1:
        return "it has one channel"
    axes = {p.axis: p.reason for p in coupling.frozen if p.path == layer.weight}
    found = [axes[a] for a in layer.out_axes if a in axes] or list(axes.values())
    return f"what keeps it is {found[0]!r}" if found else "nothing is known of its output axis"


def kinds_of(coupling: Coupling, units: np.ndarray) -> set[str]:
    """Returns the kinds of some units."""
    families = np.unique(coupling.family_of[units[units > 0]])
    return {coupling.families[i].kind for i in families}


def _group_of(coupling: Coupling) -> np.ndarray:
    """For every unit the index of its group; -1 at 0."""
    found = np.full(coupling.n_units + 1, -1)
    for i, chunks in enumerate(coupling.groups):
        for chunk in chunks:
            found[chunk] = i
    return found


def families_of(coupling: Coupling, group: int) -> list[Family]:
    """Returns the families that the units of a group belong to."""
    units = np.concatenate(coupling.groups[group])
    return [coupling.families[i] for i in dict.fromkeys(coupling.family_of[units].tolist())]


def spans_of(coupling: Coupling) -> list[int]:
    """Returns for every group how many positions it has in what makes its channels."""
    return [
        sum(
            m.positions * int(np.isin(f.units, np.concatenate(chunks)).sum())
            for f in families_of(coupling, i)
            for m in f.axes
            if m.role == SOURCE
        )
        for i, chunks in enumerate(coupling.groups)
    ]


def choose(
    coupling: Coupling, units: np.ndarray, kind: str | None, spans: list[int]
) -> frozenset[int]:
    """Returns the groups by which a layer is pruned: one for every channel.

    Of several that a channel lies in: the kind that is asked for, else in the order of
    ``UNIT_KINDS``; of one kind the widest.
    """
    group_of = _group_of(coupling)
    there = np.unique(group_of[units])
    order = [*([kind] if kind else ()), *UNIT_KINDS]
    ranks = np.full(len(coupling.groups) + 1, len(coupling.groups) + 1)  # -1 is the last entry
    candidates = [int(i) for i in there if i >= 0]
    candidates.sort(key=lambda i: (order.index(families_of(coupling, i)[0].kind), -spans[i], i))
    ranks[candidates] = np.arange(len(candidates))
    best = ranks[group_of[units]].min(1)
    return frozenset(candidates[i] for i in np.unique(best) if i < len(candidates))
