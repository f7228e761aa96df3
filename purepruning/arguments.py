"""Checks of what users pass in: numbers, choices, and names with the nearest valid ones."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from purepruning.arrays import (
    by_numpy,
    compiled,
    has_values,
    is_array,
    is_concrete,
    is_dense,
    is_numpy,
    is_torch,
    namespace,
)


def shown(value: Any) -> str:
    """Returns what a message says of a wrong value: a short one itself, of others what they are."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"an integer of {value.bit_length()} bits"
    if value is None or isinstance(value, int | float | complex | str | bytes):
        text = repr(value)
        return text if len(text) <= 60 else f"{text[:50]}... (a {type(value).__name__})"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if inspect.isroutine(value) or inspect.ismodule(value):
        return f"the {type(value).__name__} {getattr(value, '__name__', '')!r}"
    if isinstance(value, list | tuple | dict | set) and not value:
        return f"an empty {type(value).__name__}"
    if isinstance(value, np.generic) or (isinstance(value, list | tuple) and _is_short(value)):
        return repr(value)[:60]
    if is_torch(value) and not is_dense(value):
        return f"a tensor of layout {value.layout}, which is not dense; call its to_dense() first"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{type(value).__name__} of shape {tuple(value.shape)}, {value.dtype}"
    return type(value).__name__


def _is_short(values: Any) -> bool:
    return len(values) <= 8 and all(x is None or isinstance(x, int | float | str) for x in values)


def one_of(name: str, value: Any, allowed: tuple[str | None, ...]) -> None:
    """Raises ValueError if an option has no allowed value."""
    if not (value is None or isinstance(value, str)) or value not in allowed:
        raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {shown(value)}")


def some_of(name: str, value: Any, allowed: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the words of a collection, or one word alone; raises where it holds others."""
    words = (value,) if isinstance(value, str) else value
    listed = isinstance(words, list | tuple | set | frozenset) and bool(words)
    if not listed or not all(isinstance(word, str) and word in allowed for word in words):
        known = ", ".join(map(repr, allowed))
        got = ", ".join(map(shown, words)) if listed else shown(value)
        raise ValueError(f"{name} must hold some of {known}, got {got}")
    return tuple(words)


def collection(value: Any, where: str, expected: str) -> tuple[Any, ...]:
    """Returns the elements of a collection, as a tuple; a string and a mapping are none."""
    if isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping):
        try:
            return tuple(value)
        except TypeError:  # an array without axes
            pass
    raise TypeError(f"{where} must be {expected}, got {shown(value)}")


def ordered(value: Any, where: str, expected: str) -> tuple[Any, ...]:
    """Returns the elements of a collection whose order means something; a set is none."""
    if isinstance(value, set | frozenset):
        raise TypeError(f"{where} must be {expected}, got a set, which has no order")
    return collection(value, where, expected)


def instance(value: Any, of: type | tuple[type, ...], where: str, expected: str) -> None:
    """Raises TypeError for what is none of these; ``where`` names the argument in the message."""
    if not isinstance(value, of):
        raise TypeError(f"{where} must be {expected}, got {shown(value)}")


def floats(value: Any, where: str) -> None:
    """Raises TypeError for what is no array of real floating-point numbers."""
    known = is_array(value) and has_values(value)
    if not (known and namespace(value).isdtype(value.dtype, "real floating")):
        raise TypeError(f"{where} must be an array of floats, got {shown(value)}")


def function(value: Any, where: str, expected: str) -> None:
    """Raises TypeError for what cannot be called."""
    if not callable(value):
        raise TypeError(f"{where} must be {expected}, got {shown(value)}")


def flag(value: Any, where: str) -> None:
    """Raises TypeError for what is neither True nor False."""
    if not isinstance(value, bool):
        raise TypeError(f"{where} must be True or False, got {shown(value)}")


def strings(value: Any, where: str, *, optional: bool = False) -> None:
    """Raises TypeError for what is no string."""
    if not (isinstance(value, str) or (optional and value is None)):
        wanted = "a string or None" if optional else "a string"
        raise TypeError(f"{where} must be {wanted}, got {shown(value)}")


def missing(message: str, name: object, known: Iterable[str], *, limit: int = 5) -> str:
    """Returns ``message`` followed by the known names nearest to ``name``."""
    import difflib

    known = list(dict.fromkeys(map(str, known)))
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

    A number of lower precision stands for the simplest decimal or fraction within its noise:
    float32 0.39999998 is 0.4, 0.0453 is 0.0453, and 0.6666666 is 2/3.
    """
    dtype = getattr(value, "dtype", None)
    if not is_number(value):
        raise TypeError(f"{where} must be a number, got {shown(value)}")
    if not is_concrete(value):
        raise TypeError(
            f"{where} must be a known number, got one that jit or vmap traces; make counts outside "
            "of them, and pass those"
        )
    if not 0 <= value <= 1:
        raise ValueError(f"{where} must lie in [0, 1], got {shown(value)}")
    if dtype is not None and jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 8:
        near = Fraction(float(value))
        # Half a place by rounding, and in float32 one more by a little arithmetic.
        places = Fraction(3, 2) if dtype.itemsize == 4 else Fraction(1)
        noise = near * places * Fraction(float(jnp.finfo(dtype).eps))
        return float(_meant(near, max(near - noise, Fraction(0)), min(near + noise, Fraction(1))))
    return float(value)


def is_number(value: Any) -> bool:
    """Whether ``value`` is one number, of Python or of an array library; a boolean is none."""
    if isinstance(value, int | float):
        return not isinstance(value, bool)
    dtype = getattr(value, "dtype", None)
    if not isinstance(dtype, np.dtype) or np.shape(value):
        return False
    return bool(jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.floating))


