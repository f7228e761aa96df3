"""How the score falls as each group alone is pruned, and NNI's way to prune by that."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from purepruning.arguments import collection, fraction, instance, scalar
from purepruning.counts import count_of
from purepruning.search.problem import Problem, check_problem, check_reachable
from purepruning.search.shape import (
    Common,
    Move,
    OptimizeMode,
    Search,
    best_of,
    make_search,
)

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

#: The most of what a group has left that NNI prunes in one iteration.
MOST_PER_ITERATION = 0.95


class SensitivityState(NamedTuple):
    """What was measured so far: a pytree of arrays.

    Attributes:
        common: what every search has.
        ratio: index of the ratio that is proposed next; -1 for the unpruned model.
        base: the score of the unpruned model.
        scores: by group and ratio, NaN where not measured.
        active: which groups go on.
    """

    common: Common
    ratio: Any
    base: Any
    scores: Any
    active: Any


class Curves(NamedTuple):
    """The score against how much of a single group is pruned.

    Attributes:
        names: of the groups.
        ratios: fractions of a group's units.
        counts: how many units that is, int ``(groups, ratios)``.
        scores: as they are maximised, NaN where not measured, ``(groups, ratios)``.
        base: the score with nothing pruned.
    """

    names: tuple[str, ...]
    ratios: tuple[float, ...]
    counts: np.ndarray
    scores: np.ndarray
    base: float

    def errors(self, problem: Problem) -> dict[str, np.ndarray]:
        """Returns what each option of each group loses of the score, for :func:`allocate`.

        Between ratios it is interpolated; it never falls as more is pruned. Beyond the last ratio
        the last rise goes on; but where a curve was given up early, or an evaluation failed, what
        lies beyond is inf.
        """
        of = check_problem("errors", problem)
        found = {}
        for i, (name, options) in enumerate(zip(of.names, of.options, strict=True)):
            known = ~np.isnan(self.scores[i])
            failed = int(np.argmin(known)) if not known.all() else len(known)
            x = np.concatenate([[0], self.counts[i, :failed]]).astype(np.float64)
            y = np.concatenate([[0.0], self.base - self.scores[i, :failed]])
            y = np.maximum.accumulate(np.maximum(y, 0.0))
            row = np.interp(options, x, y)
            beyond = options > x[-1]
            if failed < len(known):
                row[beyond] = np.inf
            elif len(x) > 1 and x[-1] > x[-2]:
                row[beyond] += (options[beyond] - x[-1]) * (y[-1] - y[-2]) / (x[-1] - x[-2])
            found[name] = row
        return found

    def to_csv(self) -> str:
        """Returns the table as NNI writes it: a row per layer, short where it was given up."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["layername", *self.ratios])
        for name, row in zip(self.names, self.scores.tolist(), strict=True):
            writer.writerow([name, *(s for s in row if s == s)])
        return text.getvalue()

    def draw(self, *, ax: Any = None) -> Any:
        """Returns a matplotlib ``Axes`` with a line for every group. Needs matplotlib."""
        import matplotlib.pyplot as plt

        if ax is None:
            _, ax = plt.subplots()
        for name, row in zip(self.names, self.scores, strict=True):
            ax.plot([0.0, *self.ratios], [self.base, *row], marker="o", label=name)
        ax.set_xlabel("fraction of the group pruned")
        ax.set_ylabel("score")
        ax.legend()
        return ax

    def __str__(self) -> str:
        wide = max(map(len, ("group", *self.names)))
        head = "".join(f"{r:>10.2g}" for r in self.ratios)
        rows = [
            name.ljust(wide) + "".join("         -" if s != s else f"{s:10.4f}" for s in row)
            for name, row in zip(self.names, self.scores.tolist(), strict=True)
        ]
        return "\n".join(["group".ljust(wide) + head, *rows, f"unpruned: {self.base:.4f}"])


