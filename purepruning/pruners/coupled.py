"""Importance of whole coupled units, over all their slices, and masks from any such scores."""

from __future__ import annotations

import functools
import operator
from collections.abc import Collection
from typing import Any, Literal

import numpy as np

from purepruning.arguments import missing, one_of, scalar, shown, some_of
from purepruning.arrays import (
    by_numpy,
    compiled,
    has_values,
    int32,
    is_array,
    is_concrete,
    is_torch,
    namespace,
    replicated,
    stop_gradient,
    zeros,
)
from purepruning.config.allocation import Allocation
from purepruning.config.config import Config, check_config
from purepruning.coupling.coupling import Coupling, check_coupling
from purepruning.coupling.units import FamilyAxis
from purepruning.coupling.value import COMPANION, SINK, SOURCE
from purepruning.exact_sum import exact_sum
from purepruning.granularity import any_of, fold, grid
from purepruning.masks import by_path, spread_mask
from purepruning.selection.biases import with_biases
from purepruning.selection.coupled import joined, masks_of_removed, removed_units
from purepruning.selection.prune import check_values, checked_counts, weights_of
from purepruning.trees import flatten
from purepruning.types import Array, Masks, Params

Reduce = Literal["sum", "mean", "max", "prod"]


Normalize = Literal["none", "mean", "max", "sum"]


#: What a unit's slices do: they make its channels, scale or shift them, or read them.
ROLES = (SOURCE, COMPANION, SINK)


def unit_scores(
    values: Any,
    coupling: Coupling,
    *,
    reduce: Reduce = "sum",
    normalize: Normalize = "none",
    roles: Collection[str] = ROLES,
) -> Array:
    r"""Returns how important each unit is, from how important its weights are: ``(n_units,)``.

    A unit lies in several axes m of parameters: what makes its channels, what scales and shifts
    them, and what reads them. With the sum over its slice of each,

    $$v_{u,m} = \sum_{i \in u_m} v_i, \qquad s_u = \operatorname{reduce}_m \frac{v_{u,m}}{c_m},$$

    where $c_m$ is 1, or the mean, the largest or the sum of $v_{u',m}$ over the units $u'$ of the
    family, so that every member has its say whatever its size. Score 0 of the result belongs to
    unit 1. Sums are exact (:mod:`purepruning.exact_sum`), so that scores are the same in every
    framework.

    Fang et al. 2023, arXiv:2301.12900 (DepGraph), which takes the squares of the weights for
    ``values`` and the mean of normalised members; :func:`group_norm` does that.

    Args:
        values: tree as the parameters, the importance of every weight, such as its magnitude or
            ``(gradient * weight) ** 2``. What is None takes no part, such as running statistics.
        coupling: what :func:`purepruning.couple` returned.
        reduce: ``"sum"``, ``"mean"``, ``"max"`` or ``"prod"`` over members.
        normalize: ``"none"``, ``"mean"``, ``"max"`` or ``"sum"``.
        roles: which members count: of ``"source"``, ``"companion"`` and ``"sink"``. A unit that has
            none of them scores 0.

    Raises:
        ValueError: an unknown option, or an array of another shape than the coupled parameter's.

    >>> import jax.numpy as jnp
    >>> import purepruning as pp
    >>> params = {"one": jnp.array([[1.0, 2.0]]), "two": jnp.array([[4.0], [0.0]])}
    >>> coupling = pp.couple(lambda p, x: x @ p["one"] @ p["two"], params, jnp.ones((1, 1)))
    >>> unit_scores(params, coupling).tolist()
    [5.0, 2.0]
    >>> unit_scores(params, coupling, reduce="mean", normalize="max").tolist()
    [0.75, 0.5]
    """
    one_of("unit_scores: reduce", reduce, ("sum", "mean", "max", "prod"))
    one_of("unit_scores: normalize", normalize, ("none", "mean", "max", "sum"))
    wanted = some_of("unit_scores: roles", roles, ROLES)
    check_coupling("unit_scores", coupling)
    leaves = {}
    for path, x in flatten(values).leaves.items():
        if path not in coupling.leaves:
            continue
        if not is_array(x) or not has_values(x):
            raise TypeError(f"unit_scores: values: {path!r} must be an array, got {shown(x)}")
        if tuple(x.shape) != coupling.leaves[path].shape:
            raise ValueError(
                f"unit_scores: values: {path!r} has shape {tuple(x.shape)}, but "
                f"{coupling.leaves[path].shape} when it was coupled"
            )
        if namespace(x).isdtype(x.dtype, "real floating"):
            leaves[path] = stop_gradient(x)
    if not leaves:
        raise ValueError("unit_scores: values hold no floating array that is coupled")

    def score(leaves: dict[str, Any]) -> Any:
        like = next(iter(leaves.values()))
        # Parameters of one shape are summed by one compiled function.
        add = compiled(like, _positions, "axis", "by", "blocks")
        sums: dict[str, Any] = {}
        for m in (m for family in coupling.families for m in family.axes):
            if m.path in leaves and m.role in wanted and _name(m) not in sums:
                leaf = coupling.leaves[m.path]
                units = leaf.units[m.axis]
                assert units is not None
                blocks = len(units) if units.ndim == 3 else 1
                sums[_name(m)] = add(leaves[m.path], axis=m.axis, by=leaf.by[m.axis], blocks=blocks)
        if not sums:
            return zeros(like, (coupling.n_units,), "float32")
        total = compiled(like, _unit_scores, "key", "reduce", "normalize")
        return total(sums, key=ByContent(coupling), reduce=reduce, normalize=normalize)

    return by_numpy(score, leaves)


