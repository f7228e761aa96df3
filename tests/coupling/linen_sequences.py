"""Flax Linen: transformers, mixers and recurrent networks."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tests.coupling.entry import normal, tokens
from tests.coupling.linen_images import linen

WORDS = 11


class FeedForward(nn.Module):
    hidden: int = 24

    @nn.compact
    def __call__(self, x):
        return nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(self.hidden)(x)))


class Block(nn.Module):
    """A transformer block that normalises first; attends to ``memory`` as well if there is one."""

    heads: int = 4
    norm: type = nn.LayerNorm

    @nn.compact
    def __call__(self, x, mask=None, memory=None):
        attention = partial(nn.MultiHeadDotProductAttention, self.heads, deterministic=True)
        x = x + attention()(self.norm()(x), mask=mask)
        if memory is not None:
            x = x + attention()(self.norm()(x), memory)
        return x + FeedForward()(self.norm()(x))


class ViT(nn.Module):
    width: int = 16

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.width, (4, 4), strides=4, padding="VALID")(x)
        x = x.reshape(x.shape[0], -1, self.width)
        cls = self.param("cls_token", nn.initializers.zeros, (1, 1, self.width))
        x = jnp.concatenate([jnp.tile(cls, (x.shape[0], 1, 1)), x], axis=1)
        x = x + self.param("pos_embedding", nn.initializers.normal(), (1, *x.shape[1:]))
        for _ in range(2):
            x = Block()(x)
        return nn.Dense(5)(nn.LayerNorm()(x)[:, 0])


class Mixer(nn.Module):
    """MLPs over positions and over channels."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(12, (4, 4), strides=4, padding="VALID")(x)
        x = x.reshape(x.shape[0], -1, 12)
        for _ in range(2):
            x = x + FeedForward(10)(nn.LayerNorm()(x).swapaxes(1, 2)).swapaxes(1, 2)
            x = x + FeedForward()(nn.LayerNorm()(x))
        return nn.Dense(5)(jnp.mean(nn.LayerNorm()(x), axis=1))


class Bert(nn.Module):
    """Normalises last; the output layer is the embedding, transposed, with a bias."""

    width: int = 16

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(WORDS, self.width)
        x = embed(ids) + nn.Embed(8, self.width)(jnp.arange(ids.shape[1]))[None]
        x = nn.LayerNorm()(x + nn.Embed(2, self.width)(jnp.zeros_like(ids)))
        mask = nn.make_attention_mask(ids > 0, jnp.ones_like(ids, bool))
        for _ in range(2):
            y = nn.MultiHeadDotProductAttention(4)(x, mask=mask.swapaxes(-1, -2))
            x = nn.LayerNorm()(x + y)
            x = nn.LayerNorm()(x + FeedForward()(x))
        pooled = nn.tanh(nn.Dense(self.width)(x[:, 0]))
        x = nn.LayerNorm()(nn.gelu(nn.Dense(self.width)(x)))
        bias = self.param("bias", nn.initializers.zeros, (WORDS,))
        return embed.attend(x) + bias[None, None], nn.Dense(2)(pooled)


