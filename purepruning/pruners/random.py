"""Random pruning: the floor that every criterion has to beat."""

from __future__ import annotations

import zlib
from typing import Any

from purepruning.config import Config
from purepruning.layers import Layer
from purepruning.namespace import bits_float, int32, iota, key_words, namespace
from purepruning.pieces import Piece
from purepruning.select import Criterion, prune
from purepruning.units import Grid


def random_pruning(params: Any, stats: Any, config: Config) -> Any:
    """Returns masks that prune units at random.

    The key stands in the place of the statistics: a seed below 2**32, a ``jax.random`` key, or two
    32-bit words in an integer array or tensor; seed 5 and ``jax.random.key(5)`` are the same. Every
    unit's score is a hash of the key, the layer's name and the unit's position, so that
    masks are the same in every framework, a layer's mask does not depend on the other layers, and
    ``vmap`` over keys gives many masks at once. For configs of any granularity. See
    :func:`purepruning.prune` for the form of the masks and errors.

    Raises:
        TypeError: no key was given, or something that is not one.
        ValueError: a seed that is no 32-bit number.
    """
    return prune(_RANDOM, params, key_words(stats), config)


def _mix(x: Any) -> Any:
    """Returns a well-mixed 32-bit word; the constants are Chris Wellons's lowbias32."""
    x = (x ^ _shift(x, 16)) * 0x7FEB352D
    x = (x ^ _shift(x, 15)) * (0x846CA68B - 2**32)
    return x ^ _shift(x, 16)


def _shift(x: Any, by: int) -> Any:
    return (x >> by) & ((1 << (32 - by)) - 1)


def _of(words: tuple[Any, Any], layer: Layer) -> tuple[Any, Any, int]:
    return *words, zlib.crc32(layer.name.encode()) & 0x7FFFFFFF


def _score(index: Any, own: tuple[Any, Any, Any]) -> Any:
    xp = namespace(index)
    high, low, name = (int32(xp, word, index) for word in own)
    first = _mix(high ^ name)
    second = _mix(low ^ first)
    bits = _mix(_mix(index ^ first) + second)
    # 30 random bits as a finite positive float: nearly all distinct, in the order of the bits.
    return bits_float(xp, bits & 0x3FFFFFFF)


def _element(weight: Any, own: tuple[Any, Any, Any]) -> Piece:
    return Piece((weight,), _score_element, own)


def _score_element(arrays: tuple[Any, ...], index: Any, own: tuple[Any, Any, Any]) -> Any:
    return _score(index, own)


def _unit(weight: Any, own: tuple[Any, Any, Any], g: Grid) -> Any:
    xp = namespace(weight)
    index = xp.reshape(iota(xp, g.n_members * g.n_units, weight), (g.n_members, g.n_units))
    return _score(index, own)


_RANDOM = Criterion("random_pruning", element=_element, channel=_unit, block=_unit, of=_of)
