"""The one module that knows two frameworks.

Everything else is written once: ``xp = namespace(x)`` at the edge, array-API calls inside. Here
stand the few things that cannot be: which namespace an array belongs to, how a tree is taken apart
and put together, and the operations whose best native form differs.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


def is_torch(x: Any) -> bool:
    """Whether ``x`` is a torch tensor; never imports torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def namespace(x: Any) -> Any:
    """Returns the array-API namespace of ``x``: ``jax.numpy``, or array-api-compat's torch.

    NumPy arrays and Python scalars belong to ``jax.numpy``.
    """
    return importlib.import_module("array_api_compat.torch") if is_torch(x) else jnp


def compiled(x: Any, function: Callable[..., Any], *static: str) -> Callable[..., Any]:
    """Returns ``function`` compiled for the framework of ``x``: jitted in JAX, itself in torch."""
    return function if is_torch(x) else _jitted(function, static)


@functools.cache
def _jitted(function: Callable[..., Any], static: tuple[str, ...]) -> Callable[..., Any]:
    return jax.jit(function, static_argnames=static)


def is_concrete(x: Any) -> bool:
    """Whether the numbers in ``x`` can be looked at now: no tracer, not under a torch transform."""
    if is_torch(x):
        return not is_batched(x)
    return not isinstance(x, jax.core.Tracer)


def is_batched(x: Any) -> bool:
    """Whether ``x`` is under ``torch.func.vmap``, where shapes cannot depend on data."""
    return is_torch(x) and sys.modules["torch"]._C._functorch.is_batchedtensor(x)


def float_bits(xp: Any, x: Any) -> Any:
    """Returns the bit patterns of float32 ``x`` as int32."""
    return jax.lax.bitcast_convert_type(x, jnp.int32) if xp is jnp else x.view(xp.int32)


def bits_float(xp: Any, bits: Any) -> Any:
    """Returns the float32 numbers whose bit patterns are int32 ``bits``."""
    return jax.lax.bitcast_convert_type(bits, jnp.float32) if xp is jnp else bits.view(xp.float32)


def iota(xp: Any, n: int, like: Any) -> Any:
    """Returns 0, 1, ..., n - 1 as int32, on the device of ``like``."""
    if xp is jnp:
        return jax.lax.iota(jnp.int32, n)
    return xp.arange(n, dtype=xp.int32, device=like.device)


def int32(xp: Any, values: Any, like: Any) -> Any:
    """Returns ``values`` as an int32 array on the device of ``like``."""
    if xp is jnp:
        return jnp.asarray(values, jnp.int32)
    if is_torch(values):
        return values.to(device=like.device, dtype=xp.int32)
    return xp.asarray(values, dtype=xp.int32, device=like.device)


