"""Recipes with ranges, searched by a grid, at random or by optuna, in the loop of all searches."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import purepruning as pp
from purepruning.arguments import function, instance, one_of, whole_number
from purepruning.search.driver import TRIALS, Result
from purepruning.search.shape import Move, make_search
from purepruning_interop.recipes.ranges import find_ranges
from purepruning_interop.recipes.recipe import Recipe, Step, replace_ranges, within
from purepruning_interop.recipes.suggestions import Suggestions

#: A grid of more points than this is refused.
MOST_TRIALS = 100_000


class Found(NamedTuple):
    """What :func:`search_recipe` returns.

    Attributes:
        recipe: the best one, without ranges.
        values: its values by name, such as ``"0.sparsity"``.
        history: a row for each trial, as of :func:`purepruning.search.run_search`, and its values.
    """

    recipe: Recipe
    values: dict[str, Any]
    history: list[dict[str, Any]]


class _State(NamedTuple):
    common: Any
    trial: Any


def expand(recipe: Recipe) -> Recipe:
    """Returns the recipe that is searched: a rule that names layers is one rule for each name.

    So that each has a value of its own, as in auptimizer; ``"expand_op_names": false`` in a rule
    leaves it whole, with one value for all. A recipe without ranges stays as it is.

    >>> from purepruning_interop.recipes import read_recipe
    >>> share = {"range": [0.2, 0.8], "type": "float"}
    >>> rule = {"sparsity": share, "op_types": ["Conv2d"], "op_names": ["conv1", "conv2"]}
    >>> recipe = read_recipe({"purepruning": 1, "steps": [{"use": "level", "rules": [rule]}]})
    >>> list(expand(recipe).ranges)
    ['0.sparsity', '1.sparsity']
    """
    if not recipe.ranges:
        return recipe
    return dataclasses.replace(recipe, steps=tuple(map(_expanded, recipe.steps)))


def _expanded(step: Step) -> Step:
    rules: list[Mapping[str, Any]] = []
    for rule in step.rules:
        names, plain = rule.get("op_names"), dict(rule)
        wanted = plain.pop("expand_op_names", True)
        if names is None or not wanted:
            rules.append(plain)
        else:
            names = [names] if isinstance(names, str) else names
            rules += [{**plain, "op_names": [name]} for name in names]
    return dataclasses.replace(step, rules=tuple(rules))


def with_values(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """Returns the recipe with its ranges replaced by values, by their names.

    Raises:
        KeyError: a range has no value.
    """
    steps = []
    for number, step in enumerate(recipe.steps):
        first = f"{number}." if len(recipe.steps) > 1 else ""
        # Ranges are replaced in the order in which they are found.
        names = iter([first + ".".join(place) for place, _ in find_ranges(step.rules)])

        def value(_: Any, names: Iterator[str] = names) -> Any:
            return values[next(names)]

        rules = [replace_ranges(rule, value) for rule in step.rules]
        steps.append(dataclasses.replace(step, rules=tuple(rules)))
    return dataclasses.replace(recipe, steps=tuple(steps))


def search_recipe(
    recipe: Recipe,
    evaluate: Callable[[Recipe], float],
    *,
    by: Literal["grid", "random", "optuna"] = "random",
    n_samples: int | None = None,
    seed: int = 0,
    target: Literal["max", "min"] = "max",
    folder: str | os.PathLike[str] | None = None,
    submit: Callable[..., Any] | None = None,
) -> Found:
    """Returns the best of the recipes that a recipe with ranges stands for.

    Rules are expanded first (:func:`expand`). Numbers are drawn uniformly, integers with both ends;
    a grid has the points of ``interval``, else ``n`` points, else those at distance 1.

    Args:
        recipe: what :func:`read_recipe` returned.
        evaluate: ``(recipe) -> score``: creates a compressor, compresses, trains, measures.
        by: ``"grid"``, which is auptimizer's ``sequence``; ``"random"``; or ``"optuna"``, whose TPE
            suggests every recipe by the scores of those before (extra ``optuna``).
        n_samples: how many recipes are drawn, or suggested.
        seed: of the draws, or of TPE.
        target: whether a score is better if it is larger or smaller.
        folder, submit: as of :func:`purepruning.search.run_search`; optuna waits for every score,
            and its recipes are evaluated here.

    Raises:
        ModuleNotFoundError: optuna is not installed.
        ValueError, TypeError: an argument is wrong; there are no ranges; a grid is too large.
        RuntimeError: an evaluation failed.
    """
    instance(recipe, Recipe, "search_recipe: recipe", "what read_recipe returned")
    function(evaluate, "search_recipe: evaluate", "a function of a recipe")
    one_of("search_recipe: by", by, ("grid", "random", "optuna"))
    one_of("search_recipe: target", target, ("max", "min"))
    with within(recipe.source):
        expanded = expand(recipe)
        if not expanded.ranges:
            raise ValueError("there are no ranges to search; call create_compressor")
        if by == "optuna":
            return _suggested(expanded, evaluate, n_samples, seed, target, folder, submit)
        rows = _grid(expanded) if by == "grid" else _drawn(expanded, n_samples, seed)
    names = tuple(expanded.ranges)
    search = _in_order(names, len(rows), target)

    def score(trial: pp.search.Trial) -> float:
        row = rows[trial.counts[names[0]]]
        return evaluate(with_values(expanded, dict(zip(names, row, strict=True))))

    found = pp.search.run_search(
        search, search.init(jax.random.key(seed)), score, folder=folder, submit=submit
    )
    return _found(expanded, found, rows)


def _suggested(
    recipe: Recipe,
    evaluate: Callable[[Recipe], float],
    n_samples: int | None,
    seed: int,
    target: str,
    folder: str | os.PathLike[str] | None,
    submit: Callable[..., Any] | None,
) -> Found:
    """Returns the best of what optuna suggests."""
    if submit is not None:
        raise ValueError(
            "search_recipe: submit is not for by='optuna', which waits for every score; leave it "
            "out"
        )
    n, names = _how_many(n_samples, "optuna"), tuple(recipe.ranges)
    suggestions = Suggestions(recipe.ranges, seed, target)
    search = _in_order(names, n, target)

    def tell(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            suggestions.tell(row["counts"][names[0]], row["score"])

    def score(trial: pp.search.Trial) -> float:
        number = trial.counts[names[0]]
        tell(_rows_before(folder, number)[len(suggestions.values) :])
        row = suggestions.of(number)
        found = math.nan
        try:
            found = float(evaluate(with_values(recipe, dict(zip(names, row, strict=True)))))
        finally:
            suggestions.tell(number, found)
        return found

    found = pp.search.run_search(search, search.init(jax.random.key(seed)), score, folder=folder)
    tell(found.history[len(suggestions.values) :])
    return _found(recipe, found, suggestions.values)


def _rows_before(folder: str | os.PathLike[str] | None, number: int) -> list[dict[str, Any]]:
    """Returns the rows of the trials before one, of a run with files."""
    if folder is None or not number:
        return []
    lines = (Path(folder) / TRIALS).read_text().splitlines()[:number]
    return [json.loads(line) for line in lines]


def _found(recipe: Recipe, found: Result, rows: list[tuple[Any, ...]]) -> Found:
    """Returns the best recipe, and the values of every trial, by the rows of values."""
    names = tuple(recipe.ranges)

    def values_of(counts: Mapping[str, int]) -> dict[str, Any]:
        return dict(zip(names, rows[counts[names[0]]], strict=True))

    history = [{**row, "values": values_of(row["counts"])} for row in found.history]
    best = values_of(found.best)
    return Found(with_values(recipe, best), best, history)


def _grid(recipe: Recipe) -> list[tuple[Any, ...]]:
    points = [found.grid() for found in recipe.ranges.values()]
    n = int(np.prod([len(p) for p in points], dtype=float))
    if n > MOST_TRIALS:
        raise ValueError(f"the grid has {n} points; give ranges an 'interval' or 'n', or draw some")
    return list(itertools.product(*points))


def _drawn(recipe: Recipe, n_samples: int | None, seed: int) -> list[tuple[Any, ...]]:
    n = _how_many(n_samples, "random")
    rng = np.random.default_rng(seed)
    return [tuple(r.draw(rng) for r in recipe.ranges.values()) for _ in range(n)]


def _how_many(n_samples: int | None, by: str) -> int:
    if n_samples is None:
        raise TypeError(f"search_recipe: {by} search needs n_samples; give how many recipes to try")
    return whole_number(n_samples, "search_recipe: n_samples", 1, MOST_TRIALS)


def _in_order(names: tuple[str, ...], n: int, target: str) -> pp.search.Search:
    """Returns the search whose i-th plan is number i, for every name."""

    def plan(state: Any) -> Any:
        counts = jnp.full((1, len(names)), state.trial, jnp.int32)
        return state.common.key, (state.trial,), counts, jnp.ones(1, bool), jnp.int32(0)

    def learn(state: Any, scores: Any) -> Move:
        common, score = state.common, scores[0]
        better = ~jnp.isnan(score) & (jnp.isnan(common.best_score) | (score > common.best_score))
        return Move(
            (state.trial + 1,),
            jnp.where(better, 0, -1),
            jnp.where(better, common.plans[0], common.best),
            jnp.where(better, score, common.best_score),
        )

    return make_search(
        "search_recipe",
        names,
        _State,
        candidates=1,
        start=lambda key: (jnp.int32(0),),
        plan=plan,
        learn=learn,
        done=lambda state: state.trial >= n,
        optimize_mode="maximize" if target == "max" else "minimize",
    )
