"""Keras models made smaller: they compute what the masked ones do, and are trained and saved."""

import keras
import numpy as np
import pytest
from keras import layers as kl

import purepruning as pp
from purepruning_interop import keras as adapter
from tests.coupling.law import distance, half
from tests.fast import jit_once

pytestmark = pytest.mark.usefixtures("unoptimized", "standard_promotion", "rank_promotion")


def chain(shape, *layers, dtype="float32"):
    x = inputs = keras.Input(shape, dtype=dtype)
    for layer in layers:
        x = layer(x)
    return keras.Model(inputs, x)


def convs(first):
    """A convolution, a norm, depthwise and separable ones, transposed and dense ones."""
    fmt = {"data_format": "channels_first" if first else "channels_last"}
    return chain(
        (3, 8, 8) if first else (8, 8, 3),
        kl.Conv2D(8, 3, activation="relu", name="conv", **fmt),
        kl.BatchNormalization(axis=1 if first else -1, name="norm"),
        kl.DepthwiseConv2D(3, depth_multiplier=2, name="depth", **fmt),
        kl.SeparableConv2D(6, 3, name="sep", **fmt),
        kl.Conv2DTranspose(4, 2, name="up", **fmt),
        kl.Flatten(**fmt),
        kl.Dense(8, activation="silu", name="hidden"),
        kl.Dense(2, name="last"),
    )


def residual():
    x = inputs = keras.Input((6,))
    x = kl.Dense(8, name="stem")(x)
    for name in ("one", "two"):
        x = kl.Add()([x, kl.Dense(8, activation="relu", name=name)(x)])
    return keras.Model(inputs, kl.Dense(2, name="head")(x))


def attention(layer):
    x = inputs = keras.Input((5, 8))
    x = kl.Dense(8, name="embed")(x)
    x = kl.Add()([x, layer(x, x)])
    return keras.Model(inputs, kl.Dense(2, name="head")(x))


def nested():
    """Models inside models, one of them called twice."""
    x = keras.Input((6,))
    hidden = kl.Dense(8, activation="relu", name="up")(x)
    inner = keras.Model(x, kl.Dense(6, name="down")(hidden), name="inner")
    last = keras.Sequential([kl.Dense(8, name="a"), kl.Dense(2, name="b")], name="outer")
    x = keras.Input((6,))
    return keras.Model(x, last(inner(inner(x))))


class Own(keras.Model):
    """A model that its configuration says nothing of."""

    def __init__(self):
        super().__init__(name="own")
        self.first, self.last = kl.Dense(8, name="first"), kl.Dense(2, name="last")

    def build(self, shape):
        self.first.build(shape)
        self.last.build((None, 8))

    def call(self, x):
        return self.last(keras.ops.relu(self.first(x)))


def own():
    model = Own()
    model.build((None, 6))
    return model


def operators():
    """Layers joined by operators and functions of ``keras.ops``."""
    x = inputs = keras.Input((6,))
    x = kl.Dense(8, name="stem")(x)
    x = x + keras.ops.relu(kl.Dense(8, name="one")(x)) * 0.5
    return keras.Model(inputs, kl.Dense(2, name="head")(x))


