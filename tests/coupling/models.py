"""Small models as plain functions of a flat dict of arrays, and their layer tables.

Layouts are torch's (OIHW, (out, in)) in ``from_graph`` and Flax's elsewhere, so that parameters of
either framework fit the same config.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from purepruning import Layer

NCHW, NHWC = ("NCHW", "OIHW", "NCHW"), ("NHWC", "HWIO", "NHWC")


def weights(shapes, seed=0, integers=False):
    """Random weights; integers are distinct in magnitude, so that sums are exact and no two tie."""
    rng = np.random.default_rng(seed)
    if not integers:
        return {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    sizes = [int(np.prod(s)) for s in shapes.values()]
    values = rng.permutation(np.arange(1, sum(sizes) + 1)) * rng.choice([-1, 1], sum(sizes))
    parts = np.split(values.astype(np.float32), np.cumsum(sizes)[:-1])
    return {k: p.reshape(s) for (k, s), p in zip(shapes.items(), parts, strict=True)}


def conv(x, w, stride=1, groups=1, layout=NHWC):
    return jax.lax.conv_general_dilated(
        x, w, (stride, stride), "SAME", dimension_numbers=layout, feature_group_count=groups
    )


def conv_layer(name, shape, groups=1, **kwargs):
    return Layer(name, "Conv2d", f"{name}.w", shape, (3,), (2,), groups=groups, **kwargs)


def dense_layer(name, shape, **kwargs):
    return Layer(name, "Linear", f"{name}.w", shape, (1,), (0,), **kwargs)


class Added:
    """Two convolutions whose outputs are added: the example of NNI's document."""

    shapes: ClassVar = {"one.w": (3, 3, 3, 10), "two.w": (1, 1, 3, 10), "fc.w": (10, 4)}
    x = jax.ShapeDtypeStruct((1, 5, 5, 3), jnp.float32)
    layers = (
        conv_layer("one", shapes["one.w"]),
        conv_layer("two", shapes["two.w"]),
        dense_layer("fc", shapes["fc.w"]),
    )

    @staticmethod
    def fn(p, x):
        h = conv(x, p["one.w"]) + conv(jax.nn.relu(x), p["two.w"])
        return jax.nn.relu(h).mean((1, 2)) @ p["fc.w"]


class Grouped:
    """A convolution read in groups of 4 and of 6, and one of the two pruned in its own groups."""

    shapes: ClassVar = {
        "stem.w": (3, 3, 3, 24),
        "four.w": (1, 1, 6, 16),
        "six.w": (1, 1, 4, 18),
        "fc.w": (34, 2),
    }
    x = jax.ShapeDtypeStruct((1, 4, 4, 3), jnp.float32)
    layers = (
        conv_layer("stem", shapes["stem.w"]),
        conv_layer("four", shapes["four.w"], 4),
        conv_layer("six", shapes["six.w"], 6),
        dense_layer("fc", shapes["fc.w"]),
    )

    @staticmethod
    def fn(p, x):
        h = jax.nn.relu(conv(x, p["stem.w"]))
        h = jnp.concatenate(
            [conv(h, p["four.w"], groups=4), conv(h, p["six.w"], groups=6)], axis=-1
        )
        return h.mean((1, 2)) @ p["fc.w"]


class ResNet:
    """Three stages of two blocks with biases and scales, as on CIFAR."""

    widths = (8, 16, 24)

    def __init__(self):
        self.shapes, layers, into = {}, [], 3

        def add(name, size, into, out, norm=True):
            self.shapes[f"{name}.w"] = (size, size, into, out)
            layers.append(conv_layer(name, (size, size, into, out)))
            if norm:
                self.shapes |= {f"{name}.scale": (out,), f"{name}.shift": (out,)}

        add("stem", 3, 3, self.widths[0])
        into = self.widths[0]
        for i, width in enumerate(self.widths):
            for j in range(2):
                add(f"s{i}b{j}c1", 3, into, width)
                add(f"s{i}b{j}c2", 3, width, width)
                if into != width:
                    add(f"s{i}b{j}down", 1, into, width)
                into = width
        self.shapes["fc.w"] = (into, 10)
        self.layers = (*layers, dense_layer("fc", (into, 10)))
        self.x = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)

    def fn(self, p, x):
        def norm(x, name):
            return x * p[f"{name}.scale"][None, None, None] + p[f"{name}.shift"][None, None, None]

        def block(x, name, stride):
            h = jax.nn.relu(norm(conv(x, p[f"{name}c1.w"], stride), f"{name}c1"))
            h = norm(conv(h, p[f"{name}c2.w"]), f"{name}c2")
            if f"{name}down.w" in p:
                x = norm(conv(x, p[f"{name}down.w"], stride), f"{name}down")
            return jax.nn.relu(h + x)

        x = jax.nn.relu(norm(conv(x, p["stem.w"]), "stem"))
        for i in range(len(self.widths)):
            for j in range(2):
                x = block(x, f"s{i}b{j}", 2 if i and not j else 1)
        return x.mean((1, 2)) @ p["fc.w"]


