"""Small torch modules, one way of wiring channels each, and what pruning them must give.

Eighty patterns, of which other tools get many wrong, checked for equivalence: the
model whose pruned units are zero in every slice they own, and the model from which they were
removed, with the original divisors of means and norms kept, give the same outputs.

    model, inputs = pattern.build()
    fill(model, seed=0)

``expect`` is ``"exact"``: there is something to prune, and the equivalence holds for all of it; or
``"frozen: <reason>"``: nothing can be removed, and a tool that removes something computes
something else. A pattern is exact as soon as *some* of its channels can go; ``why`` says which,
where that needs thought. (``torch_traps`` has a third kind, ``"lawful"``: whatever goes, and be it
nothing, the equivalence holds.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations


class Pattern(NamedTuple):
    """One way of wiring channels, as a function that builds the smallest model that has it."""

    name: str
    build: Callable[[], tuple[nn.Module, tuple[Any, ...]]]
    expect: str
    why: str = ""


class Net(nn.Module):
    """The named parts, and a forward pass that is given as a function of the module itself.

    A copy of the model therefore runs on its own parts. Whatever is no module, parameter or tensor
    becomes a plain attribute, such as a width or a number of heads; a tensor becomes a buffer.
    """

    def __init__(self, run: Callable[..., Any], **parts: Any):
        super().__init__()
        self.run = run
        for name, part in parts.items():
            if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *inputs):
        return self.run(self, *inputs)


# --- values


def fill(model: nn.Module, seed: int) -> nn.Module:
    """Returns the model with other values in every parameter and statistic, all of them distinct.

    Weights are N(0, 1 / fan in), so that signals keep their size; scales of norms U(0.5, 1.5);
    biases and running means N(0, 0.3); running variances U(0.5, 1.5). Right couplings then differ
    by rounding and wrong ones by percents, with no tolerance to tune. Values are drawn in float64
    and rounded to the dtype of the parameter. Buffers that are no statistic (indices, masks,
    frequencies) are part of what the model computes, and stay.
    """
    generator = torch.Generator().manual_seed(seed)
    owners = {
        f"{path}.{name}" if path else name: module
        for path, module in model.named_modules()
        for name in (*module._parameters, *module._buffers)
    }
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            values = _values(name.rpartition(".")[2], tensor, owners[name], generator)
            if values is not None:
                tensor.copy_(values)
    return model


def _values(
    name: str, tensor: torch.Tensor, owner: nn.Module, generator: torch.Generator
) -> torch.Tensor | None:
    def normal(deviation: float) -> torch.Tensor:
        return deviation * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)

    if not tensor.is_floating_point():
        return None
    if not isinstance(tensor, nn.Parameter) and name not in _STATISTICS:
        return None
    vector = sum(size > 1 for size in tensor.shape) <= 1
    if vector and any(part in name for part in ("bias", "beta", "mean", "token")):
        return normal(0.3)
    if vector:
        return 0.5 + torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
    if isinstance(owner, nn.Embedding | nn.EmbeddingBag):
        return normal(1.0)
    if tensor.shape[0] == 1 or "bias" in name:  # a table that is added: positions, relative biases
        return normal(0.3)
    return normal(1 / math.sqrt(_fan_in(tensor, owner)))


_STATISTICS = ("running_mean", "running_var", "weight", "bias")  # the last two: frozen batch norms


def _fan_in(weight: torch.Tensor, owner: nn.Module) -> float:
    if isinstance(owner, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        taps = math.prod(weight.shape[2:]) / math.prod(owner.stride)
        return weight.shape[0] / owner.groups * max(1.0, taps)
    if type(owner).__name__ == "Conv1D":  # of GPT-2: a linear layer stored (in, out)
        return weight.shape[0]
    if "Conv" in type(owner).__name__ or weight.ndim > 3:
        return weight.numel() / weight.shape[0]
    return weight.shape[-1]  # (out, in), or a stack of such


def cast(model: nn.Module, inputs: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, Any]:
    """Returns the model and its inputs with every floating-point tensor in the given dtype."""

    def to(x: Any) -> Any:
        return x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    return model.to(dtype), tuple(to(x) for x in inputs)


# --- parts


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def image(channels: int = 3, size: int = 8) -> tuple[torch.Tensor]:
    return (random(2, channels, size, size),)


def tokens(width: int = 6, length: int = 5) -> tuple[torch.Tensor]:
    return (random(2, length, width),)


def ids(vocabulary: int = 11, length: int = 5) -> tuple[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (torch.randint(0, vocabulary, (2, length), generator=generator),)


def conv(channels_in: int, channels_out: int, kernel: int = 3, **kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, kernel, padding=kernel // 2, **kwargs)


def parameter(*shape: int, requires_grad: bool = True) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape), requires_grad=requires_grad)


class Table:
    """Collects patterns; its methods are decorators of functions that build them."""

    def __init__(self) -> None:
        self.found: list[Pattern] = []

    def exact(self, build: Callable[[], Any]) -> Callable[[], Any]:
        self._add(build, "exact")
        return build

    def frozen(self, reason: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
        def add(build: Callable[[], Any]) -> Callable[[], Any]:
            self._add(build, f"frozen: {reason}")
            return build

        return add

    def lawful(self, build: Callable[[], Any]) -> Callable[[], Any]:
        self._add(build, "lawful")
        return build

    def _add(self, build: Callable[[], Any], expect: str) -> None:
        def evaluated() -> tuple[nn.Module, tuple[Any, ...]]:
            model, inputs = build()
            return model.eval(), inputs

        why = " ".join((build.__doc__ or "").split())
        self.found.append(Pattern(build.__name__, evaluated, expect, why))


_table = Table()
exact, frozen = _table.exact, _table.frozen

# --- chains, sums, concatenations


@exact
def chain_bn():
    def run(net, x):
        x = F.relu(net.bn_a(net.a(x)))
        return net.head(F.relu(net.bn_b(net.b(x))))

    return Net(
        run,
        a=conv(3, 8, bias=False),
        bn_a=nn.BatchNorm2d(8),
        b=conv(8, 12),
        bn_b=nn.BatchNorm2d(12),
        head=conv(12, 4),
    ), image()


@exact
def residual():
    def run(net, x):
        x = F.relu(net.bn(net.a(x)))
        return net.head(F.relu(x + net.c(F.relu(net.b(x)))))

    return Net(
        run, a=conv(3, 8), bn=nn.BatchNorm2d(8), b=conv(8, 6), c=conv(6, 8), head=conv(8, 4)
    ), image()


@exact
def concat():
    def run(net, x):
        return net.head(torch.cat([F.relu(net.a(x)), F.relu(net.b(x))], dim=1))

    return Net(run, a=conv(3, 8), b=conv(3, 4), head=conv(12, 4)), image()


@exact
def concat_same_twice():
    def run(net, x):
        x = F.relu(net.a(x))
        return net.head(torch.cat([x, x], dim=1))

    return Net(run, a=conv(3, 8), head=conv(16, 4)), image()


@exact
def concat_last_dim_tokens():
    def run(net, x):
        return net.head(torch.cat([F.gelu(net.a(x)), F.gelu(net.b(x))], dim=-1))

    return Net(run, a=nn.Linear(6, 8), b=nn.Linear(6, 4), head=nn.Linear(12, 4)), tokens()


@exact
def concat_dim2_tokens():
    def run(net, x):
        return net.head(torch.cat([F.gelu(net.a(x)), F.gelu(net.b(x))], dim=2))

    return Net(run, a=nn.Linear(6, 8), b=nn.Linear(6, 4), head=nn.Linear(12, 4)), tokens()


@exact
def concat_tokens_axis1():
    """A class token in front of the sequence: its channels go with those of the stem."""

    def run(net, x):
        x = net.stem(x)
        x = torch.cat([net.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        return net.head(F.gelu(x))

    return Net(
        run, stem=nn.Linear(6, 8), cls_token=parameter(1, 1, 8), head=nn.Linear(8, 4)
    ), tokens()


@exact
def stack_sum():
    def run(net, x):
        return net.head(torch.stack([F.relu(net.a(x)), F.relu(net.b(x))]).sum(dim=0))

    return Net(run, a=conv(3, 8), b=conv(3, 8), head=conv(8, 4)), image()


@exact
def unbind_stack():
    """Two halves as an axis of their own, taken apart again: channel c and c + 8 are coupled."""

    def run(net, x):
        x = F.relu(net.a(x))
        first, second = torch.stack(x.chunk(2, dim=1), dim=1).unbind(dim=1)
        return net.head(first * torch.sigmoid(second))

    return Net(run, a=conv(3, 16), head=conv(8, 4)), image()


@exact
def zero_pad_channels_residual():
    """PyramidNet's shortcut: padded channels belong to the wider branch only."""

    def run(net, x):
        x = F.relu(net.a(x))
        return net.head(F.relu(net.b(x) + F.pad(x, (0, 0, 0, 0, 2, 2))))

    return Net(run, a=conv(3, 8), b=conv(8, 12), head=conv(12, 4)), image()


