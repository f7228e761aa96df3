"""What is kept or pruned as a whole: how a weight divides into units, and back.

Everything here is decided from shapes alone. :class:`Grid` says how one weight is cut: each axis is
split into tiles, and each of the resulting axes counts stack members, counts units, or lies inside
a unit. Scores reduce over the inside; masks broadcast over it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from purepruning.arguments import ordered, shown, whole_number
from purepruning.arrays import NUMPY, namespace, replicated
from purepruning.layers import Layer


@dataclasses.dataclass(frozen=True)
class Block:
    """Tiles of a weight, pruned whole.

    Attributes:
        shape: tile size for each axis of the weight: output axes first, then input axes, then
            kernel taps, whatever order the framework stores them in. ``-1`` is the whole axis; axes
            beyond the given sizes have size 1. Where a size does not divide an axis, the last tile
            is smaller.
    """

    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        shape = ordered(self.shape, "Block: shape", "a tuple of sizes")
        for size in shape:
            whole_number(size, "Block: shape: every size", -1)
        if not shape or 0 in shape:
            raise ValueError(f"Block: shape must hold positive integers or -1, got {shape}")
        object.__setattr__(self, "shape", tuple(map(int, shape)))


@dataclasses.dataclass(frozen=True)
class NM:
    """N:M sparsity: of every ``of`` consecutive weights along the contraction axis, ``keep`` stay.

    Both are named because the literature disagrees on which of them N:M counts.
    """

    keep: int
    of: int

    def __post_init__(self) -> None:
        of = whole_number(self.of, "NM: of", 2, 2**31 - 1)
        keep = whole_number(self.keep, "NM: keep", 1)
        if keep >= of:
            raise ValueError(f"NM: keep must be less than of, got keep={shown(keep)}, of={of}")
        object.__setattr__(self, "keep", keep)
        object.__setattr__(self, "of", of)


Granularity = Literal["element", "output_channel", "input_channel"] | Block | NM


@dataclasses.dataclass(frozen=True)
class Grid:
    """How one weight divides into units.

    Attributes:
        shape: shape of the weight.
        tiles: number of tiles along each axis.
        sizes: tile size along each axis; ``tiles * sizes`` may exceed ``shape`` at the edge.
        stack: axes of the split weight that count stack members. Axis ``a`` of the weight becomes
            the axes ``2 * a`` (which tile) and ``2 * a + 1`` (where in it).
        units: axes of the split weight that index the units, in the order in which units count.
        across: how units are reduced of which this process has a shard
            (:class:`purepruning.shards.Across`); None where it has all weights.
    """

    shape: tuple[int, ...]
    tiles: tuple[int, ...]
    sizes: tuple[int, ...]
    stack: tuple[int, ...]
    units: tuple[int, ...]
    across: Any = None

    @functools.cached_property
    def split(self) -> tuple[int, ...]:
        """Shape of the weight with every axis split into tiles."""
        return tuple(n for pair in zip(self.tiles, self.sizes, strict=True) for n in pair)

    @functools.cached_property
    def inside(self) -> tuple[int, ...]:
        """Axes of the split weight that lie inside a unit."""
        used = {*self.stack, *self.units}
        return tuple(a for a in range(len(self.split)) if a not in used)

    @property
    def n_stacked(self) -> int:
        """Number of stacked layers; 1 where there is no stack."""
        return math.prod(self.split[a] for a in self.stack)

    @property
    def n_units(self) -> int:
        """Number of units of one stacked layer."""
        return math.prod(self.split[a] for a in self.units)

    @functools.cached_property
    def cost(self) -> int | np.ndarray:
        """Number of weights in a unit: one int, or ``(n_units,)`` where edge tiles are smaller."""
        whole = math.prod(
            n for a, n in enumerate(self.shape) if not {2 * a} & {*self.stack, *self.units}
        )
        if not self.is_padded:
            return whole * math.prod(self.sizes[a // 2] for a in self.units)
        cost = np.asarray(whole)
        for a in self.units:
            n, size = self.shape[a // 2], self.sizes[a // 2]
            cost = np.multiply.outer(
                cost, np.minimum(size, n - size * np.arange(self.tiles[a // 2]))
            )
        return cost.reshape(-1)

    @functools.cached_property
    def repeats(self) -> np.ndarray:
        """How often each weight of a unit must count for all units to count equally many.

        Whole numbers that broadcast to the split weight; all 1 where no tile is smaller.
        """
        cost = np.ones((1,) * len(self.split), np.int64)
        for a in self.units:
            n, size = self.shape[a // 2], self.sizes[a // 2]
            along = [1] * len(self.split)
            along[a] = self.tiles[a // 2]
            cost = cost * np.minimum(size, n - size * np.arange(along[a])).reshape(along)
        return np.lcm.reduce(np.unique(cost)) // cost

    @property
    def is_padded(self) -> bool:
        """Whether some tile at the edge is smaller than the others."""
        return any(t * s != n for t, s, n in zip(self.tiles, self.sizes, self.shape, strict=True))

    @property
    def is_split(self) -> bool:
        """Whether some axis is divided into tiles of more than one weight."""
        return any(s != 1 for s in self.sizes)


def grid(layer: Layer, granularity: Granularity) -> Grid:
    """Returns how the weight of ``layer`` divides into units of ``granularity``.

    Raises:
        ValueError: the layer has no such axis, or too few axes for the block.
    """
    shape, stack = layer.shape, layer.stack_axes
    ones = (1,) * len(shape)
    stacked = tuple(2 * a for a in stack)
    if granularity == "element":
        units = tuple(2 * a for a in range(len(shape)) if a not in stack)
        return Grid(shape, shape, ones, stacked, units)
    if isinstance(granularity, Block):
        tiles, sizes = _block(layer, granularity)
        units = tuple(2 * a for a in range(len(shape)) if a not in stack)
        return Grid(shape, tiles, sizes, stacked, units)
    side = "out" if granularity == "output_channel" else "in"
    axes, other = layer.out_axes, layer.in_axes
    if side == "in":
        axes, other = other, axes
    if not axes:
        raise ValueError(
            f"layer {layer.name!r} of type {layer.type!r} has no {side}put axis, so its weight of "
            f"shape {shape} has no unit {granularity!r}"
        )
    tiles_, sizes_ = list(shape), list(ones)
    units = tuple(2 * a for a in axes)
    if layer.groups > 1 and layer.grouped == side:
        # The channel axis is stored per group; the groups are on the leading other axis.
        lead = other[0]
        tiles_[lead], sizes_[lead] = layer.groups, shape[lead] // layer.groups
        units = (2 * lead, *units)
    return Grid(shape, tuple(tiles_), tuple(sizes_), stacked, units)


def has_units(layer: Layer, granularity: Granularity) -> bool:
    """Whether the weight of ``layer`` has the axes that units of ``granularity`` lie along."""
    if 0 in layer.shape:
        return False
    if granularity == "element":
        return True
    if isinstance(granularity, Block):
        axes = len(layer.shape) - len(layer.stack_axes)
        return len(granularity.shape) <= axes
    return bool(layer.out_axes if granularity == "output_channel" else layer.in_axes)


def _block(layer: Layer, block: Block) -> tuple[tuple[int, ...], tuple[int, ...]]:
    order = (*layer.out_axes, *layer.in_axes, *layer.spatial_axes)
    if len(block.shape) > len(order):
        raise ValueError(
            f"layer {layer.name!r}: {block} has {len(block.shape)} sizes, but its weight of shape "
            f"{layer.shape} has {len(order)} axes to tile"
        )
    sizes = [1] * len(layer.shape)
    for axis, size in zip(order, block.shape, strict=False):
        sizes[axis] = layer.shape[axis] if size == -1 else min(size, layer.shape[axis])
    tiles = [-(-n // s) for n, s in zip(layer.shape, sizes, strict=True)]
    return tuple(tiles), tuple(sizes)


def fold(
    xp: Any,
    weight: Any,
    g: Grid,
    reduce: Callable[..., Any],
    single: Callable[[Any], Any] | None = None,
) -> Any:
    """Returns ``(stacked, units)`` from ``reduce(array, axes)`` over what lies inside each unit.

    ``reduce`` drops the axes it is given; edges of the weight are filled up with zeros (False).
    Units of one weight each are not reduced: they are ``single(weight)``, or the weight itself.
    Of a shard, ``g.across`` says what the whole is; ``reduce`` is then given it, and what every
    process gets is of all units.
    """
    order, inside = (*g.stack, *g.units), g.inside
    if g.is_split:
        weight = xp.reshape(_pad(xp, replicated(weight), g), g.split)
    else:
        order, inside = tuple(a // 2 for a in order), tuple(a // 2 for a in inside if a % 2 == 0)
    left = sorted(order)
    if single is not None and not inside:
        weight = single(weight)
    if g.across is not None:
        folded = reduce(weight, inside, across=g.across) if inside else weight
        folded = xp.reshape(g.across.everywhere(folded), tuple(g.shape[a] for a in left))
    else:
        folded = reduce(weight, inside) if inside else weight
    folded = xp.permute_dims(folded, tuple(left.index(a) for a in order))
    return xp.reshape(folded, (g.n_stacked, g.n_units))


def by_unit(xp: Any, weight: Any, g: Grid) -> Any:
    """Returns ``weight`` as ``(stacked, units, inside)``, edges filled up with zeros."""
    split = xp.reshape(_pad(xp, replicated(weight), g), g.split)
    parts = xp.permute_dims(split, (*g.stack, *g.units, *g.inside))
    return xp.reshape(parts, (g.n_stacked, g.n_units, -1))


def spread(xp: Any, keep: Any, g: Grid) -> Any:
    """Returns a mask that broadcasts to the weight, from ``keep`` of shape ``(stacked, units)``."""
    order = (*g.stack, *g.units, *g.inside)
    shape = (*(g.split[a] for a in (*g.stack, *g.units)), *(1 for _ in g.inside))
    mask = xp.permute_dims(
        xp.reshape(keep, shape), tuple(order.index(a) for a in range(len(order)))
    )
    # Where an axis has several tiles, every weight in a tile repeats the tile's bit; where the mask
    # does not vary along an axis, that axis stays of size 1.
    tiled, merged = list(mask.shape), []
    for axis, size in enumerate(g.sizes):
        if tiled[2 * axis] > 1:
            tiled[2 * axis + 1] = size
        merged.append(tiled[2 * axis] * tiled[2 * axis + 1])
    mask = xp.reshape(xp.broadcast_to(mask, tuple(tiled)), tuple(merged))
    return mask[tuple(slice(0, n) for n in g.shape)] if g.is_padded else mask


def any_of(mask: Any, axes: tuple[int, ...], across: Any = None) -> Any:
    """Returns whether anything is kept along ``axes``; a reduction for :func:`fold`."""
    xp = namespace(mask)
    if across is None:
        return xp.any(mask, axis=axes)
    found = xp.astype(xp.any(mask, axis=axes, keepdims=True), xp.uint8)
    return across.totals([found], "MAX")[0] > 0


def _pad(xp: Any, weight: Any, g: Grid) -> Any:
    if xp is np or xp is NUMPY:
        return _padded(weight, g) if g.is_padded else weight
    for axis, (tiles, size, n) in enumerate(zip(g.tiles, g.sizes, g.shape, strict=True)):
        if tiles * size > n:
            fill = list(weight.shape)
            fill[axis] = tiles * size - n
            weight = xp.concat(
                [weight, xp.zeros_like(weight[tuple(slice(0, f) for f in fill)])], axis=axis
            )
    return weight


def _padded(weight: np.ndarray, g: Grid) -> np.ndarray:
    """Returns what :func:`_pad` does, by one copy."""
    result = np.zeros([t * s for t, s in zip(g.tiles, g.sizes, strict=True)], weight.dtype)
    result[tuple(slice(0, n) for n in weight.shape)] = weight
    return result
