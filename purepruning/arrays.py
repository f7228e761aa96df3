"""The one module that knows two frameworks.

Everything else is written once: ``xp = namespace(x)`` at the edge, array-API calls inside. Here
stand the few things that cannot be: which namespace an array belongs to, how a tree is taken apart
and put together, and the operations whose best native form differs.
"""

from __future__ import annotations

import copy
import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

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


def sqrt(x: Any) -> Any:
    """Returns the correctly rounded roots of float32 ``x``; on a CPU those of torch are not."""
    xp = namespace(x)
    if is_torch(x) and x.device.type == "cpu":
        return xp.astype(xp.sqrt(xp.astype(x, xp.float64)), xp.float32)
    return xp.sqrt(x)


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
