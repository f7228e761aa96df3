"""Pruned parameters in files that are smaller: the weights that stay, and where they are.

The format is one safetensors file, which holds numbers and text and can execute nothing. A
parameter without a mask is stored whole, by its path. One that has a mask is two tensors: its kept
weights in C order, ``<path>:values``, of its own dtype, and the mask in bytes,
``<path>:positions``, in the smallest of the layouts of :mod:`purepruning.saving.positions`. The
last tensor, ``:crc32``, has the checksums of all others, four bytes each, little endian, in the
order of the file's header. The metadata entry ``purepruning`` is a JSON object with ``format``
(``"sparse"``), ``format_version``, ``library_version``, and in ``params`` for every path the
``shape``, and for those with a mask the ``mask_shape`` and the layout of the ``positions``.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from purepruning.arguments import missing, shown
from purepruning.arrays import (
    as_numpy,
    framework_of,
    has_values,
    in_framework,
    is_array,
    is_concrete,
    is_torch,
)
from purepruning.masks import by_path, to_numpy
from purepruning.saving.files import BROKEN, file_path, read_header, unreadable
from purepruning.saving.positions import decode, encode
from purepruning.saving.tensors import DTYPES, Stored, nbytes, read_shards, write_tensors
from purepruning.trees import flatten
from purepruning.types import Masks, Params
from purepruning.versions import __version__

FORMAT_VERSION = 1

_VALUES, _POSITIONS, _CHECKSUMS = ":values", ":positions", ":crc32"
_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


class PrunedParams(NamedTuple):
    """What a file of pruned parameters holds.

    Attributes:
        params: a tree like the one that was given, in its framework; zero where pruned.
        masks: its masks.
    """

    params: Params
    masks: Masks


class _Packed(NamedTuple):
    """A parameter with a mask: the row of the header, and the bytes of its positions."""

    row: dict[str, Any]
    positions: np.ndarray
    kept: int


def save_sparse(path: str | os.PathLike[str], params: Params, masks: Masks) -> None:
    """Writes the weights that masks keep, and where they are, to a file; returns nothing.

    What :func:`load_sparse` returns is ``apply_masks(params, masks)``, with the masks: kept weights
    bit for bit, the payload of a NaN and the sign of a zero included, and +0 where pruned, whatever
    was there. A parameter without a mask is written whole. One with a mask takes the bytes of its
    kept weights and at most a bit for every element of the mask: 3 bits for 4 weights of 2:4, and
    half a bit a weight where one in twenty stays.

    The file appears whole or not at all, over an older one if there is one. Parameters are
    converted one at a time, so that those of a mapped file are never in memory together. The same
    arrays and masks give the same bytes, in either framework.

    Args:
        path: the file.
        params: a tree of arrays, of JAX, torch or NumPy.
        masks: a tree of masks, of which each broadcasts to its parameter.

    Raises:
        KeyError, ValueError, TypeError: the masks do not fit ``params``, as in
            :func:`purepruning.apply_masks`; a parameter is no array, is not known (under ``jit``),
            or is of a dtype that safetensors has not; or two tensors would have one name.
        OSError: the file cannot be written.

    >>> import tempfile, jax.numpy as jnp
    >>> params = {"w": jnp.array([[0.5, -1.0, 2.0]]), "b": jnp.ones(1)}
    >>> masks = {"w": jnp.array([[True, False, True]]), "b": None}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_sparse(folder + "/model.safetensors", params, masks)
    ...     found = load_sparse(folder + "/model.safetensors", params)
    >>> found.params["w"].tolist(), found.masks["w"].tolist(), found.masks["b"]
    ([[0.5, 0.0, 2.0]], [[True, False, True]], None)
    """
    target, leaves = file_path(path, "save_sparse"), flatten(params).leaves
    for name, x in leaves.items():
        _check_savable(name, x)
    keep = {name: to_numpy(mask) for name, mask in by_path(masks, params).items()}
    packed = {name: _packed(leaves[name], mask) for name, mask in keep.items()}
    sums: list[bytes] = []
    tensors: dict[str, Any] = {}
    for name, x in leaves.items():
        dtype = _dtype_of(x)
        if name not in packed:
            _add(tensors, name, dtype, tuple(x.shape), _checked(_whole(x), sums))
            continue
        _, positions, kept = packed[name]
        values = _checked(_kept(x, keep[name]), sums)
        _add(tensors, name + _VALUES, dtype, (kept,), values)
        _add(
            tensors,
            name + _POSITIONS,
            "U8",
            positions.shape,
            _checked(iter([positions.data]), sums),
        )
    # The largest elements first, so that all are aligned; written, and summed, in this order.
    tensors = dict(sorted(tensors.items(), key=lambda item: (-nbytes(item[1][0], ()), item[0])))
    _add(tensors, _CHECKSUMS, "U8", (4 * len(tensors),), _later(sums))
    rows = {
        name: packed[name].row if name in packed else {"shape": list(x.shape)}
        for name, x in leaves.items()
    }
    header = {
        "format": "sparse",
        "format_version": FORMAT_VERSION,
        "library_version": __version__,
        "params": rows,
    }
    write_tensors(target, tensors, {"purepruning": json.dumps(header, sort_keys=True)})


def load_sparse(path: str | os.PathLike[str], params: Params) -> PrunedParams:
    """Returns what :func:`save_sparse` wrote, and the masks.

    Args:
        path: the file.
        params: a tree of the same structure, shapes and dtypes, for names and framework; shapes
            will do (``jax.ShapeDtypeStruct``, or tensors on torch's meta device, in whose place
            there are tensors on the CPU then). Tensors come back on the device of theirs.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file was not written by :func:`save_sparse`, or is damaged; or a parameter
            has another shape or dtype than in ``params``.
        KeyError: the file and ``params`` do not name the same parameters.
        TypeError: ``params`` hold something that is no array.
    """
    source, tree = file_path(path, "load_sparse"), flatten(params)
    header = read_header(source, "sparse", FORMAT_VERSION)
    try:
        rows, tensors = dict(header["params"]), read_shards(source)[0].tensors
        _check_tensors(rows, tensors)
    except BROKEN as error:
        raise unreadable(source, "sparse", error) from error
    _check_names(source, rows, tree.leaves)
    values, masks = {}, {}
    for name, like in tree.leaves.items():
        _check_fits(source, name, rows[name], tensors, like)
        try:
            value, mask = _read(name, rows[name], tensors)
        except BROKEN as error:
            raise unreadable(source, "sparse", error) from error
        values[name] = _handed_back(like, value)
        if mask is not None:
            masks[name] = _handed_back(like, mask)
    return PrunedParams(tree.rebuild(values), tree.rebuild(masks))


def _check_savable(name: str, x: Any) -> None:
    if not (is_array(x) and has_values(x) and is_concrete(x)):
        raise TypeError(
            f"save_sparse: the parameter {name!r} must be a known array, got {shown(x)}; save "
            "outside of jit and vmap, and give arrays only"
        )
    _dtype_of(x)
    if name in ("__metadata__", _CHECKSUMS):
        raise ValueError(
            f"save_sparse: a parameter called {name!r} has no place in the file; rename it"
        )


def _dtype_of(x: Any) -> str:
    """Returns safetensors' name of a dtype."""
    name = str(x.dtype).removeprefix("torch.")
    found = {str(dtype): stored for dtype, stored in _NAMES.items()}.get(name)
    if found is None:
        raise TypeError(
            f"save_sparse: an array of dtype {name}, which safetensors has not; convert it"
        )
    return found


