"""The search for the k-th smallest in JAX: pivots, and what they count.

All pieces are searched side by side, in vectors ``(pieces,)``. In global scope they first share one
bracket and one target; when it is closed, each is dealt a count of its own, and the same loop goes
on for those that are not cut exactly yet. How elements are counted is a :class:`Counter`'s matter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from purepruning.selection.keys import HIGHEST, LOWEST, Threshold

# Where 64-bit types are enabled, a sum of int32 is int64 unless told otherwise.
int32_sum = functools.partial(jnp.sum, dtype=jnp.int32)


class Bracket(NamedTuple):
    """The key to cut at lies in ``(lo, hi]``; ``below``, ``upto`` count the keys up to its ends."""

    lo: Array
    hi: Array
    below: Array
    upto: Array


class State(NamedTuple):
    """The search of every piece, side by side."""

    bracket: Bracket
    target: Array
    own: Array  # whether every piece has its own target; a scalar
    step: Array  # -1 while NaNs are counted
    numbers: Array  # how many elements of each piece are not NaN
    pivot: Array  # the last two pivots, and what they counted towards the target
    reached: Array
    last_pivot: Array
    last_reached: Array


class Counter(NamedTuple):
    """How pieces are counted on the device they are on.

    Attributes:
        sizes: elements of each piece.
        upto: ``(keys, active) -> counts``: elements up to the key, 0 where not active.
        tie_index: ``(keys, need) -> index``: flat index of the need-th element equal to the key.
        kept: ``cut -> masks``: which elements of each piece stay, in the shape of its arrays.
        sample: sorted keys of each piece, ``(pieces, some)``; None where that is not cheap.
        together: sorted keys of all pieces, ``(1, some)``.
    """

    sizes: Array
    upto: Callable[[Array, Array], Array]
    tie_index: Callable[[Array, Array], Array]
    kept: Callable[[Threshold], list[Array]]
    sample: Array | None = None
    together: Array | None = None


def search(
    counter: Counter, bracket: Bracket, target: Array, caps: Array | None, check: bool
) -> State:
    """Returns brackets closed around the smallest key whose count reaches the target.

    Closed means that ``hi - lo`` is 1 or that one end counts exactly the target.
    """
    zero = jnp.zeros_like(target)

    def towards(counts: Array, own: Array) -> Array:
        """What counts of the pieces are worth towards their targets."""
        if caps is None:
            return counts
        return jnp.where(own, counts, int32_sum(jnp.minimum(counts, caps)))

    def is_open(s: State) -> Array:
        b = s.bracket
        below, upto = towards(b.below, s.own), towards(b.upto, s.own)
        return (s.step < 0) | ((below < s.target) & (s.target < upto) & (b.lo < b.hi - 1))

    def step(s: State) -> State:
        b, active = s.bracket, is_open(s)
        pivot = jnp.where(s.step < 0, HIGHEST - 1, _guess(s, towards, counter))
        counts = counter.upto(pivot, active)
        reached = towards(counts, s.own)
        low, high = active & (reached < s.target), active & (reached >= s.target)
        bracket = Bracket(
            lo=jnp.where(low, pivot, b.lo),
            hi=jnp.where(high, pivot, b.hi),
            below=jnp.where(low, counts, b.below),
            upto=jnp.where(high, counts, b.upto),
        )
        after = s._replace(
            bracket=bracket,
            step=s.step + 1,
            numbers=jnp.where(s.step < 0, counts, s.numbers),
            pivot=pivot,
            reached=reached,
            last_pivot=s.pivot,
            last_reached=s.reached,
        )
        return deal(after)

    def deal(s: State) -> State:
        if caps is None:
            return s
        closed = ~s.own & ~jnp.any(is_open(s))
        dealt = _dealt(s, caps)
        return jax.tree.map(lambda new, old: jnp.where(closed, new, old), dealt, s)

    state = State(
        bracket=bracket,
        target=target,
        own=jnp.asarray(caps is None),
        step=jnp.int32(-1 if check else 0),
        numbers=counter.sizes,
        pivot=zero,
        reached=zero,
        last_pivot=zero,
        last_reached=zero,
    )
    return lax.while_loop(lambda s: jnp.any(is_open(s)), step, deal(state))


def _dealt(s: State, caps: Array) -> State:
    """Returns the state in which pieces have their own counts: the shared bracket is closed."""
    b = s.bracket
    below, upto = jnp.minimum(b.below, caps), jnp.minimum(b.upto, caps)
    # Equal scores at the cut go to the pieces in order.
    ties = upto - below
    rest = s.target - int32_sum(below) - (jnp.cumsum(ties, dtype=jnp.int32) - ties)
    target = below + jnp.clip(rest, 0, ties)
    # A piece at its cap is cut below the shared bracket, every other one inside it.
    capped = target < b.below
    bracket = Bracket(
        lo=jnp.where(capped, LOWEST, b.lo),
        hi=jnp.where(capped, b.lo, b.hi),
        below=jnp.where(capped, 0, b.below),
        upto=jnp.where(capped, b.below, b.upto),
    )
    return s._replace(bracket=bracket, target=target, own=jnp.asarray(True), step=jnp.int32(0))


def _guess(s: State, towards: Callable[[Array, Array], Array], counter: Counter) -> Array:
    """Returns the next pivots, strictly inside their brackets."""
    lo, hi = s.bracket.lo, s.bracket.hi
    below, upto = towards(s.bracket.below, s.own), towards(s.bracket.upto, s.own)
    width = lax.bitcast_convert_type(hi - lo, jnp.uint32)  # may exceed the range of int32
    middle = lo + lax.bitcast_convert_type(width >> 1, jnp.int32)
    share = (s.target - below).astype(jnp.float32) / (upto - below).astype(jnp.float32)
    along = jnp.minimum(width.astype(jnp.float32) * jnp.clip(share, 0.0, 1.0), 2.0**32 - 256)
    between = lo + lax.bitcast_convert_type(along.astype(jnp.uint32), jnp.int32)
    # A secant through the last two counts, moving by at least one key.
    missing = (s.target - s.reached).astype(jnp.float32)
    rise = (s.reached - s.last_reached).astype(jnp.float32)
    run = (s.pivot - s.last_pivot).astype(jnp.float32)
    move = missing * run / jnp.where(rise == 0, jnp.inf, rise)
    move = jnp.where(jnp.abs(move) < 1, jnp.sign(missing), jnp.round(jnp.clip(move, -1e9, 1e9)))
    secant = s.pivot + move.astype(jnp.int32)
    pivot = jnp.where((lo < secant) & (secant < hi) & (s.step >= 2), secant, between)
    pivot = jnp.where((s.step >= 8) & (s.step % 2 == 1), middle, pivot)
    if counter.sample is not None and counter.together is not None:
        total = towards(counter.sizes, s.own)
        near, repeated = _from_sample(s, total, counter.sample)
        if len(counter.sizes) > 1:
            # While pieces share a bracket, they are one: look at the sample of all of them.
            one = jax.tree.map(lambda x: x[:1] if x.ndim else x, s)
            near_all, repeated_all = _from_sample(one, total[:1], counter.together)
            near = jnp.where(s.own, near, near_all)
            repeated = jnp.where(s.own, repeated, repeated_all)
        pivot = jnp.where((s.step < 2) | (repeated & (s.step < 12)), near, pivot)
    return jnp.maximum(jnp.minimum(pivot, hi - 1), lo + 1)


def _from_sample(s: State, total: Array, sample: Array) -> tuple[Array, Array]:
    """Returns the sampled key nearest to the target's rank, and whether it was sampled repeatedly.

    A repeated key is one that many elements share; interpolating between such keys gets nowhere.
    """
    width = sample.shape[1]
    rank = int32_sum(sample <= s.pivot[:, None], axis=1) - 1
    rank, reached = (jnp.where(s.step == 0, 0, x) for x in (rank, s.reached))
    share = (s.target - reached).astype(jnp.float32) / jnp.maximum(total, 1).astype(jnp.float32)
    rank = jnp.clip(rank + jnp.ceil(share * width).astype(jnp.int32), 0, width - 1)
    around = jnp.clip(rank[:, None] + jnp.asarray([[-1, 0, 1]], jnp.int32), 0, width - 1)
    before, near, after = jnp.take_along_axis(sample, around, axis=1).T
    repeated = ((before == near) & (rank > 0)) | ((near == after) & (rank < width - 1))
    return near, repeated
