"""Haiku: parameters and state, side by side in one tree."""

import haiku as hk
import jax
import jax.numpy as jnp

from purepruning_interop import haiku as pph
from tests.coupling.entry import Entry, draw_inputs, fill, normal, tokens

WORDS = 11


def model(name: str, family: str, forward, *inputs) -> Entry:
    """The entry of ``forward(*inputs, is_training)``; statistics exist once training has begun."""

    def build(key):
        drawn = draw_inputs(inputs, key)
        transformed = hk.transform_with_state(forward)
        params, state = jax.eval_shape(lambda: transformed.init(key, *drawn, is_training=True))

        def fn(variables, *inputs):
            apply = transformed.apply
            return apply(variables["params"], variables["state"], None, *inputs, is_training=False)[
                0
            ]

        return fn, fill({"params": params, "state": state}, key), drawn

    def layers(params, inputs):
        transformed = hk.transform_with_state(forward)
        return pph.layers(transformed, params, *inputs, is_training=True)

    return Entry(name, "haiku", family, build, layers)


def mlp(x, is_training):
    return hk.Linear(5)(hk.nets.MLP([16, 12], activate_final=True)(x))


def cnn(x, is_training):
    for width in (8, 12):
        x = jax.nn.relu(hk.Conv2D(width, 3)(x))
        x = hk.MaxPool((2, 2, 1), (2, 2, 1), "SAME")(x)
    return hk.nets.MLP([16, 5])(hk.Flatten()(x))


def resnet(bottleneck, resnet_v2):
    def forward(x, is_training):
        net = hk.nets.ResNet(
            (1, 1, 1, 1),
            num_classes=5,
            bottleneck=bottleneck,
            channels_per_group=(8, 8, 16, 16),
            initial_conv_config={"output_channels": 8},
            use_projection=(bottleneck, True, True, True),
            resnet_v2=resnet_v2,
        )
        return net(x, is_training)

    return forward


def mobilenet(x, is_training):
    return hk.nets.MobileNetV1((1, 2), (8, 12), num_classes=5)(x, is_training)


def norms(x, is_training):
    """A convolution under layer, group, instance and RMS normalisation."""
    x = hk.GroupNorm(4)(hk.Conv2D(8, 3)(x))
    x = hk.InstanceNorm(create_scale=True, create_offset=True)(hk.Conv2D(12, 3)(jax.nn.relu(x)))
    x = hk.LayerNorm(-1, create_scale=True, create_offset=True)(hk.Conv2D(8, 1)(jax.nn.relu(x)))
    return hk.RMSNorm(-1)(hk.Linear(12)(jax.nn.gelu(x))) @ jnp.ones((12, 1))


def recurrent(ids, is_training):
    x = hk.Embed(WORDS, 8)(ids)
    core = hk.DeepRNN([hk.LSTM(12), jax.nn.relu, hk.GRU(10)])
    x, _ = hk.dynamic_unroll(core, x, core.initial_state(x.shape[0]), time_major=False)
    return hk.Linear(5)(x[:, -1])


def transformer(ids, is_training):
    width, embed = 16, hk.Embed(WORDS, 16)
    positions = hk.get_parameter("pos_embeddings", (8, width), init=jnp.zeros)
    x = embed(ids) + positions[: ids.shape[1]][None]
    mask = jnp.tril(jnp.ones((1, 1, ids.shape[1], ids.shape[1])))
    init = hk.initializers.VarianceScaling(1.0)
    for _ in range(2):
        y = hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)
        attention = hk.MultiHeadAttention(4, 4, model_size=width, w_init=init)
        x = x + attention(y, y, y, mask=mask)
        y = hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)
        x = x + hk.Linear(width)(jax.nn.gelu(hk.Linear(24)(y)))
    return x @ embed.embeddings.T


IMAGE, IDS = normal(2, 16, 16, 3), tokens(2, 6, below=WORDS)

MODELS = (
    model("haiku_mlp", "mlp", mlp, normal(4, 7)),
    model("haiku_cnn", "vgg", cnn, normal(2, 8, 8, 3)),
    model("haiku_resnet", "resnet", resnet(bottleneck=False, resnet_v2=False), IMAGE),
    model("haiku_resnet_v2", "resnet", resnet(bottleneck=True, resnet_v2=True), IMAGE),
    model("haiku_mobilenet", "mobilenet", mobilenet, IMAGE),
    model("haiku_norms", "norms", norms, normal(2, 8, 8, 3)),
    model("haiku_recurrent", "lstm", recurrent, IDS),
    model("haiku_transformer", "gpt", transformer, IDS),
)
