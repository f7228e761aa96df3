"""What the frameworks on JAX share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def copies(tree: Any) -> Any:
    """Returns the tree with its own arrays."""
    return jax.tree.map(lambda x: jnp.copy(x) if isinstance(x, jax.Array) else x, tree)


def zeros(shape: tuple[int, ...]) -> jax.Array:
    """Returns an input of zeros."""
    return jnp.zeros(shape)


def trained(model: Any, trainer: Callable[..., Any], epoch: int, penalty: Any) -> Any:
    """Returns what ``trainer(model, penalty=, epoch=)`` does; ``penalty(model)`` is for a loss."""
    found = trainer(model, penalty=penalty, epoch=epoch)
    return model if found is None else found
