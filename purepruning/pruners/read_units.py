"""What is known of coupled units from the inputs of the layers that read them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from purepruning.arguments import instance
from purepruning.arrays import int32, namespace
from purepruning.config.config import Config
from purepruning.coupling.coupling import Coupling
from purepruning.coupling.value import SINK
from purepruning.exact_sum import exact_sum
from purepruning.layers import Layer
from purepruning.matrices import form
from purepruning.pruners.coupled import ByContent, allocation_of
from purepruning.stats import inputs
from purepruning.stats.checks import check_totals, match, placed, refuse_empty
from purepruning.trees import Flat


class Places(NamedTuple):
    """Where units lie among the columns of a layer, which are counted over all its members.

    Attributes:
        of_columns: numbers of the units of each column, ``(columns, k)``, filled up with 0.
        units: the units that lie there, ascending.
        columns: the columns of each, ``(units, most)``, filled up with the number of all columns.
        sizes: how many they are.
    """

    of_columns: np.ndarray
    units: np.ndarray
    columns: np.ndarray
    sizes: np.ndarray

    def sums(self, values: Any, n_units: int) -> Any:
        """Returns the sums of one number for each column over every unit, ``(n_units,)``."""
        xp = namespace(values)
        flat = xp.reshape(values, (-1,))
        zero = xp.zeros_like(flat[:1])
        each = xp.take(xp.concat([flat, zero]), int32(xp, self.columns.reshape(-1), flat))
        found = exact_sum(xp.reshape(each, self.columns.shape), (1,))
        place = np.full(n_units, len(self.units))
        place[self.units - 1] = np.arange(len(self.units))
        return xp.take(xp.concat([found, zero]), int32(xp, place, flat))


class Reader(NamedTuple):
    """A layer that reads units: where they lie, and the totals of its inputs by kind."""

    layer: Layer
    places: Places
    totals: dict[str, Any]


def readers_of(
    where: str, tree: Flat, stats: Any, config: Config, kinds: Sequence[inputs.Kept]
) -> list[Reader]:
    """Returns the layers that ``stats`` are of and that read what is pruned.

    Raises:
        TypeError: ``stats`` are no input statistics, or of another framework.
        ValueError: the config has no coupling; the statistics are empty, of other layers, or do not
            hold what is needed; or none of their layers reads some of the units.
    """
    allocation = allocation_of(where, config)
    instance(stats, inputs.InputStats, f"{where}: stats", "the statistics of stats.inputs")
    check_totals(where, stats)
    found = []
    for layer in config.readers:
        if layer.name not in stats.positions:
            continue
        f = form(where, layer)
        totals: dict[str, Any] = {}
        for kind in kinds:
            of_kind = getattr(stats, kind)
            if layer.name not in of_kind:
                raise ValueError(
                    f"{where}: the statistics do not hold {kind!r}; make them with "
                    f"inputs.init(params, config.readers, keep={list(kinds)})"
                )
            match(where, of_kind, {layer.name: (f.members, f.columns)})
            totals[kind] = of_kind[layer.name]
        refuse_empty(where, {layer.name: stats.positions[layer.name]})
        totals["positions"] = stats.positions[layer.name]
        like = tree.leaves.get(layer.weight)
        totals = {kind: placed(where, layer.name, x, like) for kind, x in totals.items()}
        found.append(Reader(layer, places_of(layer, allocation.coupling), totals))
    _refuse_unread(where, found, config)
    return found


def _refuse_unread(where: str, found: Sequence[Reader], config: Config) -> None:
    allocation = allocation_of(where, config)
    allocation.refuse_branches(where)
    seen = np.zeros(allocation.coupling.n_units + 1, bool)
    for reader in found:
        seen[reader.places.units] = True
    for s in allocation.sets:
        unread = s.units[~seen[s.units]]
        if unread.size:
            family = allocation.coupling.families[allocation.coupling.family_of[unread[0]]]
            names = [layer.name for layer in config.readers]
            raise ValueError(
                f"{where}: the statistics are of no layer that reads the units of {family.name}; "
                f"make them of config.readers, {names[:6]}, or leave the layers that make these "
                "units out of the rules"
            )


@functools.lru_cache(maxsize=4096)
def _places(layer: Layer, key: ByContent) -> Places:
    rows = units_of_columns(layer, key.coupling)
    columns, k = rows.shape
    pairs = np.stack([rows.reshape(-1), np.repeat(np.arange(columns), k)], axis=1)
    pairs = np.unique(pairs[pairs[:, 0] > 0], axis=0)
    units, first, sizes = np.unique(pairs[:, 0], return_index=True, return_counts=True)
    index = np.full((len(units), int(sizes.max(initial=1))), columns)
    within = np.arange(len(pairs)) - np.repeat(first, sizes)
    index[np.repeat(np.arange(len(units)), sizes), within] = pairs[:, 1]
    return Places(rows, units, index, sizes)


def places_of(layer: Layer, coupling: Coupling) -> Places:
    """Returns where the units of a coupling lie among the columns of a layer."""
    return _places(layer, ByContent(coupling))


def units_of_columns(layer: Layer, coupling: Coupling) -> np.ndarray:
    """Returns the units that each column reads, ``(members * columns, k)``, filled up with 0."""
    f, leaf = form("units", layer), coupling.leaves[layer.weight]
    lead = len(layer.stack_axes) + (layer.groups > 1)
    first = (slice(None),) * lead + (0,) * len(layer.out_axes)
    found = [np.zeros(f.members * f.columns, np.int64)]
    for axis in layer.in_axes:
        units, by = leaf.units[axis], leaf.by[axis]
        if units is None or leaf.roles[axis] != SINK:
            continue
        shape = [1] * len(layer.shape)
        shape[axis] = layer.shape[axis]
        if by is not None:  # of other units for every block of another axis
            shape[by] = layer.shape[by]
            units = np.repeat(units, layer.shape[by] // len(units), axis=0)
            units = units if by < axis else units.swapaxes(0, 1)
        for one in np.moveaxis(units, -1, 0):
            whole = np.broadcast_to(one.reshape(shape), layer.shape)
            moved = whole.reshape(f.split).transpose(f.order)
            found.append(moved[first].reshape(-1))
    return np.stack(found[1:] or found, axis=1)
