"""Atoms: what positions of axes are kept or removed together, as arrays of integers.

An *axis* is an int array ``(n, k)``: the row of a position is the set of atoms it depends on,
filled up with :data:`KEPT`. A position is removed as soon as one of its atoms is. ``None`` is an
axis that cannot be pruned.

:class:`Atoms` only ever adds constraints (two atoms are one, an atom is a set of others, an atom is
kept), so their order does not matter for soundness, and an axis read earlier stays valid.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import numpy as np

#: The atom of what is never removed.
KEPT = 0

#: What atoms are numbered by: a model of 70 billion parameters has 14 million of them.
NUMBER = np.int32


Axis = np.ndarray | None


class Atoms:
    """A union-find of atoms in which an atom may also be defined as a set of others, or kept."""

    def __init__(self) -> None:
        self._size = 1
        self._parent = np.zeros(1024, NUMBER)
        self._definition = np.full(1024, -1, NUMBER)  # row of _sets, or -1
        self._reason = np.zeros(1024, np.int16)  # number of the reason it is kept for, or 0
        self._reason[KEPT] = 1
        self._sets = np.zeros((1024, 2), NUMBER)
        self._n_sets = 0
        self._reasons = ["", "never part of an axis"]
        self._numbers: dict[str, int] = {}

    @property
    def size(self) -> int:
        """One more than the largest atom."""
        return self._size

    def copy(self) -> Atoms:
        """Returns a copy that later operations do not touch."""
        found = copy.copy(self)
        for name in ("_parent", "_definition", "_reason", "_sets"):
            setattr(found, name, getattr(self, name).copy())
        found._reasons, found._numbers = list(self._reasons), dict(self._numbers)
        return found

    def is_as(self, earlier: Atoms, axis: Axis) -> bool:
        """Whether the same of an axis can be pruned as earlier."""
        now, then = self.resolve(axis), earlier.resolve(axis)
        if now is None or then is None:
            return now is then
        return bool(_alike(now, then).all())

    def fresh(self, n: int) -> np.ndarray:
        """Returns an axis of ``n`` new atoms."""
        start, stop = self._size, self._size + n
        if stop > len(self._parent):
            more = max(len(self._parent) // 2, n)
            self._parent = _longer(self._parent, more)
            self._definition = _longer(self._definition, more, -1)
            self._reason = _longer(self._reason, more)
        atoms = np.arange(start, stop, dtype=NUMBER)
        self._parent[start:stop] = atoms
        self._size = stop
        return atoms[:, None]

    def reason(self, atoms: np.ndarray) -> list[str]:
        """Returns why each of the atoms is kept, or ``""``."""
        return [self._reasons[i] for i in self._reason[self._roots(atoms)].reshape(-1)]

    def _roots(self, x: np.ndarray) -> np.ndarray:
        parent = self._parent
        roots = parent[x]
        above = parent[roots]
        if (above == roots).all():
            return roots
        while True:
            roots, above = above, parent[above]
            if (above == roots).all():
                break
        parent[x] = roots
        return roots

    def resolve(self, axis: Axis) -> Axis:
        """Returns the axis by what is known now: representatives, definitions filled in."""
        if axis is None:
            return None
        x = self._roots(axis)
        while self._n_sets:
            defined = self._definition[x]
            if (defined < 0).all():
                break
            columns = []
            for column, row in zip(x.T, defined.T, strict=True):
                if (row < 0).all():
                    columns.append(column[:, None])
                    continue
                sets = np.zeros((len(column), self._sets.shape[1]), NUMBER)
                sets[row < 0, 0] = column[row < 0]
                sets[row >= 0] = self._sets[row[row >= 0]]
                columns.append(sets)
            x = self._roots(np.concatenate(columns, 1))
        kept = self._reason[x] > 0
        if kept.any():
            x = np.where(kept, KEPT, x)
        if x.shape[1] == 1:
            return None if kept.all() else x
        for j in range(1, x.shape[1]):  # an atom counts once in a set
            x[:, j] = np.where((x[:, :j] == x[:, j : j + 1]).any(1), KEPT, x[:, j])
        used = x.any(0)
        if not used.any():
            return None
        return x if used.all() else x[:, used]

    def keep(self, axis: Axis, reason: str) -> None:
        """Keeps every position of the axis."""
        x = self.resolve(axis)
        if x is not None:
            self._reason[x[x != KEPT]] = self._number(reason)

    def _number(self, reason: str) -> int:
        if reason not in self._numbers:
            self._numbers[reason] = len(self._reasons)
            self._reasons.append(reason)
        return self._numbers[reason]

    def same(self, x: Axis, y: Axis, reason: str = "two axes coincide") -> None:
        """Couples position i of one axis with position i of the other: both are kept or removed."""
        if x is y:
            return
        if x is None or y is None:
            self.keep(x if y is None else y, reason)
            return
        if self._plainly_same(x, y):
            return
        for _ in range(8):
            a, b = self.resolve(x), self.resolve(y)
            if a is None or b is None:
                self.keep(a if b is None else b, self._why(x if a is None else y, reason))
                return
            apart = ~_alike(a, b)
            if not apart.any():
                return
            self._step(a[apart], b[apart])
            if a.shape[1] == b.shape[1] == 1:
                return
        # Sets that no rule brought together: both stay, which is always right.
        self.keep(x, f"{reason}: axes factored in different ways")
        self.keep(y, f"{reason}: axes factored in different ways")

    def _plainly_same(self, x: np.ndarray, y: np.ndarray) -> bool:
        """Does what :meth:`same` does if neither axis has sets or anything kept; says whether."""
        if not x.shape[1] == y.shape[1] == 1:
            return False
        one, two = self._roots(x), self._roots(y)
        for roots in (one, two):
            if self._reason[roots].any():
                return False
            if self._n_sets and self._definition[roots].max() >= 0:
                return False
        self._parent[np.maximum(one, two)] = np.minimum(one, two)
        # An atom that had to coincide with several coincides with one of them now.
        return bool((self._roots(one) == self._roots(two)).all())

    def _why(self, axis: np.ndarray, reason: str) -> str:
        known = [r for r in self.reason(axis[:1, :1]) if r]
        return known[0] if known else reason

    def _step(self, a: np.ndarray, b: np.ndarray) -> None:
        """Brings two resolved axes nearer to each other."""
        count_a, count_b = (a != KEPT).sum(1), (b != KEPT).sum(1)
        if a.shape[1] == b.shape[1] == 1:
            self._unite(a[:, 0], b[:, 0])
            return
        single = (count_a == 1) & (count_b == 1)
        if single.any():
            self._unite(a[single].max(1), b[single].max(1))
            if single.all():
                return
            a, b = a[~single], b[~single]
            count_a, count_b = count_a[~single], count_b[~single]
        if (count_a == 1).all() or (count_b == 1).all():
            if not (count_a == 1).all():
                a, b = b, a
            self._define(a.max(1), b)
            return
        if a.shape[1] == b.shape[1]:
            for j in range(a.shape[1]):
                self._unite(a[:, j], b[:, j])
            return
        for one, other in ((a, b), (b, a)):
            rows = ((one != KEPT).sum(1) == 1) & ((other != KEPT).sum(1) > 1)
            if rows.any():
                self._define(one[rows].max(1), other[rows])
                return
        self._align(a, b)

    def _align(self, a: np.ndarray, b: np.ndarray) -> None:
        """Unites what two axes of sets do not share, row by row and in order."""
        for left, right in zip(a, b, strict=True):
            one = [i for i in left if i != KEPT and i not in right]
            two = [i for i in right if i != KEPT and i not in left]
            if len(one) == len(two):
                self._unite(np.array(one, NUMBER), np.array(two, NUMBER))
            else:
                self._reason[np.array(one + two, NUMBER)] = self._number(
                    "axes factored in different ways"
                )

    def _unite(self, a: np.ndarray, b: np.ndarray) -> None:
        """Makes atoms one, pair by pair; with KEPT, they are kept."""
        for one, other in ((a, b), (b, a)):
            kept = one == KEPT
            if kept.any():
                hit = other[kept & (other != KEPT)]
                self._reason[hit] = np.maximum(
                    self._reason[hit], self._number("coincides with what is kept")
                )
        both = (a != KEPT) & (b != KEPT)
        a, b = a[both], b[both]
        while True:
            one, two = self._roots(a), self._roots(b)
            apart = one != two
            if not apart.any():
                return
            low, high = np.minimum(one, two)[apart], np.maximum(one, two)[apart]
            np.minimum.at(self._parent, high, low)
            np.maximum.at(self._reason, self._roots(high), self._reason[high])

    def _define(self, atoms: np.ndarray, sets: np.ndarray) -> None:
        """Makes each single atom equal to its set: kept exactly if all of the set is."""
        inside = np.isin(sets, atoms, kind="table")
        if inside.any():
            # ``{a} = {a, c}``: c never goes alone.
            own = (sets == atoms[:, None]).any(1)
            rest = sets[own]
            extra = rest[(rest != KEPT) & (rest != atoms[own][:, None])]
            if extra.size:
                self._reason[extra] = self._number("would remove only a part of what coincides")
            others = inside.any(1) & ~own
            if others.any():
                mixed = sets[others]
                self._reason[mixed[mixed != KEPT]] = self._number("axes factored in different ways")
            return
        if all_differ(atoms):
            self._add_sets(atoms, sets)
            return
        order, first, inverse = np.unique(atoms, return_index=True, return_inverse=True)
        # An atom that stands for several positions can only be what their sets have in common.
        shared = [j for j in range(sets.shape[1]) if (sets[first[inverse], j] == sets[:, j]).all()]
        for j in range(sets.shape[1]):
            if j in shared[:1]:
                self._unite(atoms, sets[:, j])
            else:
                column = sets[:, j]
                self._reason[column[column != KEPT]] = self._number(
                    "would remove only a part of what coincides"
                )
        if not shared:
            self._reason[order] = self._number("axes factored in different ways")

    def _add_sets(self, atoms: np.ndarray, sets: np.ndarray) -> None:
        width, start, stop = sets.shape[1], self._n_sets, self._n_sets + len(sets)
        if width > self._sets.shape[1]:
            wide = np.zeros((len(self._sets), width - self._sets.shape[1]), NUMBER)
            self._sets = np.concatenate([self._sets, wide], 1)
        if stop > len(self._sets):
            self._sets = _longer(self._sets, max(len(self._sets) // 2, len(sets)))
        self._sets[start:stop, :width] = sets
        self._definition[atoms] = np.arange(start, stop)
        self._n_sets = stop

    def merge(self, axes: Sequence[Axis], sizes: Sequence[int]) -> Axis:
        """Returns the axis that runs over all positions of several, the last one fastest."""
        total, columns, outer = math.prod(sizes), [], 1
        for axis, n in zip(axes, sizes, strict=True):
            x = self.resolve(axis)
            if x is not None:
                inner = total // (outer * n)
                columns.append(np.tile(np.repeat(x, inner, 0), (outer, 1)))
            outer *= n
        return np.concatenate(columns, 1) if columns else None

    def split(self, axis: Axis, sizes: Sequence[int], reason: str = "a reshape") -> list[Axis]:
        """Returns axes of the given sizes whose positions together are those of ``axis``.

        Atoms that vary along several of the new axes are factored: each becomes the set of one new
        atom for every axis, so that whole rows and whole columns can go.
        """
        parts: list[list[np.ndarray]] = [[] for _ in sizes]
        for _ in range(4):
            x = self.resolve(axis)
            parts = [[] for _ in sizes]
            if x is None:
                break
            done = True
            for column in x.T:
                grid = column.reshape(tuple(sizes))
                varies = [
                    d
                    for d, n in enumerate(sizes)
                    if n > 1 and not (grid == np.take(grid, [0], d)).all()
                ]
                if len(varies) == 1:
                    line = np.moveaxis(grid, varies[0], 0).reshape(sizes[varies[0]], -1)[:, :1]
                    parts[varies[0]].append(line)
                elif not varies:
                    done = False
                    self.keep(column[:1, None], f"{reason} of what one unit fills")
                else:
                    done = False
                    self._factor(grid, sizes, varies, reason)
            if done:
                break
        else:
            self.keep(axis, f"{reason}: axes factored in different ways")
            return [None] * len(sizes)
        return [np.concatenate(p, 1) if p else None for p in parts]

    def _factor(
        self, grid: np.ndarray, sizes: Sequence[int], varies: list[int], reason: str
    ) -> None:
        index = tuple(slice(None) if d in varies else slice(0, 1) for d in range(len(sizes)))
        core = grid[index]
        repeats = not (np.broadcast_to(core, grid.shape) == grid).all()
        if not all_differ(core):
            for d in varies:  # what is alike, as the samples of a batch are, is one position
                lines = np.moveaxis(core, d, 0).reshape(core.shape[d], -1)
                core = np.take(core, np.sort(np.unique(lines, axis=0, return_index=True)[1]), d)
        cell = core.reshape(-1)
        free = cell[cell != KEPT]
        if repeats or not all_differ(free):
            self.keep(free[:, None], f"{reason}: positions of one unit part ways")
            return
        fresh = [self.fresh(core.shape[d]) for d in varies]
        product = self.merge(fresh, [core.shape[d] for d in varies])
        self.same(cell[:, None], product, reason)


def _longer(x: np.ndarray, more: int, filled: int = 0) -> np.ndarray:
    return np.concatenate([x, np.full((more, *x.shape[1:]), filled, x.dtype)])


def _alike(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns where two resolved axes have the same sets, in whatever order their atoms are."""
    if a.shape[1] == b.shape[1] == 1:
        return np.asarray(a[:, 0] == b[:, 0])
    width = max(a.shape[1], b.shape[1])
    one, two = (np.sort(filled(x, width), 1) for x in (a, b))
    return np.asarray((one == two).all(1))


def filled(axis: np.ndarray, width: int) -> np.ndarray:
    """Returns an axis whose sets are filled up to a width."""
    found = np.zeros((len(axis), width), axis.dtype)
    found[:, : axis.shape[1]] = axis
    return found


def all_differ(atoms: np.ndarray) -> bool:
    """Whether no atom is there twice; by a sort, which for millions is faster than a hash table."""
    x = atoms.reshape(-1)
    if bool((x[1:] > x[:-1]).all()):
        return True
    x = np.sort(x)
    return not bool((x[1:] == x[:-1]).any())
