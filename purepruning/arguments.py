"""Checks of what users pass in: numbers, choices, and names with the nearest valid ones."""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import jax.numpy as jnp
import numpy as np


def one_of(name: str, value: Any, allowed: tuple[str | None, ...]) -> None:
    """Raises ValueError if an option has no allowed value."""
    if value not in allowed:
        raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {value!r}")


def missing(message: str, name: object, known: Iterable[str], *, limit: int = 5) -> str:
    """Returns ``message`` followed by the known names nearest to ``name``."""
    import difflib

    known = list(dict.fromkeys(known))
    # Matched without case, which is often all that is wrong.
    spelled = {k.lower(): k for k in reversed(known)}
    close = difflib.get_close_matches(str(name).lower(), spelled, n=limit, cutoff=0.5)
    near = [spelled[k] for k in close]
    if near:
        return f"{message}; nearest: {', '.join(map(repr, near))}"
    listed = ", ".join(map(repr, known[:limit])) + (", ..." if len(known) > limit else "")
    return f"{message}; known: {listed or 'none'}"


def fraction(value: Any, where: str) -> float:
    """Returns a number in [0, 1]; ``where`` names it in messages.

    A number of lower precision stands for the simplest fraction within its noise: float32
    0.39999998 is 2/5, and 0.6666666 is 2/3.
    """
    dtype = getattr(value, "dtype", None)
    if not is_number(value):
        raise TypeError(f"{where} must be a number, got {value!r}")
    if not 0 <= value <= 1:
        raise ValueError(f"{where} must lie in [0, 1], got {value!r}")
    if dtype is not None and jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 8:
        near = Fraction(float(value))
        noise = near * 2 * Fraction(float(jnp.finfo(dtype).eps))
        return float(_simplest(near - noise, min(near + noise, Fraction(1))))
    return float(value)


def is_number(value: Any) -> bool:
    """Whether ``value`` is one number, of Python or of an array library; a boolean is none."""
    if isinstance(value, int | float):
        return not isinstance(value, bool)
    dtype = getattr(value, "dtype", None)
    return isinstance(dtype, np.dtype) and np.ndim(value) == 0 and jnp.issubdtype(dtype, jnp.number)


def _simplest(low: Fraction, high: Fraction) -> Fraction:
    """Returns the fraction of smallest denominator in ``[low, high]``, both at least 0."""
    whole = math.ceil(low)
    if whole <= high:
        return Fraction(whole)
    return whole - 1 + 1 / _simplest(1 / (high - whole + 1), 1 / (low - whole + 1))


def whole_number(value: Any, where: str, lowest: int) -> int:
    """Returns an integer that is at least ``lowest``; ``where`` names it in messages."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{where} must be an integer, got {value!r}")
    if value < lowest:
        raise ValueError(f"{where} must be at least {lowest}, got {value!r}")
    return int(value)


#: The classes of the models that each adapter of ``purepruning_interop`` is for, as their names
#: begin and end: no framework is imported to recognise one.
_MODELS = {
    "linen": ("flax.linen.", ("Module",)),
    "nnx": ("flax.nnx.", ("Module",)),
    "equinox": ("equinox.", ("Module",)),
    "haiku": (
        "haiku.",
        (
            "Module",
            "Transformed",
            "TransformedWithState",
            "MultiTransformed",
            "MultiTransformedWithState",
        ),
    ),
    "torch": ("torch.nn.", ("Module",)),
}


def adapter_of(model: Any) -> str | None:
    """Returns the adapter that a model, or a class of models, is for; None for anything else.

    >>> adapter_of(np.ones(3))
    """
    for cls in (model if isinstance(model, type) else type(model)).__mro__:
        for adapter, (start, names) in _MODELS.items():
            if f"{cls.__module__}.".startswith(start) and cls.__name__ in names:
                return adapter
    return None


def wrong_model(where: str, model: Any, adapter: str, wanted: str, remedy: str = "") -> TypeError:
    """Returns the error for what is no model of an adapter; names the adapter that it is for.

    Args:
        where: the call, for the message.
        model: what came.
        adapter: where it came.
        wanted: what was expected.
        remedy: what to do where that is not known from the object.
    """
    found = adapter_of(model)
    if isinstance(model, type):
        what, remedy = f"the class {model.__name__}", "pass an instance of it"
    else:
        what = type(model).__name__
    if found not in (None, adapter):
        remedy = f"use purepruning_interop.{found} for it"
    end = f"; {remedy}" if remedy else ""
    return TypeError(f"{where}: model must be {wanted}, got {what}{end}")
