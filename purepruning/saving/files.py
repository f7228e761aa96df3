"""Files that appear whole or not at all, and are checked when they are read."""

from __future__ import annotations

import contextlib
import glob
import importlib
import json
import os
import secrets
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np
import safetensors.numpy

from purepruning.arguments import instance, shown
from purepruning.arrays import is_on_this_process

#: What a damaged or crafted header raises where its parts are used.
BROKEN = (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError)

try:
    _fcntl: Any = importlib.import_module("fcntl")
except ImportError:  # Windows: nobody tells whether a writer lives
    _fcntl = None


def file_path(path: str | os.PathLike[str], where: str) -> Path:
    """Returns the path of a file; ``where`` names the function in messages.

    Raises:
        TypeError: it is no path.
        IsADirectoryError: it is a directory.
    """
    instance(path, (str, os.PathLike), f"{where}: path", "a string or a path")
    found = Path(path)
    if found.is_dir():
        raise IsADirectoryError(f"{where}: path {str(path)!r} is a directory; name a file in it")
    return found


def write_whole(path: Path, content: bytes | Iterable[Any]) -> None:
    """Writes a file, of bytes or of pieces of them, that appears whole or not at all.

    It is written under another name in the same folder, and then renamed. What killed writers of
    the same file have left there is removed.
    """
    _remove_leftovers(path)
    temporary, file = _begin(path)
    try:
        with file:
            pieces: Iterable[Any] = (content,) if isinstance(content, bytes) else content
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _begin(path: Path) -> tuple[Path, BinaryIO]:
    """Returns a new file in the folder of ``path``, locked as long as it is open."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        file = temporary.open("xb")
        if _fcntl is None:
            return temporary, file
        _fcntl.flock(file, _fcntl.LOCK_EX)
        # Between the two lines above, another writer may have taken it for a leftover.
        if temporary.exists():
            return temporary, file
        file.close()


def _remove_leftovers(path: Path) -> None:
    if _fcntl is None:
        return
    pattern = f".{glob.escape(path.name)}.{'[0-9a-f]' * 16}"
    for left in path.parent.glob(pattern):
        with contextlib.suppress(OSError), left.open("rb") as file:
            _fcntl.flock(file, _fcntl.LOCK_EX | _fcntl.LOCK_NB)  # OSError while its writer lives
            left.unlink(missing_ok=True)


def read_whole(path: Path, kind: str, version: int) -> tuple[dict, dict[str, np.ndarray]]:
    """Returns the header and the arrays of a file of ``save_<kind>``, in the given version."""
    with _opened(path) as file:
        header = _header(path, file.metadata(), kind, version)
        return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def read_header(path: Path, kind: str, version: int) -> dict:
    """Returns the header of a file of ``save_<kind>``; its tensors lie where they should."""
    with _opened(path) as file:
        return _header(path, file.metadata(), kind, version)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    path.stat()  # FileNotFoundError, with the path; safetensors' own differs by version
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            yield file
    except (safetensors.SafetensorError, AttributeError, TypeError) as error:
        # The latter two of NumPy, for the dtypes that it has not.
        raise ValueError(f"{path} is no safetensors file, or is damaged: {error}") from error


def _header(path: Path, metadata: Mapping[str, str] | None, kind: str, version: int) -> dict:
    """Returns the library's entry in a file's metadata."""
    if "purepruning" not in (metadata or {}):
        raise ValueError(f"{path} holds no {kind}: it was not written by save_{kind}")
    try:
        header = json.loads((metadata or {})["purepruning"])
        if header["format"] != kind or header["format_version"] != version:
            raise ValueError(
                f"format {shown(header['format'])}, version {shown(header['format_version'])}, by "
                f"purepruning {shown(header['library_version'])}; this is version {version} of "
                f"{kind!r}"
            )
    except BROKEN as error:
        raise unreadable(path, kind, error) from error
    return header


def unreadable(path: Path, kind: str, error: Exception) -> ValueError:
    """Returns the error for a file whose header or contents are not what they should be."""
    # What Python says of a wrong type inside is no news to whoever has a damaged file.
    why = str(error) if type(error) is ValueError else "its header is not as save_* writes it"
    return ValueError(f"{path} cannot be read as {kind}: {why}")


def checksum(array: np.ndarray) -> int:
    """Returns the CRC-32 of an array's bytes."""
    return zlib.crc32(array.tobytes())


def check_sum(name: str, array: np.ndarray, row: Mapping[str, Any]) -> None:
    """Raises ValueError if the bytes of an array are not those that were written."""
    if checksum(array) != row["crc32"]:
        raise ValueError(f"{name!r}: the contents do not agree with their checksum")


def check_here(what: str, x: Any) -> None:
    """Raises ValueError for an array of JAX of which this process has only a part."""
    if isinstance(x, jax.Array) and not (is_on_this_process(x) or x.is_fully_replicated):
        raise ValueError(
            f"{what} lies on devices of other processes; save it by Orbax, where every process "
            "writes its part, or let all of them gather it before one saves: "
            "jax.experimental.multihost_utils.process_allgather(tree, tiled=True)"
        )
