"""Checkpoints on disk as arrays that are mapped, not read: one safetensors file, or several.

A folder as Hugging Face writes it has an index, ``model.safetensors.index.json``, and shards; or
``model.safetensors`` alone. The format is a header in JSON behind its length in eight bytes, and
then one tensor after another.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from purepruning.arguments import missing
from purepruning.saving.files import BROKEN, write_whole

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"

#: The dtypes of safetensors, by its names.
DTYPES: Mapping[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.dtype(jnp.bfloat16),
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "C64": np.complex64,
    "BOOL": np.bool_,
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
}

#: The entry in a header by which files of this library are known.
_OURS = "purepruning"

#: Bytes that are copied at a time.
CHUNK = 4 * 2**20


class Stored(NamedTuple):
    """Where a tensor lies: its file, safetensors' name of its dtype, shape, and range of bytes."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def array(self) -> np.ndarray:
        """Returns the tensor as a read-only map of the file.

        Raises:
            ValueError: its dtype is none of :data:`DTYPES`.
        """
        if self.dtype not in DTYPES:
            raise ValueError(
                f"{self.file}: a tensor is of dtype {self.dtype}, which cannot be read; convert it"
            )
        dtype = np.dtype(DTYPES[self.dtype])
        if math.prod(self.shape) == 0:
            return np.zeros(self.shape, dtype)
        size = self.stop - self.start
        raw = np.memmap(self.file, np.uint8, "r", offset=self.start, shape=(size,))
        return _as_dtype(raw, self.start, dtype).reshape(self.shape)

    def pieces(self) -> Iterator[bytes]:
        """Yields the tensor's bytes, some at a time."""
        with self.file.open("rb") as file:
            file.seek(self.start)
            left = self.stop - self.start
            while left:
                some = file.read(min(left, CHUNK))
                if not some:
                    raise ValueError(f"{self.file} ends too early")
                left -= len(some)
                yield some


def _as_dtype(raw: np.ndarray, start: int, dtype: np.dtype) -> np.ndarray:
    """Returns bytes as numbers; copied where the header before them has an odd length."""
    found: np.ndarray = (raw.copy() if start % dtype.alignment else raw).view(dtype)
    return found


