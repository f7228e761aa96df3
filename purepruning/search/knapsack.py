"""Exact allocation: one option for each group, least error within a budget."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from purepruning.arguments import instance, missing, shown, whole_number
from purepruning.arrays import is_concrete
from purepruning.search.problem import Problem, check_problem
from purepruning.search.resource import as_int

BUCKETS = 10_000

#: Stands for a budget of 0, of which no fraction can be taken.
SMALLEST_BUDGET = 1e-30


class Chosen(NamedTuple):
    """What :func:`knapsack` returns, with a leading axis where there are several budgets.

    Attributes:
        choice: the option of every group, int32 ``(groups,)``; -1 where no choice is within budget.
        error: the sum of their errors; inf where there is none.
        cost: the sum of their costs.
        bound: no choice within the budget has a smaller error; the Lagrangian's.
    """

    choice: Any
    error: Any
    cost: Any
    bound: Any


def knapsack(errors: Any, costs: Any, budget: Any, *, buckets: int = BUCKETS) -> Chosen:
    r"""Returns the choice of one option per group of least total error within the budget.

    The multiple-choice knapsack $\min \sum_l e_{l j_l}$ subject to $\sum_l c_{l j_l} \le B$, by
    dynamic programming over the cost spent,

    $$D_l[b] = \min_j\; D_{l-1}[b - c_{lj}] + e_{lj}.$$

    Whole costs are exact while the budget has no more than ``buckets``; others are rounded up to
    multiples of $B$ / ``buckets``, so that the budget is met, and the result is exact for these. Of
    choices of equal error, the one of the smallest option in the last group is taken, of those the
    one of the smallest in the group before, and so on.

    ``bound`` is $\max_{\mu \ge 0} \sum_l \min_j (e_{lj} + \mu c_{lj}) - \mu B$: how far a choice is
    from the best that any method could find is at most ``error - bound``.

    Known numbers are computed in float64 by NumPy. Under ``jit``, ``vmap`` (over budgets, or whole
    tables) and ``scan`` the same is done in float32 by JAX.

    Args:
        errors: ``(groups, options)``, or a sequence of rows of different lengths; inf where an
            option is not to be taken.
        costs: the same shape, at least 0.
        budget: B, one number or ``(n,)`` of them. A traced one that is negative or NaN has no
            choice within it.
        buckets: number of different costs that are told apart, static.

    Raises:
        ValueError, TypeError: something is no number, or negative, or of another shape.

    >>> errors = [[0, 1, 3, 9], [0, 2, 5, 14], [0, 4, 6, 20]]
    >>> costs = [[8, 6, 4, 2], [16, 12, 8, 4], [10, 5, 3, 1]]
    >>> best = knapsack(errors, costs, 26)
    >>> best.choice.tolist(), float(best.error), float(best.bound)
    ([2, 1, 0], 5.0, 4.6...)
    """
    whole_number(buckets, "knapsack: buckets", 1, 2**24)
    known = all(is_concrete(x) for x in jax.tree.leaves((errors, costs, budget)))
    if not known:
        shape = np.shape(errors)
        if len(shape) != 2 or np.shape(costs) != shape:
            raise ValueError(
                f"knapsack: errors and costs must be (groups, options), got {shape} and "
                f"{np.shape(costs)}"
            )
        one = functools.partial(
            _traced,
            jnp.asarray(errors, jnp.float32),
            jnp.asarray(costs, jnp.float32),
            buckets=buckets,
        )
        limit = jnp.asarray(budget, jnp.float32)
        return one(limit) if limit.ndim == 0 else jax.vmap(one)(limit)
    e, c = _tables(errors, costs)
    limits = np.asarray(budget, np.float64)
    if limits.ndim > 1 or not np.isfinite(limits).all() or (limits < 0).any():
        raise ValueError(f"knapsack: budget must be a number of at least 0, got {shown(budget)}")
    found = [_known(e, c, float(limit), buckets) for limit in np.atleast_1d(limits)]
    if limits.ndim == 0:
        return found[0]
    return Chosen(*(np.stack(x) for x in zip(*found, strict=True)))


def exact_choice(errors: Any, costs: Sequence[Any], budgets: Sequence[float]) -> np.ndarray:
    """Returns the choice of least error within several budgets, int32 ``(groups,)``.

    The mixed-integer program is solved by SciPy's ``milp`` (HiGHS), which does not say which of
    several choices of equal error it returns.

    Args:
        errors: as in :func:`knapsack`.
        costs: a table for each resource, of the shape of ``errors``.
        budgets: a number for each.

    Raises:
        ValueError: nothing is within the budgets.

    >>> time, memory = [[4, 2, 1], [4, 3, 1]], [[3, 2, 1], [3, 1, 1]]
    >>> exact_choice([[0, 1, 5], [0, 2, 4]], [time, memory], [5, 4]).tolist()
    [1, 1]
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    if len(costs) != len(budgets) or not costs:
        raise ValueError(
            f"exact_choice: costs and budgets must have one entry for each resource, got "
            f"{len(costs)} and {len(budgets)}"
        )
    tables = [_tables(errors, c) for c in costs]
    e = tables[0][0]
    groups, options = e.shape
    usable = np.isfinite(e) & np.all([np.isfinite(c) for _, c in tables], axis=0)
    one_each = np.kron(np.eye(groups), np.ones(options))
    rows = np.stack([np.where(usable, c, 0).reshape(-1) for _, c in tables])
    result = milp(
        np.where(usable, e, 0).reshape(-1),
        integrality=np.ones(groups * options),
        bounds=Bounds(0, usable.reshape(-1).astype(float)),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(rows, -np.inf, np.asarray(budgets, np.float64)),
        ],
        options={"mip_rel_gap": 0.0},
    )
    if result.x is None:
        raise ValueError(
            f"exact_choice: no choice is within the budgets {list(budgets)}; give larger ones"
        )
    found: np.ndarray = result.x.reshape(groups, options).argmax(1).astype(np.int32)
    return found


