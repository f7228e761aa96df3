"""The one module that knows two frameworks.

Everything else is written once: ``xp = namespace(x)`` at the edge, array-API calls inside. Here
stand the few things that cannot be: which namespace an array belongs to, how a tree is taken apart
and put together, and the operations whose best native form differs.
"""

from __future__ import annotations

import copy
import functools
import importlib
import operator
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
    if not is_torch(x):
        return jnp
    # torch.compile can look a module up, but not import it.
    name = "array_api_compat.torch"
    return sys.modules.get(name) or importlib.import_module(name)


def host_namespace(x: Any) -> Any:
    """Returns NumPy for its own arrays, else :func:`namespace`: for counters that steer a loop."""
    return np if isinstance(x, np.ndarray | np.generic) else namespace(x)


def compiled(x: Any, function: Callable[..., Any], *static: str) -> Callable[..., Any]:
    """Returns ``function`` compiled for the framework of ``x``: jitted in JAX, itself in torch."""
    return function if is_torch(x) else _jitted(function, static)


@functools.cache
def _jitted(function: Callable[..., Any], static: tuple[str, ...]) -> Callable[..., Any]:
    return jax.jit(function, static_argnames=static)


def copied(x: Any) -> Any:
    """Returns a copy of one leaf that shares no memory and no gradient history with it."""
    if is_torch(x):
        return x.detach().clone()
    return jnp.array(x, copy=True) if isinstance(x, jax.Array) else copy.deepcopy(x)


def is_concrete(x: Any) -> bool:
    """Whether the numbers in ``x`` can be looked at now: no tracer, not under a torch transform."""
    if is_torch(x):
        return not is_batched(x)
    return not isinstance(x, jax.core.Tracer)


def is_on_host(x: Any) -> bool:
    """Whether NumPy can see ``x`` where it lies: a JAX array of numbers on one CPU device."""
    if not isinstance(x, jax.Array) or not is_concrete(x):
        return False
    devices = x.devices()
    plain = not jnp.issubdtype(x.dtype, jax.dtypes.extended)
    return plain and len(devices) == 1 and next(iter(devices)).platform == "cpu"


def by_numpy(function: Callable[..., np.ndarray], x: jax.Array, *more: jax.Array) -> jax.Array:
    """Returns what NumPy computes, laid out as ``x`` is; all :func:`is_on_host`.

    For what is done once: XLA would compile a kernel for every shape.
    """
    # A step whose first call gets some committed arrays and others is compiled a second time.
    with jax.default_device(next(iter(x.devices()))):
        place = x.sharding if x.committed else None
        return jax.device_put(function(*map(np.asarray, (x, *more))), place)


def is_batched(x: Any) -> bool:
    """Whether ``x`` is under ``torch.func.vmap``, where shapes cannot depend on data."""
    if not is_torch(x):
        return False
    functorch = sys.modules["torch"]._C._functorch
    # Under vmap of grad the batch is inside what tracks the gradient.
    while functorch.is_gradtrackingtensor(x):
        x = functorch.get_unwrapped(x)
    return functorch.is_batchedtensor(x)


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
    # A copy, since torch warns of arrays it may not write to, such as those of JAX.
    return xp.asarray(np.array(values), dtype=xp.int32, device=like.device)


