"""The statistics that criteria need, of a task's batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

import purepruning as pp
from purepruning.stats import activations, gradients, inputs
from purepruning_interop.tasks import Task

Init = Callable[[Any], Any]
Update = Callable[[Any, Any, Any], Any]


def steps_of(task: Task, config: pp.Config, needs: tuple[str, str]) -> tuple[Init, Update]:
    """Returns ``init(params)`` and ``update(stats, params, batch)`` of a kind of statistics.

    Args:
        task: what gives outputs, inputs or gradients.
        config: layers and units.
        needs: the kind, and what it is to keep.
    """
    kind, keep = needs
    found: tuple[Init, Update] = _STEPS[kind](task, config, keep)
    return found


def check_needs(task: Task, needs: tuple[str, str]) -> None:
    """Raises ValueError where a task does not give what a kind of statistics is of."""
    kind, _ = needs
    lacks = "loss" if kind == "gradients" else "capture"
    if getattr(task, lacks) is None or not len(task.batches):
        lacks = lacks if getattr(task, lacks) is None else "batches"
        raise ValueError(
            f"task {task.name!r} has no {lacks}, of which statistics of {kind} are; give it, or "
            "leave out the pruners that need them"
        )


def _of_activations(task: Task, config: pp.Config, keep: str) -> tuple[Init, Update]:
    def update(stats: Any, params: Any, batch: Any) -> Any:
        outputs, activation = _captured(task, config, params, batch, "outputs"), task.activation
        return activations.update(stats, outputs, config, activation=activation)  # type: ignore[arg-type]

    return lambda params: activations.init(params, config), update


def _of_gradients(task: Task, config: pp.Config, keep: Any) -> tuple[Init, Update]:
    def update(stats: Any, params: Any, batch: Any) -> Any:
        return gradients.update(stats, params, _gradients(task.loss, params, batch), config)

    return lambda params: gradients.init(params, config, keep=[keep]), update


def _of_inputs(task: Task, config: pp.Config, keep: Any) -> tuple[Init, Update]:
    def update(stats: Any, params: Any, batch: Any) -> Any:
        return inputs.update(stats, _captured(task, config, params, batch, "inputs"), config)

    return lambda params: inputs.init(params, config, keep=[keep]), update


_STEPS: dict[str, Callable[..., Any]] = {
    "activations": _of_activations,
    "gradients": _of_gradients,
    "inputs": _of_inputs,
}


def _captured(task: Task, config: pp.Config, params: Any, batch: Any, of: str) -> Mapping[str, Any]:
    assert task.capture is not None
    return task.capture(params, batch, config.layers, of)


def _gradients(loss: Any, params: Any, batch: Any) -> Any:
    """Returns the gradients of a loss, in either framework."""
    if all(isinstance(x, jax.Array | np.ndarray) for x in jax.tree.leaves(params)):
        return jax.grad(loss)(params, batch)
    leaves = {n: x.detach().requires_grad_(x.is_floating_point()) for n, x in params.items()}
    loss(leaves, batch).backward()
    return {n: 0 * x.detach() if x.grad is None else x.grad for n, x in leaves.items()}
