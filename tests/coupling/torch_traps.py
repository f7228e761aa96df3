"""More small torch modules: what the eighty patterns leave out, and where tools err unnoticed.

Nobody chose the rules of coupling with these in view. ``expect`` is as in ``torch_patterns``, or
``"lawful"``: the masked and the shrunk model agree on whatever is pruned, which may be nothing. The
usual trap is a channel that is not zero although all its parameters are (behind a sigmoid, a shift,
a comparison) and that something looks at before its consumers multiply it by zero.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from tests.coupling.torch_patterns import (
    Net,
    Pattern,
    Table,
    _heads,
    _joined,
    conv,
    ids,
    image,
    parameter,
    random,
    tokens,
)

_table = Table()
exact, frozen, lawful = _table.exact, _table.frozen, _table.lawful


def around(middle, width=8, **parts):
    """An image network of one hidden width, with something done to the hidden channels."""

    def run(net, x):
        return net.head(middle(net, F.relu(net.a(x))))

    return Net(run, a=conv(3, width), head=conv(width, 4), **parts), image()


def among(middle, width=12, **parts):
    """The same for tokens, without an activation in front."""

    def run(net, x):
        return net.head(middle(net, net.stem(x)))

    return Net(run, stem=nn.Linear(6, width), head=nn.Linear(width, 4), **parts), tokens()


# --- statistics of channels that are not zero where they are pruned


@lawful
def layernorm_after_sigmoid():
    """A pruned channel is 0.5, and the mean and the variance see it."""
    return among(lambda net, x: net.norm(torch.sigmoid(x)), norm=nn.LayerNorm(12))


@lawful
def rmsnorm_after_shift():
    return among(lambda net, x: net.norm(x + 1.0), norm=nn.RMSNorm(12))


@lawful
def groupnorm_after_hardsigmoid():
    return around(lambda net, x: net.norm(F.hardsigmoid(x)), norm=nn.GroupNorm(2, 8))


@lawful
def mean_of_softplus():
    return around(lambda net, x: x * F.softplus(x).mean(dim=1, keepdim=True))


@lawful
def mean_of_comparison():
    """Counts what is not positive: so are all that were pruned."""
    return around(lambda net, x: x * (x <= 0).to(x.dtype).mean(dim=1, keepdim=True))


@lawful
def mean_of_where():
    return around(
        lambda net, x: x * torch.where(x > 0.1, x, torch.full_like(x, -1.0)).mean(1, keepdim=True)
    )


@lawful
def mean_of_position_table():
    """A table that is computed, not learnt, stays where its channel is pruned."""

    def middle(net, x):
        table = torch.sin(torch.outer(net.times, net.frequencies))
        return x * (x + table).mean(dim=-1, keepdim=True)

    return among(middle, times=torch.arange(5.0), frequencies=torch.linspace(0.1, 1.0, 12))


@lawful
def std_over_channels():
    return around(lambda net, x: x / (x.std(dim=1, keepdim=True) + 0.1))


@exact
def normalize_over_channels():
    """Zeros add nothing to a sum of squares."""
    return around(lambda net, x: F.normalize(x, dim=1))


@exact
def cosine_similarity():
    def run(net, x):
        a, b = net.a(x), net.b(x)
        return F.cosine_similarity(a, b, dim=1)

    return Net(run, a=conv(3, 8), b=conv(3, 8)), image()


@exact
def global_mean_of_everything():
    return around(lambda net, x: x * x.mean())


@exact
def layernorm_without_scale():
    return among(lambda net, x: net.norm(x), norm=nn.LayerNorm(12, elementwise_affine=False))


@exact
def layernorm_over_image():
    """Over channels, height and width together."""
    return around(lambda net, x: net.norm(x), norm=nn.LayerNorm((8, 8, 8)))


@exact
def groupnorm_of_one_group():
    return around(lambda net, x: net.norm(x), norm=nn.GroupNorm(1, 8))


@exact
def groupnorm_of_single_channels():
    return around(lambda net, x: net.norm(x), norm=nn.GroupNorm(8, 8))


@exact
def batchnorm_without_scale():
    """What is pruned is not zero behind it: (0 - mean) / deviation. Nothing looks at it."""
    return around(lambda net, x: F.relu(net.norm(x)), norm=nn.BatchNorm2d(8, affine=False))


@lawful
def groupnorm_after_batchnorm_without_scale():
    return around(
        lambda net, x: net.norm(net.shift(x)),
        shift=nn.BatchNorm2d(8, affine=False),
        norm=nn.GroupNorm(2, 8),
    )


@exact
def batchnorm_of_this_batch():
    """Without running statistics: of every batch its own."""
    return around(lambda net, x: net.norm(x), norm=nn.BatchNorm2d(8, track_running_stats=False))


@frozen("the largest channel may be one that is pruned, and then is 0")
def channel_max():
    def run(net, x):
        x = net.a(x)
        return net.head(x * x.amax(dim=1, keepdim=True))

    return Net(run, a=conv(3, 8), head=conv(8, 4)), image()


@lawful
def channel_max_of_relu():
    """CBAM's: nothing is below the zero of a pruned channel, so this could be exact."""
    return around(lambda net, x: x * x.amax(dim=1, keepdim=True))