def sensitivity(
    problem: Problem,
    *,
    ratios: Sequence[float] = RATIOS,
    threshold: float | None = None,
    optimize_mode: OptimizeMode = "maximize",
) -> Search:
    """Returns the search that measures the curves of all groups, ratio by ratio.

    Its first batch is the unpruned model; then every batch prunes one group alone in each of its
    plans, by the largest option that is not above the ratio. Groups are those of the problem:
    layers of any kind that the rules select, or coupled families. A group of which the ratio prunes
    nothing more than the one before is not evaluated again. :func:`curves` returns what was found.

    Li et al. 2017, arXiv:1608.08710, section 3.2; Han et al. 2015, arXiv:1506.02626.

    Args:
        problem: groups and their options.
        ratios: ascending fractions.
        threshold: a group is given up once its score is below the unpruned one by more.
        optimize_mode: whether a score is better if it is larger or smaller.

    Raises:
        ValueError, TypeError: ratios are no ascending fractions; an argument is out of range.

    >>> import jax
    >>> import purepruning as pp
    >>> table = [pp.Layer(n, "Linear", n, (10, 20), (1,), (0,)) for n in "ab"]
    >>> config = pp.resolve([{"op_types": ["Linear"]}], table, granularity="output_channel")
    >>> of = pp.search.problem(config, {"weights": 0.5})
    >>> search = sensitivity(of, ratios=(0.25, 0.5))
    >>> score = lambda trial: 1 - 0.01 * trial.counts["a"] - 0.02 * trial.counts["b"]
    >>> run = pp.search.run_search(search, search.init(jax.random.key(0)), score)
    >>> print(curves(of, run.state, ratios=(0.25, 0.5)).to_csv().replace("0000", ""), end="")
    layername,0.25,0.5
    a,0.94...,0.89...
    b,0.89...,0.80...
    """
    of = check_problem("sensitivity", problem)
    some = _ratios(ratios)
    levels = _levels(of, some)
    plain = np.asarray([[o[i] for i in row] for o, row in zip(of.options, levels, strict=True)])
    n = len(of.names)
    limit = np.inf if threshold is None else scalar(threshold, "sensitivity: threshold")

    def begin(key: Any) -> tuple[Any, ...]:
        del key
        return (
            jnp.full((), -1, jnp.int32),
            jnp.full((), jnp.nan, jnp.float32),
            jnp.full((n, len(some)), jnp.nan, jnp.float32),
            jnp.ones(n, bool),
        )

    def before(ratio: Any) -> Any:
        """What was pruned of each group by the last batch."""
        rows = np.concatenate([np.zeros((n, 1)), plain], 1).astype(np.int32)
        return jnp.asarray(rows)[:, ratio]

    def plan(state: SensitivityState) -> tuple[Any, ...]:
        ratio = jnp.maximum(state.ratio, 0)
        counts = jnp.asarray(plain.astype(np.int32))[:, ratio]
        first = state.ratio < 0
        rows = jnp.where(first, 0, jnp.diag(counts))
        feasible = jnp.where(first, jnp.arange(n) == 0, state.active & (counts > before(ratio)))
        return state.common.key, state[1:], rows, feasible, 0

    def learn(state: SensitivityState, scores: Any) -> Move:
        first = state.ratio < 0
        ratio = jnp.maximum(state.ratio, 0)
        base = jnp.where(first, scores[0], state.base)
        last = jnp.where(ratio > 0, state.scores[:, ratio - 1], base)
        same = state.active & ~state.common.feasible
        column = jnp.where(same, last, jnp.where(state.active, scores, jnp.nan))
        active = state.active & ~(column < base - limit)
        own = (
            state.ratio + 1,
            base,
            jnp.where(first, state.scores, state.scores.at[:, ratio].set(column)),
            jnp.where(first, state.active, active),
        )
        # Without a score to compare with, the unpruned model is measured again.
        failed = first & jnp.isnan(base)
        own = (jnp.where(failed, state.ratio, own[0]), *own[1:])
        return Move(own, -1, *best_of(state.common, scores))

    def done(state: SensitivityState) -> Any:
        return (state.ratio >= len(some)) | ~jnp.any(state.active)

    return make_search(
        "sensitivity",
        of.names,
        SensitivityState,
        candidates=n,
        start=begin,
        plan=plan,
        learn=learn,
        done=done,
        optimize_mode=optimize_mode,
    )


def curves(
    problem: Problem, state: SensitivityState, *, ratios: Sequence[float] = RATIOS
) -> Curves:
    """Returns the curves that a search by :func:`sensitivity` has measured.

    Args:
        problem: as it was given to the search.
        state: of the search, done or not.
        ratios: as they were given to the search.

    Raises:
        ValueError, TypeError: the state is of another search.
    """
    of = check_problem("curves", problem)
    instance(state, SensitivityState, "curves: state", "the state of a search by sensitivity")
    some = _ratios(ratios)
    scores = np.asarray(state.scores, np.float64)
    if scores.shape != (len(of.names), len(some)):
        raise ValueError(
            f"curves: the state has scores of {scores.shape} groups and ratios, expected "
            f"{(len(of.names), len(some))}; give the problem and ratios of its search"
        )
    levels = _levels(of, some)
    counts = np.asarray([[o[i] for i in row] for o, row in zip(of.options, levels, strict=True)])
    return Curves(of.names, some, counts, scores, float(state.base))


