"""The shape of every search: pure functions over a state that is a pytree of arrays and a key."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from purepruning.arguments import instance, one_of, shown
from purepruning.arrays import is_array, is_torch

OptimizeMode = Literal["maximize", "minimize"]


class Search(NamedTuple):
    """A search for how much each group loses: pure functions, all traceable.

    A plan gives every group (a pool of a config) an integer count. A search proposes one plan,
    whose counts are scalars, or several at once, along a leading axis of fixed length; a slot of it
    without a plan is False in ``state.common.feasible``, and its score is not looked at.

    Scores are maximised, by index. A NaN is a failed evaluation, and never wins. If all of a batch
    failed, ``state.common.failed`` is True, and the search proposes the next batch from where it
    stands. A state that is done stays as it is.

    Attributes:
        init: ``(key) -> state``.
        propose: ``(state) -> (state, plans)``: counts by group name, int32, for
            :meth:`purepruning.Config.with_counts`.
        accept: ``(state, scores) -> state``, with the scores of what was proposed.
        best: ``(state) -> plan``: the plan the search has found.
        done: ``(state) -> bool``.
    """

    init: Callable[[Any], Any]
    propose: Callable[[Any], tuple[Any, dict[str, Any]]]
    accept: Callable[[Any, Any], Any]
    best: Callable[[Any], dict[str, Any]]
    done: Callable[[Any], Any]


class Common(NamedTuple):
    """What the states of all searches have.

    Attributes:
        key: random key, typed.
        plans: what was proposed last, ``(candidates, groups)``: counts.
        feasible: which of them are to be evaluated, ``(candidates,)``.
        stage: how much is to be spent on each, from 0.
        evaluated: number of scores that were looked at.
        best: the plan the search has found, ``(groups,)``.
        best_score: its score, as it is maximised; NaN before the first.
        taken: the index of the candidate that the last ``accept`` moved to; -1 if none.
        failed: whether all evaluations of the last batch failed.
    """

    key: Any
    plans: Any
    feasible: Any
    stage: Any
    evaluated: Any
    best: Any
    best_score: Any
    taken: Any
    failed: Any


class Move(NamedTuple):
    """What a search makes of scores: its own state, and what becomes of the best.

    Attributes:
        own: the new state besides what is common.
        taken: index of the candidate that it moved to, or -1.
        best, best_score: the best plan's counts and score.
    """

    own: Any
    taken: Any
    best: Any
    best_score: Any


def make_search(
    where: str,
    names: tuple[str, ...],
    state_type: type,
    *,
    candidates: int,
    start: Callable[[Any], Any],
    plan: Callable[[Any], tuple[Any, Any, Any, Any, Any]],
    learn: Callable[[Any, Any], Move],
    done: Callable[[Any], Any],
    unpruned: Any = 0,
    optimize_mode: OptimizeMode = "maximize",
) -> Search:
    """Returns the search that consists of these parts, which see only arrays.

    Args:
        where: the function's name, for messages.
        names: names of the groups.
        state_type: a NamedTuple whose first field is ``common``, a :class:`Common`.
        candidates: how many plans a batch has.
        start: ``(key) -> own``: the other fields, in order.
        plan: ``(state) -> (key, own, counts, feasible, stage)``.
        learn: ``(state, scores) -> Move``; scores are ``(candidates,)``, NaN where not feasible.
        done: ``(state) -> bool``.
        unpruned: the best plan before the first score.
        optimize_mode: ``"minimize"`` negates scores, here and nowhere else.

    Raises:
        ValueError: ``optimize_mode`` is neither.
    """
    one_of(f"{where}: optimize_mode", optimize_mode, ("maximize", "minimize"))
    sign = 1.0 if optimize_mode == "maximize" else -1.0

    @jax.jit
    def begin(key: Any) -> Any:
        zero = jnp.zeros((), jnp.int32)
        plans = jnp.zeros((candidates, len(names)), jnp.int32)
        common = Common(
            key,
            plans,
            jnp.zeros(candidates, bool),
            zero,
            zero,
            jnp.broadcast_to(jnp.asarray(unpruned, jnp.int32), (len(names),)),
            jnp.full((), jnp.nan, jnp.float32),
            zero - 1,
            jnp.zeros((), bool),
        )
        return state_type(common, *start(key))

    @jax.jit
    def proposed(state: Any) -> Any:
        key, own, plans, feasible, stage = plan(state)
        common = state.common._replace(
            key=key, plans=plans, feasible=feasible, stage=jnp.asarray(stage, jnp.int32)
        )
        return where_all(done(state), state, state_type(common, *own))

    @jax.jit
    def accepted(state: Any, scores: Any) -> Any:
        common = state.common
        scores = sign * jnp.asarray(scores, jnp.float32).reshape(candidates)
        scores = jnp.where(common.feasible, scores, jnp.nan)
        own, taken, best, best_score = learn(state, scores)
        new = common._replace(
            evaluated=common.evaluated + jnp.sum(common.feasible, dtype=jnp.int32),
            best=best,
            best_score=best_score,
            taken=jnp.asarray(taken, jnp.int32),
            failed=jnp.any(common.feasible) & jnp.all(jnp.isnan(scores)),
        )
        return where_all(done(state), state, state_type(new, *own))

    template = jax.eval_shape(begin, jax.random.key(0))

    def init(key: Any) -> Any:
        _check_key(f"{where}: key", key)
        return begin(key)

    def propose(state: Any) -> tuple[Any, dict[str, Any]]:
        _check_state(f"{where}: propose", state, template)
        state = proposed(state)
        plans = state.common.plans if candidates > 1 else state.common.plans[0]
        return state, named(names, plans)

    def accept(state: Any, scores: Any) -> Any:
        _check_state(f"{where}: accept", state, template)
        _check_scores(f"{where}: accept: scores", scores, candidates)
        return accepted(state, _as_floats(scores))

    def best(state: Any) -> dict[str, Any]:
        _check_state(f"{where}: best", state, template)
        return named(names, state.common.best)

    def is_done(state: Any) -> Any:
        _check_state(f"{where}: done", state, template)
        return done(state)

    return Search(init, propose, accept, best, is_done)


def named(names: tuple[str, ...], counts: Any) -> dict[str, Any]:
    """Returns counts by name; groups lie along the last axis."""
    return {name: counts[..., i] for i, name in enumerate(names)}


def where_all(condition: Any, yes: Any, no: Any) -> Any:
    """Returns one of two states."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def winner(scores: Any) -> tuple[Any, Any]:
    """Returns the index of the largest score, the first of equal ones, and whether there is one."""
    known = ~jnp.isnan(scores)
    return jnp.argmax(jnp.where(known, scores, -jnp.inf)), jnp.any(known)


