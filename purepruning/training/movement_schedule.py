"""How much movement pruning asks for at each step: tables, made before training."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from purepruning.arguments import instance, shown, whole_number
from purepruning.arrays import has_values, int32, is_array, is_concrete, namespace
from purepruning.config.config import Config, check_config, known_counts
from purepruning.counts import counts_of
from purepruning.granularity import NM

#: The longest tables of steps that are made: they have a row for every step.
MOST_STEPS = 10**8


def ramp(steps: int, *, begin_step: int, end_step: int) -> np.ndarray:
    r"""Returns how much of the final sparsity is asked for at each step, float32 ``(steps,)``.

    $$r_t = 1 - \left(1 - \frac{t - t_0}{t_1 - t_0}\right)^3$$

    for a step before which t were taken; 0 up to ``begin_step`` ($t_0$) and 1 from ``end_step``
    ($t_1$) on. A table made in float64, to index or to scan over; :func:`at` clips the index. Zhu
    and Gupta 2017, arXiv:1710.01878, eq. 1, as in Sanh et al. 2020; NNI's scale.

    Args:
        steps: length of the training run.
        begin_step: how many steps there are before anything is pruned; at least 0.
        end_step: the step at which the final sparsity is reached; after ``begin_step``, and not
            after ``steps``.

    Raises:
        TypeError, ValueError: they are no such integers.

    >>> ramp(6, begin_step=1, end_step=5).tolist()
    [0.0, 0.0, 0.578125, 0.875, 0.984375, 1.0]
    """
    return _ramp("movement.ramp", steps, begin_step, end_step).astype(np.float32)


def schedule(config: Config, steps: int, *, begin_step: int, end_step: int) -> Config:
    """Returns the configs of all steps in one: counts are tables ``(steps,)``, int32.

    Row t holds :func:`ramp` at t of the final counts, those of ``config``, rounded down as
    everywhere (:func:`purepruning.count_of`). Scan over it together with the batches, or take the
    row of a step with :func:`at`. Counts of ``config`` may be arrays; tables then have ``steps`` as
    their last axis, and ``vmap`` over the first.

    Args:
        config: the resolved rules.
        steps, begin_step, end_step: as in :func:`ramp`.

    Raises:
        TypeError, ValueError: as :func:`ramp`; a count is missing or traced, a rule has a gradual
            schedule of its own, or the config is of N:M, whose counts are fixed.

    >>> from purepruning import Layer, resolve
    >>> layer = Layer("fc", "Linear", "fc.w", (4, 25), out_axes=(1,), in_axes=(0,))
    >>> config = resolve([{"sparsity": 0.5, "op_types": ["Linear"]}], [layer])
    >>> schedule(config, 6, begin_step=1, end_step=5).counts["fc"].tolist()
    [0, 0, 28, 43, 49, 50]
    """
    where = "movement.schedule"
    check_config(where, config)
    share = _ramp(where, steps, begin_step, end_step)
    tables = {}
    for pool in config.pools:
        if pool.gradual is not None:
            raise ValueError(
                f"{where}: rule {pool.rule} has gradual keys, but steps come from begin_step and "
                "end_step; give the rule a 'sparsity' instead"
            )
        if isinstance(config.granularity, NM):
            raise ValueError(f"{where}: the sparsity of {config.granularity} is fixed")
        final = known_counts(where, pool, config.counts[pool.name])[..., None]
        tables[pool.name] = np.asarray(pool.allow(counts_of(share, final)), np.int32)
    return dataclasses.replace(config, counts=tables)


def at(configs: Config, step: Any) -> Config:
    """Returns the config of one step, of what :func:`schedule` returned.

    Args:
        configs: the schedule.
        step: how many steps were taken before; may be traced. Beyond the end, the last one's.

    Raises:
        TypeError: ``step`` is no integer.
        ValueError: it is negative; ``configs`` is no schedule.
    """
    where = "movement.at"
    instance(configs, Config, f"{where}: configs", "what movement.schedule returned")
    check_config(where, configs)
    if isinstance(step, int | np.integer) and not isinstance(step, bool):
        whole_number(step, f"{where}: step", 0)
    elif not is_array(step) or not namespace(step).isdtype(step.dtype, "integral"):
        raise TypeError(f"{where}: step must be an integer, got {shown(step)}")
    elif not has_values(step) or tuple(step.shape):
        raise ValueError(f"{where}: step must be one integer, got {shown(step)}; vmap over several")
    for name, table in configs.counts.items():
        if not is_array(table) or not table.ndim:
            raise ValueError(f"{where}: the counts of {name!r} are no table made by schedule")
    return configs.with_counts({n: _row(table, step) for n, table in configs.counts.items()})


def _row(table: Any, step: Any) -> Any:
    last = table.shape[-1] - 1
    if not hasattr(step, "dtype"):
        row = table[..., min(step, last)]
        return row if row.ndim else int(row) if is_concrete(row) else row
    xp = namespace(step)
    index = xp.reshape(xp.clip(int32(xp, step, step), 0, last), (1,))
    return xp.take(int32(xp, table, step), index, axis=-1)[..., 0]


def _ramp(where: str, steps: Any, begin_step: Any, end_step: Any) -> np.ndarray:
    given = {"steps": steps, "begin_step": begin_step, "end_step": end_step}
    steps, begin_step, end_step = (
        whole_number(value, f"{where}: {name}", 0, MOST_STEPS) for name, value in given.items()
    )
    if not 0 <= begin_step < end_step <= steps:
        raise ValueError(
            f"{where}: expected 0 <= begin_step < end_step <= steps, got begin_step={begin_step}, "
            f"end_step={end_step}, steps={steps}"
        )
    left = (end_step - np.arange(steps, dtype=np.float64)) / (end_step - begin_step)
    return 1 - np.clip(left, 0, 1) ** 3
