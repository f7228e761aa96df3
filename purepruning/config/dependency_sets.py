"""Which layers lose the same channels, and in how many groups: as data, and as NNI's tables."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Iterable

import numpy as np

from purepruning.config.channel_units import channel_units
from purepruning.config.coupled_layers import filled
from purepruning.coupling.coupling import Coupling, check_coupling
from purepruning.layers import Layer, Layers, checked_table


@dataclasses.dataclass(frozen=True)
class DependencySet:
    """Layers that make the same channels.

    Attributes:
        layers: their names, in the order of the layer table.
        units: how many units they can lose together; 0 where all stay.
        groups: the number of groups that must lose equally many, as those of a grouped
            convolution; 1 where any may go.
    """

    layers: tuple[str, ...]
    units: int
    groups: int


@dataclasses.dataclass(frozen=True)
class DependencySets:
    """All dependency sets of a model, singles included."""

    sets: tuple[DependencySet, ...]

    def csv(self) -> str:
        """Returns the sets as NNI's ``ChannelDependency.export`` writes them."""
        rows = ((f"Set {i}", *s.layers) for i, s in enumerate(self.sets, 1))
        return _csv(("Dependency Set", "Layers"), rows)

    def groups_csv(self) -> str:
        """Returns the groups of every layer as NNI's ``GroupDependency.export`` writes them."""
        rows = ((name, s.groups) for s in self.sets for name in s.layers)
        return _csv(("Conv Layer Name", "Group"), rows)


def dependency_sets(coupling: Coupling, layers: Layers) -> DependencySets:
    """Returns which layers make the same channels: NNI's shape dependency.

    Every row of the table that has output channels is in one set; norms, which only scale
    channels, are in none. What cannot be pruned at all is a set of its own.

    Args:
        coupling: what :func:`purepruning.couple` returned.
        layers: the layer table.

    Raises:
        TypeError, ValueError, KeyError: the table does not belong to the coupling.

    >>> import jax.numpy as jnp
    >>> import purepruning as pp
    >>> params = {"stem": jnp.ones((3, 8)), "block": jnp.ones((8, 8)), "head": jnp.ones((8, 2))}
    >>> fn = lambda p, x: (x @ p["stem"] + x @ p["stem"] @ p["block"]) @ p["head"]
    >>> coupling = pp.couple(fn, params, jnp.ones((1, 3)))
    >>> found = dependency_sets(coupling, pp.coupled_layers(coupling))
    >>> [(s.layers, s.units) for s in found.sets]
    [(('block', 'stem'), 8), (('head',), 0)]
    >>> print(found.csv())
    Dependency Set,Layers
    Set 1,block,stem
    Set 2,head
    """
    check_coupling("dependency_sets", coupling)
    table = filled(coupling, checked_table(layers))
    rows = [x for x in table if x.out_axes and "Norm" not in x.type]
    units = {x.name: _numbers(coupling, x) for x in rows}
    sets: list[list[Layer]] = []
    for layer in rows:
        mine = [s for s in sets if any(units[layer.name] & units[x.name] for x in s)]
        sets = [s for s in sets if s not in mine]
        sets.append(sorted([*(x for s in mine for x in s), layer], key=rows.index))
    sets.sort(key=lambda s: rows.index(s[0]))
    return DependencySets(tuple(_described(coupling, s, units) for s in sets))


def _numbers(coupling: Coupling, layer: Layer) -> set[int]:
    return set(np.unique(channel_units(coupling, layer)).tolist()) - {0}


def _described(coupling: Coupling, rows: list[Layer], units: dict[str, set[int]]) -> DependencySet:
    together: set[int] = set().union(*(units[x.name] for x in rows))
    parts = [len(g) for g in coupling.groups if together & set(np.concatenate(g).tolist())]
    return DependencySet(
        tuple(x.name for x in rows), len(together), int(np.lcm.reduce(parts)) if parts else 1
    )


def _csv(header: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue().rstrip("\n")
