"""What is pruned: parameters of realistic shapes, the same numbers in both frameworks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

import purepruning as pp


def normal(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    weights = np.random.default_rng(seed).standard_normal(shape, np.float32)
    weights *= 0.02
    return weights


def transformer(blocks: int, width: int, vocabulary: int) -> dict[str, np.ndarray]:
    """Returns the matrices of a decoder, ``(out, in)`` as PyTorch stores them."""
    shapes = {"embedding.weight": (vocabulary, width)}
    for i in range(blocks):
        block = f"block{i:02d}"
        shapes[f"{block}.attention.qkv.weight"] = (3 * width, width)
        shapes[f"{block}.attention.out.weight"] = (width, width)
        shapes[f"{block}.mlp.up.weight"] = (4 * width, width)
        shapes[f"{block}.mlp.down.weight"] = (width, 4 * width)
    return {name: normal(shape, seed) for seed, (name, shape) in enumerate(shapes.items())}


def residual_network(blocks: tuple[int, ...], width: int) -> dict[str, np.ndarray]:
    """Returns the kernels of a bottleneck ResNet, ``(height, width, in, out)``, and two heads."""
    shapes: list[tuple[int, ...]] = [(7, 7, 3, width)]
    channels = width
    for stage, depth in enumerate(blocks):
        inner = width * 2**stage
        for i in range(depth):
            shapes += [(1, 1, channels, inner), (3, 3, inner, inner), (1, 1, inner, 4 * inner)]
            if i == 0:
                shapes.append((1, 1, channels, 4 * inner))
            channels = 4 * inner
    shapes += [(1, 1, channels, channels // 2), (1, 1, channels // 2, 1000)]
    return {f"layer{i:03d}.kernel": normal(shape, i) for i, shape in enumerate(shapes)}


def different_convolutions(count: int) -> dict[str, np.ndarray]:
    """Returns kernels of 1, 9 and 25 taps, ``(height, width, in, out)``, no two of one shape."""
    kernels = {}
    for i in range(count):
        size, most = ((1, 896), (3, 190), (5, 110))[i % 3]
        shape = (size, size, 24 + i * (most - 24) // (count - 1), 24 + i * 53 % (most - 23))
        kernels[f"layer{i:03d}.kernel"] = normal(shape, i)
    return kernels


def linear_layers(weights: Mapping[str, Any]) -> list[pp.Layer]:
    return [
        pp.Layer(
            n.removesuffix(".weight"), "Linear", n, tuple(w.shape), out_axes=(0,), in_axes=(1,)
        )
        for n, w in weights.items()
    ]


def convolution_layers(kernels: Mapping[str, Any]) -> list[pp.Layer]:
    return [
        pp.Layer(
            n.removesuffix(".kernel"), "Conv2d", n, tuple(w.shape), out_axes=(3,), in_axes=(2,)
        )
        for n, w in kernels.items()
    ]


def to_jax(weights: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns JAX arrays; each NumPy array is dropped as soon as it is copied."""
    import jax
    import jax.numpy as jnp

    return jax.block_until_ready({name: jnp.array(w) for name, w in weights.items()})


def to_torch(weights: Mapping[str, np.ndarray]) -> dict[str, Any]:
    import torch

    return {name: torch.from_numpy(w) for name, w in weights.items()}


def fingerprint(masks: Mapping[str, Any]) -> tuple[str, int]:
    """Returns a hash of the masks and how many weights they keep."""
    digest, kept = hashlib.sha256(), 0
    for name in sorted(masks):
        mask = np.asarray(masks[name])
        assert mask.dtype == np.bool_
        digest.update(np.packbits(mask).tobytes())
        kept += int(mask.sum())
    return digest.hexdigest(), kept


def nbytes(arrays: Mapping[str, Any]) -> int:
    return sum(int(a.nbytes) for a in arrays.values())
