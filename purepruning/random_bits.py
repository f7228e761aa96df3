"""Random bits that depend on a key and a position alone, the same in every framework."""

from __future__ import annotations

import functools
import operator
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from purepruning.arguments import shown
from purepruning.arrays import (
    NUMPY,
    bits_float,
    has_values,
    int32,
    is_array,
    is_concrete,
    is_numpy,
    is_torch,
    namespace,
)


def key_words(key: Any) -> tuple[Any, Any]:
    """Returns the two int32 words of a random key: from a seed, a JAX key or words.

    Raises:
        TypeError: ``key`` is none of these, or a batch of them.
        ValueError: a seed that is no 32-bit number.
    """
    if isinstance(key, int | np.integer) and not isinstance(key, bool):
        if not 0 <= key < 2**32:
            raise ValueError(f"a seed must lie in [0, 2**32), got {shown(key)}")
        return 0, int(np.uint32(key).view(np.int32))
    typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not typed and not (is_array(key) and has_values(key)):
        raise TypeError(f"a random key must be a seed, a JAX key or two words, got {shown(key)}")
    shape = tuple(key.shape)
    if typed:
        if shape:
            raise TypeError(f"one random key is needed, {shape} came; map over them with vmap")
        words = _low_word(*_on_host(jax.random.key_data(key)))
        # Some generators have keys of four words.
        return functools.reduce(operator.xor, words[0::2]), functools.reduce(
            operator.xor, words[1::2]
        )
    xp = namespace(key)
    if not xp.isdtype(key.dtype, "integral"):
        raise TypeError(f"a random key must be a seed, a JAX key or two words, got {shown(key)}")
    if shape not in ((), (2,)):
        raise TypeError(f"a random key must be a scalar or two words, got shape {shape}")
    words = _low_word(*_on_host(key))
    return (words * 0, words) if shape == () else (words[0], words[1])


def _on_host(key: Any) -> tuple[Any, Any]:
    """Returns the namespace of a key, and the key; NumPy's where its numbers are known.

    So a key of one framework serves every other, and nothing is compiled.
    """
    if is_torch(key) and is_concrete(key):
        return NUMPY, key.detach().cpu().numpy()
    if isinstance(key, jax.Array) and is_concrete(key) and key.is_fully_addressable:
        return NUMPY, np.asarray(key)
    return namespace(key), key


def _low_word(xp: Any, x: Any) -> Any:
    """Returns the low 32 bits of integers, as int32."""
    if xp is jnp:
        return jax.lax.bitcast_convert_type(jnp.asarray(x).astype(jnp.uint32), jnp.int32)
    if is_numpy(x):
        return x.astype(np.uint32).view(np.int32)
    return (((x.to(xp.int64) & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000).to(xp.int32)


def _mix(x: Any) -> Any:
    """Returns a well-mixed 32-bit word; the constants are Chris Wellons's lowbias32."""
    x = (x ^ _shift(x, 16)) * 0x7FEB352D
    x = (x ^ _shift(x, 15)) * (0x846CA68B - 2**32)
    return x ^ _shift(x, 16)


def _shift(x: Any, by: int) -> Any:
    return (x >> by) & ((1 << (32 - by)) - 1)


def own_words(words: tuple[Any, Any], name: str) -> tuple[Any, Any, int]:
    """Returns what :func:`noise` hashes: the words of a key, and one of a name."""
    return *words, zlib.crc32(name.encode()) & 0x7FFFFFFF


def noise(index: Any, own: tuple[Any, Any, Any]) -> Any:
    """Returns random positive float32, a hash of int32 positions and of words."""
    # 30 random bits as a finite positive float: nearly all distinct, in the order of the bits.
    return bits_float(namespace(index), _bits(index, own) & 0x3FFFFFFF)


def uniform(index: Any, own: tuple[Any, Any, Any]) -> Any:
    """Returns random float32 in [0, 1), multiples of ``2**-24``, from positions and words."""
    xp = namespace(index)
    return xp.astype(_bits(index, own) & 0xFFFFFF, xp.float32) * 2.0**-24


def _bits(index: Any, own: tuple[Any, Any, Any]) -> Any:
    xp = namespace(index)
    if xp is NUMPY:  # which warns where scalars overflow, as they do here on purpose
        with np.errstate(over="ignore"):
            return _hashed(xp, index, own)
    return _hashed(xp, index, own)


def _hashed(xp: Any, index: Any, own: tuple[Any, Any, Any]) -> Any:
    high, low, name = (int32(xp, word, index) for word in own)
    first = _mix(high ^ name)
    second = _mix(low ^ first)
    return _mix(_mix(index ^ first) + second)
