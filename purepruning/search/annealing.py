"""Simulated annealing: how a total sparsity is best divided among layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from purepruning.arguments import fraction, scalar, shown, whole_number
from purepruning.arrays import is_concrete
from purepruning.config.config import Config, check_config, known_counts
from purepruning.counts import count_of
from purepruning.granularity import NM, grid
from purepruning.search.problem import Problem, check_reachable, fit
from purepruning.search.shape import Common, Move, OptimizeMode, Search, best_of, make_search

#: No layer's share falls below this part of the others' before rescaling, so that every layer can
#: take up what the others cannot.
LEAST_SHARE = 1e-3


#: Scores that differ by less are as good as equal.
SMALLEST_CHANGE = 1e-30

#: How often the temperature may fall: a table has a row for each.
MOST_COOLINGS = 10**6

#: How often a point is drawn anew until its counts differ from those where the chain stands.
MOST_DRAWS = 8


class AnnealingState(NamedTuple):
    """One chain: a pytree of arrays.

    Attributes:
        common: what every search has; ``common.plans`` is what was proposed last.
        proposals: how many proposals were answered, those without a new plan included.
        coolings: how often the temperature has fallen.
        temperature: its present value.
        sparsity: the point the chain is at, ``(groups,)``.
        counts: its counts, int32 ``(groups,)``.
        score: its score, as it is maximised; NaN before the first.
        proposed: the point that was proposed last.
        change: sum of all changes of the score so far, without their signs.
    """

    common: Common
    proposals: Any
    coolings: Any
    temperature: Any
    sparsity: Any
    counts: Any
    score: Any
    proposed: Any
    change: Any


def annealing(
    problem: Problem | Config,
    *,
    optimize_mode: OptimizeMode = "maximize",
    start_temperature: float = 100.0,
    stop_temperature: float = 20.0,
    cool_down_rate: float = 0.9,
    perturbation_magnitude: float = 0.35,
    scale: float | None = None,
    max_proposals: int = 1000,
) -> Search:
    r"""Returns a search for the sparsities of best score, at a fixed total.

    Of a config without a coupling the total is that of each rule: its sparsity is that of all its
    layers together. Of a :class:`purepruning.search.Problem` it is the budget, or several of them.

    A point is a sparsity for every group; the groups with more weights (in a problem those whose
    pruning saves more) get the higher ones. The first is drawn uniformly from [0.05, 1), the next
    are

    $$y = \max(0, x + U(-m, m)), \qquad m = m_0 T / T_0,$$

    all rescaled to the total. A group that would lose all its units, or more than its rule allows,
    loses what it can, and the others take the rest in proportion. The counts then meet the total
    exactly where units are single weights; of larger units as many go as fit into it. A problem's
    budget is met from below, and no group could prune one unit less.

    A better score is accepted, another with probability

    $$\exp\bigl(-|\Delta| / (c\, T / T_0)\bigr),$$

    and after every acceptance but the first, T falls by the cool-down rate. The scale c is the mean
    of all $|\Delta|$ so far unless given, so that the search works for scores of any size: what is
    as much worse as usual is accepted with 1/e at first, with 1/e^5 at the end. ``scale=100`` (the
    start temperature) is NNI's $\exp(-|\Delta|/T)$, which accepts nearly everything of a score
    that lies between 0 and 1.

    A draw whose counts are those where the chain stands is drawn again, a few times; then the
    proposal is not feasible, and counts as rejected. A chain that is done stays as it is. A NaN
    score is never accepted over a number.

    Liu et al. 2020, arXiv:1907.03141 (AutoCompress); NNI's simulated annealing pruner, whose
    temperatures, rates and magnitude are the defaults. With them the temperature falls 16 times.

    Args:
        problem: the resolved rules, of layer scope, or a problem made of them.
        optimize_mode: whether a score is better if it is larger or smaller.
        start_temperature: $T_0$.
        stop_temperature: below it the search is done.
        cool_down_rate: what an acceptance multiplies the temperature by.
        perturbation_magnitude: $m_0$.
        scale: c.
        max_proposals: after so many the search is done, whatever the temperature.

    Raises:
        ValueError, TypeError: an argument is out of range; the config is of global scope or of N:M;
            the rules' layers cannot lose so much; a rule has several sparsities or none; the plan
            that prunes most is over a budget.

    >>> import jax
    >>> import purepruning as pp
    >>> table = [
    ...     pp.Layer(name, "Linear", name, (10, n), out_axes=(1,), in_axes=(0,))
    ...     for name, n in (("a", 10), ("b", 30))
    ... ]
    >>> config = pp.resolve([{"sparsity": 0.6, "op_types": ["Linear"]}], table)
    >>> search = annealing(config)
    >>> state = search.init(jax.random.key(0))
    >>> while not search.done(state):
    ...     state, counts = search.propose(state)
    ...     assert int(counts["a"] + counts["b"]) == 240
    ...     state = search.accept(state, -abs(counts["a"] - 30) / 100)
    >>> int(state.common.evaluated) >= 17, abs(int(search.best(state)["a"]) - 30) < 5
    (True, True)
    """
    start = _positive("start_temperature", start_temperature)
    stop = _positive("stop_temperature", stop_temperature)
    magnitude = _positive("perturbation_magnitude", perturbation_magnitude)
    whole_number(max_proposals, "annealing: max_proposals", 1, 2**31 - 1)
    if stop > start:
        raise ValueError(
            f"stop_temperature must not exceed start_temperature, got {stop} > {start}"
        )
    if scale is not None:
        scale = _positive("scale", scale)
    temperatures = _temperatures(start, stop, cool_down_rate)
    last = len(temperatures) - 1
    if isinstance(problem, Problem):
        check_reachable("annealing", problem)
        names, place = problem.names, _place_in(problem)
    else:
        groups = _groups(problem)
        names, place = tuple(pool.name for pool in problem.pools), _place_by(groups)
    nan, zero = np.float32(np.nan), np.int32(0)

    def begin(key: Any) -> tuple[Any, ...]:
        points = jax.random.uniform(jax.random.fold_in(key, 0), (len(names),), jnp.float32, 0.05)
        shares, counts = place(points)
        some = (zero, zero, temperatures[0], shares, counts, nan, shares, np.float32(0))
        return tuple(map(jnp.asarray, some))

    def plan(state: AnnealingState) -> tuple[Any, ...]:
        reach = magnitude * state.temperature / start

        def draw(carry: Any) -> Any:
            key, tries, *_ = carry
            key, once = jax.random.split(key)
            noise = jax.random.uniform(once, (len(names),), jnp.float32, -1.0, 1.0)
            shares, counts = place(jnp.maximum(0.0, state.sparsity + reach * noise))
            return key, tries + 1, shares, counts

        def again(carry: Any) -> Any:
            _, tries, _, counts = carry
            return (tries == 0) | (jnp.all(counts == state.counts) & (tries < MOST_DRAWS))

        def draws() -> Any:
            carry = state.common.key, jnp.zeros((), jnp.int32), state.sparsity, state.counts
            key, _, shares, counts = jax.lax.while_loop(again, draw, carry)
            return key, shares, counts

        first = state.proposals == 0
        key, shares, counts = jax.lax.cond(
            first, lambda: (state.common.key, state.sparsity, state.counts), draws
        )
        own = state._replace(proposed=shares)[1:]
        new = first | jnp.any(counts != state.counts)
        return key, own, counts[None], new[None], 0

    def learn(state: AnnealingState, scores: Any) -> Move:
        score, old = scores[0], state.score
        delta = jnp.nan_to_num(jnp.abs(score - old), nan=0.0, posinf=jnp.finfo(jnp.float32).max)
        change = state.change + delta
        usual = change / jnp.maximum(state.proposals, 1).astype(jnp.float32)
        heat = state.temperature / start
        heat = heat * (jnp.maximum(usual, SMALLEST_CHANGE) if scale is None else scale)
        draw = jax.random.fold_in(state.common.key, state.proposals)
        lucky = jax.random.uniform(draw) < jnp.exp(-delta / heat)
        taken = state.common.feasible[0]
        taken &= jnp.isnan(old) | (score > old) | (lucky & ~jnp.isnan(score))
        coolings = state.coolings + (taken & (state.proposals > 0)).astype(jnp.int32)
        own = (
            state.proposals + 1,
            coolings,
            jnp.asarray(temperatures)[jnp.minimum(coolings, last)],
            jnp.where(taken, state.proposed, state.sparsity),
            jnp.where(taken, state.common.plans[0], state.counts),
            jnp.where(taken, score, old),
            state.proposed,
            change,
        )
        return Move(own, jnp.where(taken, 0, -1), *best_of(state.common, scores))

    def done(state: AnnealingState) -> Any:
        return (state.coolings >= last) | (state.proposals >= max_proposals)

    return make_search(
        "annealing",
        names,
        AnnealingState,
        candidates=1,
        start=begin,
        plan=plan,
        learn=learn,
        done=done,
        optimize_mode=optimize_mode,
    )


def _temperatures(start: float, stop: float, cool_down_rate: float) -> np.ndarray:
    """Returns the temperature after every cooling, float32, to the first that is below the last."""
    rate = fraction(cool_down_rate, "annealing: cool_down_rate")
    if not 0 < rate < 1:
        raise ValueError(
            f"annealing: cool_down_rate must lie between 0 and 1, got {shown(cool_down_rate)}"
        )
    coolings = math.log(stop / start) / math.log(rate)
    if not coolings < MOST_COOLINGS:
        raise ValueError(
            f"annealing: from start_temperature {start:g} to stop_temperature {stop:g} the "
            f"temperature would fall {coolings:.3g} times; give a smaller cool_down_rate"
        )
    # Counted, not multiplied up, so that rounding does not decide when the search ends.
    last, now = 0, start
    while now >= stop:
        last, now = last + 1, start * rate ** (last + 1)
    return np.asarray([start * rate**i for i in range(last + 1)], np.float32)


def _place_by(groups: list[_Group]) -> Callable[[Any], tuple[Any, Any]]:
    """Returns what rescales points to the totals of rules, and gives their counts."""

    def place(points: Any) -> tuple[Any, Any]:
        shares, counts = jnp.zeros_like(points), jnp.zeros(points.shape, jnp.int32)
        for group in groups:
            share, count = _divide(group, points[group.pools])
            shares, counts = shares.at[group.pools].set(share), counts.at[group.pools].set(count)
        return shares, counts

    return place


def _place_in(problem: Problem) -> Callable[[Any], tuple[Any, Any]]:
    """Returns what fits points into the budgets of a problem, and gives their counts."""
    alone = np.diag(problem.last)
    saved = problem.amounts(0 * problem.last)[0] - problem.amounts(alone)[:, 0]
    order = np.argsort(saved, kind="stable")
    place_of = np.argsort(order)
    most = np.asarray([max(int(x[-1]), 1) for x in problem.options], np.float32)

    def place(points: Any) -> tuple[Any, Any]:
        counts = problem.counts(fit(problem, jnp.sort(points)[place_of]))
        return counts.astype(jnp.float32) / most, counts

    return place


class _Group(NamedTuple):
    """The pools of one rule, smallest layer first, and what they lose together.

    Attributes:
        pools: their places in the config.
        weights: number of weights of each.
        costs: number of weights of a unit.
        most: number of units each can lose.
        total: number of weights to prune of all of them.
    """

    pools: np.ndarray
    weights: np.ndarray
    costs: np.ndarray
    most: np.ndarray
    total: int


def _groups(config: Config) -> list[_Group]:
    check_config("annealing", config)
    if isinstance(config.granularity, NM):
        raise ValueError(f"annealing: the counts of {config.granularity} are fixed")
    if config.scope != "layer":
        raise ValueError(
            "annealing divides a rule's sparsity among layers: resolve the rules with "
            f"scope='layer' and 'sparsity', got scope={config.scope!r}"
        )
    if config.allocation is not None:
        raise ValueError(
            "annealing divides a rule's sparsity among layers, not coupled channels; give it "
            "search.problem(config, budget) instead"
        )
    groups = []
    for number in sorted({pool.rule for pool in config.pools}):
        mine = [(i, pool) for i, pool in enumerate(config.pools) if pool.rule == number]
        given = [known_counts("annealing", p, config.counts[p.name]) for _, p in mine]
        if any(count.ndim for count in given):
            raise ValueError(
                f"annealing: rule {number} has several counts for a pool; search for each of them"
            )
        known = [int(count) for count in given]
        grids = [grid(pool.layers[0], config.granularity) for _, pool in mine]
        if any(g.is_padded for g in grids):
            raise ValueError(f"annealing: rule {number}: blocks at the edge of a layer are smaller")
        weights = np.asarray([math.prod(pool.layers[0].shape) for _, pool in mine])
        costs = np.asarray([g.cost * g.n_stacked for g in grids])
        most = np.asarray([pool.most for _, pool in mine])
        share = mine[0][1].sparsity
        total, possible = int(np.dot(known, costs)), int((most * costs).sum())
        if share is not None and known == [count_of(share, pool.size) for _, pool in mine]:
            total = count_of(share, int(weights.sum()))  # not rounded down layer by layer
        if weights.sum() >= 2**31 or total > possible:
            raise ValueError(
                f"annealing: rule {number} asks for {total} of {weights.sum()} weights, but its "
                f"layers can lose at most {min(possible, 2**31 - 1)} together"
            )
        order = np.argsort(weights, kind="stable")
        places = np.asarray([i for i, _ in mine])[order]
        weights, costs, most = (x[order].astype(np.int32) for x in (weights, costs, most))
        groups.append(_Group(places, weights, costs, most, total))
    return groups


def _divide(group: _Group, points: Any) -> tuple[Any, Any]:
    """Returns the sparsities of a group's layers at its total, and their counts of units."""
    weights = group.weights.astype(np.float32) / np.float32(group.weights.sum())
    target = np.float32(group.total / group.weights.sum())
    most = (group.most * group.costs / group.weights).astype(np.float32)
    shares = jnp.sort(points)
    shares = jnp.maximum(shares, LEAST_SHARE * jnp.maximum(shares[-1], LEAST_SHARE))
    # Where x * s reaches a layer's most, it stays there; among the layers in order of when they get
    # there, the first j are there if the s that the others then need is not more than the next.
    reach = most / shares
    order = jnp.argsort(reach)
    full = jnp.concatenate([jnp.zeros(1), jnp.cumsum(jnp.asarray(weights * most)[order])[:-1]])
    free = jnp.cumsum((weights * shares)[order][::-1])[::-1]
    needed = (target - full) / free
    fits = needed <= reach[order]
    scale = jnp.where(jnp.any(fits), needed[jnp.argmax(fits)], jnp.inf)
    shares = jnp.clip(shares * jnp.maximum(scale, 0.0), 0.0, most)
    return shares, _whole(group, shares)


