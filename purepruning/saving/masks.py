"""Masks in files. Here and in :mod:`purepruning.saving.states` the library reads and writes.

These two stand at the edge. Nothing in the library imports them, and they add nothing to what masks
and states are; they are here, and not with the caller, because a file must mean the same to
everybody who opens it, in either framework.

The format is one safetensors file, which holds numbers and text and can execute nothing. Every
mask is a ``uint8`` tensor named by its parameter's path: the mask's elements in C order, eight to a
byte, the first in the lowest bit. The metadata entry ``purepruning`` is a JSON object with
``format`` (``"masks"``), ``format_version``, ``library_version`` and, for every path in ``masks``,
its ``mask_shape``, ``param_shape`` and the ``crc32`` of its bytes.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from purepruning.arguments import missing, shown
from purepruning.arrays import is_array, is_concrete, is_torch, jax_array, namespace
from purepruning.masks import by_path, to_numpy
from purepruning.saving.files import (
    BROKEN,
    check_here,
    check_sum,
    checksum,
    file_path,
    read_whole,
    unreadable,
    write_whole,
)
from purepruning.trees import flatten
from purepruning.types import Masks, Params
from purepruning.versions import __version__

FORMAT_VERSION = 1


def save_masks(path: str | os.PathLike[str], masks: Masks, params: Params) -> None:
    """Writes masks to a file, one bit per mask element; returns nothing.

    ``params`` is what the masks belong to; only its names and shapes are written. The file appears
    whole or not at all: it is written under another name in the same folder and then renamed, over
    an older file if there is one. The same masks give the same bytes, in either framework.

    Raises:
        KeyError, ValueError, TypeError: the masks do not fit ``params``, as in
            :func:`purepruning.apply_masks`; are not known (under ``jit``); or this process has only
            a part of one.
        OSError: the file cannot be written.

    >>> import tempfile, jax.numpy as jnp
    >>> params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
    >>> masks = {"w": jnp.array([[True, False, True]]), "b": None}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_masks(folder + "/masks.safetensors", masks, params)
    ...     load_masks(folder + "/masks.safetensors", params)
    {'b': None, 'w': Array([[ True, False,  True]], dtype=bool)}
    """
    target, leaves = file_path(path, "save_masks"), flatten(params).leaves
    if "__metadata__" in leaves:
        raise ValueError(
            "save_masks: a parameter called '__metadata__' has no place in a safetensors file; "
            "rename it"
        )
    named = by_path(masks, params)
    for name, mask in named.items():
        if is_concrete(mask):
            check_here(f"save_masks: the mask of {name!r}", mask)
    keep = {name: to_numpy(mask) for name, mask in named.items()}
    bits = {name: np.packbits(mask.reshape(-1), bitorder="little") for name, mask in keep.items()}
    header = {
        "format": "masks",
        "format_version": FORMAT_VERSION,
        "library_version": __version__,
        "masks": {
            name: {
                "mask_shape": list(mask.shape),
                "param_shape": list(leaves[name].shape),
                "crc32": checksum(bits[name]),
            }
            for name, mask in keep.items()
        },
    }
    # One metadata entry, since safetensors writes several in any order.
    metadata = {"purepruning": json.dumps(header, sort_keys=True)}
    write_whole(target, safetensors.numpy.save(bits, metadata=metadata))


def load_masks(path: str | os.PathLike[str], params: Params) -> Masks:
    """Returns the masks in a file, as a tree like ``params`` and in its framework.

    A mask saved in one framework loads into the other where names and shapes are the same.
    Parameters that the file does not name have no mask; torch masks lie on their parameter's
    device.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file was not written by :func:`save_masks`, or is damaged; or a parameter
            has another shape than the one its mask was saved for.
        KeyError: the file has a mask for a parameter that is not in ``params``.
    """
    source, tree = file_path(path, "load_masks"), flatten(params)
    masks = {}
    for name, (mask, shape) in _read(source).items():
        if name not in tree.leaves:
            message = f"{path}: a mask is for {name!r}, which is no parameter here"
            raise KeyError(missing(message, name, tree.leaves))
        leaf = tree.leaves[name]
        if not is_array(leaf):
            raise TypeError(f"{path}: the parameter {name!r} is no array, but {shown(leaf)}")
        if tuple(leaf.shape) != shape:
            raise ValueError(
                f"{path}: the mask of {name!r} was saved for a parameter of shape {shape}, but "
                f"here it has shape {tuple(leaf.shape)}"
            )
        masks[name] = _like(mask, leaf)
    return tree.rebuild(by_path(masks, tree.leaves))


def _like(mask: np.ndarray, leaf: Any) -> Any:
    if not is_torch(leaf):
        return jax_array(mask)
    return namespace(leaf).asarray(mask, device=leaf.device)


def _read(path: Path) -> dict[str, tuple[np.ndarray, tuple[int, ...]]]:
    """Returns mask and parameter shape by name, everything checked."""
    header, bits = read_whole(path, "masks", FORMAT_VERSION)
    try:
        if header["masks"].keys() != bits.keys():
            raise ValueError("header and contents name different masks")
        return {name: _unpack(name, bits[name], header["masks"][name]) for name in sorted(bits)}
    except BROKEN as error:
        raise unreadable(path, "masks", error) from error


def _unpack(name: str, bits: np.ndarray, row: dict) -> tuple[np.ndarray, tuple[int, ...]]:
    shape, param_shape = (tuple(row[key]) for key in ("mask_shape", "param_shape"))
    if not all(type(n) is int and n >= 0 for n in (*shape, *param_shape)):
        raise ValueError(f"{name!r}: shapes {shape} and {param_shape}")
    size = math.prod(shape)
    if bits.dtype != np.uint8 or bits.shape != (-(-size // 8),):
        raise ValueError(f"{name!r}: {bits.dtype} of shape {bits.shape} for a mask of {shape}")
    check_sum(name, bits, row)
    flat = np.unpackbits(bits, count=size, bitorder="little")
    return flat.astype(bool).reshape(shape), param_shape