@frozen("the order of channels depends on all of them")
def sorted_channels():
    def run(net, x):
        return net.head(net.a(x).sort(dim=1).values)

    return Net(run, a=conv(3, 8), head=conv(8, 4)), image()


@frozen("which channels are the largest depends on all of them")
def topk_channels():
    def run(net, x):
        return net.head(net.a(x).topk(4, dim=1).values)

    return Net(run, a=conv(3, 8), head=conv(4, 4)), image()


@lawful
def logsumexp_channels():
    return around(lambda net, x: x * x.logsumexp(dim=1, keepdim=True))


@lawful
def softmax_of_parameter():
    """A learnt share for every channel: a pruned one still takes exp(0)."""
    return around(lambda net, x: x * net.share.softmax(0).view(1, -1, 1, 1), share=parameter(8))


@frozen("a convolution over channels looks at neighbours")
def convolution_over_channels():
    """ECA, but that it replaces the channels and does not weigh them."""
    return around(
        lambda net, x: (
            net.mix(x.flatten(2).transpose(1, 2).flatten(0, 1).unsqueeze(1))
            .squeeze(1)
            .view(2, 64, 8)
            .transpose(1, 2)
            .reshape(2, 8, 8, 8)
        ),
        mix=nn.Conv1d(1, 1, 3, padding=1),
    )


@frozen("a Fourier transform over channels mixes them all")
def fft_over_channels():
    def run(net, x):
        return net.head(torch.fft.fft(net.stem(x), dim=-1).real)

    return Net(run, stem=nn.Linear(6, 8), head=nn.Linear(8, 4)), tokens()


@lawful
def fft_over_space():
    return around(lambda net, x: torch.fft.irfft2(torch.fft.rfft2(x) * 0.5, s=(8, 8)))


@lawful
def fft_over_steps():
    """A layer of waves along a sequence: every channel by itself, then complex weights."""

    def run(net, x):
        waves = torch.fft.rfft(net.stem(x).relu(), dim=1)
        mixed = torch.einsum("bsc,co->bso", waves, torch.view_as_complex(net.weights))
        return net.head(torch.fft.irfft(mixed, n=x.shape[1], dim=1))

    weights = parameter(8, 12, 2)
    return Net(run, stem=nn.Linear(6, 8), weights=weights, head=nn.Linear(12, 4)), tokens()


# --- not a number


@frozen("log 0 is -inf, and -inf * 0 is not a number")
def log_of_pruned():
    def run(net, x):
        return net.head(torch.log(net.a(x) ** 2))

    return Net(run, a=conv(3, 8), head=conv(8, 4)), image()


@exact
def log1p_of_pruned():
    return around(lambda net, x: torch.log1p(x))


