"""The layer table of Haiku functions; every expectation is written by hand."""

import haiku as hk
import jax
import jax.numpy as jnp
import pytest

from purepruning_interop import haiku as adapter
from tests.interop.table import assert_table, row

pytestmark = pytest.mark.usefixtures("standard_promotion")  # Haiku relies on it

IMAGE = jax.ShapeDtypeStruct((2, 8, 8, 4), "float32")
SIGNAL = jax.ShapeDtypeStruct((2, 8, 4), "float32")
VOLUME = jax.ShapeDtypeStruct((2, 4, 4, 4, 4), "float32")
VECTOR = jax.ShapeDtypeStruct((2, 4), "float32")
TOKENS = jax.ShapeDtypeStruct((2, 5), "int32")


def init(transformed, *inputs, **kwargs):
    result = jax.eval_shape(
        lambda *inputs: transformed.init(jax.random.key(0), *inputs, **kwargs), *inputs
    )
    return result[0] if isinstance(result, tuple) else result


def linear(name, module, bias=True, stack=()):
    out, in_ = len(stack) + 1, len(stack)
    bias = f"{module}.b" if bias else None
    return {name: row("Linear", f"{module}.w", (out,), (in_,), bias=bias, stack=stack)}


class MyLinear(hk.Linear):
    """A user's subclass of a known class."""


class Positions(hk.Module):
    """A module with its own parameters: one is a weight, one is no more than a scale."""

    def __call__(self, x):
        table = hk.get_parameter("pos_embed", x.shape[1:], init=jnp.zeros)
        scale = hk.get_parameter("scale", x.shape[-1:], init=jnp.zeros)
        return hk.Linear(3)(x + table[None] * scale[None, None])


class Twice(hk.Module):
    """A name that both ``__init__`` and ``__call__`` give to a layer, and a further method."""

    def __init__(self):
        super().__init__(name="twice")
        self.first = hk.Linear(4, name="linear")

    def __call__(self, x):
        return self.encode(hk.Linear(4, name="linear")(self.first(self.first(x))))

    def encode(self, x):
        return hk.Linear(4, name="code")(x)


def norms(x, data_format="channels_last", rms=True):
    x = hk.BatchNorm(True, True, 0.9, data_format=data_format)(x, is_training=True)
    x = hk.InstanceNorm(True, True, data_format=data_format)(x)
    x = hk.GroupNorm(2, data_format=data_format)(x)
    return hk.RMSNorm(-1)(x) if rms else x


def stack(x):
    x = hk.Linear(4)(x)
    x = hk.layer_stack(3)(lambda x: hk.Linear(4)(x))(x)
    return hk.layer_stack(4)(lambda x: hk.LayerNorm(-1, True, True, name="linear")(x))(x)


def stack_of_stacks(x):
    inner = hk.layer_stack(4, name="inner")
    return hk.layer_stack(5, name="outer")(lambda x: inner(lambda x: hk.nets.MLP([4])(x))(x))(x)


def ensemble(x):
    """Members stand on the last axis of their parameters."""
    member = hk.transform(lambda x: hk.Conv2D(3, 2)(x))
    make = hk.lift(jax.vmap(member.init, in_axes=(0, None), out_axes=-1), name="ensemble")
    params = make(hk.next_rng_keys(5) if hk.running_init() else None, x)
    return jax.vmap(member.apply, in_axes=(-1, None, None))(params, None, x)


def lstm(x):
    core = hk.LSTM(3)
    return hk.dynamic_unroll(core, x, core.initial_state(8))


def gru(x):
    core = hk.GRU(3)
    return hk.dynamic_unroll(core, x, core.initial_state(8))


