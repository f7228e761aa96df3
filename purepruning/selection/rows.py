"""The lowest of many rows of keys at once."""

from __future__ import annotations

from typing import Any

import numpy as np

from purepruning.arrays import int32, is_numpy
from purepruning.selection.keys import HIGHEST
from purepruning.selection.problem import kernel_of

#: Rows of so few units in all are searched together, however long each is.
_FEW = 1 << 18


def lowest_of_rows(xp: Any, keys: list[Any], counts: Any) -> Any:
    """Returns the ``counts[i]`` lowest of row i of all ``keys``, in one vector of their units."""
    if is_numpy(counts):
        ends = np.cumsum([k.shape[0] for k in keys])[:-1]
        rows = zip(keys, np.split(counts, ends), strict=True)
        return xp.concat([xp.reshape(kernel_of(k).lowest(k, n, None), (-1,)) for k, n in rows])
    widths = [k.shape[1] for k in keys]
    row_widths = np.repeat(widths, [k.shape[0] for k in keys])
    starts = np.cumsum(row_widths) - row_widths
    pruned, start = [], 0
    place = np.zeros(int(np.sum(row_widths)), np.int64)
    for group in _similar(row_widths):
        # Rows of similar length together: what is filled in ranks last, behind NaN, and stays.
        longest = max(group)
        rows = xp.concat([_filled(xp, k, longest) for k in keys if k.shape[1] in group])
        which = np.flatnonzero(np.isin(row_widths, list(group)))
        few = xp.take(counts, int32(xp, which, counts))
        pruned.append(xp.reshape(kernel_of(rows).lowest(rows, few, None), (-1,)))
        for width in group:
            mine, along = np.flatnonzero(row_widths[which] == width)[:, None], np.arange(width)
            place[starts[which[mine]] + along] = start + mine * longest + along
        start += len(which) * longest
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


def _filled(xp: Any, keys: Any, width: int) -> Any:
    """Returns rows of the given width, with the highest of all keys behind their own."""
    more = width - keys.shape[1]
    if not more:
        return keys
    return xp.concat(
        [keys, xp.broadcast_to(xp.full_like(keys[:, :1], HIGHEST), (keys.shape[0], more))], axis=1
    )
