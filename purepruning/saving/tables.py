"""Cost tables in files, such as latencies measured on a device: text that any tool writes.

The format is CSV with the columns ``resource,unit,device,group,kept,other,other_kept,cost``: what
``kept`` units of ``group`` cost, or with ``other_kept`` units of ``other``, which is empty where a
cost depends on one group alone. A resource has one unit and one device, which are texts for people
and may be empty. Rows are sorted by resource, groups and numbers kept, so that equal tables give
equal files; a file may have them in any order.
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from purepruning.arguments import instance, is_number, shown
from purepruning.saving.files import file_path, write_whole

COLUMNS = ("resource", "unit", "device", "group", "kept", "other", "other_kept", "cost")


class Tables(NamedTuple):
    """What :func:`load_tables` returns.

    Attributes:
        costs: by resource, by group or pair of groups, costs by how many units are kept: the
            ``tables`` of :func:`purepruning.search.problem`.
        units: by resource the unit of its costs.
        devices: by resource where it was measured.
    """

    costs: dict[str, dict[Any, dict[Any, float]]]
    units: dict[str, str]
    devices: dict[str, str]


def save_tables(
    path: str | os.PathLike[str],
    tables: Mapping[str, Mapping[Any, Any]],
    *,
    units: Mapping[str, str] | None = None,
    devices: Mapping[str, str] | None = None,
) -> None:
    """Writes cost tables to a CSV file; returns nothing.

    The file appears whole or not at all, over an older one if there is one.

    Args:
        path: the file.
        tables: by resource, by group or pair of groups, costs: an array with one for every number
            of units kept, from none on, or a mapping from numbers that were measured.
        units: by resource the unit of its costs, such as ``"ms"``.
        devices: by resource where it was measured.

    Raises:
        KeyError: a unit or device of a resource that there is not.
        TypeError, ValueError: a table is none, or holds something that is no finite cost.
        OSError: the file cannot be written.
    """
    target = file_path(path, "save_tables")
    instance(tables, Mapping, "save_tables: tables", "a mapping from resource to costs by group")
    texts = []
    for name, given in (("units", units), ("devices", devices)):
        instance(given or {}, Mapping, f"save_tables: {name}", "texts by resource")
        for resource in given or {}:
            if resource not in tables:
                raise KeyError(
                    f"save_tables: {name} has {resource!r}, and tables {list(tables)}; name one of "
                    "these"
                )
        texts.append(given or {})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for resource in sorted(tables):
        instance(tables[resource], Mapping, f"save_tables: tables[{resource!r}]", "costs by group")
        about = (resource, *(some.get(resource, "") for some in texts))
        rows = [row for key, costs in tables[resource].items() for row in _rows(key, costs)]
        for (group, other), kept, cost in sorted(rows):
            more = (other, kept[1]) if other else ("", "")
            writer.writerow([*about, group, kept[0], *more, repr(cost)])
    write_whole(target, text.getvalue().encode())


def load_tables(path: str | os.PathLike[str]) -> Tables:
    """Returns the cost tables of a CSV file, with the columns that :func:`save_tables` writes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: columns are missing, a row is not as it must be, or one stands there twice.

    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/phone.csv"
    >>> save_tables(path, {"latency": {"conv1": {8: 0.5, 16: 0.75}}}, units={"latency": "ms"})
    >>> load_tables(path).costs
    {'latency': {'conv1': {8: 0.5, 16: 0.75}}}
    """
    source = file_path(path, "load_tables")
    found = Tables({}, {}, {})
    try:
        lines = csv.DictReader(io.StringIO(source.read_text("utf-8-sig")), restval="")
        missing = [name for name in COLUMNS if name not in (lines.fieldnames or ())]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"load_tables: {str(source)!r} is no CSV file: {error}") from error
    if missing:
        raise ValueError(
            f"load_tables: {str(source)!r} has no column {', '.join(missing)}; give it a first "
            f"line with {','.join(COLUMNS)}"
        )
    for line in lines:
        try:
            _add(found, line)
        except (ValueError, csv.Error) as error:
            raise ValueError(
                f"load_tables: {str(source)!r}, line {lines.line_num}: {error}"
            ) from error
    return found


def _rows(key: Any, costs: Any) -> Iterator[tuple[tuple[str, str], tuple[int, ...], float]]:
    """Yields the groups, the numbers kept and the cost of every entry of a table."""
    pair = (key, "") if isinstance(key, str) else key
    names = isinstance(pair, tuple) and all(isinstance(name, str) for name in pair)
    if not names or len(pair) != 2:
        raise TypeError(f"save_tables: keys must be a group or a pair of groups, got {shown(key)}")
    if isinstance(costs, Mapping):
        entries = [(k if isinstance(k, tuple) else (k,), cost) for k, cost in costs.items()]
    else:
        entries = list(np.ndenumerate(np.asarray(costs)))
    wanted = 1 if isinstance(key, str) else 2
    for kept, cost in entries:
        if len(kept) != wanted or not all(isinstance(k, int) and k >= 0 for k in kept):
            raise ValueError(
                f"save_tables: the table of {key!r} must have {wanted} numbers of units kept for "
                f"each cost, got {shown(kept)}"
            )
        if not is_number(cost) or not (math.isfinite(cost) and cost >= 0):
            raise ValueError(
                f"save_tables: costs of {key!r} must be finite and at least 0, got {shown(cost)}"
            )
        yield (pair[0], pair[1]), kept, float(cost)


def _add(found: Tables, line: Mapping[str, str]) -> None:
    """Adds a line of a file; raises ValueError for one that is not as it must be."""
    resource, group, other = line["resource"], line["group"], line["other"]
    if not (resource and group):
        raise ValueError("a resource or a group is missing")
    for known, name in ((found.units, "unit"), (found.devices, "device")):
        if known.setdefault(resource, line[name]) != line[name]:
            raise ValueError(
                f"{resource!r} has the {name}s {known[resource]!r} and {line[name]!r}; give the "
                "second another resource"
            )
    kept: Any = _whole(line["kept"], "kept")
    if other:
        kept = (kept, _whole(line["other_kept"], "other_kept"))
    cost = float(line["cost"])
    if not (math.isfinite(cost) and cost >= 0):
        raise ValueError(f"cost must be finite and at least 0, got {line['cost']!r}")
    table = found.costs.setdefault(resource, {}).setdefault((group, other) if other else group, {})
    if kept in table:
        raise ValueError(f"the cost of {resource!r} for {kept} of {group!r} is given twice")
    table[kept] = cost


def _whole(text: str, name: str) -> int:
    if not text.strip().isdigit():
        raise ValueError(f"{name} must be a whole number, got {text!r}")
    return int(text)
