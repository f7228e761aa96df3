"""The small network of the recipes' tests as tasks, in Flax, Keras and torch; a step an epoch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch

import purepruning as pp
from purepruning_interop import keras as keras_adapter
from purepruning_interop import linen as linen_adapter
from purepruning_interop import torch as torch_adapter
from purepruning_interop.tasks import Objective, Task
from tests.recipes import nets

RATE = 0.05
RULES = [{"sparsity": 0.5, "op_types": ["Conv2d"]}]


def _task(name, *, start, step, apply, capture, replace, loss_of, batches, **more):
    """A task of a forward pass; ``step(params, grad of it)`` is a gradient step."""
    x, y = batches[0]

    def loss(params, batch):
        return loss_of(apply(params, batch[0]), batch[1])

    def loss_at(params, batch, at):
        logits, seen = replace(params, batch[0], at)
        return loss_of(logits, batch[1]), seen

    def minimize(objective, extra, params, masks, seed, epochs):
        for _ in range(epochs):
            params, extra = step(objective.loss, params, extra, batches[0])
            params = params if masks is None else pp.apply_masks(params, masks)
            params = objective.after(params)
        return params, extra

    plain = Objective(lambda params, extra, batch: (loss(params, batch), extra))

    def tune(params, masks, seed, epochs):
        return minimize(plain, (), params, masks, seed, epochs)[0]

    def accuracy(logits):
        return float((np.asarray(logits).argmax(1) == np.asarray(y)).mean())

    return Task(
        name=name,
        rules=RULES,
        init=lambda seed: start,
        train=lambda params, seed: tune(params, None, seed, 1),
        tune=tune,
        evaluate=lambda params: accuracy(apply(params, x)),
        tuning_epochs=1,
        batches=batches,
        loss=loss,
        minimize=minimize,
        capture=capture,
        loss_at=loss_at,
        evaluate_at=lambda params, at: accuracy(replace(params, x, at)[0]),
        apply=apply,
        inputs=(x[:1],),
        **more,
    )


def _jax_step(trained, loss, params, extra, batch):
    grads, extra = jax.grad(loss, has_aux=True)(params, extra, batch)
    moved = jax.tree.map(lambda p, g: p - RATE * g, params, grads)
    return trained(params, moved), extra


def _jax_batches():
    return [(jnp.asarray(x[:20]), jnp.asarray(y[:20])) for x, y in nets.batches()[:2]]


@functools.cache
def linen():
    model, start, batches = nets.Linen(), nets.linen_variables(), _jax_batches()

    def trained(old, new):
        return {**new, "batch_stats": old["batch_stats"]}

    def capture(params, batch, layers, of):
        return linen_adapter.capture(model, params, batch[0], layers=layers, of=of)[1]

    return _task(
        "linen",
        start=start,
        step=functools.partial(_jax_step, trained),
        apply=model.apply,
        capture=capture,
        replace=lambda params, x, at: linen_adapter.replace(model, params, x, at=at),
        loss_of=nets.cross_entropy,
        batches=batches,
        layers=linen_adapter.layers(model, start, batches[0][0]),
        activations=linen_adapter.activations(model, start, batches[0][0]),
        traced=True,
    )


@functools.cache
def keras():
    model, batches = nets.keras_net(), _jax_batches()
    apply, start = keras_adapter.function(model)
    fixed = {v.path for v in model.non_trainable_variables}

    def trained(old, new):
        return {n: old[n] if n in fixed else x for n, x in new.items()}

    def capture(params, batch, layers, of):
        return keras_adapter.capture(model, batch[0], layers=layers, params=params, of=of)[1]

    return _task(
        "keras",
        start=start,
        step=functools.partial(_jax_step, trained),
        apply=apply,
        capture=capture,
        replace=lambda params, x, at: keras_adapter.replace(model, x, at=at, params=params),
        loss_of=nets.cross_entropy,
        batches=batches,
        layers=keras_adapter.layers(model, batches[0][0]),
        activations=keras_adapter.activations(model, batches[0][0]),
        traced=True,
    )


@functools.cache
def of_torch():
    model = nets.torch_net().eval()
    start = {n: x.detach().clone() for n, x in model.state_dict().items()}
    fixed = {n for n, _ in model.named_buffers()}
    batches = [(x[:20], y[:20]) for x, y in nets.torch_batches()[:2]]

    def apply(params, x):
        return torch.func.functional_call(model, params, x)

    def step(loss, params, extra, batch):
        leaves = {n: x if n in fixed else x.detach().requires_grad_() for n, x in params.items()}
        value, extra = loss(leaves, extra, batch)
        value.backward()
        with torch.no_grad():
            moved = {
                n: x if x.grad is None else (x - RATE * x.grad).detach() for n, x in leaves.items()
            }
        return {n: x.detach() for n, x in moved.items()}, jax.tree.map(_detached, extra)

    def capture(params, batch, layers, of):
        found = torch_adapter.capture(model, batch[0], layers=layers, params=params, of=of)[1]
        return {name: x.detach() for name, x in found.items()}

    return _task(
        "torch",
        start=start,
        step=step,
        apply=apply,
        capture=capture,
        replace=lambda params, x, at: torch_adapter.replace(model, x, at=at, params=params),
        loss_of=torch.nn.functional.cross_entropy,
        batches=batches,
        layers=torch_adapter.layers(model),
        activations=torch_adapter.activations(model),
        model=model,
    )


def _detached(x):
    return x.detach() if isinstance(x, torch.Tensor) else x
