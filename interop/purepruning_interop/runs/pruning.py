"""The stages of steps that prune: at once, epoch by epoch, in rounds, and by a search."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

import purepruning as pp
from purepruning_interop.recipes.edges.tree import gradients
from purepruning_interop.recipes.refit import Refit
from purepruning_interop.runs.work import Stage, State, Work, config_of

_BY_OUTPUTS = ("activation_apoz_rank_filter", "activation_mean_rank_filter")
_BY_GRADIENTS = ("taylor_fo_weight_filter",)


def at_once(work: Work, recipe: Any) -> list[Stage]:
    """Returns a stage that prunes, and one that tunes."""
    _check_data(work)

    def do(state: State) -> State:
        config = config_of(recipe.config, state)
        stats = _stats(work, state.params, config)
        return work.prune(state, recipe.pruner(state.params, stats, config))

    return [work.stage("prune", do), *work.tuned()]


def gradual(work: Work, recipe: Any) -> list[Stage]:
    """Returns a stage for each epoch of AGP, and one that tunes."""
    times, stages = recipe.schedule.init(recipe.config), []
    last = max(rule.get("end_epoch", 0) for rule in work.step.rules)

    def epoch_of(epoch: int, counts: Mapping[str, Any] | None) -> Callable[[State], State]:
        def do(state: State) -> State:
            if counts is not None:
                config = config_of(recipe.config, state, counts)
                state = work.prune(state, recipe.pruner(state.params, None, config))
            return work.tune(state, epoch + 1, 1)

        return do

    for epoch in range(last + 1):
        times, event = recipe.schedule.step(times)
        counts = event.counts if bool(event.due) else None
        what = f"epoch {epoch}" + ("" if counts is None else ", pruned")
        stages.append(work.stage(what, epoch_of(epoch, counts)))
    return [*stages, *work.tuned()]


def tickets(work: Work, recipe: Any) -> list[Stage]:
    """Returns a stage for each round of lottery tickets."""
    rewind: list[str] | None = None if work.step.args["reset_weights"] else []
    lottery = pp.lottery(recipe.pruner, recipe.config, rewind=rewind)
    rounds = work.step.rules[0]["prune_iterations"]

    def begin() -> Any:
        return lottery.init({"params": work.first})

    def round_of(n: int) -> Callable[[State], State]:
        def do(state: State) -> State:
            before = begin() if n == 1 else state.extra
            after, run = lottery.step(before, {"params": state.params})
            state = State(run["params"], after.masks, after)
            return work.tune(state, n, max(work.epochs, 1))

        return do

    return [
        work.stage(f"round {n} of {rounds}", round_of(n), extra=begin) for n in range(1, rounds + 1)
    ]


def search(work: Work, recipe: Any) -> list[Stage]:
    """Returns the stage of a search, which goes on inside of its folder, and one that tunes."""
    epochs, use = work.settings.trial_epochs, work.step.use
    tunes = epochs > 0 and use in ("net_adapt", "sensitivity")

    batches = work.step.args.get("n_calibration_batches", 0)
    if batches:
        work.needs("capture", "batches")

    def pruned(state: State, params: Any, counts: Mapping[str, int], refit: Any) -> State:
        base = State(params, state.masks)
        masks = recipe.pruner(params, None, config_of(recipe.config, base, counts))
        found = work.prune(base, masks)
        return found if refit is None else found._replace(params=refit(found.params, masks))

    def do(state: State) -> State:
        refit = _refit(work, recipe, state.params) if batches else None

        def evaluate(trial: Any) -> Any:
            base = state.params if trial.payload is None else trial.payload
            tried = pruned(state, base, trial.counts, refit)
            if not tunes or (use == "sensitivity" and trial.stage == 0):
                return float(work.task.evaluate(tried.params))
            tried = work.tune(tried, trial.number + 1, epochs)
            return float(work.task.evaluate(tried.params)), tried.params

        best = pp.search.run_search(
            recipe.search,
            recipe.search.init(jax.random.key(work.settings.seed)),
            evaluate,
            problem=recipe.problem,
            folder=work.search_folder(),
        )
        params = state.params if best.payload is None else best.payload
        return pruned(state, params, best.best, refit)

    return [work.stage("search", do), *work.tuned()]


def _refit(work: Work, recipe: Any, params: Any) -> Refit:
    """Returns AMC's refit, by the first batches of the task."""
    task, args = work.task, work.step.args

    def inputs_of(batch: Any, layers: Any) -> Any:
        assert task.capture is not None  # it was checked
        return task.capture(params, batch, layers, "inputs")

    return Refit(
        recipe.config.allocation.coupling,
        task.layers,
        params,
        inputs_of,
        task.batches[: args["n_calibration_batches"]],
        points=args["n_points_per_layer"],
        seed=work.settings.seed,
    )


# Statistics.
def _check_data(work: Work) -> None:
    use, task = work.step.use, work.task
    needs = {**dict.fromkeys(_BY_OUTPUTS, "capture"), **dict.fromkeys(_BY_GRADIENTS, "loss")}
    if use not in needs:
        return
    work.needs(needs[use])
    wanted = work.step.args["statistics_batch_num"]
    if len(task.batches) < wanted:
        raise ValueError(
            f"statistics_batch_num is {wanted}, and the task {task.name!r} has "
            f"{len(task.batches)} batches; add some, or say less"
        )


def _stats(work: Work, params: Any, config: Any) -> Any:
    use, task = work.step.use, work.task
    if use not in (*_BY_OUTPUTS, *_BY_GRADIENTS):
        return None
    batches = task.batches[: work.step.args["statistics_batch_num"]]
    if use in _BY_GRADIENTS:
        loss = task.loss
        assert loss is not None  # it was checked
        sums = pp.stats.gradients.init(params, config)
        names = {path for x in config.layers for path in (x.weight, x.bias)}
        for batch in batches:
            grads = gradients(params, loss, batch, names)
            sums = pp.stats.gradients.update(sums, params, grads, config)
        return sums
    assert task.capture is not None  # it was checked
    activation = work.step.args["activation"]
    seen = pp.stats.activations.init(params, config)
    for batch in batches:
        outputs = task.capture(params, batch, config.layers, "outputs")
        seen = pp.stats.activations.update(seen, outputs, config, activation=activation)
    return seen