class Attention:
    """One block of a transformer, embedding and output included: 4 heads of 8."""

    shapes: ClassVar = {
        "emb.w": (5, 16),
        "q.w": (16, 32),
        "k.w": (16, 32),
        "v.w": (16, 32),
        "o.w": (32, 16),
        "up.w": (16, 24),
        "down.w": (24, 16),
        "out.w": (16, 3),
    }
    x = jax.ShapeDtypeStruct((2, 6, 5), jnp.float32)
    layers = tuple(dense_layer(name.removesuffix(".w"), s) for name, s in shapes.items())

    @staticmethod
    def fn(p, x):
        h = x @ p["emb.w"]
        q, k, v = ((h @ p[f"{n}.w"]).reshape(*x.shape[:2], 4, 8) for n in "qkv")
        a = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k) / 8**0.5, axis=-1)
        h = h + jnp.einsum("bhts,bshd->bthd", a, v).reshape(*x.shape[:2], 32) @ p["o.w"]
        return (h + jax.nn.relu(h @ p["up.w"]) @ p["down.w"]) @ p["out.w"]


class Fused:
    """Grouped-query attention in one fused projection: 4 heads of queries read 2 of keys."""

    shapes: ClassVar = {"qkv.w": (6, 64), "o.w": (32, 6)}
    x = jax.ShapeDtypeStruct((2, 5, 6), jnp.float32)
    layers = (dense_layer("qkv", (6, 64)), dense_layer("o", (32, 6)))

    @staticmethod
    def fn(p, x):
        q, k, v = jnp.split(x @ p["qkv.w"], [32, 48], -1)
        k, v = (jnp.repeat(y.reshape(*x.shape[:2], 2, 8), 2, 2) for y in (k, v))
        q = q.reshape(*x.shape[:2], 4, 8)
        a = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k) / 8**0.5, axis=-1)
        return jnp.einsum("bhts,bshd->bthd", a, v).reshape(*x.shape[:2], 32) @ p["o.w"]


class Stacked:
    """Three residual layers in one scan: their weights are stacked."""

    shapes: ClassVar = {"in.w": (3, 6), "up.w": (3, 6, 8), "down.w": (3, 8, 6), "out.w": (6, 2)}
    x = jax.ShapeDtypeStruct((1, 3), jnp.float32)
    layers = (
        dense_layer("in", (3, 6)),
        Layer("up", "Linear", "up.w", (3, 6, 8), (2,), (1,), stack_axes=(0,)),
        Layer("down", "Linear", "down.w", (3, 8, 6), (2,), (1,), stack_axes=(0,)),
        dense_layer("out", (6, 2)),
    )

    @staticmethod
    def fn(p, x):
        def layer(h, w):
            return h + jax.nn.relu(h @ w[0]) @ w[1], None

        return jax.lax.scan(layer, x @ p["in.w"], (p["up.w"], p["down.w"]))[0] @ p["out.w"]


def from_graph(graph):
    """The function that a layer graph of ``golden/cases.json`` describes, in torch's layout."""

    def fn(p, x):
        values = {"input": x}
        for node in graph:
            xs = [values[name] for name in node["inputs"]]
            values[node["name"]] = _operation(node, p, *xs)
        return values[graph[-1]["name"]]

    return fn


def _operation(node, p, x, *others):
    def get(part):
        return p.get(f"{node['name']}.{part}")

    match node["op"]:
        case "linear":
            return x @ get("weight").T + get("bias")[None]
        case "conv2d":
            y = conv(x, get("weight"), node["stride"][0], node["groups"], NCHW)
            bias = get("bias")
            return y if bias is None else y + bias[None, :, None, None]
        case "batchnorm2d":
            return x * get("weight")[None, :, None, None] + get("bias")[None, :, None, None]
        case "relu":
            return jax.nn.relu(x)
        case "add":
            return x + others[0]
        case "concat":
            return jnp.concatenate([x, *others], node["axis"])
        case "global_avg_pool":
            return x.mean((2, 3), keepdims=True)
        case "flatten":
            return x.reshape(x.shape[0], -1)
    raise ValueError(node["op"])
