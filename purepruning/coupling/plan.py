"""A plan: which positions of every parameter stay. Plain data that cuts any tree of that model."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from purepruning.arguments import instance, missing, shown, whole_number
from purepruning.arrays import (
    array_like,
    by_numpy,
    in_layout,
    is_array,
    is_spread,
    namespace,
)
from purepruning.coupling.coupling import Coupling
from purepruning.trees import flatten


@dataclasses.dataclass(frozen=True, eq=False)
class Cut:
    """What stays of one axis.

    Attributes:
        axis: which axis.
        positions: int array ``(kept,)``, or ``(blocks, kept)``: for every block of axis ``by``.
        by: the axis whose blocks keep positions of their own, or None.

    Raises:
        TypeError, ValueError: positions are no ascending integers of such a shape; no axis.
    """

    axis: int
    positions: np.ndarray
    by: int | None = None

    def __post_init__(self) -> None:
        where = f"Cut of axis {shown(self.axis)}"
        whole_number(self.axis, f"{where}: axis", 0)
        if self.by is not None and whole_number(self.by, f"{where}: by", 0) == self.axis:
            raise ValueError(f"{where}: by must be another axis, got {self.by}")
        positions, ndim = np.asarray(self.positions), 1 if self.by is None else 2
        if positions.dtype.kind not in "iu" or positions.ndim != ndim:
            raise ValueError(
                f"{where}: positions must be integers with {ndim} axes, got {shown(positions)}"
            )
        if (positions < 0).any() or (positions[..., 1:] <= positions[..., :-1]).any():
            raise ValueError(f"{where}: positions must ascend from 0 on")
        object.__setattr__(self, "positions", positions)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """Which positions of which axes stay, by parameter path.

    Attributes:
        shapes: shape of every parameter before it is cut.
        cuts: for every parameter that shrinks, its axes that do.
        removed: numbers of the units that go, of the coupling the plan was made from.

    Raises:
        TypeError, ValueError: shapes are none; a parameter has no place for its cuts.
    """

    shapes: Mapping[str, tuple[int, ...]]
    cuts: Mapping[str, tuple[Cut, ...]]
    removed: tuple[int, ...]

    def __post_init__(self) -> None:
        for field in ("shapes", "cuts"):
            instance(getattr(self, field), Mapping, f"Plan: {field}", "a mapping by parameter path")
        for path, shape in self.shapes.items():
            instance(shape, tuple, f"Plan: shape of {path!r}", "a tuple of integers")
            for size in shape:
                whole_number(size, f"Plan: shape of {path!r}", 0)
        for path, cuts in self.cuts.items():
            if path not in self.shapes:
                raise ValueError(missing(f"Plan: cuts of {path!r}, of no shape", path, self.shapes))
            _check_cuts(path, cuts, self.shapes[path])
        instance(self.removed, tuple, "Plan: removed", "a tuple of integers")
        for unit in self.removed:
            whole_number(unit, "Plan: removed", 1)

    def __repr__(self) -> str:
        cut = f"{len(self.cuts)} of {len(self.shapes)} parameters"
        return f"Plan({len(self.removed)} units removed, {cut} cut)"

    def shape(self, path: str) -> tuple[int, ...]:
        """Returns the shape of a parameter after it is cut.

        Raises:
            KeyError: the plan knows no parameter of that path.
        """
        if not isinstance(path, str) or path not in self.shapes:
            raise KeyError(missing(f"the plan has no parameter {shown(path)}", path, self.shapes))
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
        if not any(map(is_array, flat.leaves.values())):
            raise TypeError(
                f"Plan.apply: the tree must hold arrays, got {shown(tree)}; of a torch module pass "
                "its state_dict"
            )
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
        if not is_array(leaf):
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


def _check_cuts(path: str, cuts: Any, shape: tuple[int, ...]) -> None:
    where = f"Plan: cuts of {path!r}"
    instance(cuts, tuple, where, "a tuple of Cut")
    for cut in cuts:
        instance(cut, Cut, where, "a tuple of Cut")
        if max(cut.axis, cut.by or 0) >= len(shape):
            raise ValueError(
                f"{where}: axis {cut.axis} by {cut.by} has no place in the shape {shape}"
            )
        if cut.by is not None and shape[cut.by] % max(len(cut.positions), 1):
            raise ValueError(
                f"{where}: {len(cut.positions)} blocks do not divide axis {cut.by} of {shape}"
            )
        if cut.positions.size and cut.positions.max() >= shape[cut.axis]:
            raise ValueError(
                f"{where}: axis {cut.axis} of {shape} has no position {cut.positions.max()}"
            )
    if len({cut.axis for cut in cuts}) != len(cuts):
        raise ValueError(f"{where}: an axis is cut twice")


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
            frozen = {f"axis {p.axis}: {p.reason}" for p in coupling.frozen if p.path == path}
            why = f" ({'; '.join(sorted(frozen))})" if frozen else ""
            raise ValueError(
                f"the plan does not fit: it cuts {path!r} differently from what is coupled here"
                f"{why}; couple and shrink the model as it is called here"
            )


def cut_array(array: Any, cuts: Sequence[Any]) -> Any:
    """Returns what stays of an array; a new array wherever something goes. Shapes give shapes.

    One that is laid out over the devices of a mesh stays so, but along axes that they do not divide
    any more.
    """
    if not cuts:
        return array
    shape = list(array.shape)
    for cut in cuts:
        shape[cut.axis] = cut.positions.shape[-1]
    if isinstance(array, jax.ShapeDtypeStruct):
        return array.update(shape=tuple(shape))
    if is_spread(array):
        cut = _cut_along(tuple((cut.axis, cut.by) for cut in cuts))
        return in_layout(cut, array, tuple(shape), *(cut.positions for cut in cuts))
    return by_numpy(functools.partial(_cut, cuts), array)


class _Along(NamedTuple):
    """A cut whose positions may be traced."""

    axis: int
    by: int | None
    positions: Any


@functools.cache
def _cut_along(axes: tuple[tuple[int, int | None], ...]) -> Callable[..., Any]:
    """Returns ``(array, *positions) -> array``, the same function for all arrays cut alike."""

    def cut(array: Any, *positions: Any) -> Any:
        return _cut([_Along(*a, p) for a, p in zip(axes, positions, strict=True)], array)

    return cut


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