class Solution(NamedTuple):
    """What :func:`allocate` returns.

    Attributes:
        plan: the counts, by group name.
        error: the sum of their errors.
        left: what the plan leaves of each resource.
        rounds: how often costs were made linear.
    """

    plan: dict[str, int]
    error: float
    left: dict[str, Any]
    rounds: int


def allocate(
    problem: Problem,
    errors: Mapping[str, Any],
    *,
    buckets: int = BUCKETS,
    rounds: int = 8,
) -> Solution:
    """Returns the plan of least total error within a problem's budgets.

    Costs of coupled layers are products of their widths. They are made linear at the present plan,
    as what each option of a group alone would save; the knapsack is solved, by :func:`knapsack`, or
    :func:`exact_choice` where there are several budgets; the result is measured, repaired by the
    least error per saving if it is over budget, and filled up by what still fits; and that is the
    next present plan. The best plan of all rounds is returned; no plan is over budget. Where costs
    add up, the first round is exact.

    Args:
        problem: groups and budgets.
        errors: by group name, the error of each of its options, at least finite for the first; such
            as what :meth:`purepruning.search.Curves.errors` returns.
        buckets: as in :func:`knapsack`.
        rounds: the most rounds; it ends before where a plan comes back.

    Raises:
        KeyError, ValueError, TypeError: a group is missing or unknown, or has other options.

    >>> import purepruning as pp
    >>> of = pp.search.choices({"ms": {"a": [8, 6, 4, 2], "b": [16, 12, 8, 4]}}, {"ms": 16})
    >>> allocate(of, {"a": [0, 1, 3, 9], "b": [0, 2, 5, 14]}).plan
    {'a': 2, 'b': 1}
    """
    of = check_problem("allocate", problem)
    whole_number(rounds, "allocate: rounds", 1)
    table = _errors_of(of, errors)
    limits = np.asarray([of.budgets[n] for n in of.budgets], np.int64)
    best: tuple[float, np.ndarray] | None = None
    levels, seen, n = np.zeros(len(of.names), np.int32), set[bytes](), 0
    while n < rounds and levels.tobytes() not in seen:
        seen.add(levels.tobytes())
        n += 1
        costs = _linear(of, levels, table.shape[1])
        levels = _filled(of, table, _repaired(of, table, _solved(table, costs, limits, buckets)))
        error = float(table[np.arange(len(levels)), levels].sum())
        if best is None or error < best[0]:
            best = error, levels
    assert best is not None
    plan = {x: int(o[i]) for x, o, i in zip(of.names, of.options, best[1], strict=True)}
    return Solution(plan, best[0], of.measure(plan), n)


