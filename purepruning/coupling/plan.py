"""A plan: which positions of every parameter stay. Plain data that cuts any tree of that model."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from purepruning.arrays import array_like, by_numpy, namespace
from purepruning.coupling.coupling import Coupling
from purepruning.trees import flatten


@dataclasses.dataclass(frozen=True, eq=False)
class Cut:
    """What stays of one axis.

    Attributes:
        axis: which axis.
        positions: int array ``(kept,)``, or ``(blocks, kept)``: for every block of axis ``by``.
        by: the axis whose blocks keep positions of their own, or None.
    """

    axis: int
    positions: np.ndarray
    by: int | None = None


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """Which positions of which axes stay, by parameter path.

    Attributes:
        shapes: shape of every parameter before it is cut.
        cuts: for every parameter that shrinks, its axes that do.
        removed: numbers of the units that go, of the coupling the plan was made from.
    """

    shapes: Mapping[str, tuple[int, ...]]
    cuts: Mapping[str, tuple[Cut, ...]]
    removed: tuple[int, ...]

    def __repr__(self) -> str:
        cut = f"{len(self.cuts)} of {len(self.shapes)} parameters"
        return f"Plan({len(self.removed)} units removed, {cut} cut)"

    def shape(self, path: str) -> tuple[int, ...]:
        """Returns the shape of a parameter after it is cut."""
        shape = list(self.shapes[path])
        for cut in self.cuts.get(path, ()):
            shape[cut.axis] = cut.positions.shape[-1]
        return tuple(shape)

    def apply(self, tree: Any) -> Any:
        """Returns the tree with every array cut that belongs to a parameter of the plan.

        The tree may hold the parameters themselves, another checkpoint of them, or anything with
        trees of the same shapes inside: an optimizer's state, moving averages. An array belongs to
        the parameter whose path ends as its own does, on the longest such ending, if it has that
        parameter's shape; everything else comes back as it is. Of shapes
        (``jax.ShapeDtypeStruct``, as ``jax.eval_shape`` returns them) it gives the smaller shapes,
        which say what to read from a checkpoint of the small model.

        Raises:
            ValueError: an array at the exact path of a parameter has another shape; or an array
                may belong to several parameters.
            TypeError: the tree holds no arrays.
        """
        flat = flatten(tree)
        found = {}
        for path, leaf in flat.leaves.items():
            name = self._parameter(path, leaf)
            if name is not None:
                leaf = cut_array(leaf, self.cuts.get(name, ()))
            found[path] = leaf
        return flat.rebuild(found)

    def same_cuts(self, other: Plan) -> bool:
        """Whether another plan keeps the same positions of the same axes."""
        return self.cuts.keys() == other.cuts.keys() and all(
            len(mine) == len(other.cuts[path])
            and all(
                a.axis == b.axis and a.by == b.by and np.array_equal(a.positions, b.positions)
                for a, b in zip(mine, other.cuts[path], strict=True)
            )
            for path, mine in self.cuts.items()
        )

    def sizes(self, paths: Iterable[str]) -> tuple[int, int]:
        """Returns how many numbers these parameters have before and after they are cut."""
        paths = list(paths)
        before = sum(math.prod(self.shapes[path]) for path in paths)
        return before, sum(math.prod(self.shape(path)) for path in paths)

    def _parameter(self, path: str, leaf: Any) -> str | None:
        if not hasattr(leaf, "shape"):
            return None
        if path in self.shapes:
            if tuple(leaf.shape) != self.shapes[path]:
                raise ValueError(
                    f"{path!r} has shape {tuple(leaf.shape)}, but the plan is for "
                    f"{self.shapes[path]}"
                )
            return path
        tail = path
        while tail:
            named = self._ending.get(tail, ())
            fitting = [name for name in named if self.shapes[name] == tuple(leaf.shape)]
            if len(named) == 1:
                return fitting[0] if fitting else None
            if any(name in self.cuts for name in fitting):
                raise ValueError(
                    f"{path!r} may belong to {', '.join(map(repr, fitting[:3]))}: pass a tree "
                    "whose paths end like those of the parameters"
                )
            tail = tail.partition(".")[2]
        return None

    @functools.cached_property
    def _ending(self) -> dict[str, tuple[str, ...]]:
        """The parameters whose paths end in each sequence of names."""
        found: dict[str, list[str]] = {}
        for name in self.shapes:
            tail = name
            while tail:
                found.setdefault(tail, []).append(name)
                tail = tail.partition(".")[2]
        return {tail: tuple(names) for tail, names in found.items()}


def plan_of(coupling: Coupling, removed: np.ndarray) -> Plan:
    """Returns the plan that removes the units marked in ``removed``, a boolean by unit number."""
    cuts = {}
    for path, leaf in coupling.leaves.items():
        found = []
        for axis in range(len(leaf.shape)):
            keep = leaf.kept(axis, removed)
            if keep is None:
                continue
            if keep.ndim == 1:
                found.append(Cut(axis, np.flatnonzero(keep)))
            else:
                rows = [np.flatnonzero(row) for row in keep]
                if len({len(r) for r in rows}) > 1:
                    raise ValueError(
                        f"axis {axis} of {path!r} would keep {[len(r) for r in rows]} positions in "
                        "its blocks, and an array needs equally many"
                    )
                found.append(Cut(axis, np.stack(rows), leaf.by[axis]))
        if found:
            cuts[path] = tuple(found)
    shapes = {path: leaf.shape for path, leaf in coupling.leaves.items()}
    return Plan(shapes, cuts, tuple(np.flatnonzero(removed).tolist()))


def units_of_plan(coupling: Coupling, plan: Plan) -> np.ndarray:
    """Returns the units of a coupling that a plan removes, as a boolean by unit number.

    By positions, so that the coupling may number other units than the one that the plan was made
    from: those go that lie in positions which go, and in none that stays.

    Raises:
        ValueError: the plan is for other parameters, or cuts between what the coupling holds
            together.
    """
    gone, stays = np.zeros((2, coupling.n_units + 1), bool)
    stays[0] = True
    for path in sorted({*coupling.leaves, *plan.shapes}):
        leaf, shape = coupling.leaves.get(path), plan.shapes.get(path)
        if leaf is None or leaf.shape != shape:
            ours = "no such parameter" if leaf is None else f"shape {leaf.shape}"
            theirs = "is not for it" if shape is None else f"is for shape {shape}"
            raise ValueError(
                f"the plan does not fit: {path!r} has {ours}, and the plan {theirs}; pass the plan "
                "of this model"
            )
        positions = {cut.axis: cut.positions for cut in plan.cuts.get(path, ())}
        for axis, units in enumerate(leaf.units):
            if units is None or (axis in positions and positions[axis].ndim != units.ndim - 1):
                continue
            keep = np.ones(units.shape[:-1], bool)
            if axis in positions:
                keep[:] = False
                np.put_along_axis(keep, positions[axis], True, -1)
            stays[units[keep]] = True
            gone[units[~keep]] = True
    removed = gone & ~stays
    _check_fit(coupling, plan, removed)
    return removed


def _check_fit(coupling: Coupling, plan: Plan, removed: np.ndarray) -> None:
    again = plan_of(coupling, removed)
    for path in sorted({*plan.cuts, *again.cuts}):
        one, other = (Plan(p.shapes, {path: p.cuts.get(path, ())}, ()) for p in (plan, again))
        if not one.same_cuts(other):
            pins = {f"axis {p.axis}: {p.reason}" for p in coupling.frozen if p.path == path}
            why = f" ({'; '.join(sorted(pins))})" if pins else ""
            raise ValueError(
                f"the plan does not fit: it cuts {path!r} differently from what is coupled here"
                f"{why}; couple and shrink the model as it is called here"
            )


def cut_array(array: Any, cuts: Sequence[Any]) -> Any:
    """Returns what stays of an array; a new array wherever something goes. Shapes give shapes."""
    if isinstance(array, jax.ShapeDtypeStruct):
        shape = list(array.shape)
        for cut in cuts:
            shape[cut.axis] = cut.positions.shape[-1]
        return array.update(shape=tuple(shape))
    return by_numpy(functools.partial(_cut, cuts), array) if cuts else array


def _cut(cuts: Sequence[Any], array: Any) -> Any:
    # What differs from block to block is cut first, while the blocks still lie where they were.
    for cut in sorted(cuts, key=lambda c: c.by is None):
        if cut.by is None:
            array = take(array, cut.positions, cut.axis)
        else:
            array = _cut_blocks(array, cut.positions, cut.axis, cut.by)
    return array


def take(array: Any, positions: np.ndarray, axis: int) -> Any:
    """Returns the given positions of an axis."""
    return namespace(array).take(array, array_like(array, positions), axis=axis)


def _cut_blocks(array: Any, positions: np.ndarray, axis: int, by: int) -> Any:
    size = array.shape[by] // len(positions)
    parts = []
    xp = namespace(array)
    for block, rows in enumerate(positions):
        index = [slice(None)] * len(array.shape)
        index[by] = slice(block * size, (block + 1) * size)
        parts.append(take(array[tuple(index)], rows, axis))
    return xp.concat(parts, axis=by)
