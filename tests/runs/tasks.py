"""Small tasks: a linear map that is trained by steps that a few lines of NumPy do too."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import torch

import purepruning as pp
from purepruning_interop.tasks import Task
from purepruning_interop.torch import layers

ROWS, COLUMNS = 8, 4
RATE = 0.5
TARGET = jnp.arange(1.0, 1 + ROWS * COLUMNS).reshape(ROWS, COLUMNS) / 8


def _apply(params, x):
    return jax.nn.relu(x @ params["w"]) @ params["v"]


def _loss(params, batch):
    return ((_apply(params, batch) - 1) ** 2).mean()


def _step(params, masks, seed, epochs):
    # Half of the way to the target in an epoch, and a little of the seed, so that it is seen.
    for _ in range(epochs):
        goal = {"w": TARGET + seed / 1000, "v": jnp.ones((COLUMNS, 2))}
        params = jax.tree.map(lambda p, g: (p + g) / 2, params, goal)
    return params if masks is None else pp.apply_masks(params, masks)


def _minimize(objective, extra, params, masks, seed, epochs):
    """Gradient descent, a step for each epoch, on the first batch."""
    for _ in range(epochs):
        grads, extra = jax.grad(objective.loss, has_aux=True)(params, extra, jnp.eye(ROWS))
        params = jax.tree.map(lambda p, g: p - RATE * g, params, grads)
        params = objective.after(params if masks is None else pp.apply_masks(params, masks))
    return params, extra


def _init(seed):
    # Powers of two: nothing is rounded.
    return {"w": jnp.full((ROWS, COLUMNS), 0.5) * (1 + seed), "v": jnp.ones((COLUMNS, 2))}


def small():
    params = _init(0)
    calls = []

    def evaluate(params):
        calls.append(0)
        if os.environ.get("STOP_AT") == str(len(calls)):
            os.kill(os.getpid(), 9)
        return -jnp.abs(params["w"] - TARGET).mean()

    return Task(
        name="small",
        layers=(
            pp.make_layer(params, "w", "Linear", out_axes=1, in_axes=0),
            pp.make_layer(params, "v", "Linear", out_axes=1, in_axes=0),
        ),
        rules=[{"sparsity": 0.5}],
        init=_init,
        train=lambda params, seed: _step(params, None, seed, 2),
        tune=_step,
        evaluate=evaluate,
        tuning_epochs=1,
        metric="score",
        batches=[jnp.eye(ROWS) * (1 + i) for i in range(2)],
        loss=_loss,
        minimize=_minimize,
        capture=lambda params, x, layers, of: {"w": x @ params["w"]},
        apply=_apply,
        inputs=(jnp.ones((1, ROWS)),),
        traced=True,
    )


def without(task, *names):
    return dataclasses.replace(task, **dict.fromkeys(names))


def bare():
    return dataclasses.replace(without(small(), "loss", "minimize", "capture", "apply"), batches=())


def deep():
    """Three matrices, so that a search has plans to choose from."""

    def apply(params, x):
        return jax.nn.relu(jax.nn.relu(x @ params["w"]) @ params["u"]) @ params["v"]

    def init(seed):
        rows = {"w": (ROWS, 16), "u": (16, 12), "v": (12, 2)}
        return {n: jnp.arange(1.0, 1 + a * b).reshape(a, b) / 8 for n, (a, b) in rows.items()}

    params = init(0)
    table = [pp.make_layer(params, n, "Linear", out_axes=1, in_axes=0) for n in params]
    return dataclasses.replace(
        small(),
        name="deep",
        layers=tuple(table),
        init=init,
        train=lambda params, seed: params,
        tune=lambda params, masks, seed, epochs: params,
        evaluate=lambda params: params["w"].sum() + params["u"].sum(),
        loss=lambda params, batch: (apply(params, batch) ** 2).mean(),
        apply=apply,
    )


def repeating():
    """The last half of the columns of w are multiples of the first half, which are smaller."""
    half = jax.random.normal(jax.random.key(0), (ROWS, COLUMNS))
    v = jax.random.normal(jax.random.key(1), (2 * COLUMNS, 2))
    x = jax.random.normal(jax.random.key(2), (30, ROWS))
    first = {"w": jnp.concatenate([half, 9 * half], axis=1), "v": v}
    before = _apply(first, x)
    return dataclasses.replace(
        small(),
        layers=tuple(pp.make_layer(first, n, "Linear", out_axes=1, in_axes=0) for n in first),
        init=lambda seed: first,
        train=lambda params, seed: params,
        evaluate=lambda params: -jnp.abs(_apply(params, x) - before).max(),
        batches=[x[:15], x[15:]],
        capture=lambda params, x, layers, of: {"v": jax.nn.relu(x @ params["w"])},
    )


def square():
    """The loss is half of the squared distance of w to a target, whose gradient is w - target."""

    def loss(params, batch):
        return 0.5 * jnp.sum((params["w"] - TARGET) ** 2)

    return dataclasses.replace(small(), loss=loss)


def of_torch():
    model = torch.nn.Linear(4, 2)

    def tune(params, masks, seed, epochs):
        params = {n: x * 1.5 for n, x in params.items()}
        return params if masks is None else pp.apply_masks(params, masks)

    def capture(params, batch, layers, of):
        return {"": torch.func.functional_call(model, params, batch)}

    return Task(
        name="of torch",
        layers=(pp.Layer("fc", "Linear", "weight", (2, 4), (0,), (1,), bias="bias"),),
        rules=[{"sparsity": 0.5}],
        init=lambda seed: {"weight": torch.arange(8.0).reshape(2, 4) + seed, "bias": torch.ones(2)},
        train=lambda params, seed: {n: x + 1 for n, x in params.items()},
        tune=tune,
        evaluate=lambda params: params["weight"].sum(),
        batches=[torch.eye(4)],
        loss=lambda params, x: torch.func.functional_call(model, params, x).square().mean(),
        capture=capture,
    )


def not_a_task():
    return 3


def failing():
    raise RuntimeError("no\ndata")


def smaller_of_torch():
    """Two layers, so that the first one may lose outputs."""
    model = torch.nn.Sequential()
    model.add_module("fc", torch.nn.Linear(4, 6))
    model.add_module("out", torch.nn.Linear(6, 2))
    start = {
        n: torch.arange(1.0, 1 + x.numel()).reshape(x.shape) for n, x in model.state_dict().items()
    }

    def tune(params, masks, seed, epochs):
        return params if masks is None else pp.apply_masks(params, masks)

    return Task(
        name="smaller of torch",
        layers=layers(model),
        rules=[{"sparsity": 0.5}],
        init=lambda seed: start,
        train=lambda params, seed: params,
        tune=tune,
        evaluate=lambda params: params["fc.weight"].sum(),
        model=model,
        inputs=(torch.ones(1, 4),),
    )
