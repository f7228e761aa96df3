"""What a search is closed over: groups, the counts each may lose, and how much may be left."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from purepruning.arguments import fraction, instance, is_number, missing, shown, whole_number
from purepruning.arrays import is_concrete, namespace
from purepruning.config.config import Config, check_config
from purepruning.counts import count_of
from purepruning.granularity import NM, grid
from purepruning.search.resource import (
    Resource,
    as_float,
    as_int,
    lookup_of,
    products_of,
    table_of,
    within,
)

#: A group with more counts than this is searched over evenly spaced ones.
MOST_OPTIONS = 2048


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Problem:
    """Groups, the counts each may lose, and what may be left of some resources.

    Attributes:
        config: the resolved rules; None for a problem of given costs.
        names: of the groups: the config's pools.
        options: for every group the counts it may lose, ascending, from 0.
        resources: by name, how much of it is left.
        budgets: by name, the most that may be left, in whole numbers of the resource's unit.
    """

    config: Config | None
    names: tuple[str, ...]
    options: tuple[np.ndarray, ...]
    resources: Mapping[str, Resource]
    budgets: Mapping[str, int]

    @property
    def last(self) -> np.ndarray:
        """For every group the level at which it loses most, int32."""
        return np.asarray([len(x) - 1 for x in self.options], np.int32)

    def counts(self, levels: Any) -> Any:
        """Returns the counts of levels ``(..., groups)``, int32. A level is a place in options."""
        starts = np.cumsum([0, *map(len, self.options)])[:-1].astype(np.int32)
        flat = np.concatenate(self.options).astype(np.int32)
        return _mapped(lambda row: jnp.asarray(flat)[row + starts], levels)

    def levels(self, plan: Mapping[str, Any]) -> np.ndarray:
        """Returns the levels of a plan's counts, int32 ``(..., groups)``.

        Raises:
            KeyError: a group is missing or unknown.
            ValueError: a count that is no option.
        """
        instance(plan, Mapping, "plan", "counts by group name")
        for name in plan:
            if name not in self.names:
                raise KeyError(missing(f"plan: no group is called {name!r}", name, self.names))
        found = []
        for name, options in zip(self.names, self.options, strict=True):
            if name not in plan:
                raise KeyError(f"plan has no count for group {name!r}; give one for each group")
            if not is_concrete(plan[name]):
                raise TypeError(
                    f"plan: the count of {name!r} is not known; measure plans outside of jit"
                )
            counts = np.asarray(plan[name])
            level = np.searchsorted(options, counts)
            if not (options[np.minimum(level, len(options) - 1)] == counts).all():
                some = ", ".join(map(str, options[:8].tolist()))
                raise ValueError(
                    f"plan: the count of {name!r} must be one of its options, {some}"
                    f"{', ...' * (len(options) > 8)}; got {shown(plan[name])}"
                )
            found.append(level)
        return np.stack(found, -1).astype(np.int32)

    def measure(self, plan: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what a plan leaves of every resource; exact, on the host.

        Raises:
            KeyError, ValueError, TypeError: as :meth:`levels`.
        """
        levels = self.levels(plan)
        found = {}
        for name, resource in self.resources.items():
            number = as_int(resource.measure(levels))
            value = number * resource.unit
            found[name] = value.item() if np.ndim(value) == 0 else value
        return found

    @property
    def limits(self) -> dict[str, Any]:
        """By name, the most that may be left, as :meth:`measure` counts."""
        return {name: b * self.resources[name].unit for name, b in self.budgets.items()}

    def dense(self) -> dict[str, Any]:
        """Returns what there is of every resource with nothing pruned."""
        return self.measure(dict.fromkeys(self.names, 0))

    def within(self, levels: Any) -> Any:
        """Returns whether levels ``(..., groups)`` meet all budgets; traceable and exact."""

        def fits(row: Any) -> Any:
            parts = [within(self.resources[n].measure(row), b) for n, b in self.budgets.items()]
            return functools.reduce(operator.and_, parts)

        return _mapped(fits, levels)

    def amounts(self, levels: Any) -> Any:
        """Returns what levels leave of each budgeted resource, float32 ``(..., budgets)``."""

        def row_of(row: Any) -> Any:
            xp = namespace(row)
            return xp.stack([as_float(self.resources[n].measure(row)) for n in self.budgets], -1)

        return _mapped(row_of, levels)

    @property
    def monotone(self) -> bool:
        """Whether more pruning never leaves more of any budgeted resource."""
        return all(self.resources[name].monotone for name in self.budgets)

    def __repr__(self) -> str:
        return f"Problem({len(self.names)} groups, budgets {self.limits})"


