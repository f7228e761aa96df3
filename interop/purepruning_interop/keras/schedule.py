"""Pruning while ``fit`` goes on, on schedule; and the schedules of tfmot by their arguments."""

from __future__ import annotations

import functools
from typing import Any

import keras
import numpy as np

from purepruning.arguments import fraction, function, instance, one_of, scalar, whole_number
from purepruning.arrays import is_concrete
from purepruning.config.config import Config, Pool, Pruner, check_config
from purepruning.schedules.schedule import MOST_EVENTS, Schedule, too_many
from purepruning_interop.keras.optimizer import get_masks, set_masks
from purepruning_interop.keras.variables import params


class PruneOnSchedule(keras.callbacks.Callback):
    """A callback for ``fit``: a pruner makes the masks anew when a schedule says so.

    At a step that is due, the pruner ranks the variables as they are before the step; what is
    pruned stays pruned, and masks go to :class:`KeepPruned`, which the model must be compiled with.
    Between them nothing is copied from the device. Steps are counted by the optimizer, so that
    another ``fit``, or one of a model that was saved and loaded, goes on where the last one ended.

    Args:
        pruner: ``(params, stats, config) -> masks``, such as ``pp.level``.
        schedule: what to prune when: ``pp.agp(...)``, :func:`PolynomialDecay`, ...
        config: the resolved rules, on the table of this model.
        every: whether a step of the schedule is a ``"batch"`` or an ``"epoch"``.
        stats: statistics for the pruner: a function of the model, called when it is due.

    Raises:
        TypeError, ValueError: an argument is of a wrong type; by ``fit``, as
            :meth:`purepruning.Schedule.init`, the pruner and :func:`set_masks`.
    """

    def __init__(
        self,
        pruner: Pruner,
        schedule: Schedule,
        config: Config,
        *,
        every: str = "batch",
        stats: Any = None,
    ) -> None:
        super().__init__()
        function(pruner, "PruneOnSchedule: pruner", "a function (params, stats, config) -> masks")
        instance(schedule, Schedule, "PruneOnSchedule: schedule", "a Schedule, such as agp(...)")
        check_config("PruneOnSchedule", config)
        one_of("PruneOnSchedule: every", every, ("batch", "epoch"))
        if stats is not None:
            function(stats, "PruneOnSchedule: stats", "a function of the model, or None")
        self._pruner, self._schedule, self._config = pruner, schedule, config
        self._every, self._stats = every, stats
        self._state = schedule.init(config)
        self._times = frozenset(self._state.times.tolist())
        self._step = self._stride = 0

    def on_train_begin(self, logs: Any = None) -> None:
        """Looks how many steps were taken, and how many are taken at once."""
        get_masks(self.model)  # which says so where the model has no place for masks
        self._step = int(self.model.optimizer.iterations)
        self._stride = self.model.steps_per_execution

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Prunes if one of the next steps is due."""
        if self._every == "batch":
            for step in range(self._step, self._step + self._stride):
                self._take(step)
            self._step += self._stride

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Prunes if the epoch is due."""
        if self._every == "epoch":
            self._take(epoch)

    def _take(self, step: int) -> None:
        if step not in self._times:
            return
        _, event = self._schedule.step(self._state._replace(step=np.asarray(step, np.int32)))
        config = self._config.with_counts(event.counts).with_masks(get_masks(self.model))
        stats = None if self._stats is None else self._stats(self.model)
        set_masks(self.model, self._pruner(params(self.model), stats, config))