def _solved(table: np.ndarray, costs: np.ndarray, limits: np.ndarray, buckets: int) -> np.ndarray:
    """Returns the best levels by linear costs, or those that save most where none is within."""
    # What cannot be reached by these costs is left to the repair.
    least = np.nanmin(np.where(np.isfinite(costs), costs, np.inf), axis=2).sum(1)
    limits = np.maximum(limits, least)
    if len(limits) == 1:
        choice = knapsack(table, costs[0], float(limits[0]), buckets=buckets).choice
        if choice[0] >= 0:
            return np.asarray(choice, np.int32)
        return np.argmin(np.where(np.isfinite(table), costs[0], np.inf), axis=1).astype(np.int32)
    return exact_choice(table, list(costs), limits.tolist())


def _linear(of: Problem, levels: np.ndarray, longest: int) -> np.ndarray:
    """Returns costs ``(budgets, groups, options)`` whose sums are exact next to ``levels``.

    They are shifted so that none is negative: the sum for ``levels`` is what they really leave.
    """
    groups = len(of.names)
    rows = np.tile(levels, (groups, longest, 1))
    g = np.arange(groups)
    rows[g, :, g] = np.minimum(np.arange(longest)[None, :], of.last[:, None])
    found = []
    for name in of.budgets:
        left = as_int(of.resources[name].measure(rows)).astype(np.float64)
        now = float(as_int(of.resources[name].measure(levels)))
        saved = left - now
        lowest = saved.min(1)
        # One group's costs begin at its least; what is left over is shared out evenly.
        rest = now + lowest.sum()
        found.append(saved - lowest[:, None] + max(rest, 0.0) / groups)
        if rest < 0:  # the widths at hand make options look better than all together can be
            found[-1] *= now / max(now - rest, 1.0)
    costs = np.stack(found)
    beyond = np.arange(longest)[None, :] > of.last[:, None]
    return np.where(beyond[None], np.inf, costs)


