"""Flax Linen: convolutional networks."""

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from purepruning_interop import linen as ppl
from tests.coupling.entry import Entry, draw_inputs, fill, normal


def linen(name: str, family: str, module: nn.Module, *inputs) -> Entry:
    """The entry of a Linen module; ``inputs`` are drawn, see ``entry.py``."""

    def build(key):
        drawn = draw_inputs(inputs, key)
        return module.apply, fill(jax.eval_shape(module.init, key, *drawn), key), drawn

    def layers(params, inputs):
        return ppl.layers(module, params, *inputs)

    return Entry(name, "linen", family, build, layers)


Norm = partial(nn.BatchNorm, use_running_average=True)
Conv3 = partial(nn.Conv, kernel_size=(3, 3))
Conv1 = partial(nn.Conv, kernel_size=(1, 1))


def pooled(x):
    return jnp.mean(x, axis=(1, 2))


def max_pool(x):
    return nn.max_pool(x, (2, 2), (2, 2))


class MLP(nn.Module):
    widths: Sequence[int] = (16, 12, 5)

    @nn.compact
    def __call__(self, x):
        for width in self.widths[:-1]:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.widths[-1])(x)


class VGG(nn.Module):
    """Convolutions, then dense layers on the flattened map."""

    @nn.compact
    def __call__(self, x):
        for width in (8, 12):
            x = max_pool(nn.relu(Conv3(width)(x)))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(16)(x))
        x = nn.Dropout(0.5, deterministic=True)(x)
        return nn.Dense(5)(x)


class BasicBlock(nn.Module):
    width: int
    stride: int = 1
    norm: type = Norm
    conv: type = partial(nn.Conv, use_bias=False)

    @nn.compact
    def __call__(self, x):
        y = nn.relu(self.norm()(self.conv(self.width, (3, 3), strides=self.stride)(x)))
        y = self.norm()(self.conv(self.width, (3, 3))(y))
        if x.shape != y.shape:
            x = self.norm()(self.conv(self.width, (1, 1), strides=self.stride)(x))
        return nn.relu(x + y)


class Bottleneck(nn.Module):
    width: int
    stride: int = 1
    groups: int = 1

    @nn.compact
    def __call__(self, x):
        y = nn.relu(Norm()(Conv1(self.width, use_bias=False)(x)))
        y = Conv3(self.width, strides=self.stride, feature_group_count=self.groups, use_bias=False)(
            y
        )
        y = Conv1(2 * self.width, use_bias=False)(nn.relu(Norm()(y)))
        y = Norm()(y)
        if x.shape != y.shape:
            x = Norm()(Conv1(2 * self.width, strides=self.stride, use_bias=False)(x))
        return nn.relu(x + y)


class PreActivationBlock(nn.Module):
    width: int
    stride: int = 1

    @nn.compact
    def __call__(self, x):
        y = nn.relu(Norm()(x))
        if self.stride != 1 or x.shape[-1] != self.width:
            x = Conv1(self.width, strides=self.stride, use_bias=False)(y)
        y = nn.relu(Norm()(Conv3(self.width, strides=self.stride, use_bias=False)(y)))
        return x + Conv3(self.width, use_bias=False)(y)


class ResNet(nn.Module):
    """Any residual block: two stages of two."""

    block: type
    norm: type = Norm
    activate_last: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.relu(self.norm()(nn.Conv(8, (3, 3), use_bias=False)(x)))
        x = nn.max_pool(x, (3, 3), (2, 2), padding="SAME")
        for width, stride in ((8, 1), (8, 1), (16, 2), (16, 1)):
            x = self.block(width, stride)(x)
        if self.activate_last:
            x = nn.relu(self.norm()(x))
        return nn.Dense(5)(pooled(x))


class DenseNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = Conv3(8, use_bias=False)(x)
        for layers in (2, 2):
            for _ in range(layers):
                y = Conv1(8, use_bias=False)(nn.relu(Norm()(x)))
                y = Conv3(4, use_bias=False)(nn.relu(Norm()(y)))
                x = jnp.concatenate([x, y], axis=-1)
            x = Conv1(x.shape[-1] // 2, use_bias=False)(nn.relu(Norm()(x)))  # the transition
            x = nn.avg_pool(x, (2, 2), (2, 2))
        return nn.Dense(5)(pooled(nn.relu(Norm()(x))))


class SqueezeExcite(nn.Module):
    reduced: int

    @nn.compact
    def __call__(self, x):
        gate = jnp.mean(x, axis=(1, 2), keepdims=True)
        gate = nn.swish(Conv1(self.reduced)(gate))
        return x * nn.sigmoid(Conv1(x.shape[-1])(gate))


class InvertedResidual(nn.Module):
    """MobileNet-v2's block, or EfficientNet's with squeeze and excite."""

    width: int
    stride: int = 1
    squeeze: bool = False

    @nn.compact
    def __call__(self, x):
        activation = nn.swish if self.squeeze else nn.relu6
        wide = 3 * x.shape[-1]
        y = activation(Norm()(Conv1(wide, use_bias=False)(x)))
        y = Conv3(wide, strides=self.stride, feature_group_count=wide, use_bias=False)(y)
        y = activation(Norm()(y))
        if self.squeeze:
            y = SqueezeExcite(wide // 4)(y)
        y = Norm()(Conv1(self.width, use_bias=False)(y))
        return x + y if x.shape == y.shape else y


class MobileNet(nn.Module):
    squeeze: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.relu6(Norm()(Conv3(8, strides=2, use_bias=False)(x)))
        for width, stride in ((8, 1), (12, 2), (12, 1)):
            x = InvertedResidual(width, stride, self.squeeze)(x)
        x = nn.relu6(Norm()(Conv1(24, use_bias=False)(x)))
        return nn.Dense(5)(pooled(x))


class ConvNeXt(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(nn.Conv(8, (2, 2), strides=2, padding="VALID")(x))
        for stage, width in enumerate((8, 12)):
            if stage:
                x = nn.Conv(width, (2, 2), strides=2, padding="VALID")(nn.LayerNorm()(x))
            y = nn.LayerNorm()(nn.Conv(width, (7, 7), feature_group_count=width)(x))
            y = nn.Dense(width)(nn.gelu(nn.Dense(4 * width)(y)))
            x = x + y * self.param(f"layer_scale_{stage}", nn.initializers.ones, (1, 1, 1, width))
        return nn.Dense(5)(nn.LayerNorm()(pooled(x)))


def shuffle(x, groups):
    """Channels of ``groups`` groups, interleaved."""
    *rest, width = x.shape
    return x.reshape(*rest, groups, width // groups).swapaxes(-1, -2).reshape(x.shape)


class ShuffleNetV1(nn.Module):
    """Grouped 1x1 convolutions with a shuffle between."""

    groups: int = 2

    @nn.compact
    def __call__(self, x):
        x = nn.relu(Norm()(Conv3(12, use_bias=False)(x)))
        for _ in range(2):
            y = nn.relu(Norm()(Conv1(12, feature_group_count=self.groups, use_bias=False)(x)))
            y = Norm()(Conv3(12, feature_group_count=12, use_bias=False)(shuffle(y, self.groups)))
            y = Norm()(Conv1(12, feature_group_count=self.groups, use_bias=False)(y))
            x = nn.relu(x + y)
        return nn.Dense(5)(pooled(x))


class ShuffleNetV2(nn.Module):
    """Half of the channels passes by; the halves are shuffled."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(Norm()(Conv3(12, use_bias=False)(x)))
        for _ in range(2):
            by, y = jnp.split(x, 2, axis=-1)
            y = nn.relu(Norm()(Conv1(6, use_bias=False)(y)))
            y = Norm()(Conv3(6, feature_group_count=6, use_bias=False)(y))
            y = nn.relu(Norm()(Conv1(6, use_bias=False)(y)))
            x = shuffle(jnp.concatenate([by, y], axis=-1), 2)
        x = nn.relu(Norm()(Conv1(16, use_bias=False)(x)))
        return nn.Dense(5)(pooled(x))


class Inception(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(Norm()(Conv3(8, use_bias=False)(x)))
        for _ in range(2):
            pool = nn.max_pool(x, (3, 3), padding="SAME")
            branches = (
                Conv1(4)(x),
                Conv3(6)(nn.relu(Conv1(4)(x))),
                nn.Conv(4, (5, 1))(nn.relu(nn.Conv(4, (1, 5))(x))),
                Conv1(4)(pool),
            )
            x = nn.relu(jnp.concatenate(branches, axis=-1))
        return nn.Dense(5)(pooled(x))


class UNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        skips = []
        for width in (8, 12):
            x = nn.relu(Norm()(Conv3(width)(x)))
            skips.append(x)
            x = max_pool(x)
        x = nn.relu(Conv3(16)(x))
        for width in (12, 8):
            x = nn.ConvTranspose(width, (2, 2), strides=(2, 2))(x)
            x = nn.relu(Norm()(Conv3(width)(jnp.concatenate([skips.pop(), x], axis=-1))))
        return Conv1(3)(x)


class WeightNorm(nn.Module):
    """Kernels are a direction of unit norm times a scale."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.WeightNorm(Conv3(8))(x))
        x = nn.relu(nn.WeightNorm(Conv3(12))(x))
        return nn.WeightNorm(nn.Dense(5))(pooled(x))


class StandardisedConv(nn.Conv):
    """Kernels have mean 0 and variance 1 over a filter, as in BiT."""

    def param(self, name, *arguments, **options):
        value = super().param(name, *arguments, **options)
        if name != "kernel":
            return value
        axes = tuple(range(value.ndim - 1))
        mean, var = jnp.mean(value, axes, keepdims=True), jnp.var(value, axes, keepdims=True)
        return (value - mean) * jax.lax.rsqrt(var + 1e-5)


class Res2Net(nn.Module):
    """Slices of the channels feed each other, then are concatenated."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(Conv3(12)(x))
        for _ in range(2):
            first, *slices = jnp.split(nn.relu(Norm()(Conv1(12)(x))), 3, axis=-1)
            outs, y = [first], 0
            for piece in slices:
                y = nn.relu(Norm()(Conv3(4)(piece + y)))
                outs.append(y)
            x = nn.relu(x + Norm()(Conv1(12)(jnp.concatenate(outs, axis=-1))))
        return nn.Dense(5)(pooled(x))


class GhostNet(nn.Module):
    """Half of the features are cheap: depthwise images of the other half; cut to width."""

    def ghost(self, x, width):
        primary = nn.relu(Norm()(Conv1((width + 1) // 2)(x)))
        cheap = Conv3(primary.shape[-1], feature_group_count=primary.shape[-1])(primary)
        return jnp.concatenate([primary, nn.relu(Norm()(cheap))], axis=-1)[..., :width]

    @nn.compact
    def __call__(self, x):
        x = nn.relu(Conv3(9)(x))
        for _ in range(2):
            x = x + self.ghost(self.ghost(x, 15), 9)
        return nn.Dense(5)(pooled(x))


class SelectiveKernel(nn.Module):
    """A softmax over branches, for every channel."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(Conv3(8)(x))
        branches = jnp.stack([nn.relu(Conv3(12)(x)), nn.relu(nn.Conv(12, (5, 5))(x))])
        squeezed = nn.relu(nn.Dense(6)(jnp.mean(jnp.sum(branches, axis=0), axis=(1, 2))))
        weights = nn.softmax(jnp.stack([nn.Dense(12)(squeezed) for _ in range(2)]), axis=0)
        return nn.Dense(5)(pooled(jnp.sum(branches * weights[:, :, None, None], axis=0)))


class CBAM(nn.Module):
    """Gates over channels, then over positions from the mean and maximum over channels."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(Norm()(Conv3(12)(x)))
        gate = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(12)])
        weights = nn.sigmoid(gate(pooled(x)) + gate(jnp.max(x, axis=(1, 2))))
        x = x * weights[:, None, None]
        maps = jnp.stack([jnp.mean(x, axis=-1), jnp.max(x, axis=-1)], axis=-1)
        x = x * nn.sigmoid(nn.Conv(1, (7, 7))(maps))
        return nn.Dense(5)(pooled(nn.relu(Conv3(8)(x))))


class RepVGG(nn.Module):
    """The sum of a 3x3 convolution, a 1x1 convolution and the input, each normalised."""

    @nn.compact
    def __call__(self, x):
        for width, stride in ((8, 2), (8, 1), (12, 2), (12, 1)):
            y = Norm()(Conv3(width, strides=stride, use_bias=False)(x))
            y = y + Norm()(Conv1(width, strides=stride, use_bias=False)(x))
            x = nn.relu(y + Norm()(x) if x.shape == y.shape else y)
        return nn.Dense(5)(pooled(x))


class MultiResolution(nn.Module):
    """HRNet: two resolutions exchange features by sums."""

    @nn.compact
    def __call__(self, x):
        high = nn.relu(Norm()(Conv3(8)(x)))
        low = nn.relu(Norm()(Conv3(12, strides=2)(high)))
        for _ in range(2):
            high, low = nn.relu(Norm()(Conv3(8)(high))), nn.relu(Norm()(Conv3(12)(low)))
            up = jax.image.resize(Conv1(8)(low), high.shape, "nearest")
            high, low = nn.relu(high + up), nn.relu(low + Conv3(12, strides=2)(high))
        low = jax.image.resize(low, (*high.shape[:3], 12), "bilinear")
        return Conv1(3)(nn.relu(Conv1(8)(jnp.concatenate([high, low], axis=-1))))


class Discriminator(nn.Module):
    """Strided convolutions with leaky units, and a GAN's generator before them."""

    @nn.compact
    def __call__(self, z):
        x = nn.relu(Norm()(nn.Dense(4 * 4 * 8)(z).reshape(-1, 4, 4, 8)))
        x = nn.relu(Norm()(nn.ConvTranspose(8, (4, 4), strides=(2, 2))(x)))
        x = nn.tanh(nn.ConvTranspose(3, (4, 4), strides=(2, 2))(x))
        for width in (8, 12):
            x = nn.leaky_relu(nn.Conv(width, (4, 4), strides=2)(x), 0.2)
        return nn.Dense(1)(x.reshape(x.shape[0], -1)), x


GroupNorm = partial(nn.GroupNorm, num_groups=4)
IMAGE, SMALL_IMAGE = normal(2, 16, 16, 3), normal(2, 8, 8, 3)

MODELS = (
    linen("linen_mlp", "mlp", MLP(), normal(4, 7)),
    linen("linen_vgg", "vgg", VGG(), SMALL_IMAGE),
    linen("linen_resnet_basic", "resnet", ResNet(BasicBlock), IMAGE),
    linen("linen_resnet_bottleneck", "resnet", ResNet(Bottleneck), IMAGE),
    linen(
        "linen_resnet_preactivation",
        "resnet",
        ResNet(PreActivationBlock, activate_last=True),
        IMAGE,
    ),
    linen("linen_resnext", "resnext", ResNet(partial(Bottleneck, groups=4)), IMAGE),
    linen(
        "linen_resnet_groupnorm",
        "groupnorm",
        ResNet(partial(BasicBlock, norm=GroupNorm), norm=GroupNorm),
        IMAGE,
    ),
    linen(
        "linen_resnet_standardised",
        "weight-standardised",
        ResNet(
            partial(BasicBlock, norm=GroupNorm, conv=partial(StandardisedConv, use_bias=False)),
            norm=GroupNorm,
        ),
        IMAGE,
    ),
    linen("linen_weight_norm", "weight-norm", WeightNorm(), SMALL_IMAGE),
    linen("linen_densenet", "densenet", DenseNet(), IMAGE),
    linen("linen_mobilenet_v2", "mobilenet", MobileNet(), IMAGE),
    linen("linen_efficientnet", "efficientnet", MobileNet(squeeze=True), IMAGE),
    linen("linen_convnext", "convnext", ConvNeXt(), IMAGE),
    linen("linen_shufflenet_v1", "shufflenet", ShuffleNetV1(), SMALL_IMAGE),
    linen("linen_shufflenet_v2", "shufflenet", ShuffleNetV2(), SMALL_IMAGE),
    linen("linen_inception", "inception", Inception(), SMALL_IMAGE),
    linen("linen_unet", "unet", UNet(), SMALL_IMAGE),
    linen("linen_res2net", "res2net", Res2Net(), SMALL_IMAGE),
    linen("linen_ghostnet", "ghostnet", GhostNet(), SMALL_IMAGE),
    linen("linen_selective_kernel", "selective-kernel", SelectiveKernel(), SMALL_IMAGE),
    linen("linen_cbam", "cbam", CBAM(), SMALL_IMAGE),
    linen("linen_repvgg", "repvgg", RepVGG(), SMALL_IMAGE),
    linen("linen_multi_resolution", "hrnet", MultiResolution(), SMALL_IMAGE),
    linen("linen_gan", "gan", Discriminator(), normal(2, 6)),
)
