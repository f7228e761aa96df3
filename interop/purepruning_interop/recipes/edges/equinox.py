"""Equinox: a model is a tree, and a changed one is another. Batches are mapped over."""

from __future__ import annotations

from typing import Any

import equinox as eqx

from purepruning_interop import equinox as adapter
from purepruning_interop.recipes.edges import _jax


def params(model: Any) -> Any:
    """Returns the arrays that are trained."""
    return eqx.filter(model, eqx.is_inexact_array)


def snapshot(model: Any) -> Any:
    """Returns all arrays."""
    return eqx.filter(model, eqx.is_array)


def restored(model: Any, state: Any) -> Any:
    """Returns the model with other arrays."""
    return eqx.combine(state, model)


written = restored
arrays = snapshot
zeros = _jax.zeros


def capture(
    model: Any, inputs: tuple[Any, ...], layers: Any, of: Any = "outputs"
) -> dict[str, Any]:
    """Returns the outputs, or inputs, of layers for a batch of examples."""

    def one(*example: Any) -> Any:
        return adapter.capture(model, *example, layers=layers, of=of)[1]

    return eqx.filter_vmap(one)(*inputs)


def gradients(model: Any, loss: Any, batch: Any) -> Any:
    """Returns the gradients of ``loss(model, batch)``."""
    return eqx.filter_grad(loss)(model, batch)


trained = _jax.trained


def quantized(model: Any, call: Any) -> Any:
    """Returns what ``compress`` of a quantizer returns."""
    return call


def replace(model: Any, weights: Any, inputs: tuple[Any, ...], at: Any) -> Any:
    """Returns result and finds of a call with other weights, and functions at sites."""
    return adapter.replace(eqx.combine(weights, model), *inputs, at=at)