def _repaired(of: Problem, table: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Returns levels within the budgets: from these, the least further error per saving."""
    levels = levels.copy()
    limits = np.asarray([of.budgets[n] for n in of.budgets], np.float64)
    while not bool(of.within(levels)):
        steps = _steps(of, levels, 1)
        now = _amounts(of, levels)
        over = np.maximum(now - limits, 0) / np.maximum(limits, 1)
        saved = ((now - _amounts(of, steps)) / np.maximum(limits, 1) * (over > 0)).sum(1)
        further = table[np.arange(len(levels)), np.minimum(levels + 1, of.last)]
        extra = further - table[np.arange(len(levels)), levels]
        movable = (levels < of.last) & np.isfinite(further)
        if not movable.any():
            movable = levels < of.last
            extra = np.zeros(len(levels))
        if not movable.any():
            raise ValueError("allocate: no plan is within the budgets; give larger ones")
        ratio = np.where(movable, extra / np.maximum(saved, 1e-12), np.inf)
        levels[int(np.argmin(ratio))] += 1
    return levels


def _filled(of: Problem, table: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Returns levels from which single groups took back what lowers the error most and fits."""
    levels = levels.copy()
    g, longest = np.arange(len(levels)), table.shape[1]
    while True:
        rows = np.tile(levels, (len(levels), longest, 1))
        rows[g, :, g] = np.minimum(np.arange(longest)[None, :], of.last[:, None])
        fits = np.asarray(of.within(rows))
        gain = np.where(fits, table[g, levels][:, None] - table, -np.inf)
        at = int(np.argmax(gain))
        if not gain.reshape(-1)[at] > 0:
            return levels
        levels[at // longest] = at % longest


def _steps(of: Problem, levels: np.ndarray, by: int) -> np.ndarray:
    """Returns for every group the levels in which it alone goes on."""
    moved = np.clip(levels + by, 0, of.last)
    return np.where(np.eye(len(levels), dtype=bool), moved[None], levels[None])


def _amounts(of: Problem, levels: np.ndarray) -> np.ndarray:
    columns = [as_int(of.resources[name].measure(levels)) for name in of.budgets]
    return np.stack(columns, -1).astype(np.float64)


def _errors_of(of: Problem, errors: Mapping[str, Any]) -> np.ndarray:
    """Returns errors as one table, inf behind the last option of a group."""
    instance(errors, Mapping, "allocate: errors", "errors by group name")
    for name in errors:
        if name not in of.names:
            raise KeyError(missing(f"allocate: errors: no group is {name!r}", name, of.names))
    table = np.full((len(of.names), max(map(len, of.options))), np.inf)
    for i, (name, options) in enumerate(zip(of.names, of.options, strict=True)):
        if name not in errors:
            raise KeyError(f"allocate: errors have none for group {name!r}; give one for each")
        row = np.asarray(errors[name], np.float64)
        if row.shape != options.shape:
            raise ValueError(
                f"allocate: errors[{name!r}] must have one for each of {len(options)} options, got "
                f"shape {row.shape}"
            )
        if np.isnan(row).any() or not np.isfinite(row[0]):
            raise ValueError(f"allocate: errors[{name!r}] must be numbers, the first finite")
        table[i, : len(row)] = row
    return table


def _tables(errors: Any, costs: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns errors and costs as float64 ``(groups, options)``, inf where a row is shorter."""
    found = []
    for name, given in (("errors", errors), ("costs", costs)):
        rows = [np.asarray(row, np.float64) for row in given]
        if not rows or any(row.ndim != 1 or not len(row) for row in rows):
            raise ValueError(f"knapsack: {name} must be (groups, options), got {shown(given)}")
        width = max(map(len, rows))
        padded = [np.pad(r, (0, width - len(r)), constant_values=np.inf) for r in rows]
        found.append(np.stack(padded))
        if np.isnan(found[-1]).any():
            raise ValueError(f"knapsack: {name} must be numbers, and some are NaN")
    e, c = found
    if e.shape != c.shape:
        raise ValueError(
            f"knapsack: errors and costs must have the same shape, got {e.shape} and {c.shape}"
        )
    if (c < 0).any():
        raise ValueError("knapsack: costs must be at least 0, and some are negative")
    return e, c


def _known(e: np.ndarray, c: np.ndarray, budget: float, buckets: int) -> Chosen:
    """Returns the best choice in float64, by NumPy."""
    finite = c[np.isfinite(c)]
    whole = bool((finite == np.floor(finite)).all()) and budget <= buckets
    size = int(budget) if whole else buckets
    # A rounding of the division must not cost a bucket.
    bucket = max(budget, SMALLEST_BUDGET) / buckets
    scaled = c if whole else np.ceil(c / bucket * (1 - 1e-12))
    scaled = np.where(scaled <= size, scaled, size + 1)
    whole_costs = np.where(np.isfinite(e), scaled, size + 1).astype(np.int64)
    spent = np.zeros(size + 1)
    back = np.zeros((len(e), size + 1), np.int16 if e.shape[1] < 2**15 else np.int32)
    for g in range(len(e)):
        before, spent = spent, np.full(size + 1, np.inf)
        for j in range(e.shape[1]):
            cost = int(whole_costs[g, j])
            if cost > size:
                continue
            new = before[: size + 1 - cost] + e[g, j]
            better = new < spent[cost:]
            np.copyto(spent[cost:], new, where=better)
            np.copyto(back[g, cost:], j, where=better, casting="unsafe")
    bound = _bound(e, c, budget)
    choice = np.full(len(e), -1, np.int32)
    if not np.isfinite(spent[size]):
        return Chosen(choice, np.float64(np.inf), np.float64(np.inf), np.float64(bound))
    at = size
    for g in reversed(range(len(e))):
        choice[g] = back[g, at]
        at -= int(whole_costs[g, choice[g]])
    rows = np.arange(len(e))
    return Chosen(choice, e[rows, choice].sum(), c[rows, choice].sum(), np.float64(bound))


def _bound(e: np.ndarray, c: np.ndarray, budget: float) -> float:
    """Returns the Lagrangian's bound, by bisection on the price of cost."""
    usable = np.isfinite(e) & np.isfinite(c)
    e, c = np.where(usable, e, np.inf), np.where(usable, c, 0.0)
    rows = np.arange(len(e))

    def dual(price: float) -> tuple[float, float]:
        choice = np.argmin(e + price * c, axis=1)
        spent = float(c[rows, choice].sum())
        return float(e[rows, choice].sum()) + price * (spent - budget), spent

    low, high = 0.0, 1.0
    best, spent = dual(0.0)
    if spent <= budget:
        return best
    for _ in range(100):
        value, spent = dual(high)
        best = max(best, value)
        if spent <= budget:
            break
        low, high = high, high * 4
    for _ in range(100):
        price = 0.5 * (low + high)
        value, spent = dual(price)
        best = max(best, value)
        low, high = (low, price) if spent <= budget else (price, high)
    return best


def _traced(e: Any, c: Any, budget: Any, *, buckets: int) -> Chosen:
    """Returns the best choice in float32, as traceable code."""
    usable = jnp.isfinite(e) & jnp.isfinite(c)
    whole = jnp.all(jnp.where(usable, c == jnp.floor(c), True)) & (budget <= buckets)
    scale = jnp.where(whole, 1.0, jnp.maximum(budget, SMALLEST_BUDGET) / buckets)
    size = jnp.where(whole, jnp.floor(budget), float(buckets)).astype(jnp.int32)
    scaled = jnp.ceil(jnp.where(usable, c, 0.0) / scale * jnp.where(whole, 1.0, 1 + 1e-6))
    scaled = jnp.where(usable & (scaled <= buckets), scaled, buckets + 1).astype(jnp.int32)

    def group(spent: Any, row: Any) -> tuple[Any, Any]:
        errors, costs = row
        padded = jnp.concatenate([jnp.full(buckets + 1, jnp.inf), spent])

        def option(best: Any, one: Any) -> tuple[Any, None]:
            error, cost, j = one
            new = jax.lax.dynamic_slice(padded, (buckets + 1 - cost,), (buckets + 1,)) + error
            better = new < best[0]
            return (jnp.where(better, new, best[0]), jnp.where(better, j, best[1])), None

        start = jnp.full(buckets + 1, jnp.inf), jnp.zeros(buckets + 1, jnp.int32)
        (spent, back), _ = jax.lax.scan(option, start, (errors, costs, jnp.arange(len(errors))))
        return spent, back

    start = jnp.zeros(buckets + 1)
    spent, back = jax.lax.scan(group, start, (jnp.where(usable, e, jnp.inf), scaled))

    def step(at: Any, row: Any) -> tuple[Any, Any]:
        choices, costs = row
        j = choices[jnp.maximum(at, 0)]
        return at - costs[j], j

    _, choice = jax.lax.scan(step, size, (back, scaled), reverse=True)
    error = spent[size]
    some = jnp.isfinite(error) & (budget >= 0)
    error = jnp.where(some, error, jnp.inf)
    rows = np.arange(e.shape[0])
    cost = jnp.where(some, jnp.sum(c[rows, choice]), jnp.inf)
    choice = jnp.where(some, choice, -1)
    return Chosen(choice, error, cost, _traced_bound(e, c, usable, budget))


def _traced_bound(e: Any, c: Any, usable: Any, budget: Any) -> Any:
    e, c = jnp.where(usable, e, jnp.inf), jnp.where(usable, c, 0.0)
    rows = np.arange(e.shape[0])

    def dual(price: Any) -> tuple[Any, Any]:
        choice = jnp.argmin(e + price * c, axis=1)
        spent = jnp.sum(c[rows, choice])
        return jnp.sum(e[rows, choice]) + price * (spent - budget), spent

    # Prices over all orders of magnitude first, then between two of them.
    prices = jnp.concatenate([jnp.zeros(1), 2.0 ** jnp.arange(-40.0, 41.0)])
    values, spent = jax.vmap(dual)(prices)
    fits = spent <= budget
    high = jnp.where(jnp.any(fits), jnp.argmax(fits), len(prices) - 1)

    def halve(_: Any, carry: Any) -> Any:
        low, high, best = carry
        price = 0.5 * (low + high)
        value, spent = dual(price)
        fits = spent <= budget
        return (
            jnp.where(fits, low, price),
            jnp.where(fits, price, high),
            jnp.maximum(best, value),
        )

    start = prices[jnp.maximum(high - 1, 0)], prices[high], jnp.max(values)
    return jax.lax.fori_loop(0, 40, halve, start)[2]