def _add(
    tensors: dict[str, Any], name: str, dtype: str, shape: tuple[int, ...], pieces: Any
) -> None:
    if name in tensors:
        raise ValueError(f"save_sparse: two tensors would be called {name!r}; rename a parameter")
    tensors[name] = (dtype, shape, nbytes(dtype, shape), pieces)


def _packed(x: Any, mask: np.ndarray) -> _Packed:
    layout, positions = encode(mask)
    row = {"shape": list(x.shape), "mask_shape": list(mask.shape), "positions": layout}
    return _Packed(row, positions, _n_kept(mask, tuple(x.shape)))


def _n_kept(mask: np.ndarray, shape: tuple[int, ...]) -> int:
    """Returns how many weights a mask keeps of a parameter to which it broadcasts."""
    return int(np.count_nonzero(mask)) * (math.prod(shape) // max(mask.size, 1))


def _on_host(x: Any) -> np.ndarray:
    """Returns the bits of an array, a vector of unsigned integers."""
    array = as_numpy(x.detach().cpu()) if is_torch(x) else np.asarray(x)
    return np.ascontiguousarray(array).reshape(-1).view(f"u{array.dtype.itemsize}")


def _whole(x: Any) -> Iterator[Any]:
    yield _on_host(x).view(np.uint8).data


def _kept(x: Any, mask: np.ndarray) -> Iterator[Any]:
    whole = np.broadcast_to(mask, tuple(x.shape)).reshape(-1)
    yield _on_host(x)[whole].view(np.uint8).data


def _checked(pieces: Iterator[Any], sums: list[bytes]) -> Iterator[Any]:
    """Yields the pieces of a tensor, and then adds their checksum."""
    crc = 0
    for piece in pieces:
        crc = zlib.crc32(piece, crc)
        yield piece
    sums.append(crc.to_bytes(4, "little"))


def _later(sums: list[bytes]) -> Iterator[bytes]:
    yield b"".join(sums)


def _check_tensors(rows: dict[str, Any], tensors: dict[str, Stored]) -> None:
    """Raises ValueError where the header's parameters are not those of the file's tensors."""
    expected = {_CHECKSUMS}
    for name, row in rows.items():
        expected |= {name + _VALUES, name + _POSITIONS} if "mask_shape" in row else {name}
        for key in ("shape", "mask_shape"):
            if not all(type(n) is int and n >= 0 for n in row.get(key, ())):
                raise ValueError(f"{name!r}: {key} {row[key]}")
    if expected != tensors.keys():
        raise ValueError("header and contents name different parameters")
    n_bytes = tensors[_CHECKSUMS].stop - tensors[_CHECKSUMS].start
    if n_bytes != 4 * (len(tensors) - 1):
        raise ValueError(f"{n_bytes} bytes of checksums for {len(tensors) - 1} tensors")


def _checked_array(tensors: dict[str, Stored], name: str) -> np.ndarray:
    """Returns a tensor whose contents agree with their checksum."""
    array = np.array(tensors[name].array())
    at = 4 * [n for n in tensors if n != _CHECKSUMS].index(name)
    expected = tensors[_CHECKSUMS].array().tobytes()[at : at + 4]
    if zlib.crc32(array.reshape(-1).view(np.uint8).data).to_bytes(4, "little") != expected:
        raise ValueError(f"{name!r}: the contents do not agree with their checksum")
    return array


def _check_names(path: Path, rows: dict[str, Any], leaves: dict[str, Any]) -> None:
    for name in leaves:
        if name not in rows:
            raise KeyError(missing(f"load_sparse: {path} has no parameter {name!r}", name, rows))
    for name in rows:
        if name not in leaves:
            message = f"load_sparse: {path} has a parameter {name!r}, and params have none"
            raise KeyError(missing(message, name, leaves))


def _check_fits(
    path: Path, name: str, row: dict[str, Any], tensors: dict[str, Stored], like: Any
) -> None:
    where = f"load_sparse: {path}: the parameter {name!r}"
    if not is_array(like):
        raise TypeError(f"{where} must be an array in params, got {shown(like)}")
    stored = tensors[name + _VALUES] if "mask_shape" in row else tensors[name]
    dtype = str(np.dtype(DTYPES[stored.dtype])) if stored.dtype in DTYPES else stored.dtype
    here = tuple(like.shape), str(like.dtype).removeprefix("torch.")
    there = tuple(row["shape"]), dtype
    for what, one, other in zip(("shape", "dtype"), there, here, strict=True):
        if one != other:
            raise ValueError(
                f"{where} has {what} {one}, that of params {other}; give params of the model that "
                "was saved"
            )
    if framework_of(like) == "jax" and jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(
            f"{where} is of dtype {dtype}, which JAX has not here; set jax_enable_x64, or give "
            "arrays of NumPy"
        )


def _read(
    name: str, row: dict[str, Any], tensors: dict[str, Stored]
) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns a parameter and its mask, whose shape is that of what they are read for."""
    shape = tuple(row["shape"])
    if "mask_shape" not in row:
        if tensors[name].shape != shape:
            raise ValueError(f"{name!r}: shape {tensors[name].shape} instead of {shape}")
        return _checked_array(tensors, name), None
    values, positions = (_checked_array(tensors, name + end) for end in (_VALUES, _POSITIONS))
    mask_shape = tuple(row["mask_shape"])
    if np.broadcast_shapes(mask_shape, shape) != shape or positions.dtype != np.uint8:
        raise ValueError(f"{name!r}: a mask of shape {mask_shape} for {shape}")
    mask = decode(row["positions"], positions, mask_shape)
    if values.shape != (_n_kept(mask, shape),):
        raise ValueError(
            f"{name!r}: {values.shape} values, but the mask keeps {_n_kept(mask, shape)}"
        )
    bits = np.zeros(math.prod(shape), f"u{values.dtype.itemsize}")
    bits[np.broadcast_to(mask, shape).reshape(-1)] = values.view(bits.dtype)
    return bits.view(values.dtype).reshape(shape), mask


def _handed_back(like: Any, x: np.ndarray) -> Any:
    """Returns an array of NumPy in the framework, and in torch on the device, of ``like``."""
    found = in_framework(framework_of(like), x)
    return found.to(like.device) if is_torch(like) and has_values(like) else found
