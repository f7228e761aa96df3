"""How coupled units lie in the layers of a config: static index arrays for selection."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from purepruning.config.budget import Budget
from purepruning.coupling.coupling import Coupling
from purepruning.coupling.value import SINK
from purepruning.layers import Layer


@dataclasses.dataclass(frozen=True)
class KeptWhole:
    """Units that a rule selects a layer of, and that stay.

    Attributes:
        name: the family they belong to (the first, where there are several).
        units: how many there are.
        layers: names of the selected layers that make them.
        reason: why they stay.
    """

    name: str
    units: int
    layers: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        return f"{self.units} units of {self.name} stay, of {', '.join(self.layers)}: {self.reason}"


@dataclasses.dataclass(frozen=True, eq=False)
class UnitSet:
    """Units that are ranked together; their places in the vector of all are consecutive.

    Attributes:
        units: numbers of the units, ``(parts, size)``; every part loses equally many.
        scores: for every unit the channels whose scores it sums, ``(parts * size, channels)``, as
            places in the vector of all channels; filled up with the number of all channels.
        start: place of the first unit. Place 0 is no unit.
        common: for every unit the place of the same unit in an earlier set, whose units this set
            loses first; None where there is none.
        allowed: the counts there are, ascending; the last is the most that may go.
        together: whether all that makes the units loses them, so that they can be removed.
        branches: where the units are residual branches, all the units inside of each, of which
            ``units`` has the first; else None.
    """

    units: np.ndarray
    scores: np.ndarray
    start: int
    common: np.ndarray | None
    allowed: np.ndarray
    together: bool
    branches: tuple[np.ndarray, ...] | None = None

    @property
    def places(self) -> np.ndarray:
        """Places of the units."""
        return self.start + np.arange(self.units.size)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Allocation:
    """How the units of a coupling lie in the layers of a config. Static; compared by content.

    Attributes:
        coupling: where the units come from.
        layers: names of the layers, in the order of their channels in the vector of all.
        sets: the units that are ranked, set by set.
        channels: by layer name, the places of the units that each channel goes with,
            ``(stacked * channels, k)``, filled up with 0.
        kept_whole: what stays although a rule selects it.
        readers: rows of the layer table whose inputs are units of the sets.
        budget: how the cost of the whole model follows from what dies; in global scope.
        costs: by place, the cost of removing each unit alone; where units rank by score per cost.
    """

    coupling: Coupling
    layers: tuple[str, ...]
    sets: tuple[UnitSet, ...]
    channels: Mapping[str, np.ndarray]
    kept_whole: tuple[KeptWhole, ...]
    readers: tuple[Layer, ...]
    budget: Budget | None = None
    costs: np.ndarray | None = None

    @functools.cached_property
    def digest(self) -> str:
        """A hash of everything that selection depends on."""
        sha = hashlib.sha256(self.coupling.digest.encode())
        arrays: list[Any] = [*self.layers]
        for s in self.sets:
            arrays += [s.units, s.scores, s.start, s.common, s.allowed, s.together]
            arrays += s.branches or []
        arrays += [x for name in self.layers for x in (name, self.channels[name])]
        arrays += map(repr, self.readers)
        arrays += [self.costs, self.budget.key if self.budget else None]
        for x in arrays:
            sha.update(repr((np.shape(x), str(getattr(x, "dtype", "")))).encode())
            sha.update(x.tobytes() if isinstance(x, np.ndarray) else repr(x).encode())
        return sha.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Allocation) and self.digest == other.digest

    def __repr__(self) -> str:
        units = self.n_places - 1
        return f"Allocation({len(self.sets)} sets of {units} units in {len(self.layers)} layers)"

    @functools.cached_property
    def _hash(self) -> int:
        return hash(self.digest)

    def __hash__(self) -> int:
        return self._hash

    def __getstate__(self) -> dict[str, Any]:
        # Hashes of strings differ from process to process.
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @functools.cached_property
    def place_of(self) -> np.ndarray:
        """For every unit its place in the set of all that makes it; 0 where there is none."""
        found = np.zeros(self.coupling.n_units + 1, np.int64)
        for s in self.sets:
            if s.together:
                found[s.units.reshape(-1)] = s.places
            for place, units in zip(s.places, s.branches or (), strict=False):
                found[units] = place
        return found

    def refuse_branches(self, where: str) -> None:
        """Raises ValueError if a rule prunes by residual branches, which ``where`` cannot rank."""
        if any(s.branches is not None for s in self.sets):
            raise ValueError(
                f"{where}: a rule has 'units': 'branch'; rank branches by a criterion that scores "
                "channels, such as pp.l1_norm"
            )

    @functools.cached_property
    def along(self) -> dict[str, tuple[int, ...]]:
        """By path, the axes that must be masked along with those that are pruned.

        All that lies in their units but what only reads zeros there.
        """
        return {
            path: tuple(
                a
                for a, units in enumerate(leaf.units)
                if units is not None
                and (leaf.roles[a] != SINK or leaf.nonzero[a])
                and self.place_of[units].any()
            )
            for path, leaf in self.coupling.leaves.items()
            if not leaf.table
        }

    @property
    def n_places(self) -> int:
        """Number of units in all sets, and one for place 0."""
        return 1 + sum(s.units.size for s in self.sets)
