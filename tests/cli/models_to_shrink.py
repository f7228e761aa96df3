"""Functions that return models, as the command line is given them."""


def torch_net():
    import torch
    from torch import nn

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3))
    return net, torch.zeros(2, 6)


def torch_alone():
    return torch_net()[0]


def linen_net():
    import jax
    from flax import linen as nn

    net, x = nn.Sequential([nn.Dense(12), nn.relu, nn.Dense(3)]), jax.numpy.ones((2, 6))
    return net, net.init(jax.random.key(0), x), x


def nnx_net():
    import jax
    from flax import nnx

    rngs = nnx.Rngs(0)
    layers = nnx.Linear(6, 12, rngs=rngs), nnx.relu, nnx.Linear(12, 3, rngs=rngs)
    return nnx.Sequential(*layers), jax.numpy.ones((2, 6))


def equinox_net():
    import equinox as eqx
    import jax

    return eqx.nn.MLP(6, 3, 12, 1, key=jax.random.key(0)), jax.numpy.ones(6)


def broken():
    raise RuntimeError("there is\nno data")


def three():
    return 3


def linen_alone():
    return linen_net()[0]


def keras_net():
    import jax
    import keras

    keras.utils.set_random_seed(0)
    Dense = keras.layers.Dense
    layers = Dense(12, activation="relu", name="hidden"), Dense(3, name="outputs")
    return keras.Sequential([keras.Input((6,)), *layers], name="net"), jax.numpy.ones((2, 6))
