"""What the stages of a run are made of, and what those of one step share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import purepruning as pp
from purepruning.masks import by_path, to_numpy
from purepruning.trees import flatten
from purepruning_interop.recipes.recipe import Step, core_arguments, core_name, plain_rule
from purepruning_interop.tasks import Objective, Task


class Settings(NamedTuple):
    """What a run is told beside its recipe and task.

    Attributes:
        seed: of the network, its training and searches.
        epochs: of each fine-tuning; the task's ``tuning_epochs`` where None.
        trial_epochs: how long a trial of NetAdapt or a sensitivity search is tuned.
    """

    seed: int = 0
    epochs: int | None = None
    trial_epochs: int = 0


class State(NamedTuple):
    """Where a run is.

    Attributes:
        params: the parameters, pruned ones at zero.
        masks: a tree like them, or None before anything is pruned.
        extra: what the next stage of the same step needs.
    """

    params: Any
    masks: Any = None
    extra: Any = None


class Stage(NamedTuple):
    """A part of a run that is done whole, and then saved.

    Attributes:
        step: number of the recipe's step; None before them.
        what: what it does, in a few words.
        do: ``(state) -> state``.
        extra: ``() -> tree`` like the ``extra`` of the state that it returns; None if that is None.
        score: ``(state) -> score`` of what the state stands for, where that is not its parameters.
        write: ``(state, folder) -> files by kind``: what a run that ends so writes besides weights
            and masks.
    """

    step: int | None
    what: str
    do: Callable[[State], State]
    extra: Callable[[], Any] | None = None
    score: Callable[[State], Any] | None = None
    write: Callable[[State, Path], dict[str, str]] | None = None


@dataclasses.dataclass(frozen=True)
class Work:
    """One step of a recipe, and what it is done to.

    Attributes:
        number: of the step.
        step: the step.
        task: what is pruned.
        settings: the rest.
        first: the parameters before any training.
        folder: where searches keep their trials, or None.
    """

    number: int
    step: Step
    task: Task
    settings: Settings
    first: Any
    folder: Path | None

    # Stages.
    def stage(self, what: str, do: Callable[[State], State], **more: Any) -> Stage:
        """Returns a stage of this step."""
        return Stage(self.number, what, do, **more)

    def tuned(self) -> list[Stage]:
        """Returns the stage that tunes at the end of a step, if it is to be tuned."""
        epochs = self.epochs
        if not epochs:
            return []
        return [self.stage(f"tune, {epochs} epochs", lambda s: self.tune(s, 0, epochs))]

    @property
    def epochs(self) -> int:
        """How long a fine-tuning is."""
        given = self.settings.epochs
        return self.task.tuning_epochs if given is None else given

    # What stages do.
    def tune(self, state: State, shift: int, epochs: int) -> State:
        """Returns the state after fine-tuning; ``shift`` tells apart those of one step.

        Raises:
            ValueError: the task's ``tune`` left a pruned weight that is not zero.
        """
        params = self.task.tune(state.params, state.masks, self._seed(shift), epochs)
        _check_pruned(self.task, params, state.masks)
        return state._replace(params=params)

    def minimize(
        self, objective: Objective, extra: Any, state: State, shift: int, epochs: int
    ) -> tuple[Any, Any]:
        """Returns params and extra after so many epochs of another loss."""
        assert self.task.minimize is not None  # it was checked
        return self.task.minimize(
            objective, extra, state.params, state.masks, self._seed(shift), epochs
        )

    def _seed(self, shift: int) -> Any:
        return seed_of(self.task, self.settings.seed + 1000 * (self.number + 1) + shift)

    def prune(self, state: State, masks: Any) -> State:
        """Returns the state with more pruned."""
        masks = masks if state.masks is None else pp.merge_masks(state.masks, masks)
        return State(pp.apply_masks(state.params, masks), masks)

    # What the library makes of the step.
    def recipe(self) -> Any:
        """Returns what :func:`purepruning.from_nni` makes of the step."""
        return pp.from_nni(
            core_name(self.step),
            self.rules(),
            self.task.layers,
            coupling=self._coupling_of_rules(),
            **core_arguments(self.step),
        )

    def rules(self) -> list[dict[str, Any]]:
        """Returns the rules as the library reads them."""
        return [plain_rule(rule) for rule in self.step.rules]

    def _coupling_of_rules(self) -> pp.Coupling | None:
        coupled = self.step.use in ("amc", "auto_compress")
        if not (coupled or self.step.args.get("dependency_aware")):
            return None
        return self.coupling()

    def needs(self, *names: str) -> None:
        """Raises where the task lacks something.

        Raises:
            ValueError: with its name.
        """
        for name in names:
            found = getattr(self.task, name)
            if found is None or (isinstance(found, tuple | list) and not found):
                raise ValueError(f"it needs {name!r} of the task {self.task.name!r}; add it")

    def coupling(self) -> pp.Coupling:
        """Returns the coupling of the task's model."""
        task = self.task
        self.needs("apply" if task.traced else "model", "inputs")
        if task.traced:
            assert task.apply is not None
            return pp.couple(task.apply, self.first, *task.inputs)
        from purepruning_interop.torch import couple

        found: pp.Coupling = couple(task.model, *task.inputs)
        return found

    def search_folder(self, more: str = "") -> Path | None:
        """Returns where a search keeps its trials."""
        return None if self.folder is None else self.folder / f"search-{self.number}{more}"


def config_of(config: Any, state: State, counts: Mapping[str, Any] | None = None) -> Any:
    """Returns a config with other counts, by which what is pruned stays so."""
    config = config if counts is None else config.with_counts(counts)
    return config if state.masks is None else config.with_masks(state.masks)


def _check_pruned(task: Task, params: Any, masks: Any) -> None:
    leaves = flatten(params).leaves
    for name, mask in ({} if masks is None else by_path(masks, params)).items():
        if mask is None:
            continue
        alive = np.count_nonzero(to_numpy(leaves[name] != 0) & ~to_numpy(mask))
        if alive:
            raise ValueError(
                f"task {task.name!r}: tune must leave pruned weights at zero, and {alive} of "
                f"{name!r} are not; return purepruning.apply_masks(params, masks)"
            )


def seed_of(task: Task, seed: int) -> Any:
    """Returns a seed as the task's functions take it."""
    return np.int32(seed) if task.traced else seed
