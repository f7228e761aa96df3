"""Flax NNX: parameters are the model's state, of every kind of variable."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from purepruning_interop import nnx as ppn
from tests.coupling.entry import Entry, draw_inputs, fill, normal, tokens

WORDS = 11


def model(name: str, family: str, module: type, *inputs) -> Entry:
    """The entry of ``module(rngs)``; its state holds parameters and statistics, and no keys."""

    def build(key):
        made = nnx.eval_shape(lambda: module(nnx.Rngs(0)))
        made.eval()
        graph, state, keys = nnx.split(made, (nnx.Param, nnx.BatchStat), ...)
        keys = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), keys)

        def fn(state, *inputs):
            return nnx.merge(graph, state, keys, copy=True)(*inputs)

        return fn, fill(state, key), draw_inputs(inputs, key)

    def layers(params, inputs):
        return ppn.layers(nnx.eval_shape(lambda: module(nnx.Rngs(0))))

    return Entry(name, "nnx", family, build, layers)


class MLP(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(7, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.second = nnx.Linear(16, 12, rngs=rngs)
        self.last = nnx.Linear(12, 5, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.second(nnx.relu(self.norm(self.first(x))))))


class CNN(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.second = nnx.Conv(8, 12, (3, 3), rngs=rngs)
        self.dense = nnx.Linear(12 * 4, 16, rngs=rngs)
        self.last = nnx.Linear(16, 5, rngs=rngs)
        self.pool = partial(nnx.avg_pool, window_shape=(2, 2), strides=(2, 2))

    def __call__(self, x):
        x = self.pool(nnx.relu(self.second(self.pool(nnx.relu(self.first(x))))))
        return self.last(nnx.relu(self.dense(x.reshape(x.shape[0], -1))))


class Residual(nnx.Module):
    def __init__(self, width, out, stride, rngs):
        conv = partial(nnx.Conv, use_bias=False, rngs=rngs)
        self.first = conv(width, out, (3, 3), strides=stride)
        self.first_norm = nnx.BatchNorm(out, rngs=rngs)
        self.second = conv(out, out, (3, 3))
        self.second_norm = nnx.BatchNorm(out, rngs=rngs)
        self.shortcut = conv(width, out, (1, 1), strides=stride) if stride > 1 else None

    def __call__(self, x):
        y = nnx.relu(self.first_norm(self.first(x)))
        y = self.second_norm(self.second(y))
        return nnx.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.blocks = nnx.List(
            Residual(*sizes, rngs) for sizes in ((8, 8, 1), (8, 12, 2), (12, 12, 1))
        )
        self.last = nnx.Linear(12, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.last(jnp.mean(x, axis=(1, 2)))


class Separable(nnx.Module):
    """Depthwise and pointwise convolutions, squeeze and excite, a transposed convolution."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 8, (1, 1), rngs=rngs)
        self.depthwise = nnx.Conv(8, 8, (3, 3), feature_group_count=8, rngs=rngs)
        self.norm = nnx.GroupNorm(8, num_groups=2, rngs=rngs)
        self.reduce, self.expand = nnx.Linear(8, 4, rngs=rngs), nnx.Linear(4, 8, rngs=rngs)
        self.up = nnx.ConvTranspose(8, 6, (2, 2), strides=(2, 2), rngs=rngs)
        self.last = nnx.Conv(6, 3, (1, 1), rngs=rngs)

    def __call__(self, x):
        x = nnx.swish(self.norm(self.depthwise(nnx.swish(self.stem(x)))))
        gate = self.expand(nnx.relu(self.reduce(jnp.mean(x, axis=(1, 2), keepdims=True))))
        return self.last(nnx.relu(self.up(x * nnx.sigmoid(gate))))


class Block(nnx.Module):
    def __init__(self, width, rngs):
        self.norms = nnx.List(nnx.LayerNorm(width, rngs=rngs) for _ in range(2))
        self.attention = nnx.MultiHeadAttention(
            num_heads=4, in_features=width, decode=False, rngs=rngs
        )
        self.wide = nnx.Linear(width, 24, rngs=rngs)
        self.narrow = nnx.Linear(24, width, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x, mask=None):
        x = x + self.dropout(self.attention(self.norms[0](x), mask=mask))
        return x + self.narrow(nnx.gelu(self.wide(self.norms[1](x))))


class ViT(nnx.Module):
    def __init__(self, rngs):
        self.patches = nnx.Conv(3, 16, (4, 4), strides=4, padding="VALID", rngs=rngs)
        self.cls_token = nnx.Param(jnp.zeros((1, 1, 16)))
        self.pos_embedding = nnx.Param(jnp.zeros((1, 5, 16)))
        self.blocks = nnx.List(Block(16, rngs) for _ in range(2))
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.last = nnx.Linear(16, 5, rngs=rngs)

    def __call__(self, x):
        x = self.patches(x).reshape(x.shape[0], -1, 16)
        cls = jnp.broadcast_to(self.cls_token[...], (x.shape[0], 1, 16))
        x = jnp.concatenate([cls, x], axis=1) + self.pos_embedding[...]
        for block in self.blocks:
            x = block(x)
        return self.last(self.norm(x)[:, 0])


