"""Writing: tensors one after another, and files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import secrets
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from purepruning_interop.checkpoints.read import DTYPES

try:
    _fcntl: Any = importlib.import_module("fcntl")
except ImportError:  # Windows: nobody tells whether a writer lives
    _fcntl = None

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LOCK = ".lock"

#: The folders that are being written to, for whoever ends the process.
OPEN: set[Aside] = set()


class Entry(NamedTuple):
    """A tensor that is yet to be written.

    Attributes:
        dtype: its dtype.
        shape: its shape.
        make: returns it; called once, when it is written.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]


def entry_of(array: np.ndarray) -> Entry:
    """Returns the entry of an array that is there already."""
    return Entry(array.dtype, array.shape, lambda: array)


def write_tensors(
    path: Path, tensors: Mapping[str, Entry], metadata: Mapping[str, str] | None = None
) -> int:
    """Writes a file of safetensors, tensor by tensor; returns its size in bytes.

    No more than one tensor is in memory at a time, if ``make`` keeps none. Names are ordered by
    the size of their dtypes, so that every tensor is aligned.

    Raises:
        OSError: the file cannot be written.
    """
    names = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    header: dict[str, Any] = {}
    if metadata:
        header["__metadata__"] = dict(metadata)
    at = 0
    for name in names:
        dtype, shape, _ = tensors[name]
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [at, at + size],
        }
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            _append(file, name, tensors[name])
        _to_disk(file)
    return 8 + len(text) + at


def _append(file: IO[bytes], name: str, entry: Entry) -> None:
    array = np.ascontiguousarray(entry.make())
    if array.dtype != entry.dtype or array.size != np.prod(entry.shape, dtype=np.int64):
        raise RuntimeError(
            f"write_tensors: {name!r} is {array.dtype} of shape {array.shape}, and was said to be "
            f"{entry.dtype} of shape {entry.shape}"
        )
    file.write(array.reshape(-1).view(np.uint8).data)


def _to_disk(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


class NotWritten(Exception):
    """A result that the system would not take; nothing of it is there."""


class Aside:
    """A folder beside the target, in which a result is prepared.

    Used as a context: what is not committed when it ends is removed, and so is what killed writers
    of the same target have left.

    Attributes:
        folder: where to write.

    Raises:
        FileExistsError: the target is there.
        NotWritten: an OSError while it was made.
    """

    def __init__(self, target: Path, *, overwrite: bool = False) -> None:
        self._target, self._overwrite = target, overwrite
        self._lock: Any = None
        self.folder = target  # until the context begins

    def __enter__(self) -> Aside:
        target = self._target
        check_target(target, self._overwrite)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(target)
            self.folder = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
            OPEN.add(self)
            self.folder.mkdir()
            self._lock = (self.folder / _LOCK).open("xb")
            if _fcntl is not None:
                _fcntl.flock(self._lock, _fcntl.LOCK_EX)
        except OSError as error:
            self.remove()
            raise _not_written(target, error) from error
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.remove()
        if isinstance(error, OSError):
            raise _not_written(self._target, error) from error

    def remove(self) -> None:
        """Removes what is not committed."""
        if self._lock is not None:
            self._lock.close()
        if self.folder != self._target:
            shutil.rmtree(self.folder, ignore_errors=True)
        OPEN.discard(self)

    def write(self, name: str, content: bytes) -> None:
        """Writes one file of the result."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            file.write(content)
            _to_disk(file)

    def commit_folder(self) -> None:
        """Gives the folder the target's name; what was there is replaced."""
        (self.folder / _LOCK).unlink()
        for path in [self.folder, *(p for p in self.folder.rglob("*") if p.is_dir())]:
            _folder_to_disk(path)
        with uninterrupted():
            old = self._target.with_name(f"{self.folder.name}.old")
            if self._target.exists():
                self._target.rename(old)
            self.folder.rename(self._target)
            _folder_to_disk(self._target.parent)
            if old.is_dir():
                shutil.rmtree(old, ignore_errors=True)
            else:
                old.unlink(missing_ok=True)

    def commit_files(self, names: Sequence[str]) -> None:
        """Moves files of the folder to the target's, in this order: the one that counts last."""
        with uninterrupted():
            for name in names:
                (self.folder / name).replace(self._target.with_name(name))
            _folder_to_disk(self._target.parent)


def _not_written(target: Path, error: OSError) -> NotWritten:
    return NotWritten(f"{target} cannot be written: {error.strerror or error}")


def check_target(target: Path, overwrite: bool) -> None:
    """Raises FileExistsError where something would be overwritten that is not to be."""
    if target.exists() and not overwrite and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(f"{target} exists; name another, or give --overwrite")


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Lets SIGINT and SIGTERM wait until several renames are done.

    Blocking them would not do: another thread would take them, and their handlers run in this one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    come: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {n: signal.signal(n, lambda number, _: come.append(number)) for n in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
    for late in come:
        signal.raise_signal(late)


def _folder_to_disk(path: Path) -> None:
    if os.name != "posix":
        return
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _remove_leftovers(target: Path) -> None:
    if _fcntl is None:
        return
    for left in target.parent.glob(f".{target.name}.*/{_LOCK}"):
        with contextlib.suppress(OSError), left.open("rb") as file:
            _fcntl.flock(file, _fcntl.LOCK_EX | _fcntl.LOCK_NB)  # OSError while its writer lives
            shutil.rmtree(left.parent, ignore_errors=True)
