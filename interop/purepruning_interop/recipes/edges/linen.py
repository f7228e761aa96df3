"""Flax Linen: the model is its variables; the module comes along."""

from __future__ import annotations

from typing import Any

import jax

from purepruning_interop import linen as adapter
from purepruning_interop.recipes.edges import _jax


class Bound:
    """A module and its variables, which are what a caller gives and gets.

    Attributes:
        module: the module.
        variables: its variables.
    """

    def __init__(self, module: Any, variables: Any) -> None:
        self.module, self.variables = module, variables


def params(model: Bound) -> Any:
    """Returns the variables: paths are theirs."""
    return model.variables


def snapshot(model: Bound) -> Any:
    """Returns the variables, which are never written to."""
    return model.variables


def restored(model: Bound, state: Any) -> Bound:
    """Returns the module with other variables."""
    return Bound(model.module, state)


written = restored


arrays = params
zeros = _jax.zeros


def capture(
    model: Bound, inputs: tuple[Any, ...], layers: Any, of: Any = "outputs"
) -> dict[str, Any]:
    """Returns the outputs, or inputs, of layers for a batch."""
    return adapter.capture(model.module, model.variables, *inputs, layers=layers, of=of)[1]


def gradients(model: Bound, loss: Any, batch: Any) -> Any:
    """Returns the gradients of ``loss(variables, batch)``."""
    return jax.grad(loss)(model.variables, batch)


trained = _jax.trained


def quantized(model: Bound, call: Any) -> Any:
    """Returns what ``compress`` of a quantizer returns."""
    return call


def replace(model: Bound, weights: Any, inputs: tuple[Any, ...], at: Any) -> Any:
    """Returns result and finds of a call with other weights, and functions at sites."""
    return adapter.replace(model.module, weights, *inputs, at=at)