@frozen("its only hidden channels are added to the input")
def residual_with_input():
    def run(net, x):
        return net.head(F.relu(x + net.a(x)))

    return Net(run, a=conv(6, 6), head=conv(6, 4)), image(6)


@exact
def two_outputs():
    def run(net, x):
        x = F.relu(net.a(x))
        return net.head(x), net.classes(x.mean(dim=(2, 3)))

    return Net(run, a=conv(3, 8), head=conv(8, 4), classes=nn.Linear(8, 5)), image()


@frozen("the only hidden activation is an output as well")
def returns_hidden():
    def run(net, x):
        x = F.relu(net.a(x))
        return net.head(x), x

    return Net(run, a=conv(3, 8), head=conv(8, 4)), image()


@exact
def shared_module():
    """One convolution used twice: its inputs are its outputs."""

    def run(net, x):
        x = F.relu(net.a(x))
        return net.head(F.relu(net.shared(F.relu(net.shared(x)))))

    return Net(run, a=conv(3, 8), shared=conv(8, 8), head=conv(8, 4)), image()


@exact
def frozen_first_layer():
    """Frozen for the optimizer, not for pruning: ``requires_grad`` must stay as it is."""

    def run(net, x):
        return net.head(F.relu(net.b(F.relu(net.a(x)))))

    return Net(run, a=conv(3, 8).requires_grad_(False), b=conv(8, 8), head=conv(8, 4)), image()