def problem(
    config: Config,
    budget: Mapping[str, float],
    *,
    tables: Mapping[str, Mapping[Any, Any]] | None = None,
    caps: float | Mapping[str, float] = 1.0,
    options: int = MOST_OPTIONS,
    itemsize: int = 4,
) -> Problem:
    r"""Returns the problem of a config: which counts there are, and how much may be left.

    Groups are the config's pools: layers, or with a coupling the sets of coupled units. The counts
    a group may lose are those that its rule, ``round_to`` and ``min_channels`` allow, up to its
    cap.

    A resource is measured on the plan itself, of whole units. With a coupling it is that of the
    whole shrunk model, in which a layer's input and output channels both count,

    $$\sum_l c_l \cdot \text{in}_l \cdot \text{out}_l,$$

    and without one the weights that masks keep.

    Args:
        config: the resolved rules, of layer scope; they need no sparsity.
        budget: by resource, the most that may be left: a fraction of what there is, or a number of
            at least 2 (of milliseconds fewer than that, give microseconds). ``"params"``,
            ``"macs"`` (multiply-adds) and ``"bytes"`` (of the parameters) with a coupling,
            ``"weights"`` without, or names of ``tables``.
        tables: resources of your own, such as a latency measured layer by layer: by group name, or
            by a pair of them, the cost for every number of units kept, from none to all,
            ``(size + 1,)`` or ``(size + 1, size + 1)``; or a mapping from the numbers that were
            measured, all units among them, such as ``{8: 0.4, 16: 0.7}``, where others cost what
            the next larger one does. What does not depend on groups is left out.
            :func:`load_tables` reads them from a file.
        caps: the largest fraction of its units that a group may lose, of all or by name.
        options: a group with more counts than this has evenly spaced ones.
        itemsize: bytes of a parameter, for ``"bytes"``.

    Raises:
        ValueError: the budget cannot be met; it names no resource; the config is of global scope or
            of N:M; blocks at the edge of a layer are smaller.
        KeyError, TypeError: an unknown resource or group; something that is no number.

    >>> import jax.numpy as jnp
    >>> import purepruning as pp
    >>> fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
    >>> params = {"a": jnp.ones((4, 8)), "b": jnp.ones((8, 2))}
    >>> coupling = pp.couple(fn, params, jnp.ones((1, 4)))
    >>> layers = [pp.make_layer(params, "a", "Linear", name="a", out_axes=1, in_axes=0)]
    >>> config = pp.resolve([{"op_types": ["Linear"]}], layers, coupling=coupling)
    >>> small = pp.search.problem(config, {"macs": 0.5})
    >>> small.measure({"a": 4}), small.budgets  # 4 in, 8 - 4 between, 2 out
    ({'params': 24, 'macs': 24, 'bytes': 96}, {'macs': 24})
    """
    check_config("problem", config)
    _check_scope(config)
    whole_number(options, "problem: options", 2, MOST_OPTIONS * 4)
    whole_number(itemsize, "problem: itemsize", 1, 64)
    instance(budget, Mapping, "problem: budget", "a mapping such as {'macs': 0.5}")
    names = tuple(pool.name for pool in config.pools)
    capped = _caps(caps, names)
    counts = []
    for pool in config.pools:
        most = min(pool.most, count_of(capped[pool.name], pool.size))
        counts.append(_options(pool.allowed, most, options))
    resources: dict[str, Resource] = {}
    if config.allocation is not None:
        coupling = config.allocation.coupling
        config.allocation.refuse_branches("problem")
        sets = [s.units for s in config.allocation.sets]
        if any(s.common is not None for s in config.allocation.sets):
            raise ValueError(
                "problem: layers lose some units beyond what they lose together, whose cost is "
                "not known; resolve the rules with extra='none'"
            )
        resources["params"] = products_of(coupling, sets, counts, "params")
        resources["macs"] = products_of(coupling, sets, counts, "macs")
        resources["bytes"] = dataclasses.replace(resources["params"], unit=itemsize)
    else:
        rows = []
        for i, (pool, count) in enumerate(zip(config.pools, counts, strict=True)):
            g = grid(pool.layers[0], config.granularity)
            if g.is_padded:
                raise ValueError(
                    f"problem: layer {pool.name!r}: blocks at the edge of a layer are smaller"
                )
            rows.append(((i,), (pool.size - count) * int(g.cost) * g.n_stacked))
        resources["weights"] = lookup_of(rows)
    for name, table in (tables or {}).items():
        if name in resources:
            raise ValueError(f"problem: tables: {name!r} is known already; give another name")
        instance(table, Mapping, f"problem: tables[{name!r}]", "costs by group name")
        sizes = [pool.size for pool in config.pools]
        resources[name] = table_of(name, table, names, counts, sizes)
    return _with_budgets(Problem(config, names, tuple(counts), resources, {}), budget)


