"""ResNet-50, DenseNet-121 and a 12-layer BERT, in Flax (Linen and NNX) and in PyTorch."""

from __future__ import annotations

from typing import Any

RESNET = ((3, 64), (4, 128), (6, 256), (3, 512))
DENSENET = (6, 12, 24, 16)


def linen_net(name: str, size: Any) -> tuple[Any, Any, Any]:
    """Returns ``apply``, the shapes of the variables, and the shape of the input."""
    import jax
    import jax.numpy as jnp
    from flax import linen as nn

    def norm(x: Any) -> Any:
        return nn.BatchNorm(use_running_average=True)(x)

    def conv(x: Any, features: int, taps: int, stride: int = 1) -> Any:
        return nn.Conv(features, (taps, taps), (stride, stride), use_bias=False)(x)

    class ResNet(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            stages, stem = size[0], size[1]
            x = nn.relu(norm(conv(x, stem, 7, 2)))
            x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
            for stage, (blocks, width) in enumerate(stages):
                for block in range(blocks):
                    stride = 2 if stage and not block else 1
                    y = nn.relu(norm(conv(x, width, 1)))
                    y = nn.relu(norm(conv(y, width, 3, stride)))
                    y = norm(conv(y, 4 * width, 1))
                    if not block:
                        x = norm(conv(x, 4 * width, 1, stride))
                    x = nn.relu(x + y)
            return nn.Dense(1000)(x.mean((1, 2)))

    class DenseNet(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            stages, growth = size[0], size[1]
            x = nn.max_pool(nn.relu(norm(conv(x, 2 * growth, 7, 2))), (3, 3), (2, 2), "SAME")
            for stage, blocks in enumerate(stages):
                for _ in range(blocks):
                    y = conv(nn.relu(norm(x)), 4 * growth, 1)
                    y = conv(nn.relu(norm(y)), growth, 3)
                    x = jnp.concatenate([x, y], -1)
                if stage < len(stages) - 1:
                    x = nn.avg_pool(conv(nn.relu(norm(x)), x.shape[-1] // 2, 1), (2, 2), (2, 2))
            return nn.Dense(1000)(nn.relu(norm(x)).mean((1, 2)))

    class Bert(nn.Module):
        @nn.compact
        def __call__(self, tokens: Any) -> Any:
            layers, width, heads = size
            x = nn.Embed(30522, width)(tokens)
            x = nn.LayerNorm()(x + self.param("places", nn.initializers.normal(), (128, width)))
            for _ in range(layers):
                x = nn.LayerNorm()(x + nn.MultiHeadDotProductAttention(heads)(x, x))
                x = nn.LayerNorm()(x + nn.Dense(width)(nn.gelu(nn.Dense(4 * width)(x))))
            return nn.Dense(2)(nn.tanh(nn.Dense(width)(x[:, 0])))

    net = {"resnet": ResNet, "densenet": DenseNet, "bert": Bert}[name]()
    given = _input(name, jnp.int32, jnp.float32)
    given = jax.ShapeDtypeStruct(*given)
    return net.apply, jax.eval_shape(net.init, jax.random.key(0), given), given


def nnx_net(name: str, size: Any) -> tuple[Any, Any]:
    """Returns the module, whose arrays are shapes only, and the shape of the input."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    rngs = nnx.Rngs(0)

    def conv(into: int, out: int, taps: int, stride: int = 1) -> Any:
        return nnx.Conv(into, out, (taps, taps), stride, use_bias=False, rngs=rngs)

    def norm(width: int) -> Any:
        return nnx.BatchNorm(width, use_running_average=True, rngs=rngs)

    class Bottleneck(nnx.Module):
        def __init__(self, into: int, width: int, stride: int, first: bool) -> None:
            self.one, self.norm1 = conv(into, width, 1), norm(width)
            self.two, self.norm2 = conv(width, width, 3, stride), norm(width)
            self.three, self.norm3 = conv(width, 4 * width, 1), norm(4 * width)
            short = [conv(into, 4 * width, 1, stride), norm(4 * width)] if first else []
            self.short = nnx.Sequential(*short) if first else None

        def __call__(self, x: Any) -> Any:
            y = nnx.relu(self.norm1(self.one(x)))
            y = self.norm3(self.three(nnx.relu(self.norm2(self.two(y)))))
            return nnx.relu((self.short(x) if self.short else x) + y)

    class DenseLayer(nnx.Module):
        def __init__(self, into: int, growth: int) -> None:
            self.norm1, self.one = norm(into), conv(into, 4 * growth, 1)
            self.norm2, self.two = norm(4 * growth), conv(4 * growth, growth, 3)

        def __call__(self, x: Any) -> Any:
            y = self.two(nnx.relu(self.norm2(self.one(nnx.relu(self.norm1(x))))))
            return jnp.concatenate([x, y], -1)

    class BertLayer(nnx.Module):
        def __init__(self, width: int, heads: int) -> None:
            self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
            self.up = nnx.Linear(width, 4 * width, rngs=rngs)
            self.down = nnx.Linear(4 * width, width, rngs=rngs)
            self.norm1, self.norm2 = (nnx.LayerNorm(width, rngs=rngs) for _ in range(2))

        def __call__(self, x: Any) -> Any:
            x = self.norm1(x + self.attention(x))
            return self.norm2(x + self.down(nnx.gelu(self.up(x))))

    class Bert(nnx.Module):
        def __init__(self, layers: int, width: int, heads: int) -> None:
            self.words = nnx.Embed(30522, width, rngs=rngs)
            self.places = nnx.Param(jax.random.normal(rngs.params(), (128, width)))
            self.norm = nnx.LayerNorm(width, rngs=rngs)
            self.layers = nnx.List([BertLayer(width, heads) for _ in range(layers)])
            self.pool = nnx.Linear(width, width, rngs=rngs)
            self.head = nnx.Linear(width, 2, rngs=rngs)

        def __call__(self, tokens: Any) -> Any:
            x = self.norm(self.words(tokens) + self.places)
            for layer in self.layers:
                x = layer(x)
            return self.head(nnx.tanh(self.pool(x[:, 0])))

    class Images(nnx.Module):
        def __init__(self) -> None:
            stages, first = size
            width = first if name == "resnet" else 2 * first
            self.stem, self.norm = conv(3, width, 7, 2), norm(width)
            parts: list[Any] = []
            for stage, entry in enumerate(stages):
                if name == "resnet":
                    for block in range(entry[0]):
                        stride = 2 if stage and not block else 1
                        parts.append(Bottleneck(width, entry[1], stride, not block))
                        width = 4 * entry[1]
                    continue
                for _ in range(entry):
                    parts.append(DenseLayer(width, first))
                    width += first
                parts += [norm(width), nnx.relu]
                if stage < len(stages) - 1:
                    parts.append(conv(width, width // 2, 1))
                    parts.append(lambda x: nnx.avg_pool(x, (2, 2), (2, 2)))
                    width //= 2
            self.parts = nnx.Sequential(*parts)
            self.head = nnx.Linear(width, 1000, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            x = nnx.max_pool(nnx.relu(self.norm(self.stem(x))), (3, 3), (2, 2), "SAME")
            return self.head(self.parts(x).mean((1, 2)))

    def build() -> Any:
        nonlocal rngs
        rngs = nnx.Rngs(0)
        return Bert(*size) if name == "bert" else Images()

    given = jax.ShapeDtypeStruct(*_input(name, jnp.int32, jnp.float32))
    return nnx.eval_shape(build), given


def torch_net(name: str, size: Any) -> tuple[Any, Any]:
    """Returns the module and an example input."""
    import torch
    from torch import nn

    def conv(into: int, out: int, taps: int, stride: int = 1) -> nn.Module:
        return nn.Conv2d(into, out, taps, stride, taps // 2, bias=False)

    class Bottleneck(nn.Module):
        def __init__(self, into: int, width: int, stride: int, first: bool) -> None:
            super().__init__()
            self.one, self.norm1 = conv(into, width, 1), nn.BatchNorm2d(width)
            self.two, self.norm2 = conv(width, width, 3, stride), nn.BatchNorm2d(width)
            self.three, self.norm3 = conv(width, 4 * width, 1), nn.BatchNorm2d(4 * width)
            self.short = (
                nn.Sequential(conv(into, 4 * width, 1, stride), nn.BatchNorm2d(4 * width))
                if first
                else nn.Identity()
            )

        def forward(self, x: Any) -> Any:
            y = torch.relu(self.norm1(self.one(x)))
            y = self.norm3(self.three(torch.relu(self.norm2(self.two(y)))))
            return torch.relu(self.short(x) + y)

    class DenseLayer(nn.Module):
        def __init__(self, into: int, growth: int) -> None:
            super().__init__()
            self.norm1, self.one = nn.BatchNorm2d(into), conv(into, 4 * growth, 1)
            self.norm2, self.two = nn.BatchNorm2d(4 * growth), conv(4 * growth, growth, 3)

        def forward(self, x: Any) -> Any:
            y = self.two(torch.relu(self.norm2(self.one(torch.relu(self.norm1(x))))))
            return torch.cat([x, y], 1)

    class Attention(nn.Module):
        def __init__(self, width: int, heads: int) -> None:
            super().__init__()
            self.heads = heads
            self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

        def forward(self, x: Any) -> Any:
            b, n, width = x.shape
            q, k, v = (
                layer(x).reshape(b, n, self.heads, -1).transpose(1, 2)
                for layer in (self.query, self.key, self.value)
            )
            y = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.out(y.transpose(1, 2).reshape(b, n, width))

    class BertLayer(nn.Module):
        def __init__(self, width: int, heads: int) -> None:
            super().__init__()
            self.attention, self.norm1 = Attention(width, heads), nn.LayerNorm(width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
            self.norm2 = nn.LayerNorm(width)

        def forward(self, x: Any) -> Any:
            x = self.norm1(x + self.attention(x))
            return self.norm2(x + self.down(nn.functional.gelu(self.up(x))))

    class Bert(nn.Module):
        def __init__(self, layers: int, width: int, heads: int) -> None:
            super().__init__()
            self.words = nn.Embedding(30522, width)
            self.places = nn.Parameter(torch.randn(128, width))
            self.norm = nn.LayerNorm(width)
            self.layers = nn.Sequential(*(BertLayer(width, heads) for _ in range(layers)))
            self.pool, self.head = nn.Linear(width, width), nn.Linear(width, 2)

        def forward(self, tokens: Any) -> Any:
            x = self.layers(self.norm(self.words(tokens) + self.places))
            return self.head(torch.tanh(self.pool(x[:, 0])))

    parts: list[nn.Module]
    if name == "bert":
        net: nn.Module = Bert(*size)
    else:
        stages, first = size
        width = first if name == "resnet" else 2 * first
        parts = [conv(3, width, 7, 2), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
        for stage, entry in enumerate(stages):
            if name == "resnet":
                for block in range(entry[0]):
                    stride = 2 if stage and not block else 1
                    parts.append(Bottleneck(width, entry[1], stride, not block))
                    width = 4 * entry[1]
                continue
            for _ in range(entry):
                parts.append(DenseLayer(width, first))
                width += first
            if stage < len(stages) - 1:
                parts += [nn.BatchNorm2d(width), nn.ReLU(), conv(width, width // 2, 1)]
                parts.append(nn.AvgPool2d(2))
                width //= 2
        if name == "densenet":
            parts += [nn.BatchNorm2d(width), nn.ReLU()]
        parts += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1000)]
        net = nn.Sequential(*parts)
    shape, dtype = _input(name, torch.int64, torch.float32)
    if len(shape) == 4:
        shape = (shape[0], shape[3], *shape[1:3])
    given = torch.zeros(shape, dtype=dtype) if name == "bert" else torch.randn(shape)
    return net.eval(), given


def _input(name: str, integer: Any, floating: Any) -> tuple[tuple[int, ...], Any]:
    return ((1, 128), integer) if name == "bert" else ((1, 224, 224, 3), floating)
