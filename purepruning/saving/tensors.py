"""Checkpoints on disk as arrays that are mapped, not read: one safetensors file, or several.

A folder as Hugging Face writes it has an index, ``model.safetensors.index.json``, and shards. The
format is a header in JSON behind its length in eight bytes, and then one tensor after another.
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

from purepruning.saving.files import write_whole

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
            raise ValueError(f"{self.file}: a tensor of dtype {self.dtype!r}; convert it first")
        if math.prod(self.shape) == 0:
            return np.zeros(self.shape, DTYPES[self.dtype])
        return np.memmap(self.file, DTYPES[self.dtype], "r", offset=self.start, shape=self.shape)

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


class Shard(NamedTuple):
    """One file: its tensors in their order, and its metadata."""

    file: Path
    tensors: dict[str, Stored]
    metadata: dict[str, str]


def read_shards(source: str | os.PathLike[str]) -> tuple[Shard, ...]:
    """Returns the headers of a safetensors file, or of all such files in a folder, by file name.

    Files of masks that lie in the folder are left out.

    Raises:
        FileNotFoundError: there is no such file, or no safetensors file in the folder.
        ValueError: a header is damaged, or two files hold tensors of one name.
    """
    path = Path(source)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"{path} has no .safetensors files; name a folder that has some")
    shards = tuple(map(_read_shard, files))
    if path.is_dir():
        shards = tuple(s for s in shards if '"format": "masks"' not in s.metadata.get(_OURS, ""))
    seen: dict[str, Path] = {}
    for shard in shards:
        for name in shard.tensors:
            if name in seen:
                raise ValueError(f"{name!r} lies in {seen[name].name} and in {shard.file.name}")
            seen[name] = shard.file
    return shards


def _read_shard(path: Path) -> Shard:
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(size - 8, 10**8):
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        tensors = {
            name: Stored(
                path,
                row["dtype"],
                tuple(row["shape"]),
                *(8 + length + int(offset) for offset in row["data_offsets"]),
            )
            for name, row in header.items()
        }
        for name, t in tensors.items():
            known = t.dtype not in DTYPES or t.stop - t.start == nbytes(t.dtype, t.shape)
            if not (8 + length <= t.start <= t.stop <= size and known):
                raise ValueError(f"the bytes of {name!r} are not those of its shape")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no safetensors file, or is damaged: {error}") from error
    return Shard(path, tensors, metadata)


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Returns how many bytes a tensor takes."""
    return math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize


def write_tensors(
    path: Path,
    tensors: Mapping[str, tuple[str, tuple[int, ...], int, Iterator[Any]]],
    metadata: Mapping[str, str],
) -> None:
    """Writes a safetensors file whose tensors come in pieces; it appears whole or not at all.

    Args:
        path: the file.
        tensors: by name the dtype, the shape, the number of bytes, and the bytes in pieces, which
            are asked for one tensor after another.
        metadata: what else the header says.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
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
