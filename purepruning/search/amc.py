"""AMC: an agent that decides group by group, and learns from the score of the whole plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from purepruning.arguments import fraction, instance, one_of, shown, whole_number
from purepruning.arrays import is_array
from purepruning.search import ddpg
from purepruning.search.ddpg import Agent, Hyper
from purepruning.search.problem import Problem, check_problem, fit, smallest_level
from purepruning.search.shape import (
    Common,
    Move,
    OptimizeMode,
    Search,
    best_of,
    make_search,
)

Reward = Literal["score", "log_resource", "log_params"]

#: The features of a group that change during an episode: what is gone, what is still to be decided
#: on, and the last action.
CHANGING = 3


class AmcState(NamedTuple):
    """The agent, and the episode that is being evaluated: a pytree of arrays.

    Attributes:
        common: what every search has.
        agent: see :class:`purepruning.search.ddpg.Agent`.
        observations: of the episode, ``(groups, features)``.
        actions: of the episode, as they were realised, ``(groups,)``.
    """

    common: Common
    agent: Agent
    observations: Any
    actions: Any


def amc(
    problem: Problem,
    *,
    episodes: int = 800,
    reward: Reward = "score",
    lower: float = 0.2,
    order: Sequence[str] | None = None,
    features: Any = None,
    hyper: Hyper | Mapping[str, Any] | None = None,
    optimize_mode: OptimizeMode = "maximize",
) -> Search:
    r"""Returns AMC: per episode one plan, made group by group by an actor that learns from scores.

    In the order of the groups the actor says which fraction of a group's units to keep, given the
    group's features, what of the first budgeted resource is gone, what later groups still have of
    it, and the last action. The units that this keeps are rounded to an option, and the option is
    bounded so that the budgets can still be met if all later groups keep as little as they may: so
    that every plan, as it is rounded, is within them. A plan that leaves less than they allow is
    brought up to them, all groups in proportion. An episode is one proposal; its score is the
    reward of all its steps,

    - ``"score"``: the score, such as the accuracy;
    - ``"log_resource"``: $-(1 - \text{score}) \ln R$, with R what is left of the first resource;
    - ``"log_params"``: the same of the parameters, whatever the budget is of.

    After ``hyper.warmup`` episodes, which act uniformly, the agent takes one update for each group.
    Everything is deterministic under the key; ``vmap``, on a CPU rather ``jax.lax.map``, over keys
    runs several seeds.

    He et al. 2018, arXiv:1802.03494; the agent is that of its code and of NNI.

    Args:
        problem: groups and budgets, of monotone resources.
        episodes: after so many the search is done.
        reward: what the agent learns from.
        lower: the smallest fraction of its units that a group keeps, unless its options say more.
        order: names of all groups, from the input on; the config's order unless given.
        features: float array ``(groups, n)``, in ``order``, what the agent sees of each group; each
            column is brought to [0, 1]. Unless given: the place in the order, the number of units,
            of layers and of weights, the last dimensions of the first layer, and what pruning the
            group would save of the first resource. See also :func:`layer_features`.
        hyper: numbers of the agent, a :class:`purepruning.search.ddpg.Hyper` or a mapping of what
            differs from it.
        optimize_mode: whether a score is better if it is larger or smaller; the logarithmic rewards
            need one of at most 1, to be maximised.

    Raises:
        ValueError, TypeError: an argument is out of range; with all groups at ``lower`` a budget is
            not met; more pruning may cost more.

    >>> import jax
    >>> import purepruning as pp
    >>> table = [pp.Layer(n, "Linear", n, (10, 20), (1,), (0,)) for n in "ab"]
    >>> config = pp.resolve([{"op_types": ["Linear"]}], table, granularity="output_channel")
    >>> of = pp.search.problem(config, {"weights": 0.5})
    >>> search = amc(of, episodes=3, hyper={"hidden": 8, "warmup": 1, "batch": 4})
    >>> score = lambda trial: 1 - 0.001 * trial.counts["a"] ** 2
    >>> run = pp.search.run_search(search, search.init(jax.random.key(0)), score, problem=of)
    >>> len(run.history), all(row["resource"]["weights"] <= 200 for row in run.history)
    (3, True)
    """
    of = check_problem("amc", problem)
    whole_number(episodes, "amc: episodes", 1, 2**31 - 1)
    one_of("amc: reward", reward, ("score", "log_resource", "log_params"))
    if not of.monotone:
        raise ValueError("amc: more pruning may cost more here, so that actions have no bound")
    if reward == "log_params" and "params" not in of.resources:
        raise ValueError("amc: reward 'log_params' needs a problem with the resource 'params'")
    if reward != "score" and optimize_mode == "minimize":
        raise ValueError(f"amc: reward {reward!r} is of a score to be maximised, at most 1")
    numbers = _hyper(hyper)
    ranks = _order(of, order)
    last = _lowest(of, fraction(lower, "amc: lower"))
    if not bool(of.within(last)):
        raise ValueError(
            f"amc: with all groups at {lower:g} of their units the budgets {of.limits} are "
            "not met; give a smaller lower"
        )
    static = _scaled(_features(of, ranks, features))
    n, width, longest = len(of.names), static.shape[1] + CHANGING, max(map(len, of.options))
    dense = float(of.amounts(0 * last)[0])
    sizes = np.asarray([float(_size(of, g)) for g in range(n)], np.float32)
    share_of = _later_shares(of, ranks, dense)
    table = np.stack([np.pad(o, (0, longest - len(o)), mode="edge") for o in of.options])
    counting = of if reward != "log_params" else _counting(of, "params")

    def begin(key: Any) -> tuple[Any, ...]:
        agent = ddpg.init(jax.random.fold_in(key, 1), width, numbers)
        return agent, jnp.zeros((n, width)), jnp.zeros(n)

    def decide(levels: Any, group: Any, action: Any) -> Any:
        """The level that an action means, as far as later groups can make up for it."""
        wanted = jnp.asarray(sizes)[group] * (1.0 - action)
        row = jnp.asarray(table.astype(np.float32))[group]
        level = jnp.sum(row <= wanted + 1e-4).astype(jnp.int32) - 1
        level = jnp.clip(level, 0, jnp.asarray(last)[group])
        least = smallest_level(of, levels, group, level, of.within, longest)
        return jnp.where(least < 0, jnp.asarray(last)[group], least)

    def plan(state: AmcState) -> tuple[Any, ...]:
        key, once = jax.random.split(state.common.key)

        def step(carry: Any, place: Any) -> tuple[Any, Any]:
            levels, decided, action = carry
            group = jnp.asarray(ranks)[place]
            gone = 1.0 - of.amounts(decided)[0] / dense
            rest = jnp.asarray(share_of)[place]
            changing = jnp.stack([gone, rest, action])
            observation = jnp.concatenate([jnp.asarray(static)[place], changing])
            draw = jax.random.fold_in(once, place)
            chosen = ddpg.act(state.agent, draw, observation, numbers)
            level = decide(levels, group, chosen)
            size = jnp.asarray(sizes)[group]
            count = jnp.asarray(table.astype(np.float32))[group, level]
            realised = 1.0 - count / size
            new = levels.at[group].set(level), decided.at[group].set(level), realised
            return new, (observation, realised)

        # What is not decided on yet keeps as little as it may in levels, and all in decided.
        start = jnp.asarray(last), jnp.zeros_like(jnp.asarray(last)), jnp.ones(())
        (levels, _, _), (seen, _) = jax.lax.scan(step, start, jnp.arange(n))
        # What the budgets allow beyond the actions is given back, to all in proportion.
        levels = fit(of, of.counts(levels).astype(jnp.float32) / sizes, only_less=True)
        actions = (1.0 - of.counts(levels).astype(jnp.float32) / sizes)[ranks]
        own = state._replace(observations=seen, actions=actions)[1:]
        return key, own, of.counts(levels)[None], jnp.ones(1, bool), 0

    def learn(state: AmcState, scores: Any) -> Move:
        score = scores[0]
        if reward != "score":
            levels = _levels_of(of, state.common.plans[0], longest)
            score = -(1.0 - score) * jnp.log(counting.amounts(levels)[0])
        key = jax.random.fold_in(state.common.key, state.agent.episode)
        learnt = ddpg.end_episode(
            state.agent, key, state.observations, state.actions, score, numbers
        )
        skipped = state.agent._replace(episode=state.agent.episode + 1)
        failed = jnp.isnan(score)
        agent = jax.tree.map(lambda a, b: jnp.where(failed, a, b), skipped, learnt)
        best, best_score = best_of(state.common, scores)
        if reward != "score":
            best, best_score = best_of(state.common, score[None])
        taken = jnp.where(jnp.array_equal(best_score, state.common.best_score), -1, 0)
        return Move((agent, state.observations, state.actions), taken, best, best_score)

    def done(state: AmcState) -> Any:
        return state.agent.episode >= episodes

    return make_search(
        "amc",
        of.names,
        AmcState,
        candidates=1,
        start=begin,
        plan=plan,
        learn=learn,
        done=done,
        optimize_mode=optimize_mode,
    )


def layer_features(rows: Sequence[Mapping[str, float]], names: Sequence[str]) -> np.ndarray:
    """Returns what an agent sees of layers, ``(layers, names)``, each column in [0, 1].

    NNI's columns are ``index, type, in, out, stride, kernel, weights``; the paper's are
    ``index, out, in, height, width, stride, kernel, macs``. What changes during an episode is added
    by the search.

    Args:
        rows: for each layer its numbers.
        names: which of them, in order.

    Raises:
        KeyError: a layer lacks one.

    >>> layer_features([{"in": 3, "out": 8}, {"in": 8, "out": 32}], ["in", "out"]).tolist()
    [[0.0, 0.0], [1.0, 1.0]]
    """
    for i, row in enumerate(rows):
        for name in names:
            if name not in row:
                raise KeyError(f"layer_features: row {i} has no {name!r}, got {sorted(row)}")
    return _scaled(np.asarray([[float(row[n]) for n in names] for row in rows]))


def refit(weight: Any, inputs: Any, outputs: Any, kept: Any, *, ridge: float = 0.0) -> Any:
    r"""Returns a matrix refitted to what its layer returned, of the inputs that are kept.

    $$\arg\min_W \lVert Y - X_{kept} W \rVert^2 + \lambda \lVert W \rVert^2$$

    without an intercept: what reads pruned channels is brought as near as it gets to what it
    returned before. Rows of channels that are not kept are zero. A convolution is a matrix over its
    windows; a layer's bias is to be taken off ``outputs``.

    He et al. 2017, arXiv:1707.06168, the second of its two steps; AMC and NNI do it for linear
    layers and convolutions of one tap.

    Args:
        weight: ``(in, out)``, which gives the shape and dtype.
        inputs: X, of samples, ``(n, in)``, of the model with nothing pruned.
        outputs: Y, ``(n, out)``.
        kept: boolean ``(in,)``.
        ridge: $\lambda$; the least norm is taken of several that fit equally well.

    Raises:
        ValueError: shapes do not agree.

    >>> import jax.numpy as jnp
    >>> x = jnp.array([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])  # the second input repeats the first
    >>> w = jnp.array([[1.0], [2.0]])
    >>> refit(w, x, x @ w, jnp.array([True, False])).round(4).tolist()
    [[3.0], [0.0]]
    """
    shapes = tuple(np.shape(x) for x in (weight, inputs, outputs, kept))
    (m, k), (n, m2), (n2, k2), (m3,) = _ranks(shapes)
    if (m, m, n, k) != (m2, m3, n2, k2):
        raise ValueError(
            "refit: weight (in, out), inputs (n, in), outputs (n, out) and kept (in,) do not "
            f"agree, got {', '.join(map(str, shapes))}"
        )
    w = jnp.asarray(weight)
    x = jnp.asarray(inputs, jnp.float32) * jnp.asarray(kept, jnp.float32)[None, :]
    y = jnp.asarray(outputs, jnp.float32)
    if ridge:
        rows = jnp.sqrt(jnp.float32(ridge)) * jnp.eye(m)
        x, y = jnp.concatenate([x, rows]), jnp.concatenate([y, jnp.zeros((m, k))])
    found = jnp.linalg.lstsq(x, y)[0]
    return jnp.where(jnp.asarray(kept)[:, None], found, 0.0).astype(w.dtype)


def _ranks(shapes: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
    if tuple(map(len, shapes)) != (2, 2, 2, 1):
        raise ValueError(
            "refit: weight, inputs and outputs must have two axes and kept one, got "
            f"{', '.join(map(str, shapes))}"
        )
    return shapes


def _hyper(given: Hyper | Mapping[str, Any] | None) -> Hyper:
    if given is None:
        return Hyper()
    if isinstance(given, Hyper):
        return given
    instance(given, Mapping, "amc: hyper", "a Hyper, or a mapping")
    unknown = [name for name in given if name not in Hyper._fields]
    if unknown:
        raise ValueError(f"amc: hyper has no {unknown[0]!r}; it has {', '.join(Hyper._fields)}")
    return Hyper(**given)


def _order(of: Problem, order: Sequence[str] | None) -> np.ndarray:
    if order is None:
        return np.arange(len(of.names), dtype=np.int32)
    if sorted(map(str, order)) != sorted(of.names):
        raise ValueError(f"amc: order must name every group once, {list(of.names)}, got {order}")
    return np.asarray([of.names.index(name) for name in order], np.int32)


def _lowest(of: Problem, lower: float) -> np.ndarray:
    """Returns the last level of every group at which it keeps at least a fraction."""
    levels = []
    for g, options in enumerate(of.options):
        most = _size(of, g) * (1 - lower) + 1e-9
        levels.append(int(np.searchsorted(options, most, side="right")) - 1)
    return np.asarray(levels, np.int32)


def _size(of: Problem, group: int) -> int:
    if of.config is None:
        return max(int(of.options[group][-1]), 1)
    return of.config.pools[group].size


def _features(of: Problem, ranks: np.ndarray, given: Any) -> np.ndarray:
    if given is not None:
        if not is_array(given) or np.ndim(given) != 2 or len(given) != len(of.names):
            raise ValueError(
                f"amc: features must be ({len(of.names)}, n), a row for each group in order, got "
                f"{shown(given)}"
            )
        return np.asarray(given, np.float64)
    alone = np.diag(of.last)
    saved = of.amounts(0 * of.last)[0] - of.amounts(alone)[:, 0]
    rows = []
    for place, g in enumerate(ranks):
        row = [place, _size(of, g), saved[g]]
        if of.config is not None:
            layers = of.config.pools[g].layers
            shape = (*layers[0].shape, 1, 1)
            weights = sum(int(np.prod(x.shape)) for x in layers)
            row += [len(layers), weights, shape[0], shape[1]]
        rows.append(row)
    return np.asarray(rows, np.float64)


def _scaled(columns: np.ndarray) -> np.ndarray:
    """Returns columns brought to [0, 1]; constant ones stay as they are."""
    low, high = columns.min(0), columns.max(0)
    width = np.where(high > low, high - low, 1.0)
    return np.where(high > low, (columns - low) / width, columns).astype(np.float32)


def _later_shares(of: Problem, ranks: np.ndarray, dense: float) -> np.ndarray:
    """Returns by place in the order what later groups could still save of the first resource."""
    alone = np.diag(of.last)
    saved = (of.amounts(0 * of.last)[0] - of.amounts(alone)[:, 0])[ranks] / dense
    return np.asarray([saved[i + 1 :].sum() for i in range(len(saved))], np.float32)


def _counting(of: Problem, name: str) -> Problem:
    return dataclasses.replace(of, budgets={name: 1})


def _levels_of(of: Problem, counts: Any, longest: int) -> Any:
    """Returns the levels of counts, traceable."""
    padded = [np.pad(o, (0, longest - len(o)), constant_values=2**31 - 1) for o in of.options]
    below = jnp.asarray(np.stack(padded).astype(np.int32)) < counts[:, None]
    return jnp.sum(below, axis=1).astype(jnp.int32)