def group_norm(
    params: Params,
    stats: None,
    config: Config,
    *,
    p: float = 2,
    reduce: Reduce = "mean",
    normalize: Normalize = "mean",
    roles: Collection[str] = ROLES,
) -> Masks:
    r"""Returns masks that prune the units whose weights, over all coupled slices, are smallest.

    $$s_u = \operatorname{mean}_m \frac{v_{u,m}}{\operatorname{mean}_{u'} v_{u',m}}, \qquad
      v_{u,m} = \sum_{i \in u_m} |w_i|^p$$

    For configs with a coupling. Unlike :func:`purepruning.l1_norm`, which sums the channels of the
    layers that are pruned, this looks at scales and at the readers of the channels too; see
    :func:`unit_scores` for the options. Running statistics that are part of ``params`` count as
    companions; where that is not meant, give ``roles=["source", "sink"]``, or call
    :func:`unit_scores` and :func:`prune_units`.

    Fang et al. 2023, arXiv:2301.12900; Torch-Pruning's group magnitude importance.

    Raises:
        KeyError: ``params`` lack one that makes or reads channels of a unit.
        ValueError: the config has no coupling. See also :func:`purepruning.prune` for the form of
            the masks, ties, NaN and errors.

    >>> import functools
    >>> import jax.numpy as jnp
    >>> import purepruning as pp
    >>> params = {"one": jnp.array([[3.0, 2.0]]), "two": jnp.array([[0.5], [4.0]])}
    >>> coupling = pp.couple(lambda p, x: x @ p["one"] @ p["two"], params, jnp.ones((1, 1)))
    >>> layers = [pp.make_layer(params, "one", "Linear", out_axes=1, in_axes=0)]
    >>> config = pp.resolve([{"sparsity": 0.5, "op_names": ["one"]}], layers, coupling=coupling)
    >>> group_norm(params, None, config)["one"].tolist()
    [[False, True]]
    >>> functools.partial(group_norm, roles="source")(params, None, config)["one"].tolist()
    [[True, False]]
    """
    allocation = allocation_of("group_norm", config)
    if stats is not None:
        raise TypeError(f"group_norm takes stats=None, got {shown(stats)}")
    if not is_concrete(scalar(p, "group_norm: p")):
        raise TypeError("group_norm: p must be known, and is traced by jit or vmap")
    tree = flatten(params)
    check_values("group_norm", weights_of("group_norm", tree.leaves, config))
    for axis in (axis for family in allocation.coupling.families for axis in family.axes):
        # Companions may be statistics, which need not be part of params.
        if axis.role != COMPANION and axis.path not in tree.leaves:
            message = f"group_norm: params have no {axis.path!r}"
            raise KeyError(missing(message, axis.path, tree.leaves))
    powers = {
        path: by_numpy(_power, stop_gradient(x), p)
        for path, x in tree.leaves.items()
        if is_array(x) and has_values(x) and namespace(x).isdtype(x.dtype, "real floating")
    }
    scores = unit_scores(
        powers if is_torch(next(iter(powers.values()))) else tree.rebuild(powers),
        allocation.coupling,
        reduce=reduce,
        normalize=normalize,
        roles=roles,
    )
    return prune_units(scores, params, config)