class Shard(NamedTuple):
    """One file: its tensors in their order, and its metadata."""

    file: Path
    tensors: dict[str, Stored]
    metadata: dict[str, str]

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns all tensors as read-only views of one map of the file.

        Raises:
            ValueError: the dtype of one is none of :data:`DTYPES`.
        """
        raw, found = np.memmap(self.file, np.uint8, "r"), {}
        for name, t in self.tensors.items():
            if t.dtype not in DTYPES:
                raise ValueError(
                    f"{self.file}: {name!r} is of dtype {t.dtype}, which cannot be read; convert it"
                )
            part = np.asarray(raw[t.start : t.stop])
            found[name] = _as_dtype(part, t.start, np.dtype(DTYPES[t.dtype])).reshape(t.shape)
        return found


def read_shards(source: str | os.PathLike[str]) -> tuple[Shard, ...]:
    """Returns the headers of a safetensors file, or of those in a folder, by file name.

    Of a folder these are the files and the tensors that its index names; without an index
    ``model.safetensors``, or else all safetensors files, but for those of masks.

    Raises:
        FileNotFoundError: there is no such file, or no safetensors file in the folder, or one that
            the index names is missing.
        ValueError: a header or the index is damaged, they do not agree, or two files hold tensors
            of one name.
    """
    path = Path(source)
    if not path.is_dir():
        return (_read_shard(path),)
    if (path / INDEX).exists():
        return _indexed(path)
    if (path / SINGLE).exists():
        return (_read_shard(path / SINGLE),)
    shards = tuple(map(_read_shard, sorted(path.glob("*.safetensors"))))
    shards = tuple(s for s in shards if '"format": "masks"' not in s.metadata.get(_OURS, ""))
    if not shards:
        raise FileNotFoundError(f"{path} has no .safetensors files; name a folder that has some")
    seen: dict[str, Path] = {}
    for shard in shards:
        for name in shard.tensors:
            if name in seen:
                raise ValueError(
                    f"{name!r} lies in {seen[name].name} and in {shard.file.name}; name one file"
                )
            seen[name] = shard.file
    return shards


def _indexed(path: Path) -> tuple[Shard, ...]:
    """Returns what the index of a folder names."""
    where, shards = read_index(path / INDEX), []
    for file in sorted(set(where.values())):
        shard = _read_shard(path / file)
        of_file = [name for name, shard_file in where.items() if shard_file == file]
        for name in of_file:
            if name not in shard.tensors:
                message = f"{path / file}: there is no tensor {name!r}, which {INDEX} names"
                raise ValueError(missing(message, name, shard.tensors))
        tensors = {name: t for name, t in shard.tensors.items() if where.get(name) == file}
        shards.append(shard._replace(tensors=tensors))
    return tuple(shards)


def read_index(index: Path) -> dict[str, str]:
    """Returns the file that each tensor lies in, by an index as Hugging Face writes it.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: it is no such index, or it names files elsewhere.
    """
    try:
        found = json.loads(index.read_bytes())["weight_map"]
        if not found or not all(isinstance(x, str) for pair in found.items() for x in pair):
            raise TypeError
    except BROKEN:
        raise ValueError(
            f"{index}: it is no index with a 'weight_map' from tensors to files; fetch it again"
        ) from None
    for file in sorted(set(found.values())):
        if Path(file).name != file:
            raise ValueError(
                f"{index}: a shard must lie in the folder, got {file!r}; fetch it again"
            )
        if not index.with_name(file).exists():
            raise FileNotFoundError(
                f"{index.parent}: the shard {file!r} is missing; fetch it again"
            )
    return dict(found)


def _read_shard(path: Path) -> Shard:
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(size - 8, 10**8):
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is no object")
        metadata = header.pop("__metadata__", {})
        if not all(isinstance(x, str) for pair in metadata.items() for x in pair):
            raise ValueError("its metadata are no text")
        rows = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        tensors = {name: _stored(path, 8 + length, row) for name, row in rows}
        for name, t in tensors.items():
            known = t.dtype not in DTYPES or t.stop - t.start == nbytes(t.dtype, t.shape)
            if not (8 + length <= t.start <= t.stop <= size and known):
                raise ValueError(f"the bytes of {name!r} are not those of its shape")
    except BROKEN as error:
        why = str(error) if type(error) is ValueError else "its header is not as the format says"
        raise ValueError(
            f"{path} is no safetensors file, or is damaged ({why}); fetch or write it again"
        ) from error
    return Shard(path, tensors, metadata)


def _stored(path: Path, start: int, row: Mapping[str, Any]) -> Stored:
    shape, (first, last) = tuple(row["shape"]), row["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, first, last)):
        raise ValueError("shapes and offsets must be whole numbers")
    return Stored(path, row["dtype"], shape, start + first, start + last)


def of_array(array: np.ndarray) -> tuple[str, tuple[int, ...], int, Iterator[Any]]:
    """Returns what :func:`write_tensors` is given for an array that is there already."""
    dtype = next((name for name, known in DTYPES.items() if known == array.dtype), None)
    if dtype is None:
        raise ValueError(
            f"an array of {array.dtype} has no place in a safetensors file; convert it"
        )
    whole = np.ascontiguousarray(array)
    return dtype, array.shape, array.nbytes, iter([whole.reshape(-1).view(np.uint8).data])


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Returns how many bytes a tensor takes."""
    return math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize


def width(dtype: str) -> int:
    """Returns the bytes of an element; of dtypes that are not known, one."""
    return np.dtype(DTYPES[dtype]).itemsize if dtype in DTYPES else 1


def write_tensors(
    path: Path,
    tensors: Mapping[str, tuple[str, tuple[int, ...], int, Iterator[Any]]],
    metadata: Mapping[str, str],
) -> None:
    """Writes a safetensors file whose tensors come in pieces; it appears whole or not at all.

    Tensors of wide dtypes come first, so that all are aligned; else their order stays.

    Args:
        path: the file.
        tensors: by name the dtype, the shape, the number of bytes, and the bytes in pieces, which
            are asked for one tensor after another.
        metadata: what else the header says.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    tensors = dict(sorted(tensors.items(), key=lambda item: -width(item[1][0])))
    offset = 0
    for name, (dtype, shape, size, _) in tensors.items():
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    write_whole(path, _pieces(len(text).to_bytes(8, "little") + text, tensors))


def _pieces(
    header: bytes, tensors: Mapping[str, tuple[str, tuple[int, ...], int, Iterator[Any]]]
) -> Iterator[Any]:
    yield header
    for name, (_, _, size, pieces) in tensors.items():
        done = 0
        for piece in pieces:
            done += memoryview(piece).nbytes
            yield piece
        if done != size:
            raise ValueError(f"{name!r}: {done} bytes instead of {size}")
