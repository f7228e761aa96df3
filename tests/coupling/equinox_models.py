"""Equinox: single examples, channels first, mapped over the batch; the module is the parameters."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp

from purepruning_interop import equinox as ppe
from tests.coupling.entry import Entry, draw_inputs, fill, normal, tokens

WORDS = 11
relu, gelu = jax.nn.relu, jax.nn.gelu


def model(name: str, family: str, module: type, *inputs, stateful: bool = False) -> Entry:
    """The entry of ``module(key)``, called on one example; ``stateful`` ones have BatchNorm."""

    def build(key):
        make = eqx.nn.make_with_state(module) if stateful else lambda key: (module(key), None)
        made, state = eqx.filter_eval_shape(make, key)
        arrays, static = eqx.partition((eqx.nn.inference_mode(made), state), is_shape)

        def fn(arrays, *inputs):
            made, state = eqx.combine(arrays, static)
            if not stateful:
                return jax.vmap(made)(*inputs)
            call = jax.vmap(made, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
            return call(*inputs, state)[0]

        return fn, fill(arrays, key, features=0), draw_inputs(inputs, key)

    def layers(params, inputs):
        make = eqx.nn.make_with_state(module) if stateful else lambda key: (module(key), None)
        return ppe.layers(eqx.filter_eval_shape(make, jax.random.key(0)))

    return Entry(name, "equinox", family, build, layers)


def is_shape(x) -> bool:
    return isinstance(x, jax.ShapeDtypeStruct)


class MLP(eqx.Module):
    mlp: eqx.nn.MLP
    slope: eqx.nn.PReLU
    last: eqx.nn.Linear

    def __init__(self, key):
        self.mlp = eqx.nn.MLP(7, 10, width_size=12, depth=2, key=key)
        self.slope = eqx.nn.PReLU()
        self.last = eqx.nn.Linear(10, 5, key=key)

    def __call__(self, x):
        return self.last(self.slope(self.mlp(x)))


class CNN(eqx.Module):
    layers: eqx.nn.Sequential

    def __init__(self, key):
        conv, pool = partial(eqx.nn.Conv2d, kernel_size=3, padding=1, key=key), eqx.nn.MaxPool2d
        self.layers = eqx.nn.Sequential(
            [
                conv(3, 8),
                eqx.nn.Lambda(relu),
                pool(2, 2),
                conv(8, 12),
                eqx.nn.Lambda(relu),
                pool(2, 2),
                eqx.nn.Lambda(jnp.ravel),
                eqx.nn.Linear(12 * 4, 16, key=key),
                eqx.nn.Lambda(relu),
                eqx.nn.Dropout(0.5),
                eqx.nn.Linear(16, 5, key=key),
            ]
        )

    def __call__(self, x):
        return self.layers(x)


class Residual(eqx.Module):
    convs: list[eqx.nn.Conv2d]
    norms: list[eqx.nn.BatchNorm]
    shortcut: eqx.nn.Conv2d | None

    def __init__(self, width, out, stride, groups, key):
        conv = partial(eqx.nn.Conv2d, use_bias=False, key=key)
        self.convs = [
            conv(width, out, 3, stride, padding=1),
            conv(out, out, 3, padding=1, groups=groups),
        ]
        self.norms = [eqx.nn.BatchNorm(out, "batch", mode="ema") for _ in range(2)]
        self.shortcut = conv(width, out, 1, stride) if width != out else None

    def __call__(self, x, state):
        y, state = self.norms[0](self.convs[0](x), state)
        y, state = self.norms[1](self.convs[1](relu(y)), state)
        return relu(y + (x if self.shortcut is None else self.shortcut(x))), state


class ResNet(eqx.Module):
    """Grouped convolutions, if any, are the second of each block."""

    stem: eqx.nn.Conv2d
    blocks: list[Residual]
    last: eqx.nn.Linear

    def __init__(self, key, groups=1):
        self.stem = eqx.nn.Conv2d(3, 8, 3, padding=1, key=key)
        sizes = ((8, 8, 1), (8, 12, 2), (12, 12, 1))
        self.blocks = [Residual(*some, groups, key) for some in sizes]
        self.last = eqx.nn.Linear(12, 5, key=key)

    def __call__(self, x, state):
        x = relu(self.stem(x))
        for block in self.blocks:
            x, state = block(x, state)
        return self.last(jnp.mean(x, axis=(1, 2))), state


class UNet(eqx.Module):
    """Group norms, a transposed convolution, the skip concatenated on the first axis."""

    down: list[eqx.nn.Conv2d]
    norm: eqx.nn.GroupNorm
    up: eqx.nn.ConvTranspose2d
    last: eqx.nn.Conv2d

    def __init__(self, key):
        self.down = [
            eqx.nn.Conv2d(3, 8, 3, padding=1, key=key),
            eqx.nn.Conv2d(8, 12, 3, stride=2, padding=1, key=key),
        ]
        self.norm = eqx.nn.GroupNorm(4, 12)
        self.up = eqx.nn.ConvTranspose2d(12, 6, 2, stride=2, key=key)
        self.last = eqx.nn.Conv2d(14, 3, 1, key=key)

    def __call__(self, x):
        skip = relu(self.down[0](x))
        x = self.up(jax.nn.silu(self.norm(self.down[1](skip))))
        return self.last(jnp.concatenate([skip, relu(x)]))


class ConvNeXt(eqx.Module):
    stem: eqx.nn.Conv2d
    depthwise: eqx.nn.Conv2d
    norm: eqx.nn.LayerNorm
    mlp: eqx.nn.MLP
    layer_scale: jax.Array
    last: eqx.nn.Linear

    def __init__(self, key):
        self.stem = eqx.nn.Conv2d(3, 8, 2, stride=2, key=key)
        self.depthwise = eqx.nn.Conv2d(8, 8, 7, padding=3, groups=8, key=key)
        self.norm = eqx.nn.LayerNorm(8)
        self.mlp = eqx.nn.MLP(8, 8, width_size=24, depth=1, activation=gelu, key=key)
        self.layer_scale = jnp.ones((8, 1, 1))
        self.last = eqx.nn.Linear(8, 5, key=key)

    def __call__(self, x):
        x = self.stem(x)
        y = jnp.moveaxis(self.depthwise(x), 0, -1)
        y = jax.vmap(jax.vmap(lambda y: self.mlp(self.norm(y))))(y)
        x = x + jnp.moveaxis(y, -1, 0) * self.layer_scale
        return self.last(jnp.mean(x, axis=(1, 2)))


class Block(eqx.Module):
    norms: list[eqx.nn.LayerNorm]
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP
    rope: eqx.nn.RotaryPositionalEmbedding | None

    def __init__(self, width, key, rope=False):
        self.norms = [eqx.nn.LayerNorm(width) for _ in range(2)]
        self.attention = eqx.nn.MultiheadAttention(4, width, key=key)
        self.mlp = eqx.nn.MLP(width, width, 24, depth=1, activation=gelu, key=key)
        self.rope = eqx.nn.RotaryPositionalEmbedding(width // 4) if rope else None

    def turn(self, q, k, v):
        rope = jax.vmap(self.rope, in_axes=1, out_axes=1)
        return rope(q), rope(k), v

    def __call__(self, x, mask=None):
        y = jax.vmap(self.norms[0])(x)
        turn = None if self.rope is None else self.turn
        x = x + self.attention(y, y, y, mask, process_heads=turn)
        return x + jax.vmap(self.mlp)(jax.vmap(self.norms[1])(x))


class ViT(eqx.Module):
    patches: eqx.nn.Conv2d
    cls_token: jax.Array
    pos_embedding: jax.Array
    blocks: list[Block]
    last: eqx.nn.Linear

    def __init__(self, key):
        self.patches = eqx.nn.Conv2d(3, 16, 4, stride=4, key=key)
        self.cls_token, self.pos_embedding = jnp.zeros((1, 16)), jnp.zeros((5, 16))
        self.blocks = [Block(16, key) for _ in range(2)]
        self.last = eqx.nn.Linear(16, 5, key=key)

    def __call__(self, x):
        x = self.patches(x).reshape(16, -1).T
        x = jnp.concatenate([self.cls_token, x]) + self.pos_embedding
        for block in self.blocks:
            x = block(x)
        return self.last(x[0])


class GPT(eqx.Module):
    """Rotary positions, a causal mask, and the embedding as the output layer."""

    embed: eqx.nn.Embedding
    blocks: list[Block]
    norm: eqx.nn.RMSNorm

    def __init__(self, key):
        self.embed = eqx.nn.Embedding(WORDS, 16, key=key)
        self.blocks = [Block(16, key, rope=True) for _ in range(2)]
        self.norm = eqx.nn.RMSNorm(16)

    def __call__(self, ids):
        x = jax.vmap(self.embed)(ids)
        for block in self.blocks:
            x = block(x, jnp.tril(jnp.ones((len(ids), len(ids)), bool)))
        return jax.vmap(self.norm)(x) @ self.embed.weight.T


class Stacked(eqx.Module):
    """Layers stacked by ``filter_vmap`` and run by ``lax.scan``."""

    embed: eqx.nn.Embedding
    blocks: Block
    last: eqx.nn.Linear

    def __init__(self, key):
        self.embed = eqx.nn.Embedding(WORDS, 16, key=key)
        self.blocks = eqx.filter_vmap(lambda key: Block(16, key))(jax.random.split(key, 3))
        self.last = eqx.nn.Linear(16, 5, key=key)

    def __call__(self, ids):
        layers, static = eqx.partition(self.blocks, eqx.is_array)

        def layer(x, arrays):
            return eqx.combine(arrays, static)(x), None

        x, _ = jax.lax.scan(layer, jax.vmap(self.embed)(ids), layers)
        return jax.vmap(self.last)(x)


class Recurrent(eqx.Module):
    embed: eqx.nn.Embedding
    lstm: eqx.nn.LSTMCell
    gru: eqx.nn.GRUCell
    last: eqx.nn.Linear

    def __init__(self, key):
        self.embed = eqx.nn.Embedding(WORDS, 8, key=key)
        self.lstm = eqx.nn.LSTMCell(8, 12, key=key)
        self.gru = eqx.nn.GRUCell(12, 10, key=key)
        self.last = eqx.nn.Linear(10, 5, key=key)

    def __call__(self, ids):
        def step(carry, x):
            (hidden, cell), out = carry
            hidden, cell = self.lstm(x, (hidden, cell))
            out = self.gru(hidden, out)
            return ((hidden, cell), out), out

        start = (jnp.zeros(12), jnp.zeros(12)), jnp.zeros(10)
        (_, out), _ = jax.lax.scan(step, start, jax.vmap(self.embed)(ids))
        return self.last(out)


IMAGE, IDS = normal(2, 3, 8, 8), tokens(2, 6, below=WORDS)

MODELS = (
    model("equinox_mlp", "mlp", MLP, normal(4, 7)),
    model("equinox_cnn", "vgg", CNN, IMAGE),
    model("equinox_resnet", "resnet", ResNet, IMAGE, stateful=True),
    model("equinox_resnext", "resnext", partial(ResNet, groups=4), IMAGE, stateful=True),
    model("equinox_unet", "unet", UNet, IMAGE),
    model("equinox_convnext", "convnext", ConvNeXt, IMAGE),
    model("equinox_vit", "vit", ViT, IMAGE),
    model("equinox_gpt", "gpt", GPT, IDS),
    model("equinox_stacked_blocks", "scan", Stacked, IDS),
    model("equinox_recurrent", "lstm", Recurrent, IDS),
)
