"""The Flax side of ``digits.py``: a small CNN, its masks and its training.

Networks are trees of stacked arrays. ``vmap`` over seeds and sparsities finds all their masks in
one compiled call, and one more call trains them all. How that one batches best depends on the
machine; an accelerator wants ``vmap`` again. Milliseconds of a CPU core per epoch of one network
(jax 0.10, 6 sparsities):

    ===========  ===============  =======  ========
    over seeds   over sparsities  5 seeds  20 seeds
    ===========  ===============  =======  ========
    ``vmap``     ``vmap``         10.3     13.9
    ``lax.map``  ``vmap``          7.7      7.9
    ``lax.map``  ``lax.map``       7.9      8.2
    ===========  ===============  =======  ========

A few networks go well together, as many as stay in the cache. All that is with convolutions as
``patches_convolution`` of the digits task writes them. XLA's own take 94 ms by ``lax.map``, since
inside a loop it runs a slow form of them, and 128 by ``vmap``, which makes them grouped ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import purepruning as pp
from purepruning_interop import linen
from purepruning_interop.tasks.digits import CNN

Params = Any


MODEL = CNN()


def layers(images: np.ndarray) -> tuple[pp.Layer, ...]:
    """Returns the layer table, which needs shapes only: nothing is initialised or computed."""
    params = jax.eval_shape(MODEL.init, jax.random.key(0), images)["params"]
    return linen.layers(MODEL, params, images)


@jax.jit
def train(data: Any, seeds: Array, batches: Array, learning_rate: float) -> tuple[Params, Array]:
    """Returns trained params, stacked over the seeds, and their test accuracies.

    ``batches (seeds, steps, batch)`` are the numbers of the images.
    """

    def one(seed: Array, batches: Array) -> tuple[Params, Array]:
        params = MODEL.init(jax.random.key(seed), data.test_images)["params"]
        params = _fit(params, optax.identity(), data, batches, learning_rate)
        return params, _accuracy(params, data)

    return jax.vmap(one)(seeds, batches)


@functools.partial(jax.jit, static_argnums=0)
def prune(pruner: Callable[..., Any], params: Params, stats: Any, config: pp.Config) -> Any:
    """Returns masks stacked over seeds and sparsities, (seeds, sparsities, ...), in one call.

    ``params`` and ``stats`` are stacked over the seeds, the counts of ``config`` over sparsities.
    """
    over_sparsities = jax.vmap(pruner, in_axes=(None, None, 0))
    return jax.vmap(over_sparsities, in_axes=(0, 0, None))(params, stats, config)


@jax.jit
def fine_tune(
    data: Any, params: Params, masks: Any, batches: Array, learning_rate: float
) -> tuple[Array, Array, Array]:
    """Returns accuracy after pruning, after fine-tuning, and density: each (seeds, sparsities)."""

    def one(params: Params, masks: Any, batches: Array) -> tuple[Array, Array, Array]:
        pruned = pp.apply_masks(params, masks)
        tuned = _fit(pruned, pp.keep_pruned(masks), data, batches, learning_rate)
        return _accuracy(pruned, data), _accuracy(tuned, data), pp.density(masks, params)

    over_sparsities = jax.vmap(one, in_axes=(None, 0, None))
    return jax.lax.map(lambda seed: over_sparsities(*seed), (params, masks, batches))


def _fit(
    params: Params,
    last: optax.GradientTransformation,
    data: Any,
    batches: Array,
    learning_rate: float,
) -> Params:
    """Returns ``params`` after training with Adam, whose updates go through ``last``."""
    schedule = optax.cosine_decay_schedule(learning_rate, len(batches))
    transform = optax.chain(optax.adam(schedule), last)

    def loss(params: Params, batch: Array) -> Array:
        logits = MODEL.apply({"params": params}, data.train_images[batch])
        labels = data.train_labels[batch]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(carry: tuple[Params, Any], batch: Array) -> tuple[tuple[Params, Any], None]:
        params, state = carry
        updates, state = transform.update(jax.grad(loss)(params, batch), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, transform.init(params)), batches)
    return params


def _accuracy(params: Params, data: Any) -> Array:
    logits = MODEL.apply({"params": params}, data.test_images)
    return jnp.mean(jnp.argmax(logits, axis=-1) == data.test_labels)
