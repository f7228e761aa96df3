"""The coupling of a model as data: units, the families they come in, and what stays whole.

Made by a front end from its atoms, and all that allocation, masks, costs, reports and shrinking
look at. Units are numbered from 1; 0 stands for what is never removed.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from purepruning.config import count_of
from purepruning.coupling.atoms import KEPT, Axis
from purepruning.coupling.flow import COMPANION, SINK, SOURCE, Flow
from purepruning.coupling.masks import Conflicts, masks_of, units_of
from purepruning.coupling.report import text
from purepruning.masks import merge_masks
from purepruning.namespace import flatten


@dataclasses.dataclass(frozen=True)
class Coupled:
    """One parameter: which units every position of every axis depends on.

    Attributes:
        shape: its shape.
        units: for every axis an int array ``(n, k)``, the units of each position filled up with 0;
            or ``(blocks, n, k)`` where positions differ from block to block of another axis; or
            None where the axis stays whole.
        by: for every axis the axis whose blocks its positions differ by, or None.
        roles: for every axis ``"source"`` (its layer makes these channels), ``"sink"`` (it reads
            them) or ``"companion"`` (a scale, a bias, a statistic, a table).
    """

    shape: tuple[int, ...]
    units: tuple[Axis, ...]
    by: tuple[int | None, ...]
    roles: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Member:
    """Where a family lies in one parameter: the axis, its role, and positions of each unit."""

    path: str
    axis: int
    role: str
    positions: int


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """Units of one kind: they lie in the same axes of the same parameters.

    Attributes:
        name: the first parameter that makes these channels, and its axis.
        kind: ``"channel"``; of an axis in two factors ``"block"`` (a group of channels that goes
            whole) or ``"position"`` (the same position of every block); ``"head"`` and
            ``"head_position"`` where those are the heads of an attention and the positions within.
        units: int array of the units' numbers.
        members: the axes they lie in.
    """

    name: str
    kind: str
    units: np.ndarray
    members: tuple[Member, ...]

    def __len__(self) -> int:
        return len(self.units)


@dataclasses.dataclass(frozen=True)
class Pin:
    """Positions of a parameter's axis that stay, and why."""

    path: str
    axis: int
    positions: int
    reason: str


