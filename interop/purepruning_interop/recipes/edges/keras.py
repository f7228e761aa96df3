"""Keras: a model is changed in place."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import keras

from purepruning_interop import keras as adapter
from purepruning_interop.keras.variables import variables
from purepruning_interop.keras.walk import walk
from purepruning_interop.recipes.edges import _jax


def params(model: Any) -> dict[str, jax.Array]:
    """Returns the variables that are trained, those of frozen layers among them."""
    trained = {path for held in walk(model) for path in held.trained}
    return {path: x for path, x in adapter.params(model).items() if path in trained}


snapshot = adapter.params


def restored(model: Any, state: Any) -> Any:
    """Writes a snapshot back."""
    adapter.load(model, state)
    return model


written = restored
arrays = adapter.params
zeros = _jax.zeros


class Kept(NamedTuple):
    """What keeps weights at zero in ``fit``: the optimizer that a model was compiled with."""

    model: Any

    def set_masks(self, masks: Any) -> None:
        """Takes other masks."""
        adapter.set_masks(self.model, masks)


def keep(model: Any, masks: Any, optimizer: Any) -> Kept:
    """Returns the handle of the optimizer that keeps pruned weights at zero."""
    if getattr(model, "optimizer", None) is not optimizer:
        raise ValueError(
            "optimizer: it must be the one that the model is compiled with; compile it with "
            "KeepPruned(optimizer) of purepruning_interop.keras, and give model.optimizer"
        )
    adapter.set_masks(model, masks)
    return Kept(model)


def capture(
    model: Any, inputs: tuple[Any, ...], layers: Any, of: Any = "outputs"
) -> dict[str, Any]:
    """Returns the outputs, or inputs, of layers for a batch."""
    return adapter.capture(model, *inputs, layers=layers, of=of)[1]


def gradients(model: Any, loss: Any, batch: Any) -> Any:
    """Returns the gradients of ``loss(model, batch)``."""
    own = variables(model)

    def of(values: dict[str, Any]) -> Any:
        with keras.StatelessScope(state_mapping=[(own[path], x) for path, x in values.items()]):
            return loss(model, batch)

    return jax.grad(of)(params(model))


trained = _jax.trained


def quantized(model: Any, call: Any) -> Any:
    """Returns what ``compress`` of a quantizer returns."""
    return call


def replace(model: Any, weights: Any, inputs: tuple[Any, ...], at: Any) -> Any:
    """Returns result and finds of a call with other weights, and functions at sites."""
    return adapter.replace(model, *inputs, at=at, params=weights)
