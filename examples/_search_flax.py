"""The ResNet of ``search.py`` in Flax: trained, coupled, and scored with units removed."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _search import RATE, ROLES, STEM, TUNING, Twin
from structured_flax import ResNet

import purepruning as pp
from purepruning.trees import flatten
from purepruning_interop import linen

MODEL = ResNet(STEM)
RHO = 1e-2  # of ADMM


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


def make(data: Any, training: Any, tuning: Any, seed: int) -> Twin:
    """Returns the trained network; ``training`` and ``tuning`` are images by step."""
    x = data.train_images[:1]
    variables = jax.jit(MODEL.init)(jax.random.key(seed, impl="rbg"), x)
    layers = linen.layers(MODEL, variables, x)
    return twin_of(forward, variables, layers, data, training, tuning)


def twin_of(fn: Any, variables: Any, layers: Any, data: Any, training: Any, tuning: Any) -> Twin:
    """Returns the twin of a function, after it was trained."""
    x = data.train_images[:1]
    coupling = pp.couple(fn, variables, x, False, outputs=(True, False))
    images, labels = jnp.asarray(data.train_images), jnp.asarray(data.train_labels)

    def loss(variables: Any, batch: Any) -> tuple[Any, Any]:
        logits, stats = fn(variables, images[batch], True)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[batch])
        return losses.mean(), stats

    @jax.jit
    def fit(variables: Any, removed: Any, steps: Any, rate: Any, pull: Any, rho: Any) -> Any:
        """Trains with units removed; weights are pulled towards others by rho, as ADMM does."""
        optimizer = optax.adam(optax.cosine_decay_schedule(rate, len(steps)))

        def step(carry: Any, batch: Any) -> tuple[Any, None]:
            variables, state = carry
            grads, stats = jax.grad(lambda p: loss(variables | {"params": p}, batch), has_aux=True)(
                variables["params"]
            )
            grads = jax.tree.map(
                lambda g, w, z: g + rho * (w - z), grads, variables["params"], pull
            )
            updates, state = optimizer.update(grads, state)
            params = optax.apply_updates(variables["params"], updates)
            new = {"params": params, "batch_stats": stats}
            return (masked(coupling, new, removed), state), None

        start = masked(coupling, variables, removed)
        return jax.lax.scan(step, (start, optimizer.init(start["params"])), steps)[0][0]

    none = jnp.zeros(coupling.n_units + 1, bool)
    if len(training):
        steps = jnp.asarray(training)
        variables = fit(variables, none, steps, RATE, variables["params"], 0.0)

    @jax.jit
    def evaluate(removed: Any) -> Any:
        logits, _ = fn(masked(coupling, variables, removed), images[:128], False)
        return -optax.softmax_cross_entropy_with_integer_labels(logits, labels[:128]).mean()

    @jax.jit
    def right(variables: Any, removed: Any) -> Any:
        logits, _ = fn(masked(coupling, variables, removed), jnp.asarray(data.test_images), False)
        return jnp.mean(jnp.argmax(logits, -1) == jnp.asarray(data.test_labels))

    def accuracies(removed: Any) -> tuple[float, float]:
        gone = jnp.asarray(removed)
        tuned = fit(variables, gone, jnp.asarray(tuning), TUNING, variables["params"], 0.0)
        return float(right(variables, gone)), float(right(tuned, gone))

    def compress(config: pp.Config, removed: Any) -> Twin:
        """Returns the smaller twin: two rounds of ADMM towards the plan, and then it is cut."""
        pruner = functools.partial(pp.group_norm, roles=ROLES)
        trained, state = variables, pp.admm.init(variables, config)
        for _ in range(2):
            state, _ = pp.admm.step(trained, state, config, RHO, pruner=pruner)
            tree = flatten(trained)
            near = {path: z - state.u[path] for path, z in state.z.items()}
            pull = tree.rebuild({**tree.leaves, **near})["params"]
            trained = fit(trained, none, jnp.asarray(tuning), TUNING, pull, RHO)
        masks = coupling.masks(np.flatnonzero(np.asarray(removed)), trained)
        small = pp.shrink(fn, trained, masks, coupling, x, False)
        smaller = pp.coupled_layers(
            pp.couple(small.fn, small.params, x, False, outputs=(True, False))
        )
        return twin_of(small.fn, small.params, smaller, data, (), tuning)

    squares = jax.tree.map(lambda w: np.square(np.asarray(w)), variables)
    scores = pp.unit_scores(squares, coupling, reduce="mean", normalize="mean", roles=ROLES)
    return Twin(variables, coupling, layers, scores, evaluate, accuracies, evaluate, compress)