@exact
def detach_branch():
    def run(net, x):
        x = F.relu(net.a(x))
        return net.head(x * torch.sigmoid(net.gate(x.detach())))

    return Net(run, a=conv(3, 8), gate=conv(8, 8, 1), head=conv(8, 4)), image()


@exact
def no_grad_branch():
    def run(net, x):
        x = F.relu(net.a(x))
        with torch.no_grad():
            gate = torch.sigmoid(net.gate(x))
        return net.head(x * gate)

    return Net(run, a=conv(3, 8), gate=conv(8, 8, 1), head=conv(8, 4)), image()


# --- parts of an axis


@exact
def chunk_dim1():
    def run(net, x):
        first, second = F.relu(net.a(x)).chunk(2, dim=1)
        return net.head(first) + net.other(second)

    return Net(run, a=conv(3, 12), head=conv(6, 4), other=conv(6, 4)), image()


@exact
def chunk_last_dim_GLU():
    def run(net, x):
        value, gate = net.a(x).chunk(2, dim=-1)
        return net.head(value * F.silu(gate))

    return Net(run, a=nn.Linear(6, 16), head=nn.Linear(8, 4)), tokens()


@exact
def F_glu():
    def run(net, x):
        return net.head(F.glu(net.a(x), dim=1))

    return Net(run, a=conv(3, 16), head=conv(8, 4)), image()


@exact
def split_unequal():
    def run(net, x):
        few, many = torch.split(F.relu(net.a(x)), [4, 8], dim=1)
        return net.head(few) + net.other(many)

    return Net(run, a=conv(3, 12), head=conv(4, 4), other=conv(8, 4)), image()


@exact
def slice_half():
    """The second half of the channels is computed and never used: it can go as well."""

    def run(net, x):
        return net.head(F.relu(net.a(x))[:, :6])

    return Net(run, a=conv(3, 12), head=conv(6, 4)), image()


@exact
def slice_step2():
    def run(net, x):
        x = F.relu(net.a(x))
        return net.head(x[:, ::2] + x[:, 1::2])

    return Net(run, a=conv(3, 12), head=conv(6, 4)), image()


@exact
def channel_index_select():
    """A permutation held by a buffer, as in CondenseNet: it must be renumbered."""

    def run(net, x):
        return net.head(torch.index_select(F.relu(net.a(x)), 1, net.index))

    index = torch.tensor([3, 0, 5, 1, 7, 2, 6, 4])
    return Net(run, a=conv(3, 8), index=index, head=conv(8, 4)), image()