def choices(costs: Mapping[str, Mapping[str, Any]], budget: Mapping[str, float]) -> Problem:
    """Returns the problem of choosing one option for every group at given, additive costs.

    What is chosen may be anything: whether a block stays, how many bits a layer gets, which of a
    database's weights it takes. A plan's counts are places of options.

    Args:
        costs: by resource, by group the cost of each of its options; the first option of a group is
            where a search begins, and is its most expensive.
        budget: by resource the most that may be spent, a fraction of what the first options cost,
            or a whole number of at least 2; ``{"blocks": 24.0}``, a float, is a number too.

    Raises:
        ValueError, KeyError, TypeError: as :func:`problem`; resources have other groups or options.

    >>> depth = choices({"blocks": {f"block{i}": [1, 0] for i in range(8)}}, {"blocks": 6})
    >>> depth.measure({f"block{i}": int(i in (2, 3)) for i in range(8)})
    {'blocks': 6}
    """
    instance(costs, Mapping, "choices: costs", "a mapping from resource to costs by group")
    if not costs:
        raise ValueError("choices: costs must have a resource; it is empty")
    for name, table in costs.items():
        instance(table, Mapping, f"choices: costs[{name!r}]", "costs by group")
    groups: dict[str, int] = {}
    for table in costs.values():
        for g, c in table.items():
            n = len(np.atleast_1d(np.asarray(c)))
            if groups.setdefault(g, n) != n:
                raise ValueError(f"choices: group {g!r} has {groups[g]} and {n} options")
    names = tuple(groups)
    counts = [np.arange(groups[g]) for g in names]
    resources: dict[str, Resource] = {}
    for name, table in costs.items():
        known = {g: np.asarray(c) for g, c in table.items()}
        if all(c.dtype.kind in "iu" for c in known.values()):
            rows = [((names.index(g),), c.astype(np.int64)) for g, c in known.items()]
            if any((c < 0).any() for _, c in rows):
                raise ValueError(f"choices: costs[{name!r}] must be at least 0")
            resources[name] = lookup_of(rows)
        else:
            sizes = [groups[g] - 1 for g in names]
            kept = {g: c[::-1] for g, c in known.items()}
            resources[name] = table_of(name, kept, names, counts, sizes)
    return _with_budgets(Problem(None, names, tuple(counts), resources, {}), budget)


