"""The folder of a run: what was asked, what happened, and where it is."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.numpy

import purepruning as pp
from purepruning.masks import by_path, to_numpy
from purepruning.saving.files import write_whole
from purepruning.trees import flatten
from purepruning_interop.checkpoints import NotWritten
from purepruning_interop.recipes import Recipe, write_resolved
from purepruning_interop.runs.work import Stage, State

try:
    _fcntl: Any = importlib.import_module("fcntl")
except ImportError:  # Windows: nobody tells whether another run is at work
    _fcntl = None

RESOLVED, ASKED, HISTORY = "resolved.json", "run.json", "history.jsonl"
WEIGHTS, MASKS = "weights.safetensors", "masks.safetensors"
_STATE = "state-{:05d}.safetensors"


class RunFolder:
    """Used as a context: one run at a time.

    Files appear whole; a row of ``history.jsonl`` is written before the state it is of, and what is
    behind the last state is cut off when a run goes on.

    Attributes:
        path: the folder.

    Raises:
        ValueError: another run is at work there, or it was asked for something else.
        NotWritten: an OSError while something was written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: Any = None

    def __enter__(self) -> RunFolder:
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("a")
        if _fcntl is not None:
            try:
                _fcntl.flock(self._lock, _fcntl.LOCK_EX | _fcntl.LOCK_NB)
            except OSError:
                self._lock.close()
                raise ValueError(f"{self.path}: another run is at work; wait for it") from None
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def begin(self, recipe: Recipe, asked: dict[str, Any], *, anew: bool = False) -> None:
        """Writes what is asked for; what is there must be the same, unless begun ``anew``."""
        if anew:
            self._clear()
        with writing(self.path):
            self._same(RESOLVED, recipe.resolved())
            self._same(ASKED, asked)
            write_resolved(self.path / RESOLVED, recipe)
            write_whole(self.path / ASKED, _json(asked))

    def _clear(self) -> None:
        with writing(self.path):
            for path in self.path.iterdir():
                if path.is_dir() and path.name.startswith(("search-", "ranges")):
                    shutil.rmtree(path)
                elif path.suffix in (".json", ".jsonl", ".safetensors", ".html"):
                    path.unlink()

    def _same(self, name: str, wanted: dict[str, Any]) -> None:
        path = self.path / name
        if not path.exists():
            others = [p.name for p in self.path.iterdir() if not p.name.startswith(".")]
            if name == RESOLVED and others:
                raise ValueError(f"{self.path} holds {others[0]!r} and no run; name another folder")
            return
        try:
            found = json.loads(path.read_bytes())
        except ValueError:
            found = None
        if found != json.loads(json.dumps(wanted)):
            raise ValueError(
                f"{path} is of a run that was asked for something else; name another folder, or "
                "give --overwrite"
            )

    def resume(self, stages: list[Stage], params: Any) -> tuple[int, State, list[dict[str, Any]]]:
        """Returns how many stages are done, the state after them, and their rows.

        Args:
            stages: those of the run.
            params: a tree like its parameters.
        """
        done = [n for n in range(len(stages), 0, -1) if (self.path / _STATE.format(n)).exists()]
        if not done:
            with writing(self.path):
                (self.path / HISTORY).unlink(missing_ok=True)
            return 0, State(params), []
        n = done[0]
        extra = stages[n - 1].extra
        like = {"params": params, "masks": {}, "extra": {} if extra is None else extra()}
        found = pp.load_state(self.path / _STATE.format(n), like)
        masks = None
        if found["masks"]:
            tree = flatten(params)
            masks = tree.rebuild(by_path(found["masks"], tree.leaves))
        try:
            rows = [json.loads(x) for x in (self.path / HISTORY).read_bytes().splitlines()[:n]]
        except ValueError:
            raise ValueError(
                f"{self.path / HISTORY} is damaged; name another folder, or give --overwrite"
            ) from None
        if len(rows) < n:
            raise ValueError(f"{self.path / HISTORY} lost rows; name another folder")
        with writing(self.path):
            write_whole(self.path / HISTORY, b"".join(map(_line, rows)))
        return n, State(found["params"], masks, None if extra is None else found["extra"]), rows

    def save(self, number: int, state: State, row: dict[str, Any]) -> None:
        """Writes the row of a stage and the state after it, and removes the state before."""
        masks = {} if state.masks is None else by_path(state.masks, state.params)
        kept = {name: mask for name, mask in masks.items() if mask is not None}
        whole = {
            "params": state.params,
            "masks": kept,
            "extra": {} if state.extra is None else state.extra,
        }
        with writing(self.path):
            with (self.path / HISTORY).open("ab") as file:
                file.write(_line(row))
                file.flush()
                os.fsync(file.fileno())
            pp.save_state(self.path / _STATE.format(number), whole)
            (self.path / _STATE.format(number - 1)).unlink(missing_ok=True)

    def export(self, stages: list[Stage], state: State) -> dict[str, str]:
        """Writes weights, masks, and what stages make, for others to read; returns the files."""
        leaves = flatten(state.params).leaves
        arrays = {n: to_numpy(x) for n, x in leaves.items() if hasattr(x, "shape")}
        files = {"weights": str(self.path / WEIGHTS)}
        with writing(self.path):
            write_whole(self.path / WEIGHTS, safetensors.numpy.save(arrays))
            if state.masks is not None:
                files["masks"] = str(self.path / MASKS)
                pp.save_masks(self.path / MASKS, state.masks, state.params)
            for stage in stages:
                if stage.write is not None:
                    files |= stage.write(state, self.path)
        return files


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Makes an OSError :class:`NotWritten`."""
    try:
        yield
    except OSError as error:
        raise NotWritten(f"{path} cannot be written: {error.strerror or error}") from error


def _line(row: dict[str, Any]) -> bytes:
    return (json.dumps(row, allow_nan=False) + "\n").encode()


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
