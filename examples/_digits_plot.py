"""The plot of ``digits.py``: accuracy against sparsity."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = {  # distinct for colour-blind eyes too (Okabe and Ito)
    "level": "#0072b2",
    "l1_norm": "#0072b2",
    "l2_norm": "#d55e00",
    "fpgm": "#009e73",
    "random": "#777777",
}
MARKERS = {"level": "o", "l1_norm": "o", "l2_norm": "s", "fpgm": "^", "random": "x"}
UNITS = {"element": "single weights", "output_channel": "whole channels"}
STAGES = {"pruned": "after pruning", "tuned": "after fine-tuning"}
FRAMEWORKS = {"flax": "JAX and Flax", "torch": "PyTorch"}


def write(
    path: Path, framework: str, dense: np.ndarray, results: Sequence[Any], settings: Any
) -> None:
    """Writes a plot with a column for each kind of unit, and a row for each stage."""
    figure = Figure(figsize=(8, 6.2), layout="constrained")
    grid = figure.subplots(len(STAGES), len(UNITS), sharex=True, sharey=True)
    for row, stage in zip(grid, STAGES, strict=True):
        for axes, units in zip(row, UNITS, strict=True):
            axes.set_title(f"{UNITS[units]}, {STAGES[stage]}", fontsize=10)
            axes.axhline(100 * dense.mean(), color="black", linewidth=0.8, linestyle=":")
            for result in results:
                if result.method.granularity == units:
                    _curve(axes, result.method.name, settings, getattr(result, stage))
            axes.grid(alpha=0.2)
            axes.spines[["top", "right"]].set_visible(False)
    _label(grid, settings)
    figure.suptitle(
        f"A small CNN on scikit-learn's digits, {FRAMEWORKS[framework]}\n"
        f"mean of {len(dense)} seeds, bands from worst to best, dotted: before pruning",
        fontsize=11,
    )
    figure.savefig(path, dpi=150)


def _curve(axes: Axes, name: str, settings: Any, accuracies: np.ndarray) -> None:
    """Draws the mean of ``accuracies (seeds, sparsities)`` in a band from worst to best."""
    x, y, colour = 100 * np.array(settings.sparsities), 100 * accuracies, COLOURS[name]
    axes.fill_between(x, y.min(axis=0), y.max(axis=0), color=colour, alpha=0.12, linewidth=0)
    axes.plot(x, y.mean(axis=0), color=colour, marker=MARKERS[name], markersize=4.5, label=name)


def _label(grid: np.ndarray, settings: Any) -> None:
    for axes in grid[:, 0]:
        axes.set_ylabel("test accuracy, %")
    for axes in grid[-1]:
        axes.set_xlabel("sparsity, %")
        axes.set_xticks([100 * s for s in settings.sparsities])
        axes.legend(loc="lower left", frameon=False)  # here the curves leave room
    grid[0, 0].set_ylim(0, 102)