def fit(of: Problem, shares: Any, *, only_less: bool = False) -> Any:
    """Returns levels that meet the budgets and prune in proportion to shares; traceable.

    All groups prune the same multiple of their share, as little as meets the budgets; then each in
    turn gives back what the budgets allow, the group first that was rounded most. The result meets
    the budgets, and no single group could prune one level less.

    Args:
        of: the problem, whose resources must be monotone.
        shares: float32 ``(groups,)``, at least 0: what each is to lose, relative to the others.
        only_less: whether shares are within the budgets as they are, and only to be brought down.
    """
    options = [x / max(x[-1], 1) for x in of.options]
    longest = max(map(len, options))
    table = np.stack([np.pad(x, (0, longest - len(x)), constant_values=np.inf) for x in options])
    sizes = np.asarray([_size(of, g) for g in range(len(of.names))], np.float32)
    most = np.asarray([x[-1] for x in of.options], np.float32)
    last = of.last
    if not only_less:
        shares = jnp.maximum(shares, 1e-3 * jnp.maximum(jnp.max(shares), 1e-3))

    def levels_at(scale: Any) -> Any:
        wanted = shares * scale * sizes / np.maximum(most, 1)
        up = jnp.sum(jnp.asarray(table, jnp.float32) < (wanted - 1e-6)[:, None], axis=1)
        return jnp.minimum(up.astype(jnp.int32), last)

    def halve(i: Any, bracket: Any) -> Any:
        low, high, met = bracket
        middle = jnp.where(i == 0, high, 0.5 * (low + high))
        fits = of.within(levels_at(middle))
        return jnp.where(fits, low, middle), jnp.where(fits, middle, high), met | fits

    top = jnp.ones(()) if only_less else 1.0 / jnp.min(shares)
    start = jnp.zeros_like(top), top, jnp.zeros((), bool)
    _, scale, met = jax.lax.fori_loop(0, 41, halve, start)
    levels = jnp.where(met, levels_at(scale), last)
    return give_back(of, levels, jnp.argsort(shares))


def give_back(of: Problem, levels: Any, order: Any, floor: Any = 0) -> Any:
    """Returns levels from which each group, in order, has taken back all that budgets allow.

    Args:
        of: the problem.
        levels: int32 ``(groups,)``, within the budgets.
        order: the groups, first to last.
        floor: levels below which none goes back.
    """
    floor = jnp.broadcast_to(jnp.asarray(floor, jnp.int32), levels.shape)
    longest = max(map(len, of.options))

    def one(levels: Any, g: Any) -> tuple[Any, None]:
        least = smallest_level(of, levels, g, floor[g], of.within, longest)
        return levels.at[g].min(jnp.where(least < 0, levels[g], least)), None

    return jax.lax.scan(one, levels, order)[0]


def smallest_level(
    of: Problem, levels: Any, group: Any, above: Any, fits: Any, longest: int
) -> Any:
    """Returns the smallest level of a group, from ``above`` on, at which all fits; -1 if none.

    Args:
        of: the problem.
        levels: int32 ``(groups,)``, of the others.
        group: index of the group; may be traced.
        above: the lowest level to look at.
        fits: from levels ``(groups,)`` to a boolean, which stays True at higher levels where the
            problem is monotone.
        longest: the number of levels there may be.
    """
    last = jnp.asarray(of.last)[group]
    if not of.monotone:
        every = jnp.arange(longest, dtype=jnp.int32)
        rows = jnp.tile(levels, (longest, 1)).at[:, group].set(jnp.minimum(every, last))
        good = jax.vmap(fits)(rows)
        good &= (every >= above) & (every <= last)
        return jnp.where(jnp.any(good), jnp.argmax(good).astype(jnp.int32), -1)

    def halve(_: Any, bracket: Any) -> Any:
        low, high = bracket
        middle = (low + high) // 2
        good = fits(levels.at[group].set(middle)) | (low >= high)
        return jnp.where(good, low, middle + 1), jnp.where(good, middle, high)

    bracket = jnp.asarray(above, jnp.int32), last + 1  # one more, for none that fits
    found = jax.lax.fori_loop(0, longest.bit_length() + 1, halve, bracket)[1]
    return jnp.where(found > last, -1, found)