@exact
def channel_flip():
    """Added to the original, so that channels c and 7 - c are coupled."""

    def run(net, x):
        x = F.relu(net.a(x))
        return net.head(x + x.flip(1))

    return Net(run, a=conv(3, 8), head=conv(8, 4)), image()


@exact
def channel_roll():
    """A rotation is a permutation, so channel c of ``a`` is channel c + 3 of ``head``.

    The smaller model rotates by another distance: by as many channels as are kept among the last
    three. A tool without that rule may freeze the axis, which is safe and counts as not exact.
    """

    def run(net, x):
        return net.head(F.relu(net.a(x)).roll(3, dims=1))

    return Net(run, a=conv(3, 8), head=conv(8, 4)), image()


@exact
def repeat_channels():
    def run(net, x):
        return net.head(F.relu(net.a(x)).repeat(1, 2, 1, 1))

    return Net(run, a=conv(3, 8), head=conv(16, 4)), image()


@exact
def repeat_interleave_channels():
    def run(net, x):
        return net.head(F.relu(net.a(x)).repeat_interleave(2, dim=1))

    return Net(run, a=conv(3, 8), head=conv(16, 4)), image()


@exact
def inplace_copy_slices():
    """A concatenation by assignment, which the exported graph shows as copies into slices.

    Channels of ``a`` and ``b`` keep their places, and the tensor of zeros is as long as what is
    kept of both. Freezing it is safe, but it is nothing but ``concat``.
    """

    def run(net, x):
        a, b = F.relu(net.a(x)), F.relu(net.b(x))
        both = x.new_zeros(x.shape[0], 12, *x.shape[2:])
        both[:, :8] = a
        both[:, 8:] = b
        return net.head(both)

    return Net(run, a=conv(3, 8), b=conv(3, 4), head=conv(12, 4)), image()


# --- reshapes and permutations


@exact
def flatten_linear():
    def run(net, x):
        x = F.max_pool2d(F.relu(net.a(x)), 2)
        return net.head(torch.flatten(x, 1))

    return Net(run, a=conv(3, 8), head=nn.Linear(8 * 16, 4)), image()


@exact
def flatten_channels_last():
    """Here a channel is every eighth input of the linear layer, not a run of sixteen."""

    def run(net, x):
        x = F.max_pool2d(F.relu(net.a(x)), 2)
        return net.head(x.permute(0, 2, 3, 1).flatten(1))

    return Net(run, a=conv(3, 8), head=nn.Linear(16 * 8, 4)), image()


@exact
def flatten_1x1_spatial_gt1_conv1d():
    """One channel is one input of the linear layer where a 1x1 image is flattened, else five."""

    def run(net, x, sequence):
        x = F.adaptive_avg_pool2d(F.relu(net.a(x)), 1).flatten(1)
        sequence = F.relu(net.b(sequence)).flatten(1)
        return net.head(x) + net.other(sequence)

    return Net(
        run, a=conv(3, 8), b=nn.Conv1d(2, 6, 1), head=nn.Linear(8, 4), other=nn.Linear(30, 4)
    ), (*image(), random(2, 2, 5))


@exact
def global_pool_fc():
    def run(net, x):
        return net.head(net.pool(F.relu(net.a(x))).flatten(1))

    return Net(run, a=conv(3, 8), pool=nn.AdaptiveAvgPool2d(1), head=nn.Linear(8, 4)), image()


@exact
def linear_to_conv_view():
    def run(net, x):
        x = F.relu(net.a(x)).view(-1, 8, 2, 2)
        return net.head(x)

    return Net(run, a=nn.Linear(6, 32), head=conv(8, 4)), (random(2, 6),)


@exact
def channel_shuffle():
    def run(net, x):
        x = F.relu(net.a(x))
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return net.head(F.relu(net.b(x)))

    return Net(run, a=conv(3, 12), b=conv(12, 8, groups=2), head=conv(8, 4)), image()


@exact
def nn_ChannelShuffle():
    def run(net, x):
        return net.head(F.relu(net.b(net.shuffle(F.relu(net.a(x))))))

    return Net(
        run,
        a=conv(3, 12),
        shuffle=nn.ChannelShuffle(3),
        b=conv(12, 12, groups=3),
        head=conv(12, 4),
    ), image()