@frozen("0 / 0 is not a number")
def quotient_of_pruned():
    def run(net, x):
        return net.head(net.a(x) / net.b(x))

    return Net(run, a=conv(3, 8), b=conv(3, 8), head=conv(8, 4)), image()


@exact
def quotient_of_positive():
    """0 / 0.5: the denominator is behind a sigmoid."""

    def run(net, x):
        return net.head(net.a(x) / torch.sigmoid(net.b(x)))

    return Net(run, a=conv(3, 8), b=conv(3, 8), head=conv(8, 4)), image()


@frozen("1 / sqrt(0) is infinite, and infinite * 0 is not a number")
def rsqrt_of_pruned():
    def run(net, x):
        x = net.a(x)
        return net.head(torch.rsqrt(x * x))

    return Net(run, a=conv(3, 8), head=conv(8, 4)), image()


# --- weights that are computed


@exact
def weight_norm_of_consumer():
    """|v| runs over the inputs: a sum, without a divisor."""

    def run(net, x):
        return net.head(F.relu(net.a(x)))

    return Net(run, a=conv(3, 8), head=parametrizations.weight_norm(conv(8, 4))), image()


@lawful
def spectral_norm():
    def run(net, x):
        return net.head(F.relu(net.a(x)))

    return Net(run, a=parametrizations.spectral_norm(conv(3, 8)), head=conv(8, 4)), image()


@exact
def weight_standardisation():
    """The mean and deviation of a filter over its inputs, the pruned zeros included.

    A pruned input then has the weight -mean / deviation, which is not zero; but its activation is.
    """

    def run(net, x):
        x = F.relu(net.a(x))
        weight = net.weight
        mean = weight.mean(dim=(1, 2, 3), keepdim=True)
        variance = weight.var(dim=(1, 2, 3), keepdim=True, correction=0)
        return F.conv2d(x, (weight - mean) * torch.rsqrt(variance + 1e-5), padding=1)

    return Net(run, a=conv(3, 8), weight=parameter(4, 8, 3, 3)), image()


@lawful
def weight_standardisation_after_sigmoid():
    """Here the activation is 0.5 where the weight is -mean / deviation."""

    def run(net, x):
        x = torch.sigmoid(net.a(x))
        weight = net.weight - net.weight.mean(dim=1, keepdim=True)
        return F.linear(x[:, :, 0, 0], weight)

    return Net(run, a=conv(3, 8), weight=parameter(4, 8)), image()


@exact
def cosine_classifier():
    def run(net, x):
        x = F.relu(net.a(x)).mean(dim=(2, 3))
        return F.linear(F.normalize(x, dim=1), F.normalize(net.weight, dim=1))

    return Net(run, a=conv(3, 8), weight=parameter(5, 8)), image()


@exact
def low_rank_update():
    """LoRA, added to the weight: its rank goes alone, its ends go with the channels."""

    def run(net, x):
        x = F.linear(net.stem(x), net.base.weight + net.up.weight @ net.down.weight)
        return net.head(F.gelu(x))

    return Net(
        run,
        stem=nn.Linear(6, 8),
        base=nn.Linear(8, 12, bias=False),
        down=nn.Linear(8, 4, bias=False),
        up=nn.Linear(4, 12, bias=False),
        head=nn.Linear(12, 4),
    ), tokens()


@exact
def transposed_weight():
    """An autoencoder whose decoder is the transposed encoder."""

    def run(net, x):
        return F.linear(F.gelu(net.encode(x)), net.encode.weight.t())

    return Net(run, encode=nn.Linear(6, 8)), tokens()


@exact
def mixed_weights():
    """Branches weighted by a softmax over them, as an architecture search does."""

    def run(net, x):
        shares = net.shares.softmax(0)
        return net.head(F.relu(shares[0] * net.a(x) + shares[1] * net.b(x)))

    return Net(run, a=conv(3, 8), b=conv(3, 8), shares=parameter(2), head=conv(8, 4)), image()


