"""The plot of ``lottery.py``: accuracy against the weights that are left, and learning curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from lottery import interval
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

COLOURS = ("#0072b2", "#56b4e9", "#d55e00", "#e69f00")  # Okabe and Ito's
MARKERS = ("o", "s", "^", "x")
DEPTHS = (0.5, 0.2, 0.1, 0.05)  # densities whose learning curves are drawn


def write(path: Path, result: Any, names: Any, soon: int) -> None:
    """Writes accuracies at the end and soon, above the learning curves of tickets and controls."""
    figure = Figure(figsize=(10, 7.6), layout="constrained")
    (end, early), (tickets, controls) = figure.subplots(2, 2)
    at = int(np.flatnonzero(result.steps == soon)[0])
    for axes, point, title in (
        (end, -1, f"at the end, after {result.steps[-1]} steps"),
        (early, at, f"soon, after {soon} steps"),
    ):
        _against_density(axes, result, names, point)
        axes.set_title(title, fontsize=10)
    low = min(way[:, :, -1].mean(1).min() for way in result.curves)
    end.set_ylim(max(0, low - 2), 100)
    end.legend(loc="lower left", frameon=False, fontsize=9)
    _of_tickets(tickets, result)
    _of_controls(controls, result, names)
    for axes in (tickets, controls):
        axes.set_xlabel("steps")
        axes.legend(loc="lower right", frameon=False, fontsize=9)
    tickets.set_ylim(85, 100)
    controls.set_ylim(60, 100)
    for axes in (end, early, tickets, controls):
        axes.grid(alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in (end, tickets):
        axes.set_ylabel("test accuracy, %")
    figure.suptitle(
        "Lottery tickets of LeNet-300-100 on scikit-learn's digits\n"
        f"mean of {len(result.dense)} tickets with its 95 % confidence band",
        fontsize=11,
    )
    figure.savefig(path, dpi=150)


def _against_density(axes: Axes, result: Any, names: Any, point: int) -> None:
    dense = result.dense[:, point]
    axes.axhspan(
        dense.mean() - interval(dense), dense.mean() + interval(dense), color="black", alpha=0.1
    )
    axes.axhline(dense.mean(), color="black", linewidth=0.8, linestyle=":", label="dense")
    x = 100 * np.array([1, *result.density])
    for name, way, colour, marker in zip(names, result.curves, COLOURS, MARKERS, strict=True):
        y = np.vstack([dense, way[:, :, point]]).T
        _band(axes, x, y, colour, label=name, marker=marker, markersize=4)
    axes.set_xscale("log")
    axes.set_xlim(105, 100 * result.density[-1] * 0.93)  # to the right there are ever fewer
    ticks = [x[i] for i in range(0, len(x), 2)]
    axes.set_xticks(ticks, [f"{tick:.0f}" if tick >= 10 else f"{tick:.1f}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("weights left, %")


def _of_tickets(axes: Axes, result: Any) -> None:
    axes.set_title("the tickets: rewound to initialisation", fontsize=10)
    _band(axes, result.steps, result.dense, "black", label="100 %", linestyle=":")
    chosen = dict.fromkeys(int(np.abs(result.density - depth).argmin()) for depth in DEPTHS)
    for shade, i in zip(("#9ecae1", "#4292c6", "#08519c", "#7a0177"), chosen, strict=False):
        curves = result.curves.rewound[i]
        _band(axes, result.steps, curves, shade, label=f"{100 * result.density[i]:.1f} %")


def _of_controls(axes: Axes, result: Any, names: Any) -> None:
    i = int(np.abs(result.density - 0.2).argmin())
    axes.set_title(f"all ways, {100 * result.density[i]:.1f} % of the weights left", fontsize=10)
    _band(axes, result.steps, result.dense, "black", label="dense", linestyle=":")
    for name, way, colour in zip(names, result.curves, COLOURS, strict=True):
        _band(axes, result.steps, way[i], colour, label=name)


def _band(axes: Axes, x: np.ndarray, y: np.ndarray, colour: str, **line: Any) -> None:
    """Draws the mean of ``y (tickets, x)`` in the band of its confidence."""
    mean, half = y.mean(axis=0), interval(y)
    axes.fill_between(x, mean - half, mean + half, color=colour, alpha=0.2, linewidth=0)
    axes.plot(x, mean, color=colour, linewidth=1.3, **line)