@exact
def pixel_shuffle():
    """Four neighbouring channels become one: they are coupled."""

    def run(net, x):
        return net.head(F.pixel_shuffle(F.relu(net.a(x)), 2))

    return Net(run, a=conv(3, 24), head=conv(6, 4)), image()


@exact
def pixel_unshuffle():
    def run(net, x):
        return net.head(F.pixel_unshuffle(F.relu(net.a(x)), 2))

    return Net(run, a=conv(3, 6), head=conv(24, 4)), image()


@exact
def unfold():
    def run(net, x):
        x = F.unfold(F.relu(net.a(x)), 3, padding=1)
        return net.head(x.transpose(1, 2))

    return Net(run, a=conv(3, 6), head=nn.Linear(54, 4)), image()


@exact
def patch_merging():
    """Swin's: four neighbours side by side, so a channel is four inputs of the norm behind it."""

    def run(net, x):
        x = net.a(x).permute(0, 2, 3, 1)
        corners = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
        return net.head(net.norm(torch.cat(corners, dim=-1)))

    return Net(run, a=conv(3, 6), norm=nn.LayerNorm(24), head=nn.Linear(24, 4, bias=False)), image()


@exact
def gram_matrix():
    """Both axes of the Gram matrix are the same channels: a row and a column go."""

    def run(net, x):
        x = F.relu(net.a(x)).flatten(2)
        return net.head((x @ x.transpose(1, 2) / x.shape[2]).flatten(1))

    return Net(run, a=conv(3, 6), head=nn.Linear(36, 4)), image()


@exact
def python_int_of_width():
    """The width as a Python number, in a view and as a divisor, which must stay what it was."""

    def run(net, x):
        x = F.relu(net.a(x))
        return net.head(x.view(-1, net.width, 64).sum(dim=2) / net.width)

    return Net(run, a=conv(3, 8), width=8, head=nn.Linear(8, 4)), image()


# --- convolutions


@exact
def depthwise():
    def run(net, x):
        x = F.relu6(net.bn(net.depthwise(F.relu6(net.a(x)))))
        return net.head(x)

    return Net(
        run, a=conv(3, 8), depthwise=conv(8, 8, groups=8), bn=nn.BatchNorm2d(8), head=conv(8, 4)
    ), image()


@exact
def depthwise_mult2():
    """Every channel becomes two neighbours, which go with it."""

    def run(net, x):
        return net.head(F.relu(net.depthwise(F.relu(net.a(x)))))

    return Net(run, a=conv(3, 6), depthwise=conv(6, 12, groups=6), head=conv(12, 4)), image()


@exact
def group_conv():
    """Whole groups go, or the same position inside of every group."""

    def run(net, x):
        return net.head(F.relu(net.grouped(F.relu(net.a(x)))))

    return Net(run, a=conv(3, 12), grouped=conv(12, 8, groups=4), head=conv(8, 4)), image()


@exact
def group_conv_two_different():
    def run(net, x):
        x = F.relu(net.two(F.relu(net.a(x))))
        return net.head(F.relu(net.four(x)))

    return Net(
        run,
        a=conv(3, 16),
        two=conv(16, 16, groups=2),
        four=conv(16, 16, groups=4),
        head=conv(16, 4),
    ), image()


@exact
def conv_transpose():
    def run(net, x):
        return net.head(F.relu(net.bn(net.up(F.relu(net.a(x))))))

    return Net(
        run,
        a=conv(3, 8),
        up=nn.ConvTranspose2d(8, 6, 2, stride=2),
        bn=nn.BatchNorm2d(6),
        head=conv(6, 4),
    ), image()


@exact
def conv_transpose_depthwise():
    def run(net, x):
        return net.head(F.relu(net.up(F.relu(net.a(x)))))

    return Net(
        run, a=conv(3, 8), up=nn.ConvTranspose2d(8, 8, 2, stride=2, groups=8), head=conv(8, 4)
    ), image()


@exact
def conv_transpose_grouped():
    def run(net, x):
        return net.head(F.relu(net.up(F.relu(net.a(x)))))

    return Net(
        run, a=conv(3, 8), up=nn.ConvTranspose2d(8, 12, 2, stride=2, groups=2), head=conv(12, 4)
    ), image()