@dataclasses.dataclass(frozen=True, eq=False)
class Product:
    """A contraction or convolution: its multiply-adds are the product of its sizes.

    Attributes:
        weights: the parameters it multiplies by; empty for two activations.
        constant: the product of the sizes that never change.
        units: for every other axis the units of its positions.
    """

    weights: tuple[str, ...]
    constant: Any
    units: tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Coupling:
    """Which slices of which parameters can only be kept or removed together.

    Attributes:
        leaves: every parameter by path.
        families: the units, by family, the largest first.
        groups: how units may be chosen: each group is a tuple of int arrays of equal length, and
            loses equally many units of each. Most groups are one array; grouped convolutions and
            stacked layers make several.
        pins: axes that stay, wholly or in part, and why; taps of kernels are not listed.
        unknown: operations without a rule, and how often they met something prunable.
        products: the contractions of the program, for counting multiply-adds.
        statistics: how many sums over axes that may shrink are corrected for what is removed.
        outputs: which outputs of the function stay whole, as :func:`couple` was told.
    """

    leaves: Mapping[str, Coupled]
    families: tuple[Family, ...]
    groups: tuple[tuple[np.ndarray, ...], ...]
    pins: tuple[Pin, ...]
    unknown: Mapping[str, int]
    products: tuple[Product, ...]
    statistics: int = 0
    outputs: Any = True

    @property
    def n_units(self) -> int:
        """Number of units."""
        return sum(len(f.units) for f in self.families)

    @functools.cached_property
    def family_of(self) -> np.ndarray:
        """For every unit the index of its family; -1 at 0."""
        found = np.full(self.n_units + 1, -1)
        for i, family in enumerate(self.families):
            found[family.units] = i
        return found

    @functools.cached_property
    def digest(self) -> str:
        """A hash of the structure: couplings of the same units in the same parameters have one."""
        sha = hashlib.sha256()
        rows: list[Any] = [
            self.groups,
            [(f.name, f.kind, f.units, f.members) for f in self.families],
        ]
        rows += [(path, *dataclasses.astuple(leaf)) for path, leaf in sorted(self.leaves.items())]
        rows += [(p.weights, str(p.constant), p.units) for p in self.products]
        for x in _arrays(rows):
            sha.update(f"{x.shape}{x.dtype}".encode() + x.tobytes() if _is_array(x) else x.encode())
        return sha.hexdigest()

    def removed(self, pruned: Iterable[int]) -> np.ndarray:
        """Returns a boolean by unit number, True where pruned.

        Raises:
            ValueError: a number that is no unit, or a selection that is uneven where it must not be
                or leaves nothing of an axis.
            TypeError: what is given are no whole numbers.
        """
        dead = self._marked(pruned)
        self.check(dead)
        return dead

    def _marked(self, pruned: Iterable[int]) -> np.ndarray:
        given = np.asarray(list(pruned) if not isinstance(pruned, np.ndarray) else pruned)
        if given.size and given.dtype.kind not in "iu":
            raise TypeError(
                f"pruned must hold unit numbers, got {given.dtype} (of booleans by unit number, "
                "pass np.flatnonzero)"
            )
        numbers = given.astype(np.int64).reshape(-1)
        if numbers.size and not (numbers.min() >= 1 and numbers.max() <= self.n_units):
            raise ValueError(
                f"pruned must hold unit numbers from 1 to {self.n_units}, got "
                f"{int(numbers.min())} to {int(numbers.max())}"
            )
        dead = np.zeros(self.n_units + 1, bool)
        dead[numbers] = True
        return dead

    def check(self, dead: np.ndarray) -> None:
        """Raises ValueError if removing these units is uneven or empties an axis."""
        for chunks in self.groups:
            counts = [int(dead[chunk].sum()) for chunk in chunks]
            if len(set(counts)) > 1:
                family = self.families[self.family_of[chunks[0][0]]]
                raise ValueError(
                    f"units of {family.name} must go evenly from the {len(chunks)} parts of it, "
                    f"got {counts}"
                )
        for path, leaf in self.leaves.items():
            for axis, units in enumerate(leaf.units):
                if units is not None and dead[units].any(-1).all():
                    raise ValueError(f"pruned leaves nothing of axis {axis} of {path!r}")

    def kept(self, path: str, axis: int, dead: np.ndarray) -> np.ndarray | None:
        """Returns which positions of an axis stay, ``(n,)`` or ``(blocks, n)``; None for all."""
        units = self.leaves[path].units[axis]
        if units is None:
            return None
        keep: np.ndarray = np.logical_not(dead[units].any(-1))
        return None if keep.all() else keep

    def masks(self, pruned: Iterable[int], params: Any) -> Any:
        """Returns the masks that prune units everywhere: in what makes, scales and reads them.

        With these masks a masked model computes what the shrunk one does. Masks broadcast to their
        parameters; a parameter that loses nothing has none.

        Args:
            pruned: numbers of units.
            params: the parameters, for the tree and the framework of the masks.

        Raises:
            ValueError: see :meth:`removed`; or a parameter has another shape than when coupled.
            KeyError: a parameter is missing.
        """
        return masks_of(self, self.removed(pruned), params)

    def complete(self, masks: Any, params: Any, *, conflicts: Conflicts = "refuse") -> Any:
        """Returns masks with all that goes along: scales, biases, and what reads the channels.

        ``masks`` are those of any pruner, which cover the layers that it prunes. A model masked by
        the result computes what the one that :func:`purepruning.shrink` makes of it does; and
        training that keeps these masks never touches what would be cut.

        Args:
            masks: the masks.
            params: the parameters.
            conflicts: as in :func:`purepruning.shrink`, where the layers that make a unit disagree.

        Raises:
            ValueError: they disagree, and ``conflicts`` is ``"refuse"``; what is removed is uneven
                or empties an axis. See also :meth:`masks`.

        >>> import jax.numpy as jnp
        >>> import purepruning as pp
        >>> params = {"one": jnp.ones((2, 3)), "bias": jnp.ones(3), "two": jnp.ones((3, 1))}
        >>> fn = lambda p, x: (x @ p["one"] + p["bias"][None]) @ p["two"]
        >>> coupling = pp.couple(fn, params, jnp.ones((1, 2)))
        >>> masks = {"one": jnp.array([[True, False, True]]), "bias": None, "two": None}
        >>> masks = coupling.complete(masks, params)
        >>> masks["bias"].tolist(), masks["two"].tolist()
        ([True, False, True], [[True], [False], [True]])
        """
        if conflicts not in ("refuse", "keep", "remove"):
            raise ValueError(f"conflicts must be 'refuse', 'keep' or 'remove', got {conflicts!r}")
        chosen = units_of(self, masks, flatten(params).leaves, conflicts)
        return merge_masks(self.masks(np.flatnonzero(chosen.dead), params), masks)

    def lowest(self, scores: Any, sparsity: float) -> np.ndarray:
        """Returns the units of lowest score, an equal share of every group.

        Args:
            scores: float array by unit number (``scores[0]`` is ignored), or of shape
                ``(n_units,)`` for units 1, 2, ...
            sparsity: fraction of every group's units, as in :func:`purepruning.count_of`.

        Raises:
            ValueError: scores of another length, or NaN.
        """
        scores = np.asarray(scores, np.float64).reshape(-1)
        if len(scores) == self.n_units:
            scores = np.concatenate([[0.0], scores])
        if len(scores) != self.n_units + 1 or np.isnan(scores[1:]).any():
            raise ValueError(f"scores must be {self.n_units} numbers, one for each unit")
        found = []
        for chunks in self.groups:
            n = count_of(sparsity, len(chunks[0]))
            for chunk in chunks:
                found.append(chunk[np.argsort(scores[chunk], kind="stable")[:n]])
        return np.sort(np.concatenate(found)) if found else np.zeros(0, np.int64)

    def cost(self, pruned: Iterable[int] | np.ndarray = ()) -> tuple[int, int]:
        """Returns the number of parameters and of multiply-adds left without these units."""
        if not (isinstance(pruned, np.ndarray) and pruned.dtype == bool):
            dead = self._marked(pruned)
        elif pruned.shape == (self.n_units + 1,):
            dead = pruned
        else:
            raise ValueError(
                f"pruned must be {self.n_units + 1} booleans by unit number, or unit numbers; got "
                f"booleans of shape {pruned.shape}"
            )
        params = 0
        for leaf in self.leaves.values():
            size = 1
            for n, units in zip(leaf.shape, leaf.units, strict=True):
                size *= n if units is None else _left(units, dead)
            params += size
        macs = sum(
            p.constant * math.prod(_left(units, dead) for units in p.units) for p in self.products
        )
        return params, macs

    def __repr__(self) -> str:
        return f"Coupling({self.n_units} units in {len(self.families)} families)"

    def __str__(self) -> str:
        return text(self)


