"""The coupling as a picture."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from purepruning.arguments import flag
from purepruning.coupling.coupling import Coupling, check_coupling

#: Inches from row to row and from lane to lane, and the size of letters in points.
_ROW, _LANE, _POINTS = 0.26, 0.2, 8.0
#: Width of a letter of a monospaced font, in parts of its size.
_LETTER = 0.6


def draw(
    coupling: Coupling,
    pruned: Iterable[int] | np.ndarray = (),
    *,
    ax: Any = None,
    labels: bool = True,
) -> Any:
    """Returns a matplotlib ``Axes`` with the coupling as a graph in which data flows downwards.

    Every row is a layer (the parameters under one name), in the order of the program, and every
    vertical line a family of units, from the layer that makes it first to the one that reads it
    last. A filled dot on a line says that the layer of that row makes these channels, an open one
    that it reads them; a layer with no dot keeps its channels whole. Beside the layers stand the
    shapes of their weights and what they make. Of units that are pruned the line keeps a pale
    band, and shapes say how many positions are left. Scales, biases and tables are left out.

    Colours are those of ``matplotlib.rcParams``: in ``plt.style.context("dark_background")`` the
    picture is light on dark. Needs ``matplotlib`` (the extra ``demo``).

    Args:
        coupling: what :func:`purepruning.couple` returned.
        pruned: numbers of units, or a boolean by unit number, as in :meth:`Coupling.marked`; of
            masks, ``coupling.chosen(masks, params).removed``.
        ax: where to draw; a new figure as large as the picture unless given.
        labels: whether to write names and shapes.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: ``pruned`` has a number that is no unit.
    """
    check_coupling("draw_coupling", coupling)
    flag(labels, "draw_coupling: labels")
    removed = coupling.marked(pruned)
    import matplotlib.pyplot as plt

    picture = _arrange(coupling, removed)
    width = 1 + max([0, *(line.lane for line in picture.lines)])
    if ax is None:
        ax = _new_axes(plt, picture, width, labels)
    plain = plt.rcParams["axes.facecolor"]
    colours = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    for line in picture.lines:
        _draw_line(ax, line, colours[line.rank % len(colours)], plain, width)
    ink = plt.rcParams["text.color"]
    for y, row in enumerate(picture.rows):
        ax.plot(width, y, "s", color=ink, markersize=4)
        if labels:
            _write(ax, (width, y), row, picture, ink, colours)
    ax.set_xlim(-1, width + 1)
    ax.set_ylim(len(picture.rows) - 0.4, -0.6)
    ax.set_axis_off()
    return ax


def _new_axes(plt: Any, picture: _Picture, width: int, labels: bool) -> Any:
    """Returns axes for the lines, to the left of a figure that has room for the texts."""
    columns = zip(*(row.texts for row in picture.rows), strict=True)
    letters = sum(max(map(len, column)) + 2 for column in columns) + 2 if labels else 0
    lines, height = (width + 2) * _LANE, (len(picture.rows) + 1) * _ROW
    texts = letters * _LETTER * _POINTS / 72
    figure = plt.figure(figsize=(lines + texts, height))
    return figure.add_axes((0, 0, lines / (lines + texts), 1))


@dataclasses.dataclass(frozen=True)
class _Row:
    """A layer: its name, the shape of its weight, what it makes, and the families of that."""

    texts: tuple[str, str, str]
    makes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Line:
    """A family: where it lies, the rows that make and read it, and the share that is kept.

    ``rank`` is its place among all by where they begin: neighbours have other colours.
    """

    lane: int
    rank: int
    makes: tuple[int, ...]
    reads: tuple[int, ...]
    units: int
    kept: float


@dataclasses.dataclass(frozen=True)
class _Picture:
    rows: tuple[_Row, ...]
    lines: tuple[_Line, ...]


def _arrange(coupling: Coupling, removed: np.ndarray) -> _Picture:
    """Returns rows in the order of the program, and lines in as few lanes as there can be."""
    weights = _in_order(coupling)
    row_of = {name: i for i, name in enumerate(weights)}
    ends = [
        {
            role: tuple(sorted({row_of[_layer(a.path)] for a in family.axes if a.role == role}))
            for role in ("source", "sink")
        }
        for family in coupling.families
    ]
    spans = [sorted((*e["source"], *e["sink"])) or [0] for e in ends]
    lanes = _lanes(spans)
    rank = {
        f: i for i, f in enumerate(sorted(range(len(spans)), key=lambda f: (spans[f][0], lanes[f])))
    }
    lines = []
    for f, (family, end) in enumerate(zip(coupling.families, ends, strict=True)):
        kept = 1 - removed[family.units].mean()
        lines.append(_Line(lanes[f], rank[f], end["source"], end["sink"], len(family), float(kept)))
    names = _without_common_start(list(weights))
    rows = []
    for i, (name, path) in enumerate(zip(names, weights.values(), strict=True)):
        makes = tuple(f for f, end in enumerate(ends) if i in end["source"])
        made = ", ".join(_amount(coupling, f, removed) for f in makes)
        rows.append(_Row((name, _shape(coupling, path, removed), made), makes))
    return _Picture(tuple(rows), tuple(lines))


def _in_order(coupling: Coupling) -> dict[str, str]:
    """Returns layer names with the path of a weight of each, as the program reads them.

    Layers that no product reads, as an embedding, come before the first one that reads what they
    make.
    """
    when: dict[str, float] = {}
    weight: dict[str, str] = {}
    for i, product in enumerate(coupling.products):
        for path in product.weights:
            when.setdefault(_layer(path), i)
            weight.setdefault(_layer(path), path)
    for family in coupling.families:
        read = [
            when[_layer(a.path)] for a in family.axes if a.role == "sink" and _layer(a.path) in when
        ]
        for a in family.axes:
            if a.role in ("source", "sink"):
                when.setdefault(_layer(a.path), min(read, default=len(coupling.products)) - 0.5)
                weight.setdefault(_layer(a.path), a.path)
    return {name: weight[name] for name in sorted(weight, key=when.__getitem__)}


def _lanes(spans: list[list[int]]) -> list[int]:
    """Returns a lane for every span of rows: none meet in one, and long ones lie to the left."""
    lanes = [0] * len(spans)
    taken: list[list[tuple[int, int]]] = []
    for i in sorted(range(len(spans)), key=lambda i: (spans[i][0] - spans[i][-1], spans[i][0])):
        first, last = spans[i][0], spans[i][-1]
        free = (
            k for k, others in enumerate(taken) if all(last < a or b < first for a, b in others)
        )
        lane = next(free, len(taken))
        if lane == len(taken):
            taken.append([])
        taken[lane].append((first, last))
        lanes[i] = lane
    return lanes


def _draw_line(ax: Any, line: _Line, colour: str, plain: Any, layers: int) -> None:
    """Draws a family, and its connections to the layers at ``x = layers``."""
    made, read = [y + 0.12 for y in line.makes], [y - 0.12 for y in line.reads]
    ends = sorted((*made, *read)) or [0]
    width = 1.5 + 0.35 * math.log2(1 + line.units)
    along = [line.lane] * 2, [ends[0], ends[-1]]
    ax.plot(*along, color=colour, linewidth=width, alpha=0.3)
    if line.kept > 0:
        ax.plot(*along, color=colour, linewidth=width * line.kept)
    for places, face in ((made, colour), (read, plain)):
        for y in places:
            ax.plot([line.lane, layers], [y, y], color=colour, linewidth=0.8, zorder=1)
            ax.plot(line.lane, y, "o", color=colour, markerfacecolor=face, markersize=5, zorder=3)


def _write(
    ax: Any, at: tuple[int, int], row: _Row, picture: _Picture, ink: str, colours: list[str]
) -> None:
    """Writes name, shape and what is made, in columns, to the right of a layer."""
    start = 2
    for column, text in enumerate(row.texts):
        colour = ink
        if column == 2 and row.makes:
            colour = colours[picture.lines[row.makes[0]].rank % len(colours)]
        ax.annotate(
            text,
            at,
            xytext=(start * _LETTER * _POINTS, 0),
            textcoords="offset points",
            va="center_baseline",
            family="monospace",
            fontsize=_POINTS,
            color=colour,
            alpha=0.65 if column == 1 else 1,
            annotation_clip=False,
        )
        start += 2 + max(len(other.texts[column]) for other in picture.rows)


def _amount(coupling: Coupling, index: int, removed: np.ndarray) -> str:
    """Returns how many units of a family there are, or are left."""
    family = coupling.families[index]
    n, kept = len(family), len(family) - int(removed[family.units].sum())
    kind = family.kind.replace("_", " ") + ("" if n == 1 else "s")
    return f"{n} {kind}" if kept == n else f"{kept} of {n} {kind}"


def _shape(coupling: Coupling, path: str, removed: np.ndarray) -> str:
    """Returns the shape of a parameter; of axes that are cut, both sizes."""
    leaf = coupling.leaves[path]
    sizes = []
    for axis, size in enumerate(leaf.shape):
        kept = leaf.kept(axis, removed)
        if kept is None:
            sizes.append(str(size))
        else:
            sizes.append(f"{size}→{int(kept.reshape(-1, size)[0].sum())}")
    return " × ".join(sizes)


def _without_common_start(names: list[str]) -> list[str]:
    """Returns names without the parts that all of them begin with."""
    parts = [name.split(".") for name in names]
    while parts and all(len(p) > 1 for p in parts) and len({p[0] for p in parts}) == 1:
        parts = [p[1:] for p in parts]
    return [".".join(p) for p in parts]


def _layer(path: str) -> str:
    return path.rpartition(".")[0] or path
