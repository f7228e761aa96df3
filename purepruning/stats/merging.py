"""The merge of all statistics: total by total."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from purepruning.arguments import instance
from purepruning.stats.accumulate import Totals, WideCount, merge_counts, merge_sums
from purepruning.stats.checks import check_totals

Statistics = TypeVar("Statistics", bound=tuple[Any, ...])


def merged(module: str, kind: type[Statistics], a: Statistics, b: Statistics) -> Statistics:
    """Returns the statistics of what both have seen; ``module`` names theirs in messages.

    Raises:
        TypeError: one is not of that kind, or not made of totals.
        ValueError: they hold different things, or are of different layers or shapes.
    """
    where = f"{module}.merge"
    for stats in (a, b):
        instance(stats, kind, f"{where}: stats", f"what {module}.init returned")
        check_totals(where, stats)
    for field, x, y in zip(kind._fields, a, b, strict=True):  # type: ignore[attr-defined]
        if isinstance(x, Mapping):
            _refuse_others(f"{where}: {field}", x, y)
    return kind(*map(_both, a, b))


def _both(a: Any, b: Any) -> Any:
    if isinstance(a, Mapping):
        return {name: _both(a[name], b[name]) for name in a}
    return merge_counts(a, b) if isinstance(a, WideCount) else merge_sums(a, b)


def _refuse_others(where: str, a: Totals, b: Totals) -> None:
    """Raises unless ``a`` and ``b`` are of the same layers and shapes."""
    for name in [*a, *b]:
        if name not in a or name not in b:
            raise ValueError(f"{where}: only one of the statistics has layer {name!r}")
        one, other = tuple(a[name].high.shape), tuple(b[name].high.shape)
        if one != other:
            raise ValueError(
                f"{where}: statistics of layer {name!r} have shapes {one} and {other}; are they "
                "of two models?"
            )