def prune_units(scores: Array, params: Params, config: Config) -> Masks:
    """Returns the masks of a config with a coupling, from the scores of its units.

    As :func:`purepruning.prune`, which sums the scores of channels, but with scores that may come
    from anywhere. What a layer loses beyond what it loses together with others is ranked by the
    same scores.

    Args:
        scores: float array ``(n_units,)``, or ``(n_units + 1,)`` by number of the unit.
        params: the parameters, of which only shapes matter.
        config: the resolved rules.

    Raises:
        ValueError: the config has no coupling, or there are other scores than units. See also
            :func:`purepruning.prune`.

    >>> import jax.numpy as jnp
    >>> import purepruning as pp
    >>> params = {"one": jnp.ones((1, 4)), "two": jnp.ones((4, 1))}
    >>> coupling = pp.couple(lambda p, x: x @ p["one"] @ p["two"], params, jnp.ones((1, 1)))
    >>> layers = [pp.make_layer(params, "one", "Linear", out_axes=1, in_axes=0)]
    >>> config = pp.resolve([{"sparsity": 0.5, "op_names": ["one"]}], layers, coupling=coupling)
    >>> prune_units(jnp.array([4.0, 1.0, 3.0, 2.0]), params, config)["one"].tolist()
    [[True, False, True, False]]
    """
    return units_pruned("prune_units", scores, params, config)[0]


def units_pruned(where: str, scores: Array, params: Params, config: Config) -> tuple[Masks, Any]:
    """Returns the masks, and which units are pruned, by place; None where nothing is."""
    allocation = allocation_of(where, config)
    tree = flatten(params)
    weights = weights_of(where, tree.leaves, config)
    n = allocation.coupling.n_units
    if not is_array(scores) or tuple(scores.shape) not in ((n,), (n + 1,)):
        raise ValueError(
            f"{where}: scores must be of shape ({n},), one of each unit, got {shown(scores)}"
        )
    xp = namespace(scores)
    if not has_values(scores) or not xp.isdtype(scores.dtype, ("real floating", "integral")):
        raise TypeError(f"{where}: scores must be numbers, got {shown(scores)}")
    if not weights:
        return tree.rebuild({}), None
    like = next(iter(weights.values()))
    if is_torch(like) != is_torch(scores):
        kinds = ["torch" if is_torch(x) else "JAX" for x in (scores, like)]
        raise TypeError(f"{where}: scores are of {kinds[0]}, but params of {kinds[1]}")
    allocation.refuse_branches(where)
    order = np.concatenate([s.units.reshape(-1) for s in allocation.sets]) - 1
    grids = {x.name: grid(x, config.granularity) for x in config.layers}
    before = by_path(config.masks, tree.leaves) if config.masks else {}

    def solve(scores: Any, weights: Any, before: Any, counts: Any) -> tuple[dict[str, Any], Any]:
        xp = namespace(scores)
        scores = scores[-n:] if n else scores
        ranked = xp.take(xp.astype(scores, xp.float32), int32(xp, order, scores))
        ranked = -ranked if config.inverted else ranked
        if is_concrete(ranked) and bool(xp.any(xp.isnan(ranked))):
            raise ValueError(f"{where}: scores of units are NaN")
        keep = _kept(config, allocation, weights, before, grids)
        removed = removed_units(ranked, keep, counts, config)
        masks = masks_of_removed(removed, grids, config, tree.leaves)
        return with_biases(masks, tree, config), removed

    weights = {path: stop_gradient(x) for path, x in weights.items()} if before else {}
    counts = checked_counts(where, config)
    masks, removed = by_numpy(solve, stop_gradient(scores), weights, before, counts)
    return tree.rebuild(masks), removed


def allocation_of(where: str, config: Any) -> Allocation:
    """Returns how the units of a config lie; raises where it has no coupling."""
    check_config(where, config)
    if config.allocation is None:
        raise ValueError(f"{where} prunes coupled units: give resolve a coupling=...")
    return config.allocation


