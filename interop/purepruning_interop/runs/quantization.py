"""The stages of steps that quantise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import purepruning as pp
from purepruning_interop.recipes.quantizer import Quantizer
from purepruning_interop.runs.work import Stage, State, Work
from purepruning_interop.tasks import Objective

FILE = "quantized.safetensors"
#: Quantizers that have no integer for zero.
_NO_ZERO = ("dorefa", "bnn")


def quantized(work: Work, *, pruned: bool) -> Stage:
    """Returns the stage that trains with quantised weights and activations, and writes integers.

    The state's parameters are the latent ones. What is pruned stays zero after it is quantised.
    Without epochs, ranges of activations are those of the task's batches.

    Args:
        work: the step.
        pruned: whether a step before prunes.

    Raises:
        ValueError: the task lacks something; or this quantizer does not leave zeros.
    """
    use = work.step.use
    if pruned and use in _NO_ZERO:
        raise ValueError(
            f"{use} has no integer for zero, so pruned weights would come back; use 'qat' or "
            "'naive' after pruning"
        )
    quantizer = Quantizer(use, work.rules(), work.task.layers, tuple(work.task.activations))
    work.needs("minimize", "loss")
    if quantizer.config.activations:
        work.needs("loss_at", "evaluate_at", "batches")
    of = _Quantized(work, quantizer)
    epochs = work.epochs
    what = f"quantise, {epochs} epochs" if epochs else "quantise"
    return work.stage(what, of.do, extra=of.extra, score=of.score, write=of.write)


class _Quantized:
    def __init__(self, work: Work, quantizer: Quantizer) -> None:
        self._work, self._quantizer = work, quantizer

        def loss(params: Any, extra: Any, batch: Any) -> tuple[Any, Any]:
            state, masks = extra
            value, state = self._loss(params, state, masks, batch)
            return value, (state, masks)

        self._objective = Objective(loss, quantizer.clip)

    def extra(self) -> Any:
        return {"quantizer": self._quantizer.init(self._work.first)}

    def do(self, state: State) -> State:
        begin = self._quantizer.init(state.params)
        if self._work.epochs:
            extra = (begin, state.masks)
            found = self._work.minimize(self._objective, extra, state, 1, self._work.epochs)
            params, (after, _) = found
        else:
            params, after = state.params, begin
            batches = self._work.task.batches if self._quantizer.config.activations else ()
            for batch in batches:
                after = self._loss(params, after, state.masks, batch)[1]
        return State(params, state.masks, {"quantizer": after})

    def score(self, state: State) -> Any:
        task, whole = self._work.task, self._quantizer.finished(state.extra["quantizer"])
        weights = self._weights(state.params, whole, state.masks)
        if not self._quantizer.config.activations:
            return task.evaluate(weights)
        assert task.evaluate_at is not None  # it was checked
        return task.evaluate_at(weights, self._quantizer.activations(whole, training=False))

    def write(self, state: State, folder: Path) -> dict[str, str]:
        masks, params = state.masks, state.params
        params = params if masks is None else pp.apply_masks(params, masks)
        return self._quantizer.save(folder / FILE, params, state.extra["quantizer"])

    def _loss(self, params: Any, state: Any, masks: Any, batch: Any) -> tuple[Any, Any]:
        task, quantizer = self._work.task, self._quantizer
        weights = self._weights(params, state, masks)
        if not quantizer.config.activations:
            assert task.loss is not None  # it was checked
            return task.loss(weights, batch), quantizer.update(state, {})
        assert task.loss_at is not None  # it was checked
        at = quantizer.activations(state, training=True)
        value, seen = task.loss_at(weights, batch, at)
        return value, quantizer.update(state, seen)

    def _weights(self, params: Any, state: Any, masks: Any) -> Any:
        weights = self._quantizer.weights(params, state)
        return weights if masks is None else pp.apply_masks(weights, masks)