class GPT(nnx.Module):
    """The embedding is the output layer as well."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(WORDS, 16, rngs=rngs)
        self.positions = nnx.Embed(8, 16, rngs=rngs)
        self.blocks = nnx.List(Block(16, rngs) for _ in range(2))
        self.norm = nnx.LayerNorm(16, rngs=rngs)

    def __call__(self, ids):
        x = self.embed(ids) + self.positions(jnp.arange(ids.shape[1]))[None]
        for block in self.blocks:
            x = block(x, mask=nnx.make_causal_mask(ids))
        return self.embed.attend(self.norm(x))


class Einsum(nnx.Module):
    """One raw parameter and an equation, as Gemma has them."""

    def __init__(self, *shape):
        self.w = nnx.Param(jnp.zeros(shape))

    def __call__(self, equation, x):
        return jnp.einsum(equation, x, self.w[...])


class Gemma(nnx.Module):
    """Groups of query heads by a five-dimensional einsum; k, v and the gates are stacked."""

    def __init__(self, rngs, heads=4, groups=2, width=16, size=4, hidden=24):
        self.embed = nnx.Embed(WORDS, width, rngs=rngs)
        self.q, self.kv = Einsum(heads, width, size), Einsum(2, groups, width, size)
        self.o = Einsum(heads, size, width)
        self.gates, self.down = Einsum(2, width, hidden), nnx.Linear(hidden, width, rngs=rngs)
        self.norms = nnx.List(nnx.RMSNorm(width, rngs=rngs) for _ in range(3))

    def attention(self, x):
        q = self.q("bld,hdk->blhk", x)
        k, v = self.kv("bld,cgdk->cblgk", x)
        q = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
        scores = jnp.einsum("blgrk,bmgk->blgrm", q, k) * q.shape[-1] ** -0.5
        mask = np.tril(np.ones((q.shape[1], q.shape[1]), bool))[None, :, None, None]
        y = jnp.einsum("blgrm,bmgk->blgrk", nnx.softmax(jnp.where(mask, scores, -1e9)), v)
        return self.o("blhk,hkd->bld", y.reshape(*y.shape[:2], -1, y.shape[-1]))

    def __call__(self, ids):
        x = self.embed(ids) * jnp.sqrt(jnp.float32(16))
        x = x + self.attention(self.norms[0](x))
        gate, up = self.gates("bld,cdf->cblf", self.norms[1](x))
        x = x + self.down(nnx.gelu(gate) * up)
        return self.embed.attend(self.norms[2](x))


class Scanned(nnx.Module):
    """Layers made by ``nnx.vmap`` and run by ``nnx.scan``."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(WORDS, 16, rngs=rngs)
        split = nnx.split_rngs(splits=3)
        self.blocks = split(nnx.vmap(lambda rngs: Block(16, rngs), in_axes=0, out_axes=0))(rngs)
        self.last = nnx.Linear(16, 5, rngs=rngs)

    def __call__(self, ids):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, block):
            return block(x)

        return self.last(run(self.embed(ids), self.blocks))


class Recurrent(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(WORDS, 8, rngs=rngs)
        self.lstm = nnx.RNN(nnx.OptimizedLSTMCell(8, 12, rngs=rngs))
        self.gru = nnx.RNN(nnx.GRUCell(12, 10, rngs=rngs))
        self.last = nnx.Linear(10, 5, rngs=rngs)

    def __call__(self, ids):
        return self.last(self.gru(self.lstm(self.embed(ids)))[:, -1])


class Autoencoder(nnx.Module):
    """A variational autoencoder at its mean; returns the image, the mean and the deviation."""

    def __init__(self, rngs):
        self.encoder = nnx.Linear(48, 16, rngs=rngs)
        self.mean, self.log_std = nnx.Linear(16, 4, rngs=rngs), nnx.Linear(16, 4, rngs=rngs)
        self.decoder = nnx.Sequential(
            nnx.Linear(4, 16, rngs=rngs), nnx.relu, nnx.Linear(16, 48, rngs=rngs)
        )

    def __call__(self, x):
        y = nnx.relu(self.encoder(x.reshape(x.shape[0], -1)))
        mean = self.mean(y)
        return nnx.sigmoid(self.decoder(mean)).reshape(x.shape), mean, jnp.exp(self.log_std(y))


IMAGE, IDS = normal(2, 8, 8, 3), tokens(2, 6, below=WORDS)

MODELS = (
    model("nnx_mlp", "mlp", MLP, normal(4, 7)),
    model("nnx_cnn", "vgg", CNN, IMAGE),
    model("nnx_resnet", "resnet", ResNet, IMAGE),
    model("nnx_separable", "mobilenet", Separable, IMAGE),
    model("nnx_vit", "vit", ViT, IMAGE),
    model("nnx_gpt", "gpt", GPT, IDS),
    model("nnx_gemma", "llama", Gemma, IDS),
    model("nnx_scanned_blocks", "scan", Scanned, IDS),
    model("nnx_recurrent", "lstm", Recurrent, IDS),
    model("nnx_autoencoder", "autoencoder", Autoencoder, normal(2, 4, 4, 3)),
)