@exact
def squeeze_excite():
    def run(net, x):
        x = F.relu(net.a(x))
        gate = F.relu(net.squeeze(F.adaptive_avg_pool2d(x, 1)))
        return net.head(x * torch.sigmoid(net.excite(gate)))

    return Net(
        run, a=conv(3, 12), squeeze=conv(12, 6, 1), excite=conv(6, 12, 1), head=conv(12, 4)
    ), image()


@exact
def spatial_gate():
    """The gate has one channel, which every channel is multiplied by, and which stays."""

    def run(net, x):
        x = F.relu(net.a(x))
        return net.head(x * torch.sigmoid(net.gate(x)))

    return Net(run, a=conv(3, 8), gate=conv(8, 1), head=conv(8, 4)), image()


@exact
def broadcast_1ch():
    def run(net, x):
        return net.head(F.relu(net.a(x) + net.b(x)))

    return Net(run, a=conv(3, 8), b=conv(3, 1), head=conv(8, 4)), image()


# --- norms and statistics


@exact
def layernorm_mlp():
    """The mean and the variance include the zeros of what is pruned, and the divisor stays 12."""

    def run(net, x):
        x = net.stem(x)
        x = x + net.down(F.gelu(net.up(net.norm(x))))
        return net.head(net.last(x))

    return Net(
        run,
        stem=nn.Linear(6, 12),
        norm=nn.LayerNorm(12),
        up=nn.Linear(12, 24),
        down=nn.Linear(24, 12),
        last=nn.LayerNorm(12),
        head=nn.Linear(12, 4),
    ), tokens()


@exact
def rmsnorm_builtin():
    def run(net, x):
        x = net.stem(x)
        x = x + net.down(F.silu(net.up(net.norm(x))))
        return net.head(net.last(x))

    return Net(
        run,
        stem=nn.Linear(6, 12),
        norm=nn.RMSNorm(12, eps=1e-6),
        up=nn.Linear(12, 24),
        down=nn.Linear(24, 12),
        last=nn.RMSNorm(12),
        head=nn.Linear(12, 4),
    ), tokens()


@exact
def groupnorm():
    """Whole groups go, or the same position inside of every group with the divisor kept."""

    def run(net, x):
        return net.head(F.relu(net.norm(net.a(x))))

    return Net(run, a=conv(3, 12), norm=nn.GroupNorm(3, 12), head=conv(12, 4)), image()


@exact
def instancenorm_affine():
    def run(net, x):
        return net.head(F.relu(net.norm(net.a(x))))

    return Net(run, a=conv(3, 8), norm=nn.InstanceNorm2d(8, affine=True), head=conv(8, 4)), image()


@frozen("a removed filter has norm 0, and 0 / 0 is not a number, here and in all that follows")
def weight_norm():
    """The weight is g * v / |v|, a norm for every output channel.

    Zero in every slice means v = 0 for the pruned filters, so the masked model computes
    0 * (0 / 0), and what gets a NaN gives a NaN, consumers with zero weights included: there is
    nothing to be equal to, and a user who trains with such masks loses the run. Input slices of v
    would be no difficulty (|v| is a sum without a divisor), but here every hidden channel is also
    the output of a normed filter. A tool whose masks leave v alone, and zero g and the bias only,
    makes this exact; then change the expectation.
    """

    def run(net, x):
        return net.head(F.relu(net.a(x)))

    return Net(
        run,
        a=parametrizations.weight_norm(conv(3, 8)),
        head=parametrizations.weight_norm(conv(8, 4)),
    ), image()


@exact
def mean_over_channels():
    """CBAM's spatial attention, by the mean alone: a gate from the mean over channels.

    Pruned channels are zero behind the ReLU and add nothing to the sum, so the mean is that of what
    is kept, with the divisor 8 of the original. What is exact for ``norms="original"`` is another
    function for ``norms="kept"``.
    """

    def run(net, x):
        x = F.relu(net.a(x))
        return net.head(x * torch.sigmoid(net.gate(x.mean(dim=1, keepdim=True))))

    return Net(run, a=conv(3, 8), gate=conv(1, 1), head=conv(8, 4)), image()


@frozen("a softmax over channels shares out 1 between them, and a zero takes part")
def softmax_over_channels():
    def run(net, x):
        return net.head(net.a(x).softmax(dim=1))

    return Net(run, a=conv(3, 8), head=conv(8, 4)), image()


