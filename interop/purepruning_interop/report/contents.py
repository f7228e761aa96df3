"""What a report is made of: numbers and sentences, no markup."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

#: Colours of curves; a baseline has none of them.
COLORS = 8


class Point(NamedTuple):
    """A point of a curve, and its spread; None where there is none."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclasses.dataclass(frozen=True)
class Series:
    """A curve.

    Attributes:
        name: in the legend.
        points: in order of x; with the same x in all series of a panel.
        panel: title of the plot that it is in.
        color: number of its colour and marker; see :func:`colored`.
        baseline: drawn grey and dashed.
    """

    name: str
    points: Sequence[Point]
    panel: str = ""
    color: int = 0
    baseline: bool = False


@dataclasses.dataclass(frozen=True)
class View:
    """One choice of what the curves show.

    Attributes:
        name: of the choice.
        y_label: of the axis.
        series: the curves.
        reference: heights of horizontal lines, by label.
        spread: what ``low`` and ``high`` are.
        signed: whether values are differences, shown with their sign.
    """

    name: str
    y_label: str
    series: Sequence[Series]
    reference: dict[str, float] = dataclasses.field(default_factory=dict)
    spread: str = ""
    signed: bool = False


@dataclasses.dataclass(frozen=True)
class Curves:
    """Plots that share their axes, and a choice of what they show.

    Attributes:
        title, note: above them.
        x_label: of the axis.
        views: the choices; the first is shown.
        x_scale: ``"left"`` for sparsities: what is left, in logarithms.
        percent: whether x and y are shares, shown in percent.
    """

    title: str
    note: str
    x_label: str
    views: Sequence[View]
    x_scale: Literal["linear", "left"] = "linear"
    percent: bool = False


class Column(NamedTuple):
    """A column of a table.

    Attributes:
        name: its head.
        number: whether it stands to the right.
        choose: whether rows can be chosen by its values.
    """

    name: str
    number: bool = False
    choose: bool = False


#: A cell: its text, or its text and what it is sorted by; None is empty, and sorted last.
Cell = str | tuple[str, float] | None


@dataclasses.dataclass(frozen=True)
class Table:
    """A table that can be sorted.

    Attributes:
        title, note: above it.
        columns: the first names its row.
        rows: cells. A cell that begins with a plus or minus sign in a triangle is marked.
    """

    title: str
    note: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]


@dataclasses.dataclass(frozen=True)
class Profile:
    """How much is left of each layer.

    Attributes:
        title, note: above it.
        layers: name, shape in words, and number of weights of each.
        choices: by title, the options of each choice; none, if there is one profile.
        kept: weights left of each layer, nested by choice: ``kept[i][j][layer]``.
        start: the option of each choice that is shown at first.
    """

    title: str
    note: str
    layers: Sequence[tuple[str, str, int]]
    choices: dict[str, Sequence[str]]
    kept: Sequence[object]
    start: Sequence[int] = ()


@dataclasses.dataclass(frozen=True)
class Facts:
    """Terms and what is to be said of them."""

    title: str
    facts: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Commands:
    """Lines for a shell."""

    title: str
    note: str
    lines: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Report:
    """A page.

    Attributes:
        kind: what was done, in two words.
        title: of the page.
        lead: sentences that say what came of it.
        tiles: the most important numbers, each with its label and a remark.
        sections: the rest.
        made: with what, and when.
    """

    kind: str
    title: str
    lead: str
    tiles: Sequence[tuple[str, str, str]]
    sections: Sequence[Curves | Table | Profile | Facts | Commands]
    made: str


def colored(series: Iterable[Series]) -> list[Series]:
    """Returns series with colours: one name has the same in all panels, no two names in one panel.

    Past the eighth in a panel colours come again.

    >>> curves = [Series("a", [], "1"), Series("b", [], "1"), Series("c", [], "2")]
    >>> [s.color for s in colored(curves)]
    [0, 1, 0]
    """
    series = list(series)
    panels: dict[str, set[str]] = {}
    for s in series:
        if not s.baseline:
            panels.setdefault(s.name, set()).add(s.panel)
    colors: dict[str, int] = {}
    for name in sorted(panels, key=lambda name: -len(panels[name])):
        taken = [colors[other] for other in colors if panels[other] & panels[name]]
        colors[name] = min(range(COLORS), key=lambda c: (taken.count(c), c))
    return [dataclasses.replace(s, color=colors.get(s.name, 0)) for s in series]
