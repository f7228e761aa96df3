"""Plain functions of plain trees, each with one piece of code that is awkward to prune through.

The family says what kind of piece it is. After ``move`` every channel is still one channel; in
``mix`` channels are compared, ordered or added up, so that few or none of that layer can go, but
other layers are free; ``statistic`` divides by a number that all channels make together.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, nn

from tests.coupling.entry import Entry, draw_inputs, fill, normal, tokens

WORDS = 11


def plain(name: str, family: str, fn, shapes, *inputs) -> Entry:
    """The entry of ``fn(params, *inputs)``, where ``params`` has the tree of ``shapes``."""

    def build(key):
        empty = jax.tree.map(
            lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
            shapes,
            is_leaf=lambda x: isinstance(x, tuple),
        )
        return fn, fill(empty, key), draw_inputs(inputs, key)

    return Entry(f"plain_{name}", "plain", family, build)


def dense(layer, x):
    return x @ layer["kernel"] + layer["bias"].reshape(*[1] * (x.ndim - 1), -1)


def weights(*sizes):
    """Shapes of a dense layer, or a 3x3 convolution if ``(3, 3)`` comes first."""
    return {"kernel": sizes, "bias": sizes[-1:]}


def conv(layer, x, **options):
    options = {"window_strides": (1, 1), "padding": "SAME"} | options
    numbers = ("NHWC", "HWIO", "NHWC")
    y = lax.conv_general_dilated(x, layer["kernel"], dimension_numbers=numbers, **options)
    return y + layer["bias"][None, None, None]


def mlp(between, hidden=12, after=None, out=5, family="move"):
    """The entry of two dense layers with ``between`` on the hidden activation."""

    def fn(p, x):
        return dense(p["last"], between(nn.relu(dense(p["first"], x))))

    shapes = {"first": weights(7, hidden), "last": weights(after or hidden, out)}
    return plain(between.__name__, family, fn, shapes, normal(4, 7))


# Channels move, but each stays itself.


def channel_flip(h):
    return h[:, ::-1]


def channel_roll(h):
    return jnp.roll(h, 5, axis=1)


def take_constant(h):
    return jnp.take(h, np.array([7, 0, 3, 3, 10]), axis=1)


def every_second(h):
    return jnp.concatenate([h[:, ::2], h[:, 1::2] ** 2], axis=1)


def uneven_split(h):
    a, b, c = jnp.split(h, [2, 5], axis=1)
    return jnp.concatenate([c, a * 2.0, b], axis=1)


def tile(h):
    return jnp.tile(h, (1, 2))


def repeat(h):
    return jnp.repeat(h, 2, axis=1)


def outer_product(h):
    return (h[:, :, None] * h[:, None]).reshape(h.shape[0], -1)


def stack_unstack(h):
    first, second, third = jnp.unstack(jnp.stack([h, h**2, jnp.sin(h)]))
    return first + second * third


def glu(h):
    a, b = jnp.split(h, 2, axis=1)
    return a * nn.sigmoid(b)


def dynamic_slice(h):
    return lax.dynamic_slice(h, (0, 3), (h.shape[0], 6))


def scatter_constant(h):
    return jnp.zeros((h.shape[0], 20)).at[:, np.arange(12) + 4].set(h)


def update_in_place(h):
    return h.at[:, :4].multiply(2.0)


def constant_mask(h):
    return jnp.where(np.arange(12)[None] % 3 == 0, 0.0, h * np.linspace(1, 2, 12)[None])


def half_precision(h):
    return (h.astype(jnp.bfloat16) * 2).astype(jnp.float32)


def divided_by_width(h):
    return h / math.sqrt(h.shape[1])


def on_the_circle(h):
    """Pairs of neighbours as complex numbers."""
    z = lax.complex(h[:, ::2], h[:, 1::2]) * jnp.exp(1j * np.arange(6, dtype=np.float32))[None]
    return jnp.concatenate([z.real, z.imag], axis=1)


# Channels meet.


def softmax_over_channels(h):
    return nn.softmax(h, axis=1)


def cumsum_over_channels(h):
    return jnp.cumsum(h, axis=1)


def sorted_channels(h):
    return jnp.sort(h, axis=1)


def largest_channels(h):
    return lax.top_k(h, 5)[0]


def maxout(h):
    return jnp.max(h.reshape(h.shape[0], -1, 3), axis=2)


def fourier_over_channels(h):
    return jnp.fft.fft(h, axis=1).real


def centred(h):
    return h - jnp.mean(h, axis=1, keepdims=True)


def standardised(h):
    return nn.standardize(h, axis=1)


def unit_norm(h):
    return h / jnp.linalg.norm(h, axis=1, keepdims=True)


def response_norm(h):
    """Local response normalisation: squares of five neighbouring channels."""
    squares = lax.reduce_window(h**2, 0.0, lax.add, (1, 5), (1, 1), "SAME")
    return h * (1 + 0.1 * squares) ** -0.75


def running_logarithm(h):
    """Along the samples, where what is zero has logarithms of 1, 2, 3, ..."""
    return h * jnp.sum(lax.cumlogsumexp(h, axis=0), axis=1, keepdims=True)


def order_of_samples(h):
    """The largest two of four zeros are the first and the second."""
    return h * jnp.sum(lax.top_k(h.T, 2)[1]).astype(h.dtype)


def missing_sample(h):
    """A sample that is not there is filled with ones, whatever is pruned."""
    filled = jnp.take(h, np.array([0, 99, 2, 3]), axis=0, mode="fill", fill_value=1.0)
    return h * jnp.sum(filled, axis=1, keepdims=True)


def counted(h):
    """Sums of what is not a real number any more: of booleans, rounded ones and integers."""
    true = (h + 1.7).astype(bool).astype(h.dtype)
    away = lax.round(h + 2.5, lax.RoundingMethod.AWAY_FROM_ZERO)
    inverted = (~(h >= 0).astype(jnp.int32)).astype(h.dtype)
    return h * jnp.sum(true + away + inverted, axis=1, keepdims=True) / 12


def centred_backwards(h):
    """The mean is taken off, and the variance is that of the samples in reverse."""
    h, _ = lax.optimization_barrier(((h - jnp.mean(h, axis=1, keepdims=True))[::-1], h[0, 0]))
    return h * lax.rsqrt(jnp.mean(h**2, axis=1, keepdims=True) + 1.0)


def centred_and_picked(h):
    h = (h - jnp.mean(h, axis=1, keepdims=True))[:, np.array([1, 1, 4, 2])]
    return h * lax.rsqrt(jnp.mean(h**2, axis=1, keepdims=True) + 1.0)


def applied(h):
    """What is written depends on what was there."""
    return h.at[:, np.array([1, 2])].apply(lambda x: jnp.sin(x) + 1)


def random_by_number(h):
    """The numbers of the channels scale them, and make a random key of each."""
    number = jnp.arange(12)
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(number)
    noise = jax.vmap(lambda key: jax.random.normal(key, ()))(keys)
    return h * number.astype(h.dtype)[None] * noise[None]


def entropy(h):
    """What a softmax over channels says, as one number."""
    return jnp.concatenate([h, nn.logsumexp(h, axis=1, keepdims=True)], axis=1)


# Control flow and custom derivatives.


def conditional(h):
    return lax.cond(jnp.sum(h) > 0, lambda h: h * 2, lambda h: jnp.flip(h, 1), h)


def switched(h):
    return lax.switch(2, [jnp.sin, jnp.cos, lambda h: h - 1], h)


def while_loop(h):
    return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1]) * 2), (0, h))[1]


def rolled_in_a_loop(h):
    return lax.fori_loop(0, 4, lambda _, h: jnp.roll(h, 3, axis=1) * 1.1, h)


@jax.custom_vjp
def _clipped(x):
    return jnp.clip(x, 0.1, 2.0)


_clipped.defvjp(lambda x: (_clipped(x), None), lambda _, g: (g,))


def straight_through(h):
    return _clipped(h) * 2


@jax.custom_jvp
def _swish(x):
    return x * nn.sigmoid(x)


_swish.defjvp(lambda x, t: (_swish(x[0]), t[0] * nn.sigmoid(x[0])))


def own_derivative(h):
    return _swish(h)


def mapped(h):
    return lax.map(lambda row: row * jnp.arange(1.0, 13.0), h)


def checkpointed(h):
    return jax.checkpoint(lambda h: jnp.sin(jnp.cos(h)))(h)


def jitted_twice(h):
    inner = jax.jit(lambda h: h * nn.sigmoid(h))
    return inner(inner(h))


# Whole networks.


def returned_hidden(p, x):
    hidden = nn.relu(dense(p["first"], x))
    return dense(p["last"], nn.relu(dense(p["second"], hidden))), hidden


def residual_with_input(p, x):
    return dense(p["last"], x + dense(p["second"], nn.relu(dense(p["first"], x))))


def shared_layer(p, x):
    for _ in range(3):
        x = x + nn.tanh(dense(p["shared"], dense(p["first"], x)))
    return dense(p["last"], x)


def tied_autoencoder(p, x):
    hidden = nn.relu(dense(p["first"], x))
    return hidden @ p["first"]["kernel"].T + p["out_bias"][None]


def low_rank(p, x):
    """A kernel plus a product of two thin ones."""
    kernel = p["first"]["kernel"] + 0.5 * p["down"] @ p["up"]
    return dense(p["last"], nn.relu(x @ kernel + p["first"]["bias"][None]))


def scaled_kernel(p, x):
    """A kernel that is fitted, absolute and normed to 1, before it is used."""
    kernel = jnp.abs(p["first"]["kernel"]) * p["gain_scale"][None]
    kernel = kernel * lax.rsqrt(jnp.sum(kernel**2, axis=0, keepdims=True) + 1e-6)
    return dense(p["last"], nn.relu(x @ kernel))


def divided_by_scale(p, x):
    """A constant divided by a scale is not finite where the scale is pruned."""
    scale = np.linspace(1, 2, 12, dtype=np.float32) / p["scale"]
    return dense(p["last"], dense(p["first"], x) * scale[None])


def gamma_of_scale(p, x):
    return dense(p["last"], dense(p["first"], x) * lax.lgamma(p["scale"])[None])


def bilinear(p, x):
    a, b = dense(p["a"], x), dense(p["b"], x)
    return jnp.einsum("ni,ijk,nj->nk", a, p["form"], b)


def ensemble(p, x):
    """Three networks side by side on the first axis of every parameter."""

    def one(p):
        return dense(p["last"], nn.relu(dense(p["first"], x)))

    return jnp.mean(jax.vmap(one)(p), axis=0)


def hyper_network(p, x):
    """The kernel of one layer is the output of another."""
    kernel = dense(p["maker"], x[:, :3]).reshape(x.shape[0], 7, 10)
    return dense(p["last"], nn.relu(jnp.einsum("ni,nij->nj", x, kernel)))


def gram_matrix(p, x):
    h = conv(p["first"], x)
    return jnp.einsum("nhwc,nhwd->ncd", h, h).reshape(x.shape[0], -1) @ p["last_kernel"]


def loss_value(p, x, label):
    """The output is the mean cross-entropy, with a penalty on the kernels."""
    logits = nn.log_softmax(dense(p["last"], nn.relu(dense(p["first"], x))))
    loss = -jnp.mean(jnp.take_along_axis(logits, label[:, None], axis=1))
    return (loss + 0.01 * sum(jnp.sum(kernel**2) for kernel in jax.tree.leaves(p)),)


def dropout_with_key(p, x):
    hidden = nn.relu(dense(p["first"], x))
    keep = jax.random.bernoulli(jax.random.key(0), 0.8, hidden.shape)
    return dense(p["last"], jnp.where(keep, hidden / 0.8, 0))


def dropout_per_channel(p, x):
    hidden = nn.relu(conv(p["first"], x))
    keep = jax.random.bernoulli(jax.random.key(0), 0.8, (x.shape[0], 1, 1, hidden.shape[-1]))
    return conv(p["last"], jnp.where(keep, hidden / 0.8, 0))


def pixel_shuffle(p, x):
    h = nn.relu(conv(p["first"], x))
    n, height, width, c = h.shape
    h = h.reshape(n, height, width, 2, 2, c // 4).transpose(0, 1, 3, 2, 4, 5)
    return conv(p["last"], h.reshape(n, 2 * height, 2 * width, c // 4))


def pixel_unshuffle(p, x):
    h = nn.relu(conv(p["first"], x))
    n, height, width, c = h.shape
    h = h.reshape(n, height // 2, 2, width // 2, 2, c).transpose(0, 1, 3, 2, 4, 5)
    return conv(p["last"], h.reshape(n, height // 2, width // 2, 4 * c))


def padded_shortcut(p, x):
    """The shortcut gets zero channels on both sides, as in the first ResNets for small images."""
    h = nn.relu(conv(p["first"], x))
    y = conv(p["second"], h, window_strides=(2, 2))
    h = nn.relu(y + jnp.pad(h[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (2, 2))))
    return conv(p["last"], h)


def spatial_gating(p, x):
    """gMLP: half of the channels, mixed over positions, gates the other half."""
    u, v = jnp.split(nn.gelu(dense(p["first"], x)), 2, axis=-1)
    v = jnp.einsum("nlc,lm->nmc", v, p["spatial_kernel"]) + p["spatial_bias"][None, :, None]
    return dense(p["last"], u * v)


def grouped_queries(p, x):
    """Einsums on kernels with axes for heads; two query heads for each pair of key and value."""
    q = jnp.einsum("nld,dghk->nlghk", x, p["q"])
    k, v = jnp.einsum("nld,dgk->nlgk", x, p["k"]), jnp.einsum("nld,dgk->nlgk", x, p["v"])
    scores = nn.softmax(jnp.einsum("nlghk,nmgk->nghlm", q, k) / 2.0)
    return jnp.einsum("nghlm,nmgk,ghkd->nld", scores, v, p["o"])


def library_attention(p, x):
    q, k, v = (jnp.einsum("nld,dhk->nlhk", x, p[name]) for name in "qkv")
    return jnp.einsum("nlhk,hkd->nld", nn.dot_product_attention(q, k, v, is_causal=True), p["o"])


def linear_attention(p, x):
    """Features elu + 1 in place of a softmax."""
    q, k, v = (jnp.einsum("nld,dhk->nlhk", x, p[name]) for name in "qkv")
    q, k = nn.elu(q) + 1, nn.elu(k) + 1
    memory = jnp.einsum("nlhk,nlhv->nhkv", k, v)
    norm = jnp.einsum("nlhk,nhk->nlh", q, jnp.sum(k, axis=1))
    y = jnp.einsum("nlhk,nhkv->nlhv", q, memory) / norm[..., None]
    return jnp.einsum("nlhv,hvd->nld", y, p["o"])


def rotary_neighbours(p, x):
    """Rotary positions that turn channel 2i with channel 2i + 1."""
    angles = (np.arange(x.shape[1])[:, None] * 10.0 ** -np.arange(2)).astype(np.float32)
    cos, sin = np.cos(angles)[None, :, None], np.sin(angles)[None, :, None]

    def turn(y):
        a, b = y[..., ::2], y[..., 1::2]
        return jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(y.shape)

    q, k, v = (jnp.einsum("nld,dhk->nlhk", x, p[name]) for name in "qkv")
    scores = nn.softmax(jnp.einsum("nlhk,nmhk->nhlm", turn(q), turn(k)) / 2.0)
    return jnp.einsum("nhlm,nmhk,hkd->nld", scores, v, p["o"])


def state_space(p, x):
    """A diagonal linear recurrence by ``associative_scan``, a gate, and a short convolution."""
    h, gate = jnp.split(dense(p["first"], x), 2, axis=-1)
    h = sum(
        jnp.pad(h, ((0, 0), (i, 0), (0, 0)))[:, : h.shape[1]] * p["taps"][None, i : i + 1]
        for i in range(3)
    )
    decay = jnp.broadcast_to(nn.sigmoid(p["decay"])[None, None], h.shape)
    pairs = lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1])  # noqa: E731
    h = lax.associative_scan(pairs, (decay, h), axis=1)[1]
    return dense(p["last"], h * nn.silu(gate))


def selective_scan(p, x):
    """Mamba: the state of every channel decays at a rate read off the input."""
    h, gate = jnp.split(dense(p["first"], x), 2, axis=-1)
    rate = nn.softplus(dense(p["rate"], h))
    b, c = jnp.einsum("nlc,cs->nls", h, p["b"]), jnp.einsum("nlc,cs->nls", h, p["c"])

    def step(state, now):
        h, rate, b, c = now
        decay = jnp.exp(-rate[..., None] * jnp.exp(p["a_kernel"])[None])
        state = decay * state + (rate * h)[..., None] * b[:, None]
        return state, jnp.einsum("ncs,ns->nc", state, c)

    start = jnp.zeros((x.shape[0], *p["a_kernel"].shape))
    _, y = lax.scan(step, start, jax.tree.map(lambda y: y.swapaxes(0, 1), (h, rate, b, c)))
    return dense(p["last"], (y.swapaxes(0, 1) + h * p["skip_scale"][None, None]) * nn.silu(gate))


def reversed_scan(p, x):
    """A recurrence from the last step to the first, whose carry has two parts."""

    def step(carry, now):
        fast, slow = carry
        fast = nn.tanh(now + fast @ p["recurrent"] + slow)
        return (fast, 0.9 * slow + 0.1 * fast), fast

    start = (jnp.zeros((x.shape[0], 10)), jnp.zeros((x.shape[0], 10)))
    inputs = dense(p["first"], x).swapaxes(0, 1)
    (_, slow), y = lax.scan(step, start, inputs, reverse=True)
    return dense(p["last"], y[0] * slow)


def scan_over_layers(p, x):
    """Stacked layers whose number is read inside: a learning rate from a list, by position."""

    def layer(h, now):
        index, layer = now
        return h + nn.tanh(dense(layer, h)) / (1.0 + index), None

    h = dense(p["first"], x)
    return dense(p["last"], lax.scan(layer, h, (jnp.arange(3.0), p["layers"]))[0])


def graph_convolution(p, x):
    """Messages along edges, summed by receiver; attention over the neighbours."""
    senders, receivers = np.array([0, 1, 2, 3, 3, 1]), np.array([1, 2, 3, 0, 1, 0])
    h = nn.relu(dense(p["first"], x))
    score = nn.leaky_relu((h[senders] + h[receivers]) @ p["score"])
    score = jnp.exp(score - jax.ops.segment_max(score, receivers, 4)[receivers])
    score = score / jax.ops.segment_sum(score, receivers, 4)[receivers]
    h = jax.ops.segment_sum(score * dense(p["message"], h)[senders], receivers, 4)
    return dense(p["last"], nn.relu(h))


def fourier_mixing(p, x):
    """FNet: a Fourier transform over positions alone."""
    h = dense(p["first"], x)
    h = h + jnp.fft.fft(h, axis=1).real
    return dense(p["last"], nn.gelu(h))


def spectral_convolution(p, x):
    """A Fourier neural operator: complex kernels on the lowest waves, channels first."""
    h = jnp.einsum("ncl,cd->ndl", x, p["lift"])
    waves = jnp.fft.rfft(h)[..., :3]
    kernel = lax.complex(p["real_kernel"], p["imaginary_kernel"])
    waves = jnp.einsum("ncw,cdw->ndw", waves, kernel)
    y = jnp.fft.irfft(jnp.pad(waves, ((0, 0), (0, 0), (0, 2))), n=8)
    return jnp.einsum("ncl,cd->ndl", nn.gelu(y + jnp.einsum("ncl,cd->ndl", h, p["by"])), p["out"])


def patches(p, x):
    h = nn.relu(conv(p["first"], x))
    numbers = ("NHWC", "HWIO", "NHWC")
    h = lax.conv_general_dilated_patches(h, (2, 2), (2, 2), "VALID", dimension_numbers=numbers)
    return dense(p["last"], h.reshape(x.shape[0], -1))


def interactions(p, ids, x):
    """A recommender: dot products of every pair of embeddings, upper triangle."""
    fields = jnp.stack([table[ids[:, i]] for i, table in enumerate(p["embeddings"])], axis=1)
    fields = jnp.concatenate([fields, dense(p["first"], x)[:, None]], axis=1)
    products = jnp.einsum("nik,njk->nij", fields, fields)
    rows, columns = np.triu_indices(fields.shape[1], 1)
    return dense(p["last"], products[:, rows, columns])


def coupling_flow(p, x):
    """Half of the inputs shifts and scales the other half; the parts change places."""
    total = jnp.zeros(x.shape[0])
    for layer in p["layers"]:
        a, b = x[:, :3], x[:, 3:]
        shift, log = jnp.split(dense(layer["out"], nn.relu(dense(layer["hidden"], a))), 2, axis=1)
        x = jnp.concatenate([b * jnp.exp(nn.tanh(log)) + shift, a], axis=1)
        total = total + jnp.sum(nn.tanh(log), axis=1)
    return x, total


def nearest_code(p, x):
    """Vector quantisation, with gradients that pass straight through."""
    z = nn.tanh(dense(p["first"], x))
    distances = jnp.sum((z[:, None] - p["code_embeddings"][None]) ** 2, axis=-1)
    code = p["code_embeddings"][jnp.argmin(distances, axis=1)]
    return dense(p["last"], z + lax.stop_gradient(code - z))


def fixed_point(p, x):
    """A deep equilibrium: one layer until nothing moves, at most 20 times."""
    start = dense(p["first"], x)

    def step(carry):
        count, h, _ = carry
        new = nn.tanh(0.5 * h @ p["again"] + start)
        return count + 1, new, jnp.max(jnp.abs(new - h))

    def unfinished(carry):
        return (carry[0] < 20) & (carry[2] > 1e-3)

    h = lax.while_loop(unfinished, step, (0, start, jnp.float32(1)))[1]
    return dense(p["last"], h)


def conv_transpose(p, x):
    h = nn.relu(conv(p["first"], x))
    h = nn.relu(conv(p["up"], h, lhs_dilation=(2, 2), padding=((2, 2), (2, 2))))
    h = nn.relu(conv(p["groups"], h, feature_group_count=4, rhs_dilation=(2, 2)))
    return conv(p["last"], h)


def depth_multiplier(p, x):
    """Two depthwise filters for every channel; a max pool; global max."""
    h = nn.relu(conv(p["first"], x))
    h = nn.relu(conv(p["depthwise"], h, feature_group_count=8))
    h = lax.reduce_window(h, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return dense(p["last"], jnp.max(h, axis=(1, 2)))


def own_batch_norm(p, x):
    """Statistics of the batch itself, as in training."""
    h = conv(p["first"], x)
    mean, var = jnp.mean(h, (0, 1, 2), keepdims=True), jnp.var(h, (0, 1, 2), keepdims=True)
    h = (h - mean) * lax.rsqrt(var + 1e-5) * p["norm_scale"] + p["norm_bias"]
    return conv(p["last"], nn.relu(h))


def channel_attention(p, x):
    """ECA: a convolution along the channels makes their gates."""
    h = nn.relu(conv(p["first"], x))
    pooled = jnp.pad(jnp.mean(h, axis=(1, 2)), ((0, 0), (1, 1)))
    gate = sum(pooled[:, i : i + h.shape[-1]] * p["taps"][i] for i in range(3))
    return conv(p["last"], h * nn.sigmoid(gate)[:, None, None])


def mlps(family, *functions, **options):
    return [mlp(function, family=family, **options) for function in functions]


X, IMAGE, SEQUENCE = normal(4, 7), normal(2, 8, 8, 3), normal(2, 6, 8)
TWO = {"first": weights(7, 12), "last": weights(12, 5)}
THREE = {"first": weights(7, 12), "second": weights(12, 10), "last": weights(10, 5)}
CONVS = {"first": weights(3, 3, 3, 8), "last": weights(3, 3, 8, 5)}
HEADS = {"q": (8, 2, 4), "k": (8, 2, 4), "v": (8, 2, 4), "o": (2, 4, 8)}
STACKED = {"first": {"kernel": (3, 7, 12), "bias": (3, 12)}}
STACKED |= {"last": {"kernel": (3, 12, 5), "bias": (3, 5)}}

MODELS = (
    *mlps("move", channel_flip, channel_roll, every_second, uneven_split, stack_unstack),
    *mlps("move", update_in_place, constant_mask, half_precision, divided_by_width, on_the_circle),
    *mlps("move", take_constant, after=5),
    *mlps("move", tile, repeat, after=24),
    *mlps("move", outer_product, after=144),
    *mlps("move", glu, dynamic_slice, after=6),
    *mlps("move", scatter_constant, after=20),
    *mlps("mix", softmax_over_channels, cumsum_over_channels, sorted_channels),
    *mlps("mix", fourier_over_channels, response_norm),
    *mlps("mix", running_logarithm, order_of_samples, missing_sample, applied, random_by_number),
    *mlps("mix", largest_channels, after=5),
    *mlps("mix", maxout, after=4),
    *mlps("mix", entropy, after=13),
    *mlps("statistic", centred, standardised, unit_norm, counted, centred_backwards),
    *mlps("statistic", centred_and_picked, after=4),
    *mlps("control", conditional, switched, while_loop, rolled_in_a_loop, mapped),
    *mlps("control", straight_through, own_derivative, checkpointed, jitted_twice),
    plain("returned_hidden", "output", returned_hidden, THREE, X),
    plain(
        "residual_with_input",
        "output",
        residual_with_input,
        {"first": weights(7, 12), "second": weights(12, 7), "last": weights(7, 5)},
        X,
    ),
    plain("loss_value", "output", loss_value, TWO, X, tokens(4, below=5)),
    plain("dropout_with_key", "random", dropout_with_key, TWO, X),
    plain("dropout_per_channel", "random", dropout_per_channel, CONVS, IMAGE),
    plain(
        "shared_layer",
        "kernel",
        shared_layer,
        {"first": weights(7, 12), "shared": weights(12, 7), "last": weights(7, 5)},
        X,
    ),
    plain(
        "tied_autoencoder",
        "kernel",
        tied_autoencoder,
        {"first": weights(7, 12), "out_bias": (7,)},
        X,
    ),
    plain("low_rank", "kernel", low_rank, TWO | {"down": (7, 4), "up": (4, 12)}, X),
    plain(
        "scaled_kernel",
        "kernel",
        scaled_kernel,
        {"first": {"kernel": (7, 12)}, "gain_scale": (12,), "last": weights(12, 5)},
        X,
    ),
    plain("divided_by_scale", "kernel", divided_by_scale, TWO | {"scale": (12,)}, X),
    plain("gamma_of_scale", "kernel", gamma_of_scale, TWO | {"scale": (12,)}, X),
    plain(
        "bilinear",
        "kernel",
        bilinear,
        {"a": weights(7, 6), "b": weights(7, 8), "form": (6, 8, 5)},
        X,
    ),
    plain("ensemble", "kernel", ensemble, STACKED, X),
    plain(
        "hyper_network",
        "kernel",
        hyper_network,
        {"maker": weights(3, 70), "last": weights(10, 5)},
        X,
    ),
    plain(
        "gram_matrix",
        "image",
        gram_matrix,
        {"first": weights(3, 3, 3, 8), "last_kernel": (64, 5)},
        IMAGE,
    ),
    plain(
        "pixel_shuffle",
        "image",
        pixel_shuffle,
        {"first": weights(3, 3, 3, 12), "last": weights(3, 3, 3, 5)},
        IMAGE,
    ),
    plain(
        "pixel_unshuffle",
        "image",
        pixel_unshuffle,
        {"first": weights(3, 3, 3, 6), "last": weights(3, 3, 24, 5)},
        IMAGE,
    ),
    plain(
        "padded_shortcut",
        "image",
        padded_shortcut,
        {
            "first": weights(3, 3, 3, 8),
            "second": weights(3, 3, 8, 12),
            "last": weights(3, 3, 12, 5),
        },
        IMAGE,
    ),
    plain(
        "patches",
        "image",
        patches,
        {"first": weights(3, 3, 3, 6), "last": weights(16 * 24, 5)},
        IMAGE,
    ),
    plain(
        "conv_transpose",
        "image",
        conv_transpose,
        {
            "first": weights(3, 3, 3, 8),
            "up": weights(3, 3, 8, 12),
            "groups": weights(3, 3, 3, 8),
            "last": weights(3, 3, 8, 5),
        },
        IMAGE,
    ),
    plain(
        "depth_multiplier",
        "image",
        depth_multiplier,
        {"first": weights(3, 3, 3, 8), "depthwise": weights(3, 3, 1, 16), "last": weights(16, 5)},
        IMAGE,
    ),
    plain(
        "own_batch_norm",
        "image",
        own_batch_norm,
        CONVS | {"norm_scale": (1, 1, 1, 8), "norm_bias": (1, 1, 1, 8)},
        IMAGE,
    ),
    plain("channel_attention", "mix", channel_attention, CONVS | {"taps": (3,)}, IMAGE),
    plain(
        "spatial_gating",
        "sequence",
        spatial_gating,
        {
            "first": weights(8, 20),
            "spatial_kernel": (6, 6),
            "spatial_bias": (6,),
            "last": weights(10, 8),
        },
        SEQUENCE,
    ),
    plain(
        "grouped_queries",
        "attention",
        grouped_queries,
        {"q": (8, 2, 2, 4), "k": (8, 2, 4), "v": (8, 2, 4), "o": (2, 2, 4, 8)},
        SEQUENCE,
    ),
    plain("library_attention", "attention", library_attention, HEADS, SEQUENCE),
    plain("linear_attention", "attention", linear_attention, HEADS, SEQUENCE),
    plain("rotary_neighbours", "attention", rotary_neighbours, HEADS, SEQUENCE),
    plain(
        "state_space",
        "sequence",
        state_space,
        {"first": weights(8, 20), "taps": (3, 10), "decay": (10,), "last": weights(10, 5)},
        SEQUENCE,
    ),
    plain(
        "selective_scan",
        "sequence",
        selective_scan,
        {
            "first": weights(8, 20),
            "rate": weights(10, 10),
            "b": (10, 4),
            "c": (10, 4),
            "a_kernel": (10, 4),
            "skip_scale": (10,),
            "last": weights(10, 5),
        },
        SEQUENCE,
    ),
    plain(
        "reversed_scan",
        "sequence",
        reversed_scan,
        {"first": weights(8, 10), "recurrent": (10, 10), "last": weights(10, 5)},
        SEQUENCE,
    ),
    plain(
        "scan_over_layers",
        "sequence",
        scan_over_layers,
        {
            "first": weights(7, 12),
            "layers": {"kernel": (3, 12, 12), "bias": (3, 12)},
            "last": weights(12, 5),
        },
        X,
    ),
    plain(
        "graph_convolution",
        "graph",
        graph_convolution,
        {
            "first": weights(7, 12),
            "score": (12, 1),
            "message": weights(12, 10),
            "last": weights(10, 5),
        },
        X,
    ),
    plain(
        "fourier_mixing",
        "sequence",
        fourier_mixing,
        {"first": weights(8, 12), "last": weights(12, 5)},
        SEQUENCE,
    ),
    plain(
        "spectral_convolution",
        "sequence",
        spectral_convolution,
        {
            "lift": (3, 8),
            "real_kernel": (8, 8, 3),
            "imaginary_kernel": (8, 8, 3),
            "by": (8, 8),
            "out": (8, 2),
        },
        normal(2, 3, 8),
    ),
    plain(
        "interactions",
        "embedding",
        interactions,
        {"embeddings": [(WORDS, 8)] * 3, "first": weights(7, 8), "last": weights(6, 1)},
        tokens(4, 3, below=WORDS),
        X,
    ),
    plain(
        "coupling_flow",
        "output",
        coupling_flow,
        {"layers": [{"hidden": weights(3, 12), "out": weights(12, 6)}] * 2},
        normal(4, 6),
    ),
    plain(
        "nearest_code",
        "embedding",
        nearest_code,
        {"first": weights(7, 6), "code_embeddings": (9, 6), "last": weights(6, 5)},
        X,
    ),
    plain(
        "fixed_point",
        "control",
        fixed_point,
        {"first": weights(7, 10), "again": (10, 10), "last": weights(10, 5)},
        X,
    ),
)
