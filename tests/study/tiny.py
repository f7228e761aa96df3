"""A task that takes a moment, for JAX and for torch: three classes of eight numbers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch

import purepruning as pp
from purepruning_interop.tasks import Task

RNG = np.random.default_rng(0)
X = RNG.normal(size=(96, 8)).astype(np.float32)
Y = np.argmax(X @ RNG.normal(size=(8, 3)), axis=-1).astype(np.int32)
TRAIN, TEST = slice(0, 64), slice(64, 96)
RATE = np.float32(0.5)


def layers():
    shapes = {"a": np.zeros((8, 12)), "b": np.zeros((12, 3))}
    return tuple(pp.make_layer(shapes, n, "Linear", name=n, out_axes=1, in_axes=0) for n in shapes)


RULES = [{"sparsity": 0.5, "op_types": ["default"]}, {"exclude": True, "op_names": ["b"]}]


def apply(params, x):
    return jax.nn.relu(x @ params["a"]) @ params["b"]


def loss(params, batch):
    x, y = batch
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(apply(params, x)), y[:, None], axis=-1))


def init(seed):
    one, two = jax.random.split(jax.random.key(seed))
    return {"a": jax.random.normal(one, (8, 12)) / 3, "b": jax.random.normal(two, (12, 3)) / 3}


def descend(params, masks, steps):
    def step(params, _):
        grads = jax.grad(loss)(params, (X[TRAIN], Y[TRAIN]))
        params = jax.tree.map(lambda w, g: w - RATE * g, params, grads)
        return (params if masks is None else pp.apply_masks(params, masks)), None

    return jax.lax.scan(step, params, None, steps)[0]


def capture(params, batch, layers, of):
    x = batch[0]
    hidden = x @ params["a"]
    if of == "inputs":
        return {"a": x, "b": jax.nn.relu(hidden)}
    return {"a": hidden, "b": jax.nn.relu(hidden) @ params["b"]}


def evaluate(params):
    right = jnp.argmax(apply(params, X[TEST]), axis=-1) == Y[TEST]
    return jnp.mean(right, dtype=jnp.float32)


task = Task(
    name="tiny",
    layers=layers(),
    rules=RULES,
    init=init,
    train=lambda params, seed: descend(params, None, 20),
    tune=lambda params, masks, seed, epochs: descend(params, masks, 3 * epochs),
    evaluate=evaluate,
    tuning_epochs=2,
    batches=[(X[:32], Y[:32]), (X[32:64], Y[32:64])],
    loss=loss,
    capture=capture,
    traced=True,
    about={"Data": "Made up."},
)


loop = dataclasses.replace(task, traced=False)


@functools.cache
def torch_task():
    """The same with modules, which functions of params hold inside."""
    x, y = torch.tensor(X), torch.tensor(Y, dtype=torch.long)

    def forward(params, x):
        return (x @ params["a"]).relu() @ params["b"]

    def torch_loss(params, batch):
        return torch.nn.functional.cross_entropy(forward(params, batch[0]), batch[1])

    def torch_init(seed):
        return {n: torch.tensor(np.asarray(w)) for n, w in init(seed).items()}

    def descend(params, masks, steps):
        for _ in range(steps):
            leaves = {n: w.detach().requires_grad_() for n, w in params.items()}
            torch_loss(leaves, (x[TRAIN], y[TRAIN])).backward()
            params = {n: (w - float(RATE) * w.grad).detach() for n, w in leaves.items()}
            params = params if masks is None else pp.apply_masks(params, masks)
        return params

    def torch_capture(params, batch, layers, of):
        hidden = batch[0] @ params["a"]
        if of == "inputs":
            return {"a": batch[0], "b": hidden.relu()}
        return {"a": hidden, "b": hidden.relu() @ params["b"]}

    return Task(
        name="tiny",
        layers=layers(),
        rules=RULES,
        init=torch_init,
        train=lambda params, seed: descend(params, None, 20),
        tune=lambda params, masks, seed, epochs: descend(params, masks, 3 * epochs),
        evaluate=lambda params: (forward(params, x[TEST]).argmax(-1) == y[TEST]).float().mean(),
        tuning_epochs=2,
        batches=[(x[:32], y[:32]), (x[32:64], y[32:64])],
        loss=torch_loss,
        capture=torch_capture,
    )