@exact
def cumsum_channels():
    """Every channel holds the sum of those before it.

    What is kept gets the same sums from zeros as from nothing. A tool has to know that pruned
    channels are zero before the sum (they are here, and would not be behind a sigmoid), and that
    they are not zero behind it, unlike behind anything else. Freezing the axis is safe.
    """

    def run(net, x):
        return net.head(net.a(x).cumsum(dim=1))

    return Net(run, a=conv(3, 8), head=conv(8, 4)), image()


@frozen("a channel is divided by its neighbours, and those who become neighbours were none")
def local_response_norm():
    """The window goes over positions: with channel 3 gone, 2 and 4 would be in one window of 3.

    The masked model has a zero between them. Only a model that puts the zeros back could be equal.
    """

    def run(net, x):
        return net.head(net.norm(F.relu(net.a(x))))

    return Net(run, a=conv(3, 8), norm=nn.LocalResponseNorm(3, alpha=1.0), head=conv(8, 4)), image()


@exact
def maxout():
    """A maximum over two pieces each: no piece can go, since the 0 it leaves may be the maximum.

    A whole unit can, the two filters that compete: then the maximum of zeros is zero. So the axis
    of pieces is frozen, and that of units is not. A tool that freezes both is safe, and not exact.
    """

    def run(net, x):
        x = net.a(x)
        return net.head(x.view(x.shape[0], 8, 2, *x.shape[2:]).amax(dim=2))

    return Net(run, a=conv(3, 16), head=conv(8, 4)), image()


# --- parameters without a layer


@exact
def prelu():
    def run(net, x):
        return net.head(net.act(net.a(x)))

    return Net(run, a=conv(3, 8), act=nn.PReLU(8), head=conv(8, 4)), image()


@exact
def layer_scale_param():
    def run(net, x):
        x = net.stem(x)
        return net.head(x + net.scale * net.b(F.gelu(x)))

    return Net(
        run, stem=nn.Linear(6, 8), scale=parameter(8), b=nn.Linear(8, 8), head=nn.Linear(8, 4)
    ), tokens()


@exact
def layer_scale_param_c11():
    def run(net, x):
        x = net.stem(x)
        return net.head(x + net.scale * net.b(F.gelu(x)))

    return Net(
        run, stem=conv(3, 8), scale=parameter(8, 1, 1), b=conv(8, 8), head=conv(8, 4)
    ), image()


@exact
def pos_embedding():
    def run(net, x):
        return net.head(F.gelu(net.stem(x) + net.positions))

    return Net(
        run, stem=nn.Linear(6, 8), positions=parameter(1, 5, 8), head=nn.Linear(8, 4)
    ), tokens()


@exact
def frozen_scale_param():
    def run(net, x):
        return net.head(F.relu(net.a(x) * net.scale))

    return Net(
        run, a=conv(3, 8), scale=parameter(1, 8, 1, 1, requires_grad=False), head=conv(8, 4)
    ), image()


@exact
def scale_buffer():
    def run(net, x):
        return net.head(F.relu(net.a(x) * net.scale))

    scale = torch.linspace(0.5, 1.5, 8).view(1, 8, 1, 1)
    return Net(run, a=conv(3, 8), scale=scale, head=conv(8, 4)), image()


@exact
def functional_linear_param():
    def run(net, x):
        return F.linear(F.relu(net.a(x)), net.weight, net.bias)

    return Net(run, a=nn.Linear(6, 8), weight=parameter(4, 8), bias=parameter(4)), tokens()


@exact
def einsum_param():
    def run(net, x):
        x = torch.einsum("nchw,oc->nohw", F.relu(net.a(x)), net.weight)
        return net.head(F.relu(x))

    return Net(run, a=conv(3, 8), weight=parameter(6, 8), head=conv(6, 4)), image()


@exact
def matmul_param():
    def run(net, x):
        return net.head(F.relu(F.relu(net.a(x)) @ net.weight))

    return Net(run, a=nn.Linear(6, 8), weight=parameter(8, 12), head=nn.Linear(12, 4)), tokens()


@exact
def embedding():
    def run(net, x):
        return net.head(F.gelu(net.embed(x)))

    return Net(run, embed=nn.Embedding(11, 8), head=nn.Linear(8, 4)), ids()