def _whole(group: _Group, shares: Any) -> Any:
    """Returns the counts of units that shares stand for, which together fit the total."""
    wanted = shares * group.weights.astype(np.float32)

    def place(carry: Any, layer: Any) -> tuple[Any, Any]:
        want, cost, most = layer
        want = want + carry
        count = jnp.clip(jnp.round(want / cost.astype(jnp.float32)).astype(jnp.int32), 0, most)
        return want - (count * cost).astype(jnp.float32), count

    def take(over: Any, layer: Any) -> tuple[Any, Any]:
        count, cost, _ = layer
        taken = jnp.clip(-(-over // cost), 0, count)
        return over - taken * cost, count - taken

    def give(rest: Any, layer: Any) -> tuple[Any, Any]:
        count, cost, most = layer
        given = jnp.clip(rest // cost, 0, most - count)
        return rest - given * cost, count + given

    # Large units first, as what they are off can be made up for by smaller ones; then large layers.
    large = np.lexsort((-group.weights, -group.costs))
    small = np.lexsort((-group.weights, group.costs))
    _, counts = _along(large, place, jnp.zeros(()), wanted, group)
    # Rounding has left it a little off. In integers: the smallest units go, then what fits comes.
    over, counts = _along(small, take, jnp.sum(counts * group.costs) - group.total, counts, group)
    return _along(large, give, -over, counts, group)[1]


def _along(
    order: np.ndarray, function: Callable[..., Any], carry: Any, values: Any, group: _Group
) -> tuple[Any, Any]:
    """Returns what ``function`` makes of the layers, one after another in an order."""
    costs, most = (jnp.asarray(x[order]) for x in (group.costs, group.most))
    carry, results = jax.lax.scan(function, carry, (values[order], costs, most))
    return carry, results[np.argsort(order)]


def _positive(name: str, value: Any) -> float:
    value = scalar(value, f"annealing: {name}")
    if not is_concrete(value):
        raise TypeError(f"annealing: {name} must be known; make the search outside of jit and vmap")
    return float(value)
