"""What is left of a resource by the levels of all groups: exact integers, under jit too.

A level is the place of a count among the options of its group, from 0, where nothing is pruned.
Numbers exceed 32 bits, so that they are kept as limbs of ten, lowest first.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from purepruning.arrays import namespace
from purepruning.config.budget import LIMB, LONGEST, carried, limbs, terms
from purepruning.coupling.coupling import Coupling


@dataclasses.dataclass(frozen=True, eq=False)
class Products:
    """A sum of products of axis lengths; a length is a sum of pieces of an axis.

    Attributes:
        groups: the groups that a piece depends on, ``(pieces, factors)``.
        tables: by level of each of them, how many positions it has left; they are multiplied,
            ``(pieces, factors, levels)``.
        ends: where the pieces of each length end.
        factors: for every product the lengths it multiplies, ``(products, most)``; their number
            stands for 1.
        constants: what it multiplies besides, in limbs, ``(products, limbs)``.
        unit: what one stands for.
        monotone: that more pruning never costs more.
    """

    groups: np.ndarray
    tables: np.ndarray
    ends: np.ndarray
    factors: np.ndarray
    constants: np.ndarray
    unit: float = 1
    monotone: bool = True

    def measure(self, levels: Any) -> list[Any]:
        """Returns the cost at levels ``(groups,)``, in limbs; of NumPy's also ``(..., groups)``."""
        xp = namespace(levels)
        pieces, most = self.groups.shape
        index = np.arange(pieces * most, dtype=np.int32).reshape(pieces, most)
        at = levels[..., self.groups] + index * self.tables.shape[-1]
        left = xp.prod(_taken(xp, self.tables.reshape(-1), at), axis=-1, dtype=xp.int32)
        one = xp.ones_like(left[..., :1])
        upto = xp.concatenate([0 * one, xp.cumsum(left, axis=-1, dtype=xp.int32)], axis=-1)
        bounds = upto[..., np.concatenate([[0], self.ends])]
        lengths = xp.concatenate([bounds[..., 1:] - bounds[..., :-1], one], axis=-1)
        number = [xp.asarray(limb) for limb in self.constants.T]
        for column in self.factors.T:
            number = carried([limb * lengths[..., column] for limb in number])
        return carried([xp.sum(limb, axis=-1, dtype=xp.int32) for limb in number])


@dataclasses.dataclass(frozen=True, eq=False)
class Lookup:
    """A sum of table entries, each by the levels of one group or of two.

    Attributes:
        groups: ``(rows, 2)``; a row of one group has it twice, and a table of one column.
        sizes: the number of columns of each row's table.
        starts: where each row's table begins in ``entries``.
        entries: the tables one after another, row by row, in limbs, ``(entries, limbs)``.
        unit: what one stands for.
        monotone: that more pruning never costs more.
    """

    groups: np.ndarray
    sizes: np.ndarray
    starts: np.ndarray
    entries: np.ndarray
    unit: float = 1
    monotone: bool = True

    def measure(self, levels: Any) -> list[Any]:
        """Returns the cost at levels ``(groups,)``, in limbs; of NumPy's also ``(..., groups)``."""
        xp = namespace(levels)
        second = levels[..., self.groups[:, 1]] * (self.sizes > 1).astype(np.int32)
        at = self.starts + levels[..., self.groups[:, 0]] * self.sizes + second
        rows = [_taken(xp, limb, at) for limb in self.entries.T]
        return carried([xp.sum(limb, axis=-1, dtype=xp.int32) for limb in rows])


Resource = Products | Lookup


def _taken(xp: Any, table: np.ndarray, at: Any) -> Any:
    """Returns the entries of a static table at traced or known places."""
    return xp.asarray(table)[at]


def within(number: Sequence[Any], limit: int) -> Any:
    """Returns whether a number in limbs is at most ``limit``."""
    bound = limbs(limit, len(number))
    if limit >> (LIMB * len(number)):
        return number[0] == number[0]
    fits = number[0] == number[0]
    for mine, limb in zip(number, bound, strict=True):
        fits = (mine < limb) | ((mine == limb) & fits)
    return fits


def as_float(number: Sequence[Any]) -> Any:
    """Returns a number in limbs as float32."""
    return sum(x.astype(np.float32) * float(1 << (LIMB * i)) for i, x in enumerate(number))


def as_int(number: Sequence[Any]) -> Any:
    """Returns known numbers in limbs as int64 on the host."""
    return sum(np.asarray(x, np.int64) << (LIMB * i) for i, x in enumerate(number))


