"""A ResNet with half its multiply-adds, in Flax: couple, prune, shrink, train the small one on.

    python examples/structured_flax.py [--quick]

Channels that batch norms and residuals couple are removed together. The small model is a function
of smaller parameters that computes what the masked model does; ``jit`` and ``grad`` know no
difference. Draws the coupling to ``structured_flax.png``. ``structured_torch.py`` does the same for
an ``nn.Module``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _structured import (
    ROLES,
    RULES,
    STAGES,
    STEM,
    TRAINING_RATE,
    TUNING_RATE,
    Row,
    deviation,
    given,
    latencies,
    table,
)
from flax import linen as nn
from rich.console import Console

import purepruning as pp
from purepruning_interop import linen


class Block(nn.Module):
    """Two convolutions and a residual, which is projected where its shape changes."""

    channels: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Returns the sum, activated."""
        conv = functools.partial(nn.Conv, self.channels, use_bias=False)
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        y = conv((3, 3), self.stride, padding=1, name="conv1")(x)
        y = nn.relu(norm(name="norm1")(y))
        y = norm(name="norm2")(conv((3, 3), padding=1, name="conv2")(y))
        if x.shape != y.shape:
            x = norm(name="norm")(conv((1, 1), self.stride, name="project")(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A stem and three stages for images of 8 x 8 pixels."""

    stem: int = STEM

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits, ``(batch, 10)``."""
        x = nn.Conv(self.stem, (3, 3), padding=1, use_bias=False, name="stem")(images[..., None])
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x))
        for name, (times, stride) in STAGES.items():
            x = Block(times * self.stem, stride, name=name)(x, train)
        return nn.Dense(10, name="classifier")(x.mean((1, 2)))


MODEL = ResNet()


def model(variables: Any, images: jax.Array, train: bool) -> tuple[jax.Array, Any]:
    """Returns logits and the batch norms' statistics, which are updated in training."""
    logits, updated = MODEL.apply(variables, images, train, mutable=["batch_stats"])
    return logits, updated["batch_stats"]


def loss(fn: Callable[..., Any], params: Any, stats: Any, images: Any, labels: Any) -> Any:
    logits, stats = fn({"params": params, "batch_stats": stats}, images, True)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), stats


def fit(fn: Callable[..., Any], variables: Any, data: Any, batches: Any, rate: float) -> Any:
    """Returns the variables after training; ``fn`` is the whole model, or the small one."""
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, len(batches)))

    @jax.jit
    def step(variables: Any, state: Any, images: jax.Array, labels: jax.Array) -> Any:
        gradient = jax.grad(functools.partial(loss, fn), has_aux=True)
        grads, stats = gradient(variables["params"], variables["batch_stats"], images, labels)
        updates, state = optimizer.update(grads, state)
        params = optax.apply_updates(variables["params"], updates)
        return {"params": params, "batch_stats": stats}, state

    state = optimizer.init(variables["params"])
    for batch in batches:
        images, labels = data.train_images[batch], data.train_labels[batch]
        variables, state = step(variables, state, images, labels)
    return variables


def main() -> None:
    data, training, tuning, repeats = given(__doc__)
    console, x = Console(), data.test_images[:1]
    variables = MODEL.init(jax.random.key(0, impl="rbg"), x)  # which compiles faster
    variables = fit(model, variables, data, training, TRAINING_RATE)

    # Logits keep their size; statistics that are returned may shrink with the parameters.
    coupling = pp.couple(model, variables, x, False, outputs=(True, False))
    layers = linen.layers(MODEL, variables, x)
    config = pp.resolve(RULES, layers, coupling=coupling, scope="global", cost="macs")
    masks = pp.group_norm(variables, None, config, roles=ROLES)
    small = pp.shrink(model, variables, masks, coupling, x, False)
    console.print(str(coupling), str(small.report), sep="\n\n", end="\n\n", soft_wrap=True)
    # The small function is trained as the whole one was.
    tuned = fit(small.fn, small.params, data, tuning, TUNING_RATE)

    whole, less = (jax.jit(fn, static_argnums=2) for fn in (model, small.fn))
    models = {
        "dense": (whole, variables),
        "masked": (whole, pp.apply_masks(variables, small.report.masks)),
        "shrunk": (less, small.params),
        "fine-tuned": (less, tuned),
    }
    images = jnp.asarray(data.test_images)
    calls = {
        name: lambda fn=fn, v=v: np.asarray(fn(v, images, False)[0])
        for name, (fn, v) in models.items()
    }
    logits = {name: call() for name, call in calls.items()}
    milliseconds = latencies(calls, repeats)
    rows = [
        Row(
            name,
            float((logits[name].argmax(-1) == data.test_labels).mean()),
            sum(p.size for p in jax.tree.leaves(v["params"])),
            pp.count(fn, v, x, False).macs,
            milliseconds[name],
        )
        for name, (fn, v) in models.items()
    ]
    console.print(table("A ResNet in Flax, and half of it", rows))
    off = deviation(logits["masked"], logits["shrunk"])
    console.print(f"Largest relative deviation of the shrunk model from the masked one: {off:.1e}")
    assert off <= 1e-5
    assert rows[-1].macs <= rows[0].macs / 2
    removed = coupling.chosen(masks, variables).removed
    pp.draw_coupling(coupling, removed).figure.savefig("structured_flax.png", dpi=150)
    console.print("Wrote structured_flax.png.")


if __name__ == "__main__":
    main()
