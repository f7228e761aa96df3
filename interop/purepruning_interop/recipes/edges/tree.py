"""Parameters alone, in JAX or torch, and functions of them; a changed tree is another one."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import jax
import jax.numpy as jnp

import purepruning as pp
from purepruning.arrays import is_torch


class Functions:
    """What an adapter and an edge do for a class of models, for a tree by what its caller gave.

    Attributes:
        table: the layer table.
        apply: ``(params, *inputs) -> outputs``, or None.
        outputs_of: ``(params, *inputs) -> {layer name: output}``, or None.
    """

    def __init__(
        self,
        table: tuple[pp.Layer, ...],
        apply: Callable[..., Any] | None,
        outputs_of: Callable[..., Any] | None,
    ) -> None:
        self.table, self.apply, self.outputs_of = table, apply, outputs_of

    # As an adapter.
    def layers(self, params: Any, *inputs: Any) -> tuple[pp.Layer, ...]:
        """Returns the layer table."""
        return self.table

    def couple(self, params: Any, *inputs: Any) -> pp.Coupling:
        """Returns the coupling of ``apply``."""
        return pp.couple(self._applied(), params, *inputs)

    def shrink(self, params: Any, masks: Any, coupling: pp.Coupling, *inputs: Any) -> Any:
        """Returns the smaller function and its parameters."""
        return pp.shrink(self._applied(), params, masks, coupling, *inputs)

    def count(self, params: Any, *inputs: Any) -> Any:
        """Returns the costs of ``apply``."""
        return pp.count(self._applied(), params, *inputs)

    def _applied(self) -> Callable[..., Any]:
        if self.apply is None:
            raise TypeError(
                "this needs the forward pass; give apply=, (params, *inputs) -> outputs"
            )
        return self.apply

    # As an edge: nothing is written to.
    def params(self, model: Any) -> Any:
        """Returns the tree."""
        return model

    snapshot = arrays = params

    def restored(self, model: Any, state: Any) -> Any:
        """Returns the other tree."""
        return state

    written = restored

    def zeros(self, shape: tuple[int, ...]) -> jax.Array:
        """Returns an input of zeros."""
        return jnp.zeros(shape)

    def capture(self, model: Any, inputs: tuple[Any, ...], layers: Any, of: Any = "outputs") -> Any:
        """Returns the outputs of layers for a batch."""
        if of != "outputs":
            raise ValueError(
                "the refit looks at inputs of layers, which parameters alone do not have; give "
                "n_calibration_batches=0, or a module"
            )
        if self.outputs_of is None:
            raise TypeError(
                "this ranks by outputs of layers; give capture=, (params, *inputs) -> outputs by "
                "layer name"
            )
        return self.outputs_of(model, *inputs)

    def gradients(self, model: Any, loss: Callable[..., Any], batch: Any) -> Any:
        """Returns the gradients of ``loss(params, batch)``."""
        return gradients(model, loss, batch)

    def trained(self, model: Any, trainer: Callable[..., Any], epoch: int, penalty: Any) -> Any:
        """Returns what ``trainer(params, penalty=, epoch=)`` does."""
        found = trainer(model, penalty=penalty, epoch=epoch)
        return model if found is None else found


def gradients(
    params: Any, loss: Callable[..., Any], batch: Any, names: Container[str] | None = None
) -> Any:
    """Returns the gradients of ``loss(params, batch)``; zeros of counters, which are no floats.

    Args:
        params: the tree.
        loss: the loss.
        batch: what it takes.
        names: of torch, which ones to take gradients of, all unless given; others get zeros, such
            as the statistics of a batch norm, which refuses to be differentiated by them.
    """
    if not any(map(is_torch, jax.tree.leaves(params))):
        found = jax.grad(loss, allow_int=True)(params, batch)
        return jax.tree.map(
            lambda x, g: jnp.zeros_like(x) if g.dtype == jax.dtypes.float0 else g, params, found
        )
    leaves = {
        n: x.detach().requires_grad_(x.is_floating_point() and (names is None or n in names))
        for n, x in params.items()
    }
    loss(leaves, batch).backward()
    return {n: 0 * x.detach() if x.grad is None else x.grad for n, x in leaves.items()}
