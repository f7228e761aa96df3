"""Evolution of plans at equal cost, with cheap evaluations for many and dear ones for few."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from purepruning.arguments import collection, flag, whole_number
from purepruning.search.problem import Problem, check_problem, fit, give_back, smallest_level
from purepruning.search.shape import (
    Common,
    Move,
    OptimizeMode,
    Search,
    make_search,
    winner,
)


class EvolutionState(NamedTuple):
    """The parent and its offspring: a pytree of arrays.

    Attributes:
        common: what every search has.
        stage: the stage that comes next, from 0.
        generation: how many generations are over.
        levels: the parent, int32 ``(groups,)``, as levels.
        score: its score in the last stage; NaN before it was evaluated.
        rows: the levels of the offspring and, last, the parent, ``(offspring + 1, groups)``.
        alive: which of them are still in this generation.
    """

    common: Common
    stage: Any
    generation: Any
    levels: Any
    score: Any
    rows: Any
    alive: Any


def evolution(
    problem: Problem,
    *,
    generations: int = 100,
    offspring: int = 16,
    survivors: Sequence[int] = (),
    max_flips: int = 3,
    start: Mapping[str, int] | None = None,
    fresh: bool = False,
    optimize_mode: OptimizeMode = "maximize",
) -> Search:
    r"""Returns EvoPress: one parent, offspring that swap levels, and halving over fidelity.

    An offspring is the parent after $\min(u, u')$ swaps, both uniform in 1, ..., ``max_flips``. A
    swap lets one random group prune a level less, and then another prune as many levels more as the
    budgets need; at last all take back what the budgets allow. Where all steps cost the same, that
    is one level less and one level more. All offspring are within the budgets; those equal to the
    parent or to one before are not evaluated.

    In stage 0 all offspring are evaluated, the best ``survivors[0]`` of them again in stage 1, and
    so on; ``state.common.stage`` and ``trial.stage`` say how much is to be spent. The best of the
    last stage becomes the parent if it is better.

    What is dropped may be whole blocks: see :func:`choices`, with a budget for each type of block.

    Sieberling et al. 2024, arXiv:2410.14649.

    Args:
        problem: groups and budgets, of monotone resources.
        generations: after so many the search is done.
        offspring: how many plans a generation begins with.
        survivors: how many go on to each further stage, descending.
        max_flips: the most swaps.
        start: the first parent, as counts by group name; unless given, all groups lose about the
            same fraction.
        fresh: whether the parent is evaluated again in every last stage, as in the paper, where
            each stage draws new data; else its score is remembered.
        optimize_mode: whether a score is better if it is larger or smaller.

    Raises:
        ValueError, TypeError: an argument is out of range; ``start`` is over a budget; more pruning
            may cost more.

    >>> import jax
    >>> import purepruning as pp
    >>> blocks = {f"block{i}": [1, 0] for i in range(6)}
    >>> depth = pp.search.choices({"blocks": blocks}, {"blocks": 4})
    >>> search = evolution(depth, generations=20, offspring=4, start={**dict.fromkeys(blocks, 0),
    ...     "block0": 1, "block1": 1})
    >>> score = lambda trial: sum(i * c for i, c in enumerate(trial.counts.values()))
    >>> run = pp.search.run_search(search, search.init(jax.random.key(0)), score, problem=depth)
    >>> [name for name, dropped in run.best.items() if dropped]
    ['block4', 'block5']
    """
    of = check_problem("evolution", problem)
    whole_number(generations, "evolution: generations", 1, 2**31 - 1)
    whole_number(offspring, "evolution: offspring", 1, 2**20)
    whole_number(max_flips, "evolution: max_flips", 1, 1000)
    flag(fresh, "evolution: fresh")
    kept = tuple(collection(survivors, "evolution: survivors", "numbers such as (8, 2)"))
    for k in kept:
        whole_number(k, "evolution: survivors", 1, offspring)
    if list(kept) != sorted(kept, reverse=True):
        raise ValueError(f"evolution: survivors must descend, got {list(kept)}")
    if not of.monotone:
        raise ValueError("evolution: more pruning may cost more here, so that swaps have no order")
    parent = _parent(of, start)
    n, longest, last_stage = len(of.names), max(map(len, of.options)), len(kept)
    lasts = of.last

    def begin(key: Any) -> tuple[Any, ...]:
        del key
        zero = jnp.zeros((), jnp.int32)
        return (
            zero,
            zero,
            jnp.asarray(parent),
            jnp.full((), jnp.nan, jnp.float32),
            jnp.tile(jnp.asarray(parent), (offspring + 1, 1)),
            jnp.zeros(offspring + 1, bool),
        )

    def swap(levels: Any, key: Any) -> Any:
        down_key, up_key = jax.random.split(key)
        chances = jnp.where(levels > 0, 0.0, -jnp.inf)
        down = jax.random.categorical(down_key, chances)
        lower = levels.at[down].add(jnp.where(levels[down] > 0, -1, 0))

        def raise_one(levels: Any, group: Any) -> tuple[Any, None]:
            least = smallest_level(of, levels, group, levels[group], of.within, longest)
            # A group that cannot make up for it all gives what it has.
            target = jnp.where(least < 0, jnp.asarray(lasts)[group], least)
            return levels.at[group].set(jnp.where(group == down, levels[group], target)), None

        order = jax.random.permutation(up_key, n)
        raised, _ = jax.lax.scan(raise_one, lower, order)
        return jnp.where(of.within(raised), raised, levels)

    def child(levels: Any, key: Any) -> Any:
        number_key, flips_key, order_key = jax.random.split(key, 3)
        flips = jnp.min(jax.random.randint(number_key, (2,), 1, max_flips + 1))

        def once(i: Any, levels: Any) -> Any:
            return jnp.where(i < flips, swap(levels, jax.random.fold_in(flips_key, i)), levels)

        levels = jax.lax.fori_loop(0, max_flips, once, levels)
        return give_back(of, levels, jax.random.permutation(order_key, n))

    def breed(state: EvolutionState) -> tuple[Any, Any, Any]:
        key, once = jax.random.split(state.common.key)
        keys = jax.random.split(once, offspring)
        children = jax.vmap(child, in_axes=(None, 0))(state.levels, keys)
        rows = jnp.concatenate([children, state.levels[None]])
        same = jnp.all(rows[:, None] == rows[None], axis=-1)
        earlier = jnp.any(same & (np.tri(offspring + 1, k=-1) > 0), axis=1)
        new = ~earlier & ~same[:, -1]
        return key, rows, new

    def plan(state: EvolutionState) -> tuple[Any, ...]:
        key, rows, alive = jax.lax.cond(
            state.stage == 0, breed, lambda s: (s.common.key, s.rows, s.alive), state
        )
        joins = fresh | jnp.isnan(state.score)
        feasible = alive.at[-1].set((state.stage == last_stage) & joins)
        own = state._replace(rows=rows, alive=alive)[1:]
        return key, own, of.counts(rows), feasible, state.stage

    def learn(state: EvolutionState, scores: Any) -> Move:
        common = state.common
        ranks = jnp.argsort(jnp.argsort(jnp.where(jnp.isnan(scores), jnp.inf, -scores)))
        keep = jnp.asarray(np.asarray([*kept, 0], np.int32))[state.stage]
        alive = (ranks < keep) & ~jnp.isnan(scores)
        last = (state.stage == last_stage) | ~jnp.any(alive)
        final = state.stage == last_stage
        known = jnp.where(jnp.isnan(scores[-1]), state.score, scores[-1])
        all_scores = jnp.where(final, scores.at[-1].set(known), jnp.nan)
        i, any_ = winner(all_scores)
        better = any_ & ~(all_scores[i] <= known)
        levels = jnp.where(better, state.rows[i], state.levels)
        score = jnp.where(better, all_scores[i], jnp.where(final, known, state.score))
        own = (
            jnp.where(last, 0, state.stage + 1),
            state.generation + last.astype(jnp.int32),
            levels,
            score,
            state.rows,
            alive & ~last,
        )
        best = jnp.where(better, common.plans[i], of.counts(state.levels))
        return Move(own, jnp.where(better, i, -1), best, score)

    def done(state: EvolutionState) -> Any:
        return state.generation >= generations

    return make_search(
        "evolution",
        of.names,
        EvolutionState,
        candidates=offspring + 1,
        start=begin,
        plan=plan,
        learn=learn,
        done=done,
        unpruned=of.counts(parent),
        optimize_mode=optimize_mode,
    )


def _parent(of: Problem, start: Mapping[str, int] | None) -> np.ndarray:
    if start is None:
        return np.asarray(fit(of, np.ones(len(of.names), np.float32)))
    levels = of.levels(start)
    if not bool(of.within(levels)):
        raise ValueError(
            f"evolution: start leaves {of.measure(start)}, over the budgets {of.limits}; "
            "give a plan within them"
        )
    return levels
