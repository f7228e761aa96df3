"""Schedules that go from one sparsity to another along a curve, and the one that goes at once."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from purepruning.arguments import fraction, whole_number
from purepruning.config.config import Pool
from purepruning.schedules.schedule import LAST_STEP, MOST_EVENTS, Schedule, too_many

Curve = Callable[[np.ndarray, float, float], np.ndarray]


def one_shot(step: int = 0) -> Schedule:
    """Returns the schedule that prunes once, at ``step``, to the final sparsity.

    Raises:
        ValueError, TypeError: ``step`` is none.
    """
    _step("step", step)
    return Schedule(functools.partial(_at_once, step))


def linear(
    *,
    begin_step: int | None = None,
    end_step: int | None = None,
    frequency: int | None = None,
    initial_sparsity: float | None = None,
    steps_per_epoch: int = 1,
) -> Schedule:
    r"""Returns the schedule whose sparsity grows evenly.

    $$s_t = s_i + (s_f - s_i) u, \qquad u = \frac{t - t_0}{t_1 - t_0}$$

    Otherwise as :func:`agp`. NNI's linear task generator with T iterations is
    ``linear(end_step=T)``; NNI 3.0's linear pruner is ``linear(begin_step=interval,
    end_step=T * interval, frequency=interval, initial_sparsity=final / T)``.
    """
    return _gradual(_line, begin_step, end_step, frequency, initial_sparsity, steps_per_epoch)


def agp(
    *,
    begin_step: int | None = None,
    end_step: int | None = None,
    frequency: int | None = None,
    initial_sparsity: float | None = None,
    steps_per_epoch: int = 1,
) -> Schedule:
    r"""Returns the schedule of automated gradual pruning: fast at first, slow towards the end.

    $$s_t = s_f + (s_i - s_f) (1 - u)^3, \qquad u = \frac{t - t_0}{t_1 - t_0}$$

    It prunes at step $t_0$, ``begin_step``, every ``frequency`` steps from there, and at step
    $t_1$, ``end_step``, whether or not the frequency divides the span: from there on the final
    sparsity holds, which is that of the config (:meth:`Schedule.init`).

    Where a rule has gradual keys (``initial_sparsity``, ``start_epoch``, ``end_epoch``,
    ``frequency``), they hold for its layers, and the arguments for what the rule does not say. Its
    times are epochs, as NNI counts them: ``end_epoch`` is the first epoch *not* pruned in, so that
    0 to 10 prunes in ten epochs, 0 to 9, and the last of them that is due prunes to the final
    sparsity.

    Zhu and Gupta 2017, arXiv:1710.01878; NNI's AGP pruner. NNI's AGP task generator with T
    iterations is ``agp(end_step=T)``.

    Args:
        begin_step: step of the first event; 0 unless given.
        end_step: step at which the final sparsity is reached.
        frequency: steps between events; 1 unless given.
        initial_sparsity: sparsity at ``begin_step``; 0 unless given.
        steps_per_epoch: how many steps an epoch of the rules has; 1 if a step of this schedule is
            an epoch.

    Raises:
        ValueError, TypeError: an argument is no step or no fraction; ``end_step`` is before
            ``begin_step``.
        ValueError: by ``init``, if neither rule nor argument says where to end, or the initial
            sparsity exceeds the final one.

    >>> import purepruning as pp
    >>> layer = pp.Layer("fc", "Linear", "fc.w", (100, 100), out_axes=(1,), in_axes=(0,))
    >>> rule = {"initial_sparsity": 0, "final_sparsity": 0.8, "start_epoch": 0, "end_epoch": 10}
    >>> config = pp.resolve([rule | {"frequency": 1, "op_types": ["default"]}], [layer])
    >>> agp().init(config).counts["fc"].tolist()
    [0, 0, 2381, 4235, 5629, 6628, 7297, 7703, 7912, 7989, 8000]
    """
    return _gradual(_cubic, begin_step, end_step, frequency, initial_sparsity, steps_per_epoch)


def cosine(
    *,
    begin_step: int | None = None,
    end_step: int | None = None,
    frequency: int | None = None,
    initial_sparsity: float | None = None,
    steps_per_epoch: int = 1,
) -> Schedule:
    r"""Returns the schedule whose sparsity follows half a cosine: slow at both ends.

    $$s_t = s_i + (s_f - s_i) \frac{1 - \cos \pi u}{2}, \qquad u = \frac{t - t_0}{t_1 - t_0}$$

    Otherwise as :func:`agp`.
    """
    return _gradual(
        _half_cosine, begin_step, end_step, frequency, initial_sparsity, steps_per_epoch
    )


def exponential(
    *,
    begin_step: int | None = None,
    end_step: int | None = None,
    frequency: int | None = None,
    initial_sparsity: float | None = None,
    steps_per_epoch: int = 1,
) -> Schedule:
    r"""Returns the schedule that prunes the same share of what is left every time.

    $$1 - s_t = (1 - s_i) \left(\frac{1 - s_f}{1 - s_i}\right)^u,
    \qquad u = \frac{t - t_0}{t_1 - t_0}$$

    Otherwise as :func:`agp`. From 0 in n rounds, each prunes $1 - (1 - s_f)^{1/n}$ of what is left:
    NNI's lottery ticket task generator with n iterations is ``exponential(end_step=n)``, but for
    the event at step 0, at which nothing is pruned.
    """
    return _gradual(_geometric, begin_step, end_step, frequency, initial_sparsity, steps_per_epoch)


def _line(u: np.ndarray, initial: float, final: float) -> np.ndarray:
    return initial + (final - initial) * u


def _cubic(u: np.ndarray, initial: float, final: float) -> np.ndarray:
    return final + (initial - final) * ((1 - u) * (1 - u) * (1 - u))


def _half_cosine(u: np.ndarray, initial: float, final: float) -> np.ndarray:
    return initial + (final - initial) * (1 - np.cos(math.pi * u)) / 2


def _geometric(u: np.ndarray, initial: float, final: float) -> np.ndarray:
    return 1 - (1 - initial) * ((1 - final) / (1 - initial)) ** u


class _Span(NamedTuple):
    """The arguments of a schedule: what holds where a rule does not say."""

    begin_step: int | None
    end_step: int | None
    frequency: int | None
    initial_sparsity: float | None
    steps_per_epoch: int


def _gradual(
    curve: Curve,
    begin_step: int | None,
    end_step: int | None,
    frequency: int | None,
    initial_sparsity: float | None,
    steps_per_epoch: int,
) -> Schedule:
    first = 0 if begin_step is None else _step("begin_step", begin_step)
    if end_step is not None:
        _step("end_step", end_step, first)
    if frequency is not None:
        _step("frequency", frequency, 1)
    _step("steps_per_epoch", steps_per_epoch, 1)
    if initial_sparsity is not None:
        initial_sparsity = fraction(initial_sparsity, "initial_sparsity")
    span = _Span(begin_step, end_step, frequency, initial_sparsity, steps_per_epoch)
    return Schedule(functools.partial(_along, curve, span))


def _at_once(step: int, pool: Pool, final: float) -> list[tuple[int, float]]:
    return [(step, final)]


def _along(curve: Curve, span: _Span, pool: Pool, final: float) -> np.ndarray:
    """Returns the steps of all events and their sparsities, ``(events, 2)``."""
    initial, begin, end, frequency = _of_rule(pool, span)
    if initial > final:
        raise ValueError(
            f"rule {pool.rule}: {pool.name!r} would begin at sparsity {initial:g}, above the final "
            f"one of {final:g}"
        )
    number = -((begin - end) // frequency) + 1
    if number > MOST_EVENTS:
        raise ValueError(too_many(f"rule {pool.rule}: the events of {pool.name!r}", number))
    steps = np.append(np.arange(begin, end, frequency, dtype=np.float64), end)
    shares = np.full(len(steps), final)
    if initial != final and len(steps) > 1:
        shares[:-1] = curve((steps[:-1] - begin) / (end - begin), initial, final)
    return np.stack([steps, shares], axis=1)


def _of_rule(pool: Pool, span: _Span) -> tuple[float, int, int, int]:
    """Returns the initial sparsity, first and last step and frequency that hold for a pool."""
    rule, epoch = pool.gradual, span.steps_per_epoch
    initial, begin, frequency, end = (
        span.initial_sparsity or 0.0,
        span.begin_step or 0,
        span.frequency or 1,
        span.end_step,
    )
    if rule is not None:
        initial = initial if rule.initial_sparsity is None else rule.initial_sparsity
        begin = begin if rule.start_epoch is None else rule.start_epoch * epoch
        frequency = frequency if rule.frequency is None else rule.frequency * epoch
        if rule.end_epoch is not None:
            # The last event before the epoch in which nothing is pruned any more.
            end = begin + max(0, rule.end_epoch * epoch - begin - 1) // frequency * frequency
    if end is None:
        raise ValueError(
            f"rule {pool.rule}: nothing says when {pool.name!r} reaches its final sparsity; give "
            "the schedule end_step=..., or the rule 'end_epoch'"
        )
    if end < begin:
        raise ValueError(
            f"rule {pool.rule}: {pool.name!r} would begin at step {begin} and end at step {end}"
        )
    return initial, begin, end, frequency


def _step(name: str, value: object, least: int = 0) -> int:
    return whole_number(value, name, least, LAST_STEP - 1)
