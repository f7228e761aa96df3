"""The plot of ``criteria.py``: accuracy against sparsity, with error bars."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _digits_plot import STAGES
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = {  # distinct for colour-blind eyes too (Okabe and Ito); no two in one panel
    "level": "#0072b2",
    "l1_norm": "#0072b2",
    "l2_norm": "#56b4e9",
    "fpgm": "#009e73",
    "slim": "#009e73",
    "taylor_fo": "#d55e00",
    "taylor_fo grouped": "#8b2e00",
    "apoz_rank": "#b8a600",
    "mean_activation_rank": "#e69f00",
    "admm": "#000000",
    "movement": "#cc79a7",
    "random": "#777777",
}
MARKERS = dict(zip(COLOURS, "oosv^DdPXs*x", strict=True))


def write(path: Path, outcomes: Sequence[Any], settings: Any) -> None:
    """Writes a plot with a column for each comparison, and a row for each stage."""
    figure = Figure(figsize=(13, 8), layout="constrained")
    grid = figure.subplots(len(STAGES), len(outcomes), sharex=True, sharey="row")
    for row, stage in zip(grid, STAGES, strict=True):
        for axes, (comparison, dense, results) in zip(row, outcomes, strict=True):
            axes.set_title(f"{comparison.title}, {STAGES[stage]}", fontsize=10)
            axes.axhline(100 * dense.mean(), color="black", linewidth=0.8, linestyle=":")
            for i, result in enumerate(results):
                shift = 0.3 * (i - len(results) / 2)
                _curve(axes, result.method.name, shift, settings, getattr(result, stage))
            axes.grid(alpha=0.2)
            axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("test accuracy, %")
    for axes in grid[-1]:
        axes.set_xlabel("sparsity, %")
        axes.set_xticks([100 * s for s in settings.sparsities])
        axes.legend(loc="lower left", frameon=False, fontsize=9)
    grid[0, 0].set_ylim(0, 102)
    figure.suptitle(
        "A small CNN on scikit-learn's digits: the same number of units pruned by each criterion\n"
        f"mean of {len(outcomes[0][1])} seeds, bars: standard deviation, dotted: before pruning",
        fontsize=11,
    )
    figure.savefig(path, dpi=150)


def _curve(axes: Axes, name: str, shift: float, settings: Any, accuracies: np.ndarray) -> None:
    """Draws the mean of ``accuracies (seeds, sparsities)``; curves are set apart a little."""
    x, y = 100 * np.array(settings.sparsities) + shift, 100 * accuracies
    axes.errorbar(
        x,
        y.mean(axis=0),
        y.std(axis=0),
        color=COLOURS[name],
        marker=MARKERS[name],
        markersize=4.5,
        linewidth=1.2,
        elinewidth=0.9,
        capsize=2,
        linestyle="--" if name == "random" else "-",
        label=name,
    )
