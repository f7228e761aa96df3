"""NetAdapt: one group after another, by what a little fine-tuning makes of each."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from purepruning.arguments import fraction, one_of, shown
from purepruning.arrays import is_array
from purepruning.search.problem import Problem, check_problem, check_reachable, smallest_level
from purepruning.search.shape import (
    Common,
    Move,
    OptimizeMode,
    Search,
    make_search,
    winner,
)

#: How often the reduction of an iteration is halved where no group alone can reach it.
MOST_HALVINGS = 24

#: Added to a change of the score, and relative to the whole to one of the resource, as in the
#: authors' code, so that a candidate that loses nothing is compared by its resource.
LEAST_LOSS, LEAST_SAVING = 1e-6, 1e-9


class NetAdaptState(NamedTuple):
    """Where the search stands: a pytree of arrays.

    Attributes:
        common: what every search has; ``common.taken`` is the group that was pruned last.
        levels: the present plan, int32 ``(groups,)``, as levels.
        proposed: those of the candidates, ``(groups, groups)``: row i prunes group i further.
        iteration: how many candidates were taken.
        score: the score of the present plan; NaN before the first.
    """

    common: Common
    levels: Any
    proposed: Any
    iteration: Any
    score: Any


def netadapt(
    problem: Problem,
    *,
    step: float = 0.025,
    decay: float = 0.96,
    by: Literal["score", "ratio"] = "score",
    initial_score: float | None = None,
    optimize_mode: OptimizeMode = "maximize",
) -> Search:
    r"""Returns NetAdapt: in every iteration the group that can best spare what is to go.

    Iteration i asks every budgeted resource to fall by $\Delta_i = \Delta_0\, d^{\,i-1}$, from what
    the present plan really leaves, or to the budget, if that is nearer:

    $$R_j(\text{plan}_i) \le \max(R_j(\text{plan}_{i-1}) - \Delta_{i,j},\, B_j).$$

    A batch has one candidate for each group: the present plan with the fewest further units of that
    group that meet this, at least one. The caller fine-tunes each for a short time, from
    ``trial.payload``, and returns the parameters as the payload; :func:`run_search` keeps those of
    the winner, which is the candidate of the highest score (the paper), or of the least loss of
    score per saved resource (the authors' code); of equal ones the first. Long fine-tuning, once
    the budget is met, is the caller's.

    Where no group alone can spare $\Delta_i$, it is halved until one can. No candidate equals the
    present plan, so that every iteration prunes, and the search ends within the budget, by at most
    one level of the group that was pruned last.

    Yang et al. 2018, arXiv:1804.03230. The defaults of ``step`` and ``decay`` are those of the
    authors' code; NNI's are 0.05 and 1.

    Args:
        problem: groups and budgets.
        step: $\Delta_0$, as a fraction of what there is of each resource before pruning.
        decay: d, in (0, 1].
        by: ``"score"`` or ``"ratio"``.
        initial_score: that of the unpruned model, which the ratio of the first iteration refers
            to; unless given, the best of its candidates takes its place.
        optimize_mode: whether a score is better if it is larger or smaller.

    Raises:
        ValueError, TypeError: an argument is out of range; the steps together do not reach the
            budget, or the plan that prunes most is over one.

    >>> import jax
    >>> import purepruning as pp
    >>> table = [pp.Layer(n, "Linear", n, (10, 20), (1,), (0,)) for n in "ab"]
    >>> config = pp.resolve([{"op_types": ["Linear"]}], table, granularity="output_channel")
    >>> of = pp.search.problem(config, {"weights": 0.75})
    >>> search = netadapt(of, step=0.1, decay=1.0)
    >>> state, plans = search.propose(search.init(jax.random.key(0)))
    >>> plans["a"].tolist(), plans["b"].tolist()  # 4 of 40 units: a candidate for each layer
    ([4, 0], [0, 4])
    """
    of = check_problem("netadapt", problem)
    check_reachable("netadapt", of)
    step = fraction(step, "netadapt: step")
    decay = fraction(decay, "netadapt: decay")
    one_of("netadapt: by", by, ("score", "ratio"))
    if not (step > 0 and decay > 0):
        raise ValueError(f"netadapt: step and decay must be above 0, got {step} and {decay}")
    if initial_score is not None and is_array(initial_score):
        initial_score = float(initial_score)
    if initial_score is not None and not isinstance(initial_score, int | float):
        raise TypeError(f"netadapt: initial_score must be a number, got {shown(initial_score)}")
    n, longest = len(of.names), max(map(len, of.options))
    zero = np.zeros(n, np.int32)
    dense = np.asarray(of.amounts(zero), np.float64)
    limits = np.asarray([of.budgets[name] for name in of.budgets], np.float64)
    _check_steps(step, decay, dense, limits)
    sign = 1.0 if optimize_mode == "maximize" else -1.0
    first = math.nan if initial_score is None else sign * initial_score

    def begin(key: Any) -> tuple[Any, ...]:
        del key
        return (
            jnp.asarray(zero),
            jnp.zeros((n, n), jnp.int32),
            jnp.zeros((), jnp.int32),
            jnp.full((), first, jnp.float32),
        )

    def candidates(levels: Any, target: Any) -> Any:
        def fits(some: Any) -> Any:
            small = of.amounts(some) <= target * (1 + 1e-7)
            return jnp.all(small, axis=-1) | of.within(some)

        def one(group: Any) -> Any:
            return smallest_level(of, levels, group, levels[group] + 1, fits, longest)

        return jax.vmap(one)(jnp.arange(n))

    def plan(state: NetAdaptState) -> tuple[Any, ...]:
        now = of.amounts(state.levels)
        cut = step * dense.astype(np.float32) * decay ** state.iteration.astype(jnp.float32)

        def target(halvings: Any) -> Any:
            return jnp.maximum(now - cut * 0.5 ** halvings.astype(jnp.float32), limits)

        def none(carry: Any) -> Any:
            halvings, found = carry
            return jnp.all(found < 0) & (halvings < MOST_HALVINGS)

        def halve(carry: Any) -> Any:
            halvings = carry[0] + 1
            return halvings, candidates(state.levels, target(halvings))

        start = jnp.full((), -1, jnp.int32), jnp.full(n, -1, jnp.int32)
        _, found = jax.lax.while_loop(none, halve, start)
        # One level more of each, where even the smallest reduction is more than any can spare.
        more = jnp.where(state.levels < of.last, state.levels + 1, -1)
        found = jnp.where(jnp.all(found < 0), more, found)
        rows = jnp.tile(state.levels, (n, 1))
        rows = jnp.where(jnp.eye(n, dtype=bool), jnp.maximum(found, state.levels)[:, None], rows)
        own = state._replace(proposed=rows)[1:]
        return state.common.key, own, of.counts(rows), found >= 0, 0

    def learn(state: NetAdaptState, scores: Any) -> Move:
        worth = scores
        if by == "ratio":
            before = jnp.where(jnp.isnan(state.score), jnp.nanmax(scores), state.score)
            share = of.amounts(state.levels)[0] - of.amounts(state.proposed)[:, 0]
            saved = jnp.maximum(share / np.float32(dense[0]), 0.0) + LEAST_SAVING
            worth = -(before - scores + LEAST_LOSS) / saved
        i, any_ = winner(worth)
        own = (
            jnp.where(any_, state.proposed[i], state.levels),
            state.proposed,
            state.iteration + any_.astype(jnp.int32),
            jnp.where(any_, scores[i], state.score),
        )
        best = jnp.where(any_, state.common.plans[i], state.common.best)
        return Move(own, jnp.where(any_, i, -1), best, own[-1])

    def done(state: NetAdaptState) -> Any:
        return of.within(state.levels) | jnp.all(state.levels == of.last)

    return make_search(
        "netadapt",
        of.names,
        NetAdaptState,
        candidates=n,
        start=begin,
        plan=plan,
        learn=learn,
        done=done,
        optimize_mode=optimize_mode,
    )


def _check_steps(step: float, decay: float, dense: np.ndarray, limits: np.ndarray) -> None:
    """Raises ValueError if all iterations together remove less than the budgets ask for."""
    if decay == 1:
        return
    reach = step / (1 - decay)
    wanted = float((1 - limits / dense).max())
    if reach < wanted:
        raise ValueError(
            f"netadapt: with step {step:g} and decay {decay:g} all iterations together remove "
            f"{reach:.3g} of a resource, and the budget asks for {wanted:.3g}; give a larger step, "
            "or decay=1.0"
        )