def _is_array(x: Any) -> bool:
    return isinstance(x, np.ndarray)


def _arrays(x: Any) -> Iterator[Any]:
    """Yields the arrays in nested tuples and lists; other things as text."""
    if isinstance(x, list | tuple):
        yield f"{len(x)}("
        for part in x:
            yield from _arrays(part)
    else:
        yield np.ascontiguousarray(x) if _is_array(x) else repr(x)


def _left(units: np.ndarray, dead: np.ndarray) -> int:
    keep = ~dead[units].any(-1)
    return int(keep.sum()) if units.ndim == 2 else int(keep[0].sum())


def structure(
    flow: Flow,
    leaves: Mapping[str, Sequence[int]],
    axes: Mapping[str, Any],
    *,
    times: Mapping[Any, int],
    outputs: Any = True,
) -> tuple[Coupling, np.ndarray]:
    """Returns the coupling that a flow found, and the unit of every atom (0 for none).

    Args:
        flow: after all operations.
        leaves: shape of every parameter by path.
        axes: their axes as :meth:`Flow.leaf` gave them.
        times: how often the program runs each operation, by what the front end calls it.
        outputs: which outputs stay whole.
    """
    paths = sorted(leaves)
    resolved, by, even = _settle(flow, paths, leaves, axes)
    atoms, first = _order(resolved, paths)
    numbers = np.zeros(flow.atoms.size, np.int64)
    numbers[atoms[np.argsort(first, kind="stable")]] = 1 + np.arange(len(atoms))
    roles = {
        (path, a): _role(flow, path, a, len(leaves[path]))
        for path in paths
        for a in range(len(leaves[path]))
    }
    coupled = {
        path: Coupled(
            tuple(leaves[path]),
            tuple(None if x is None else numbers[x] for x in resolved[path]),
            by[path],
            tuple(roles[path, a] for a in range(len(leaves[path]))),
        )
        for path in paths
    }
    n_units = len(atoms)
    heads, positions = (_marked(flow, x, numbers) for x in (flow.heads, flow.head_positions))
    families = _families(coupled, n_units, heads, positions)
    groups = _groups(families, [numbers[x] for x in even], n_units)
    products = tuple(
        _product(flow, c, numbers, times[where])
        for where, c in flow.contractions.items()
        if where in times
    )
    coupling = Coupling(
        coupled,
        families,
        groups,
        _pins(flow, paths, leaves, axes, resolved),
        dict(sorted(flow.unknown.items())),
        products,
        sum(where in times for where in flow.statistics),
        outputs,
    )
    return coupling, numbers


