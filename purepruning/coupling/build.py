"""From atoms to a coupling: what a front end calls once its program is walked through."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from purepruning.coupling.atoms import KEPT, NUMBER, Axis, all_differ
from purepruning.coupling.coupling import Coupling
from purepruning.coupling.experts import with_experts
from purepruning.coupling.flow import Flow
from purepruning.coupling.units import Coupled, Family, FamilyAxis, FrozenAxis, Product
from purepruning.coupling.value import COMPANION, SINK, SOURCE, STACK, TAP


def build(
    flow: Flow,
    leaves: Mapping[str, Sequence[int]],
    axes: Mapping[str, Any],
    *,
    times: Mapping[Any, int],
    outputs: Any = True,
    tables: bool = False,
) -> tuple[Coupling, np.ndarray]:
    """Returns the coupling that a flow found, and the unit of every atom (0 for none).

    Args:
        flow: after all operations.
        leaves: shape of every parameter by path.
        axes: their axes as :meth:`Flow.leaf` gave them.
        times: how often the program runs each operation, by what the front end calls it.
        outputs: which outputs keep their size.
        tables: whether there are units of tables that no layer makes or reads.
    """
    paths = sorted(leaves)
    roles = {
        (path, a): _role(flow, path, a, len(leaves[path]))
        for path in paths
        for a in range(len(leaves[path]))
    }
    resolved, by, parts = _settle(flow, paths, leaves, axes)
    while not tables and _keep_tables(flow, resolved, roles):
        resolved, by, parts = _settle(flow, paths, leaves, axes)
    atoms = _order(resolved, paths, flow.atoms.size)
    numbers = np.zeros(flow.atoms.size, np.int32)
    numbers[atoms] = 1 + np.arange(len(atoms))
    coupled = {
        path: Coupled(
            tuple(leaves[path]),
            tuple(None if x is None else numbers[x] for x in resolved[path]),
            by[path],
            tuple(roles[path, a] for a in range(len(leaves[path]))),
            tuple((path, a) in flow.nonzero for a in range(len(leaves[path]))),
            path in flow.tables,
            path in flow.depthwise,
        )
        for path in paths
    }
    n_units = len(atoms)
    heads, positions = (_marked(flow, x, numbers) for x in (flow.heads, flow.head_positions))
    frozen = _frozen(flow, paths, leaves, axes, resolved)
    families = with_experts(_families(coupled, n_units, heads, positions), coupled, frozen)
    groups = _groups(families, [numbers[x] for x in parts], n_units)
    products = tuple(
        _product(flow, c, numbers, times[where])
        for where, c in flow.contractions.items()
        if where in times
    )
    coupling = Coupling(
        coupled,
        families,
        groups,
        frozen,
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
        parts = _settle_equal_parts(flow)
        resolved: dict[str, list[Axis]] = {}
        by: dict[str, tuple[int | None, ...]] = {}
        changed = False
        for path in paths:
            found: list[Axis] = []
            blocks: list[int | None] = []
            for a in range(len(leaves[path])):
                by_block = flow.by_block.get((path, a))
                if by_block is None:
                    found.append(flow.atoms.resolve(axes[path][a]))
                    blocks.append(None)
                else:
                    stored = by_block[1]
                    x = flow.atoms.resolve(stored.reshape(-1, stored.shape[-1]))
                    found.append(None if x is None else x.reshape(*stored.shape[:2], -1))
                    blocks.append(None if x is None else by_block[0])
                changed |= _keep_last(flow, found[-1])
            resolved[path], by[path] = found, tuple(blocks)
        if not changed and not _settle_statistics(flow):
            return resolved, by, parts


def _keep_tables(
    flow: Flow, resolved: Mapping[str, Sequence[Axis]], roles: Mapping[tuple[str, int], str]
) -> bool:
    """Keeps atoms that no layer makes or reads, such as rows of a table; whether there are any."""
    layers, tables = np.zeros(flow.atoms.size, bool), np.zeros(flow.atoms.size, bool)
    for path, axes in resolved.items():
        for a, x in enumerate(axes):
            if x is not None:
                (tables if roles[path, a] == COMPANION else layers)[x] = True
    tables &= ~layers
    tables[KEPT] = False
    alone = np.flatnonzero(tables)
    if len(alone):
        flow.atoms.keep(alone[:, None], "of a table that no layer makes or reads")
    return bool(len(alone))


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


def _settle_equal_parts(flow: Flow) -> list[np.ndarray]:
    """Returns the constraints that blocks lose equally many, each ``(blocks, n)`` free atoms."""
    while True:
        found: list[np.ndarray] = []
        changed = False
        for block in flow.equal_parts:
            flat = flow.atoms.resolve(block.reshape(-1, 1))
            if flat is None:
                continue
            wide = flat.reshape(*block.shape, -1)
            if (wide == wide[:1]).all():
                continue
            free = flat[flat != KEPT]
            per_block = (wide[..., 0] != KEPT).sum(1)
            if wide.shape[-1] > 1 or not all_differ(free) or len(set(per_block.tolist())) > 1:
                # Then all blocks lose the same positions, equally many.
                for row in wide[1:]:
                    flow.atoms.same(row, wide[0], "blocks that must lose equally many")
                changed = True
                continue
            found.append(wide[..., 0])
        if changed:
            continue
        if not _too_fine(flow, found):
            return found


def _too_fine(flow: Flow, parts: list[np.ndarray]) -> bool:
    """Keeps what cannot be chosen evenly; returns whether anything changed."""
    for component in _components(parts):
        chunks = _chunks(component)
        if chunks and len(chunks[0]) == 1 and len(chunks) > 1:
            flow.atoms.keep(np.concatenate(chunks)[:, None], "groups that cannot lose equally many")
            return True
    return False


def _components(parts: list[np.ndarray]) -> list[list[np.ndarray]]:
    """Returns the parts that share atoms, together; in the order of their last parts."""
    n_atoms = max((int(x.max(initial=KEPT)) for x in parts), default=KEPT) + 1
    owner = np.full(n_atoms, -1)  # of every atom the first part it was met in
    lead = list(range(len(parts)))

    def first(i: int) -> int:
        while lead[i] != i:
            i = lead[i]
        return i

    for i, block in enumerate(parts):
        mine = block[block != KEPT]
        for met in np.flatnonzero(np.bincount(owner[mine] + 1)[1:]).tolist():
            low, high = sorted((first(met), first(i)))
            lead[high] = low
        fresh = mine[owner[mine] < 0]
        owner[fresh] = i
    found: dict[int, list[int]] = {}
    for i in range(len(parts)):
        found.setdefault(first(i), []).append(i)
    return [[parts[i] for i in some] for some in sorted(found.values(), key=lambda s: s[-1])]


def _chunks(component: list[np.ndarray]) -> list[np.ndarray]:
    """Returns parts of equal size such that equally many of each is equally many of all blocks."""
    flat = np.concatenate([block.reshape(-1) for block in component])
    atoms, met = np.unique(flat, return_index=True)
    atoms, met = atoms[atoms != KEPT], met[atoms != KEPT]
    if not len(atoms):
        return []
    atoms = atoms[np.argsort(met)]  # as they are met
    index = np.zeros(int(atoms.max()) + 1, NUMBER)
    index[atoms] = np.arange(len(atoms))
    cell = np.zeros(len(atoms), np.int64)  # atoms that lie alike in all blocks are one cell
    for block in component:
        line = np.zeros(len(atoms), NUMBER)
        for number, row in enumerate(block, 1):
            line[index[row[row != KEPT]]] = number
        cell = _numbered(cell * (len(block) + 1) + line)
    sizes = np.bincount(cell)
    size = math.gcd(*sizes.tolist())
    cells = np.split(atoms[np.argsort(cell, kind="stable")], np.cumsum(sizes)[:-1])
    return [c[i : i + size] for c in cells for i in range(0, len(c), size)]


def _numbered(keys: np.ndarray) -> np.ndarray:
    """Returns for every key the number of its kind; kinds are numbered as they are first met.

    Equal keys mostly lie side by side, so that there are far fewer runs than keys.
    """
    starts = np.flatnonzero(np.diff(keys, prepend=~keys[:1]))
    _, first, inverse = np.unique(keys[starts], return_index=True, return_inverse=True)
    number = np.zeros(len(first), np.int64)
    number[np.argsort(first)] = np.arange(len(first))
    lengths = np.diff(starts, append=len(keys))
    return np.repeat(number[inverse.reshape(-1)], lengths)


def _order(resolved: Mapping[str, list[Axis]], paths: list[str], n_atoms: int) -> np.ndarray:
    """Returns all atoms that remove anything, in the order in which they are met."""
    met = np.zeros(n_atoms, bool)
    met[KEPT] = True
    found = [np.zeros(0, NUMBER)]
    for axis in (x for path in paths for x in resolved[path] if x is not None):
        new = axis.reshape(-1)
        new = new[~met[new]]
        if not all_differ(new):
            new = new[np.sort(np.unique(new, return_index=True)[1])]
        met[new] = True
        found.append(new)
    return np.concatenate(found)


def _marked(flow: Flow, axes: Sequence[np.ndarray], numbers: np.ndarray) -> set[int]:
    found = np.zeros(int(numbers.max(initial=0)) + 1, bool)
    for axis in axes:
        x = flow.atoms.resolve(axis)
        if x is not None:
            found[numbers[x]] = True
    return set(np.flatnonzero(found).tolist()) - {0}


def _role(flow: Flow, path: str, axis: int, ndim: int) -> str:
    if path in flow.tables:
        return COMPANION
    if (path, axis) in flow.sinks:
        # Tied weights make the channels too that they read elsewhere.
        return SOURCE if (path, axis) in flow.sources else SINK
    if (path, axis) in flow.taps:
        return TAP
    if (path, axis) in flow.stacks:
        return STACK
    # What scales a kernel, such as the gain of weight normalisation, makes nothing of its own.
    return SOURCE if any((path, a) in flow.sinks for a in range(ndim)) else COMPANION


def _families(
    leaves: Mapping[str, Coupled], n_units: int, heads: set[int], head_positions: set[int]
) -> tuple[Family, ...]:
    random = np.random.default_rng(0)
    key = np.zeros(n_units + 1, np.uint64)
    kinds = np.full(n_units + 1, "channel", dtype=object)
    for _, _, units in _axes_of(leaves):
        for column in units.reshape(-1, units.shape[-1]).T:
            lowest = int(column.min(initial=n_units))
            counts = np.bincount(column - lowest)
            if lowest == KEPT:
                counts[KEPT] = 0
            token = random.integers(1, 2**63, dtype=np.uint64)
            key[lowest : lowest + len(counts)] += token * counts.astype(np.uint64)
            _geometry(column - lowest, np.flatnonzero(counts > 1), kinds[lowest:])
    of_unit = _numbered(key[1:])  # families by their first units
    sizes = np.bincount(of_unit)
    order = np.argsort(of_unit, kind="stable") + 1
    parts = np.split(order, np.cumsum(sizes)[:-1]) if n_units else []
    # Every family lies where its first unit does.
    family_led = np.full(n_units + 1, -1, NUMBER)
    family_led[[part[0] for part in parts]] = np.arange(len(parts))
    inside: list[list[FamilyAxis]] = [[] for _ in parts]
    for path, axis, units in _axes_of(leaves):
        found = family_led[units.reshape(-1)]
        positions = np.bincount(found[found >= 0])
        for i in np.flatnonzero(positions).tolist():
            role = leaves[path].roles[axis]
            inside[i].append(FamilyAxis(path, axis, role, int(positions[i])))
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


def _axes_of(leaves: Mapping[str, Coupled]) -> Iterator[tuple[str, int, np.ndarray]]:
    """Yields the axes that units lie in: path, axis, and the units of every position."""
    for path, leaf in leaves.items():
        for axis, units in enumerate(leaf.units):
            if units is not None:
                yield path, axis, units


def _geometry(column: np.ndarray, several: np.ndarray, kinds: np.ndarray) -> None:
    """Notes whether units that have several positions of an axis have them side by side.

    Units are counted from the lowest of the axis, as ``kinds`` are, since an axis has few of all.
    """
    if not len(several):
        return
    runs = np.bincount(column[np.flatnonzero(np.diff(column, prepend=-1))])[several]
    together = (runs == 1) & (kinds[several] != "position")
    kinds[several] = np.where(together, "block", "position")


def _groups(
    families: tuple[Family, ...], parts: list[np.ndarray], n_units: int
) -> tuple[tuple[np.ndarray, ...], ...]:
    taken = np.zeros(n_units + 1, bool)
    found = []
    for component in _components([x for x in parts if x.any()]):
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


def _frozen(
    flow: Flow,
    paths: list[str],
    leaves: Mapping[str, Sequence[int]],
    axes: Mapping[str, Any],
    resolved: Mapping[str, list[Axis]],
) -> tuple[FrozenAxis, ...]:
    found = []
    for path in paths:
        for a, axis in enumerate(axes[path]):
            blocks = 1
            if (path, a) in flow.by_block:
                stored = flow.by_block[path, a][1]
                blocks, axis = len(stored), stored.reshape(-1, stored.shape[-1])
            if axis is None:
                continue
            x = resolved[path][a]
            fixed = np.ones(len(axis), bool) if x is None else (x == KEPT).all(-1).reshape(-1)
            if not fixed.any():
                continue
            reasons = [r for r in flow.atoms.reason(axis[fixed]) if r]
            reason = max(sorted(set(reasons)), key=reasons.count) if reasons else "its factors stay"
            if reason not in ("taps of a kernel", "a spatial axis"):
                positions = fixed.reshape(blocks, -1).any(0).sum()
                found.append(FrozenAxis(path, a, int(positions), reason))
    return tuple(found)
