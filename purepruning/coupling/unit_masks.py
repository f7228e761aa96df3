"""Units to masks, and masks back to units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from purepruning.arguments import missing, shown
from purepruning.arrays import array_like, as_known, is_array, is_concrete, is_torch, jax_array
from purepruning.coupling.branches import branches_of
from purepruning.coupling.units import Coupled, Family
from purepruning.coupling.value import COMPANION, SINK, SOURCE
from purepruning.trees import flatten

#: How units may be chosen: see :attr:`purepruning.Coupling.groups`.
Groups = Sequence[tuple[np.ndarray, ...]]

#: What to do where the layers that make a unit disagree about it.
Conflicts = Literal["refuse", "keep", "remove"]


def masks_of(leaves: Mapping[str, Coupled], removed: np.ndarray, params: Any) -> Any:
    """Returns the complete masks for units that are removed; see :meth:`Coupling.masks`."""
    tree = flatten(params)
    found = {}
    for path, leaf in leaves.items():
        keep = None if leaf.table else leaf_mask(leaf, removed)
        if keep is None:
            continue
        if path not in tree.leaves:
            raise KeyError(missing(f"params have no {path!r}", path, tree.leaves))
        array = tree.leaves[path]
        if not is_array(array) or tuple(array.shape) != leaf.shape:
            raise ValueError(
                f"params: {path!r} must be an array of shape {leaf.shape}, as when it was coupled, "
                f"got {shown(array)}"
            )
        found[path] = array_like(array, keep) if is_torch(array) else jax_array(keep)
    return tree.rebuild(found)


def leaf_mask(leaf: Coupled, removed: np.ndarray) -> np.ndarray | None:
    """Returns the mask of one parameter as numpy, broadcastable; None if it loses nothing."""
    mask: np.ndarray | None = None
    for axis in range(len(leaf.shape)):
        keep = leaf.kept(axis, removed)
        if keep is None:
            continue
        part = _along(leaf, axis, keep)
        mask = part if mask is None else mask & part
    return mask


def _along(leaf: Coupled, axis: int, keep: np.ndarray) -> np.ndarray:
    shape = [1] * len(leaf.shape)
    shape[axis] = leaf.shape[axis]
    if keep.ndim == 1:
        return keep.reshape(shape)
    other = leaf.by[axis]
    assert other is not None
    rows = np.repeat(keep, leaf.shape[other] // len(keep), 0)  # (size of other, n)
    shape[other] = leaf.shape[other]
    return (rows if other < axis else rows.T).reshape(shape)


class Chosen(NamedTuple):
    """Which units masks remove: ``removed`` by unit number; what was changed to make them agree."""

    removed: np.ndarray
    restored: tuple[int, ...]
    extended: tuple[int, ...]


def check_removal(
    leaves: Mapping[str, Coupled], families: Sequence[Family], groups: Groups, removed: np.ndarray
) -> None:
    """Raises ValueError if this is uneven, or empties an axis that lies in no whole branch."""
    for chunks in groups:
        counts = [int(removed[chunk].sum()) for chunk in chunks]
        if len(set(counts)) > 1:
            family = next(f for f in families if chunks[0][0] in f.units)
            raise ValueError(
                f"units of {family.name} must go evenly from the {len(chunks)} parts of it, "
                f"got {counts}"
            )
    emptied = [
        (path, axis, units)
        for path, leaf in leaves.items()
        for axis, units in enumerate(leaf.units)
        if units is not None and removed[units].any(-1).all()
    ]
    whole = np.zeros_like(removed)
    for branch in branches_of(leaves, families) if emptied else ():
        whole[branch.units] = removed[branch.units].all()
    for path, axis, units in emptied:
        if not whole[units].any(-1).all():
            raise ValueError(f"pruned leaves nothing of axis {axis} of {path!r}")


def units_of(
    leaves: Mapping[str, Coupled],
    families: Sequence[Family],
    groups: Groups,
    masks: Mapping[str, Any],
    conflicts: Conflicts,
    refuse_none: bool = True,
) -> Chosen:
    """Returns the units that masks, by path, remove; see :func:`purepruning.shrink`.

    ``refuse_none``: whether it is an error that none can be, though some layers prune some.

    Raises:
        ValueError: the layers that make a unit disagree, and ``conflicts`` is ``"refuse"``; what is
            removed is uneven or empties an axis.
    """
    n_units = sum(map(len, families))
    shape = n_units + 1
    asked, denied, read, needed = (np.zeros(shape, bool) for _ in range(4))
    for path, leaf in leaves.items():
        mask = masks.get(path)
        full = None if mask is None else np.broadcast_to(_host(mask), leaf.shape)
        for axis, units in enumerate(leaf.units):
            if units is None or leaf.roles[axis] == COMPANION:
                continue  # a scale or a bias follows what it belongs to
            wants, stays = _votes(leaf, axis, units, full, n_units)
            if leaf.roles[axis] == SOURCE:
                asked |= wants
                denied |= stays
            else:
                read |= wants
                needed |= stays
    # What nothing reads any more may go, whatever makes it; so may what norms make zero.
    scaled = _scaled_to_zero(leaves, masks, n_units)
    idle, unmasked = scaled | (read & ~needed), scaled & denied
    asked, denied = asked | idle, denied & ~idle
    torn = asked & denied
    if torn.any() and conflicts == "refuse":
        raise ValueError(
            _disagreement(families, torn) + ". Prune coupled layers together "
            "(resolve(..., coupling=...)), or say conflicts='keep' or 'remove'"
        )
    removed = asked if conflicts == "remove" else asked & ~denied
    removed[0] = False
    removed = _balanced(groups, removed, conflicts)
    check_removal(leaves, families, groups, removed)
    if torn.any() and not removed.any() and refuse_none:
        raise ValueError(
            "nothing can be removed: " + _disagreement(families, torn) + ". Select all layers that "
            "make them in rules given to resolve(..., coupling=...), or say conflicts='remove'"
        )
    return Chosen(
        removed,
        tuple(np.flatnonzero(asked & ~removed).tolist()),
        tuple(np.flatnonzero(removed & (denied | unmasked)).tolist()),
    )


def repaired(
    leaves: Mapping[str, Coupled],
    families: Sequence[Family],
    groups: Groups,
    masks: Mapping[str, Any],
) -> dict[str, np.ndarray]:
    """Returns the masks, by path and as NumPy, in which no layer prunes what others keep."""
    found = units_of(leaves, families, groups, masks, "keep", refuse_none=False)
    back = np.zeros(len(found.removed), bool)
    back[list(found.restored)] = True
    fixed = {path: _host(mask) for path, mask in masks.items()}
    for path in fixed:
        leaf = leaves.get(path)
        for axis, units in enumerate(() if leaf is None else leaf.units):
            assert leaf is not None
            if units is None or leaf.roles[axis] == SINK or not back[units].any():
                continue
            again = _along(leaf, axis, np.asarray(back[units].any(-1)))
            # Of a slice that is masked elsewhere too, as by heads, only whole slices come back.
            other = tuple(a for a in range(len(leaf.shape)) if again.shape[a] == 1)
            full = np.broadcast_to(fixed[path], leaf.shape)
            fixed[path] = full | (again & ~full.any(other, keepdims=True))
    return fixed


def _scaled_to_zero(
    leaves: Mapping[str, Coupled], masks: Mapping[str, Any], n_units: int
) -> np.ndarray:
    """Returns which units are masked by all modules that only scale or shift them, such as norms.

    A module is what the leaves under one name belong to; statistics that lie under a name of their
    own, as in Flax Linen, belong to the module of the same name among the parameters.
    """
    never = np.zeros(n_units + 1, bool)
    makers: dict[str, np.ndarray] = {}
    scalers: dict[str, np.ndarray] = {}
    masked: dict[str, np.ndarray] = {}
    for path, leaf in leaves.items():
        module = path.rpartition(".")[0]
        for axis, units in enumerate(leaf.units):
            if units is None or leaf.table:
                continue
            there = never.copy()
            there[units] = True
            kind = scalers if leaf.roles[axis] == COMPANION else makers
            kind[module] = kind.get(module, never) | there
            if kind is scalers and path in masks:
                full = np.broadcast_to(_host(masks[path]), leaf.shape)
                wants, _ = _votes(leaf, axis, units, full, n_units)
                masked[module] = masked.get(module, wants) & wants
    layers = {module.partition(".")[0] for module in makers}
    by_tail = {module.partition(".")[2]: wants for module, wants in masked.items()}
    by_tail.pop("", None)
    found, spared = never.copy(), never.copy()
    for module, units in scalers.items():
        top, _, tail = module.partition(".")
        wants = masked.get(module, never if top in layers else by_tail.get(tail, never))
        alone = units & ~makers.get(module, never)  # the bias of a layer says nothing of its own
        found |= alone & wants
        spared |= alone & ~wants
    found &= ~spared
    found[0] = False
    return found


def _votes(
    leaf: Coupled, axis: int, units: np.ndarray, mask: np.ndarray | None, n_units: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns which units have all their positions of an axis masked, and which have not."""
    present = np.zeros(n_units + 1, bool)
    present[units] = True
    present[0] = False
    if mask is None:
        return np.zeros_like(present), present
    if units.ndim == 2:
        others = tuple(a for a in range(mask.ndim) if a != axis)
        alive = mask.any(others)
    else:
        other = leaf.by[axis]
        assert other is not None
        moved = np.moveaxis(mask, (other, axis), (0, 1))
        blocks = moved.reshape(len(units), -1, *moved.shape[1:])
        alive = blocks.any((1, *range(3, blocks.ndim)))
    stays = np.zeros_like(present)
    stays[units[alive]] = True
    stays[0] = False
    return present & ~stays, stays


def _balanced(groups: Groups, removed: np.ndarray, conflicts: Conflicts) -> np.ndarray:
    if conflicts == "refuse":
        return removed
    removed = removed.copy()
    for chunks in groups:
        least = min(int(removed[c].sum()) for c in chunks)
        for chunk in chunks:
            removed[chunk[removed[chunk]][least:]] = False
    return removed


def _disagreement(families: Sequence[Family], torn: np.ndarray) -> str:
    found = []
    for family in families:
        n = int(torn[family.units].sum())
        if n:
            made = [m.path for m in family.axes if m.role == SOURCE]
            found.append(f"{n} of {family.name} (made by {', '.join(made[:4])})")
    return (
        f"the masks disagree on {int(torn.sum())} units: some of the layers that make them prune "
        f"them, others do not: {'; '.join(found[:3])}"
    )


def _host(mask: Any) -> np.ndarray:
    if not is_concrete(mask):
        raise TypeError(
            "masks must be known to say which units go, and are traced by jit or vmap; call this "
            "outside of them"
        )
    return np.asarray(mask.detach().cpu()) if is_torch(mask) else as_known(mask)
