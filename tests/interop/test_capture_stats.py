"""From a model to masks: captured outputs fit the layer table, stacked layers and heads too."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn

import purepruning as pp
from purepruning.stats import activations
from purepruning_interop import equinox, linen
from purepruning_interop import torch as interop
from tests.fast import some_key

pytestmark = pytest.mark.usefixtures("unoptimized")


def mean(stats, name):
    total = stats.sums[name]
    return np.asarray(total.high + total.low) / float(stats.positions[name].low)


def config_of(layers):
    rules = [{"op_types": ["default"], "sparsity": 0.5}]
    return pp.resolve(rules, layers, granularity="output_channel")


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        heads = nn.DenseGeneral((2, 3), name="heads")(x)
        return x + nn.DenseGeneral(4, axis=(-2, -1), name="merge")(jnp.tanh(heads)), None


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), name="conv")(x).reshape(x.shape[0], -1, 4)
        stack = nn.scan(
            nn.remat(Step), variable_axes={"params": 1}, split_rngs={"params": True}, length=5
        )
        return nn.Dense(6, name="out")(stack(name="stack")(x, None)[0])


def test_linen():
    model, x = Model(), jax.random.normal(some_key(0), (8, 5, 5, 3))
    params = model.init(some_key(1), x)["params"]
    config = config_of(linen.layers(model, params, x))

    @jax.jit
    def count(stats, x):
        _, outputs = linen.capture(model, {"params": params}, x, layers=config.layers)
        return activations.update(stats, outputs, config, activation="relu")

    stats = count(count(activations.init(params, config), x[:3]), x[3:])
    _, outputs = linen.capture(model, {"params": params}, x, layers=config.layers)
    assert outputs["stack.heads"].shape == (5, 8, 25, 2, 3)
    shapes = {n: tuple(t.high.shape) for n, t in stats.sums.items()}
    assert shapes == {"conv": (1, 4), "stack.heads": (5, 6), "stack.merge": (5, 4), "out": (1, 6)}
    expected = np.maximum(outputs["stack.heads"], 0).mean((1, 2)).reshape(5, 6)
    np.testing.assert_allclose(mean(stats, "stack.heads"), expected, rtol=1e-5)
    assert int(stats.samples["stack.heads"].low) == 8
    masks = pp.mean_activation_rank(params, stats, config)
    kernel = masks["stack"]["heads"]["kernel"]  # (4, 5, 2, 3): the stack on axis 1
    assert kernel.shape == (1, 5, 2, 3)
    lowest = np.argsort(expected, axis=1)[:, :3]
    for i in range(5):
        assert sorted(np.flatnonzero(~kernel[0, i].reshape(-1))) == sorted(lowest[i])


def test_equinox():
    keys = jax.random.split(some_key(0))
    model = eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(3, 4, 3, key=keys[0]),
            eqx.nn.Lambda(lambda x: x.mean((1, 2))),
            eqx.nn.Linear(4, 6, key=keys[1]),
        ]
    )
    x = jax.random.normal(some_key(2), (8, 3, 5, 5))
    params = eqx.filter(model, eqx.is_inexact_array)
    config = config_of(equinox.layers(model))
    _, outputs = jax.vmap(lambda x: equinox.capture(model, x, layers=config.layers))(x)
    stats = activations.init(params, config)
    stats = activations.update(stats, outputs, config, activation="relu")
    name = config.layers[0].name
    expected = np.maximum(outputs[name], 0).mean((0, 2, 3))
    np.testing.assert_allclose(mean(stats, name)[0], expected, rtol=1e-5)
    assert int(stats.samples[name].low) == 8
    pp.apoz_rank(params, stats, config)


@pytest.mark.parametrize("batch", [8, 1])
def test_torch(batch):
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(2), torch.nn.Linear(9, 6)
    )
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(batch, 3, 5, 5)).astype(np.float32))
    params = {name: p.detach() for name, p in model.named_parameters()}
    config = config_of(interop.layers(model))
    _, outputs = interop.capture(model, x, params=params, layers=config.layers)
    stats = activations.init(params, config)
    stats = activations.update(stats, outputs, config, activation="relu")
    expected = outputs["0"].clamp(min=0).mean((0, 2, 3))
    np.testing.assert_allclose(mean(stats, "0")[0], expected, rtol=1e-5)
    expected = outputs["3"].clamp(min=0).mean((0, 1))  # a sequence: (batch, 4, 6)
    np.testing.assert_allclose(mean(stats, "3")[0], expected, rtol=1e-5)
    assert (int(stats.samples["3"].low), int(stats.positions["3"].low)) == (batch, 4 * batch)
    pp.mean_activation_rank(params, stats, config)


def test_torch_attention():
    model = torch.nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 5, 4)).astype(np.float32))
    params = {name: p.detach() for name, p in model.named_parameters()}
    # The packed projection has no output of its own.
    layers = [layer for layer in interop.layers(model) if layer.name != "self_attn"]
    config = config_of(layers)
    names = [layer.name for layer in config.layers]
    assert names == ["linear1", "linear2", "self_attn.out_proj"]
    _, outputs = interop.capture(model, x, params=params, layers=names)
    stats = activations.init(params, config)
    stats = activations.update(stats, outputs, config, activation="identity")
    expected = model.self_attn(x, x, x)[0].detach().mean((0, 1))
    np.testing.assert_allclose(mean(stats, names[2])[0], expected, rtol=1e-4, atol=1e-6)
    assert int(stats.positions[names[2]].low) == 15
    masks = pp.mean_activation_rank(params, stats, config)
    assert torch.equal(masks["self_attn.out_proj.weight"][:, 0], expected > expected.sort()[0][1])
