"""Keras models as tables, arrays and pure functions; every expectation is written by hand."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from keras import layers as kl

import purepruning as pp
from purepruning_interop import keras as adapter
from purepruning_interop.keras.backend import require_jax
from tests.interop.capture import assert_outputs
from tests.interop.table import assert_table, row
from tests.messages import raises

pytestmark = pytest.mark.usefixtures("unoptimized", "standard_promotion", "rank_promotion")

X = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)


class Subclassed(keras.Model):
    """Layers in attributes and lists, of given and of equal names, and a variable of its own."""

    def __init__(self):
        super().__init__(name="net")
        self.blocks = [kl.Dense(4, name="block") for _ in range(2)]
        self.last = kl.Dense(2, name="last")
        self.table = self.add_weight(shape=(4, 4), name="table")

    def build(self, shape):
        for block in self.blocks:
            block.build(shape)
        self.last.build(shape)

    def call(self, x):
        for block in self.blocks:
            x = keras.ops.relu(block(x))
        return self.last(x @ self.table)

    def encode(self, x):
        return self.blocks[0](x)


def functional():
    x = inputs = keras.Input((4,))
    x = kl.Dense(4, activation="relu", name="hidden")(x)
    x = kl.Dropout(0.5)(kl.BatchNormalization(name="norm")(x))
    return keras.Model(inputs, kl.Dense(2, name="last")(x))


def sequential():
    return keras.Sequential(
        [keras.Input((4,)), kl.Dense(3, name="a"), kl.Dense(2, name="b")], name="seq"
    )


def nested():
    """Two layers of one name in models of their own, and a third around them, which share it."""
    x = keras.Input((4,))
    inner = keras.Model(x, kl.Dense(4, name="d")(x), name="inner")
    sealed = keras.Sequential([keras.Input((4,)), kl.Dense(4, name="d")], name="sealed")
    x = keras.Input((4,))
    return keras.Model(x, kl.Dense(2, name="d")(sealed(inner(inner(x)))))


def shared():
    x, layer = keras.Input((4,)), kl.Dense(4, name="shared")
    return keras.Model(x, kl.Dense(2, name="last")(layer(layer(x))))


def subclassed():
    model = Subclassed()
    model.build((None, 4))
    return model


MODELS = {
    "functional": functional,
    "sequential": sequential,
    "subclassed": subclassed,
    "nested": nested,
    "shared": shared,
}


def dense(path, aliases=()):
    return row("Linear", f"{path}/kernel", (1,), (0,), bias=f"{path}/bias", aliases=aliases)


EXPECTED = {
    "functional": {
        "hidden": dense("hidden"),
        "norm": row("BatchNorm1d", "norm/gamma", (0,), bias="norm/beta"),
        "last": dense("last"),
    },
    "sequential": {"a": dense("a", ("seq/a",)), "b": dense("b", ("seq/b",))},
    # Two layers of one name are numbered.
    "subclassed": {
        "table": row("Subclassed", "table"),
        "block": dense("block", ("net/block",)),
        "block_1": dense("block_1", ("net/block",)),
        "last": dense("last", ("net/last",)),
    },
    "nested": {"inner/d": dense("inner/d"), "sealed/d": dense("sealed/d"), "d": dense("d")},
    "shared": {"shared": dense("shared"), "last": dense("last")},
}


@pytest.mark.parametrize("name", MODELS)
def test_the_table_is_the_expected_one(name):
    model = MODELS[name]()
    assert_table(adapter.layers(model, X, training=True), adapter.params(model), EXPECTED[name])


@pytest.mark.parametrize("name", MODELS)
def test_arrays_go_out_and_back_in(name):
    """The model computes with masked arrays what the pure function of it does, bit for bit."""
    model = MODELS[name]()
    rng = np.random.default_rng(0)
    for v in model.weights:
        v.assign(rng.uniform(0.5, 1.5, v.shape))
    params = adapter.params(model)
    assert sum(x.size for x in params.values()) == model.count_params()
    masks = pp.level(params, None, pp.resolve(0.5, adapter.layers(model)))
    masked = pp.apply_masks(params, masks)
    tv, ntv = model.trainable_variables, model.non_trainable_variables
    paths = {id(v): path for path, v in zip(params, model_variables(model), strict=True)}
    y, _ = model.stateless_call(
        [masked[paths[id(v)]] for v in tv], [masked.get(paths.get(id(v)), v.value) for v in ntv], X
    )
    fn, _ = adapter.function(model)
    adapter.load(model, masked)
    np.testing.assert_array_equal(y, model(X))
    np.testing.assert_array_equal(fn(masked, X), model(X))
    for path, x in adapter.params(model).items():
        np.testing.assert_array_equal(x, masked[path])


def model_variables(model):
    """The variables in the order of the adapter's paths, by the numbers that they hold."""
    arrays = {np.asarray(v.value).tobytes(): v for v in model.weights}
    return [arrays[np.asarray(x).tobytes()] for x in adapter.params(model).values()]


