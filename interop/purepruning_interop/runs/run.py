"""A recipe done to a task in a folder."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import purepruning as pp
from purepruning_interop.recipes import Recipe, search_recipe, write_resolved
from purepruning_interop.runs.folder import RunFolder, writing
from purepruning_interop.runs.stages import stages_of
from purepruning_interop.runs.work import Settings, Stage, State
from purepruning_interop.tasks import Task

By = Literal["grid", "random", "optuna"]


class Outcome(NamedTuple):
    """What :func:`run_recipe` returns.

    Attributes:
        state: parameters and masks at the end.
        history: a row for each stage: ``stage``, ``step``, ``what``, ``score``, ``density``,
            ``seconds``.
        recipe: the recipe that was done; of one with ranges, the best.
        values: its values of the ranges, by name.
        files: weights, masks, and what the last step makes, by kind.
    """

    state: State
    history: list[dict[str, Any]]
    recipe: Recipe
    values: dict[str, Any]
    files: dict[str, str]


def run_recipe(
    recipe: Recipe,
    task: Task,
    folder: Path,
    settings: Settings | None = None,
    *,
    start: Any = None,
    asked: dict[str, Any] | None = None,
    samples: int | None = None,
    by: By | None = None,
    anew: bool = False,
    show: Callable[[int, int, str], None] = lambda done, of, what: None,
) -> Outcome:
    """Returns what became of a task under a recipe: trained, pruned, searched, tuned, exported.

    Everything is checked first. After each stage a row is added to ``history.jsonl`` and the state
    is saved; a run that was killed goes on from there when it is called again with the same
    arguments, and ends the same, seconds apart. At the end weights and masks are written.

    A recipe with ranges is searched first, each trial a run without a folder from the trained
    network: ``samples`` at random, or as optuna suggests, else a grid.

    Args:
        recipe: what ``read_recipe`` returned.
        task: what is pruned.
        folder: the run folder; it is made.
        settings: seed and epochs.
        start: parameters that are trained already.
        asked: what is written to ``run.json``, and must be the same when the run goes on.
        samples: how many recipes of one with ranges are tried.
        by: how they are found: ``"grid"``, ``"random"`` or ``"optuna"``; at random if there are
            ``samples``, else the grid, unless given.
        anew: whether to remove an older run there.
        show: called before each stage with its number, how many there are, and what it does.

    Raises:
        ValueError, TypeError, KeyError: recipe and task do not fit, or the folder is of another
            run; a score is NaN, or the task's ``tune`` leaves pruned weights that are not zero.
        NotWritten: the system would not take a file; the run can be called again.
        RuntimeError: all evaluations of a search failed.
    """
    settings = settings or Settings()
    told = {"task": task.name, **settings._asdict(), "samples": samples, "by": by, **(asked or {})}
    # Checked before anything is written.
    if not recipe.ranges:
        stages_of(recipe, task, settings, start=start)
    with RunFolder(folder) as here:
        here.begin(recipe, told, anew=anew)
        chosen, values = recipe, dict[str, Any]()
        if recipe.ranges:
            chosen, values = _searched(recipe, task, settings, folder, start, by, samples, show)
        stages = stages_of(chosen, task, settings, folder=folder, start=start)
        params = task.init(settings.seed) if start is None else start
        done, state, history = here.resume(stages, params)
        for number, stage in enumerate(stages[done:], done):
            show(number, len(stages), stage.what)
            state, row = _done(stage, number, state, task)
            here.save(number + 1, state, row)
            history.append(row)
        show(len(stages), len(stages), "export")
        return Outcome(state, history, chosen, values, here.export(stages, state))


def _done(stage: Stage, number: int, state: State, task: Task) -> tuple[State, dict[str, Any]]:
    began = time.perf_counter()
    state = stage.do(state)
    state = state if stage.extra is not None else state._replace(extra=None)
    score = _score(stage, state, task)
    if math.isnan(score):
        raise ValueError(
            f"task {task.name!r}: the score after {_place(stage)} is NaN; return a number from "
            "evaluate, or tune at a smaller rate"
        )
    density = 1.0 if state.masks is None else float(pp.density(state.masks, state.params))
    row = {
        "stage": number,
        "step": stage.step,
        "what": stage.what,
        "score": score if math.isfinite(score) else None,
        "density": density,
        "seconds": round(time.perf_counter() - began, 3),
    }
    return state, row


def _place(stage: Stage) -> str:
    return stage.what if stage.step is None else f"{stage.what!r} of step {stage.step}"


def _score(stage: Stage, state: State, task: Task) -> float:
    return float(task.evaluate(state.params) if stage.score is None else stage.score(state))


def _searched(
    recipe: Recipe,
    task: Task,
    settings: Settings,
    folder: Path,
    start: Any,
    by: By | None,
    samples: int | None,
    show: Callable[[int, int, str], None],
) -> tuple[Recipe, dict[str, Any]]:
    """Returns the best recipe of those that one with ranges stands for, and its values."""
    if start is None:
        show(0, 1, "train")
        start = task.train(task.init(settings.seed), settings.seed)
    tried = 0

    def evaluate(one: Recipe) -> float:
        nonlocal tried
        tried += 1
        show(0, 1, f"trial {tried}")
        state = State(start)
        stages = stages_of(one, task, settings, start=start)
        for stage in stages:
            state = stage.do(state)
        return _score(stages[-1], state, task)

    found = search_recipe(
        recipe,
        evaluate,
        by=by or ("grid" if samples is None else "random"),
        n_samples=samples,
        seed=settings.seed,
        folder=folder / "ranges",
    )
    with writing(folder):
        write_resolved(folder / "best.json", found.recipe)
    return found.recipe, found.values