class PruningState(NamedTuple):
    """Where NNI's sensitivity pruner stands: a pytree of arrays.

    Attributes:
        common: what every search has; in stage 1 a plan is to be fine-tuned as well.
        phase: -1 measures the unpruned model; 0, 1, ... a ratio; then what was decided.
        reference: the score that losses are measured from: that of the present plan.
        pruned: what of each group is pruned, as NNI counts it, float32 ``(groups,)``.
        wanted: the same of the plan that was decided on.
        ratio: by group the largest ratio so far that was tried.
        active: which groups go on in this iteration.
    """

    common: Common
    phase: Any
    reference: Any
    pruned: Any
    wanted: Any
    ratio: Any
    active: Any


def sensitivity_pruning(
    problem: Problem,
    *,
    per_iteration: float = 0.1,
    threshold: float = 0.05,
    ratios: Sequence[float] = RATIOS,
    optimize_mode: OptimizeMode = "maximize",
) -> Search:
    r"""Returns NNI's sensitivity pruner: curves, a part of the way by them, and again.

    Every iteration measures how the score falls as each group alone loses a ratio of what it has
    left. A group's $r_l$ is the first ratio that loses more than ``threshold`` of the score of the
    present plan, or the last one; then, with $w_l$ weights and $p_l$ pruned,

    $$r_l \leftarrow r_l \frac{t \sum_l w_l}{\sum_l r_l w_l (1 - p_l)}, \qquad
    p_l \leftarrow p_l + (1 - p_l)\, r_l,$$

    all $r_l$ scaled down if one exceeds 0.95. The new plan is proposed in stage 1, where the caller
    may fine-tune, and becomes the present one whatever it scores. It ends once the budget is met by
    what a plan really leaves; NNI stops by the nominal $p_l$. The allowed loss is one of every
    iteration, and adds up. :func:`allocate` on the curves of :func:`sensitivity` is the better
    choice for the same evaluations.

    NNI 1.5 to 2.10's sensitivity pruner, whose arguments are ``sparsity_per_iter`` and
    ``acc_drop_threshold``.

    Args:
        problem: groups and budgets; $w_l$ are the weights that its layers have.
        per_iteration: t, the part of all weights that goes in an iteration.
        threshold: the loss of score that ends a curve.
        ratios: ascending fractions of what is left.
        optimize_mode: whether a score is better if it is larger or smaller.

    Raises:
        ValueError, TypeError: as :func:`sensitivity`; the problem has no config; the plan that
            prunes most is over a budget.
    """
    of = check_problem("sensitivity_pruning", problem)
    if of.config is None:
        raise ValueError("sensitivity_pruning needs a problem made of a config")
    check_reachable("sensitivity_pruning", of)
    some = np.asarray(_ratios(ratios), np.float32)
    share = fraction(per_iteration, "sensitivity_pruning: per_iteration")
    limit = scalar(threshold, "sensitivity_pruning: threshold")
    if not share > 0:
        raise ValueError("sensitivity_pruning: per_iteration must be above 0, got 0")
    n, last = len(of.names), len(some)
    weights = np.asarray(
        [sum(int(np.prod(x.shape)) for x in pool.layers) for pool in of.config.pools], np.float32
    )
    sizes = np.asarray([pool.size for pool in of.config.pools], np.float32)
    longest = max(map(len, of.options))
    options = [np.pad(o, (0, longest - len(o)), mode="edge") for o in of.options]
    table = np.stack(options).astype(np.float32)

    def counts_at(shares: Any) -> Any:
        return of.counts(levels_at(shares))

    def levels_at(shares: Any) -> Any:
        """The largest levels that shares of the units allow."""
        wanted = shares * sizes + 1e-4
        level = jnp.sum(jnp.asarray(table) <= wanted[:, None], axis=1) - 1
        return jnp.minimum(level.astype(jnp.int32), of.last)

    def begin(key: Any) -> tuple[Any, ...]:
        del key
        zero = jnp.zeros(n, jnp.float32)
        start = jnp.full((), -1, jnp.int32), jnp.full((), jnp.nan, jnp.float32)
        return (*start, zero, zero, zero, jnp.ones(n, bool))

    def plan(state: PruningState) -> tuple[Any, ...]:
        now = counts_at(state.pruned)
        s = jnp.asarray(some)[jnp.clip(state.phase, 0, last - 1)]
        tried = counts_at(state.pruned + (1 - state.pruned) * s)
        rows = jnp.where(jnp.eye(n, dtype=bool), tried[None], jnp.tile(now, (n, 1)))
        single = (state.phase < 0) | (state.phase >= last)
        target = jnp.where(state.phase < 0, now, counts_at(state.wanted))
        rows = jnp.where(single, jnp.tile(target, (n, 1)), rows)
        first = jnp.arange(n) == 0
        new = (state.phase < 0) | jnp.any(target != now)
        feasible = jnp.where(single, first & new, state.active & (tried != now))
        return state.common.key, state[1:], rows, feasible, state.phase >= last

    def learn(state: PruningState, scores: Any) -> Move:
        s = jnp.asarray(some)[jnp.clip(state.phase, 0, last - 1)]
        analysis = (state.phase >= 0) & (state.phase < last)
        decided = state.phase >= last
        # A ratio that prunes no unit more scores what the present plan does.
        column = jnp.where(state.common.feasible, scores, state.reference)
        ratio = jnp.where(analysis & state.active, s, state.ratio)
        bad = jnp.isnan(column) | (column < state.reference - limit)
        active = jnp.where(analysis, state.active & ~bad, jnp.ones(n, bool))
        ended = analysis & ((state.phase == last - 1) | ~jnp.any(active))
        total = jnp.sum(ratio * weights * (1 - state.pruned))
        scaled = ratio * (share * float(weights.sum()) / jnp.maximum(total, 1e-30))
        top = jnp.max(scaled)
        scaled = scaled * jnp.where(top > MOST_PER_ITERATION, MOST_PER_ITERATION / top, 1.0)
        wanted = state.pruned + (1 - state.pruned) * scaled
        phase = jnp.where(ended, last, state.phase + 1)
        own = (
            jnp.where(decided, 0, phase),
            jnp.where(state.common.feasible[0] & ~analysis, scores[0], state.reference),
            jnp.where(decided, state.wanted, state.pruned),
            jnp.where(ended, wanted, state.wanted),
            jnp.where(decided, jnp.zeros(n), ratio),
            jnp.where(ended, jnp.ones(n, bool), active),
        )
        # A plan that failed is not gone on from: it is evaluated again.
        failed = ~analysis & state.common.feasible[0] & jnp.isnan(scores[0])
        kept = [jnp.where(failed, old, new) for old, new in zip(state[1:], own, strict=True)]
        moved = decided & state.common.feasible[0] & ~failed
        common = state.common
        return Move(
            tuple(kept),
            jnp.where(moved, 0, -1),
            jnp.where(moved, common.plans[0], common.best),
            jnp.where(moved, scores[0], common.best_score),
        )

    def done(state: PruningState) -> Any:
        levels = levels_at(state.pruned)
        return of.within(levels) | jnp.all(levels == of.last)

    return make_search(
        "sensitivity_pruning",
        of.names,
        PruningState,
        candidates=n,
        start=begin,
        plan=plan,
        learn=learn,
        done=done,
        optimize_mode=optimize_mode,
    )


def _ratios(ratios: Sequence[float]) -> tuple[float, ...]:
    some = collection(ratios, "sensitivity: ratios", "fractions such as (0.1, 0.2)")
    found = tuple(fraction(r, "sensitivity: ratios") for r in some)
    if not found or list(found) != sorted(set(found)) or found[0] == 0:
        raise ValueError(f"sensitivity: ratios must ascend from above 0, got {list(found)}")
    return found


def _levels(of: Problem, ratios: tuple[float, ...]) -> np.ndarray:
    """Returns the largest levels that ratios of the units allow, ``(groups, ratios)``."""
    rows = []
    for i, options in enumerate(of.options):
        size = int(options[-1]) if of.config is None else of.config.pools[i].size
        counts = [count_of(r, size) for r in ratios]
        rows.append(np.searchsorted(options, counts, side="right") - 1)
    return np.stack(rows).astype(np.int32)
