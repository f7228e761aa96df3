"""Sets of coupled units and their pools: what the layers of a group lose together, and alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from purepruning.config.allocation import UnitSet
from purepruning.config.config import Config, Pool
from purepruning.config.rules import Gradual
from purepruning.counts import count_of
from purepruning.coupling.coupling import Coupling
from purepruning.granularity import grid
from purepruning.layers import Layer

#: The name of the one pool of global scope.
MODEL = "model"


class Selected(NamedTuple):
    """A layer that a rule selects: what the rule says, and where its channels lie.

    Attributes:
        layer, rule: the layer, and the number of its rule.
        units: unit numbers of every channel, ``(stacked * channels, k)``.
        groups: indices of the coupling's groups that the rule prunes it by.
        sparsity, allow_empty, gradual, iterations, most: what the rule says; ``most`` is the
            largest fraction to prune in global scope.
        branches: where the rule prunes by residual branches, indices of those the layer makes.
    """

    layer: Layer
    rule: int
    units: np.ndarray
    groups: frozenset[int]
    sparsity: float | None
    allow_empty: bool
    gradual: Gradual | None
    iterations: int | None
    most: float
    branches: frozenset[int] = frozenset()


class UnitSets:
    """Collects sets of units and their pools, in the order of their places."""

    def __init__(self, coupling: Coupling, selected: Sequence[Selected], options: Any) -> None:
        self.coupling, self.selected, self.options = coupling, selected, options
        self.sets: list[UnitSet] = []
        self.pools: list[Pool] = []
        self.next = 1
        sizes = [len(x.units) for x in selected]
        starts = np.cumsum([0, *sizes])
        self.start = {x.layer.name: int(s) for x, s in zip(selected, starts, strict=False)}
        self.n_channels = int(starts[-1])
        # By layer, the place of every unit number; that of its own set wins.
        blank = np.zeros(coupling.n_units + 1, np.int64)
        self.places = {x.layer.name: blank.copy() for x in selected}
        self.common = blank.copy()

    def add_common(self, group: int, members: Sequence[Selected]) -> None:
        """Adds what the layers of a group lose together, in layer scope."""
        chunks = np.stack(self.coupling.groups[group])
        sparsities = [x.sparsity for x in members]
        least = None if None in sparsities else min(x for x in sparsities if x is not None)
        lead = next(x for x in members if x.sparsity == least)
        allow_empty = all(x.allow_empty for x in members)
        self.check_times(members)
        size = chunks.shape[1]
        allowed = self._allowed(chunks, members, size - (not allow_empty))
        pool = Pool(
            self._name(_joined([x.layer.name for x in members])),
            lead.rule,
            tuple(x.layer for x in members),
            size,
            size - (not allow_empty),
            (),
            least,
            allow_empty,
            lead.gradual,
            next((x.iterations for x in members if x.iterations is not None), None),
            self._listed(allowed),
        )
        self._add(chunks, members, allowed, None)
        self.pools.append(pool)

    def add_extra(self, group: int, members: Sequence[Selected], *, common: bool) -> None:
        """Adds what layers of a group lose beyond what they lose together."""
        known = [x.sparsity for x in members]
        least = None if None in known else min(x for x in known if x is not None)
        for x in members:
            if common and (x.sparsity is None or least is None or x.sparsity <= least):
                continue
            for chunks in _own_parts(self.coupling.groups[group], x.units):
                size = chunks.shape[1]
                most = size - (not x.allow_empty)
                allowed = self._allowed(chunks, [x], most)
                pool = Pool(
                    self._name(x.layer.name),
                    x.rule,
                    (x.layer,),
                    size,
                    most,
                    (),
                    x.sparsity,
                    x.allow_empty,
                    x.gradual,
                    x.iterations,
                    self._listed(allowed),
                )
                self._add(chunks, [x], allowed, self.common[chunks.reshape(-1)])
                self.pools.append(pool)

    def add_capped(self, group: int, members: Sequence[Selected]) -> None:
        """Adds the units of a group, in global scope."""
        chunks = np.stack(self.coupling.groups[group])
        size = chunks.shape[1]
        allow_empty = all(x.allow_empty for x in members)
        caps = [count_of(x.most, size) for x in members]
        for x, cap in zip(members, caps, strict=True):
            if cap == size and not x.allow_empty:
                raise ValueError(
                    f"rule {x.rule}: max_sparsity_per_layer {x.most:g} would let layer "
                    f"{x.layer.name!r} lose all its {size} units; if that is meant, give the rule "
                    "'allow_empty': True"
                )
        most = min(*caps, size - (not allow_empty))
        self._add(chunks, members, self._allowed(chunks, members, most), None)

    def add_branches(self, name: str, branches: Mapping[int, Sequence[Selected]]) -> None:
        """Adds residual branches that one rule prunes, by index, with the layers that make each."""
        members = list({x.layer.name: x for some in branches.values() for x in some}.values())
        inside = tuple(self.coupling.branches[i].units for i in branches)
        lead = members[0]
        self.check_times(members)
        places = self.next + np.arange(len(inside))
        scores = []
        for place, units, some in zip(places, inside, branches.values(), strict=True):
            self.common[units] = place
            rows = [np.flatnonzero(np.isin(x.units, units).any(1)) for x in some]
            each = [self.start[x.layer.name] + row for x, row in zip(some, rows, strict=True)]
            scores.append(np.concatenate(each))
        index = np.full((len(scores), max(map(len, scores))), self.n_channels)
        for row, channels in zip(index, scores, strict=True):
            row[: len(channels)] = channels
        most = len(inside) - (not lead.allow_empty)
        first = np.array([[units[0] for units in inside]])
        allowed = np.arange(most + 1)
        self.sets.append(
            UnitSet(first, index.astype(np.int32), self.next, None, allowed, True, inside)
        )
        self.pools.append(
            Pool(
                self._name(name),
                lead.rule,
                tuple(x.layer for x in members),
                len(inside),
                most,
                (),
                lead.sparsity,
                lead.allow_empty,
                lead.gradual,
                lead.iterations,
            )
        )
        self.next += len(inside)

    def channels(self) -> dict[str, np.ndarray]:
        """Returns by layer the places of the units that its channels go with."""
        found = {}
        for x in self.selected:
            places = self.places[x.layer.name]
            # A unit that its layer is not pruned by may still die, by the rules of others.
            places = np.where(places > 0, places, self.common)
            found[x.layer.name] = places[x.units].astype(np.int32)
        return found

    def _add(
        self,
        chunks: np.ndarray,
        members: Sequence[Selected],
        allowed: np.ndarray,
        common: np.ndarray | None,
    ) -> None:
        flat = chunks.reshape(-1)
        places = self.next + np.arange(len(flat))
        scores = _occupied(
            flat, [(self.start[x.layer.name], x.units) for x in members], self.n_channels
        )
        found = None if common is None or not common.any() else common
        together = common is None
        self.sets.append(UnitSet(chunks, scores, self.next, found, allowed, together))
        if common is None:
            self.common[flat] = places
        else:
            self.places[members[0].layer.name][flat] = places
        self.next += len(flat)

    def _allowed(self, chunks: np.ndarray, members: Sequence[Selected], most: int) -> np.ndarray:
        """Returns the counts that leave every layer enough channels, and a whole multiple."""
        size = chunks.shape[1]
        counts = np.arange(most + 1)
        good = np.ones(most + 1, bool)
        for x in members:
            rows = x.units.reshape(grid(x.layer, "output_channel").n_stacked, -1)
            for row in rows:
                number = np.bincount(row, minlength=self.coupling.n_units + 1)[chunks].max(1)
                if number.any():
                    left = (size - counts) * int(number.sum())
                    good &= left % self.options.round_to == 0
                    good &= left >= self.options.min_channels
        good[0] = True
        return np.flatnonzero(good)

    def _listed(self, allowed: np.ndarray) -> tuple[int, ...] | None:
        if self.options.round_to == 1 and self.options.min_channels == 1:
            return None
        return tuple(allowed.tolist())

    def check_times(self, members: Sequence[Selected]) -> None:
        """Raises ValueError if the rules of some layers have different epochs."""
        times = {
            x.layer.name: None
            if x.gradual is None
            else (x.gradual.start_epoch, x.gradual.end_epoch, x.gradual.frequency)
            for x in members
        }
        if len(set(times.values())) > 1:
            raise ValueError(
                f"layers {', '.join(map(repr, times))} lose the same channels, so that their rules "
                f"must have the same epochs, got {list(times.values())}"
            )

    def _name(self, name: str) -> str:
        taken = {pool.name for pool in self.pools}
        names = (name, *(f"{name}#{i}" for i in range(2, len(taken) + 3)))
        return next(x for x in names if x not in taken)


def global_config(builder: UnitSets, selected: Sequence[Selected], options: Any) -> Config:
    """Returns the config whose one pool is the whole model."""
    given = {x.sparsity: x for x in selected if x.sparsity is not None}
    if len(given) > 1:
        raise ValueError(
            "in scope='global' with a coupling the sparsity is that of the whole model, and must "
            f"be the same in all rules, got {sorted(given)}"
        )
    if not builder.sets:
        return Config({}, (), "global", "output_channel", "follow")
    lead = next(iter(given.values()), selected[0])
    builder.check_times([x for x in selected if x.sparsity is not None] or selected[:1])
    which = 0 if (options.cost or "params") == "params" else 1
    total = builder.coupling.cost()[which]
    removed = np.zeros(builder.coupling.n_units + 1, bool)
    for s in builder.sets:
        removed[s.units[:, : s.allowed[-1]]] = True
    reach = total - builder.coupling.cost(removed)[which]
    if not isinstance(total, int | np.integer):
        raise ValueError(f"the model's cost must be a number, got {total!r}; give inputs of sizes")
    step = -(-int(total) // 2**30)
    pool = Pool(
        MODEL,
        lead.rule,
        tuple(x.layer for x in selected),
        -(-int(total) // step),
        int(reach) // step,
        (),
        lead.sparsity,
        all(x.allow_empty for x in selected),
        lead.gradual,
        lead.iterations,
        None,
        int(total),
        step,
    )
    return Config({}, (pool,), "global", "output_channel", "follow")


def _joined(names: Sequence[str]) -> str:
    if len(names) <= 3:
        return " + ".join(names)
    return f"{names[0]} + {names[1]} + {len(names) - 2} more"


def _own_parts(chunks: Sequence[np.ndarray], units: np.ndarray) -> list[np.ndarray]:
    """Returns the units of one layer, part by part; parts of different sizes apart."""
    mine = [chunk[np.isin(chunk, units)] for chunk in chunks]
    sizes = dict.fromkeys(len(part) for part in mine if len(part))
    return [np.stack([part for part in mine if len(part) == n]) for n in sizes]


def _occupied(units: np.ndarray, layers: Sequence[tuple[int, np.ndarray]], fill: int) -> np.ndarray:
    """Returns for each unit the channels that go with it, ``(units, most)``, filled up."""
    place = np.full(max(int(units.max()), *(int(x.max()) for _, x in layers)) + 1, -1)
    place[units] = np.arange(len(units))
    owner, channel = [], []
    for start, rows in layers:
        at, _ = np.nonzero(place[rows] >= 0)
        owner.append(place[rows][place[rows] >= 0])
        channel.append(start + at)
    own, found = np.concatenate(owner), np.concatenate(channel)
    order = np.lexsort((found, own))
    own, found = own[order], found[order]
    numbers = np.bincount(own, minlength=len(units))
    within = np.arange(len(own)) - np.repeat(np.cumsum(numbers) - numbers, numbers)
    index = np.full((len(units), int(numbers.max())), fill)
    index[own, within] = found
    return index.astype(np.int32)
