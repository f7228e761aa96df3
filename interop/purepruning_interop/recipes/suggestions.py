"""Values that optuna suggests for ranges, one trial after the other."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from typing import Any

from purepruning_interop.recipes.ranges import Range


class Suggestions:
    """What optuna's TPE suggests for trials 0, 1, ..., each by the scores of those before.

    The same seed and scores give the same values, so that nothing has to be kept but scores: a run
    that goes on asks again for the trials that it knows.

    Attributes:
        values: of every trial that was asked for, in the order of the ranges.
    """

    def __init__(self, ranges: Mapping[str, Range], seed: int, target: str) -> None:
        try:
            self._optuna: Any = importlib.import_module("optuna")
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                "search_recipe: by='optuna' needs optuna; pip install 'purepruning[optuna]'",
                name="optuna",
            ) from None
        self._space = {name: self._distribution(found) for name, found in ranges.items()}
        # Choices may be anything in JSON; optuna is asked for the number of one.
        self._choices = {n: r.values for n, r in ranges.items() if r.kind == "choice"}
        self._sampler = self._optuna.samplers.TPESampler(seed=seed)
        self._direction = {"max": "maximize", "min": "minimize"}[target]
        self._study = self._quietly(
            self._optuna.create_study, direction=self._direction, sampler=self._sampler
        )
        self._open: Any = None
        self.values: list[tuple[Any, ...]] = []

    def of(self, number: int) -> tuple[Any, ...]:
        """Returns the values of a trial: the one that is next, or one that was."""
        if number == len(self.values):
            self._open = self._quietly(self._study.ask, self._space)
            given = self._open.params
            self.values.append(
                tuple(
                    self._choices[n][x] if n in self._choices else x
                    for n, x in ((n, given[n]) for n in self._space)
                )
            )
        return self.values[number]

    def tell(self, number: int, score: float | None) -> None:
        """Takes the score of the trial that was asked for last; None where it failed."""
        self.of(number)
        if self._open is None or number != len(self.values) - 1:
            return
        failed = score is None or not math.isfinite(score)
        state = self._optuna.trial.TrialState
        self._quietly(
            self._study.tell,
            self._open,
            None if failed else score,
            state=state.FAIL if failed else state.COMPLETE,
        )
        self._open = None

    def _distribution(self, found: Range) -> Any:
        kinds = self._optuna.distributions
        if found.kind == "choice":
            return kinds.CategoricalDistribution(range(len(found.values)))
        low, high = found.values
        if found.kind == "int":
            return kinds.IntDistribution(low, high)
        return kinds.FloatDistribution(low, high)

    def _quietly(self, call: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls a function of optuna, which would write a line of log for every trial."""
        log = self._optuna.logging
        before = log.get_verbosity()
        log.set_verbosity(log.WARNING)
        try:
            return call(*args, **kwargs)
        finally:
            log.set_verbosity(before)