def ConstantSparsity(
    target_sparsity: float, begin_step: int, end_step: int = -1, frequency: int = 100
) -> Schedule:
    """Returns the schedule that prunes to one sparsity at ``begin_step``, as tfmot's of this name.

    tfmot makes the masks anew every ``frequency`` steps until ``end_step``, by weights of which the
    pruned ones are zero; here what is pruned stays pruned, so that this would change nothing. The
    sparsity is this one for all layers of the config, whatever its rules say. Steps begin at 0: the
    model is pruned before its first batch, where tfmot waits for the first multiple of
    ``frequency``.

    Args:
        target_sparsity: in [0, 1).
        begin_step: when to prune.
        end_step: -1, or a step from ``begin_step`` on.
        frequency: at least 1.

    Raises:
        ValueError, TypeError: an argument is outside of these.

    >>> ConstantSparsity(0.5, 200, frequency=10).events(None, 0.0)
    [(200, 0.5)]
    """
    where = "ConstantSparsity: "
    target = _sparsity(f"{where}target_sparsity", target_sparsity)
    begin = whole_number(begin_step, f"{where}begin_step", 0)
    if end_step != -1:
        _end_step(where, end_step, begin)
    whole_number(frequency, f"{where}frequency", 1)
    return Schedule(functools.partial(_once, begin, target))


def PolynomialDecay(
    initial_sparsity: float,
    final_sparsity: float,
    begin_step: int,
    end_step: int,
    power: float = 3,
    frequency: int = 100,
) -> Schedule:
    r"""Returns the schedule of gradual pruning by the arguments of tfmot's of this name.

    $$s_t = s_f + (s_i - s_f) (1 - u)^p, \qquad u = \frac{t - t_0}{t_1 - t_0}$$

    at ``begin_step``, every ``frequency`` steps from there, and at ``end_step``, also where the
    frequency does not divide the span: tfmot then ends below the final sparsity. Sparsities become
    counts exactly, and ties are broken by position. They are these for all layers of the config,
    whatever its rules say. Steps begin at 0. Zhu and Gupta 2017, arXiv:1710.01878.

    Args:
        initial_sparsity: at ``begin_step``, in [0, 1).
        final_sparsity: at ``end_step``, in [0, 1), at least the initial one.
        begin_step: step of the first event.
        end_step: step of the last event, from ``begin_step`` on.
        power: exponent p, above 0.
        frequency: steps between events, at least 1.

    Raises:
        ValueError, TypeError: an argument is outside of these.

    >>> PolynomialDecay(0.0, 0.8, 0, 4, power=1, frequency=2).events(None, 0.0).tolist()
    [[0.0, 0.0], [2.0, 0.4], [4.0, 0.8]]
    """
    where = "PolynomialDecay: "
    initial = _sparsity(f"{where}initial_sparsity", initial_sparsity)
    final = _sparsity(f"{where}final_sparsity", final_sparsity)
    if initial > final:
        raise ValueError(
            f"{where}initial_sparsity must be at most final_sparsity, since what is pruned stays "
            f"pruned, got {initial:g} and {final:g}"
        )
    begin = whole_number(begin_step, f"{where}begin_step", 0)
    end = _end_step(where, end_step, begin)
    exponent = scalar(power, f"{where}power")
    if not is_concrete(exponent):
        raise TypeError(
            f"{where}power must be a known number, got one that jit or vmap traces; make the "
            "schedule outside of them"
        )
    every = whole_number(frequency, f"{where}frequency", 1)
    number = (end - begin) // every + 1
    if number > MOST_EVENTS:
        raise ValueError(too_many(f"{where}the events until end_step", number))
    steps = np.unique(np.append(np.arange(begin, end, every, dtype=np.float64), end))
    left = (end - steps) / max(end - begin, 1)
    shares = final + (initial - final) * left**exponent
    return Schedule(functools.partial(_at, np.stack([steps, shares], axis=1)))


def _end_step(where: str, value: Any, begin: int) -> int:
    end = whole_number(value, f"{where}end_step", 0)
    if end < begin:
        raise ValueError(
            f"{where}begin_step must be at most end_step, got {begin} and {end}; give a later "
            "end_step"
        )
    return end


def _sparsity(where: str, value: Any) -> float:
    found = fraction(value, where)
    if found == 1:
        raise ValueError(f"{where} must lie in [0, 1), got {found:g}")
    return found


def _once(step: int, sparsity: float, pool: Pool, final: float) -> list[tuple[int, float]]:
    return [(step, sparsity)]


def _at(events: np.ndarray, pool: Pool, final: float) -> np.ndarray:
    return events
