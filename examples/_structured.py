"""What ``structured_flax.py`` and ``structured_torch.py`` have in common: sizes, rules, the table.

Nothing here knows a framework.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from digits import Data, batches, load_data
from rich import box
from rich.table import Table

STEM = 32
STAGES = {"stage1": (1, 1), "stage2": (2, 2), "stage3": (4, 2)}  # channels, in stems; stride
# All convolutions, half of the model's multiply-adds; the classifier's outputs are the ten digits.
RULES = [{"sparsity": 0.5, "op_types": ["Conv2d"]}]
# What counts in a unit: the kernels that make its channels and those that read them.
ROLES = ("source", "sink")
TRAINING_RATE, TUNING_RATE = 3e-3, 1e-3  # Adam's, with cosine decay


class Given(NamedTuple):
    """Data, which images every step trains on, ``(steps, batch)``, and how often to time a call."""

    data: Data
    training: np.ndarray
    tuning: np.ndarray
    repeats: int


class Row(NamedTuple):
    """What a model can do, and what it costs; further cells by the names of their columns."""

    name: str
    accuracy: float
    params: int
    macs: int
    milliseconds: float  # of all test images at once
    more: Mapping[str, str] = MappingProxyType({})


def given(description: str | None) -> Given:
    """Returns what to do, by the command line."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few seconds, for a smoke test")
    quick = parser.parse_args().quick
    data, seeds = load_data(), np.array([0])
    training, tuning = (1, 1) if quick else (10, 5)
    return Given(
        data,
        batches(data.train_images, seeds, training, 0)[0],
        batches(data.train_images, seeds, tuning, 1)[0],
        3 if quick else 30,
    )


def latencies(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Returns the median milliseconds of each call; they take turns, so that noise hits all."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(some) for name, some in times.items()}


def deviation(expected: np.ndarray, found: np.ndarray) -> float:
    """Returns the largest difference, relative to the largest value."""
    return float(np.abs(expected - found).max() / np.abs(expected).max())


def table(title: str, rows: Sequence[Row]) -> Table:
    view = Table(
        title=f"{title}; ms for 450 images", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False
    )
    view.add_column("", no_wrap=True)
    names = ("accuracy,\n%", "param-\neters", "MACs per\nimage", "ms")
    for name in (*names, *rows[0].more):
        view.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        cells = f"{100 * row.accuracy:.1f}", f"{row.params:,}", f"{row.macs:,}"
        view.add_row(row.name, *cells, f"{row.milliseconds:.1f}", *row.more.values())
    return view
