"""What ``agp_flax.py`` and ``agp_torch.py`` have in common: rules, numbers to begin with, tables.

Nothing here knows a framework. Matrices are NumPy's, ``(in, out)``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from digits import batches, load_data
from rich import box
from rich.table import Table

# NNI's own example of its AGP pruner: from 0 to 80 % in ten epochs, 0 to 9.
RULES = [
    {
        "initial_sparsity": 0,
        "final_sparsity": 0.8,
        "start_epoch": 0,
        "end_epoch": 10,
        "frequency": 1,
        "op_types": ["default"],
    }
]
EPOCHS = 10
RATE, MOMENTUM = 0.05, 0.9
SIZES = {"hidden1": (64, 300), "hidden2": (300, 100), "classifier": (100, 10)}


class Numbers(NamedTuple):
    """What both frameworks begin with; digits are rows of 64 pixels, batches their numbers."""

    weights: dict[str, np.ndarray]
    images: np.ndarray
    labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    batches: np.ndarray  # (epochs, steps, batch)


class Run(NamedTuple):
    """What became of it: an entry for every epoch, at its end, but ``asked``: at its beginning."""

    framework: str
    asked: list[dict[str, int]]
    masks: list[dict[str, np.ndarray]]
    weights: list[dict[str, np.ndarray]]
    accuracies: list[float]


def numbers(seed: int = 0) -> Numbers:
    data, rng = load_data(), np.random.default_rng(seed)
    weights = {
        name: rng.normal(0, np.sqrt(2 / shape[0]), shape).astype(np.float32)
        for name, shape in SIZES.items()
    }
    order = batches(data.train_images, np.array([seed]), EPOCHS, 0)
    return Numbers(
        weights,
        data.train_images.reshape(-1, 64),
        data.train_labels,
        data.test_images.reshape(-1, 64),
        data.test_labels,
        order.reshape(EPOCHS, -1, order.shape[-1]),
    )


def sequence(run: Run) -> Table:
    """Returns what the schedule asked for, next to the zeros that there are."""
    view = _table(f"AGP in {run.framework}: 0 to 80 % in ten epochs")
    for name in ("epoch", "asked", "asked, %", *SIZES, "accuracy, %"):
        view.add_column(name, justify="right", no_wrap=True)
    size = sum(a * b for a, b in SIZES.values())
    for epoch, (asked, weights) in enumerate(zip(run.asked, run.weights, strict=True)):
        total = sum(asked.values())
        zeros = [str(int((weights[name] == 0).sum())) for name in SIZES]
        cells = f"{total}", f"{100 * total / size:.1f}", *zeros
        view.add_row(str(epoch), *cells, f"{100 * run.accuracies[epoch]:.1f}")
    return view


def agreement(one: Run, other: Run, again: Sequence[Mapping[str, np.ndarray]]) -> Table:
    """Returns how many bits of the masks are the same, epoch by epoch.

    ``again`` are masks that the framework of ``other`` found for the weights of ``one``.
    """
    view = _table(f"Bits of the masks that are the same in {one.framework} and {other.framework}")
    for name in ("epoch", "each trained by itself", "different", "pruned from the same weights"):
        view.add_column(name, justify="right", no_wrap=True)
    for epoch, (a, b, c) in enumerate(zip(one.masks, other.masks, again, strict=True)):
        size = sum(mask.size for mask in a.values())
        own, shared = ([int((a[n] == m[n]).sum()) for n in SIZES] for m in (b, c))
        first, second = f"{sum(own)} of {size}", f"{sum(shared)} of {size}"
        view.add_row(str(epoch), first, str(size - sum(own)), second)
    return view


def _table(title: str) -> Table:
    return Table(title=title, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