RNN = {"return_sequences": True, "name": "rnn"}
MODELS = {
    "convs": (lambda: convs(False), (8, 8, 3)),
    "channels first": (lambda: convs(True), (3, 8, 8)),
    "residual": (residual, (6,)),
    "grouped": (
        lambda: chain(
            (8, 8, 2),
            kl.Conv2D(8, 1, name="a"),
            kl.Conv2D(8, 3, groups=2, name="b"),
            kl.BatchNormalization(name="norm"),
            kl.Conv2D(2, 1, name="c"),
        ),
        (8, 8, 2),
    ),
    "lstm": (lambda: chain((5, 3), kl.LSTM(6, **RNN), kl.Dense(2, name="d")), (5, 3)),
    "gru": (lambda: chain((5, 3), kl.GRU(6, **RNN), kl.Dense(2, name="d")), (5, 3)),
    "rnn": (lambda: chain((5, 3), kl.SimpleRNN(6, **RNN), kl.Dense(2, name="d")), (5, 3)),
    "both ways": (
        lambda: chain((5, 3), kl.Bidirectional(kl.LSTM(4), name="two"), kl.Dense(2, name="d")),
        (5, 3),
    ),
    "each step": (
        lambda: chain(
            (5, 3), kl.TimeDistributed(kl.Dense(6, name="in"), name="each"), kl.Dense(2, name="d")
        ),
        (5, 3),
    ),
    "einsum": (
        lambda: chain(
            (5, 6),
            kl.EinsumDense("abc,cde->abde", (5, 2, 4), bias_axes="de", name="up"),
            kl.EinsumDense("abde,dec->abc", (5, 2), bias_axes="c", name="down"),
        ),
        (5, 6),
    ),
    "nested": (nested, (6,)),
    "operators": (operators, (6,)),
    "both ways twice": (
        lambda: chain(
            (5, 3),
            kl.Bidirectional(kl.GRU(4, return_sequences=True), name="one"),
            kl.Bidirectional(kl.GRU(4), merge_mode="sum", name="two"),
            kl.Dense(2, name="d"),
        ),
        (5, 3),
    ),
    "cells": (
        lambda: chain(
            (5, 3),
            kl.RNN([kl.LSTMCell(6, name="a"), kl.GRUCell(4, name="b")], name="rnn"),
            kl.Dense(2, name="d"),
        ),
        (5, 3),
    ),
    "one cell": (
        lambda: chain((5, 3), kl.RNN(kl.LSTMCell(6, name="a"), name="r"), kl.Dense(2, name="d")),
        (5, 3),
    ),
    "function": (
        lambda: chain(
            (6,),
            kl.Dense(8, name="a"),
            kl.Lambda(lambda x: x * keras.ops.sigmoid(x), name="f"),
            kl.Dense(2, name="d"),
        ),
        (6,),
    ),
    "each step twice": (
        lambda: chain(
            (5, 3),
            kl.TimeDistributed(kl.Dense(6), name="a"),
            kl.TimeDistributed(kl.Dense(4), name="b"),
            kl.Dense(2, name="d"),
        ),
        (5, 3),
    ),
}


def randomized(model, seed=0):
    """The model with other numbers in every variable: positive ones, for variances."""
    rng = np.random.default_rng(seed)
    params = adapter.params(model)
    drawn = {
        path: rng.uniform(0.5, 1.5, x.shape) / np.prod(x.shape[:-1]) ** 0.5
        if x.ndim > 1
        else rng.uniform(0.5, 1.5, x.shape)
        for path, x in params.items()
    }
    signs = {path: np.where(rng.random(x.shape) < 0.5, -1, 1) for path, x in params.items()}
    params = {
        path: (drawn[path] * (1 if "variance" in path else signs[path])).astype(np.float32)
        for path in params
    }
    adapter.load(model, params)
    return params


def shrunk(model, shape, pruned=None):
    """A smaller model with half of all units gone, and outputs of the masked and the small one."""
    params = randomized(model)
    x = np.random.default_rng(1).normal(size=(3, *shape)).astype(np.float32)
    coupling = adapter.couple(model, x)
    assert coupling.n_units > 0
    masks = coupling.masks(half(coupling) if pruned is None else pruned(coupling), params)
    small = adapter.shrink(model, masks, coupling, x)
    masked = pp.apply_masks(params, masks)
    adapter.load(model, masked)
    fn, _ = adapter.function(model)
    expected = jit_once(fn)(masked, x)
    found = jit_once(small.fn)(small.params, x)
    assert distance(expected, found) < 1e-5
    return small, expected, x


