"""What type checkers see: this file is checked by mypy, where an unused ``ignore`` is an error."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import torch

import purepruning as pp
from purepruning.config.config import Pruner
from purepruning.layers import Layers
from purepruning.stats import activations, gradients
from purepruning.types import Array, Masks, Params, Stats

if TYPE_CHECKING:

    def own(params: Params, stats: Stats, config: pp.Config) -> Masks:
        return pp.level(params, None, config)

    def right(table: Layers, params: Params, coupling: pp.Coupling) -> Array:
        arrays: list[Array] = [jnp.ones(3), np.ones(3), torch.ones(3)]
        config = pp.resolve(0.5, table)
        pruner: Pruner = own
        masks = pp.lottery(pruner, config).init({"params": params}).masks
        pp.prune_units(arrays[0], pp.apply_masks(params, masks), config)
        loss: jax.Array = jnp.zeros(()) + pp.group_penalty(params, coupling)
        return loss + pp.slim_penalty(params, table) * 2

    def wrong(config: pp.Config, params: Params) -> None:
        pp.resolve(0.5, 3)  # type: ignore[arg-type]
        pp.resolve("0.5", [])  # type: ignore[arg-type]
        pp.resolve(0.5, ["fc"])  # type: ignore[list-item]
        pp.prune_units([1.0], params, config)  # type: ignore[arg-type]
        pp.lottery(pp.agp, config)  # type: ignore[arg-type]
        pp.group_penalty(params, config, scale=1e-3).backwards()  # type: ignore[attr-defined]


def test_signatures_say_what_they_take() -> None:
    """No public function calls parameters or masks just Any."""
    functions = {name: getattr(pp, name) for name in pp.__all__}
    for module in (pp.admm, pp.movement, activations, gradients):
        functions |= {
            f"{module.__name__}.{name}": f
            for name, f in vars(module).items()
            if getattr(f, "__module__", None) == module.__name__ and not name.startswith("_")
        }
    functions = {name: f for name, f in functions.items() if inspect.isfunction(f)}
    assert len(functions) > 60
    aliases = {"params": "Params", "masks": "Masks"}
    loose = [
        f"{name}({argument}: {parameter.annotation})"
        for name, function in functions.items()
        for argument, parameter in inspect.signature(function).parameters.items()
        if argument in aliases and parameter.annotation != aliases[argument]
    ]
    assert loose == []
