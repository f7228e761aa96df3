"""The lowest of many rows of keys at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from purepruning.arrays import int32, iota, is_numpy
from purepruning.selection.keys import HIGHEST
from purepruning.selection.problem import kernel_of

#: Rows of so few units in all are searched together, however long each is.
_FEW = 1 << 18


def lowest_of_rows(xp: Any, keys: Any, widths: Sequence[int], counts: Any) -> Any:
    """Returns the ``counts[i]`` lowest keys of row i, for a vector of keys, as booleans.

    ``keys`` holds one row after the other; row i has ``widths[i]`` of them.
    """
    if is_numpy(keys):
        rows = zip(np.split(keys, np.cumsum(widths)[:-1]), counts[:, None], strict=True)
        return xp.concat([kernel_of(row).lowest(row[None, :], n, None)[0] for row, n in rows])
    row_widths = np.asarray(widths)
    starts = np.cumsum(row_widths) - row_widths
    pruned, done, place = [], 0, np.zeros(int(row_widths.sum()), np.int64)
    # What rows are filled up with ranks last, behind NaN, and stays.
    filled = xp.concat([keys, xp.full_like(keys[:1], HIGHEST)])
    for group in _similar(row_widths):
        # Rows of similar length together.
        which = np.flatnonzero(np.isin(row_widths, list(group)))
        longest, along = max(group), iota(xp, max(group), counts)[None, :]
        first, width = (int32(xp, x[which], counts)[:, None] for x in (starts, row_widths))
        at = xp.where(along < width, first + along, keys.shape[0])
        rows = xp.reshape(xp.take(filled, xp.reshape(at, (-1,))), (-1, longest))
        few = xp.take(counts, int32(xp, which, counts))
        pruned.append(xp.reshape(kernel_of(rows).lowest(rows, few, None), (-1,)))
        for i in which:
            place[starts[i] : starts[i] + row_widths[i]] = done + np.arange(row_widths[i])
            done += longest
    return xp.take(xp.concat(pruned), int32(xp, place, counts))


def _similar(row_widths: np.ndarray) -> list[set[int]]:
    """Returns which rows are searched together: compiling one search takes as long as running many.

    Rows are filled up to the longest of their group, four times at most, where that is little.
    """
    groups: list[set[int]] = []
    for width in sorted(set(row_widths.tolist()), reverse=True):
        last = groups[-1] if groups else set()
        rows = np.isin(row_widths, [*last, width]).sum()
        if last and (max(last) <= 4 * width or rows * max(last) <= _FEW):
            last.add(width)
        else:
            groups.append({width})
    return groups