def _settle(
    flow: Flow, paths: list[str], leaves: Mapping[str, Sequence[int]], axes: Mapping[str, Any]
) -> tuple[dict[str, list[Axis]], dict[str, tuple[int | None, ...]], list[np.ndarray]]:
    """Returns the axes of all parameters once every constraint holds."""
    while True:
        even = _settle_even(flow)
        resolved: dict[str, list[Axis]] = {}
        by: dict[str, tuple[int | None, ...]] = {}
        changed = False
        for path in paths:
            found: list[Axis] = []
            blocks: list[int | None] = []
            for a in range(len(leaves[path])):
                ragged = flow.ragged.get((path, a))
                if ragged is None:
                    found.append(flow.atoms.resolve(axes[path][a]))
                    blocks.append(None)
                else:
                    stored = ragged[1]
                    x = flow.atoms.resolve(stored.reshape(-1, stored.shape[-1]))
                    found.append(None if x is None else x.reshape(*stored.shape[:2], -1))
                    blocks.append(None if x is None else ragged[0])
                changed |= _keep_last(flow, found[-1])
            resolved[path], by[path] = found, tuple(blocks)
        if not changed and not _settle_statistics(flow):
            return resolved, by, even


def _keep_last(flow: Flow, x: Axis) -> bool:
    """Keeps atoms that are in every position of an axis: nothing would be left of it."""
    if x is None:
        return False
    rows = x.reshape(-1, x.shape[-1])
    candidates = [a for a in rows[0] if a != KEPT]
    full = [a for a in candidates if (rows == a).any(1).all()]
    if full:
        flow.atoms.keep(np.asarray(full)[:, None], "nothing would be left of an axis")
    return bool(full)


def _settle_statistics(flow: Flow) -> bool:
    """Keeps all but the longest axis of sums that are corrected; returns whether any changed."""
    changed = False
    for axes in flow.statistics.values():
        known = [x for x in map(flow.atoms.resolve, axes) if x is not None]
        for x in sorted(known, key=len, reverse=True)[1:]:
            flow.atoms.keep(x, "one of several axes of a statistic")
            changed = True
    return changed


def _settle_even(flow: Flow) -> list[np.ndarray]:
    """Returns the constraints that blocks lose equally many, each ``(blocks, n)`` free atoms."""
    while True:
        found: list[np.ndarray] = []
        changed = False
        for block in flow.even:
            flat = flow.atoms.resolve(block.reshape(-1, 1))
            if flat is None:
                continue
            wide = flat.reshape(*block.shape, -1)
            if (wide == wide[:1]).all():
                continue
            free = flat[flat != KEPT]
            per_block = (wide[..., 0] != KEPT).sum(1)
            if (
                wide.shape[-1] > 1
                or len(np.unique(free)) != len(free)
                or len(set(per_block.tolist())) > 1
            ):
                # Then all blocks lose the same positions, which is always even.
                for row in wide[1:]:
                    flow.atoms.same(row, wide[0], "blocks that must lose equally many")
                changed = True
                continue
            found.append(wide[..., 0])
        if changed:
            continue
        if not _too_fine(flow, found):
            return found