def one(layer, *shape, dtype="float32"):
    """A model of one layer, which may need several inputs."""
    x = keras.Input(shape, dtype=dtype)
    return keras.Model(x, layer(x))


def conv(name, type, out, in_, *, bias=True, aliases=(), weight="kernel", **options):
    path = f"{name.partition('/')[0]}/{weight}"
    bias = f"{name.partition('/')[0]}/bias" if bias else None
    return {name: row(type, path, out, in_, bias=bias, aliases=aliases, **options)}


def heads(name, out, in_):
    return {f"m/{name}": row("Linear", f"m/{name}/kernel", out, in_, bias=f"m/{name}/bias")}


def cell(kind, cls, bias):
    path = f"m/{cls}_cell"
    return {
        f"{path}/kernel": row(
            kind,
            f"{path}/kernel",
            (1,),
            (0,),
            bias=f"{path}/bias" if bias else None,
            aliases=("m/kernel", path, "m"),
        ),
        f"{path}/recurrent_kernel": row(
            kind, f"{path}/recurrent_kernel", (1,), (0,), aliases=("m/recurrent_kernel", path, "m")
        ),
    }


LAYERS = {
    "conv1d": (lambda: one(kl.Conv1D(4, 3, name="m"), 8, 2), conv("m", "Conv1d", (2,), (1,))),
    "conv2d": (
        lambda: one(kl.Conv2D(4, 3, groups=2, name="m"), 8, 8, 2),
        conv("m", "Conv2d", (3,), (2,), groups=2),
    ),
    "conv3d": (lambda: one(kl.Conv3D(4, 2, name="m"), 4, 4, 4, 2), conv("m", "Conv3d", (4,), (3,))),
    "transpose": (
        lambda: one(kl.Conv2DTranspose(4, 3, name="m"), 8, 8, 2),
        conv("m", "ConvTranspose2d", (2,), (3,)),
    ),
    "depthwise": (
        lambda: one(kl.DepthwiseConv2D(3, name="m"), 8, 8, 2),
        conv("m", "Conv2d", (2,), (3,), groups=2),
    ),
    "multiplied": (
        lambda: one(kl.DepthwiseConv1D(3, depth_multiplier=3, name="m"), 8, 2),
        conv("m", "Conv1d", (1, 2), groups=2, in_=()),
    ),
    "separable": (
        lambda: one(kl.SeparableConv2D(4, 3, name="m"), 8, 8, 2),
        conv(
            "m/depthwise_kernel",
            "Conv2d",
            (2,),
            (3,),
            groups=2,
            bias=False,
            aliases=("m",),
            weight="depthwise_kernel",
        )
        | conv(
            "m/pointwise_kernel", "Conv2d", (3,), (2,), aliases=("m",), weight="pointwise_kernel"
        ),
    ),
    "embedding": (
        lambda: one(kl.Embedding(5, 3, name="m"), 4, dtype="int32"),
        {"m": row("Embedding", "m/embeddings", (1,), (0,))},
    ),
    "attention": (
        lambda: attention(kl.MultiHeadAttention(2, 3, name="m")),
        heads("query", (1, 2), (0,))
        | heads("key", (1, 2), (0,))
        | heads("value", (1, 2), (0,))
        | heads("attention_output", (2,), (0, 1)),
    ),
    "grouped attention": (
        lambda: attention(kl.GroupQueryAttention(3, 4, 2, name="m")),
        heads("query", (1, 2), (0,))
        | heads("key", (1, 2), (0,))
        | heads("value", (1, 2), (0,))
        | heads("attention_output", (2,), (0, 1)),
    ),
    "einsum": (
        lambda: one(kl.EinsumDense("abc,bcd->acd", (3, 7), bias_axes="cd", name="m"), 4, 3),
        {"m": row("Linear", "m/kernel", (2,), (0,), stack=(1,), bias="m/bias")},
    ),
    "einsum with another bias": (
        lambda: one(kl.EinsumDense("abc,cd->abd", (4, 7), bias_axes="bd", name="m"), 4, 3),
        {"m": row("Linear", "m/kernel", (1,), (0,))},
    ),
    "rnn": (lambda: one(kl.SimpleRNN(3, name="m"), 4, 2), cell("RNN", "simple_rnn", True)),
    "gru": (lambda: one(kl.GRU(3, name="m"), 4, 2), cell("GRU", "gru", False)),
    "lstm": (lambda: one(kl.LSTM(3, name="m"), 4, 2), cell("LSTM", "lstm", True)),
    "each step": (
        lambda: one(kl.TimeDistributed(kl.Dense(3, name="d"), name="m"), 4, 2),
        {"m/d": dense("m/d")},
    ),
    "layer norm": (
        lambda: one(kl.LayerNormalization(name="m"), 4),
        {"m": row("LayerNorm", "m/gamma", (0,), bias="m/beta")},
    ),
    "rms norm": (
        lambda: one(kl.RMSNormalization(name="m"), 4),
        {"m": row("RMSNorm", "m/scale", (0,))},
    ),
    "group norm": (
        lambda: one(kl.GroupNormalization(2, name="m"), 4),
        {"m": row("GroupNorm", "m/gamma", (0,), bias="m/beta")},
    ),
    "batch norm of images": (
        lambda: one(kl.BatchNormalization(name="m"), 8, 8, 4),
        {"m": row("BatchNorm2d", "m/gamma", (0,), bias="m/beta")},
    ),
    "no scale": (lambda: one(kl.BatchNormalization(scale=False, name="m"), 4), {}),
    "prelu": (lambda: one(kl.PReLU(name="m"), 4), {"m": row("PReLU", "m/alpha", (0,))}),
    "frozen": (
        lambda: one(kl.Dense(3, trainable=False, name="m"), 4),
        {"m": dense("m")},
    ),
}


