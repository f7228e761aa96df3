"""The digits task: a small CNN on the 1,797 digits that come with scikit-learn.

Images of 8 x 8 pixels, a fixed split into 1,347 training and 450 test images, and a network of
36,000 weights that gets 97 % of the latter right. Network and rates were chosen on a quarter of the
training images, held out; fine-tuning was not tuned at all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax import Array
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import purepruning as pp
from purepruning_interop import linen
from purepruning_interop.tasks.task import Objective, Task

BATCH = 64
EPOCHS, TUNING_EPOCHS = 20, 5
TRAINING_RATE, TUNING_RATE = 5e-3, 2e-3  # Adam's, with cosine decay

#: The last rule that selects a layer counts: the outputs of the classifier are the ten digits.
RULES = (
    {"sparsity": 0.5, "op_types": ["default"]},
    {"exclude": True, "op_names": ["classifier"]},
)


def patches_convolution(
    images: Array, kernel: Array, strides: Sequence[int], padding: str, **_: Any
) -> Array:
    """Returns what ``lax.conv_general_dilated`` does, as one matrix product.

    Inside a loop XLA runs a slow form of its own convolutions on a CPU, and under ``vmap`` makes
    them grouped ones; both take ten times as long.
    """
    height, width, inputs, outputs = kernel.shape
    pads = jax.lax.padtype_to_pads(images.shape[1:3], (height, width), strides, padding)
    padded = jnp.pad(images, ((0, 0), *pads, (0, 0)))
    rows, columns = (-(-n // s) for n, s in zip(images.shape[1:3], strides, strict=True))
    shifted = [
        padded[:, i :: strides[0], j :: strides[1]][:, :rows, :columns]
        for i in range(height)
        for j in range(width)
    ]
    return jnp.concatenate(shifted, axis=-1) @ kernel.reshape(height * width * inputs, outputs)


class CNN(nn.Module):
    """Two convolutions and two dense layers for images of 8 x 8 pixels; 36,000 weights.

    Attributes:
        norms: whether there is a batch norm before each activation.
    """

    norms: bool = False

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        """Returns the logits of the ten digits, ``(n, 8, 8) -> (n, 10)``."""

        def activate(x: Array, name: str) -> Array:
            if self.norms:  # without momentum, statistics are those of the last call
                x = nn.BatchNorm(use_running_average=not train, momentum=0.0, name=name)(x)
            return nn.relu(x)

        convolution = functools.partial(
            nn.Conv,
            kernel_size=(3, 3),
            strides=(2, 2),
            conv_general_dilated=patches_convolution,
        )
        x = activate(convolution(32, name="conv1")(images[..., None]), "norm1")
        x = activate(convolution(64, name="conv2")(x), "norm2")
        x = activate(nn.Dense(64, name="hidden")(x.reshape(len(x), -1)), "norm3")
        return nn.Dense(10, name="classifier")(x)


def load_data() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns training and test images, ``(n, 8, 8)`` in [0, 1], and training and test labels."""
    digits = load_digits()
    images, labels = (digits.images / 16).astype(np.float32), digits.target.astype(np.int64)
    return tuple(train_test_split(images, labels, test_size=450, random_state=0, stratify=labels))


