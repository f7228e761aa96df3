"""Small pieces of many layers in one vector, so that XLA compiles one loop for all their shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from purepruning.arrays import spans_devices
from purepruning.selection.keys import Piece

#: Pieces of up to this many elements are small. Copying them takes little beside reading them.
SMALL = 524_288


def in_chunks(like: Array) -> bool:
    """Whether JAX reads weights best a chunk at a time: on one CPU device."""
    return jax.default_backend() == "cpu" and not spans_devices(like)


def is_small(piece: Piece) -> bool:
    """Whether a piece is read from a vector that it shares with others: in JAX, on one CPU."""
    like = piece.arrays[0]
    return isinstance(like, jax.Array) and in_chunks(like) and piece.size <= SMALL


def kind(piece: Piece) -> Any:
    """Returns what pieces have in common that are scored alike: the function, and the dtypes."""
    layer_stats = jax.tree.map(jnp.result_type, piece.layer_stats)
    return piece.score, tuple(a.dtype for a in piece.arrays), str(layer_stats)


def joined(arrays: Sequence[tuple[Array, ...]], room: int = 0) -> tuple[Array, ...]:
    """Returns vectors that hold the arrays of all pieces, one behind the other, and zeros behind.

    XLA copies into such vectors without compiling anything.
    """
    fill = tuple(jnp.zeros(room, a.dtype) for a in arrays[0])
    return tuple(
        jnp.concatenate([a.reshape(-1) for a in some]) for some in zip(*arrays, fill, strict=True)
    )
