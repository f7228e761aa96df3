"""Compressors that quantise."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

import purepruning as pp
from purepruning.quantize import integers, observers
from purepruning_interop.recipes.compressor import Compressor


class Quantizing(Compressor):
    """Weights and activations, fake-quantised at each call."""

    def _resolve(self) -> None:
        # In JAX the functions are found in the program, which needs inputs.
        seen = self._name == "torch" or self._inputs is not None
        acts = self._adapter.activations(*self._first(), *(self._inputs or ())) if seen else ()
        recipe: Any = pp.from_nni(self._step.use, self._rules(), self._layers(), activations=acts)
        self._quantizer, self.config = recipe.quantizer, recipe.config
        if hasattr(self._quantizer, "init"):
            self.state = self._quantizer.init(self._params(), self.config)

    def _compress(self, eval_args: Any, finetune_args: Any) -> Any:
        """Returns the quantised model: a torch module, or ``(model, state, *inputs)`` in JAX."""
        return self._edge.quantized(self._model, self._forward)

    def _forward(self, *args: Any) -> Any:
        """The quantised model: of torch a module's call; in JAX ``(model, state, *inputs)``."""
        if self._name == "torch":
            model, inputs, training = args
            result, seen = self._quantised(model, self.state, inputs, training)
            if training and hasattr(self._quantizer, "update"):
                self.state = self._quantizer.update(self.state, _detached(seen), self.config)
            return result
        model, state, *inputs = args
        bound = self._edge.Bound(self._model.module, model) if self._name == "linen" else model
        return self._quantised(bound, state, inputs, True)

    def update_state(self, seen: Mapping[str, Any]) -> None:
        """Takes what a step has seen at quantised activations, in JAX; torch does it by itself."""
        if hasattr(self._quantizer, "update"):
            self.state = self._quantizer.update(self.state, seen, self.config)

    def _quantised(self, model: Any, state: Any, inputs: Any, training: bool) -> Any:
        weights = self._quantizer.weights(self._edge.params(model), state, self.config)
        at: dict[str, Any] = {}
        if self._step.use == "qat":
            at = self._quantizer.activations(state, self.config, training=training)
        elif self.config.activations:
            at = self._quantizer.activations(self.config)
        return self._edge.replace(model, weights, tuple(inputs), at)

    def _write_files(
        self, file: Path, masks: Path | None, speedup: bool, dummy_input: Any
    ) -> dict[str, str]:
        params, quantizer = self._params(), self._quantizer
        by_weight = self._step.use in ("qat", "naive")
        levels = (
            quantizer.levels(params, self.config) if by_weight else quantizer.levels(self.config)
        )
        # Counted as trained: a start step says when training begins to quantise.
        state = self.state
        if state is not None:
            start = max([t.start_step for t in self.config.targets], default=0)
            state = state._replace(step=state.step * 0 + max(start, 1))
        weights = quantizer.weights(params, state, self.config)
        whole = integers.of(weights, levels, self.config)
        ranges = observers.ranges(self.state.averages) if self.state is not None else {}
        if not ranges and self.config.activations:
            unit = {"dorefa": (0.0, 1.0), "bnn": (-1.0, 1.0)}[self._step.use]
            ends = observers.Range(*map(np.float32, unit))
            ranges = {t.site: ends for t in self.config.activations}
        pp.save_quantized(file, weights, whole, ranges, self.config)
        return {"model": str(file), "calibration": str(file.with_suffix(".json"))}


class BNN(Quantizing):
    """Binary weights, whose latent ones are clipped."""

    def step(self, model: Any = None) -> Any:
        """Returns the model with its weights clipped."""
        self._take(model)
        self._write(self._quantizer.clip(self._params(), self.config))
        return self.model


def _detached(seen: Any) -> Any:
    return jax.tree.map(lambda x: x.detach() if hasattr(x, "detach") else x, seen)
