"""What the forward of a module changes about it, put back."""

from __future__ import annotations

import collections
import contextlib
import functools
import gc
import operator
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def undone(model: torch.nn.Module) -> Iterator[Callable[[], list[Any]]]:
    """Puts back what modules hold: attributes, containers in them, hooks, buffers.

    Gives a function that returns what is held now in what has changed.
    """
    kept: dict[int, tuple[Any, list[Any]]] = {}
    _keep(model, kept)

    def left() -> list[Any]:
        return [y for x, before in kept.values() if not _same(_items(x), before) for y in _items(x)]

    try:
        yield left
    finally:
        for x, before in kept.values():
            if not _same(_items(x), before):
                _restore(x, before)


@contextlib.contextmanager
def cleared_caches() -> Iterator[None]:
    """Clears the caches of functions to which something was added, for that had no values."""
    wrapper = functools._lru_cache_wrapper  # whose instances refer to it
    caches = [x for x in gc.get_referrers(wrapper) if type(x) is wrapper]
    before = [(x, x.cache_info().misses) for x in caches if not _is_known(x)]
    try:
        yield
    finally:
        for x, misses in before:
            if x.cache_info().misses != misses:
                x.cache_clear()


def _is_known(x: Any) -> bool:
    """Whether a function belongs to a package that keeps no tensors."""
    package = (getattr(x, "__module__", None) or "").partition(".")[0]
    return package in {"torch", "sympy", "numpy", "jax", "re", "typing", "inspect", "functools"}


def _keep(value: Any, kept: dict[int, tuple[Any, list[Any]]], objects: bool = True) -> None:
    """Takes down what is in a container, or the attributes of an object, and in those in it.

    Not what objects hold that are held by objects that are no modules: that may be anything.
    """
    if not isinstance(value, _CONTAINERS):
        inside = isinstance(value, torch.nn.Module)
        if not (inside or objects) or isinstance(value, _WHOLE) or not hasattr(value, "__dict__"):
            return
        value, objects = vars(value), inside
    if id(value) not in kept:
        kept[id(value)] = value, _items(value)
        for x in value.values() if isinstance(value, dict) else value:
            _keep(x, kept, objects)


_CONTAINERS = (dict, list, tuple, set, collections.deque)


_WHOLE = (torch.Tensor, type, types.ModuleType, types.FunctionType)


def _items(value: Any) -> list[Any]:
    """Returns what is in a container: the keys and then the values, if it has both."""
    return [*value, *value.values()] if isinstance(value, dict) else [*value]


def _same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(map(operator.is_, one, other))


def _restore(value: Any, before: list[Any]) -> None:
    value.clear()
    if isinstance(value, dict):
        n = len(before) // 2
        value.update(zip(before[:n], before[n:], strict=True))
    elif isinstance(value, set):
        value.update(before)
    else:
        value.extend(before)
