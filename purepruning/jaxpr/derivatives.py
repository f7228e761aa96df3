"""Custom derivatives of shrunk functions: the rule the user wrote, on smaller arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np


def custom_jvp(
    body: Callable[..., list[Any]],
    rule: Callable[..., list[Any]],
    inputs: Sequence[int],
    outputs: Sequence[int],
) -> Callable[..., list[Any]]:
    """Returns ``body`` with a derivative: ``rule`` of operands and tangents gives tangents.

    ``inputs`` and ``outputs`` say which operands and results have tangents at all.
    """

    @jax.custom_jvp
    def function(*args: Any) -> list[Any]:
        return body(*args)

    @function.defjvp
    def derivative(primals: Any, tangents: Any) -> tuple[list[Any], list[Any]]:
        found = function(*primals)
        slopes = iter(rule(*primals, *(tangents[i] for i in inputs)))
        return found, [
            next(slopes) if i in outputs else np.zeros(y.shape, jax.dtypes.float0)
            for i, y in enumerate(found)
        ]

    return function


def custom_vjp(
    body: Callable[..., list[Any]],
    rule: Callable[..., list[Any]],
    inputs: Sequence[int],
    outputs: Sequence[int],
) -> Callable[..., list[Any]]:
    """Returns ``body`` with a derivative: ``rule`` of operands and cotangents gives cotangents."""

    @jax.custom_vjp
    def function(*args: Any) -> list[Any]:
        return body(*args)

    def forward(*args: Any) -> tuple[list[Any], Any]:
        return function(*args), args

    def backward(args: Any, slopes: Any) -> tuple[Any, ...]:
        found = iter(rule(*args, *(slopes[i] for i in outputs)))
        return tuple(next(found) if i in inputs else None for i in range(len(args)))

    function.defvjp(forward, backward)
    return function