def _too_fine(flow: Flow, even: list[np.ndarray]) -> bool:
    """Keeps what cannot be chosen evenly; returns whether anything changed."""
    for component in _components(even):
        chunks = _chunks(component)
        if chunks and len(chunks[0]) == 1 and len(chunks) > 1:
            flow.atoms.keep(np.concatenate(chunks)[:, None], "groups that no even choice fits")
            return True
    return False


def _components(even: list[np.ndarray]) -> list[list[np.ndarray]]:
    found: list[tuple[set[int], list[np.ndarray]]] = []
    for block in even:
        mine = set(block[block != KEPT].tolist())
        joined = [block]
        rest = []
        for atoms, blocks in found:
            if atoms & mine:
                mine |= atoms
                joined = [*blocks, *joined]
            else:
                rest.append((atoms, blocks))
        found = [*rest, (mine, joined)]
    return [blocks for _, blocks in found]


def _chunks(component: list[np.ndarray]) -> list[np.ndarray]:
    """Returns parts of equal size such that equally many of each is equally many of all blocks."""
    place: dict[int, list[int]] = {}
    for i, block in enumerate(component):
        for row, atoms in enumerate(block):
            for atom in atoms[atoms != KEPT].tolist():
                place.setdefault(atom, [-1] * len(component))[i] = row
    cells: dict[tuple[int, ...], list[int]] = {}
    for atom, key in place.items():
        cells.setdefault(tuple(key), []).append(atom)
    size = math.gcd(*(len(c) for c in cells.values())) if cells else 0
    return [np.asarray(c[i : i + size]) for c in cells.values() for i in range(0, len(c), size)]


