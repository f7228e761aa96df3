"""The Flax side of ``quantize.py``: networks of all seeds are one stacked tree."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import quantize
from flax import linen as nn

import purepruning as pp
from purepruning_interop import linen
from purepruning_interop.tasks.digits import patches_convolution

# Many small programs run for a short time each.
jax.config.update("jax_numpy_dtype_promotion", "standard")


class CNN(nn.Module):
    """Two convolutions and two dense layers; ``widths`` are their channels."""

    widths: tuple[int, int, int] = (32, 64, 64)

    @nn.compact
    def __call__(self, images: Any) -> Any:
        def convolution(width: int, name: str) -> nn.Conv:
            options = {"conv_general_dilated": patches_convolution, "name": name}
            return nn.Conv(width, (3, 3), strides=(2, 2), **options)

        one, two, hidden = self.widths
        x = nn.relu(convolution(one, "conv1")(images[..., None]))
        x = nn.relu(convolution(two, "conv2")(x))
        x = nn.relu(nn.Dense(hidden, name="hidden")(x.reshape(len(x), -1)))
        return nn.Dense(10, name="classifier")(x)


class Networks(NamedTuple):
    """Networks of all seeds, and what is the same of them."""

    model: CNN
    params: Any
    layers: tuple[pp.Layer, ...]
    macs: float = 1.0


class Tuned(NamedTuple):
    """Accuracies of all seeds, and the first network."""

    trained: Any
    state: Any
    accuracies: np.ndarray


def _networks(model: CNN, params: Any, data: Any, macs: float = 1.0) -> Networks:
    one = jax.tree.map(lambda x: x[0], params)
    return Networks(model, params, linen.layers(model, one, data.test_images), macs)


def _replace(model: CNN) -> Any:
    return lambda params, x, at: linen.replace(model, params, x, at=at)


def train(data: Any, seeds: np.ndarray, orders: np.ndarray, rate: float) -> Networks:
    model, recipe = CNN(), quantize.RECIPES[0]
    keys = jax.vmap(jax.random.key)(seeds)
    params = jax.vmap(lambda key: model.init(key, data.test_images[:1])["params"])(keys)
    networks = _networks(model, params, data)
    config = pp.resolve_quantization(quantize.rules(recipe), networks.layers)
    trained, _, _ = _tune(recipe, networks, config, data, orders, rate)
    return networks._replace(params=trained)


def pruned(data: Any, dense: Networks, sparsity: float) -> Networks:
    """Returns narrower networks, as many channels for every seed, coupled and shrunk one by one."""
    x = data.test_images[:1]
    rules = [{"sparsity": sparsity, "op_types": ["default"]}]
    rules.append({"exclude": True, "op_names": ["classifier"]})
    small, costs = [], []
    for i in range(len(jax.tree.leaves(dense.params)[0])):
        params = jax.tree.map(lambda leaf, i=i: leaf[i], dense.params)
        coupling = linen.couple(dense.model, params, x)
        config = pp.resolve(rules, dense.layers, coupling=coupling)
        masks = pp.l1_norm(params, None, config)
        found = linen.shrink(dense.model, params, masks, coupling, x)
        small.append(found.params)
        costs.append(found.report.macs)
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *small)
    widths = tuple(params[name]["bias"].shape[1] for name in ("conv1", "conv2", "hidden"))
    return _networks(CNN(widths), params, data, costs[0][1] / costs[0][0])


def tune(
    recipe: Any, networks: Networks, config: Any, data: Any, orders: np.ndarray, rate: float
) -> Tuned:
    trained, state, accuracies = _tune(recipe, networks, config, data, orders, rate)
    first = jax.tree.map(lambda x: x[0], (trained, state))
    return Tuned(*first, np.asarray(accuracies))


def _tune(
    recipe: Any, networks: Networks, config: Any, data: Any, orders: np.ndarray, rate: float
) -> Any:
    """Returns what is trained, states and test accuracies of all seeds, by one compiled call."""
    replace = _replace(networks.model)
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, max(orders.shape[1], 1)))

    def one(data: Any, params: Any, order: Any) -> Any:
        images, labels = data.train_images, data.train_labels
        trained, state = quantize.init(recipe, params, config, replace, images[:256])

        def step(carry: Any, at: Any) -> Any:
            trained, state, opt_state = carry

            def loss(trained: Any) -> Any:
                logits, seen = quantize.forward(
                    recipe, trained, state, config, replace, images[at], training=True
                )
                losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[at])
                return losses.mean(), seen

            grads, seen = jax.grad(loss, has_aux=True)(trained)
            updates, opt_state = optimizer.update(grads, opt_state)
            trained = optax.apply_updates(trained, updates)
            return (*quantize.after_step(recipe, trained, state, seen, config), opt_state), None

        start = trained, state, optimizer.init(trained)
        if len(order):
            (trained, state, _), _ = jax.lax.scan(step, start, order)
        logits, _ = quantize.forward(recipe, trained, state, config, replace, data.test_images)
        return trained, state, (logits.argmax(-1) == data.test_labels).mean()

    # By lax.map, a network at a time: its weights stay in the cache.
    compiled = jax.jit(lambda d, p, o: jax.lax.map(lambda a: one(d, *a), (p, o)))
    return compiled(jax.tree.map(jnp.asarray, data), networks.params, orders)


def latency(recipe: Any, done: Tuned, config: Any, data: Any) -> None:
    """Returns nothing: what is exported to ONNX are torch modules."""