#: What others cover: the rest of layers and of data formats.
FULL = ("one cell", "each step twice", "channels first", "gru", "rnn", "each step", "grouped")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.full] * (n in FULL)) for n in MODELS]
)
def test_a_model_is_rebuilt_and_computes_the_same(name):
    make, shape = MODELS[name]
    model = make()
    small, expected, x = shrunk(model, shape)
    assert small.reason == ""
    assert type(small.model) is type(model)
    trained = sum(int(np.prod(v.shape)) for v in small.model.trainable_variables)
    assert small.report.params[1] == trained
    assert small.report.params[1] < small.report.params[0]
    assert distance(expected, adapter.function(small.model)[0](small.params, x)) < 1e-5
    for path, array in adapter.params(small.model).items():
        np.testing.assert_array_equal(array, small.params[path])


def by_kind(kind):
    def pruned(coupling):
        return np.concatenate([f.units[: len(f) // 2] for f in coupling.families if f.kind == kind])

    return pruned


@pytest.mark.parametrize("grouped", [False, pytest.param(True, marks=pytest.mark.full)])
def test_whole_heads_leave_a_model_and_positions_of_queries_a_function(grouped):
    """A temperature is written in the layer, as the root of the size of a head."""

    def layer():
        if grouped:
            return kl.GroupQueryAttention(4, 4, 2, name="mha")
        return kl.MultiHeadAttention(4, 4, name="mha")

    small, *_ = shrunk(attention(layer()), (5, 8), by_kind("head"))
    assert (small.reason, small.report.kind) == ("", "module")
    small, *_ = shrunk(attention(layer()), (5, 8), by_kind("head_position"))
    assert small.model is None
    assert "its output differs" in small.reason or "gives" in small.reason


# Keras itself reads its variables by np.array, which then asks for a copy.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn:DeprecationWarning")
def test_a_small_model_is_saved_loaded_and_trained(tmp_path):
    small, expected, x = shrunk(residual(), (6,))
    small.model.save(tmp_path / "small.keras")
    loaded = keras.saving.load_model(tmp_path / "small.keras")
    np.testing.assert_allclose(loaded(x), expected, rtol=1e-4, atol=1e-5)
    loaded.compile("sgd", loss="mse")
    loss = loaded.fit(x, np.zeros((3, 2), np.float32), epochs=3, verbose=0).history["loss"]
    assert loss[-1] < loss[0]
    plan = small.report.plan
    again = adapter.rebuild(residual(), plan, x).model
    adapter.load(again, small.params)
    np.testing.assert_allclose(again(x), expected, rtol=1e-4, atol=1e-5)


def test_why_there_is_a_function_alone():
    small, *_ = shrunk(own(), (6,))
    assert small.model is None
    assert small.reason == "the configuration of Own names no sizes of its layers"
    # A width that is written into a reshape.
    model = chain((6,), kl.Dense(8, name="a"), kl.Reshape((2, 4)), kl.Dense(2, name="b"))
    small, *_ = shrunk(model, (6,))
    assert small.reason.startswith("it cannot be built: ValueError")
    # A layer norm keeps its divisor.
    model = chain((6,), kl.Dense(8, name="a"), kl.LayerNormalization(), kl.Dense(2, name="b"))
    small, *_ = shrunk(model, (6,))
    assert small.reason.startswith("its output differs by")


def test_the_function_is_trained_on():
    import jax

    model = own()
    small, _, x = shrunk(model, (6,))
    slopes = jax.grad(lambda p: (small.fn(p, x) ** 2).sum())(small.params)
    assert {path: g.shape for path, g in slopes.items()} == {
        path: p.shape for path, p in small.params.items()
    }


def test_costs_are_those_by_hand():
    found = adapter.count(convs(False), np.zeros((2, 8, 8, 3), np.float32))
    conv, depth = 3 * 3 * 3 * 8 * 36, 3 * 3 * 16 * 16
    sep = 3 * 3 * 16 * 4 + 16 * 6 * 4
    up = 2 * 2 * 6 * 4 * 4  # every input position is spread over its window
    dense = 36 * 8 + 8 * 2
    assert found.params == convs(False).count_params() - 16
    assert found.macs - 2 * (conv + depth + sep + dense) in (2 * up, 2 * 2 * 2 * 6 * 4 * 9)
