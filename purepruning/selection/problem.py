"""What one call of selection solves: layers and pools without counts, stacked layers apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from purepruning.arrays import int32, is_numpy, is_torch, namespace
from purepruning.config.config import Pool
from purepruning.config.rules import Scope
from purepruning.granularity import Granularity
from purepruning.layers import Layer
from purepruning.selection import kth_host, kth_jax, kth_torch
from purepruning.selection.criterion import Score
from purepruning.selection.keys import Piece, wrapped


class Problem(NamedTuple):
    """What is static about a call: how to score, and the config without counts."""

    score: Score
    pools: tuple[Pool, ...]
    scope: Scope
    granularity: Granularity
    rows: bool = False

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All layers, pool by pool."""
        return tuple(layer for pool in self.pools for layer in pool.layers)

    @property
    def caps(self) -> tuple[int, ...]:
        """The most units each layer may lose; none in layer scope."""
        return self.pools[0].caps if self.scope == "global" else ()


# Masks by parameter path, and by layer name whether one of its scores is NaN.
Solved = tuple[dict[str, Any], dict[str, Any]]


def kernel_of(like: Any) -> ModuleType:
    """Returns the module that selects best in the framework of ``like``; all find the same."""
    if is_numpy(like):
        return kth_host
    return kth_torch if is_torch(like) else kth_jax


def n_stacked(layer: Layer) -> int:
    """Returns how many layers are stacked in one."""
    return math.prod(layer.shape[a] for a in layer.stack_axes)


def counts_of_rows(like: Any, counts: dict[str, Any], plan: Problem) -> Any:
    """Returns how many units go: ``(rows,)``, of every layer and each of those stacked in it."""
    pools = [(pool.name, n_stacked(layer)) for pool in plan.pools for layer in pool.layers]
    known = [counts[name] for name, n in pools for _ in range(n)]
    xp = namespace(like)
    if all(isinstance(count, int) for count in known):
        return int32(xp, np.asarray(known, np.int32), like)
    return xp.stack([int32(xp, count, like) for count in known])


def unstacked(piece: Piece, stack_axes: tuple[int, ...]) -> list[Piece]:
    """Returns one piece for each of the layers stacked in this one."""
    if not stack_axes:
        return [piece]
    xp = namespace(piece.arrays[0])
    rest = tuple(a for a in range(len(piece.shape)) if a not in stack_axes)
    shape = tuple(piece.shape[a] for a in rest)
    order, size = (*stack_axes, *rest), math.prod(shape)
    stacks = [xp.reshape(xp.permute_dims(x, order), (-1, *shape)) for x in piece.arrays]
    return [
        piece._replace(arrays=tuple(stack[i, ...] for stack in stacks), offset=wrapped(i * size))
        for i in range(stacks[0].shape[0])
    ]


def restack(keep: Sequence[Any], shape: tuple[int, ...], stack_axes: tuple[int, ...]) -> Any:
    """Returns one array of ``shape`` from those of the layers stacked in it."""
    if not stack_axes:
        return keep[0]
    xp = namespace(keep[0])
    order = (*stack_axes, *(a for a in range(len(shape)) if a not in stack_axes))
    stacked = xp.reshape(xp.stack(list(keep)), tuple(shape[a] for a in order))
    return xp.permute_dims(stacked, tuple(order.index(a) for a in range(len(order))))