CASES = {
    "linear": (lambda x: hk.Linear(3)(x), VECTOR, linear("linear", "linear")),
    "linear without bias": (
        lambda x: hk.Linear(3, with_bias=False)(x),
        VECTOR,
        linear("linear", "linear", bias=False),
    ),
    "subclass": (lambda x: MyLinear(3)(x), VECTOR, linear("my_linear", "my_linear")),
    "mlp": (
        lambda x: hk.nets.MLP([3, 4])(x),
        VECTOR,
        {
            **linear("mlp.linear_0", "mlp/~/linear_0"),
            **linear("mlp.linear_1", "mlp/~/linear_1"),
        },
    ),
    **{
        f"conv{d}d in groups": (
            lambda x, d=d: hk.ConvND(d, 6, 3, feature_group_count=2)(x),
            x,
            {"conv_nd": row(f"Conv{d}d", "conv_nd.w", (d + 1,), (d,), bias="conv_nd.b", groups=2)},
        )
        for d, x in [(1, SIGNAL), (2, IMAGE), (3, VOLUME)]
    },
    "conv of channels first": (
        lambda x: hk.Conv2D(6, 3, data_format="NCHW")(x),
        IMAGE,
        {"conv2_d": row("Conv2d", "conv2_d.w", (3,), (2,), bias="conv2_d.b")},
    ),
    "depthwise": (
        lambda x: hk.DepthwiseConv2D(3, 3)(x),
        IMAGE,
        {
            "depthwise_conv2_d": row(
                "Conv2d", "depthwise_conv2_d.w", (3,), (2,), bias="depthwise_conv2_d.b", groups=4
            )
        },
    ),
    "conv transpose": (
        lambda x: hk.Conv2DTranspose(6, 3)(x),
        IMAGE,
        {
            "conv2_d_transpose": row(
                "ConvTranspose2d", "conv2_d_transpose.w", (2,), (3,), bias="conv2_d_transpose.b"
            )
        },
    ),
    "embed": (
        lambda x: hk.Embed(7, 4)(x),
        TOKENS,
        {"embed": row("Embedding", "embed.embeddings", (1,), (0,))},
    ),
    "norms": (
        norms,
        IMAGE,
        {
            "batch_norm": row("BatchNorm2d", "batch_norm.scale", (3,), bias="batch_norm.offset"),
            "instance_norm": row(
                "InstanceNorm", "instance_norm.scale", (0,), bias="instance_norm.offset"
            ),
            "group_norm": row("GroupNorm", "group_norm.scale", (0,), bias="group_norm.offset"),
            "rms_norm": row("RMSNorm", "rms_norm.scale", (0,)),
        },
    ),
    "norms of channels first": (
        lambda x: norms(x, "channels_first", rms=False),
        VOLUME,
        {
            "batch_norm": row("BatchNorm3d", "batch_norm.scale", (1,), bias="batch_norm.offset"),
            "instance_norm": row(
                "InstanceNorm3d", "instance_norm.scale", (1,), bias="instance_norm.offset"
            ),
            "group_norm": row("GroupNorm", "group_norm.scale", (0,), bias="group_norm.offset"),
        },
    ),
    "norms without scale": (
        lambda x: hk.BatchNorm(False, True, 0.9)(
            hk.LayerNorm(-1, False, True, param_axis=(1, 3))(x), is_training=True
        ),
        IMAGE,
        {},
    ),
    "layer norm over two axes": (
        lambda x: hk.LayerNorm((1, 2, 3), True, True, param_axis=(1, -1))(x),
        IMAGE,
        {"layer_norm": row("LayerNorm", "layer_norm.scale", (1, 3), bias="layer_norm.offset")},
    ),
    "bias alone": (lambda x: hk.Bias()(x), SIGNAL, {}),
    "lstm": (lstm, SIGNAL, linear("lstm.linear", "lstm/linear")),
    "gru": (
        gru,
        SIGNAL,
        {
            "gru.w_i": row("GRU", "gru.w_i", (1,), (0,), bias="gru.b", aliases=("gru",)),
            "gru.w_h": row("GRU", "gru.w_h", (1,), (0,), aliases=("gru",)),
        },
    ),
    "attention": (
        lambda x: hk.MultiHeadAttention(2, 3, w_init=jnp.zeros)(x, x, x),
        SIGNAL,
        {
            f"multi_head_attention.{n}": row(
                "Linear",
                f"multi_head_attention/{n}.w",
                (1,),
                (0,),
                bias=f"multi_head_attention/{n}.b",
            )
            for n in ("query", "key", "value", "linear")
        },
    ),
    "own parameters": (
        lambda x: Positions()(x),
        SIGNAL,
        {
            "positions.pos_embed": row("Positions", "positions.pos_embed", aliases=("positions",)),
            **linear("positions.linear", "positions/linear"),
        },
    ),
    "outside any module": (
        lambda x: hk.Linear(3)(x @ hk.get_parameter("free", (4, 4), init=jnp.zeros)),
        VECTOR,
        {**linear("linear", "linear"), "free": row("", "~.free")},
    ),
    "names that would collide": (
        lambda x: Twice()(x),
        VECTOR,
        {
            **linear("twice.~.linear", "twice/~/linear"),
            **linear("twice.linear", "twice/linear"),
            **linear("twice.~encode.code", "twice/~encode/code"),
        },
    ),
    "layer stacks": (
        stack,
        VECTOR,
        {
            **linear("linear", "linear"),
            **linear(
                "__layer_stack_no_per_layer.linear",
                "__layer_stack_no_per_layer/linear",
                stack=(0,),
            ),
            "__layer_stack_no_per_layer_1.linear": row(
                "LayerNorm",
                "__layer_stack_no_per_layer_1/linear.scale",
                (1,),
                stack=(0,),
                bias="__layer_stack_no_per_layer_1/linear.offset",
            ),
        },
    ),
    "stack of stacks": (
        stack_of_stacks,
        VECTOR,
        linear(
            "outer.inner.mlp.linear_0",
            "outer/inner/mlp/~/linear_0",
            stack=(0, 1),
        ),
    ),
    "ensemble on the last axis": (
        ensemble,
        IMAGE,
        {
            "ensemble.conv2_d": row(
                "Conv2d",
                "ensemble/conv2_d.w",
                (3,),
                (2,),
                stack=(4,),
                bias="ensemble/conv2_d.b",
            )
        },
    ),
}


