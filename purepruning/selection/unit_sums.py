"""Exact sums over the units of many layers at once, in JAX.

Summing every layer in its own shape takes XLA several kernels for each shape. Here the layers are
copied into one vector, and two loops go over it, whatever the shapes are: one finds the largest
term of every unit, the other sums limbs (:mod:`purepruning.exact_sum`). A step of a loop looks at a
tile: some terms of some units of one layer. The sums are those of ``exact_sum``, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from purepruning.arrays import bits_float, float_bits
from purepruning.exact_sum import limbs_of, power_of_two_scale, total_of_limbs
from purepruning.granularity import Grid
from purepruning.selection.joined import joined
from purepruning.selection.keys import Piece

#: Units, and terms of each, in a tile.
UNITS, TERMS = 64, 512


class Runs(NamedTuple):
    """Where the units of a layer lie: the weight is an array ``(outer, units, inner)``."""

    outer: int
    units: int
    inner: int

    @property
    def terms(self) -> int:
        """Number of weights in a unit."""
        return self.outer * self.inner


def runs(g: Grid) -> Runs | None:
    """Returns where the units lie; None if their axes are divided, or not side by side, or all."""
    axes = tuple(a // 2 for a in g.units)
    first, last = axes[0], axes[-1]
    if g.stack or g.is_split or axes != tuple(range(first, last + 1)) or len(axes) == len(g.shape):
        return None
    shapes = g.shape[:first], g.shape[first : last + 1], g.shape[last + 1 :]
    return Runs(*map(math.prod, shapes))


def unit_sums(
    pieces: Sequence[Piece], places: Sequence[Runs], keeps: Sequence[Array]
) -> tuple[Array, Array | None]:
    """Returns the sums of the scores of all units, one layer after the other, ``(units,)``.

    Pieces have one function of scores, which are not negative, and arrays of the same dtypes. The
    second result says which units have a weight that ``keeps``, one mask for each piece, keep; None
    if there are none.
    """
    tiles = _tiles(pieces, places)
    owner = np.repeat(np.arange(len(places)), [place.units for place in places])
    bits, limbs = np.asarray([limbs_of(place.terms) for place in places], np.int32).T
    largest = (126 - bits * (limbs - 1))[owner]
    top, kept = _largest(tiles, keeps)
    scale, unscale = power_of_two_scale(top, jnp.asarray(bits[owner]), jnp.asarray(largest))
    totals = _limbs(tiles, scale, bits, limbs)
    result = total_of_limbs(totals, jnp.asarray(np.exp2(-bits), jnp.float32)[owner])
    return jnp.where(jnp.isfinite(top), result * unscale, top), kept


class _Tiles(NamedTuple):
    """A loop over tiles.

    Attributes:
        number: number of tiles.
        units: number of units.
        read: ``(tile, vectors) -> parts``: what lies in a tile, of vectors of all weights, each
            ``(terms, units)``; and which of it is in the layer.
        scores: ``tile -> (terms, units)``: the scores in a tile, 0 beyond the layer.
        first: ``tile -> unit``: the first unit of a tile, counted over all layers.
        owner: ``tile -> layer``.
    """

    number: int
    units: int
    read: Callable[[Array, tuple[Array, ...]], tuple[tuple[Array, ...], Array, Array]]
    scores: Callable[[Array], Array]
    first: Callable[[Array], Array]
    owner: Callable[[Array], Array]


def _tiles(pieces: Sequence[Piece], places: Sequence[Runs]) -> _Tiles:
    table = np.asarray(
        [
            (i, term, unit)
            for i, place in enumerate(places)
            for term in range(0, place.terms, TERMS)
            for unit in range(0, place.units, UNITS)
        ],
        np.int32,
    )
    owner_of, term_of, unit_of = map(jnp.asarray, table.T)
    sizes, units = [p.size for p in pieces], [place.units for place in places]
    begin = jnp.asarray(np.cumsum(sizes) - sizes, jnp.int32)
    begin_units = jnp.asarray(np.cumsum(units) - units, jnp.int32)
    place_of = jnp.asarray(places, jnp.int32)
    vectors = joined([p.arrays for p in pieces])
    owns = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(p.layer_stats for p in pieces))
    offsets = jnp.stack([jnp.asarray(p.offset, jnp.int32) for p in pieces])

    def read(j: Array, vectors: tuple[Array, ...]) -> tuple[tuple[Array, ...], Array, Array]:
        owner = owner_of[j]
        outer, units, inner = place_of[owner]
        term = term_of[j] + lax.iota(jnp.int32, TERMS)
        unit = unit_of[j] + lax.iota(jnp.int32, UNITS)
        inside = (term < outer * inner)[:, None] & (unit < units)[None, :]
        term, unit = jnp.minimum(term, outer * inner - 1), jnp.minimum(unit, units - 1)
        row = term // inner * (units * inner) + term % inner
        index = row[:, None] + (unit * inner)[None, :]
        at = begin[owner] + index
        return tuple(v.at[at].get(mode="promise_in_bounds") for v in vectors), inside, index

    def scores(j: Array) -> Array:
        parts, inside, index = read(j, vectors)
        layer_stats = jax.tree.map(lambda leaf: leaf[owner_of[j]], owns)
        piece = Piece(parts, pieces[0].score, layer_stats, offsets[owner_of[j]])
        return jnp.where(inside, piece.scores(parts, index), 0.0)

    return _Tiles(
        number=len(table),
        units=sum(units),
        read=read,
        scores=scores,
        first=lambda j: begin_units[owner_of[j]] + unit_of[j],
        owner=lambda j: owner_of[j],
    )


def _largest(tiles: _Tiles, keeps: Sequence[Array]) -> tuple[Array, Array | None]:
    """Returns the largest score of every unit, and which units are kept."""
    masks = joined([(keep,) for keep in keeps]) if keeps else ()

    def look(j: Array, found: tuple[Array, ...]) -> tuple[Array, ...]:
        first = tiles.first(j)
        new = [jnp.max(float_bits(jnp, tiles.scores(j)) & 0x7FFFFFFF, axis=0)]
        if masks:
            (mask,), inside, _ = tiles.read(j, masks)
            new.append(jnp.any(mask & inside, axis=0))
        old = [lax.dynamic_slice(x, (first,), (UNITS,)) for x in found]
        both = [jnp.maximum(a, b) for a, b in zip(old, new, strict=True)]
        return tuple(
            lax.dynamic_update_slice(x, y, (first,)) for x, y in zip(found, both, strict=True)
        )

    room = tiles.units + UNITS
    # Integers have the order of the floats: see largest_magnitude of exact_sum.
    start = (jnp.zeros(room, jnp.int32), *(jnp.zeros(room, bool) for _ in masks))
    top, *kept = lax.fori_loop(0, tiles.number, look, start)
    return bits_float(jnp, top[: tiles.units]), kept[0][: tiles.units] if kept else None


def _limbs(tiles: _Tiles, scale: Array, bits: np.ndarray, limbs: np.ndarray) -> list[Array]:
    """Returns the sums of all limbs, the highest first; 0 where a layer has fewer."""
    scale = jnp.concatenate([scale, jnp.ones(UNITS, jnp.float32)])
    shift, number = jnp.asarray(np.exp2(bits), jnp.float32), jnp.asarray(limbs)

    def add(j: Array, totals: Array) -> Array:
        first, owner = tiles.first(j), tiles.owner(j)
        rest = tiles.scores(j) * lax.dynamic_slice(scale, (first,), (UNITS,))[None, :]
        new = []
        for i in range(limbs.max()):
            limb = jnp.where(i < number[owner], rest.astype(jnp.int32), 0)
            new.append(jnp.sum(limb, axis=0, dtype=jnp.int32))
            rest = (rest - limb.astype(jnp.float32)) * shift[owner]
        at = (jnp.int32(0), first)
        old = lax.dynamic_slice(totals, at, (len(new), UNITS))
        return lax.dynamic_update_slice(totals, old + jnp.stack(new), at)

    start = jnp.zeros((limbs.max(), tiles.units + UNITS), jnp.int32)
    totals = lax.fori_loop(0, tiles.number, add, start)
    return list(totals[:, : tiles.units])
