"""The ResNet of ``search.py`` in Flax: trained, coupled, and scored with units removed."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from _search import RATE, ROLES, STAGES, STEM, TUNING, Twin
from flax import linen as nn
from structured_flax import Block

import purepruning as pp
from purepruning.trees import flatten
from purepruning_interop import linen


class ResNet(nn.Module):
    """A stem and three stages for images of 8 x 8 pixels."""

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits, ``(batch, 10)``."""
        x = nn.Conv(STEM, (3, 3), padding=1, use_bias=False, name="stem")(images[..., None])
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x))
        for name, (channels, stride) in STAGES.items():
            x = Block(channels, stride, name=name)(x, train)
        return nn.Dense(10, name="classifier")(x.mean((1, 2)))


MODEL = ResNet()


def forward(variables: Any, images: jax.Array, train: bool) -> tuple[jax.Array, Any]:
    logits, updated = MODEL.apply(variables, images, train, mutable=["batch_stats"])
    return logits, updated["batch_stats"]


def masked(coupling: pp.Coupling, variables: Any, removed: Any) -> Any:
    """Returns the variables with all that goes with removed units at zero; traceable."""
    tree = flatten(variables)
    leaves = dict(tree.leaves)
    for path, leaf in coupling.leaves.items():
        for axis, units in enumerate(leaf.units):
            if units is not None:
                keep = ~jnp.any(jnp.asarray(removed)[units], axis=-1)
                shape = [1] * leaves[path].ndim
                shape[axis] = -1
                leaves[path] = jnp.where(keep.reshape(shape), leaves[path], 0.0)
    return tree.rebuild(leaves)


def loss(variables: Any, images: Any, labels: Any) -> tuple[Any, Any]:
    logits, stats = forward(variables, images, True)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), stats


def make(data: Any, training: Any, tuning: Any, seed: int) -> Twin:
    """Returns the trained network; ``training`` and ``tuning`` are images by step."""
    x = data.train_images[:1]
    variables = MODEL.init(jax.random.key(seed, impl="rbg"), x)
    coupling = pp.couple(forward, variables, x, False, outputs=(True, False))

    @functools.partial(jax.jit, static_argnums=3)
    def fit(variables: Any, removed: Any, steps: Any, rate: float) -> Any:
        optimizer = optax.adam(optax.cosine_decay_schedule(rate, len(steps)))
        images, labels = jnp.asarray(data.train_images), jnp.asarray(data.train_labels)

        def step(carry: Any, batch: Any) -> tuple[Any, None]:
            variables, state = carry
            grads, stats = jax.grad(
                lambda p: loss(variables | {"params": p}, images[batch], labels[batch]),
                has_aux=True,
            )(variables["params"])
            updates, state = optimizer.update(grads, state)
            params = optax.apply_updates(variables["params"], updates)
            new = {"params": params, "batch_stats": stats}
            return (masked(coupling, new, removed), state), None

        start = masked(coupling, variables, removed)
        return jax.lax.scan(step, (start, optimizer.init(start["params"])), steps)[0][0]

    none = jnp.zeros(coupling.n_units + 1, bool)
    variables = fit(variables, none, jnp.asarray(training), RATE)
    calibration = jnp.asarray(data.train_images[:128]), jnp.asarray(data.train_labels[:128])

    @jax.jit
    def evaluate(removed: Any) -> Any:
        logits, _ = forward(masked(coupling, variables, removed), calibration[0], False)
        return -optax.softmax_cross_entropy_with_integer_labels(logits, calibration[1]).mean()

    @jax.jit
    def right(variables: Any) -> Any:
        logits, _ = forward(variables, jnp.asarray(data.test_images), False)
        return jnp.mean(jnp.argmax(logits, -1) == jnp.asarray(data.test_labels))

    def accuracies(removed: Any) -> tuple[float, float]:
        tuned = fit(variables, jnp.asarray(removed), jnp.asarray(tuning), TUNING)
        return float(right(masked(coupling, variables, removed))), float(right(tuned))

    layers = linen.layers(MODEL, variables, x)
    squares = jax.tree.map(jnp.square, variables)
    scores = pp.unit_scores(squares, coupling, reduce="mean", normalize="mean", roles=ROLES)
    return Twin(variables, coupling, layers, scores, evaluate, accuracies, evaluate)
