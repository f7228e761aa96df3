"""The networks of ``criteria.py``, and what each kind of criterion does before it prunes.

A *way* is a function ``(model, data, params, config, batches, seed) -> (params, masks)`` of one
network and one sparsity. ``find`` maps it over both: over sparsities with ``vmap``, which computes
what does not depend on them once, and over seeds with ``lax.map`` (``_digits_flax.py`` says why).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax import Array

import purepruning as pp
from purepruning.stats import activations, gradients
from purepruning_interop import linen
from purepruning_interop.tasks.digits import CNN

Params = Any
Way = Callable[..., tuple[Params, Any]]

TRAINING_RATE, TUNING_RATE = 5e-3, 2e-3  # Adam's, with cosine decay
SCORE_RATE = 1e-2  # of movement scores; NNI's
RHO = 0.1  # of ADMM

PLAIN, WITH_NORMS = CNN(), CNN(norms=True)
FOLLOWS = {"norm1": "conv1", "norm2": "conv2", "norm3": "hidden"}  # which layer a norm follows


def layers(model: nn.Module, images: np.ndarray) -> tuple[pp.Layer, ...]:
    """Returns the layer table."""
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    return linen.layers(model, params, images)


@functools.partial(jax.jit, static_argnums=0)
def train(model: nn.Module, data: Any, seeds: Array, batches: Array) -> tuple[Params, Array]:
    """Returns trained params, stacked over the seeds, and their test accuracies."""

    def one(seed: Array, batches: Array) -> tuple[Params, Array]:
        params = model.init(jax.random.key(seed), data.test_images)["params"]
        params = _fit(_loss(model, data), params, batches, TRAINING_RATE)
        return params, _accuracy(model, data, params)

    return jax.vmap(one)(seeds, batches)


@functools.partial(jax.jit, static_argnums=(0, 1))
def find(
    way: Way,
    model: nn.Module,
    data: Any,
    params: Params,
    config: pp.Config,
    batches: Array,
    seeds: Array,
) -> tuple[Params, Any]:
    """Returns params and masks, a full one for every parameter: (seeds, sparsities, ...).

    ``params``, ``batches`` and ``seeds`` are stacked over the seeds, the counts of ``config`` over
    sparsities.
    """

    def one(params: Params, batches: Array, seed: Array, config: pp.Config) -> tuple[Params, Any]:
        params, masks = way(model, data, params, config, batches, seed)
        return params, pp.expand(masks, params)

    over_sparsities = jax.vmap(one, in_axes=(None, None, None, 0))
    return jax.lax.map(lambda seed: over_sparsities(*seed, config), (params, batches, seeds))


@functools.partial(jax.jit, static_argnums=0)
def fine_tune(
    model: nn.Module, data: Any, params: Params, masks: Any, batches: Array
) -> tuple[Array, Array, Array]:
    """Returns accuracy after pruning, after fine-tuning, and density: each (seeds, sparsities)."""

    def one(params: Params, masks: Any, batches: Array) -> tuple[Array, Array, Array]:
        pruned = pp.apply_masks(params, masks)
        last = pp.keep_pruned(masks)
        tuned = _fit(_loss(model, data), pruned, batches, TUNING_RATE, last)
        accuracies = (_accuracy(model, data, some) for some in (pruned, tuned))
        return *accuracies, pp.density(masks, params)

    over_sparsities = jax.vmap(one, in_axes=(0, 0, None))
    return jax.lax.map(lambda seed: over_sparsities(*seed), (params, masks, batches))


# The ways.


def at_random(
    model: nn.Module, data: Any, params: Params, config: pp.Config, batches: Array, seed: Array
) -> tuple[Params, Any]:
    """Prunes at once, at random."""
    return params, norms_too(model, pp.random_pruning(params, seed, config))


def by_weights(pruner: Callable[..., Any]) -> Way:
    """Prunes at once."""

    def way(
        model: nn.Module, data: Any, params: Params, config: pp.Config, batches: Array, seed: Array
    ) -> tuple[Params, Any]:
        return params, norms_too(model, pruner(params, None, config))

    return way


def by_activations(pruner: Callable[..., Any]) -> Way:
    """Runs the training images once."""

    def way(
        model: nn.Module, data: Any, params: Params, config: pp.Config, batches: Array, seed: Array
    ) -> tuple[Params, Any]:
        _, outputs = linen.capture(model, params, data.train_images, layers=config.layers)
        stats = activations.init(params, config)
        stats = activations.update(stats, outputs, config, activation="relu")
        return params, pruner(params, stats, config)

    return way


def by_gradients(pruner: Callable[..., Any], kept: gradients.Kept = "squares") -> Way:
    """Takes the gradients of one epoch, without training."""

    def way(
        model: nn.Module, data: Any, params: Params, config: pp.Config, batches: Array, seed: Array
    ) -> tuple[Params, Any]:
        def update(stats: Any, batch: Array) -> tuple[Any, None]:
            grads = jax.grad(_loss(model, data))(params, batch)
            return gradients.update(stats, params, grads, config), None

        stats = gradients.init(params, config, keep=[kept])
        stats, _ = jax.lax.scan(update, stats, batches[: _epoch(data, batches)])
        return params, norms_too(model, pruner(params, stats, config))

    return way


def by_slimming(
    model: nn.Module, data: Any, params: Params, config: pp.Config, batches: Array, seed: Array
) -> tuple[Params, Any]:
    """Trains on with the penalty of network slimming; ``config`` is of norms."""
    loss = _loss(model, data)

    def with_penalty(params: Params, batch: Array) -> Array:
        return loss(params, batch) + pp.slim_penalty(params, config)

    params = _fit(with_penalty, params, batches, TRAINING_RATE)
    table = {layer.name: layer for layer in layers(model, data.test_images)}
    feeds = {norm: table[layer] for norm, layer in FOLLOWS.items()}
    return params, pp.slim(params, None, config, feeds=feeds)


def by_admm(pruner: Callable[..., Any]) -> Way:
    """Trains on, pulled towards the nearest pruned weights; those are sought once an epoch."""

    def way(
        model: nn.Module, data: Any, params: Params, config: pp.Config, batches: Array, seed: Array
    ) -> tuple[Params, Any]:
        loss, adam = _loss(model, data), _adam(TRAINING_RATE, len(batches))

        def one_round(carry: Any, batches: Array) -> tuple[Any, Any]:
            (params, opt_state), state = carry

            def with_penalty(params: Params, batch: Array) -> Array:
                return loss(params, batch) + pp.admm.penalty(params, state, config, RHO)

            step = _stepper(with_penalty, adam)
            (params, opt_state), _ = jax.lax.scan(step, (params, opt_state), batches)
            state, residuals = pp.admm.step(params, state, config, RHO, pruner=pruner)
            return ((params, opt_state), state), residuals

        start = (params, adam.init(params)), pp.admm.init(params, config)
        rounds = batches.reshape(-1, _epoch(data, batches), batches.shape[1])
        ((params, _), state), _ = jax.lax.scan(one_round, start, rounds)
        return params, norms_too(model, pp.admm.masks(params, state, config, pruner=pruner))

    return way


def by_movement(
    model: nn.Module, data: Any, params: Params, config: pp.Config, batches: Array, seed: Array
) -> tuple[Params, Any]:
    """Trains on, weights and scores together; ``config`` is a schedule with a row for each step."""
    loss = _loss(model, data)

    def masked(trained: tuple[Params, Any], step: tuple[pp.Config, Array]) -> Array:
        now, batch = step
        return loss(pp.movement.apply(*trained, now), batch)

    final = pp.movement.at(config, len(batches) - 1)
    start = params, pp.movement.init(params, final)
    rates = {"weights": _adam(TRAINING_RATE, len(batches)), "scores": optax.adam(SCORE_RATE)}
    transform = optax.multi_transform(rates, ("weights", "scores"))
    carry = start, transform.init(start)
    (trained, _), _ = jax.lax.scan(_stepper(masked, transform), carry, (config, batches))
    return trained[0], norms_too(model, pp.movement.masks(*trained, final))


def norms_too(model: nn.Module, masks: Any) -> Any:
    """Returns masks that prune the norm of every pruned channel: it would shift the zeros."""
    if not model.norms:
        return masks
    keep = {norm: masks[layer]["bias"] for norm, layer in FOLLOWS.items()}
    return {**masks, **{norm: {"scale": k, "bias": k} for norm, k in keep.items()}}


# Training.


def _adam(rate: float, steps: int) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(rate, steps))


def _stepper(loss: Callable[..., Array], transform: Any) -> Callable[..., Any]:
    def step(carry: tuple[Params, Any], batch: Any) -> tuple[tuple[Params, Any], None]:
        params, state = carry
        updates, state = transform.update(jax.grad(loss)(params, batch), state, params)
        return (optax.apply_updates(params, updates), state), None

    return step


def _fit(
    loss: Callable[..., Array], params: Params, batches: Array, rate: float, *last: Any
) -> Params:
    """Returns ``params`` after training with Adam, whose updates go through ``last``."""
    transform = optax.chain(_adam(rate, len(batches)), *last)
    start = params, transform.init(params)
    (params, _), _ = jax.lax.scan(_stepper(loss, transform), start, batches)
    return params


def _loss(model: nn.Module, data: Any) -> Callable[[Params, Array], Array]:
    def loss(params: Params, batch: Array) -> Array:
        # Norms use the statistics of the batch, which are then thrown away.
        variables, images = {"params": params}, data.train_images[batch]
        logits, _ = model.apply(variables, images, train=True, mutable=["batch_stats"])
        labels = data.train_labels[batch]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return loss


def _accuracy(model: nn.Module, data: Any, params: Params) -> Array:
    """Returns the test accuracy; norms use the statistics of all training images."""
    variables = {"params": params}
    if model.norms:
        _, statistics = model.apply(
            variables, data.train_images, train=True, mutable=["batch_stats"]
        )
        variables |= statistics
    logits = model.apply(variables, data.test_images)
    return jnp.mean(jnp.argmax(logits, axis=-1) == data.test_labels)


def _epoch(data: Any, batches: Array) -> int:
    """Returns the number of steps of an epoch."""
    return len(data.train_images) // batches.shape[1]
