"""Search ranges in a recipe: ``{"range": [0.2, 0.8], "type": "float"}`` in place of a number."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from purepruning.arguments import missing, shown

_KEYS = ("range", "type", "interval", "n")


@dataclasses.dataclass(frozen=True)
class Range:
    """What a number, or a choice, is searched among.

    Attributes:
        kind: ``"float"``: from the first value up to the last; ``"int"``: both included;
            ``"choice"``: one of the values.
        values: first and last value, or the choices.
        interval: distance of the points of a grid, or None.
        n: number of the points of a grid, or None.
    """

    kind: Literal["float", "int", "choice"]
    values: tuple[Any, ...]
    interval: float | None = None
    n: int | None = None

    def ends(self) -> tuple[Any, ...]:
        """Returns the values that a check must try: first and last, or all choices."""
        return self.values

    def grid(self) -> list[Any]:
        """Returns the points of a grid: by ``interval``, else ``n`` of them, else at distance 1.

        >>> Range("float", (0.0, 1.0), n=3).grid(), Range("int", (2, 8), interval=3).grid()
        ([0.0, 0.5, 1.0], [2, 5, 8])
        """
        if self.kind == "choice":
            return list(self.values)
        low, high = self.values
        if self.interval is None and self.n is not None:
            points = np.linspace(low, high, self.n).tolist()
        else:
            step = 1 if self.interval is None else self.interval
            points = [low + i * step for i in range(math.floor((high - low) / step + 1e-9) + 1)]
        return points if self.kind == "float" else sorted({round(x) for x in points})

    def draw(self, rng: np.random.Generator) -> Any:
        """Returns a value drawn uniformly."""
        if self.kind == "choice":
            return self.values[int(rng.integers(len(self.values)))]
        low, high = self.values
        return (
            float(rng.uniform(low, high))
            if self.kind == "float"
            else int(rng.integers(low, high, endpoint=True))
        )


def find_ranges(
    rules: Sequence[Mapping[str, Any]],
) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Gives the place and the object of every range: number of the rule, and its keys."""

    def inside(value: Any, place: tuple[str, ...]) -> Iterator[Any]:
        if isinstance(value, Mapping):
            if "type" in value:
                yield place, value
            else:
                for key, inner in value.items():
                    yield from inside(inner, (*place, str(key)))

    for number, rule in enumerate(rules):
        for key, value in rule.items():
            yield from inside(value, (str(number), str(key)))


def range_of(value: Mapping[str, Any], where: str) -> Range:
    """Returns a range as it is written; ``where`` names it in messages.

    Raises:
        ValueError, TypeError: it is none.
    """
    for key in value:
        if key not in _KEYS:
            raise ValueError(missing(f"{where}: a range has no key {key!r}", str(key), _KEYS))
    kind, values = value["type"], value.get("range")
    if kind not in ("float", "int", "choice"):
        raise ValueError(
            missing(f"{where}: type: there is no {shown(kind)}", kind, ("float", "int", "choice"))
        )
    if not isinstance(values, list | tuple) or not values:
        raise TypeError(f"{where}: range must be a list, got {shown(values)}; write [0.2, 0.8]")
    if kind == "choice":
        return Range(kind, tuple(values))
    types = (int,) if kind == "int" else (int, float)
    for x in values:
        if isinstance(x, bool) or not isinstance(x, types):
            raise TypeError(f"{where}: range of type {kind!r} has {shown(x)}; write numbers")
    if len(values) != 2 or values[0] > values[1]:
        raise ValueError(
            f"{where}: range of type {kind!r} must be the first and the last value, got "
            f"{shown(values)}; write two numbers in order, or use type 'choice'"
        )
    interval, n = value.get("interval"), value.get("n")
    if interval is not None and (
        isinstance(interval, bool) or not isinstance(interval, int | float) or interval <= 0
    ):
        raise ValueError(f"{where}: interval must be above 0, got {shown(interval)}")
    if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 2):
        raise ValueError(f"{where}: n must be a whole number from 2 on, got {shown(n)}")
    return Range(kind, tuple(values), interval, n)