def _meant(near: Fraction, low: Fraction, high: Fraction) -> Fraction:
    """Returns what ``near`` was before it was rounded into ``[low, high]``.

    A decimal or a fraction, whichever is written with much less: there are 10**d decimals of d
    places, and about q**2 fractions of denominators up to q. Where neither is, the larger one, so
    that rounding costs no unit.
    """
    places = next(d for d in range(60) if low <= round(near, d) <= high)
    decimal, simplest = round(near, places), _simplest(low, high)
    decimals, fractions = 10**places, simplest.denominator**2
    if max(decimals, fractions) < 16 * min(decimals, fractions):
        return max(decimal, simplest)
    return decimal if decimals < fractions else simplest


def _simplest(low: Fraction, high: Fraction) -> Fraction:
    """Returns the fraction of smallest denominator in ``[low, high]``, both at least 0."""
    whole = math.ceil(low)
    if whole <= high:
        return Fraction(whole)
    return whole - 1 + 1 / _simplest(1 / (high - whole + 1), 1 / (low - whole + 1))


def scalar(
    value: Any, where: str, *, zero: bool = False, below: float = math.inf, like: Any = None
) -> Any:
    """Returns a finite number above 0 (or 0 too), and below ``below``, as far as it is known.

    It may be an array without axes, and traced; of the framework of ``like`` where that is given.
    """
    real = isinstance(value, int | float) and not isinstance(value, bool)
    if not real:
        named = str(getattr(value, "dtype", ""))
        if not any(kind in named for kind in ("int", "float")):
            raise TypeError(f"{where} must be a number, got {shown(value)}")
        if tuple(value.shape):
            raise ValueError(f"{where} has shape {tuple(value.shape)}; map over it with vmap")
        mixed = is_torch(value) if not is_torch(like) else isinstance(value, jax.core.Tracer)
        if like is not None and mixed:
            raise TypeError(f"{where} is of another framework than params, got {shown(value)}")
    if not is_concrete(value):
        return value
    huge = isinstance(value, int) and value.bit_length() > 1000
    # Under jit, what JAX compares is traced though it is known.
    known: Any = np.asarray(value) if isinstance(value, jax.Array) else value
    fits = not huge and (known >= 0 if zero else known > 0) and known < below
    if not fits:
        bounds = f"{'[' if zero else '('}0, {below:g})"
        got = shown(value) if real else float(value)
        raise ValueError(f"{where} must lie in {bounds}, got {got}")
    # A scalar of NumPy or JAX cannot be multiplied by a tensor.
    return float(value) if real or (is_torch(like) and not is_torch(value)) else value


def is_finite(x: Any) -> bool:
    """Whether all numbers of an array are finite; where they are not known, so they seem."""
    if not is_concrete(x):
        return True
    finite = by_numpy(_finite, x)
    # Inside a trace, what is computed of known values is not known either.
    return not is_concrete(finite) or bool(finite)


def _finite(x: Any) -> Any:
    return compiled(x, _all_finite)(x)


def _all_finite(x: Any) -> Any:
    xp = namespace(x)
    # One pass over memory where operations are not compiled: a sum over NaN or infinity is neither
    # finite, though one that is not may have overflown.
    if (is_torch(x) or is_numpy(x)) and bool(xp.isfinite(xp.sum(x))):
        return True
    return xp.all(xp.isfinite(x))


def whole_number(value: Any, where: str, lowest: int, highest: int | None = None) -> int:
    """Returns an integer from ``lowest`` on; ``where`` names it in messages."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{where} must be an integer, got {shown(value)}")
    if value < lowest:
        raise ValueError(f"{where} must be at least {lowest}, got {shown(value)}")
    if highest is not None and value > highest:
        raise ValueError(f"{where} must be at most {highest}, got {shown(value)}")
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
    "keras": ("keras.src.", ("Layer",)),
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