def best_of(common: Common, scores: Any) -> tuple[Any, Any]:
    """Returns the best plan and its score once these scores are known; equal ones keep the old."""
    i, any_ = winner(scores)
    better = any_ & (jnp.isnan(common.best_score) | (scores[i] > common.best_score))
    return (
        jnp.where(better, common.plans[i], common.best),
        jnp.where(better, scores[i], common.best_score),
    )


def _check_state(where: str, state: Any, template: Any) -> None:
    """Raises for what is no state of this search, as ``init`` returns it."""
    instance(state, type(template), f"{where}: state", "what init of this search returned")
    wanted = jax.tree_util.tree_leaves_with_path(template)
    given = jax.tree_util.tree_leaves_with_path(state)
    if [path for path, _ in given] != [path for path, _ in wanted]:
        raise TypeError(f"{where}: state must be what init of this search returned, got another")
    for (path, like), (_, x) in zip(wanted, given, strict=True):
        name = f"{where}: state{jax.tree_util.keystr(path)}"
        if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
            _check_key(name, x)
            continue
        if is_torch(x) or not is_array(x) or x.dtype != like.dtype:
            raise TypeError(f"{name} must be an array of {like.dtype} numbers, got {shown(x)}")
        if x.shape != like.shape:
            raise ValueError(
                f"{name} must have shape {like.shape}, got {x.shape}; is it of another search? "
                "Map over several states with vmap"
            )


def _as_floats(scores: Any) -> Any:
    """Returns numbers of Python as an array, so that no whole number overflows."""
    return scores if is_array(scores) else np.asarray(scores, np.float32)


def _check_scores(where: str, scores: Any, candidates: int) -> None:
    if is_array(scores):
        numbers = not is_torch(scores) and jnp.isdtype(scores.dtype, ("integral", "real floating"))
    else:
        some = scores if isinstance(scores, list | tuple) else [scores]
        numbers = all(
            isinstance(s, int | float | np.floating | np.integer) and not isinstance(s, bool)
            for s in some
        )
    expected = "one number" if candidates == 1 else f"{candidates} numbers"
    if not numbers:
        raise TypeError(f"{where} must be {expected}, got {shown(scores)}")
    if candidates == 1 and isinstance(scores, list | tuple):
        raise TypeError(f"{where} must be {expected}, got {shown(scores)}")
    shape = np.shape(scores)
    if shape != (candidates,) and not (candidates == 1 and shape == ()):
        raise ValueError(f"{where} must be {expected}, got {shown(scores)}")
    if not is_array(scores):
        largest = float(jnp.finfo(jnp.float32).max)
        for score in some:
            if isinstance(score, int) and abs(score) > largest:
                raise ValueError(f"{where} must fit into float32, got {shown(score)}")
            if math.isfinite(score) and abs(score) > largest:
                raise ValueError(f"{where} must fit into float32, got {shown(score)}")


def _check_key(where: str, key: Any) -> None:
    if not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        raise TypeError(f"{where} must be a typed key, jax.random.key(seed), got {shown(key)}")
    if key.shape:
        raise TypeError(
            f"{where}: one key is needed, keys of shape {key.shape} came; map over them with vmap"
        )
