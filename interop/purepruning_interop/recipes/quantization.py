"""Compressors that quantise."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from purepruning_interop.recipes.compressor import Compressor
from purepruning_interop.recipes.quantizer import Quantizer


class Quantizing(Compressor):
    """Weights and activations, fake-quantised at each call."""

    def _resolve(self) -> None:
        # In JAX the functions are found in the program, which needs inputs.
        seen = self._name == "torch" or self._inputs is not None
        acts = self._adapter.activations(*self._first(), *(self._inputs or ())) if seen else ()
        self._quantizer = Quantizer(self._step.use, self._rules(), self._layers(), tuple(acts))
        self.config = self._quantizer.config
        self.state = self._quantizer.init(self._params())

    def _compress(self, eval_args: Any, finetune_args: Any) -> Any:
        """Returns the quantised model: a torch module, or ``(model, state, *inputs)`` in JAX."""
        return self._edge.quantized(self._model, self._forward)

    def _forward(self, *args: Any) -> Any:
        """The quantised model: of torch a module's call; in JAX ``(model, state, *inputs)``."""
        if self._name == "torch":
            model, inputs, training = args
            result, seen = self._quantised(model, self.state, inputs, training)
            if training:
                self.state = self._quantizer.update(self.state, _detached(seen))
            return result
        model, state, *inputs = args
        bound = self._edge.Bound(self._model.module, model) if self._name == "linen" else model
        return self._quantised(bound, state, inputs, True)

    def update_state(self, seen: Mapping[str, Any]) -> None:
        """Takes what a step has seen at quantised activations, in JAX; torch does it by itself."""
        self.state = self._quantizer.update(self.state, seen)

    def step(self, model: Any = None) -> Any:
        """Returns the model after an optimizer's step: BNN's weights clipped."""
        self._take(model)
        if self._step.use == "bnn":
            self._write(self._quantizer.clip(self._params()))
        return self.model

    def _quantised(self, model: Any, state: Any, inputs: Any, training: bool) -> Any:
        weights = self._quantizer.weights(self._edge.params(model), state)
        at = self._quantizer.activations(state, training=training)
        return self._edge.replace(model, weights, tuple(inputs), at)

    def _write_files(
        self, file: Path, masks: Path | None, speedup: bool, dummy_input: Any
    ) -> dict[str, str]:
        files = self._quantizer.save(file, self._params(), self.state)
        return {"model": files["quantized"], "calibration": files["calibration"]}


def _detached(seen: Any) -> Any:
    return jax.tree.map(lambda x: x.detach() if hasattr(x, "detach") else x, seen)
