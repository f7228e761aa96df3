"""Masks in few bytes: which elements stay, in the smallest of three layouts, and back.

``"bits"``
    A bit for each element in C order, eight to a byte, the first in the lowest bit.
``"bytes"``
    The same without the bytes that are zero: first a bit for each byte of the bit mask, whether it
    is stored, and then those bytes. Smaller where less than about 15 % of the elements stay.
``"nm"``
    For masks that keep ``keep`` of every ``of`` elements along ``axis``: the number of each group's
    pattern among the ``of choose keep`` that there are, in as few bits as hold the largest. The
    patterns are counted in the order of the integers whose bit ``i`` says whether element ``i`` of
    the group stays; the groups are those of the mask in C order with the elements of a group moved
    to the last axis. 2:4 takes 3 bits for 4 elements.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

#: Sizes of the groups that are looked for. Up to 16, so that a pattern is a number of 16 bits.
_SIZES = (2, 4, 8, 16)

_GROUPS = 2**18  # groups that are packed at a time; a multiple of 8, so that parts end with a byte


def encode(mask: np.ndarray) -> tuple[dict[str, Any], np.ndarray]:
    """Returns what :func:`decode` needs beside the shape, and the bytes."""
    groups = _groups(mask)
    if groups is not None:
        return {"layout": "nm", **groups}, _encode_groups(mask, **groups)
    bits = np.packbits(mask.reshape(-1), bitorder="little")
    stored = bits != 0
    if np.count_nonzero(stored) + -(-bits.size // 8) < bits.size:
        packed = np.packbits(stored, bitorder="little")
        return {"layout": "bytes"}, np.concatenate([packed, bits[stored]])
    return {"layout": "bits"}, bits


def decode(row: dict[str, Any], content: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the mask that :func:`encode` was given.

    Raises:
        ValueError, KeyError, TypeError: the bytes are no mask of this shape.
    """
    if row["layout"] == "nm":
        return _decode_groups(content, shape, row["keep"], row["of"], row["axis"])
    size = math.prod(shape)
    if row["layout"] == "bytes":
        content = _with_zero_bytes(content, -(-size // 8))
    elif row["layout"] != "bits":
        raise ValueError(f"positions in the layout {row['layout']!r}, which is not known")
    return _unpack(content, size).reshape(shape)


def _unpack(content: np.ndarray, count: int) -> np.ndarray:
    """Returns so many bits as booleans."""
    if content.shape != (-(-count // 8),):
        raise ValueError(f"{content.size} bytes for {count} bits")
    if count % 8 and content[-1] >> (count % 8):
        raise ValueError(f"a bit is set behind the {count} that there are")
    return np.unpackbits(content, count=count, bitorder="little").view(bool)


def _with_zero_bytes(content: np.ndarray, n_bytes: int) -> np.ndarray:
    """Returns a bit mask of so many bytes from the ``"bytes"`` layout."""
    head = -(-n_bytes // 8)
    stored = _unpack(content[:head], n_bytes)
    rest = content[head:]
    if rest.size != np.count_nonzero(stored) or not rest.all():
        raise ValueError(f"{rest.size} bytes are not the {np.count_nonzero(stored)} marked ones")
    bits = np.zeros(n_bytes, np.uint8)
    bits[stored] = rest
    return bits


def _groups(mask: np.ndarray) -> dict[str, int] | None:
    """Returns ``keep``, ``of`` and ``axis`` of an N:M mask with the smallest groups, or None."""
    kept = int(np.count_nonzero(mask))
    for of in _SIZES:
        keep, rest = divmod(kept * of, max(mask.size, 1))
        if rest or not 0 < keep < of:
            continue
        for axis in reversed(range(mask.ndim)):
            if mask.shape[axis] % of == 0 and _has_groups(mask, keep, of, axis):
                return {"keep": keep, "of": of, "axis": axis}
    return None


def _has_groups(mask: np.ndarray, keep: int, of: int, axis: int) -> bool:
    first = mask[(slice(None),) * axis + (slice(of),)]  # most others end here
    for part in (first, mask):
        groups = _split(part.view(np.uint8), of, axis)
        kept = np.zeros(groups.shape[:-1], np.uint8)
        for i in range(of):  # sums over an axis this short are slow in NumPy
            kept += groups[..., i]
        if not (kept == keep).all():
            return False
    return True


def _split(mask: np.ndarray, of: int, axis: int) -> np.ndarray:
    """Returns a view with the elements of each group on the last axis."""
    shape = (*mask.shape[:axis], mask.shape[axis] // of, of, *mask.shape[axis + 1 :])
    return np.moveaxis(mask.reshape(shape), axis + 1, -1)


@functools.cache
def _patterns(keep: int, of: int) -> np.ndarray:
    """Returns all numbers of ``of`` bits of which ``keep`` are set, in ascending order."""
    numbers = np.arange(2**of, dtype=np.uint32)
    return numbers[np.bitwise_count(numbers) == keep].astype(np.uint16)


def _width(keep: int, of: int) -> int:
    return (math.comb(of, keep) - 1).bit_length()


def _encode_groups(mask: np.ndarray, keep: int, of: int, axis: int) -> np.ndarray:
    groups, width = _split(mask.view(np.uint8), of, axis), _width(keep, of)
    pattern = np.zeros(groups.shape[:-1], np.uint8 if of <= 8 else np.uint16)
    for i in range(of):
        pattern |= groups[..., i].astype(pattern.dtype) << i
    number_of = np.zeros(2**of, np.uint16)
    number_of[_patterns(keep, of)] = np.arange(math.comb(of, keep))
    patterns, parts = pattern.reshape(-1), []
    for start in range(0, patterns.size, _GROUPS):
        number = number_of[patterns[start : start + _GROUPS]]
        bits = np.empty((number.size, width), np.uint8)
        for i in range(width):
            bits[:, i] = number >> i & 1
        parts.append(np.packbits(bits.reshape(-1), bitorder="little"))
    return np.concatenate(parts)


def _decode_groups(
    content: np.ndarray, shape: tuple[int, ...], keep: int, of: int, axis: int
) -> np.ndarray:
    sizes = [type(n) is int for n in (keep, of, axis)]
    if not all(sizes) or of not in _SIZES or not 0 < keep < of or not 0 <= axis < len(shape):
        raise ValueError(f"positions of {keep!r} of {of!r} along axis {axis!r} of {shape}")
    if shape[axis] % of:
        raise ValueError(f"axis {axis} of {shape} has no groups of {of}")
    mask = np.empty(shape, bool)
    groups = _split(mask, of, axis)
    pattern = np.concatenate([*_read_patterns(content, mask.size // of, keep, of)])
    pattern = pattern.reshape(groups.shape[:-1])
    for i in range(of):
        groups[..., i] = pattern & (1 << i)
    return mask


def _read_patterns(content: np.ndarray, n: int, keep: int, of: int) -> Iterator[np.ndarray]:
    """Yields the patterns of ``n`` groups, some at a time."""
    width, patterns = _width(keep, of), _patterns(keep, of)
    if content.shape != (-(-n * width // 8),):
        raise ValueError(f"{content.size} bytes for {n} groups of {width} bits")
    for start in range(0, n, _GROUPS):
        size = min(_GROUPS, n - start)
        at = start * width // 8
        bits = _unpack(content[at : at + -(-size * width // 8)], size * width).reshape(size, width)
        number = np.zeros(size, np.uint16)
        for i in range(width):
            number |= bits[:, i].astype(np.uint16) << i
        if number.max() >= len(patterns):
            raise ValueError(
                f"a group has pattern {number.max()}, but {keep} of {of} has {len(patterns)}"
            )
        yield patterns[number]