def check_problem(where: str, given: Any) -> Problem:
    """Returns a problem; raises TypeError for what is none."""
    instance(given, Problem, f"{where}: problem", "what problem or choices returned")
    found: Problem = given
    return found


def check_reachable(where: str, of: Problem) -> None:
    """Raises ValueError if the plan that prunes most is over a budget, so that a search may end so.

    More pruning may cost more by a user's table; else :func:`problem` has seen to it.
    """
    if not bool(of.within(of.last)):
        plan = dict(zip(of.names, of.counts(of.last).tolist(), strict=True))
        raise ValueError(
            f"{where}: {of.measure(plan)} are left if every group loses all it may, over the "
            f"budgets {of.limits}; give larger budgets, or other caps"
        )


def _size(of: Problem, group: int) -> int:
    if of.config is None:
        return int(of.options[group][-1])
    return of.config.pools[group].size


def _mapped(function: Callable[[Any], Any], levels: Any) -> Any:
    """Returns what a function of one plan's levels makes of all; NumPy's need no mapping."""
    if not isinstance(levels, np.ndarray):
        for _ in range(levels.ndim - 1):
            function = jax.vmap(function)
    return function(levels)


def _check_scope(config: Config) -> None:
    if isinstance(config.granularity, NM):
        raise ValueError(f"problem: the counts of {config.granularity} are fixed")
    if config.scope != "layer":
        raise ValueError(
            "problem: a search divides a budget among groups: resolve the rules with "
            f"scope='layer', got scope={config.scope!r}"
        )
    if not config.pools:
        raise ValueError("problem: the rules select nothing; there is nothing to search for")


def _caps(caps: Any, names: tuple[str, ...]) -> dict[str, float]:
    if is_number(caps):
        return dict.fromkeys(names, fraction(caps, "problem: caps"))
    instance(caps, Mapping, "problem: caps", "a fraction, or fractions by group name")
    for name in caps:
        if name not in names:
            raise KeyError(missing(f"problem: caps: no group is called {name!r}", name, names))
    return {n: fraction(caps.get(n, 1.0), f"problem: caps[{n!r}]") for n in names}


def _options(allowed: tuple[int, ...] | None, most: int, options: int) -> np.ndarray:
    """Returns counts from 0 to the most there may be, at most so many, evenly spaced."""
    if allowed is not None:
        counts = np.asarray([c for c in allowed if c <= most])
    elif most < options:
        return np.arange(most + 1)
    else:
        return np.unique(np.linspace(0, most, options).astype(np.int64))
    if len(counts) > options:
        counts = counts[np.unique(np.linspace(0, len(counts) - 1, options).astype(np.int64))]
    return counts


def _with_budgets(of: Problem, budget: Mapping[str, float]) -> Problem:
    if not budget:
        raise ValueError("budget must name a resource, such as {'macs': 0.5}; it is empty")
    budgets = {}
    least = of.measure({n: int(x[-1]) for n, x in zip(of.names, of.options, strict=True)})
    dense = of.dense()
    for name, given in budget.items():
        if name not in of.resources:
            message = f"budget: there is no resource {name!r}"
            raise KeyError(missing(message, name, of.resources))
        if not is_number(given):
            raise TypeError(f"budget[{name!r}] must be a number, got {shown(given)}")
        number = float(given)
        unit = of.resources[name].unit
        if not (math.isfinite(number) and number > 0):
            raise ValueError(f"budget[{name!r}] must be a positive number, got {shown(given)}")
        if 1 < number < 2:
            raise ValueError(
                f"budget[{name!r}] must be a fraction of what there is, in (0, 1], or a number "
                f"of at least 2, got {shown(given)}"
            )
        limit = number * dense[name] if number <= 1 else number
        budgets[name] = math.floor(limit / unit * (1 + 1e-12))
        if of.resources[name].monotone and least[name] > limit * (1 + 1e-12):
            raise ValueError(
                f"budget[{name!r}] is {limit:,.6g}, but {least[name]:,.6g} of {dense[name]:,.6g} "
                "are left if every group loses all it may; raise the budget, or caps"
            )
    return dataclasses.replace(of, budgets=budgets)
