"""What a whole model costs once units are gone: exact integers, under jit too.

Parameters and multiply-adds are sums of products of axis lengths, and a length is the number of
positions none of whose units are gone. Where units die one after another, every position has a time
at which it dies, and the cost at a time follows from counting. Such numbers exceed 32 bits, so that
they are kept as limbs of ten.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from purepruning.arrays import int32, iota, namespace
from purepruning.coupling.coupling import Coupling

LIMB = 10  # bits, so that the product of a limb and a length below 2**20 fits into int32


LONGEST = 2**20


PROBES = 32  # times looked at together: three rounds find one of 32,768


@dataclasses.dataclass(frozen=True, eq=False)
class Budget:
    """A sum of products of lengths, as static arrays; places are those of an allocation.

    Attributes:
        rows: for every kind of position the places of its units, ``(rows, k)``, filled up with 0.
        times: how many positions are of that kind, ``(rows,)``.
        ends: where the rows of each length end.
        factors: for every product the lengths it multiplies, ``(products, most)``, filled up with
            their number, which stands for 1.
        constants: what it multiplies besides, in limbs, ``(products, limbs)``.
    """

    rows: np.ndarray
    times: np.ndarray
    ends: np.ndarray
    factors: np.ndarray
    constants: np.ndarray

    @functools.cached_property
    def key(self) -> str:
        """A hash of the contents."""
        sha = hashlib.sha256()
        for field in dataclasses.fields(self):
            array = np.ascontiguousarray(getattr(self, field.name))
            sha.update(repr((array.shape, array.dtype)).encode() + array.tobytes())
        return sha.hexdigest()

    def first_within(self, death: Any, last: int, budget: list[Any]) -> tuple[Any, Any]:
        """Returns the first time at which the cost is within the budget, and whether there is one.

        Args:
            death: for every place the time at which its unit dies, int32 ``(places,)``; it is gone
                at all later times.
            last: the last time there is.
            budget: in limbs, lowest first.
        """
        xp = namespace(death)
        rows = int32(xp, self.rows.reshape(-1), death)
        dies = xp.min(xp.reshape(xp.take(death, rows), self.rows.shape), axis=1)
        low, width = xp.zeros_like(death[0]), last
        while width > 0:
            stride = -(-width // PROBES)
            at = low + stride * (iota(xp, PROBES, death) + 1) - 1
            over = ~self._within(xp, dies, xp.clip(at, 0, last), budget)
            low = low + stride * xp.sum(xp.astype(over, xp.int32), dtype=xp.int32)
            width = stride - 1
        time = xp.clip(low, 0, last)
        return time, self._within(xp, dies, xp.reshape(time, (1,)), budget)[0]

    def _within(self, xp: Any, dies: Any, at: Any, budget: list[Any]) -> Any:
        """Returns whether the cost at each time is at most the budget, ``(times,)``."""
        alive = xp.astype(dies[None, :] >= at[:, None], xp.int32)
        alive = alive * int32(xp, self.times, dies)[None, :]
        upto = xp.cumulative_sum(alive, axis=1, dtype=xp.int32, include_initial=True)
        bounds = xp.take(upto, int32(xp, np.concatenate([[0], self.ends]), dies), axis=1)
        lengths = bounds[:, 1:] - bounds[:, :-1]
        lengths = xp.concat([lengths, xp.ones_like(at)[:, None]], axis=1)
        number = [int32(xp, limb, dies)[None, :] for limb in self.constants.T]
        for column in self.factors.T:
            length = xp.take(lengths, int32(xp, column, dies), axis=1)
            number = carried([limb * length for limb in number])
        total = carried([xp.sum(limb, axis=1, dtype=xp.int32) for limb in number])
        fits = total[0] == total[0]
        for mine, limit in zip(total, budget, strict=True):
            fits = (mine < limit) | ((mine == limit) & fits)
        return fits


def budget_of(
    coupling: Coupling, sets: Sequence[np.ndarray], cost: Literal["params", "macs"]
) -> Budget:
    """Returns how the cost follows from the units of ``sets``, placed one after another from 1."""
    place = np.zeros(coupling.n_units + 1, np.int64)
    order = np.concatenate([s.reshape(-1) for s in sets]) if sets else np.zeros(0, np.int64)
    place[order] = 1 + np.arange(len(order))
    lengths: dict[bytes, int] = {}
    rows: list[np.ndarray] = []
    times: list[np.ndarray] = []
    products: dict[tuple[int, ...], int] = {}
    for constant, axes in terms(coupling, cost):
        used = []
        for units in axes:
            one = np.sort(place[units if units.ndim == 2 else units[0]], 1)[:, ::-1]
            if not one.any():
                constant *= len(one)
                continue
            kinds, number = np.unique(one[:, one.any(0)], axis=0, return_counts=True)
            common = int(np.gcd.reduce(number))
            constant, number = constant * common, number // common
            if number.sum() >= LONGEST:
                raise ValueError(f"an axis of {number.sum()} positions is too long for a budget")
            key = repr(kinds.shape).encode() + kinds.tobytes() + number.tobytes()
            if key not in lengths:
                lengths[key] = len(rows)
                rows.append(kinds)
                times.append(number)
            used.append(lengths[key])
        product = tuple(sorted(used))
        products[product] = products.get(product, 0) + int(constant)
    width = max((r.shape[1] for r in rows), default=1)
    padded = [np.pad(r, ((0, 0), (0, width - r.shape[1]))) for r in rows]
    most = max(map(len, products), default=0)
    factors = [(*p, *[len(rows)] * (most - len(p))) for p in products]
    n_limbs = -(-coupling.cost()[cost == "macs"].bit_length() // LIMB) + 1
    return Budget(
        np.concatenate(padded) if padded else np.zeros((0, 1), np.int64),
        np.concatenate(times) if times else np.zeros(0, np.int64),
        np.cumsum([len(r) for r in rows]),
        np.asarray(factors, np.int64).reshape(len(products), most),
        np.asarray([[int(x) for x in limbs(c, n_limbs)] for c in products.values()]),
    )


def unit_costs(
    coupling: Coupling, units: np.ndarray, cost: Literal["params", "macs"]
) -> np.ndarray:
    """Returns what removing each of these units alone takes off the whole model, as float64.

    Where blocks must lose equally many, a unit counts for its share.
    """
    saved = np.zeros(coupling.n_units + 1)
    for constant, axes in terms(coupling, cost):
        full, left = float(constant), np.full(coupling.n_units + 1, float(constant))
        for x in axes:
            blocks = len(x) if x.ndim == 3 else 1
            n = x.shape[-2]
            flat = np.sort(x.reshape(-1, x.shape[-1]), 1)
            flat = np.where(np.diff(flat, axis=1, prepend=-1) == 0, 0, flat)
            left *= n - np.bincount(flat.reshape(-1), minlength=len(left)) / blocks
            full *= n
        saved += full - left
    return saved[units]


def terms(coupling: Coupling, cost: str) -> list[tuple[int, list[np.ndarray]]]:
    """Returns the products that the cost sums: a constant, and units by position of each axis."""
    found = []
    if cost == "macs":
        for p in coupling.products:
            if not isinstance(p.constant, int | np.integer):
                raise ValueError(
                    f"the multiply-adds of {', '.join(p.weights)} depend on {p.constant}; couple "
                    "the function for inputs of known sizes"
                )
            found.append((int(p.constant), list(p.units)))
        return found
    for leaf in coupling.leaves.values():
        sizes = [n for n, u in zip(leaf.shape, leaf.units, strict=True) if u is None]
        found.append((math.prod(sizes), [u for u in leaf.units if u is not None]))
    return found


def limbs(value: Any, n: int) -> list[Any]:
    """Returns a non-negative number in ``n`` limbs, lowest first."""
    return [(value >> (LIMB * i)) & (2**LIMB - 1) for i in range(n)]


def carried(number: list[Any]) -> list[Any]:
    """Returns limbs brought back below ``2**LIMB``; those given are below ``2**30``."""
    found, carry = [], 0
    for limb in number[:-1]:
        limb = limb + carry
        carry = limb >> LIMB
        found.append(limb & (2**LIMB - 1))
    return [*found, number[-1] + carry]
