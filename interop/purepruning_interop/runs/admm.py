"""The stages of steps that train towards pruned weights: ADMM, and AutoCompress."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

import purepruning as pp
from purepruning.search.rounds import budgets_of_rounds
from purepruning_interop.runs.smaller import smaller
from purepruning_interop.runs.work import Stage, State, Work, config_of
from purepruning_interop.tasks import Objective


def admm(work: Work, recipe: Any) -> list[Stage]:
    """Returns a stage for each iteration of ADMM, one that prunes, and one that tunes."""
    work.needs("minimize", "loss")
    args = work.step.args
    iterate = _Iterations(work, recipe, args["row"], args["training_epochs"])
    n = args["num_iterations"]
    stages = [
        work.stage(f"iteration {i + 1} of {n}", iterate.do(i), extra=iterate.extra)
        for i in range(n)
    ]
    return [*stages, work.stage("prune", iterate.prune), *work.tuned()]


def auto_compress(work: Work, recipe: Any) -> list[Stage]:
    """Returns the stages of AutoCompress: in rounds a search, ADMM, and pruning.

    Between rounds what is pruned stays in place, masked, since a task's functions are of the whole
    model; the smaller one computes the same, and is made of what the run ends with.
    """
    work.needs("minimize", "loss")
    options = dict(recipe.options)
    rounds, budget, rho = (options.pop(name) for name in ("rounds", "budget", "rho"))
    steps, epochs = options.pop("admm_steps"), options.pop("epochs_per_step")
    iterate = _Iterations(work, recipe, rho, epochs)
    stages = []
    for i, aim in enumerate(budgets_of_rounds(recipe.problem.dense(), budget, rounds)):
        label = f"round {i + 1} of {rounds}: "
        search = _search(work, recipe, i, aim, options)
        stages.append(work.stage(label + "search", search, extra=iterate.plan))
        for j in range(steps):
            what = f"{label}iteration {j + 1} of {steps}"
            do = iterate.do(i * steps + j, first=j == 0)
            stages.append(work.stage(what, do, extra=iterate.extra))
        stages.append(work.stage(label + "prune", iterate.prune, extra=iterate.plan))
    return [*stages, *work.tuned(), smaller(work)]


class _Iterations:
    """Iterations of ADMM, by the config's counts, or a plan's that the state's extra holds.

    Attributes:
        plan, extra: what trees the extra of a state looks like, with a plan alone, and in
            iterations.
    """

    def __init__(self, work: Work, recipe: Any, rho: float, epochs: int) -> None:
        self._work, self._recipe, self._rho, self._epochs = work, recipe, rho, epochs
        loss, config = work.task.loss, recipe.config
        planned = hasattr(recipe, "search")
        self._planned = planned

        def with_penalty(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
            assert loss is not None  # it was checked
            return loss(params, batch) + pp.admm.penalty(params, state, config, rho), state

        self._objective = Objective(with_penalty)
        self.plan = lambda: {"plan": dict.fromkeys((pool.name for pool in config.pools), 0)}
        self.extra = lambda: {
            "admm": pp.admm.init(work.first, config),
            **(self.plan() if planned else {}),
        }

    def do(self, number: int, first: bool | None = None) -> Callable[[State], State]:
        """Returns what an iteration does; the first one begins at the weights as they are."""
        first = number == 0 if first is None else first

        def iterate(state: State) -> State:
            config = self._config(state)
            before = pp.admm.init(state.params, config) if first else state.extra["admm"]
            params, _ = self._work.minimize(
                self._objective, before, state, number + 1, self._epochs
            )
            after, _ = pp.admm.step(params, before, config, self._rho, pruner=self._recipe.pruner)
            return State(params, state.masks, {**(state.extra or {}), "admm": after})

        return iterate

    def prune(self, state: State) -> State:
        """Returns the state pruned by its weights; the plan is kept for the next round."""
        pruner, config = self._recipe.pruner, self._config(state)
        masks = pp.admm.masks(state.params, state.extra["admm"], config, pruner=pruner)
        found = self._work.prune(state, masks)
        if not self._planned:
            return found
        return found._replace(extra={"plan": state.extra["plan"]})

    def _config(self, state: State) -> Any:
        counts = state.extra["plan"] if self._planned else None
        return config_of(self._recipe.config, state, counts)


def _search(
    work: Work, recipe: Any, number: int, aim: dict[str, Any], options: dict[str, Any]
) -> Callable[[State], State]:
    """Returns the search of a round, by whose plan no group has more than before."""

    def do(state: State) -> State:
        gone = state.extra["plan"] if number else {}

        def planned(counts: Mapping[str, int]) -> dict[str, int]:
            return {name: max(int(n), gone.get(name, 0)) for name, n in counts.items()}

        def evaluate(trial: Any) -> float:
            config = config_of(recipe.config, state, planned(trial.counts))
            tried = work.prune(state, recipe.pruner(state.params, None, config))
            return float(work.task.evaluate(tried.params))

        of = pp.search.problem(recipe.config, aim)
        annealing = pp.search.annealing(of, **options)
        key = jax.random.fold_in(jax.random.key(work.settings.seed), number)
        found = pp.search.run_search(
            annealing,
            annealing.init(key),
            evaluate,
            problem=of,
            folder=work.search_folder(f"-{number}"),
        )
        return state._replace(extra={"plan": planned(found.best)})

    return do