@lawful
def generated_kernel():
    """A depthwise kernel for every image, computed from it."""

    def run(net, x):
        x = F.relu(net.a(x))
        kernel = net.kernel(x.mean(dim=(2, 3))).view(16, 1, 3, 3)
        x = F.conv2d(x.reshape(1, 16, 8, 8), kernel, padding=1, groups=16)
        return net.head(x.view(2, 8, 8, 8))

    return Net(run, a=conv(3, 8), kernel=nn.Linear(8, 72), head=conv(8, 4)), image()


@exact
def bilinear():
    def run(net, x):
        return net.head(net.form(net.a(x), net.b(x)))

    return Net(
        run,
        a=nn.Linear(6, 8),
        b=nn.Linear(6, 5),
        form=nn.Bilinear(8, 5, 7),
        head=nn.Linear(7, 4),
    ), tokens()


@exact
def embedding_bag():
    def run(net, x):
        return net.head(F.gelu(net.embed(x)))

    return Net(run, embed=nn.EmbeddingBag(11, 8), head=nn.Linear(8, 4)), ids()


# --- numbers that depend on a width


@exact
def scale_by_shape():
    """The user's own class, with fewer channels, would run and divide by another number."""
    return around(lambda net, x: x * x.shape[1] ** -0.5)


@exact
def mean_by_shape():
    return around(lambda net, x: x * (x.sum(dim=1, keepdim=True) / x.shape[1]))


@exact
def numbered_channels():
    """A constant that grows with the channel's number: what is kept keeps its own."""
    return around(lambda net, x: x * torch.arange(1.0, 9.0, dtype=x.dtype).view(1, -1, 1, 1))


@exact
def constant_tensor():
    """A tensor the module holds as a plain attribute, neither parameter nor buffer."""
    net, inputs = around(lambda net, x: x * net.table.to(x.dtype))
    object.__setattr__(net, "table", torch.linspace(0.5, 1.5, 8).view(1, 8, 1, 1))
    return net, inputs


@exact
def constant_indices():
    """A list in the source: the second use of channel 2 is another input of the head."""

    def run(net, x):
        return net.head(F.relu(net.a(x))[:, [2, 0, 5, 2]])

    return Net(run, a=conv(3, 8), head=conv(4, 4)), image()


@exact
def width_in_a_view():
    def run(net, x):
        return net.head(F.max_pool2d(F.relu(net.a(x)), 2).view(-1, 8 * 16))

    return Net(run, a=conv(3, 8), head=nn.Linear(128, 4)), image()


@exact
def channels_in_the_batch():
    """One filter for every channel, with channels moved into the batch and back."""

    def middle(net, x):
        n, c, h, w = x.shape
        return net.one(x.view(n * c, 1, h, w)).view(n, c, h, w)

    return around(middle, one=conv(1, 1))


@exact
def tokens_in_the_batch():
    return among(
        lambda net, x: F.gelu(net.mlp(x.reshape(-1, 12))).view(2, 5, 12), mlp=nn.Linear(12, 12)
    )


@exact
def token_mixing():
    """A linear layer over tokens passes channels by, as in a mixer."""
    return among(lambda net, x: x + net.mix(x.transpose(1, 2)).transpose(1, 2), mix=nn.Linear(5, 5))


@exact
def stacked_neighbours():
    """Every channel is added to its neighbour, by a stack that is taken for channels again."""

    def middle(net, x):
        return x + torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).reshape(x.shape)

    return among(middle)


@exact
def stacked_table():
    """Sines and cosines in turns, as in a table of positions."""

    def middle(net, x):
        angles = torch.outer(net.times, net.frequencies)
        return x + torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)

    return among(middle, times=torch.arange(5.0), frequencies=torch.linspace(0.1, 1.0, 6))


@exact
def windows():
    """Images cut into windows: every reshape has the channels as its last axis."""

    def middle(net, x):
        x = x.permute(0, 2, 3, 1).view(2, 2, 4, 2, 4, 8).transpose(2, 3).reshape(8, 16, 8)
        x = x + net.inner(x)
        x = x.view(2, 2, 2, 4, 4, 8).transpose(2, 3).reshape(2, 8, 8, 8)
        return x.permute(0, 3, 1, 2)

    return around(middle, inner=nn.Linear(8, 8))


