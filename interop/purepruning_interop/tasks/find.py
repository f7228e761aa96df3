"""A task by its name."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys

from purepruning.arguments import missing
from purepruning_interop.tasks.task import Task

#: Tasks that come with the library.
SHIPPED = ("digits",)


def find_task(name: str) -> Task:
    """Returns a shipped task by its name, or that of ``package.module:task``.

    Modules are looked for in the current folder too, as ``python -m`` does.

    Raises:
        ValueError, TypeError: it is no such name, or what it names is no task.
        ModuleNotFoundError, AttributeError: there is no such module, or nothing of that name in it;
            what importing it raised is not touched.
    """
    module_name, colon, attribute = name.partition(":")
    if not colon and module_name in SHIPPED:
        module_name, attribute = f"purepruning_interop.tasks.{module_name}", "task"
    elif not colon or not module_name or not attribute:
        known = ", ".join(SHIPPED)
        raise ValueError(
            f"task must be package.module:task or one of {known}, got {name!r}; write both parts"
        )
    found = getattr(_module(module_name, name), attribute, None)
    if found is None:
        names = [n for n in vars(sys.modules[module_name]) if not n.startswith("_")]
        raise AttributeError(
            missing(f"task {name!r}: module {module_name!r} has no {attribute!r}", attribute, names)
        )
    task = found() if callable(found) else found
    if not isinstance(task, Task):
        raise TypeError(
            f"task {name!r} must be a Task or a function that returns one, got "
            f"{type(task).__name__}; return purepruning_interop.tasks.Task(...)"
        )
    return task


def _module(module_name: str, name: str) -> object:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # What the module itself imports and lacks is another mistake.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ModuleNotFoundError(
            f"task {name!r}: there is no module {error.name!r}; run this where it can be imported",
            name=error.name,
        ) from error
