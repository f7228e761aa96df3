"""The group lasso over coupled units: a penalty that drives all weights of a unit to zero."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import numpy as np

from purepruning.arguments import flag, scalar, shown, some_of
from purepruning.arrays import by_numpy, has_values, int32, is_array, namespace
from purepruning.config.config import Config
from purepruning.coupling.coupling import Coupling
from purepruning.coupling.units import Family, FamilyAxis
from purepruning.pruners.coupled import ROLES, places_of_units
from purepruning.trees import flatten
from purepruning.types import Array, Params


def group_penalty(
    params: Params,
    coupling: Coupling | Config,
    *,
    scale: float = 1e-4,
    weighted: bool = True,
    roles: Collection[str] = ROLES,
) -> Array:
    r"""Returns the group lasso penalty over coupled units, a float32 scalar to add to the loss.

    $$\lambda \sum_u \sqrt{n_u} \sqrt{\sum_m \sum_{i \in u_m} w_i^2}$$

    The slices $u_m$ of a unit, of $n_u$ weights in all, are those coupled in it: what makes its
    channels, their biases and scales, and what reads them. (A weight that both makes and reads the
    same unit, on the diagonal of a recurrent matrix, counts twice.) Where
    :func:`purepruning.slim_penalty` drives scales to zero, this does so with whole units, which can
    then be removed (:func:`purepruning.group_norm`). The derivative of a unit that is zero is zero,
    so that it stays there.

    Yuan and Lin 2006 (the group lasso, with its weights $\sqrt{n_u}$); Wen et al. 2016,
    arXiv:1608.03665 (channels, without weights); over coupled channels Fang et al. 2023,
    arXiv:2301.12900. The default of ``scale`` is Torch-Pruning's.

    Args:
        params: the parameters, without running statistics. What is None or missing takes no part.
        coupling: what :func:`purepruning.couple` returned; or a config with a coupling, which
            stands for the units that it may prune.
        scale: λ.
        weighted: whether a unit counts by the root of its size.
        roles: which weights of a unit count: of ``"source"``, ``"companion"`` and ``"sink"``.

    Raises:
        TypeError: ``coupling`` is neither.
        ValueError: the config has no coupling, a parameter has another shape than when it was
            coupled, or none of them is coupled.

    >>> import jax, jax.numpy as jnp
    >>> import purepruning as pp
    >>> params = {"one": jnp.array([[3.0, 0.0]]), "two": jnp.array([[4.0], [0.0]])}
    >>> coupling = pp.couple(lambda p, x: x @ p["one"] @ p["two"], params, jnp.ones((1, 1)))
    >>> penalty = lambda p: group_penalty(p, coupling, scale=1.0, weighted=False)
    >>> value, grads = jax.value_and_grad(penalty)(params)
    >>> float(value), grads["one"].tolist()
    (5.0, [[0.6000000238418579, 0.0]])
    """
    coupling, chosen = _units_of(coupling)
    flag(weighted, "group_penalty: weighted")
    wanted = some_of("group_penalty: roles", roles, ROLES)
    leaves = _checked(flatten(params).leaves, coupling)
    like = next(iter(leaves.values()), 0)
    scale = scalar(scale, "group_penalty: scale", zero=True, like=like)

    def of_all(leaves: dict[str, Any], scale: Any) -> Any:
        total: Any = 0.0
        for family in coupling.families:
            axes = [m for m in family.axes if m.path in leaves and m.role in wanted]
            rows = np.flatnonzero(chosen[family.units])
            if axes and len(rows):
                parts = [_squares(leaves[m.path], m, family, rows, coupling) for m in axes]
                squares = sum(parts[1:], parts[0])
                sizes = sum(_size(m, coupling) for m in axes)
                norms = namespace(squares).sum(_root(squares))
                total = total + (math.sqrt(sizes) if weighted else 1.0) * norms
        return scale * total

    return by_numpy(of_all, leaves, scale)


def _units_of(coupling: Any) -> tuple[Coupling, np.ndarray]:
    """Returns the coupling, and by number which units take part."""
    if isinstance(coupling, Coupling):
        return coupling, np.ones(coupling.n_units + 1, bool)
    if not isinstance(coupling, Config):
        raise TypeError(
            "group_penalty: coupling must be what couple returned, or a config with one, got "
            f"{type(coupling).__name__}"
        )
    allocation = coupling.allocation
    if allocation is None:
        raise ValueError("group_penalty: the config has no coupling; give resolve a coupling=...")
    allocation.refuse_branches("group_penalty")
    chosen = np.zeros(allocation.coupling.n_units + 1, bool)
    for units in allocation.sets:
        chosen[units.units.reshape(-1)] = True
    return allocation.coupling, chosen


def _checked(leaves: dict[str, Any], coupling: Coupling) -> dict[str, Any]:
    found = {}
    for path, x in leaves.items():
        if path not in coupling.leaves:
            continue
        if not is_array(x) or not has_values(x):
            raise TypeError(f"group_penalty: {path!r} must be an array in params, got {shown(x)}")
        if tuple(x.shape) != coupling.leaves[path].shape:
            raise ValueError(
                f"group_penalty: {path!r} has shape {tuple(x.shape)}, but "
                f"{coupling.leaves[path].shape} when it was coupled; couple the model again"
            )
        if namespace(x).isdtype(x.dtype, "real floating"):
            found[path] = x
    if coupling.leaves and not found:
        raise ValueError(
            "group_penalty: params hold none of the parameters that are coupled, such as "
            f"{next(iter(coupling.leaves))!r}; give it the parameters that were coupled"
        )
    return found


def _squares(
    x: Any, member: FamilyAxis, family: Family, rows: np.ndarray, coupling: Coupling
) -> Any:
    """Returns for some units of a family the sums of squares over their slices of one axis."""
    leaf, xp = coupling.leaves[member.path], namespace(x)
    units, by = leaf.units[member.axis], leaf.by[member.axis]
    assert units is not None
    x = xp.astype(x, xp.float32)
    square = x * x
    if by is None:
        rest = tuple(a for a in range(x.ndim) if a != member.axis)
        sums = xp.sum(square, axis=rest) if rest else square
    else:
        moved = xp.moveaxis(square, (by, member.axis), (0, 1))
        blocks = xp.reshape(moved, (len(units), -1, *moved.shape[1:]))
        sums = xp.reshape(xp.sum(blocks, axis=(1, *range(3, blocks.ndim))), (-1,))
    index = places_of_units(units, family.units, member.positions)[rows]
    each = xp.take(sums, int32(xp, index.reshape(-1), sums))
    return xp.sum(xp.reshape(each, index.shape), axis=1)


def _size(member: FamilyAxis, coupling: Coupling) -> int:
    """Returns how many weights of a unit lie in one axis."""
    leaf = coupling.leaves[member.path]
    units = leaf.units[member.axis]
    assert units is not None
    return member.positions * (math.prod(leaf.shape) // math.prod(units.shape[:-1]))


def _root(squares: Any) -> Any:
    """Returns the roots, of derivative 0 at 0."""
    xp = namespace(squares)
    positive = squares > 0
    return xp.sqrt(xp.where(positive, squares, 1.0)) * xp.astype(positive, xp.float32)
