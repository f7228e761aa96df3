"""Tasks as commands run them: what their functions raise, or return wrongly, is said of them."""

from __future__ import annotations

import dataclasses
import functools
import numbers
from collections.abc import Callable
from typing import Any

from purepruning.arguments import missing, shown
from purepruning.trees import flatten
from purepruning_interop.cli.models import called, raised_by
from purepruning_interop.tasks import Task, find_task

_FUNCTIONS = (
    *("init", "train", "tune", "evaluate", "loss", "minimize", "capture"),
    *("loss_at", "evaluate_at"),
)


def task_of(name: str) -> Task:
    """Returns the task of a name, whose functions say that an error is theirs.

    Raises:
        ValueError, TypeError: there is none of that name, or making it raised something.
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        try:
            found = find_task(name)
        except (ValueError, TypeError):
            raise
        except Exception as error:  # of a shipped task, whose packages may be missing
            raise raised_by(f"task {name!r}", error) from error
    else:
        found = called(name, lambda made: isinstance(made, Task))
    if not isinstance(found, Task):
        raise TypeError(
            f"task {name!r} must be a Task or a function that returns one, got "
            f"{type(found).__name__}; return purepruning_interop.tasks.Task(...)"
        )
    given = {field: getattr(found, field) for field in _FUNCTIONS}
    guarded = {f: _guard(f"task {name!r}: {f}", f, x) for f, x in given.items() if x is not None}
    changes: Any = guarded
    return dataclasses.replace(found, **changes)


def _guard(where: str, field: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function, which raises ValueError for what it raises, and if it returns amiss."""

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        try:
            found = function(*args, **options)
        except (Exception, SystemExit) as error:
            raise raised_by(where, error) from error
        if field in ("evaluate", "evaluate_at") and not _is_scalar(found):
            raise TypeError(f"{where} must return a scalar, got {shown(found)}; return a number")
        if field == "init" and not _shapes(found):
            raise TypeError(f"{where} must return a tree of arrays, got {shown(found)}; return one")
        if field in ("train", "tune"):
            _check_same(where, _shapes(args[0]), _shapes(found))
        return found

    return call


def _is_scalar(value: Any) -> bool:
    return isinstance(value, numbers.Real) or getattr(value, "shape", None) == ()


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = {} if tree is None else flatten(tree).leaves
    return {name: tuple(x.shape) for name, x in leaves.items() if hasattr(x, "shape")}


def _check_same(
    where: str, given: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]
) -> None:
    for name, shape in given.items():
        if name not in found:
            message = f"{where} must return params as it takes them, and there is no {name!r}"
            raise ValueError(missing(message, name, found))
        if found[name] != shape:
            raise ValueError(
                f"{where} must return params as it takes them, and {name!r} has shape "
                f"{found[name]}, not {shape}; return the params that were given, trained"
            )