def products_of(
    coupling: Coupling, sets: Sequence[np.ndarray], counts: Sequence[np.ndarray], cost: str
) -> Products:
    """Returns how parameters or multiply-adds follow from the levels of sets of units.

    Where units lie in different numbers of positions of an axis, what is left depends on which of
    them go; then the most that may be left is counted.

    Args:
        coupling: the coupling.
        sets: for every group its units, ``(parts, size)``; every part loses equally many.
        counts: for every group the counts of its levels.
        cost: ``"params"`` or ``"macs"``.
    """
    group_of = np.full(coupling.n_units + 1, -1)
    part_of = np.zeros(coupling.n_units + 1, np.int64)
    for g, chunks in enumerate(sets):
        for part, chunk in enumerate(chunks):
            group_of[chunk], part_of[chunk] = g, part
    longest = max(map(len, counts), default=1)
    known: dict[bytes, int] = {}
    pieces: list[list[tuple[tuple[int, ...], list[np.ndarray]]]] = []
    products: dict[tuple[int, ...], int] = {}
    for constant, axes in terms(coupling, cost):
        used = []
        for axis in axes:
            rows = axis if axis.ndim == 2 else axis[0]
            owners = np.where(rows > 0, group_of[rows], -1)
            if (owners < 0).all():
                constant *= len(rows)
                continue
            found = _pieces(rows, owners, part_of, sets, counts, longest)
            key = repr([(g, [t.tobytes() for t in ts]) for g, ts in found]).encode()
            if key not in known:
                known[key] = len(pieces)
                pieces.append(found)
            used.append(known[key])
        product = tuple(sorted(used))
        products[product] = products.get(product, 0) + int(constant)
    width = max((len(g) for some in pieces for g, _ in some), default=1)
    groups, tables = [], []
    for some in pieces:
        for mine, ts in some:
            fill = width - len(mine)
            groups.append((*mine, *[0] * fill))
            tables.append(np.stack([*ts, *[np.ones(longest, np.int64)] * fill]))
    most = max(map(len, products), default=0)
    total = int(coupling.cost()[cost == "macs"])
    n_limbs = -(-max(total.bit_length(), 1) // LIMB) + 1
    return Products(
        np.asarray(groups, np.int32).reshape(-1, width),
        np.asarray(tables, np.int32).reshape(-1, width, longest),
        np.cumsum([len(some) for some in pieces], dtype=np.int64),
        np.asarray([(*p, *[len(pieces)] * (most - len(p))) for p in products], np.int64).reshape(
            len(products), most
        ),
        np.asarray([[int(x) for x in limbs(c, n_limbs)] for c in products.values()], np.int32),
    )


def _pieces(
    rows: np.ndarray,
    owners: np.ndarray,
    part_of: np.ndarray,
    sets: Sequence[np.ndarray],
    counts: Sequence[np.ndarray],
    longest: int,
) -> list[tuple[tuple[int, ...], list[np.ndarray]]]:
    """Returns for the positions of an axis, by the groups they depend on, tables of what is left.

    Positions of several groups are a product where they are all combinations of the groups' units,
    equally often; else they are counted by the first of them.
    """
    if len(rows) >= LONGEST:
        raise ValueError(f"an axis of {len(rows)} positions is too long for a budget")
    signature = np.sort(owners, 1)
    found: list[tuple[tuple[int, ...], list[np.ndarray]]] = []
    for kind in np.unique(signature, axis=0):
        mine = (signature == kind).all(1)
        n = int(mine.sum())
        groups = tuple(int(g) for g in np.unique(kind[kind >= 0]))
        if not groups:
            found.append(((0,), [np.full(longest, n)]))
            continue
        once = [(owners[mine] == g).sum(1).max() == 1 for g in groups]
        times = [_occurrences(rows[mine], owners[mine], g, part_of, sets[g]) for g in groups]
        even = all(np.ptp(t) == 0 for t in times)
        combined = math.prod(t.size for t in times)
        if len(groups) > 1 and all(once) and even and n % combined == 0:
            tables = []
            for i, (g, t) in enumerate(zip(groups, times, strict=True)):
                scale = n // combined if i == 0 else 1
                tables.append(_padded(t.shape[0] * (t.shape[1] - counts[g]) * scale, longest))
            found.append((groups, tables))
            continue
        g, t = groups[0], times[0]
        # Those in the fewest positions may go first.
        gone = np.concatenate([[0], np.cumsum(np.sort(t, axis=1), axis=1).sum(0)])
        found.append(((g,), [_padded(n - gone[counts[g]], longest)]))
    return found


def _occurrences(
    rows: np.ndarray, owners: np.ndarray, group: int, part_of: np.ndarray, units: np.ndarray
) -> np.ndarray:
    """Returns in how many positions each unit of a group is, ``(parts, size)``."""
    alone = np.where(owners == group, rows, 0)
    alone = np.sort(alone, 1)
    alone = np.where(np.diff(alone, axis=1, prepend=-1) == 0, 0, alone)
    times = np.bincount(alone.reshape(-1), minlength=int(units.max()) + 1)
    result: np.ndarray = times[units]
    return result


def _padded(table: np.ndarray, longest: int) -> np.ndarray:
    return np.concatenate([table, np.full(longest - len(table), table[-1])])


def lookup_of(rows: Sequence[tuple[tuple[int, ...], np.ndarray]], *, unit: float = 1) -> Lookup:
    """Returns the sum of tables of whole numbers by the levels of one group, or of two each."""
    totals = [int(table.max()) for _, table in rows]
    n_limbs = -(-max(sum(totals).bit_length(), 1) // LIMB) + 1
    sizes = [1 if len(groups) == 1 else table.shape[1] for groups, table in rows]
    flat = [np.asarray(table, np.int64).reshape(-1) for _, table in rows]
    entries = np.concatenate(flat) if flat else np.zeros(0, np.int64)
    monotone = all(
        bool((np.diff(table, axis=a) <= 0).all()) for _, table in rows for a in range(table.ndim)
    )
    return Lookup(
        np.asarray([(g[0], g[-1]) for g, _ in rows], np.int32).reshape(-1, 2),
        np.asarray(sizes, np.int32),
        np.concatenate([[0], np.cumsum([len(x) for x in flat])])[:-1].astype(np.int32),
        np.stack([np.asarray(x, np.int32) for x in limbs(entries, n_limbs)], -1),
        unit,
        monotone,
    )


def table_of(
    name: str,
    table: Mapping[Any, Any],
    names: Sequence[str],
    counts: Sequence[np.ndarray],
    sizes: Sequence[int],
) -> Lookup:
    """Returns a user's table as whole numbers: a millionth of a millionth of its sum or less each.

    Entries are rounded up, so that what is counted is never less than what the table says.

    Args:
        name: the resource's name, for messages.
        table: by group name, or pair of them, costs by how many units are kept: arrays, or
            mappings from the numbers that were measured.
        names, counts, sizes: of the groups.

    Raises:
        KeyError: a group is unknown.
        ValueError, TypeError: a table has another shape, or something that is no cost.
    """
    from_name = {n: i for i, n in enumerate(names)}
    rows: list[tuple[tuple[int, ...], np.ndarray]] = []
    for key, costs in table.items():
        pair = (key,) if isinstance(key, str) else tuple(key)
        unknown = [n for n in pair if n not in from_name]
        if unknown or not 1 <= len(pair) <= 2 or len(set(pair)) < len(pair):
            raise KeyError(
                f"tables[{name!r}]: keys must be a group, or two different ones, of "
                f"{', '.join(map(repr, names))}; got {key!r}"
            )
        groups = tuple(from_name[n] for n in pair)
        wanted = tuple(sizes[g] + 1 for g in groups)
        where = f"tables[{name!r}][{key!r}]"
        found = _filled(where, costs, wanted) if isinstance(costs, Mapping) else costs
        found = np.asarray(found, np.float64)
        if found.shape != wanted:
            raise ValueError(
                f"{where} must have shape {wanted}, a cost for every number of "
                f"units kept from 0 on, got {found.shape}"
            )
        if not (np.isfinite(found).all() and (found >= 0).all()):
            raise ValueError(f"{where} must hold finite costs of at least 0")
        kept = [sizes[g] - counts[g] for g in groups]
        rows.append((groups, found[np.ix_(*kept)]))
    most = sum(float(costs.max()) for _, costs in rows)
    unit = 2.0 ** (math.ceil(math.log2(most)) - 40) if most > 0 else 1.0
    whole = [(g, np.ceil(costs / unit).astype(np.int64)) for g, costs in rows]
    return lookup_of(whole, unit=unit)


def _filled(where: str, measured: Mapping[Any, Any], shape: tuple[int, ...]) -> np.ndarray:
    """Returns costs of all numbers kept: those of the next larger ones that were measured."""
    costs = {k if isinstance(k, tuple) else (k,): cost for k, cost in measured.items()}
    for kept in costs:
        fits = len(kept) == len(shape) and all(isinstance(k, int | np.integer) for k in kept)
        if not fits or not all(0 <= k < n for k, n in zip(kept, shape, strict=True)):
            most = " and ".join(str(n - 1) for n in shape)
            raise ValueError(f"{where}: units kept must be whole, at most {most}, got {kept}")
    points = [np.unique([kept[axis] for kept in costs]) for axis in range(len(shape))]
    if not costs or any(p[-1] != n - 1 for p, n in zip(points, shape, strict=True)):
        raise ValueError(
            f"{where} has no cost with nothing pruned, of {' and '.join(str(n - 1) for n in shape)}"
            " units kept; measure it as well"
        )
    grid = [tuple(map(int, kept)) for kept in itertools.product(*points)]
    lacking = [kept for kept in grid if kept not in costs]
    if lacking:
        raise ValueError(f"{where} has no cost of {lacking[0]} units kept; measure all pairs")
    table = np.asarray([costs[kept] for kept in grid], np.float64)
    places = [np.searchsorted(p, np.arange(n)) for p, n in zip(points, shape, strict=True)]
    result: np.ndarray = table.reshape([len(p) for p in points])[np.ix_(*places)]
    return result