def _kept(config: Config, allocation: Allocation, weights: Any, before: Any, grids: Any) -> Any:
    """Returns of every channel whether it is not pruned already; None if none is."""
    if not any(x.weight in before for x in config.layers):
        return None
    keeps = {}
    for x in config.layers:
        weight = weights[x.weight]
        xp, g = namespace(weight), grids[x.name]
        if x.weight in before:
            whole = spread_mask(before[x.weight], weight)
        else:
            whole = xp.ones_like(weight, dtype=xp.bool)
        keeps[x.name] = replicated(fold(xp, whole, g, any_of))
    return joined(keeps, allocation, False)


def _power(x: Any, p: float) -> Any:
    xp = namespace(x)
    magnitude = xp.abs(xp.astype(x, xp.float32))
    if p in (1, 2, 3, 4):
        # Products are rounded alike everywhere, other powers are not.
        return functools.reduce(operator.mul, [magnitude] * int(p))
    return magnitude ** float(p)


class ByContent:
    """A coupling that is compared by content: what compiled code depends on."""

    def __init__(self, coupling: Coupling) -> None:
        self.coupling = coupling

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ByContent) and self.coupling.digest == other.coupling.digest

    def __hash__(self) -> int:
        return hash(self.coupling.digest)


def _name(member: FamilyAxis) -> str:
    return f"{member.path}[{member.axis}]"


def _positions(x: Any, *, axis: int, by: int | None, blocks: int) -> Any:
    """Returns the sums over all other axes, flat: by position, or by block and position."""
    xp = namespace(x)
    x = xp.astype(replicated(x), xp.float32)
    if by is None:
        rest = tuple(a for a in range(x.ndim) if a != axis)
        return exact_sum(x, rest) if rest else x
    moved = xp.moveaxis(x, (by, axis), (0, 1))
    parts = xp.reshape(moved, (blocks, -1, *moved.shape[1:]))
    return xp.reshape(exact_sum(parts, (1, *range(3, parts.ndim))), (-1,))


def _unit_scores(sums: dict[str, Any], *, key: ByContent, reduce: str, normalize: str) -> Any:
    coupling = key.coupling
    like = next(iter(sums.values()))
    xp = namespace(like)
    found, order = [], []
    for family in coupling.families:
        members = []
        for m in (m for m in family.axes if _name(m) in sums):
            units = coupling.leaves[m.path].units[m.axis]
            index = places_of_units(units, family.units, m.positions)
            each = xp.take(sums[_name(m)], int32(xp, index.reshape(-1), like))
            members.append(_normalized(xp, _total(xp, xp.reshape(each, index.shape)), normalize))
        if members:
            found.append(_reduced(xp, xp.stack(members, axis=1), reduce))
        else:
            found.append(zeros(like, (len(family),), "float32"))
        order.append(family.units)
    back = np.argsort(np.concatenate(order))
    return xp.take(xp.concat(found), int32(xp, back, like))


def places_of_units(units: Any, numbers: np.ndarray, positions: int) -> np.ndarray:
    """Returns the flat positions of each unit, ``(units, positions)``."""
    flat = units.reshape(-1)
    order = np.argsort(flat, kind="stable")
    start = np.searchsorted(flat[order], numbers)
    return order[start[:, None] + np.arange(positions)] // units.shape[-1]


def _total(xp: Any, rows: Any) -> Any:
    return rows[:, 0] if rows.shape[1] == 1 else exact_sum(rows, (1,))


def _normalized(xp: Any, value: Any, normalize: str) -> Any:
    if normalize == "none":
        return value
    by = xp.max(value) if normalize == "max" else exact_sum(value, (0,))
    by = by * _reciprocal(value.shape[0]) if normalize == "mean" else by
    # Not divided: XLA may make a product of a quotient by a scalar, torch does not.
    return value * (1.0 / xp.where(by == 0, xp.ones_like(by), by))


def _reduced(xp: Any, values: Any, reduce: str) -> Any:
    """Returns one score of each unit from those of its members, ``(units, members)``."""
    n = values.shape[1]
    if reduce == "max":
        return xp.max(values, axis=1)
    if reduce == "prod":
        columns = [values[:, i] for i in range(n)]
        return functools.reduce(lambda a, b: a * b, columns)
    total = _total(xp, values)
    return total * _reciprocal(n) if reduce == "mean" else total


def _reciprocal(n: int) -> float:
    """Returns 1 / n: XLA makes a product of a quotient by a constant, torch does not."""
    return float(np.float32(1 / n))
