"""Units to masks, and masks back to units."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from purepruning.coupling.flow import COMPANION, SOURCE
from purepruning.layers import missing
from purepruning.namespace import array_like, flatten, is_torch

#: What to do where the layers that make a unit disagree about it.
Conflicts = Literal["refuse", "keep", "remove"]

if TYPE_CHECKING:
    from purepruning.coupling.structure import Coupled, Coupling


def masks_of(coupling: Coupling, dead: np.ndarray, params: Any) -> Any:
    """Returns the complete masks for units that are removed; see :meth:`Coupling.masks`."""
    tree = flatten(params)
    found = {}
    for path, leaf in coupling.leaves.items():
        keep = leaf_mask(coupling, path, dead)
        if keep is None:
            continue
        if path not in tree.leaves:
            raise KeyError(missing(f"params have no {path!r}", path, tree.leaves))
        array = tree.leaves[path]
        if tuple(array.shape) != leaf.shape:
            raise ValueError(
                f"{path!r} has shape {tuple(array.shape)}, but {leaf.shape} when it was coupled"
            )
        found[path] = array_like(array, keep) if is_torch(array) else jnp.asarray(keep)
    return tree.rebuild(found)


def leaf_mask(coupling: Coupling, path: str, dead: np.ndarray) -> np.ndarray | None:
    """Returns the mask of one parameter as numpy, broadcastable; None if it loses nothing."""
    leaf = coupling.leaves[path]
    mask: np.ndarray | None = None
    for axis in range(len(leaf.shape)):
        keep = coupling.kept(path, axis, dead)
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
    """Which units masks remove: ``dead`` by unit number; what was changed to make them agree."""

    dead: np.ndarray
    restored: tuple[int, ...]
    extended: tuple[int, ...]


def units_of(
    coupling: Coupling, masks: Any, leaves: Mapping[str, Any], conflicts: Conflicts
) -> Chosen:
    """Returns the units that masks remove; see :func:`purepruning.shrink` for ``conflicts``.

    Raises:
        ValueError: the layers that make a unit disagree, and ``conflicts`` is ``"refuse"``; what is
            removed is uneven or empties an axis.
    """
    from purepruning.masks import by_path

    given = by_path(masks, leaves)
    shape = coupling.n_units + 1
    asked, denied, read, needed = (np.zeros(shape, bool) for _ in range(4))
    for path, leaf in coupling.leaves.items():
        mask = given.get(path)
        full = None if mask is None else np.broadcast_to(_host(mask), leaf.shape)
        for axis, units in enumerate(leaf.units):
            if units is None or leaf.roles[axis] == COMPANION:
                continue  # a scale or a bias follows what it belongs to
            wants, stays = _votes(leaf, axis, units, full, coupling.n_units)
            if leaf.roles[axis] == SOURCE:
                asked |= wants
                denied |= stays
            else:
                read |= wants
                needed |= stays
    # What nothing reads any more may go, whatever makes it.
    unread = read & ~needed
    asked, denied = asked | unread, denied & ~unread
    torn = asked & denied
    if torn.any() and conflicts == "refuse":
        raise ValueError(_disagreement(coupling, torn))
    dead = asked if conflicts == "remove" else asked & ~denied
    dead[0] = False
    dead = _evened(coupling, dead, conflicts)
    coupling.check(dead)
    return Chosen(
        dead,
        tuple(np.flatnonzero(asked & ~dead).tolist()),
        tuple(np.flatnonzero(dead & denied).tolist()),
    )


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


def _evened(coupling: Coupling, dead: np.ndarray, conflicts: Conflicts) -> np.ndarray:
    if conflicts == "refuse":
        return dead
    dead = dead.copy()
    for chunks in coupling.groups:
        least = min(int(dead[c].sum()) for c in chunks)
        for chunk in chunks:
            dead[chunk[dead[chunk]][least:]] = False
    return dead


def _disagreement(coupling: Coupling, torn: np.ndarray) -> str:
    found = []
    for family in coupling.families:
        n = int(torn[family.units].sum())
        if n:
            made = [m.path for m in family.members if m.role == SOURCE]
            found.append(f"{n} of {family.name} (made by {', '.join(made[:4])})")
    return (
        f"the masks disagree on {int(torn.sum())} units: some of the layers that make them prune "
        f"them, others do not: {'; '.join(found[:3])}. Prune coupled layers together "
        "(resolve(..., coupling=...)), or say conflicts='keep' or 'remove'"
    )


def _host(mask: Any) -> np.ndarray:
    return np.asarray(mask.detach().cpu() if is_torch(mask) else mask)
