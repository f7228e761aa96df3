"""Experts of a mixture: families of stacked experts, and residual branches that a router weighs.

A router is a parameter that makes one position for every expert, and that keeps them all: behind it
is a softmax, or a choice of the largest. Masks are zeros, and cannot say that an expert is never
chosen; a removed expert still takes its share, and adds nothing.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence

from purepruning.coupling.branches import Branch
from purepruning.coupling.units import Coupled, Family, FrozenAxis
from purepruning.coupling.value import SINK, SOURCE

#: The kind of the families, and of units in a rule.
EXPERT = "expert"

#: Why an axis stays that nothing weighs.
OUTPUT = "an output"


def with_experts(
    families: Sequence[Family], leaves: Mapping[str, Coupled], frozen: Sequence[FrozenAxis]
) -> tuple[Family, ...]:
    """Returns the families; those that are the experts of an array have the kind ``"expert"``.

    Such a family lies in an axis of a parameter that makes another one, and in the same axis of one
    that reads that other; and a router has as many positions.
    """
    return tuple(
        dataclasses.replace(f, kind=EXPERT)
        if f.kind == "channel" and _stacked(f, leaves, frozen)
        else f
        for f in families
    )


def mixtures_of(
    branches: Sequence[Branch], leaves: Mapping[str, Coupled], frozen: Sequence[FrozenAxis]
) -> dict[str, tuple[int, ...]]:
    """Returns by name the branches, by index, that are the experts of one mixture.

    They are made by parameters whose paths differ in one number only, as ``moe.experts.0.up`` and
    ``moe.experts.1.up`` do, and a router beside them has as many positions. The name is the first
    path with ``*`` for that number.
    """
    alike: dict[tuple[str, ...], list[int]] = {}
    heads: dict[tuple[str, ...], str] = {}
    for i, branch in enumerate(branches):
        for pattern, head in _patterns(branch.makers):
            alike.setdefault(pattern, []).append(i)
            heads[pattern] = head
    found = {}
    for pattern, some in alike.items():
        head = heads[pattern]
        scope = head.removesuffix(".").rpartition(".")[0]
        routers = _routers(leaves, frozen, len(some), scope)
        if len(some) > 1 and any(not path.startswith(head) for path in routers):
            found[pattern[0]] = tuple(some)
    return found


def _patterns(makers: Sequence[str]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yields the paths with ``*`` for one of their numbers, and what stands before it."""
    numbers = [list(re.finditer(r"\d+", path)) for path in makers]
    for place in range(min(map(len, numbers), default=0)):
        there = [found[place] for found in numbers]
        if len({m.group() for m in there}) == 1:
            paths = zip(makers, there, strict=True)
            pattern = tuple(p[: m.start()] + "*" + p[m.end() :] for p, m in paths)
            yield pattern, makers[0][: there[0].start()]


def _stacked(family: Family, leaves: Mapping[str, Coupled], frozen: Sequence[FrozenAxis]) -> bool:
    makes, reads = (
        {
            units.tobytes()
            for m in family.axes
            if m.positions == 1
            for a, units in enumerate(leaves[m.path].units)
            if a != m.axis and units is not None and leaves[m.path].roles[a] == role
        }
        for role in (SOURCE, SINK)
    )
    path = family.name.partition("[")[0]
    scope = ".".join(path.split(".")[:-2])
    return bool(makes & reads) and bool(_routers(leaves, frozen, len(family), scope))


def _routers(
    leaves: Mapping[str, Coupled], frozen: Sequence[FrozenAxis], n: int, scope: str
) -> list[str]:
    """Returns the parameters inside of a scope that keep ``n`` positions that they make."""
    inside = f"{scope}." if scope else ""
    return [
        p.path
        for p in frozen
        if p.path.startswith(inside)
        and p.reason != OUTPUT
        and p.positions == n == leaves[p.path].shape[p.axis]
        and leaves[p.path].roles[p.axis] == SOURCE
    ]
