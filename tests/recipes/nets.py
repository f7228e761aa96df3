"""One small network on scikit-learn's digits in every framework, and its training."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import torch
from flax import linen, nnx
from sklearn.datasets import load_digits


@functools.cache
def digits():
    """Images (n, 1, 8, 8) and labels, 600 to train on and 400 to test."""
    data = load_digits()
    images = (data.images[:1000, None] / 16).astype(np.float32)
    order = np.random.default_rng(0).permutation(1000)
    x, y = images[order], data.target[:1000][order].astype(np.int32)
    return (x[:600], y[:600]), (x[600:], y[600:])


def batches():
    x, y = digits()[0]
    return [(x[i : i + 50], y[i : i + 50]) for i in range(0, 600, 50)]


class Torch(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(1, 8, 3, stride=2, padding=1)
        self.norm = torch.nn.BatchNorm2d(8)
        self.relu1 = torch.nn.ReLU()
        self.conv2 = torch.nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.relu2 = torch.nn.ReLU()
        self.fc1 = torch.nn.Linear(64, 32)
        self.relu3 = torch.nn.ReLU()
        self.relu6 = torch.nn.ReLU6()
        self.fc2 = torch.nn.Linear(32, 10)

    def forward(self, x):
        x = self.relu1(self.norm(self.conv1(x)))
        x = self.relu2(self.conv2(x)).flatten(1)
        return self.fc2(self.relu6(self.relu3(self.fc1(x))))


def torch_net():
    torch.manual_seed(0)
    return Torch()


def torch_batches():
    return [(torch.from_numpy(x), torch.from_numpy(y).long()) for x, y in batches()]


def torch_epoch(model, optimizer, callback=None):
    model.train()
    for x, y in torch_batches():
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        if callback is not None:
            callback()
        optimizer.step()


def torch_accuracy(model):
    x, y = digits()[1]
    training = model.training
    model.eval()
    with torch.no_grad():
        found = float((model(torch.from_numpy(x)).argmax(1).numpy() == y).mean())
    model.train(training)
    return found


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = x.transpose(0, 2, 3, 1)
        x = linen.Conv(8, (3, 3), strides=2, padding=1, name="conv1")(x)
        x = linen.relu(linen.BatchNorm(use_running_average=True, name="norm")(x))
        x = linen.relu(linen.Conv(16, (3, 3), strides=2, padding=1, name="conv2")(x))
        x = linen.relu(linen.Dense(32, name="fc1")(x.reshape(x.shape[0], -1)))
        return linen.Dense(10, name="fc2")(linen.relu6(x))


class Nnx(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        options = {"strides": 2, "padding": 1, "rngs": rngs}
        self.conv1 = nnx.Conv(1, 8, (3, 3), **options)
        self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.conv2 = nnx.Conv(8, 16, (3, 3), **options)
        self.fc1 = nnx.Linear(64, 32, rngs=rngs)
        self.fc2 = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv1(x.transpose(0, 2, 3, 1))))
        x = nnx.relu(self.conv2(x))
        return self.fc2(nnx.relu6(nnx.relu(self.fc1(x.reshape(x.shape[0], -1)))))


def keras_net():
    layers = keras.layers
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((1, 8, 8))
    x = layers.Permute((2, 3, 1))(x)
    x = layers.Conv2D(8, 3, strides=2, padding="same", name="conv1")(x)
    x = layers.Activation("relu")(layers.BatchNormalization(name="norm")(x))
    x = layers.Conv2D(16, 3, strides=2, padding="same", activation="relu", name="conv2")(x)
    x = layers.Dense(32, activation="relu", name="fc1")(layers.Flatten()(x))
    return keras.Model(inputs, layers.Dense(10, name="fc2")(layers.Activation("relu6")(x)))


def keras_loss(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


class Equinox(eqx.Module):
    conv1: eqx.nn.Conv2d
    conv2: eqx.nn.Conv2d
    fc1: eqx.nn.Linear
    fc2: eqx.nn.Linear

    def __init__(self):
        a, b, c, d = jax.random.split(jax.random.key(0), 4)
        self.conv1 = eqx.nn.Conv2d(1, 8, 3, stride=2, padding=1, key=a)
        self.conv2 = eqx.nn.Conv2d(8, 16, 3, stride=2, padding=1, key=b)
        self.fc1 = eqx.nn.Linear(64, 32, key=c)
        self.fc2 = eqx.nn.Linear(32, 10, key=d)

    def __call__(self, x):
        x = jax.nn.relu(self.conv2(jax.nn.relu(self.conv1(x))))
        return self.fc2(jax.nn.relu6(jax.nn.relu(self.fc1(x.reshape(-1)))))


def cross_entropy(logits, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def linen_variables():
    return Linen().init(jax.random.key(0), jnp.asarray(digits()[0][0][:1]))


def linen_loss(variables, batch):
    return cross_entropy(Linen().apply(variables, batch[0]), batch[1])


_linen_step = jax.jit(
    lambda variables, batch: jax.tree.map(
        lambda p, g: p - jnp.float32(0.2) * g, variables, jax.grad(linen_loss)(variables, batch)
    )
)


def linen_epoch(variables, after=lambda variables: variables):
    """Plain gradient descent; statistics of the batch norm get no gradient in evaluation mode."""
    statistics = variables["batch_stats"]
    for batch in batches():
        variables = {**_linen_step(variables, batch), "batch_stats": statistics}
        variables = after(variables)
    return variables


_linen_logits = jax.jit(lambda variables, x: Linen().apply(variables, x))


def linen_accuracy(variables):
    x, y = digits()[1]
    return float((np.asarray(_linen_logits(variables, x)).argmax(1) == y).mean())


def nnx_loss(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


def equinox_loss(model, batch):
    return cross_entropy(jax.vmap(model)(batch[0]), batch[1])