def _order(resolved: Mapping[str, list[Axis]], paths: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns all atoms that remove anything, and where each is met first."""
    rows = [x.reshape(-1) for path in paths for x in resolved[path] if x is not None]
    flat = np.concatenate(rows) if rows else np.zeros(0, np.int64)
    atoms, first = np.unique(flat, return_index=True)
    free = atoms != KEPT
    return atoms[free], first[free]


def _marked(flow: Flow, axes: Sequence[np.ndarray], numbers: np.ndarray) -> set[int]:
    found: set[int] = set()
    for axis in axes:
        x = flow.atoms.resolve(axis)
        if x is not None:
            found.update(np.unique(numbers[x]).tolist())
    return found - {0}


def _role(flow: Flow, path: str, axis: int, ndim: int) -> str:
    if (path, axis) in flow.sinks:
        return SINK
    if (path, axis) in flow.sources or any((path, a) in flow.sinks for a in range(ndim)):
        return SOURCE
    return COMPANION


def _families(
    leaves: Mapping[str, Coupled], n_units: int, heads: set[int], head_positions: set[int]
) -> tuple[Family, ...]:
    random = np.random.default_rng(0)
    key = np.zeros(n_units + 1, np.uint64)
    kinds = np.full(n_units + 1, "channel", dtype=object)
    places: list[tuple[str, int, str, list[tuple[np.ndarray, np.ndarray]]]] = []
    for path, leaf in leaves.items():
        for axis, units in enumerate(leaf.units):
            if units is None:
                continue
            columns = []
            for column in units.reshape(-1, units.shape[-1]).T:
                lowest = column.min(initial=n_units)
                count = np.bincount(column - lowest)
                if lowest == KEPT:
                    count[KEPT] = 0
                found = np.flatnonzero(count)
                counts = count[found]
                found += lowest
                token = random.integers(1, 2**63, dtype=np.uint64)
                key[found] += token * counts.astype(np.uint64)
                _geometry(column, found[counts > 1], kinds)
                columns.append((found, counts))
            places.append((path, axis, leaf.roles[axis], columns))
    _, first, index = np.unique(key[1:], return_index=True, return_inverse=True)
    of_unit = np.argsort(np.argsort(first))[index.reshape(-1)]  # families by their first units
    leads = np.zeros(n_units + 1, bool)
    leads[1 + first] = True
    inside: list[list[Member]] = [[] for _ in first]
    for path, axis, role, columns in places:
        positions: dict[int, int] = {}
        for found, counts in columns:
            leading = leads[found]
            for unit, n in zip(found[leading].tolist(), counts[leading].tolist(), strict=True):
                positions[unit] = positions.get(unit, 0) + n
        for unit, n in positions.items():
            inside[of_unit[unit - 1]].append(Member(path, axis, role, n))
    order = np.argsort(of_unit, kind="stable") + 1
    parts = np.split(order, np.cumsum(np.bincount(of_unit))[:-1]) if n_units else []
    families = []
    for members, placed in zip(parts, inside, strict=True):
        unit = int(members[0])
        kind = str(kinds[unit])
        if unit in heads:
            kind = "head"
        elif unit in head_positions:
            kind = "head_position"
        lead = next((m for m in placed if m.role == SOURCE), placed[0])
        families.append(Family(f"{lead.path}[{lead.axis}]", kind, members, tuple(placed)))
    names: dict[str, int] = {}
    for i, family in enumerate(families):
        names[family.name] = names.get(family.name, 0) + 1
        if names[family.name] > 1:
            families[i] = dataclasses.replace(family, name=f"{family.name}#{names[family.name]}")
    return tuple(sorted(families, key=lambda f: (-len(f.units), int(f.units[0]))))


def _geometry(column: np.ndarray, several: np.ndarray, kinds: np.ndarray) -> None:
    """Notes whether units that have several positions of an axis have them side by side."""
    if not len(several):
        return
    runs = np.bincount(column[np.flatnonzero(np.diff(column, prepend=-1))], minlength=len(kinds))
    for unit in several:
        kinds[unit] = "block" if runs[unit] == 1 and kinds[unit] != "position" else "position"


def _groups(
    families: tuple[Family, ...], even: list[np.ndarray], n_units: int
) -> tuple[tuple[np.ndarray, ...], ...]:
    taken = np.zeros(n_units + 1, bool)
    found = []
    for component in _components([x for x in even if x.any()]):
        chunks = [np.sort(c) for c in _chunks(component)]
        for chunk in chunks:
            taken[chunk] = True
        found.append(tuple(sorted(chunks, key=lambda c: int(c[0]))))
    for family in families:
        rest = family.units[~taken[family.units]]
        if len(rest):
            found.append((rest,))
    return tuple(sorted(found, key=lambda g: int(g[0][0])))


def _product(flow: Flow, c: Any, numbers: np.ndarray, times: int) -> Product:
    constant: Any = times
    units = []
    for n, axis in zip(c.sizes, c.axes, strict=True):
        x = flow.atoms.resolve(axis)
        if x is None:
            constant = constant * n
        else:
            found = numbers[x]
            if found.any():
                units.append(found)
            else:
                constant = constant * n
    return Product(c.weights, constant, tuple(units))


def _pins(
    flow: Flow,
    paths: list[str],
    leaves: Mapping[str, Sequence[int]],
    axes: Mapping[str, Any],
    resolved: Mapping[str, list[Axis]],
) -> tuple[Pin, ...]:
    found = []
    for path in paths:
        for a, axis in enumerate(axes[path]):
            if axis is None or (path, a) in flow.ragged:
                continue
            x = resolved[path][a]
            fixed = np.ones(len(axis), bool) if x is None else (x == KEPT).all(1)
            if not fixed.any():
                continue
            reasons = [r for r in flow.atoms.reason(axis[fixed]) if r]
            reason = max(sorted(set(reasons)), key=reasons.count) if reasons else "its factors stay"
            if reason not in ("taps of a kernel", "a spatial axis"):
                found.append(Pin(path, a, int(fixed.sum()), reason))
    return tuple(found)
