"""What ``torch.load`` may build from a file of weights: the states of this library."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from purepruning.schedules.schedule import ScheduleState
from purepruning.stats.accumulate import CompensatedSum, WideCount
from purepruning.stats.activations import ActivationStats
from purepruning.stats.gradients import GradientStats
from purepruning.training import admm
from purepruning.training.lottery import LotteryState

#: Named tuples of tensors, and NumPy's arrays, which schedules count with.
_STATES = (
    ScheduleState,
    LotteryState,
    ActivationStats,
    GradientStats,
    WideCount,
    CompensatedSum,
    admm.State,
)
_NUMPY: tuple[Any, ...] = (
    np.empty(0).__reduce__()[0],
    np.ndarray,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("bool", "int32", "int64", "float32", "float64")),
)


def allow() -> None:
    """Lets ``torch.load`` read the states of this library, which run nothing when they are built.

    By default it builds nothing but tensors and Python's containers (``weights_only=True``).
    """
    torch.serialization.add_safe_globals([*_STATES, *_NUMPY])