def attention(layer):
    x = keras.Input((4, 6))
    return keras.Model(x, layer(x, x))


@pytest.mark.parametrize("name", LAYERS)
def test_the_row_of_a_layer(name):
    make, expected = LAYERS[name]
    model = make()
    assert_table(adapter.layers(model), adapter.params(model), expected)


@pytest.mark.parametrize("first", [False, True])
def test_output_axes_and_windows_of_both_data_formats(first):
    data_format = "channels_first" if first else "channels_last"
    shape = (2, 9, 8) if first else (9, 8, 2)
    x = inputs = keras.Input(shape)
    options = {"data_format": data_format, "padding": "same"}
    x = kl.Conv2D(4, 3, strides=(2, 1), dilation_rate=1, name="conv", **options)(x)
    x = kl.DepthwiseConv2D(3, name="depth", **options)(x)
    x = kl.SeparableConv2D(4, 3, name="sep", **options)(x)
    x = kl.BatchNormalization(axis=1 if first else -1, name="norm")(x)
    x = kl.Conv2DTranspose(3, 3, name="up", **options)(x)
    model = keras.Model(inputs, x)
    table = {layer.name: layer for layer in adapter.layers(model)}
    batch = np.ones((1, *shape), np.float32)
    names = ["conv", "depth", "norm", "up", "sep/pointwise_kernel"]
    # A shape is all that is looked at: nothing is computed.
    seen = jax.eval_shape(lambda x: adapter.capture(model, x, layers=names)[1], batch)
    for name in names:
        layer = table[name]
        (axis,) = layer.output_axes
        assert seen[name].shape[axis] == layer.out_channels
    assert table["conv"].output_axes == ((-3,) if first else (-1,))
    assert table["sep/depthwise_kernel"].output_axes == ()
    assert table["conv"].window.strides == (2, 1)
    assert table["conv"].window.pads((9, 8), (3, 3)) == ((1, 1), (1, 1))


