"""What a recipe means for a task: stages, each a function from a state to the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import purepruning as pp
from purepruning_interop.recipes.recipe import (
    Recipe,
    Step,
    core_arguments,
    core_name,
    plain_rule,
    within,
)
from purepruning_interop.tasks import Task

_BY_OUTPUTS = ("activation_apoz_rank_filter", "activation_mean_rank_filter")
_BY_GRADIENTS = ("taylor_fo_weight_filter",)
_SEARCHES = ("net_adapt", "simulated_annealing", "sensitivity", "amc")
#: What a task has no function for, and what to do instead.
_REFUSED = {
    "admm": "it trains with a penalty of its own, which a task cannot be told; call "
    "create_compressor with a trainer",
    "auto_compress": "it shrinks the model between rounds; call create_compressor with a model",
}
_FLAX = ("flax", "linen", "nnx", "equinox")


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
    """

    step: int | None
    what: str
    do: Callable[[State], State]
    extra: Callable[[], Any] | None = None


def stages_of(
    recipe: Recipe, task: Task, settings: Settings, *, folder: Path | None = None, start: Any = None
) -> list[Stage]:
    """Returns the stages of a run, everything checked: nothing has been trained yet.

    First the network is trained, unless ``start`` gives its parameters. A step that prunes at once
    has a stage that prunes and one that tunes, AGP one for each of its epochs, lottery tickets one
    for each round, and a search one, which goes on inside of its own folder.

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
        first = task.init(_seed(task, settings.seed))
        stages = [Stage(None, "train", _train(task, settings, start))]
        for number, step in enumerate(recipe.steps):
            with within(f"step {number} ({step.use})"):
                make = _Maker(number, step, task, settings, first, folder)
                stages += make.stages()
        return stages


def _check_framework(recipe: Recipe, task: Task) -> None:
    wanted = recipe.framework
    if wanted is not None and (wanted in _FLAX) != task.traced:
        has = "JAX" if task.traced else "torch"
        raise ValueError(
            f"the recipe's framework is {wanted!r}, and the task {task.name!r} is of {has}; change "
            "one of them"
        )


def _seed(task: Task, seed: int) -> Any:
    return np.int32(seed) if task.traced else seed


def _train(task: Task, settings: Settings, start: Any) -> Callable[[State], State]:
    def do(_: State) -> State:
        if start is not None:
            return State(start)
        seed = _seed(task, settings.seed)
        return State(task.train(task.init(seed), seed))

    return do


class _Maker:
    """Makes the stages of one step."""

    def __init__(
        self,
        number: int,
        step: Step,
        task: Task,
        settings: Settings,
        first: Any,
        folder: Path | None,
    ) -> None:
        self._number, self._step, self._task = number, step, task
        self._settings, self._first, self._folder = settings, first, folder
        if step.kind != "pruning":
            raise ValueError(
                "a run prunes, and this quantises; call create_compressor with a model"
            )
        if step.use in _REFUSED:
            raise ValueError(_REFUSED[step.use])
        self._check_data()
        self._recipe: Any = pp.from_nni(
            core_name(step),
            [plain_rule(rule) for rule in step.rules],
            task.layers,
            coupling=self._coupling(),
            **core_arguments(step),
        )

    def _check_data(self) -> None:
        use, task = self._step.use, self._task
        needs = {**dict.fromkeys(_BY_OUTPUTS, "capture"), **dict.fromkeys(_BY_GRADIENTS, "loss")}
        if use not in needs:
            return
        if getattr(task, needs[use]) is None:
            raise ValueError(f"it needs {needs[use]!r} of the task {task.name!r}; add it")
        wanted = self._step.args["statistics_batch_num"]
        if len(task.batches) < wanted:
            raise ValueError(
                f"statistics_batch_num is {wanted}, and the task {task.name!r} has "
                f"{len(task.batches)} batches; add some, or say less"
            )

    def _coupling(self) -> pp.Coupling | None:
        task = self._task
        if not (self._step.use == "amc" or self._step.args.get("dependency_aware")):
            return None
        what = "apply" if task.traced else "model"
        if not task.inputs or getattr(task, what) is None:
            raise ValueError(f"it needs {what!r} and 'inputs' of the task {task.name!r}; add them")
        if task.traced and task.apply is not None:
            return pp.couple(task.apply, self._first, *task.inputs)
        from purepruning_interop.torch import couple

        found: pp.Coupling = couple(task.model, *task.inputs)
        return found

    def stages(self) -> list[Stage]:
        """Returns the stages of the step."""
        use = self._step.use
        if use == "agp":
            return [*self._gradual(), *self._tuned()]
        if use == "lottery_ticket":
            return self._tickets()
        if use in _SEARCHES:
            return [self._stage("search", self._search), *self._tuned()]
        return [self._stage("prune", self._prune_once), *self._tuned()]

    def _stage(
        self, what: str, do: Callable[[State], State], extra: Callable[[], Any] | None = None
    ) -> Stage:
        return Stage(self._number, what, do, extra)

    def _tuned(self) -> list[Stage]:
        epochs = self._epochs()
        if not epochs:
            return []
        return [self._stage(f"tune, {epochs} epochs", lambda s: self._tune(s, 0, epochs))]

    def _epochs(self) -> int:
        given = self._settings.epochs
        return self._task.tuning_epochs if given is None else given

    def _tune(self, state: State, shift: int, epochs: int) -> State:
        seed = self._settings.seed + 1000 * (self._number + 1) + shift
        params = self._task.tune(state.params, state.masks, _seed(self._task, seed), epochs)
        return state._replace(params=params)

    def _pruned(self, state: State, masks: Any) -> State:
        masks = masks if state.masks is None else pp.merge_masks(state.masks, masks)
        return State(pp.apply_masks(state.params, masks), masks)

    def _config(self, state: State, counts: Mapping[str, Any] | None = None) -> Any:
        config = self._recipe.config
        config = config if counts is None else config.with_counts(counts)
        return config if state.masks is None else config.with_masks(state.masks)

    def _prune_once(self, state: State) -> State:
        config = self._config(state)
        stats = self._stats(state.params, config)
        return self._pruned(state, self._recipe.pruner(state.params, stats, config))

    def _stats(self, params: Any, config: Any) -> Any:
        use, task = self._step.use, self._task
        if use not in (*_BY_OUTPUTS, *_BY_GRADIENTS):
            return None
        batches = task.batches[: self._step.args["statistics_batch_num"]]
        if use in _BY_GRADIENTS:
            sums = pp.stats.gradients.init(params, config)
            for batch in batches:
                grads = _gradients(task, params, batch)
                sums = pp.stats.gradients.update(sums, params, grads, config)
            return sums
        assert task.capture is not None  # it was checked
        activation = self._step.args["activation"]
        seen = pp.stats.activations.init(params, config)
        for batch in batches:
            outputs = task.capture(params, batch, config.layers, "outputs")
            seen = pp.stats.activations.update(seen, outputs, config, activation=activation)
        return seen

    def _gradual(self) -> list[Stage]:
        times, stages = self._recipe.schedule.init(self._recipe.config), []
        last = max(rule.get("end_epoch", 0) for rule in self._step.rules)
        for epoch in range(last + 1):
            times, event = self._recipe.schedule.step(times)
            counts = event.counts if bool(event.due) else None
            what = f"epoch {epoch}" + ("" if counts is None else ", pruned")
            stages.append(self._stage(what, self._epoch(epoch, counts)))
        return stages

    def _epoch(self, epoch: int, counts: Mapping[str, Any] | None) -> Callable[[State], State]:
        def do(state: State) -> State:
            if counts is not None:
                config = self._config(state, counts)
                state = self._pruned(state, self._recipe.pruner(state.params, None, config))
            return self._tune(state, epoch + 1, 1)

        return do

    def _tickets(self) -> list[Stage]:
        rewind: list[str] | None = None if self._step.args["reset_weights"] else []
        tickets = pp.lottery(self._recipe.pruner, self._recipe.config, rewind=rewind)
        rounds = self._step.rules[0]["prune_iterations"]

        def begin() -> Any:
            return tickets.init({"params": self._first})

        def round_of(n: int) -> Callable[[State], State]:
            def do(state: State) -> State:
                before = begin() if n == 1 else state.extra
                after, run = tickets.step(before, {"params": state.params})
                state = State(run["params"], after.masks, after)
                return self._tune(state, n, max(self._epochs(), 1))

            return do

        numbers = range(1, rounds + 1)
        return [self._stage(f"round {n} of {rounds}", round_of(n), begin) for n in numbers]

    def _search(self, state: State) -> State:
        found, task, epochs = self._recipe, self._task, self._settings.trial_epochs
        uses = self._step.use
        tunes = epochs > 0 and uses in ("net_adapt", "sensitivity")

        def pruned(params: Any, counts: Mapping[str, int]) -> State:
            base = State(params, state.masks)
            masks = found.pruner(params, None, self._config(base, counts))
            return self._pruned(base, masks)

        def evaluate(trial: Any) -> Any:
            base = state.params if trial.payload is None else trial.payload
            tried = pruned(base, trial.counts)
            if not tunes or (uses == "sensitivity" and trial.stage == 0):
                return float(task.evaluate(tried.params))
            tried = self._tune(tried, trial.number + 1, epochs)
            return float(task.evaluate(tried.params)), tried.params

        folder = None if self._folder is None else self._folder / f"search-{self._number}"
        key = jax.random.key(self._settings.seed)
        best = pp.search.run_search(
            found.search, found.search.init(key), evaluate, problem=found.problem, folder=folder
        )
        params = state.params if best.payload is None else best.payload
        return pruned(params, best.best)


def _gradients(task: Task, params: Any, batch: Any) -> Any:
    assert task.loss is not None  # it was checked
    if task.traced:
        return jax.grad(task.loss)(params, batch)
    import torch

    loss = task.loss
    return torch.func.grad(lambda p: loss(p, batch))(params)
