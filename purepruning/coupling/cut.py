"""Cutting one array by a plan, in either framework."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from purepruning.namespace import array_like, by_numpy, is_on_host, namespace


def cut_array(array: Any, cuts: Sequence[Any]) -> Any:
    """Returns what stays of an array; a new array wherever something goes."""
    if is_on_host(array):
        return by_numpy(lambda x: cut_array(x, cuts), array)
    # What differs from block to block is cut first, while the blocks still lie where they were.
    for cut in sorted(cuts, key=lambda c: c.by is None):
        if cut.by is None:
            array = take(array, cut.positions, cut.axis)
        else:
            array = _cut_blocks(array, cut.positions, cut.axis, cut.by)
    return array


def take(array: Any, positions: np.ndarray, axis: int) -> Any:
    """Returns the given positions of an axis."""
    if isinstance(array, np.ndarray):
        return np.take(array, positions, axis)
    return namespace(array).take(array, array_like(array, positions), axis=axis)


def _cut_blocks(array: Any, positions: np.ndarray, axis: int, by: int) -> Any:
    size = array.shape[by] // len(positions)
    parts = []
    xp = np if isinstance(array, np.ndarray) else namespace(array)
    for block, rows in enumerate(positions):
        index = [slice(None)] * len(array.shape)
        index[by] = slice(block * size, (block + 1) * size)
        parts.append(take(array[tuple(index)], rows, axis))
    return np.concatenate(parts, by) if xp is np else xp.concat(parts, axis=by)
