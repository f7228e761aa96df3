"""Arguments of jax.numpy under names they had when some packages were written."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

NAMES = {"clip": {"a_min": "min", "a_max": "max"}, "reshape": {"newshape": "shape"}}


def allow() -> None:
    """Lets ``jnp.clip`` and ``jnp.reshape`` take them, in this process."""
    for function, names in NAMES.items():
        if not hasattr(getattr(jnp, function), "old_names"):
            setattr(jnp, function, _renamed(getattr(jnp, function), names))


def _renamed(function: Callable[..., Any], names: dict[str, str]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **{names.get(name, name): x for name, x in kwargs.items()})

    call.old_names = names
    return call
