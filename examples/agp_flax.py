"""Automated gradual pruning in Flax: 0 to 80 % in ten epochs, all of it one compiled call.

    python examples/agp_flax.py

The schedule is part of the Optax chain; an event is due at the first step of every epoch. Writes
the masks to ``agp_flax.safetensors``. ``agp_torch.py`` does the same in PyTorch, from the same
weights and with the same batches, and compares.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _agp import EPOCHS, MOMENTUM, RATE, RULES, SIZES, Numbers, Run, numbers, sequence
from flax import linen as nn
from rich.console import Console

import purepruning as pp
from purepruning_interop import linen


class MLP(nn.Module):
    """LeNet-300-100 for images of 64 pixels."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns logits, ``(batch, 10)``."""
        x = nn.relu(nn.Dense(300, name="hidden1")(x))
        x = nn.relu(nn.Dense(100, name="hidden2")(x))
        return nn.Dense(10, name="classifier")(x)


def train(given: Numbers) -> tuple[Run, Any, Any]:
    """Returns the run, its last parameters and their masks."""
    model = MLP()
    params = {
        name: {"kernel": jnp.asarray(w), "bias": jnp.zeros(w.shape[1])}
        for name, w in given.weights.items()
    }
    layers = linen.layers(model, params, given.images)
    steps = given.batches.shape[1]
    pruner, schedule, config = pp.from_nni("agp", RULES, layers, steps_per_epoch=steps)
    optimizer = optax.sgd(RATE, momentum=MOMENTUM)
    transform = optax.chain(optimizer, pp.prune_on_schedule(pruner, schedule, config))

    def loss(params: Any, batch: jax.Array) -> jax.Array:
        logits, labels = model.apply({"params": params}, images[batch]), given.labels[batch]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(carry: Any, batch: jax.Array) -> tuple[Any, None]:
        params, state = carry
        updates, state = transform.update(jax.grad(loss)(params, batch), state, params)
        return (optax.apply_updates(params, updates), state), None

    def epoch(carry: Any, batches: jax.Array) -> tuple[Any, Any]:
        params, state = carry = jax.lax.scan(step, carry, batches)[0]
        predicted = model.apply({"params": params}, given.test_images).argmax(-1)
        accuracy = (predicted == given.test_labels).mean()
        return carry, (params, pp.get_masks(state, params), accuracy)

    given = given._replace(images=jnp.asarray(given.images), labels=jnp.asarray(given.labels))
    images, start = given.images, (params, transform.init(params))
    (params, state), history = jax.jit(lambda *a: jax.lax.scan(epoch, *a))(start, given.batches)

    every, masks, accuracies = jax.tree.map(np.asarray, history)
    table = schedule.init(config).counts  # after no event, after the first, ...
    asked = [{name: int(table[name][e + 1]) for name in SIZES} for e in range(EPOCHS)]
    run = Run(
        "Flax",
        asked,
        [{name: masks[name]["kernel"][e] for name in SIZES} for e in range(EPOCHS)],
        [{name: every[name]["kernel"][e] for name in SIZES} for e in range(EPOCHS)],
        accuracies.tolist(),
    )
    return run, params, pp.get_masks(state, params)


def main() -> None:
    run, params, masks = train(numbers())
    pp.save_masks("agp_flax.safetensors", masks, params)
    console = Console()
    console.print(sequence(run))
    console.print("Wrote agp_flax.safetensors.")


if __name__ == "__main__":
    main()
