"""Layers as rows of a table, and rows that differ in numbers of their names alone as one."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import purepruning as pp
from purepruning_interop.checkpoints import Pattern


class Row(NamedTuple):
    """A layer, or several of one shape whose names differ in numbers alone.

    Attributes:
        name: its name, with ``{0-31}`` for the numbers.
        layer: the (first) layer.
        dtype: of its weight.
        times: how many there are.
        pattern: what is zero in them, together.
        same: whether they have the same N:M pattern.
        lost: how many weights rules would remove of them; None where they select none.
        macs: multiply-adds of them, where that is known.
    """

    name: str
    layer: pp.Layer
    dtype: str
    times: int
    pattern: Pattern
    same: bool
    lost: int | None
    macs: int = 0


def merged(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """Returns the rows with those in one that differ in numbers of their names alone."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        key = (re.sub(r"\d+", "#", row.name), row.layer.type, row.layer.shape, row.dtype)
        groups.setdefault((*key, row.lost is None), []).append(row)
    return tuple(_one(group) for group in groups.values())


def _one(group: list[Row]) -> Row:
    first = group[0]
    if len(group) == 1:
        return first
    patterns = [row.pattern for row in group]
    same = len({p.nm for p in patterns}) == 1
    together = Pattern(
        sum(p.nonzero for p in patterns),
        sum(p.size for p in patterns),
        patterns[0].nm if same else None,
        sum(p.empty_outputs for p in patterns),
    )
    lost = None if first.lost is None else sum(row.lost or 0 for row in group)
    name = _names([row.name for row in group])
    macs = sum(row.macs for row in group)
    return Row(name, first.layer, first.dtype, len(group), together, same, lost, macs)


def _names(names: list[str]) -> str:
    """Returns names that differ in numbers alone as one: ``blocks.{0-11}.fc``."""
    parts = [re.split(r"(\d+)", name) for name in names]
    made = []
    for column in zip(*parts, strict=True):
        if len(set(column)) == 1:
            made.append(column[0])
            continue
        numbers = sorted({int(x) for x in column})
        whole = numbers == list(range(numbers[0], numbers[-1] + 1))
        inner = f"{numbers[0]}-{numbers[-1]}" if whole else ",".join(map(str, numbers))
        made.append(f"{{{inner}}}")
    return "".join(made)


def zeros_of(row: Row) -> str:
    """Returns what is to be said of a row's zeros beside its density."""
    p, found = row.pattern, []
    if p.nm is not None:
        found.append(f"{p.nm[0]}:{p.nm[1]}")
    elif not row.same:
        found.append("mixed")
    if p.empty_outputs:
        found.append(f"{p.empty_outputs} whole channels")
    return ", ".join(found)
