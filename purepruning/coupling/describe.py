"""The coupling in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from purepruning.coupling.units import Family, FrozenAxis


def text(
    families: Sequence[Family],
    frozen: Sequence[FrozenAxis],
    unknown: Mapping[str, int],
    params: int,
    macs: Any,
) -> str:
    """Returns the units by size with the layers they span, and what cannot be pruned, and why."""
    n = len(families)
    lines = [
        f"{sum(map(len, families))} units in {n} {'family' if n == 1 else 'families'}; "
        f"{params:,} parameters, {number(macs)} multiply-adds",
        "",
    ]
    for family in families:
        made = [f"{m.path}[{m.axis}]" for m in family.axes if m.role == "source"]
        read = [f"{m.path}[{m.axis}]" for m in family.axes if m.role == "sink"]
        along = sum(m.role == "companion" for m in family.axes)
        lines.append(f"{len(family):6d} x {family.kind:13s} {some_of(made) or family.name}")
        lines.append(f"{'':9s}read by {some_of(read) or 'nothing'}; {along} scales, biases, tables")
    if frozen:
        lines += ["", "cannot be pruned:"]
        lines += [f"{p.positions:6d} of {p.path}[{p.axis}]: {p.reason}" for p in frozen]
    for name, times in unknown.items():
        lines.append(f"no rule for {name}, met {times} times: what it reads cannot be pruned")
    return "\n".join(lines)


def number(n: Any) -> str:
    """Returns a count for reading; one that depends on a symbolic size as its formula."""
    return f"{n:,}" if isinstance(n, int) else str(n)


def some_of(names: list[str], limit: int = 4) -> str:
    """Returns the first of some names, and how many more there are."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