def test_a_causal_window_pads_before():
    model = one(kl.Conv1D(2, 3, padding="causal", dilation_rate=2, name="m"), 8, 1)
    assert adapter.layers(model)[0].window.padding == ((4, 0),)


# Values.


def by_hand(params, x):
    """What hidden, norm and last of the functional model put out."""
    p = {path: np.asarray(x) for path, x in params.items()}
    hidden = np.maximum(x @ p["hidden/kernel"] + p["hidden/bias"], 0)
    norm = hidden / np.sqrt(1 + 1e-3)  # averages of 0, variances of 1
    return {"hidden": hidden, "norm": norm, "last": norm @ p["last/kernel"] + p["last/bias"]}


@pytest.mark.parametrize("jit", [False, True])
def test_outputs_and_inputs(jit):
    model = functional()
    classes = [type(layer) for layer in model.layers]

    def capture(x, of):
        return adapter.capture(model, x, layers=adapter.layers(model), of=of)

    run = jax.jit(capture, static_argnums=1) if jit else capture
    expected = by_hand(adapter.params(model), X)
    y, outputs = run(X, "outputs")
    assert_outputs(outputs, expected)
    np.testing.assert_allclose(y, expected["last"], rtol=1e-5, atol=1e-6)
    _, inputs = run(X, "inputs")
    assert_outputs(inputs, {"hidden": X, "norm": expected["hidden"], "last": expected["norm"]})
    assert [type(layer) for layer in model.layers] == classes
    assert not any("purepruning" in name for layer in model.layers for name in vars(layer))


def test_classes_come_back_after_an_error():
    model = functional()
    with pytest.raises(ValueError, match="incompatible with the layer"):
        adapter.capture(model, X[:, :3], layers=["hidden"])
    assert type(model.get_layer("hidden")) is kl.Dense


def test_gradients_and_batches_by_parameters():
    model = functional()
    params = adapter.params(model)

    def loss(params):
        _, outputs = adapter.capture(model, X, layers=["last"], params=params)
        return jnp.sum(outputs["last"] ** 2)

    expected = by_hand(params, X)
    found = jax.grad(loss)(params)["last/kernel"]
    np.testing.assert_allclose(found, 2 * expected["norm"].T @ expected["last"], rtol=1e-4)
    two = {path: jnp.stack([x, 2 * x]) for path, x in params.items()}
    both = jax.vmap(lambda p: adapter.capture(model, X, layers=["hidden"], params=p)[1])(two)
    assert_outputs(both, {"hidden": np.stack([expected["hidden"], 2 * expected["hidden"]])})


def test_what_a_call_writes_is_dropped_or_returned():
    model = functional()
    before = adapter.params(model)
    (_, after), outputs = adapter.capture(
        model, X, layers=["norm"], of="inputs", mutable=True, training=True
    )
    expected = 0.01 * np.asarray(outputs["norm"]).mean(0)
    np.testing.assert_allclose(after["norm/moving_mean"], expected, rtol=1e-5)
    np.testing.assert_array_equal(adapter.params(model)["norm/moving_mean"], np.zeros(4))
    assert after.keys() == before.keys()


