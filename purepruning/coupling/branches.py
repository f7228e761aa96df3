"""Residual branches: what a block adds to a stream, such as an attention or an MLP.

All channels inside of a branch are removed together. What reads them then reads nothing, its
product is zero, and only the bias is left of what the branch adds; its arrays keep an axis of no
positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from purepruning.coupling.units import Coupled, Family
from purepruning.coupling.value import SINK, SOURCE


@dataclasses.dataclass(frozen=True, eq=False)
class Branch:
    """A residual branch.

    Attributes:
        name: that of its largest family.
        units: numbers of all its units.
        makers: parameters that make its channels, by path.
    """

    name: str
    units: np.ndarray
    makers: tuple[str, ...]

    def __repr__(self) -> str:
        return f"Branch({self.name!r}, {len(self.units)} units)"


@dataclasses.dataclass
class _Weight:
    """A parameter between families: what it reads, and what it makes; -1 for what is frozen."""

    reads: set[int]
    makes: set[int]
    by_block: bool


def branches_of(leaves: Mapping[str, Coupled], families: Sequence[Family]) -> tuple[Branch, ...]:
    """Returns the residual branches, in the order of their first units.

    A *stream* is a family that is read by what adds to it, and that something else begins: an
    embedding, a stem, a shortcut. A branch is a connected set of families of which all that is made
    from it adds to streams, each of which something else begins. Branches of stacked layers, whose
    arrays must stay equally large, are none: of these whole layers can be dropped.
    """
    weights = _weights(leaves, families)
    reach = _reach(weights, len(families))
    # What leads back to a family, itself included.
    circle = {i: {j for j in reach[i] if i in reach[j]} for i in range(len(families))}
    begun = {i: _begun(weights, i, circle[i]) for i in circle}
    streams = {i for i in circle if circle[i] - {i} and begun[i]}
    found = []
    for inside in _connected(weights, set(circle) - streams):
        mine = {p: w for p, w in weights.items() if inside & (w.reads | w.makes)}
        ends = {p: w for p, w in mine.items() if w.reads & inside}
        beyond = set().union(*(w.makes for w in ends.values())) - inside
        if any(w.by_block for w in mine.values()) or not beyond or not beyond <= streams:
            continue
        if any(not begun[i] - ends.keys() for i in beyond):
            continue
        largest = max(inside, key=lambda i: (len(families[i]), -i))
        units = np.sort(np.concatenate([families[i].units for i in inside]))
        makers = tuple(sorted(p for p, w in mine.items() if w.makes & inside))
        found.append(Branch(families[largest].name, units, makers))
    return tuple(sorted(found, key=lambda b: int(b.units[0])))


def _weights(leaves: Mapping[str, Coupled], families: Sequence[Family]) -> dict[str, _Weight]:
    family_of = np.full(sum(map(len, families)) + 1, -1)
    for i, family in enumerate(families):
        family_of[family.units] = i
    found = {}
    for path, leaf in leaves.items():
        if leaf.table or leaf.depthwise:
            continue
        weight = _Weight(set(), set(), False)
        for units, by, role in zip(leaf.units, leaf.by, leaf.roles, strict=True):
            if role not in (SOURCE, SINK):
                continue
            there = {-1} if units is None else set(np.unique(family_of[units]).tolist())
            if units is not None and units.any(-1).all():
                there.discard(-1)  # filled up
            (weight.makes if role == SOURCE else weight.reads).update(there)
            weight.by_block |= by is not None
        if weight.makes or weight.reads:
            found[path] = weight
    return found


def _reach(weights: Mapping[str, _Weight], n: int) -> list[set[int]]:
    """Returns for every family those that are computed from it."""
    after: list[set[int]] = [set() for _ in range(n)]
    for w in weights.values():
        for i in w.reads - {-1}:
            after[i] |= w.makes - {-1}
    found = []
    for i in range(n):
        seen, todo = set(after[i]), list(after[i])
        while todo:
            new = after[todo.pop()] - seen
            seen |= new
            todo += new
        found.append(seen)
    return found


def _begun(weights: Mapping[str, _Weight], family: int, circle: set[int]) -> set[str]:
    """Returns what makes a family, and reads neither it nor what leads back to it."""
    inside = circle | {family}
    return {p for p, w in weights.items() if family in w.makes and not w.reads & inside}


def _connected(weights: Mapping[str, _Weight], inside: set[int]) -> list[set[int]]:
    """Returns sets of families that lie in one parameter, or are linked by others that do."""
    found: list[set[int]] = [{i} for i in sorted(inside)]
    for w in weights.values():
        joint = (w.reads | w.makes) & inside
        if len(joint) > 1:
            apart = [s for s in found if not s & joint]
            found = [*apart, set().union(*(s for s in found if s & joint))]
    return found