@exact
def outer_product():
    def run(net, x):
        a, b = F.gelu(net.a(x)), F.gelu(net.b(x))
        return net.head((a.unsqueeze(-1) * b.unsqueeze(-2)).flatten(2))

    return Net(run, a=nn.Linear(6, 4), b=nn.Linear(6, 5), head=nn.Linear(20, 4)), tokens()


@frozen("a rotation added to the original couples every channel with the next: all or nothing")
def roll_and_residual():
    return around(lambda net, x: x + x.roll(1, dims=1))


@exact
def temporal_shift():
    """Some channels come from the step before, some from the one after, the rest stay."""

    def middle(net, x):
        past = F.pad(x[:, :-1, :4], (0, 0, 1, 0))
        future = F.pad(x[:, 1:, 4:8], (0, 0, 0, 1))
        return x + net.mix(torch.cat([past, future, x[:, :, 8:]], dim=-1))

    return among(middle, mix=nn.Linear(12, 12))


@exact
def concat_with_input():
    def run(net, x):
        return net.head(torch.cat([x, F.relu(net.a(x))], dim=1))

    return Net(run, a=conv(3, 8), head=conv(11, 4)), image()


@exact
def part_of_a_residual():
    """Only the first four channels are added to: they have another producer than the rest."""

    def middle(net, x):
        return torch.cat([x[:, :4] + net.b(x), x[:, 4:]], dim=1)

    return around(middle, b=conv(8, 4))


@exact
def assigned_part():
    def middle(net, x):
        x = x.clone()
        x[:, 2:5] = x[:, 2:5] * 2.0
        return x

    return around(middle)


@lawful
def unused_layer():
    """What nobody reads may go or stay."""

    def middle(net, x):
        net.unused(x)
        return x

    return around(middle, unused=conv(8, 6))


@exact
def dictionary_of_outputs():
    def run(net, x):
        x = F.relu(net.a(x))
        return {"image": net.head(x), "none": None, "more": [net.other(x)]}

    return Net(run, a=conv(3, 8), head=conv(8, 4), other=conv(8, 5)), image()


@exact
def loss_as_output():
    def run(net, x, labels):
        return F.cross_entropy(net.head(F.gelu(net.stem(x))).flatten(0, 1), labels.flatten())

    return Net(run, stem=nn.Linear(6, 8), head=nn.Linear(8, 11)), (*tokens(), *ids())


# --- layers the patterns leave out


@exact
def conv1d_and_conv3d():
    def run(net, x, video):
        x = F.relu(net.norm1(net.a(x)))
        video = F.relu(net.norm3(net.b(video)))
        return net.head(x), net.other(video)

    return Net(
        run,
        a=nn.Conv1d(3, 8, 3, padding=1),
        norm1=nn.BatchNorm1d(8),
        head=nn.Conv1d(8, 4, 3),
        b=nn.Conv3d(3, 6, 3, padding=1),
        norm3=nn.BatchNorm3d(6),
        other=nn.Conv3d(6, 4, 1),
    ), (random(2, 3, 9), random(2, 3, 4, 5, 6))


@exact
def resampled():
    def middle(net, x):
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        x = F.adaptive_max_pool2d(F.avg_pool2d(x, 2), 4)
        return F.interpolate(F.pad(x, (1, 1, 1, 1), mode="reflect"), size=(5, 7))

    return around(middle)


@lawful
def sampled_at_points():
    def run(net, x):
        x = F.relu(net.a(x))
        grid = torch.tanh(net.offsets(x)).permute(0, 2, 3, 1)
        return net.head(F.grid_sample(x, grid, align_corners=False))

    return Net(run, a=conv(3, 8), offsets=conv(8, 2), head=conv(8, 4)), image()