def test_layers_called_twice_or_in_loops():
    y, outputs = adapter.capture(shared(), X, layers=["shared", "shared/kernel"])
    assert [len(v) for v in outputs.values()] == [2, 2]
    for kind, states in ((kl.GRU, 1), (kl.LSTM, 2)):
        model = one(kind(3, name="m", return_sequences=True), 5, 2)
        x = np.ones((2, 5, 2), np.float32)
        y, outputs = adapter.capture(model, x, layers=["m", adapter.layers(model)[0]])
        step, left = outputs[adapter.layers(model)[0].name]
        np.testing.assert_allclose(np.swapaxes(step, 0, 1), y, rtol=1e-5)
        np.testing.assert_allclose(outputs["m"], model(x), rtol=1e-5)
        assert len(left) == states
    model = one(kl.TimeDistributed(kl.Dense(3, name="d"), name="m"), 4, 2)
    x = np.ones((2, 4, 2), np.float32)
    y, outputs = adapter.capture(model, x, layers=["m/d"])
    np.testing.assert_allclose(np.stack(outputs["m/d"], 1), y, rtol=1e-5)


def test_a_method_and_functions_at_sites():
    model = subclassed()
    kernel, bias = (np.asarray(adapter.params(model)[f"block/{n}"]) for n in ("kernel", "bias"))
    y, outputs = adapter.capture(model, X, layers=["block"], method="encode")
    assert_outputs(outputs, {"block": X @ kernel + bias})
    at = {"block:input": lambda x: (3 * x, x.shape), "relu1:output": lambda y: (0 * y, None)}
    y, found = adapter.replace(model, X, at=at)
    assert found["block:input"] == (2, 4)
    # Nothing is left of the input behind the first relu.
    np.testing.assert_allclose(y[0], y[1], rtol=1e-6)
    names = [(a.name, a.type) for a in adapter.activations(model, X)]
    assert names == [("relu1", "ReLU"), ("relu2", "ReLU")]


# Errors.


def test_what_does_not_fit_is_named_and_nothing_is_written():
    model = sequential()
    before = adapter.params(model)
    good = {"a/bias": np.ones(3, np.float32)}
    for params, error, *words in (
        ({**good, "a/kernal": X}, ValueError, "no variable 'a/kernal'", "nearest: 'a/kernel'"),
        ({**good, "a/kernel": X}, ValueError, "'a/kernel' has shape (2, 4)", "(4, 3)"),
        ({**good, "a/kernel": "x"}, TypeError, "'a/kernel' must be an array"),
        ([X], TypeError, "params must be a dictionary of arrays", "got"),
    ):
        with raises(error, *words):
            adapter.load(model, params)
        with raises(error, *words):
            adapter.capture(model, X, layers=["a"], params=params)
    for path, x in before.items():
        np.testing.assert_array_equal(adapter.params(model)[path], x)
    with raises(ValueError, "no layer 'c'", "known: ", "'a', 'a/kernel'"):
        adapter.capture(model, X, layers=["c"])


def test_a_model_that_was_not_called_has_no_variables():
    model = keras.Sequential([kl.Dense(3)], name="new")
    for call in (adapter.layers, adapter.params, adapter.function):
        with raises(ValueError, "the model 'new' has no variables yet", "call it on some data"):
            call(model)


IMPORT = "import sys; {}; import purepruning_interop.keras; print('tensorflow' in sys.modules)"


def imported(backend, before="pass"):
    """The last line that a new process says when it imports the adapter."""
    env = {**os.environ, "KERAS_BACKEND": backend}
    command = [sys.executable, "-c", IMPORT.format(before)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    return (result.stdout + result.stderr).splitlines()[-1]


def test_another_backend_is_refused_where_it_is_imported(monkeypatch):
    start = "ImportError: purepruning_interop.keras needs Keras on JAX"
    last = imported("numpy", "import keras")
    assert last.startswith(start)
    assert "imported with the backend 'numpy'; set KERAS_BACKEND=jax" in last
    monkeypatch.delitem(sys.modules, "keras")  # before it is imported
    for value, words in {"": "is not set; set", "tensorflow": "is 'tensorflow'; set"}.items():
        monkeypatch.setenv("KERAS_BACKEND", value)
        with raises(ImportError, f"KERAS_BACKEND {words} KERAS_BACKEND=jax in the environment"):
            require_jax("test")
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    require_jax("test")


def test_tensorflow_is_never_imported():
    assert imported("jax") == "False"
