"""Simulated annealing: how a total sparsity is best divided among layers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from purepruning.arguments import fraction, instance, one_of, scalar, shown
from purepruning.arrays import is_array, is_concrete, is_torch
from purepruning.config.config import Config, check_config, known_counts
from purepruning.counts import count_of
from purepruning.granularity import NM, grid

#: No layer's share falls below this part of the others' before rescaling, so that every layer can
#: take up what the others cannot.
LEAST_SHARE = 1e-3


#: Scores that differ by less are as good as equal.
SMALLEST_CHANGE = 1e-30

#: How often the temperature may fall: a table has a row for each.
MOST_COOLINGS = 10**6


class AnnealingState(NamedTuple):
    """One chain: a pytree of arrays.

    Attributes:
        key: random key, typed.
        evaluated: proposals accepted or rejected so far, the first included.
        coolings: how often the temperature has fallen.
        sparsity: the point the chain is at, ``(pools,)``.
        score: its score, larger is better; NaN before the first.
        proposed: the point that was proposed last.
        counts: its counts, int32 ``(pools,)``.
        best_counts: the counts of the best score so far.
        best_score: that score.
        change: sum of all changes of the score so far, without their signs.
    """

    key: Any
    evaluated: Any
    coolings: Any
    sparsity: Any
    score: Any
    proposed: Any
    counts: Any
    best_counts: Any
    best_score: Any
    change: Any


class Annealing(NamedTuple):
    """What :func:`annealing` returns: pure functions, all traceable.

    Attributes:
        init: ``(key) -> state``.
        propose: ``(state) -> (state, counts)``, by pool name, for
            :meth:`purepruning.Config.with_counts`.
        accept: ``(state, score) -> state``, with the score of what was proposed.
        best: ``(state) -> counts`` of the best score so far.
        done: ``(state) -> bool``: the temperature has fallen below the last.
        temperature: ``(state) -> float32``.
    """

    init: Callable[[Any], AnnealingState]
    propose: Callable[[AnnealingState], tuple[AnnealingState, dict[str, Any]]]
    accept: Callable[[AnnealingState, Any], AnnealingState]
    best: Callable[[AnnealingState], dict[str, Any]]
    done: Callable[[AnnealingState], Any]
    temperature: Callable[[AnnealingState], Any]


def annealing(
    config: Config,
    *,
    optimize_mode: Literal["maximize", "minimize"] = "maximize",
    start_temperature: float = 100.0,
    stop_temperature: float = 20.0,
    cool_down_rate: float = 0.9,
    perturbation_magnitude: float = 0.35,
    scale: float | None = None,
) -> Annealing:
    r"""Returns a search for the layer sparsities of best score, at a fixed total.

    A rule's sparsity is that of all its layers together. A point is a sparsity for every layer; the
    layers with more weights get the higher ones. The first is drawn uniformly from [0.05, 1), the
    next are

    $$y = \max(0, x + U(-m, m)), \qquad m = m_0 T / T_0,$$

    all rescaled to the total. A layer that would lose all its units, or more than its rule allows,
    loses what it can, and the others take the rest in proportion. The counts then meet the total
    exactly where units are single weights; of larger units as many go as fit into it.

    A better score is accepted, another with probability

    $$\exp\bigl(-|\Delta| / (c\, T / T_0)\bigr),$$

    and after every acceptance but the first, T falls by the cool-down rate. The scale c is the mean
    of all $|\Delta|$ so far unless given, so that the search works for scores of any size: what is
    as much worse as usual is accepted with 1/e at first, with 1/e^5 at the end. ``scale=100`` (the
    start temperature) is NNI's $\exp(-|\Delta|/T)$, which accepts nearly everything of a score
    that lies between 0 and 1.

    No function draws again until something fits, so none can hang, and all run under ``jit`` and
    ``vmap``: many chains from many keys. A chain that is done stays as it is. A NaN score is never
    accepted over a number.

    Liu et al. 2020, arXiv:1907.03141 (AutoCompress); NNI's simulated annealing pruner, whose
    temperatures, rates and magnitude are the defaults. With them the temperature falls 16 times.

    Args:
        config: the resolved rules, of layer scope.
        optimize_mode: whether a score is better if it is larger or smaller.
        start_temperature: $T_0$.
        stop_temperature: below it the search is done.
        cool_down_rate: what an acceptance multiplies the temperature by.
        perturbation_magnitude: $m_0$.
        scale: c.

    Raises:
        ValueError, TypeError: an argument is out of range; the config is of global scope or of N:M;
            the rules' layers cannot lose so much; a rule has several sparsities or none.

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
    >>> int(state.evaluated) >= 17, abs(int(search.best(state)["a"]) - 30) < 5
    (True, True)
    """
    one_of("annealing: optimize_mode", optimize_mode, ("maximize", "minimize"))
    start = _positive("start_temperature", start_temperature)
    stop = _positive("stop_temperature", stop_temperature)
    magnitude = _positive("perturbation_magnitude", perturbation_magnitude)
    if stop > start:
        raise ValueError(
            f"stop_temperature must not exceed start_temperature, got {stop} > {start}"
        )
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
    if scale is not None:
        scale = _positive("scale", scale)
    # Counted, not multiplied up, so that rounding does not decide when the search ends.
    last, temperature_now = 0, start
    while temperature_now >= stop:
        last, temperature_now = last + 1, start * rate ** (last + 1)
    temperatures = np.asarray([start * rate**i for i in range(last + 1)], np.float32)
    groups = _groups(config)
    names = [pool.name for pool in config.pools]
    sign = 1.0 if optimize_mode == "maximize" else -1.0

    def place(points: Any) -> tuple[Any, Any]:
        """Returns the points rescaled to the total, and their counts."""
        shares, counts = jnp.zeros_like(points), jnp.zeros(points.shape, jnp.int32)
        for group in groups:
            share, count = _divide(group, points[group.pools])
            shares, counts = shares.at[group.pools].set(share), counts.at[group.pools].set(count)
        return shares, counts

    @jax.jit
    def begin(key: Any) -> AnnealingState:
        key, draw = jax.random.split(key)
        points = jax.random.uniform(draw, (len(names),), jnp.float32, 0.05, 1.0)
        shares, counts = place(points)
        zero, nan = jnp.zeros((), jnp.int32), jnp.full((), jnp.nan, jnp.float32)
        return AnnealingState(
            key, zero, zero, shares, nan, shares, counts, counts, nan, jnp.zeros((), jnp.float32)
        )

    def init(key: Any) -> AnnealingState:
        _check_key(key)
        return begin(key)

    @jax.jit
    def proposed(state: AnnealingState) -> tuple[AnnealingState, dict[str, Any]]:
        key, draw = jax.random.split(state.key)
        reach = magnitude * temperature(state) / start
        noise = jax.random.uniform(draw, (len(names),), jnp.float32, -1.0, 1.0)
        shares, counts = place(jnp.maximum(0.0, state.sparsity + reach * noise))
        first = (state.evaluated == 0) | done(state)
        shares = jnp.where(first, state.proposed, shares)
        counts = jnp.where(first, state.counts, counts)
        key = jax.random.wrap_key_data(
            jnp.where(first, jax.random.key_data(state.key), jax.random.key_data(key)),
            impl=jax.random.key_impl(key),
        )
        state = state._replace(key=key, proposed=shares, counts=counts)
        return state, _named(names, counts)

    @jax.jit
    def accepted(state: AnnealingState, score: Any) -> AnnealingState:
        score = sign * jnp.asarray(score, jnp.float32)
        old, best = sign * state.score, sign * state.best_score
        key, draw = jax.random.split(state.key)
        delta = jnp.nan_to_num(jnp.abs(score - old), nan=0.0, posinf=jnp.finfo(jnp.float32).max)
        change = state.change + delta
        heat = temperature(state) / start
        usual = change / jnp.maximum(state.evaluated, 1).astype(jnp.float32)
        heat = heat * (jnp.maximum(usual, SMALLEST_CHANGE) if scale is None else scale)
        lucky = jax.random.uniform(draw) < jnp.exp(-delta / heat)
        first = jnp.isnan(old)
        taken = first | (score > old) | (lucky & ~jnp.isnan(score))
        new = state._replace(
            key=key,
            evaluated=state.evaluated + 1,
            coolings=state.coolings + (taken & (state.evaluated > 0)).astype(jnp.int32),
            sparsity=jnp.where(taken, state.proposed, state.sparsity),
            score=jnp.where(taken, sign * score, state.score),
            best_counts=jnp.where(
                jnp.isnan(best) | (score > best), state.counts, state.best_counts
            ),
            best_score=jnp.where(jnp.isnan(best) | (score > best), sign * score, state.best_score),
            change=change,
        )
        return _where(done(state), state, new)

    def propose(state: AnnealingState) -> tuple[AnnealingState, dict[str, Any]]:
        _check_state("propose", state, len(names))
        return proposed(state)

    def accept(state: AnnealingState, score: Any) -> AnnealingState:
        _check_state("accept", state, len(names))
        _check_score(score)
        return accepted(state, float(score) if isinstance(score, int) else score)

    def best(state: AnnealingState) -> dict[str, Any]:
        _check_state("best", state, len(names))
        return _named(names, state.best_counts)

    def done(state: AnnealingState) -> Any:
        _check_state("done", state, len(names))
        return state.coolings >= last

    def temperature(state: AnnealingState) -> Any:
        _check_state("temperature", state, len(names))
        return jnp.asarray(temperatures)[state.coolings]

    return Annealing(init, propose, accept, best, done, temperature)


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
        raise ValueError("annealing divides a rule's sparsity among layers, not coupled channels")
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


def _named(names: list[str], counts: Any) -> dict[str, Any]:
    return {name: counts[..., i] for i, name in enumerate(names)}


def _where(condition: Any, yes: AnnealingState, no: AnnealingState) -> AnnealingState:
    key = jnp.where(condition, jax.random.key_data(yes.key), jax.random.key_data(no.key))
    key = jax.random.wrap_key_data(key, impl=jax.random.key_impl(no.key))
    others = jax.tree.map(functools.partial(jnp.where, condition), yes[1:], no[1:])
    return AnnealingState(key, *others)


def _check_state(where: str, state: Any, pools: int) -> None:
    """Raises for what is no state of a search over so many pools, as ``init`` returns it."""
    where = f"annealing: {where}: state"
    instance(state, AnnealingState, where, "what init of this search returned")
    _check_key(state.key)
    for field, dtype, shape in _FIELDS:
        x = getattr(state, field)
        if is_torch(x) or not is_array(x) or not jnp.isdtype(x.dtype, dtype):
            raise TypeError(f"{where}.{field} must be an array of {dtype} numbers, got {shown(x)}")
        wanted = (pools,) if shape else ()
        if x.shape != wanted:
            raise ValueError(
                f"{where}.{field} must have shape {wanted}, got {x.shape}; is it of another "
                "search? Map over several states with vmap"
            )


#: The fields of a state besides its key: of what dtype, and whether they have one entry per pool.
_FIELDS = (
    ("evaluated", "integral", False),
    ("coolings", "integral", False),
    ("sparsity", "real floating", True),
    ("score", "real floating", False),
    ("proposed", "real floating", True),
    ("counts", "integral", True),
    ("best_counts", "integral", True),
    ("best_score", "real floating", False),
    ("change", "real floating", False),
)


def _check_score(score: Any) -> None:
    known = isinstance(score, int | float) and not isinstance(score, bool)
    array = (
        is_array(score)
        and not is_torch(score)
        and jnp.isdtype(score.dtype, ("integral", "real floating"))
    )
    if not known and not array:
        raise TypeError(f"annealing: accept: score must be a number, got {shown(score)}")
    if np.shape(score):
        raise ValueError(f"annealing: accept: score must be one number, got {shown(score)}")
    huge = isinstance(score, int) and score.bit_length() > 127
    if huge or (known and not math.isinf(score) and abs(score) > jnp.finfo(jnp.float32).max):
        raise ValueError(f"annealing: accept: score must fit into float32, got {shown(score)}")


def _check_key(key: Any) -> None:
    if not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        raise TypeError(
            f"annealing: key must be a typed key, jax.random.key(seed), got {shown(key)}"
        )
    if key.shape:
        raise TypeError(
            f"annealing: one key is needed, keys of shape {key.shape} came; map over them with vmap"
        )


def _positive(name: str, value: Any) -> float:
    value = scalar(value, f"annealing: {name}")
    if not is_concrete(value):
        raise TypeError(f"annealing: {name} must be known; make the search outside of jit and vmap")
    return float(value)
