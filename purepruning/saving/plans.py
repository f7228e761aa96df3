"""Plans in files: what stays of every parameter, to shrink another checkpoint later.

The format is one safetensors file, which holds numbers and text and can execute nothing: the
positions of every cut as an int64 tensor named by its parameter and axis, and the removed units as
``:removed``. The metadata entry ``purepruning`` is a JSON object with ``format`` (``"plan"``),
``format_version``, ``library_version``, the ``shapes`` of all parameters, for every one that is cut
in ``cuts`` its axes, and the ``crc32`` of every tensor in ``tensors``.
"""

from __future__ import annotations

import json
import os

import numpy as np
import safetensors.numpy

from purepruning.arguments import instance
from purepruning.coupling.plan import Cut, Plan
from purepruning.saving.files import (
    BROKEN,
    check_sum,
    checksum,
    file_path,
    read_whole,
    unreadable,
    write_whole,
)
from purepruning.versions import __version__

FORMAT_VERSION = 1
_REMOVED = ":removed"


def save_plan(path: str | os.PathLike[str], plan: Plan) -> None:
    """Writes a plan to a file; returns nothing.

    The file appears whole or not at all, over an older one if there is one. The same plan gives the
    same bytes.

    Args:
        path: the file.
        plan: such as ``report.plan`` of what :func:`purepruning.shrink` returned.

    Raises:
        TypeError: ``plan`` is no plan.
        OSError: the file cannot be written.
    """
    target = file_path(path, "save_plan")
    instance(plan, Plan, "save_plan: plan", "a Plan, such as report.plan of what shrink returned")
    arrays = {_REMOVED: np.asarray(plan.removed, np.int64)}
    for name, cuts in plan.cuts.items():
        for cut in cuts:
            arrays[_tensor(name, cut.axis)] = np.ascontiguousarray(cut.positions, np.int64)
    header = {
        "format": "plan",
        "format_version": FORMAT_VERSION,
        "library_version": __version__,
        "shapes": {name: list(shape) for name, shape in plan.shapes.items()},
        "cuts": {n: [{"axis": c.axis, "by": c.by} for c in cuts] for n, cuts in plan.cuts.items()},
        "tensors": {name: {"crc32": checksum(array)} for name, array in arrays.items()},
    }
    metadata = {"purepruning": json.dumps(header, sort_keys=True)}
    write_whole(target, safetensors.numpy.save(arrays, metadata=metadata))


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """Returns a plan that was saved.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file was not written by :func:`save_plan`, or is damaged.
    """
    source = file_path(path, "load_plan")
    header, arrays = read_whole(source, "plan", FORMAT_VERSION)
    try:
        if header["tensors"].keys() != arrays.keys():
            raise ValueError("header and contents name different tensors")
        for name, array in arrays.items():
            check_sum(name, array, header["tensors"][name])
        shapes = {name: tuple(shape) for name, shape in header["shapes"].items()}
        cuts = {
            name: tuple(Cut(r["axis"], arrays[_tensor(name, r["axis"])], r["by"]) for r in rows)
            for name, rows in header["cuts"].items()
        }
        return Plan(shapes, cuts, tuple(arrays[_REMOVED].tolist()))
    except BROKEN as error:
        raise unreadable(source, "plan", error) from error


def _tensor(name: str, axis: int) -> str:
    return f"{name}:{axis}"
