"""Plans in files: what stays of every parameter, to shrink another checkpoint later.

The format is one safetensors file: index arrays, and JSON in its metadata.
"""

from __future__ import annotations

import json
import os

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from purepruning.coupling.plan import Cut, Plan

_FORMAT = "purepruning plan 1"


def save_plan(path: str | os.PathLike[str], plan: Plan) -> None:
    """Writes a plan to a file; returns nothing.

    Args:
        path: the file.
        plan: such as ``report.plan`` of what :func:`purepruning.shrink` returned.

    Raises:
        OSError: the file cannot be written.
    """
    arrays, entries = {}, {}
    for name, cuts in plan.cuts.items():
        entries[name] = [{"axis": c.axis, "by": c.by} for c in cuts]
        for c in cuts:
            arrays[f"{name}:{c.axis}"] = np.ascontiguousarray(c.positions, np.int64)
    arrays[":removed"] = np.asarray(plan.removed, np.int64)
    words = {"shapes": plan.shapes, "cuts": entries}
    save_file(arrays, path, {"format": _FORMAT, "plan": json.dumps(words)})


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """Returns a plan that was saved.

    Raises:
        ValueError: the file holds no plan.
    """
    try:
        return _read(path)
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{str(path)!r} holds no plan of this library: {error}") from None


def _read(path: str | os.PathLike[str]) -> Plan:
    with safe_open(path, "np") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"{str(path)!r} holds no plan of this library")
        words = json.loads(metadata["plan"])
        cuts = {
            name: tuple(
                Cut(e["axis"], file.get_tensor(f"{name}:{e['axis']}"), e["by"]) for e in entries
            )
            for name, entries in words["cuts"].items()
        }
        removed = tuple(int(i) for i in file.get_tensor(":removed"))
    shapes = {name: tuple(shape) for name, shape in words["shapes"].items()}
    for name, found in cuts.items():
        for cut in found:
            size, kept = shapes[name][cut.axis], cut.positions
            if kept.size and not 0 <= kept.min() <= kept.max() < size:
                raise ValueError(
                    f"{str(path)!r} holds no plan: axis {cut.axis} of {name!r} has {size} "
                    f"positions, and would keep {kept.max()}"
                )
    return Plan(shapes, cuts, removed)