def attend(q, k, v, mask=None, bias=None):
    """Attention of ``(batch, position, head, size)``."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    return jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(scores), v)


def causal(length):
    return jnp.tril(jnp.ones((1, 1, length, length), bool))


class GPT(nn.Module):
    """One dense layer for q, k and v: one after another, or head by head as in BLOOM."""

    width: int = 16
    heads: int = 4
    interleaved: bool = False

    def attention(self, x):
        batch, length, width = x.shape
        qkv = nn.Dense(3 * width)(x)
        if self.interleaved:
            qkv = qkv.reshape(batch, length, self.heads, 3, -1)
            q, k, v = qkv[..., 0, :], qkv[..., 1, :], qkv[..., 2, :]
        else:
            q, k, v = (
                part.reshape(batch, length, self.heads, -1) for part in jnp.split(qkv, 3, axis=-1)
            )
        return nn.Dense(width)(attend(q, k, v, causal(length)).reshape(x.shape))

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(WORDS, self.width)
        x = embed(ids) + nn.Embed(8, self.width)(jnp.arange(ids.shape[1]))[None]
        for _ in range(2):
            x = x + self.attention(nn.LayerNorm()(x))
            x = x + FeedForward()(nn.LayerNorm()(x))
        return embed.attend(nn.LayerNorm()(x))


class T5Attention(nn.Module):
    """No scale and no biases; a table of relative positions, one number for every head."""

    heads: int = 4
    relative: bool = False

    @nn.compact
    def __call__(self, x, memory, bias=None, mask=None):
        project = partial(nn.DenseGeneral, (self.heads, 4), use_bias=False)
        if self.relative:
            offset = jnp.arange(x.shape[1])[:, None] - jnp.arange(memory.shape[1])[None]
            table = nn.Embed(16, self.heads, name="relative_embedding")
            bias = table(jnp.clip(offset + 8, 0, 15)).transpose(2, 0, 1)[None]
        q, k, v = (project(name=n)(y) for n, y in (("q", x), ("k", memory), ("v", memory)))
        y = attend(q, k, v, mask, bias)
        return nn.DenseGeneral(x.shape[-1], axis=(-2, -1), use_bias=False, name="o")(y), bias


class T5(nn.Module):
    """Encoder and decoder, RMSNorm, gated feed-forward, one shared embedding."""

    width: int = 16

    def feed_forward(self, x):
        wide = partial(nn.Dense, 24, use_bias=False)
        return nn.Dense(self.width, use_bias=False)(nn.gelu(wide()(x)) * wide()(x))

    @nn.compact
    def __call__(self, ids, targets):
        embed, norm = nn.Embed(WORDS, self.width), nn.RMSNorm
        memory, bias = embed(ids), None
        for layer in range(2):
            y = norm()(memory)
            y, bias = T5Attention(relative=layer == 0)(y, y, bias)
            memory = memory + y
            memory = memory + self.feed_forward(norm()(memory))
        memory = norm()(memory)
        x, bias = embed(targets), None
        for layer in range(2):
            y = norm()(x)
            y, bias = T5Attention(relative=layer == 0)(y, y, bias, causal(x.shape[1]))
            x = x + y
            x = x + T5Attention()(norm()(x), memory)[0]
            x = x + self.feed_forward(norm()(x))
        return embed.attend(norm()(x) * self.width**-0.5)


def rotate(x):
    """Rotary positions: channel i turns with channel i + size / 2 of the same head."""
    length, size = x.shape[1], x.shape[-1]
    angles = np.outer(np.arange(length), 100.0 ** (-np.arange(0, size, 2) / size))
    angles = np.concatenate([angles, angles], axis=-1).astype(np.float32)[None, :, None]
    first, second = jnp.split(x, 2, axis=-1)
    return x * np.cos(angles) + jnp.concatenate([-second, first], axis=-1) * np.sin(angles)


class Llama(nn.Module):
    """RMSNorm, rotary positions, groups of query heads that share keys and values, SwiGLU."""

    width: int = 16
    heads: int = 4
    groups: int = 2

    def attention(self, x):
        batch, length, width = x.shape
        size = width // self.heads
        q = nn.Dense(width, use_bias=False)(x).reshape(batch, length, self.heads, size)
        k, v = (
            nn.Dense(self.groups * size, use_bias=False)(x).reshape(batch, length, -1, size)
            for _ in range(2)
        )
        k, v = (jnp.repeat(part, self.heads // self.groups, axis=2) for part in (rotate(k), v))
        y = attend(rotate(q), k, v, causal(length)).reshape(x.shape)
        return nn.Dense(width, use_bias=False)(y)

    @nn.compact
    def __call__(self, ids):
        wide = partial(nn.Dense, 24, use_bias=False)
        x = nn.Embed(WORDS, self.width)(ids)
        for _ in range(2):
            x = x + self.attention(nn.RMSNorm()(x))
            y = nn.RMSNorm()(x)
            x = x + nn.Dense(self.width, use_bias=False)(nn.silu(wide()(y)) * wide()(y))
        return nn.Dense(WORDS, use_bias=False)(nn.RMSNorm()(x))


class ParallelBlocks(nn.Module):
    """PaLM: attention and feed-forward read one fused projection, and keys have one head."""

    width: int = 16
    heads: int = 4

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(WORDS, self.width)(ids)
        size, hidden = self.width // self.heads, 24
        cuts = np.cumsum([self.width, size, size, hidden])
        for _ in range(2):
            fused = nn.Dense(int(cuts[-1]) + hidden, use_bias=False)(nn.LayerNorm()(x))
            q, k, v, y, gate = jnp.split(fused, cuts, axis=-1)
            q = rotate(q.reshape(*q.shape[:2], self.heads, size))
            k, v = rotate(k[:, :, None]), v[:, :, None]
            y = y * nn.silu(gate)
            k, v = (jnp.broadcast_to(part, q.shape) for part in (k, v))
            attended = attend(q, k, v, causal(q.shape[1])).reshape(x.shape)
            x = x + nn.Dense(self.width)(attended) + nn.Dense(self.width)(y)
        return nn.Dense(WORDS)(nn.LayerNorm()(x))


class ScanBlock(nn.Module):
    """A block that takes and returns a carry, for ``nn.scan``."""

    @nn.compact
    def __call__(self, x, _):
        return Block()(x), None


class ScannedBlocks(nn.Module):
    """The layers are stacked on the first axis of every parameter."""

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(WORDS, 16)(ids)
        stack = nn.scan(
            ScanBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        x, _ = stack()(x, None)
        return nn.Dense(WORDS)(nn.LayerNorm()(x))


class RematBlocks(nn.Module):
    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(WORDS, 16)(ids)
        for _ in range(2):
            x = nn.remat(Block)()(x)
        return nn.Dense(WORDS)(nn.LayerNorm()(x))


class WindowAttention(nn.Module):
    """Attention inside windows of a map, which may be shifted first; relative position bias."""

    window: int = 2
    shift: int = 0
    heads: int = 2

    @nn.compact
    def __call__(self, x):
        batch, height, width, channels = x.shape
        w, shift = self.window, self.shift
        x = jnp.roll(x, (-shift, -shift), axis=(1, 2))
        x = x.reshape(batch, height // w, w, width // w, w, channels).transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(-1, w * w, channels)
        qkv = nn.Dense(3 * channels)(x).reshape(*x.shape[:2], 3, self.heads, -1)
        q, k, v = jnp.moveaxis(qkv, 2, 0)
        spot = np.stack(np.meshgrid(range(w), range(w), indexing="ij")).reshape(2, -1)
        offset = spot[:, :, None] - spot[:, None] + w - 1
        index = offset[0] * (2 * w - 1) + offset[1]
        table = self.param("relative_bias", nn.initializers.zeros, ((2 * w - 1) ** 2, self.heads))
        y = attend(q, k, v, bias=table[index].transpose(2, 0, 1)[None]).reshape(x.shape)
        y = nn.Dense(channels)(y).reshape(batch, height // w, width // w, w, w, channels)
        y = y.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height, width, channels)
        return jnp.roll(y, (shift, shift), axis=(1, 2))


class Swin(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(nn.Conv(8, (2, 2), strides=2, padding="VALID")(x))
        for stage in range(2):
            if stage:  # patches merge: four neighbours, one beside the other
                x = jnp.concatenate([x[:, i::2, j::2] for i in range(2) for j in range(2)], axis=-1)
                x = nn.Dense(12, use_bias=False)(nn.LayerNorm()(x))
            for shift in (0, 1):
                x = x + WindowAttention(shift=shift)(nn.LayerNorm()(x))
                x = x + FeedForward()(nn.LayerNorm()(x))
        return nn.Dense(5)(jnp.mean(nn.LayerNorm()(x), axis=(1, 2)))


class MixtureOfExperts(nn.Module):
    """Every token goes to the best two of four experts."""

    width: int = 12
    experts: int = 4

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(WORDS, self.width)(ids)
        y = nn.LayerNorm()(x)
        gates = nn.softmax(nn.Dense(self.experts, use_bias=False)(y))
        best, which = jax.lax.top_k(gates, 2)
        weights = jnp.sum(jax.nn.one_hot(which, self.experts) * best[..., None], axis=-2)
        init = nn.initializers.lecun_normal()
        up = self.param("up_kernel", init, (self.experts, self.width, 20))
        down = self.param("down_kernel", init, (self.experts, 20, self.width))
        hidden = nn.gelu(jnp.einsum("bld,edh->bleh", y, up))
        x = x + jnp.einsum("bleh,ehd,ble->bld", hidden, down, weights)
        return nn.Dense(WORDS)(nn.LayerNorm()(x))


class CrossCovariance(nn.Module):
    """XCiT: attention between channels, keys and queries of unit norm over positions."""

    width: int = 16
    heads: int = 4

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.width)(x)
        for layer in range(2):
            qkv = nn.Dense(3 * self.width)(nn.LayerNorm()(x))
            q, k, v = jnp.moveaxis(qkv.reshape(*x.shape[:2], 3, self.heads, -1), (2, 1), (0, -1))
            q, k = (y * jax.lax.rsqrt(jnp.sum(y**2, axis=-1, keepdims=True) + 1e-6) for y in (q, k))
            temperature = self.param(f"scale_{layer}", nn.initializers.ones, (self.heads, 1, 1))
            scores = nn.softmax(jnp.einsum("bhdl,bhel->bhde", q, k) * temperature[None])
            y = jnp.einsum("bhde,bhel->blhd", scores, v).reshape(x.shape)
            x = x + nn.Dense(self.width)(y)
            x = x + FeedForward()(nn.LayerNorm()(x))
        return nn.Dense(5)(jnp.mean(x, axis=1))


class TwoTowers(nn.Module):
    """CLIP: images and texts in one space, on the unit sphere."""

    @nn.compact
    def __call__(self, image, ids):
        x = nn.Conv(12, (4, 4), strides=4, padding="VALID")(image)
        x = Block()(x.reshape(x.shape[0], -1, 12))
        image = nn.Dense(10, use_bias=False)(jnp.mean(nn.LayerNorm()(x), axis=1))
        x = Block()(nn.Embed(WORDS, 16)(ids))
        last = jnp.take_along_axis(x, jnp.argmax(ids, axis=-1)[:, None, None], axis=1)[:, 0]
        text = nn.Dense(10, use_bias=False)(nn.LayerNorm()(last))
        image, text = (y / jnp.linalg.norm(y, axis=-1, keepdims=True) for y in (image, text))
        return jnp.exp(self.param("logit_scale", nn.initializers.ones, ())) * text @ image.T


class Perceiver(nn.Module):
    """Learned queries read the input."""

    @nn.compact
    def __call__(self, x):
        queries = self.param("query_tokens", nn.initializers.normal(), (3, 16))
        x = nn.LayerNorm()(nn.Dense(12)(x))
        y = jnp.broadcast_to(queries[None], (x.shape[0], 3, 16))
        for _ in range(2):
            y = Block()(y, memory=x)
        return nn.DenseGeneral(5, axis=(-2, -1))(nn.LayerNorm()(y))


class Recurrent(nn.Module):
    """Two recurrent layers; the second runs both ways if asked."""

    cell: type
    both_ways: bool = False

    @nn.compact
    def __call__(self, ids):
        x = nn.RNN(self.cell(12))(nn.Embed(WORDS, 8)(ids))
        last = nn.RNN(self.cell(10))
        if self.both_ways:
            last = nn.Bidirectional(last, nn.RNN(self.cell(10)))
        return nn.Dense(5)(jnp.mean(last(x), axis=1))


class WaveNet(nn.Module):
    """Dilated causal convolutions with gates, a residual and a sum of skips."""

    @nn.compact
    def __call__(self, x):
        x, skip = nn.Dense(8)(x), 0
        for layer in range(3):
            conv = partial(nn.Conv, 8, (2,), kernel_dilation=2**layer, padding="CAUSAL")
            y = nn.tanh(conv()(x)) * nn.sigmoid(conv()(x))
            skip = skip + nn.Dense(12)(y)
            x = x + nn.Dense(8)(y)
        return nn.Dense(5)(nn.relu(nn.Dense(10)(nn.relu(skip))))


class Diffusion(nn.Module):
    """A small U-Net with times, group norms, attention and sums over skips."""

    @nn.compact
    def __call__(self, x, time):
        waves = time[:, None] * np.exp(-np.arange(4, dtype=np.float32))[None]
        time = nn.silu(nn.Dense(16)(jnp.concatenate([jnp.sin(waves), jnp.cos(waves)], axis=-1)))

        def block(x, width):
            y = nn.Conv(width, (3, 3))(nn.silu(nn.GroupNorm(4)(x)))
            shift, scale = jnp.split(nn.Dense(2 * width)(time)[:, None, None], 2, axis=-1)
            y = nn.GroupNorm(4)(y) * (1 + scale) + shift
            x = nn.Conv(width, (1, 1))(x) if x.shape[-1] != width else x
            return x + nn.Conv(width, (3, 3))(nn.silu(y))

        x = first = block(nn.Conv(8, (3, 3))(x), 8)
        x = block(nn.Conv(12, (3, 3), strides=2)(x), 12)
        tokens_of = nn.GroupNorm(4)(x).reshape(x.shape[0], -1, 12)
        x = x + nn.MultiHeadDotProductAttention(2)(tokens_of).reshape(x.shape)
        x = jax.image.resize(x, (*first.shape[:3], 12), "nearest")
        x = block(jnp.concatenate([nn.Conv(8, (3, 3))(x), first], axis=-1), 8)
        return nn.Conv(3, (3, 3))(nn.silu(nn.GroupNorm(4)(x)))


IDS = tokens(2, 6, below=WORDS)

MODELS = (
    linen("linen_vit", "vit", ViT(), normal(2, 8, 8, 3)),
    linen("linen_mixer", "mixer", Mixer(), normal(2, 12, 12, 3)),
    linen("linen_bert", "bert", Bert(), IDS),
    linen("linen_gpt", "gpt", GPT(), IDS),
    linen("linen_bloom", "gpt", GPT(interleaved=True), IDS),
    linen("linen_t5", "t5", T5(), IDS, tokens(2, 5, below=WORDS)),
    linen("linen_llama", "llama", Llama(), IDS),
    linen("linen_palm", "palm", ParallelBlocks(), IDS),
    linen("linen_scanned_blocks", "scan", ScannedBlocks(), IDS),
    linen("linen_remat_blocks", "remat", RematBlocks(), IDS),
    linen("linen_swin", "swin", Swin(), normal(2, 16, 16, 3)),
    linen("linen_experts", "experts", MixtureOfExperts(), IDS),
    linen("linen_xcit", "xcit", CrossCovariance(), normal(2, 6, 7)),
    linen("linen_clip", "clip", TwoTowers(), normal(2, 8, 8, 3), IDS),
    linen("linen_perceiver", "perceiver", Perceiver(), normal(2, 6, 7)),
    linen("linen_lstm", "lstm", Recurrent(nn.OptimizedLSTMCell), IDS),
    linen("linen_gru", "gru", Recurrent(nn.GRUCell, both_ways=True), IDS),
    linen("linen_wavenet", "wavenet", WaveNet(), normal(2, 9, 3)),
    linen("linen_diffusion", "diffusion", Diffusion(), normal(2, 8, 8, 3), normal(2)),
)