@exact
def padded_by_a_value():
    """Padding is outside of the channels: it is multiplied by what the head has for them."""
    return around(lambda net, x: F.pad(x, (1, 1, 1, 1), value=1.5))


@exact
def lstm_of_two_layers_both_ways():
    def run(net, x):
        return net.head(net.rnn(x)[0])

    rnn = nn.LSTM(6, 5, num_layers=2, bidirectional=True, batch_first=True)
    return Net(run, rnn=rnn, head=nn.Linear(10, 4)), tokens()


@exact
def rnn_cells():
    def run(net, x):
        state = x.new_zeros(x.shape[0], 8)
        for step in range(3):
            state = net.cell(x[:, step], state)
        return net.head(state)

    return Net(run, cell=nn.GRUCell(6, 8), head=nn.Linear(8, 4)), tokens()


@exact
def encoder_layer():
    def run(net, x):
        return net.head(net.layer(net.stem(x)))

    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
    return Net(run, stem=nn.Linear(6, 16), layer=layer, head=nn.Linear(16, 4)), tokens()


@exact
def decoder_layer():
    def run(net, x, memory):
        return net.head(net.layer(net.stem(x), net.other(memory)))

    layer = nn.TransformerDecoderLayer(16, 4, 24, batch_first=True, norm_first=True)
    return Net(
        run, stem=nn.Linear(6, 16), other=nn.Linear(5, 16), layer=layer, head=nn.Linear(16, 4)
    ), (*tokens(), random(2, 7, 5, seed=2))


@lawful
def gathered_tokens():
    """The same tokens of every channel, by an index as wide as the channels."""

    def middle(net, x):
        return x.gather(1, net.order.view(1, 3, 1).expand(2, 3, 12))

    return among(middle, order=torch.tensor([4, 0, 2]))


@lawful
def written_tokens():
    def middle(net, x):
        x = x.clone()
        x[:, net.order] = net.token.expand(2, 2, 12)
        return x

    return among(middle, order=torch.tensor([3, 1]), token=parameter(1, 1, 12))


# --- attention


def attention(mix, width=16, **parts):
    """A block around ``mix(net, query, key, value)``, with queries of four heads."""

    def run(net, x):
        x = net.stem(x)
        attended = mix(net, _heads(net.query(x), 4), net.key(x), net.value(x))
        return net.head(x + net.out(_joined(attended)))

    return Net(
        run,
        stem=nn.Linear(6, 16),
        query=nn.Linear(16, 16),
        key=nn.Linear(16, width),
        value=nn.Linear(16, width),
        out=nn.Linear(16, 16),
        head=nn.Linear(16, 4),
        **parts,
    ), tokens()


@exact
def attention_one_key():
    """All query heads share one key: its positions are those of every head."""

    def mix(net, query, key, value):
        return F.scaled_dot_product_attention(
            query, key.unsqueeze(1).expand(-1, 4, -1, -1), value.unsqueeze(1).expand(-1, 4, -1, -1)
        )

    return attention(mix, width=4)


@exact
def attention_relative_bias():
    """A table with a column for every head, added to the scores."""

    def mix(net, query, key, value):
        distance = torch.arange(5).view(5, 1) - torch.arange(5) + 4
        bias = net.table(distance).permute(2, 0, 1)
        scores = query @ _heads(key, 4).transpose(-2, -1) / 2 + bias
        return scores.softmax(-1) @ _heads(value, 4)

    return attention(mix, table=nn.Embedding(9, 4))


@exact
def attention_slopes():
    """ALiBi: a constant of its own for every head."""

    def mix(net, query, key, value):
        slopes = 2.0 ** -torch.arange(1.0, 5.0, dtype=query.dtype).view(4, 1, 1)
        distance = torch.arange(5).view(5, 1) - torch.arange(5)
        scores = query @ _heads(key, 4).transpose(-2, -1) / 2 - slopes * distance.abs()
        return scores.softmax(-1) @ _heads(value, 4)

    return attention(mix)


