"""Compressors that search for how much each layer loses."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax

import purepruning as pp
from purepruning_interop.recipes.names import FOLDERS
from purepruning_interop.recipes.pruning import Pruning
from purepruning_interop.recipes.refit import Refit


class Searching(Pruning):
    """A search with evaluator and fine-tuner of the caller's."""

    @property
    def _coupled(self) -> bool:  # type: ignore[override]
        return self._step.use == "amc"

    def _compress(self, eval_args: Any, finetune_args: Any) -> Any:
        """Returns the model pruned as the search found best.

        Args:
            eval_args: of the evaluator; the model unless given.
            finetune_args: of the fine-tuner.
        """
        given, recipe, use = self._given, self._recipe, self._step.use
        model = self._own["variables"] if self._name == "linen" else self._original
        tune: Any = given.get("short_term_fine_tuner") or given.get("finetuner")
        first = (given["val_loader"], model) if use == "amc" else (model,)
        eval_args = first if eval_args is None else eval_args
        finetune_args = (model,) if finetune_args is None else finetune_args
        if given.get("sparsity_proportion_calc") is not None:
            raise TypeError(
                "sparsity_proportion_calc decides by curves; run pp.search.sensitivity, and give "
                "what it decides to pp.search.fitted"
            )
        start = self._edge.snapshot(self._model)
        refit = self._refit() if use == "amc" else None

        def evaluate(trial: Any) -> Any:
            base = start if trial.payload is None else trial.payload
            self._model = self._edge.restored(self._model, base)
            try:
                config = recipe.config.with_counts(trial.counts)
                masks = recipe.pruner(self._params(), None, config)
                self._write(pp.apply_masks(self._params(), masks))
                if refit is not None:
                    self._write(refit(self._params(), masks))
                tuned = tune is not None and (use != "sensitivity" or trial.stage > 0)
                if tuned:
                    self._take(self._called(tune, finetune_args))
                    self._write(pp.apply_masks(self._params(), masks))
                score = float(self._called(given["evaluator"], eval_args))
                return (score, self._edge.snapshot(self._model)) if tuned else score
            finally:
                self._model = self._edge.restored(self._model, start)

        folder = next((given[f] for f in FOLDERS if given.get(f) is not None), None)
        key = jax.random.key(given.get("seed") or 0)
        found = pp.search.run_search(
            recipe.search, recipe.search.init(key), evaluate, problem=recipe.problem, folder=folder
        )
        self.history = found.history
        if found.payload is not None:
            self._model = self._edge.restored(self._model, found.payload)
        self.config = recipe.config.with_counts(found.best)
        self._prune(recipe.pruner(self._params(), None, self.config))
        if refit is not None:
            self._write(refit(self._params(), self.masks))
        return self.model

    def _refit(self) -> Refit | None:
        """Returns the refit by the first batches of the loader, None of none."""
        given = self._given
        if not given["n_calibration_batches"]:
            return None

        def inputs_of(batch: Any, layers: Any) -> Any:
            first = batch[0] if isinstance(batch, tuple | list) else batch
            return self._edge.capture(self._model, (first,), layers, "inputs")

        return Refit(
            self.config.allocation.coupling,
            self._layers(),
            self._params(),
            inputs_of,
            itertools.islice(given["val_loader"], given["n_calibration_batches"]),
            points=given["n_points_per_layer"],
            seed=given.get("seed") or 0,
        )

    def _called(self, function: Callable[..., Any], args: Sequence[Any]) -> Any:
        """Calls a function of the caller's with the model as it is now, for the given one."""
        given = (self._original, self._own["variables"])
        now = [self.model if any(a is g for g in given if g is not None) else a for a in args]
        return function(*now)


class AutoCompress(Pruning):
    """Rounds of annealing, ADMM and shrinking."""

    _coupled = True

    def _compress(self, eval_args: Any, finetune_args: Any) -> Any:
        """Returns the smaller model."""
        if self._name == "linen":
            raise ValueError(
                "auto_compress shrinks between rounds, and a Linen module cannot be smaller; use "
                "NNX or Equinox, or pp.search.auto_compress with functions"
            )
        given, inputs, rules = self._given, self._needed(), self._rules()
        named = [{k: v for k, v in rule.items() if k != "sparsity"} for rule in rules]
        options, pruner = dict(self._recipe.options), self._recipe.pruner
        rounds, budget = options.pop("rounds"), options.pop("budget")
        rho, steps = options.pop("rho"), options.pop("admm_steps")
        epochs = options.pop("epochs_per_step")

        def resolved(model: Any) -> Any:
            coupling = self._adapter.couple(model, *inputs)
            table = self._adapter.layers(model, *inputs)
            return pp.resolve(
                named, table, granularity="output_channel", coupling=coupling, extra="none"
            )

        def evaluate(model: Any, counts: Any) -> float:
            config, start = resolved(model).with_counts(counts), self._edge.snapshot(model)
            params = self._edge.params(model)
            masked = self._edge.written(model, pp.apply_masks(params, pruner(params, None, config)))
            try:
                return float(given["evaluator"](masked))
            finally:
                self._edge.restored(model, start)

        def compress(model: Any, counts: Any) -> Any:
            config = resolved(model).with_counts(counts)
            self._model, self.config = model, config
            state = pp.admm.init(self._params(), config)
            for i in range(steps):
                for epoch in range(epochs):
                    self._train(i * epochs + epoch, state, rho)
                state, _ = pp.admm.step(self._params(), state, config, rho, pruner=pruner)
            masks = pruner(self._params(), None, config)
            coupling = config.allocation.coupling
            small = self._adapter.shrink(self._model, masks, coupling, *inputs)
            if small.model is None:
                raise ValueError(f"auto_compress: {small.reason}; use pp.search.auto_compress")
            return small.model

        found = pp.search.auto_compress(
            self._model,
            budget,
            problem=lambda model, aim: pp.search.problem(resolved(model), aim),
            evaluate=evaluate,
            compress=compress,
            key=jax.random.key(0),
            rounds=rounds,
            **options,
        )
        self._model, self.history = found.model, found.history
        return self.model