def key_words(key: Any) -> Any:
    """Returns the two int32 words of a random key, shape ``(2,)``: from a seed, a JAX key or words.

    Raises:
        TypeError: ``key`` is none of these.
    """
    if isinstance(key, (int, np.integer)) and not isinstance(key, (bool, np.bool_)):
        seed = np.array([key >> 32 & 0xFFFFFFFF, key & 0xFFFFFFFF], np.uint32)
        return tuple(seed.view(np.int32).tolist())
    if not is_torch(key) and jnp.issubdtype(getattr(key, "dtype", np.float32), jax.dtypes.prng_key):
        key = jax.random.key_data(key)
    xp = namespace(key)
    integer = hasattr(key, "dtype") and xp.isdtype(key.dtype, "integral")
    if not integer or tuple(key.shape) not in ((), (2,)):
        got = f"{key.dtype} of shape {tuple(key.shape)}" if hasattr(key, "dtype") else repr(key)
        raise TypeError(f"a random key must be an integer seed, a JAX key or two words, got {got}")
    if xp is jnp:
        key = jnp.asarray(key)
        words = key if key.dtype.itemsize == 4 else key.astype(jnp.uint32)
        words = jax.lax.bitcast_convert_type(words, jnp.int32)
        return (jnp.zeros_like(words), words) if key.ndim == 0 else (words[0], words[1])
    words = ((key & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000 if key.dtype == xp.int64 else key
    words = words.to(xp.int32)
    return (words * 0, words) if key.ndim == 0 else (words[0], words[1])


def matmul(xp: Any, a: Any, b: Any) -> Any:
    """Returns the product of float32 matrices at full precision, also where the device has less."""
    return jnp.matmul(a, b, precision="highest") if xp is jnp else xp.matmul(a, b)


def erfc(xp: Any, x: Any) -> Any:
    """Returns the complementary error function of ``x``."""
    return jax.scipy.special.erfc(x) if xp is jnp else xp.special.erfc(x)


def zeros(like: Any, shape: tuple[int, ...], dtype: str) -> Any:
    """Returns zeros in the framework, and in torch on the device, of ``like``."""
    if not is_torch(like):
        return jnp.zeros(shape, dtype)
    xp = namespace(like)
    return xp.zeros(shape, dtype=getattr(xp, dtype), device=like.device)


def array_like(like: Any, x: Any) -> Any:
    """Returns ``x``; as a tensor on the device of ``like`` if that is a tensor."""
    if is_torch(x) or not is_torch(like):
        return x
    return namespace(like).asarray(np.array(x), device=like.device)


def stop_gradient(x: Any) -> Any:
    """Returns ``x`` as a constant: no gradient flows through, and none of its history is kept."""
    return x.detach() if is_torch(x) else jax.lax.stop_gradient(x)


def spans_devices(x: Any) -> bool:
    """Whether ``x`` may be laid out over several devices, which under ``jit`` cannot be seen."""
    return not is_torch(x) and jax.device_count() > 1


def replicated(x: Any) -> Any:
    """Returns ``x`` whole on every device of an explicit mesh; for small arrays, such as scores."""
    if is_torch(x):
        return x
    spec = getattr(jax.typeof(x), "sharding", None)
    if spec is None or all(axis is None for axis in spec.spec):
        return x
    return jax.sharding.reshard(x, jax.sharding.PartitionSpec())


class Flat(NamedTuple):
    """A tree taken apart: ``leaves`` by path, in an order that no dict order changes."""

    leaves: dict[str, Any]
    rebuild: Callable[[Mapping[str, Any]], Any]


def flatten(tree: Any) -> Flat:
    """Returns the leaves of ``tree`` by dotted path, and the way back to a tree.

    A leaf's path joins its keys with dots: ``"Dense_0.kernel"``, ``"layers.0.weight"``. The
    ``value`` that Flax NNX puts under every variable is no part of it, so that a state, its
    gradients and an optimizer's copy of it have the same paths. ``rebuild(values)`` gives the same
    tree with ``None`` at every path that ``values`` does not name; for a flat dict of torch
    tensors, which cannot hold ``None`` under ``torch.func.vmap``, it gives a dict of the named ones
    only.

    Raises:
        ValueError: two leaves have the same path, or torch tensors are not in one flat dict.

    >>> flatten({"b": {"w": 1.0}, "a": [2.0, 3.0]}).leaves
    {'a.0': 2.0, 'a.1': 3.0, 'b.w': 1.0}
    """
    if isinstance(tree, Mapping) and tree and all(map(is_torch, tree.values())):
        leaves = {name: tree[name] for name in sorted(tree)}
        return Flat(leaves, lambda values: {n: values[n] for n in leaves if n in values})
    entries, treedef = jax.tree_util.tree_flatten_with_path(tree)
    leaves = {}
    for keys, leaf in entries:
        path = _path(keys)
        if path in leaves:
            raise ValueError(f"two leaves of the tree have the path {path!r}")
        leaves[path] = leaf
    if any(map(is_torch, leaves.values())):
        raise ValueError("torch parameters must be one flat dict of name -> tensor")

    def rebuild(values: Mapping[str, Any]) -> Any:
        return jax.tree_util.tree_unflatten(treedef, [values.get(path) for path in leaves])

    return Flat(leaves, rebuild)


def leaf_paths(tree: Any) -> tuple[str, ...]:
    """Returns the dotted path of every leaf of ``tree``, as layers and configs spell them.

    >>> leaf_paths({"dense": {"kernel": 1.0, "bias": 2.0}})
    ('dense.bias', 'dense.kernel')
    """
    return tuple(flatten(tree).leaves)


def _path(keys: tuple[Any, ...]) -> str:
    if len(keys) > 1 and keys[-1] == jax.tree_util.GetAttrKey("value"):
        keys = keys[:-1]
    return jax.tree_util.keystr(keys, simple=True, separator=".")