@functools.cache
def task() -> Task:
    """Returns the task."""
    train_images, test_images, train_labels, test_labels = load_data()
    model = CNN()
    shapes = jax.eval_shape(model.init, jax.random.key(0), test_images)["params"]

    def apply(params: Any, images: Any) -> Any:
        return model.apply({"params": params}, images)

    def loss(params: Any, batch: tuple[Array, Array]) -> Array:
        images, labels = batch
        logits = apply(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def capture(params: Any, batch: tuple[Array, Array], layers: Any, of: Any) -> Any:
        return linen.capture(model, params, batch[0], layers=layers, of=of)[1]

    def evaluate(params: Any) -> Array:
        right = jnp.argmax(apply(params, test_images), axis=-1) == test_labels
        return jnp.mean(right, dtype=jnp.float32)

    def loss_at(params: Any, batch: tuple[Array, Array], at: Any) -> tuple[Array, Any]:
        logits, seen = linen.replace(model, params, batch[0], at=at)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean(), seen

    def evaluate_at(params: Any, at: Any) -> Array:
        logits, _ = linen.replace(model, params, test_images, at=at)
        return jnp.mean(jnp.argmax(logits, axis=-1) == test_labels, dtype=jnp.float32)

    data = train_images, train_labels.astype(np.int32)
    test_labels = test_labels.astype(np.int32)
    own = Objective(lambda params, extra, batch: (loss(params, batch), extra))

    def fit(params: Any, masks: Any, seed: Any, epochs: int, rate: float) -> Any:
        return _fit(data, own, (), params, masks, seed, epochs, rate)[0]

    whole = [slice(i, i + BATCH) for i in range(0, len(train_images) - BATCH + 1, BATCH)]
    return Task(
        name="digits",
        layers=linen.layers(model, shapes, test_images),
        rules=RULES,
        init=jax.jit(lambda seed: model.init(jax.random.key(seed), test_images)["params"]),
        train=jax.jit(lambda params, seed: fit(params, None, seed, EPOCHS, TRAINING_RATE)),
        tune=jax.jit(functools.partial(_tune, fit), static_argnums=3),
        evaluate=jax.jit(evaluate),
        tuning_epochs=TUNING_EPOCHS,
        batches=[(data[0][i], data[1][i]) for i in whole],
        loss=loss,
        minimize=jax.jit(functools.partial(_minimize, data), static_argnums=(0, 5)),
        capture=capture,
        activations=linen.activations(model, shapes, test_images),
        loss_at=loss_at,
        evaluate_at=evaluate_at,
        apply=apply,
        inputs=(test_images[:8],),
        traced=True,
        about={
            "Data": "scikit-learn's digits: 1,797 images of 8 x 8 pixels, ten classes; "
            "1,347 for training, 450 for the test, always the same.",
            "Network": "Two convolutions, two dense layers, no norms: 36,000 weights.",
            "Training": f"{EPOCHS} epochs of Adam in batches of {BATCH}, at {TRAINING_RATE} with "
            f"cosine decay; fine-tuning the same at {TUNING_RATE}.",
        },
    )


def _tune(fit: Callable[..., Any], params: Any, masks: Any, seed: Any, epochs: int) -> Any:
    """Returns fine-tuned params, trained on other batches than those of the training."""
    return fit(params, masks, seed + 1_000_000, epochs, TUNING_RATE)


def _minimize(
    data: tuple[np.ndarray, np.ndarray],
    objective: Objective,
    extra: Any,
    params: Any,
    masks: Any,
    seed: Any,
    epochs: int,
) -> tuple[Any, Any]:
    """Returns params fine-tuned by another loss, and its extra."""
    return _fit(data, objective, extra, params, masks, seed + 1_000_000, epochs, TUNING_RATE)


def _fit(
    data: tuple[np.ndarray, np.ndarray],
    objective: Objective,
    extra: Any,
    params: Any,
    masks: Any,
    seed: Any,
    epochs: int,
    rate: float,
) -> tuple[Any, Any]:
    """Returns params after so many epochs of Adam, pruned weights at zero, and the extra."""
    steps = len(data[0]) // BATCH

    def order(key: Array) -> Array:
        return jax.random.permutation(key, len(data[0]))[: steps * BATCH].reshape(steps, BATCH)

    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 1), epochs)
    batches = jax.vmap(order)(keys).reshape(epochs * steps, BATCH)
    adam = optax.adam(optax.cosine_decay_schedule(rate, epochs * steps))
    transform = adam if masks is None else optax.chain(adam, pp.keep_pruned(masks))
    images, labels = map(jnp.asarray, data)

    def step(carry: tuple[Any, Any, Any], batch: Array) -> tuple[tuple[Any, Any, Any], None]:
        params, state, extra = carry
        grad = jax.grad(objective.loss, has_aux=True)
        grads, extra = grad(params, extra, (images[batch], labels[batch]))
        updates, state = transform.update(grads, state, params)
        return (objective.after(optax.apply_updates(params, updates)), state, extra), None

    params = params if masks is None else pp.apply_masks(params, masks)
    (params, _, extra), _ = jax.lax.scan(step, (params, transform.init(params), extra), batches)
    return params, extra
