"""A quantizer by its rules: its functions of one shape, whether or not it has a state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import purepruning as pp
from purepruning.quantize import integers, observers

#: Ranges of activations that do not depend on any.
_FIXED = {"dorefa": (0.0, 1.0), "bnn": (-1.0, 1.0)}


class Quantizer:
    """One of :mod:`purepruning.quantize`, closed over its config.

    Attributes:
        use: its name.
        config: the resolved rules.
    """

    def __init__(
        self,
        use: str,
        rules: Sequence[Mapping[str, Any]],
        layers: Any,
        activations: tuple[pp.Activation, ...],
    ) -> None:
        recipe: Any = pp.from_nni(use, rules, layers, activations=activations)
        self.use, self.config, self._module = use, recipe.config, recipe.quantizer

    @property
    def has_state(self) -> bool:
        """Whether it has one: the step, and ranges of activations."""
        return hasattr(self._module, "init")

    def init(self, params: Any) -> Any:
        """Returns the state before the first step, None if there is none."""
        return self._module.init(params, self.config) if self.has_state else None

    def update(self, state: Any, seen: Mapping[str, Any]) -> Any:
        """Returns the state after a step."""
        return self._module.update(state, seen, self.config) if self.has_state else state

    def weights(self, params: Any, state: Any) -> Any:
        """Returns params with quantised weights."""
        return self._module.weights(params, state, self.config)

    def activations(self, state: Any, *, training: bool) -> dict[str, Any]:
        """Returns the functions at sites."""
        if not self.config.activations:
            return {}
        if self.has_state:
            found: dict[str, Any] = self._module.activations(state, self.config, training=training)
            return found
        fixed: dict[str, Any] = self._module.activations(self.config)
        return fixed

    def clip(self, params: Any) -> Any:
        """Returns what latent weights are after a step: BNN's clipped, others as they are."""
        return self._module.clip(params, self.config) if self.use == "bnn" else params

    def finished(self, state: Any) -> Any:
        """Returns the state as trained: a start step says when training begins to quantise."""
        if state is None:
            return None
        start = max([t.start_step for t in self.config.targets], default=0)
        return state._replace(step=state.step * 0 + max(start, 1))

    def save(self, file: Path, params: Any, state: Any) -> dict[str, str]:
        """Writes integers and calibration; returns the files by kind."""
        levels = self._module.levels
        of = levels(self.config) if self.use in _FIXED else levels(params, self.config)
        weights = self.weights(params, self.finished(state))
        whole = integers.of(weights, of, self.config)
        ranges: dict[str, Any] = observers.ranges(state.averages) if state is not None else {}
        if not ranges and self.config.activations:
            ends = observers.Range(*map(np.float32, _FIXED[self.use]))
            ranges = {t.site: ends for t in self.config.activations}
        pp.save_quantized(file, weights, whole, ranges, self.config)
        return {"quantized": str(file), "calibration": str(file.with_suffix(".json"))}