@exact
def tied_weights():
    """One tensor as embedding and as head: it must be cut once and stay tied."""

    def run(net, x):
        x = net.embed(x)
        return net.head(x + net.down(F.gelu(net.up(x))))

    net = Net(
        run,
        embed=nn.Embedding(11, 8),
        up=nn.Linear(8, 12),
        down=nn.Linear(12, 8),
        head=nn.Linear(8, 11, bias=False),
    )
    net.head.weight = net.embed.weight
    return net, ids()


# --- recurrence and attention


@exact
def lstm():
    """A hidden unit is a row of every gate, a column of the recurrence, an input of the head."""

    def run(net, x):
        return net.head(net.rnn(x)[0][:, -1])

    return Net(run, rnn=nn.LSTM(6, 8, batch_first=True), head=nn.Linear(8, 4)), tokens()


@exact
def gru():
    def run(net, x):
        return net.head(net.rnn(x)[0][:, -1])

    return Net(run, rnn=nn.GRU(6, 8, batch_first=True), head=nn.Linear(8, 4)), tokens()


@exact
def mha_builtin():
    def run(net, x):
        x = net.stem(x)
        return net.head(x + net.attention(x, x, x, need_weights=False)[0])

    return Net(
        run,
        stem=nn.Linear(6, 16),
        attention=nn.MultiheadAttention(16, 4, batch_first=True),
        head=nn.Linear(16, 4),
    ), tokens()


def _heads(x, heads):
    """``(batch, tokens, heads * size)`` to ``(batch, heads, tokens, size)``."""
    return x.view(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def _joined(x):
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


@exact
def attention_fused_qkv():
    """As in timm: three times heads times size, in this order."""

    def run(net, x):
        x = net.stem(x)
        qkv = net.qkv(x).reshape(x.shape[0], x.shape[1], 3, 4, 4).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        scores = (query * 4**-0.5) @ key.transpose(-2, -1)
        return net.head(x + net.out(_joined(scores.softmax(dim=-1) @ value)))

    return Net(
        run,
        stem=nn.Linear(6, 16),
        qkv=nn.Linear(16, 48),
        out=nn.Linear(16, 16),
        head=nn.Linear(16, 4),
    ), tokens()


def _separate(run, key_width=16):
    return Net(
        run,
        stem=nn.Linear(6, 16),
        query=nn.Linear(16, 16),
        key=nn.Linear(16, key_width),
        value=nn.Linear(16, key_width),
        out=nn.Linear(16, 16),
        head=nn.Linear(16, 4),
    )


@exact
def attention_separate_qkv():
    """As in BERT. The temperature is that of four positions, however many of them are kept."""

    def run(net, x):
        x = net.stem(x)
        query, key, value = (_heads(part(x), 4) for part in (net.query, net.key, net.value))
        attended = F.scaled_dot_product_attention(query, key, value)
        return net.head(x + net.out(_joined(attended)))

    return _separate(run), tokens()


@exact
def attention_gqa():
    """Two query heads share a key and value head, and go with it."""

    def run(net, x):
        x = net.stem(x)
        query, key, value = _heads(net.query(x), 4), _heads(net.key(x), 2), _heads(net.value(x), 2)
        key, value = (part.repeat_interleave(2, dim=1) for part in (key, value))
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return net.head(x + net.out(_joined(attended)))

    return _separate(run, key_width=8), tokens()


@exact
def rope_rotate_half():
    """Rotated positions go in pairs, half a head apart, with their cosines and sines."""

    def rotated(x, cosine, sine):
        first, second = x.chunk(2, dim=-1)
        return x * cosine + torch.cat([-second, first], dim=-1) * sine

    def run(net, x):
        x = net.stem(x)
        query, key, value = (_heads(part(x), 2) for part in (net.query, net.key, net.value))
        angles = torch.outer(torch.arange(x.shape[1], dtype=x.dtype), net.frequencies).repeat(1, 2)
        query, key = (rotated(part, angles.cos(), angles.sin()) for part in (query, key))
        attended = F.scaled_dot_product_attention(query, key, value)
        return net.head(x + net.out(_joined(attended)))

    net = _separate(run)
    net.register_buffer("frequencies", 10.0 ** -torch.linspace(0, 1, 4))
    return net, tokens()


PATTERNS: tuple[Pattern, ...] = tuple(_table.found)
