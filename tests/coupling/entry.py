"""What an entry of the zoo is, and the parameters and inputs it runs on."""

import math
import re
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from purepruning.layers import Layer

Tree = Any


class Entry(NamedTuple):
    """A model: ``build(key) -> (fn, params, inputs)``, where ``fn(params, *inputs)`` runs it.

    ``params`` are all variables of the model, statistics included; the model is in evaluation mode
    and returns an array or a tuple of arrays. ``layers(params, inputs)`` is the layer table that
    its adapter makes, its paths those of ``params``; None where there is no adapter.
    """

    name: str
    framework: str
    family: str
    build: Callable[[jax.Array], tuple[Callable[..., Any], Tree, tuple[jax.Array, ...]]]
    layers: Callable[[Tree, tuple[jax.Array, ...]], tuple[Layer, ...]] | None = None


def fill(tree: Tree, key: jax.Array, *, features: int = -1) -> Tree:
    """``tree`` with every floating leaf drawn anew, from ``key`` and the path of the leaf.

    Kernels are N(0, 1 / fan_in), embeddings N(0, 1), scales and variances U(0.5, 1.5), biases and
    means N(0, 0.3^2): signals keep their size, nothing is constant, and no two channels are alike.
    ``features`` is the axis of output features of a kernel. Leaves may be shapes and dtypes, as
    ``jax.eval_shape`` returns them; arrays that are not floating stay what they are.
    """
    seed = np.ravel(jax.random.key_data(key)).tolist()

    def leaf(path, x):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x if isinstance(x, jax.Array | np.ndarray) else _array(0, x.dtype, x.shape)
        path = jax.tree_util.keystr(path, simple=True, separator="/").lower()
        rng = np.random.default_rng([*seed, zlib.crc32(path.encode())])
        return _array(_draw(rng, path, x.shape, features), x.dtype)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def _draw(rng: np.random.Generator, path: str, shape: tuple[int, ...], features: int) -> np.ndarray:
    # The last name that says what the leaf is: flax.nnx and Haiku have holders below it.
    *owners, name = re.sub(r"(/(value|raw_value|average|hidden|\d+))+$", "", path).split("/")
    owner = owners[-1] if owners else ""
    if re.fullmatch(r"(\d+/)+1", path):  # equinox.nn.State: a mean and a variance without names
        return rng.uniform(0.5, 1.5, shape)
    if re.search("scale|gamma|var$|var_|lambda", name) or (
        name == "weight" and (len(shape) < 2 or "norm" in owner)
    ):
        return rng.uniform(0.5, 1.5, shape)
    if re.search("bias|beta|mean|offset", name) or name == "b" or len(shape) < 2:
        return 0.3 * rng.standard_normal(shape)
    if re.search("emb|pos|token", name) or (name == "weight" and "emb" in owner):
        return rng.standard_normal(shape)
    if re.fullmatch("q|k|v|query|key|value|qkv", owner) and len(shape) > 2 and features == -1:
        fan_in = shape[-3]  # (in, heads, head size)
    else:
        fan_in = math.prod(shape) // shape[features]
    return rng.standard_normal(shape) / math.sqrt(fan_in)


def normal(*shape: int) -> Callable[[jax.Array], jax.Array]:
    """An input of standard normal numbers."""
    return lambda key: _array(_generator(key).standard_normal(shape), np.float32)


def tokens(*shape: int, below: int) -> Callable[[jax.Array], jax.Array]:
    """An input of token numbers."""
    return lambda key: _array(_generator(key).integers(below, size=shape), np.int32)


def _array(x: Any, dtype: Any, shape: tuple[int, ...] | None = None) -> jax.Array:
    """An array of JAX; unlike ``jnp.asarray``, this compiles nothing."""
    x = np.asarray(x, dtype)
    return jax.device_put(x if shape is None else np.broadcast_to(x, shape))


def draw_inputs(inputs: tuple[Callable[[jax.Array], jax.Array], ...], key: jax.Array) -> tuple:
    """The inputs that ``normal`` and ``tokens`` describe."""
    return tuple(draw(jax.random.fold_in(key, i)) for i, draw in enumerate(inputs))


def _generator(key: jax.Array) -> np.random.Generator:
    return np.random.default_rng(np.ravel(jax.random.key_data(key)).tolist())