@exact
def attention_normed_queries():
    """A norm over the positions of a head, with the divisor of the whole head."""

    def mix(net, query, key, value):
        return F.scaled_dot_product_attention(
            net.norm_query(query), net.norm_key(_heads(key, 4)), _heads(value, 4)
        )

    return attention(mix, norm_query=nn.RMSNorm(4), norm_key=nn.RMSNorm(4))


@exact
def attention_talking_heads():
    """Scores of all heads are mixed by a matrix: heads are its rows and its columns."""

    def mix(net, query, key, value):
        scores = query @ _heads(key, 4).transpose(-2, -1) / 2
        scores = net.mixed(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return scores.softmax(-1) @ _heads(value, 4)

    return attention(mix, mixed=nn.Linear(4, 4))


@exact
def attention_over_channels():
    """XCiT: a softmax over the keys' positions, which stay; queries' positions and heads may go."""

    def mix(net, query, key, value):
        query, key, value = (x.transpose(-2, -1) for x in (query, _heads(key, 4), _heads(value, 4)))
        scores = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).transpose(-2, -1)
        return (scores.softmax(-1) @ value).transpose(-2, -1)

    return attention(mix)


@exact
def attention_linear():
    """A kernel of elu + 1, which is 1 where a position is pruned, summed over positions."""

    def mix(net, query, key, value):
        query, key = F.elu(query) + 1, F.elu(_heads(key, 4)) + 1
        summary = key.transpose(-2, -1) @ _heads(value, 4)
        total = query @ key.sum(dim=2, keepdim=True).transpose(-2, -1)
        return query @ summary / total

    return attention(mix)


@exact
def attention_interleaved_qkv():
    """As in GPT-NeoX: for every head its query, key and value side by side."""

    def run(net, x):
        x = net.stem(x)
        query, key, value = net.qkv(x).view(2, 5, 4, 12).transpose(1, 2).chunk(3, dim=-1)
        attended = F.scaled_dot_product_attention(query, key, value)
        return net.head(x + net.out(_joined(attended)))

    return Net(
        run,
        stem=nn.Linear(6, 16),
        qkv=nn.Linear(16, 48),
        out=nn.Linear(16, 16),
        head=nn.Linear(16, 4),
    ), tokens()


@exact
def rope_neighbours():
    """Rotated positions are neighbours: even and odd ones, stacked and flattened."""

    def rotated(x, angles):
        even, odd = x[..., ::2], x[..., 1::2]
        both = even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos()
        return torch.stack(both, dim=-1).flatten(-2)

    def mix(net, query, key, value):
        angles = torch.outer(torch.arange(5, dtype=query.dtype), net.frequencies)
        query, key = (rotated(x, angles) for x in (query, _heads(key, 4)))
        return F.scaled_dot_product_attention(query, key, _heads(value, 4))

    return attention(mix, frequencies=10.0 ** -torch.linspace(0, 1, 2))


@lawful
def rope_of_complex_numbers():
    def mix(net, query, key, value):
        angles = torch.outer(torch.arange(5, dtype=query.dtype), net.frequencies)
        turn = torch.polar(torch.ones_like(angles), angles)
        query, key = (
            torch.view_as_real(
                torch.view_as_complex(x.reshape(*x.shape[:-1], 2, 2)) * turn
            ).flatten(-2)
            for x in (query, _heads(key, 4))
        )
        return F.scaled_dot_product_attention(query, key, _heads(value, 4))

    return attention(mix, frequencies=10.0 ** -torch.linspace(0, 1, 2))


@exact
def learnt_queries():
    """Perceiver's: the queries are parameters, the same for every image."""

    def run(net, x):
        x = net.stem(x)
        query = net.query(net.latents).expand(2, -1, -1)
        attended = F.scaled_dot_product_attention(
            _heads(query, 2), _heads(net.key(x), 2), _heads(net.value(x), 2)
        )
        return net.head(_joined(attended))

    return Net(
        run,
        stem=nn.Linear(6, 8),
        latents=parameter(1, 3, 10),
        query=nn.Linear(10, 8),
        key=nn.Linear(8, 8),
        value=nn.Linear(8, 12),
        head=nn.Linear(12, 4),
    ), tokens()


