"""Writing: results of several files, which appear whole or not at all."""

from __future__ import annotations

import contextlib
import glob
import importlib
import os
import secrets
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

try:
    _fcntl: Any = importlib.import_module("fcntl")
except ImportError:  # Windows: nobody tells whether a writer lives
    _fcntl = None

_LOCK = ".lock"

#: The folders that are being written to, for whoever ends the process.
OPEN: set[Aside] = set()


def _to_disk(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


class NotWritten(Exception):
    """A result that the system would not take; nothing of it is there."""


class Aside:
    """A folder beside the target, in which a result is prepared.

    Used as a context: what is not committed when it ends is removed, and so is what killed writers
    of the same target have left.

    Args:
        target: the result.
        overwrite: whether it replaces what is there.
        asked: a digest of what is asked for. A process that is ended by a signal then leaves the
            folder, and the next one that is asked for the same finds it; None where all has to be
            begun anew.

    Attributes:
        folder: where to write.

    Raises:
        FileExistsError: the target is there.
        ValueError: another process is asked for the same.
        NotWritten: an OSError while it was made.
    """

    def __init__(self, target: Path, *, overwrite: bool = False, asked: str | None = None) -> None:
        self._target, self._overwrite, self._asked = target, overwrite, asked
        self._lock: Any = None
        self.folder = target  # until the context begins

    def __enter__(self) -> Aside:
        target = self._target
        check_target(target, self._overwrite)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            folder = target.with_name(f".{target.name}.{self._asked or secrets.token_hex(8)}")
            _remove_leftovers(target, folder)
            if self._asked is None:
                self.folder = folder
                OPEN.add(self)
            folder.mkdir(exist_ok=self._asked is not None)
            lock = (folder / _LOCK).open("ab")
            if not _locked(lock):
                lock.close()
                raise ValueError(f"{target}: another process is writing it; wait for it")
            self.folder, self._lock = folder, lock
            OPEN.add(self)
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

    def leave(self) -> bool:
        """Removes what is not committed, unless it can be gone on with; returns whether it can."""
        if self._asked is None:
            self.remove()
        return self._asked is not None

    def write(self, name: str, content: bytes) -> None:
        """Writes one file of the result."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
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


def _locked(file: IO[bytes]) -> bool:
    """Locks a file; returns whether nobody else has."""
    if _fcntl is None:
        return True
    try:
        _fcntl.flock(file, _fcntl.LOCK_EX | _fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove_leftovers(target: Path, but: Path) -> None:
    """Removes what killed writers of a target left, but for one folder."""
    if _fcntl is None:
        return
    for left in target.parent.glob(f".{glob.escape(target.name)}.*/{_LOCK}"):
        if left.parent == but:
            continue
        with contextlib.suppress(OSError), left.open("rb") as file:
            if _locked(file):
                shutil.rmtree(left.parent, ignore_errors=True)
