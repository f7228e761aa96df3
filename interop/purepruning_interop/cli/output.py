"""What commands print: tables and text on standard output, progress on standard error."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

#: Where output is no terminal, nothing is cut off or wrapped.
_WIDE = 400


def console() -> Console:
    """Returns the console of standard output."""
    if sys.stdout.isatty():
        return Console(highlight=False)
    return Console(width=_WIDE, highlight=False)


def show_json(value: Any) -> None:
    """Prints one JSON object."""
    print(json.dumps(value, indent=2, allow_nan=False))


def table(columns: Sequence[tuple[str, bool]], rows: Sequence[Sequence[Any]]) -> Table:
    """Returns a table; a column is its name and whether it stands to the right.

    Cells are text, whatever brackets they have; of a row that ends in None the text is dim.
    """
    made = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for i, (name, right) in enumerate(columns):
        made.add_column(
            name, justify="right" if right else "left", overflow="fold", no_wrap=bool(i)
        )
    for row in rows:
        dim = len(row) > len(columns) and row[-1] is None
        cells = [Text(str(cell)) for cell in row[: len(columns)]]
        made.add_row(*cells, style="dim" if dim else "")
    return made


def number(value: float) -> str:
    """Returns a count in three digits: ``11.7M``.

    >>> number(11_689_512), number(84), number(999_999)
    ('11.7M', '84', '1.00M')
    """
    size = float(value)
    if size < 1000:
        return f"{value:g}"
    for unit in "KMGT":
        size /= 1000
        if size < 999.5 or unit == "T":
            digits = 2 if size < 9.995 else 1 if size < 99.95 else 0
            return f"{size:.{digits}f}{unit}"
    raise AssertionError


def size(n: int) -> str:
    """Returns bytes in binary units: ``44.6 MiB``."""
    value, unit = float(n), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{n} B" if unit == "B" else f"{value:.1f} {unit}"


def percent(share: float) -> str:
    """Returns a share as a percentage; 100 and 0 only where it is all, or nothing."""
    if 0 < share < 0.0005:
        return "<0.1%"
    if 0.9995 <= share < 1:
        return ">99.9%"
    return f"{100 * share:.1f}%"


@contextlib.contextmanager
def progress(wanted: bool = True) -> Iterator[Progress]:
    """Gives a progress display on standard error; silent where that is no terminal."""
    err = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    shown = wanted and err.is_terminal
    with Progress(*columns, console=err, transient=True, disable=not shown) as bar:
        yield bar


def times(shape: tuple[int, ...]) -> str:
    """Returns a shape as text: ``64x3x7x7``."""
    return "x".join(map(str, shape)) or "scalar"


def some(names: Iterable[str], limit: int = 4) -> str:
    """Returns the first of several names."""
    names = list(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def escaped(text: str) -> str:
    """Returns text as rich's markup shows it."""
    return text.replace("[", r"\[")