# --- experts


@exact
def all_experts():
    """Every expert runs on every token; the stacked weights may lose equally many units each."""

    def run(net, x):
        x = net.stem(x)
        gate = net.gate(x).softmax(dim=-1)
        hidden = F.gelu(torch.einsum("btd,edh->bteh", x, net.up))
        return net.head(torch.einsum("bteh,ehd,bte->btd", hidden, net.down, gate))

    return Net(
        run,
        stem=nn.Linear(6, 8),
        gate=nn.Linear(8, 3),
        up=parameter(3, 8, 12),
        down=parameter(3, 12, 8),
        head=nn.Linear(8, 4),
    ), tokens()


@exact
def chosen_experts():
    """Two of three for every token. Which two follows from numbers that pruning leaves as they are.

    Experts themselves stay, since a choice among fewer is another one; their hidden units can go.
    """

    def run(net, x):
        x = net.stem(x).flatten(0, 1)
        weight, chosen = net.gate(x).softmax(dim=-1).topk(2, dim=-1)
        share = torch.zeros(10, 3, dtype=x.dtype).scatter(1, chosen, weight)
        y = sum(share[:, i : i + 1] * net.down[i](F.gelu(net.up[i](x))) for i in range(3))
        return net.head(y).view(2, 5, 4)

    return Net(
        run,
        stem=nn.Linear(6, 8),
        gate=nn.Linear(8, 3),
        up=nn.ModuleList([nn.Linear(8, 12) for _ in range(3)]),
        down=nn.ModuleList([nn.Linear(12, 8) for _ in range(3)]),
        head=nn.Linear(8, 4),
    ), tokens()


@lawful
def cumsum_after_sigmoid():
    """Every pruned channel adds 0.5 to all that come after it."""
    return around(lambda net, x: torch.sigmoid(x).cumsum(dim=1))


@lawful
def norm_of_cumsum():
    """Behind a sum over those before it a pruned channel is not zero, and the norm sees it."""
    return around(lambda net, x: net.norm(x.cumsum(dim=1)), norm=nn.GroupNorm(1, 8))


@exact
def causal_sums_over_time():
    """A recurrence written as a cumulative sum over time, for every channel alone."""
    return among(
        lambda net, x: (x * torch.sigmoid(net.decay(x))).cumsum(dim=1), decay=nn.Linear(12, 12)
    )


@lawful
def mean_of_rounded():
    """Booleans, integers and half precision are not what real numbers would be."""

    def mean(_, x):
        true = (x + 1.7).bool().to(x.dtype)
        inverted = (~(x * x >= 0).long()).to(x.dtype)
        coarse = (x.half() + 0.1).to(x.dtype)
        down = torch.div(torch.sigmoid(x) * 5, torch.sigmoid(x) + 1, rounding_mode="trunc")
        return x * (true + inverted + coarse + down).mean(dim=-1, keepdim=True)

    return among(mean)


@lawful
def gate_that_is_shut():
    """The gate of a pruned channel is a very negative number."""
    return among(lambda net, x: F.glu(torch.cat([x, x.masked_fill(x == 0, -1e9)], dim=-1)))


@exact
def tokens_that_are_chosen():
    """As in masked autoencoders: how many there are depends on the data."""

    def run(net, x):
        return net.head(F.relu(net.stem(x[x[..., 0] > 0])))

    return Net(run, stem=nn.Linear(6, 12), head=nn.Linear(12, 4)), tokens()


@exact
def layernorm_by_hand():
    """As in ConvNeXt: the variance of what is left when the mean is taken off."""

    def norm(net, x):
        x = x - x.mean(dim=1, keepdim=True)
        return x / torch.sqrt(x.pow(2).mean(dim=1, keepdim=True) + 1e-6) * net.scale

    return around(norm, scale=parameter(8, 1, 1))


TRAPS: tuple[Pattern, ...] = tuple(_table.found)