@pytest.mark.parametrize("case", CASES, ids=list(CASES))
def test_table(case):
    function, x, expected = CASES[case]
    transformed = hk.transform_with_state(function)
    params = init(transformed, x)
    assert_table(adapter.layers(transformed, params, x), params, expected)


@pytest.mark.parametrize(
    "transform",
    [
        hk.transform,
        lambda f: hk.without_apply_rng(hk.transform(f)),
        hk.transform_with_state,
        lambda f: hk.without_apply_rng(hk.transform_with_state(f)),
        lambda f: hk.multi_transform(lambda: (f, {"main": f})),
    ],
    ids=["plain", "no rng", "state", "state, no rng", "multi"],
)
def test_every_kind_of_transformed_function(transform):
    transformed = transform(lambda x: hk.nets.MLP([3, 4])(x))
    params = init(transformed, VECTOR)
    table = adapter.layers(transformed, params, VECTOR)
    assert [layer.name for layer in table] == ["mlp.linear_0", "mlp.linear_1"]


def test_arguments_of_the_call():
    def function(x, is_training, name="a"):
        if is_training:
            x = hk.dropout(hk.next_rng_key(), 0.5, x)
        return hk.Linear(3, name=name)(x)

    transformed = hk.transform(function)
    params = init(transformed, VECTOR, is_training=True, name="b")
    (layer,) = adapter.layers(transformed, params, VECTOR, is_training=True, name="b")
    assert layer.name == "b"
    assert adapter.layers(transformed, params, VECTOR, True, "b") == (layer,)


def test_class_names():
    transformed = hk.transform(lambda x: Positions()(MyLinear(3)(x)))
    params = init(transformed, SIGNAL)
    table = adapter.layers(transformed, params, SIGNAL)
    assert [layer.class_name for layer in table] == ["MyLinear", "Positions", "Linear"]
    assert table[0].has_type("MyLinear")
    assert table[0].has_type("Linear")


def test_some_of_the_parameters():
    transformed = hk.transform(lambda x: hk.nets.MLP([3, 4])(x))
    params = init(transformed, VECTOR)
    (layer,) = adapter.layers(transformed, {"mlp/~/linear_1": params["mlp/~/linear_1"]}, VECTOR)
    assert layer.name == "mlp.linear_1"


def test_tracing_leaves_no_tracer_behind():
    transformed = hk.transform(stack)
    params = init(transformed, VECTOR)
    with jax.checking_leaks():
        adapter.layers(transformed, params, VECTOR)


def test_errors():
    transformed = hk.transform(lambda x: hk.nets.MLP([3, 4])(x))
    params = init(transformed, VECTOR)
    with pytest.raises(TypeError, match=r"model must be what hk\.transform returns"):
        adapter.layers(hk.Linear, params, VECTOR)
    for wrong in (None, transformed, {"w": VECTOR}):
        with pytest.raises(TypeError, match=r"variables must be what model\.init returns"):
            adapter.layers(transformed, wrong, VECTOR)
    with pytest.raises(ValueError, match=r"makes no parameter 'mlp/~/linear_2.w'.*linear_1.w"):
        adapter.layers(transformed, {"mlp/~/linear_2": {"w": VECTOR}}, VECTOR)
    with pytest.raises(ValueError, match=r"has shape \(4, 3\).* makes it \(8, 3\)"):
        adapter.layers(transformed, params, jax.ShapeDtypeStruct((2, 8), "float32"))
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
        adapter.layers(transformed, params)