def key_words(key: Any) -> tuple[Any, Any]:
    """Returns the two int32 words of a random key: from a seed, a JAX key or words.

    Raises:
        TypeError: ``key`` is none of these, or a batch of them.
        ValueError: a seed that is no 32-bit number.
    """
    if isinstance(key, int | np.integer) and not isinstance(key, bool):
        if not 0 <= key < 2**32:
            raise ValueError(f"a seed must lie in [0, 2**32), got {key}")
        return 0, int(np.uint32(key).view(np.int32))
    shape = tuple(getattr(key, "shape", ()))
    if not is_torch(key) and jnp.issubdtype(getattr(key, "dtype", np.float32), jax.dtypes.prng_key):
        if shape:
            raise TypeError(f"one random key is needed, {shape} came; map over them with vmap")
        words = jax.lax.bitcast_convert_type(jax.random.key_data(key), jnp.int32)
        # Some generators have keys of four words.
        return functools.reduce(operator.xor, words[0::2]), functools.reduce(
            operator.xor, words[1::2]
        )
    xp = namespace(key)
    if not hasattr(key, "dtype") or not xp.isdtype(key.dtype, "integral"):
        raise TypeError(f"a random key must be a seed, a JAX key or two words, got {key!r}")
    if shape not in ((), (2,)):
        raise TypeError(f"a random key must be a scalar or two words, got shape {shape}")
    words = _low_word(xp, key)
    return (words * 0, words) if shape == () else (words[0], words[1])


def _low_word(xp: Any, x: Any) -> Any:
    """Returns the low 32 bits of integers, as int32."""
    if xp is jnp:
        return jax.lax.bitcast_convert_type(jnp.asarray(x).astype(jnp.uint32), jnp.int32)
    return (((x.to(xp.int64) & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000).to(xp.int32)


def part(x: Any, start: Any, size: int) -> Any:
    """Returns ``size`` elements of a vector from ``start`` on, which may be traced."""
    if is_torch(x):
        return x[start : start + size]
    return jax.lax.dynamic_slice(x, (start,), (size,))


def matmul(xp: Any, a: Any, b: Any) -> Any:
    """Returns the product of float32 matrices; in JAX at full precision whatever the default is.

    In torch the user's setting holds, ``torch.backends.cuda.matmul.allow_tf32``.
    """
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
    if is_torch(x):
        return x.detach()
    return jax.lax.stop_gradient(x) if isinstance(x, jax.core.Tracer) else x


def spans_devices(x: Any) -> bool:
    """Whether ``x`` may be laid out over several devices, which under ``jit`` cannot be seen."""
    return not is_torch(x) and jax.device_count() > 1


def replicated(x: Any) -> Any:
    """Returns ``x`` whole on every device of an explicit mesh, where axes cannot be split."""
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
    ``value`` in a variable of Flax NNX is no part of it, so that a state, its gradients and an
    optimizer's copy of it have the same paths. ``rebuild(values)`` gives the same
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
    treedef = jax.tree_util.tree_structure(tree)
    leaves = {}
    # Flax's boxes are nodes with a value in them; the path ends at the box.
    for keys, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_box):
        path = jax.tree_util.keystr(keys, simple=True, separator=".")
        for leaf in jax.tree_util.tree_leaves(node) if _is_box(node) else [node]:
            if path in leaves:
                raise ValueError(f"two leaves of the tree have the path {path!r}")
            leaves[path] = leaf
    if any(map(is_torch, leaves.values())):
        odd = next((path for path, leaf in leaves.items() if not is_torch(leaf)), None)
        entry = "" if odd is None else f"; the entry {odd!r} is no tensor"
        raise ValueError(f"torch parameters must be one flat dict of name -> tensor{entry}")

    def rebuild(values: Mapping[str, Any]) -> Any:
        return jax.tree_util.tree_unflatten(treedef, [values.get(path) for path in leaves])

    return Flat(leaves, rebuild)


def leaf_paths(tree: Any) -> tuple[str, ...]:
    """Returns the dotted path of every leaf of ``tree``, as layers and configs spell them.

    >>> leaf_paths({"dense": {"kernel": 1.0, "bias": 2.0}})
    ('dense.bias', 'dense.kernel')
    """
    return tuple(flatten(tree).leaves)


def _is_box(x: Any) -> bool:
    """Whether ``x`` is one of Flax's boxes around an array: an NNX variable, Linen's metadata."""
    nnx, meta = sys.modules.get("flax.nnx"), sys.modules.get("flax.core.meta")
    if nnx is not None and isinstance(x, nnx.Variable):
        return True
    return meta is not None and isinstance(x, meta.AxisMetadata)
