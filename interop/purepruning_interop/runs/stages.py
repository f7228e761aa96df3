"""What a recipe means for a task: stages, each a function from a state to the next."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from purepruning_interop.recipes.recipe import Recipe, within
from purepruning_interop.runs import admm, pruning, quantization
from purepruning_interop.runs.smaller import smaller
from purepruning_interop.runs.work import Settings, Stage, State, Work, seed_of
from purepruning_interop.tasks import Task

_SEARCHES = ("net_adapt", "simulated_annealing", "sensitivity", "amc")
_OF_PRUNING: dict[str, Callable[[Work, Any], list[Stage]]] = {
    "agp": pruning.gradual,
    "lottery_ticket": pruning.tickets,
    "admm": admm.admm,
    "auto_compress": admm.auto_compress,
    **dict.fromkeys(_SEARCHES, pruning.search),
}
_JAX = ("flax", "linen", "nnx", "equinox", "keras", "tensorflow")


def stages_of(
    recipe: Recipe, task: Task, settings: Settings, *, folder: Path | None = None, start: Any = None
) -> list[Stage]:
    """Returns the stages of a run, everything checked: nothing has been trained yet.

    First the network is trained, unless ``start`` gives its parameters. A step that prunes at once
    has a stage that prunes and one that tunes, AGP one for each of its epochs, lottery tickets one
    for each round, ADMM one for each of its iterations, AutoCompress a search, iterations and a
    pruning for each round, and a search one, which goes on inside of its own folder. A quantizer
    has one, that trains with quantised weights; ``shrink`` one, that makes the smaller model.

    Args:
        recipe: without ranges.
        task: what is pruned.
        settings: the rest.
        folder: where searches keep their trials.
        start: trained parameters.

    Raises:
        ValueError, TypeError, KeyError: rules fit no layer, or a step asks for what the task has
            not. The message names step and rule.
    """
    with within(recipe.source):
        _check_framework(recipe, task)
        first = task.init(seed_of(task, settings.seed))
        stages = [Stage(None, "train", _train(task, settings, start))]
        whole = False  # whether a step prunes more than single weights
        for number, step in enumerate(recipe.steps):
            with within(f"step {number} ({step.use})"):
                work = Work(number, step, task, settings, first, folder)
                if step.kind != "pruning":
                    _check_last(recipe, number)
                if step.kind == "structure":
                    if not whole:
                        raise ValueError(
                            "it removes whole channels, and no step before prunes any; prune with "
                            "'l1_filter' or another that does"
                        )
                    stages.append(smaller(work))
                elif step.kind == "quantization":
                    stages.append(quantization.quantized(work, pruned=number > 0))
                else:
                    of = work.recipe()
                    whole |= of.config.granularity == "output_channel"
                    stages += _OF_PRUNING.get(step.use, pruning.at_once)(work, of)
        return stages


def _check_last(recipe: Recipe, number: int) -> None:
    if number + 1 < len(recipe.steps):
        raise ValueError(
            "it must be the last step, since what it makes is not pruned further; put it behind "
            f"step {len(recipe.steps) - 1} ({recipe.steps[-1].use})"
        )


def _check_framework(recipe: Recipe, task: Task) -> None:
    wanted = recipe.framework
    if wanted is not None and (wanted in _JAX) != task.traced:
        has = "JAX" if task.traced else "torch"
        raise ValueError(
            f"the recipe's framework is {wanted!r}, and the task {task.name!r} is of {has}; change "
            "one of them"
        )


def _train(task: Task, settings: Settings, start: Any) -> Callable[[State], State]:
    def do(_: State) -> State:
        if start is not None:
            return State(start)
        seed = seed_of(task, settings.seed)
        return State(task.train(task.init(seed), seed))

    return do
