"""Flax NNX: a module is changed in place."""

from __future__ import annotations

from typing import Any

from flax import nnx

from purepruning_interop import nnx as adapter
from purepruning_interop.recipes.edges import _jax


def params(model: nnx.Module) -> Any:
    """Returns the parameters."""
    return nnx.state(model, nnx.Param)


def snapshot(model: nnx.Module) -> Any:
    """Returns copies of all variables."""
    return _jax.copies(nnx.state(model))


def restored(model: nnx.Module, state: Any) -> nnx.Module:
    """Writes a snapshot back."""
    nnx.update(model, _jax.copies(state))
    return model


def written(model: nnx.Module, values: Any) -> nnx.Module:
    """Writes parameters into the model."""
    nnx.update(model, values)
    return model


def pure(model: nnx.Module, values: Any) -> nnx.Module:
    """Returns a copy of the model with other parameters."""
    found: Any = nnx.split(model, nnx.Param, ...)
    graph, _, rest = found
    return nnx.merge(graph, values, rest, copy=True)


def arrays(model: nnx.Module) -> Any:
    """Returns what a file of the model holds."""
    return nnx.state(model, nnx.Not(nnx.RngState))


zeros = _jax.zeros


def capture(
    model: nnx.Module, inputs: tuple[Any, ...], layers: Any, of: Any = "outputs"
) -> dict[str, Any]:
    """Returns the outputs, or inputs, of layers for a batch."""
    return adapter.capture(model, *inputs, layers=layers, of=of)[1]


def gradients(model: nnx.Module, loss: Any, batch: Any) -> Any:
    """Returns the gradients of ``loss(model, batch)``."""
    return nnx.grad(loss)(model, batch)


trained = _jax.trained


def quantized(model: nnx.Module, call: Any) -> Any:
    """Returns what ``compress`` of a quantizer returns."""
    return call


def replace(model: nnx.Module, weights: Any, inputs: tuple[Any, ...], at: Any) -> Any:
    """Returns result and finds of a call with other weights, and functions at sites."""
    return adapter.replace(pure(model, weights), *inputs, at=at)
