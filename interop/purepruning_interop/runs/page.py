"""The report of a run: a page for :func:`purepruning_interop.report.write_report`."""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from purepruning.masks import by_path, to_numpy
from purepruning.versions import __version__
from purepruning_interop import report
from purepruning_interop.report.contents import Point
from purepruning_interop.runs.run import Outcome
from purepruning_interop.tasks import Task


def report_of(outcome: Outcome, task: Task, commands: Sequence[str] = ()) -> report.Report:
    """Returns the page of a run: its stages as curves and table, its layers, how to repeat it.

    Args:
        outcome: what ``run_recipe`` returned.
        task: what was pruned.
        commands: lines of a shell that do it again.
    """
    sections: list[Any] = [_curves(outcome, task), _stages(outcome, task)]
    if outcome.state.masks is not None:
        sections.append(_profile(outcome, task))
    sections.append(report.Facts("What was run", _facts(outcome, task)))
    if commands:
        note = "A run that is done already is read from its folder."
        sections.append(report.Commands("Do it again", note, commands))
    uses = " and ".join(step.use for step in outcome.recipe.steps)
    today = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    return report.Report(
        kind="Pruning run",
        title=f"{task.name}: {uses}",
        lead=_lead(outcome, task),
        tiles=_tiles(outcome, task),
        sections=sections,
        made=f"purepruning {__version__}, {today}",
    )


def _text(score: float | None, task: Task, sign: str = "") -> str:
    if score is None:
        return "not finite"
    found = f"{100 * score:{sign}.1f} %" if task.metric == "accuracy" else f"{score:{sign}.4g}"
    return found.replace("-", "−")


def _ends(outcome: Outcome) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the rows of the dense network and of the end."""
    return outcome.history[0], outcome.history[-1]


def _lead(outcome: Outcome, task: Task) -> str:
    first, last = _ends(outcome)
    share = f"{100 * last['density']:.3g} %"
    return (
        f"{share} of the weights of the pruned layers are left. The {task.metric} was "
        f"{_text(first['score'], task)} before and is {_text(last['score'], task)} at the end."
    )


def _tiles(outcome: Outcome, task: Task) -> list[tuple[str, str, str]]:
    first, last = _ends(outcome)
    seconds = sum(row["seconds"] for row in outcome.history)
    remark = ""
    if first["score"] is not None and last["score"] is not None:
        change = last["score"] - first["score"]
        if task.metric == "accuracy":
            remark = f"{100 * change:+.1f} points".replace("-", "−")
        else:
            remark = f"{change:+.4g}".replace("-", "−")
    return [
        (task.metric, _text(last["score"], task), remark),
        ("left of the pruned layers", f"{100 * last['density']:.3g} %", "of their weights"),
        ("time", f"{seconds:.1f} s", f"in {len(outcome.history)} stages"),
    ]


def _curves(outcome: Outcome, task: Task) -> report.Curves:
    percent = task.metric == "accuracy"
    scores = [
        Point(row["stage"], 100 * row["score"] if percent else row["score"])
        for row in outcome.history
        if row["score"] is not None
    ]
    left = [Point(row["stage"], 100 * row["density"]) for row in outcome.history]
    label = f"{task.metric}, %" if percent else task.metric
    views = [
        report.View(task.metric, label, [report.Series(task.metric, scores)]),
        report.View("weights left", "left, %", [report.Series("weights left", left)]),
    ]
    return report.Curves(
        "Stage by stage", "After each stage; the table names them.", "stage", views
    )


def _stages(outcome: Outcome, task: Task) -> report.Table:
    steps = outcome.recipe.steps
    rows: list[list[report.contents.Cell]] = []
    for row in outcome.history:
        step = "before" if row["step"] is None else f"{row['step']} {steps[row['step']].use}"
        score = row["score"]
        rows.append(
            [
                (f"{row['stage']}", row["stage"]),
                step,
                row["what"],
                None if score is None else (_text(score, task), score),
                (f"{100 * row['density']:.3g} %", row["density"]),
                (f"{row['seconds']:.2f} s", row["seconds"]),
            ]
        )
    columns = [
        report.Column("stage", number=True),
        report.Column("step", choose=True),
        report.Column("what"),
        report.Column(task.metric, number=True),
        report.Column("left", number=True),
        report.Column("time", number=True),
    ]
    return report.Table("Stages", "Every stage of the run, in order.", columns, rows)


def _profile(outcome: Outcome, task: Task) -> report.Profile:
    masks = by_path(outcome.state.masks, outcome.state.params)
    layers, kept = [], []
    for layer in task.layers:
        size, mask = math.prod(layer.shape), masks.get(layer.weight)
        shape = " × ".join(map(str, layer.shape))
        layers.append((layer.name or layer.weight, shape, size))
        if mask is None:
            kept.append(size)
        else:
            found = to_numpy(mask)
            kept.append(int(np.count_nonzero(found)) * (size // found.size))
    return report.Profile("Layers", "Weights left of each layer at the end.", layers, {}, kept)


def _facts(outcome: Outcome, task: Task) -> dict[str, str]:
    found = {"Task": task.name, **task.about}
    for number, step in enumerate(outcome.recipe.steps):
        rules = "; ".join(
            ", ".join(f"{key} {value}" for key, value in rule.items()) for rule in step.rules
        )
        found[f"Step {number}"] = f"{step.use}: {rules}"
    for name, value in outcome.values.items():
        found[f"Best {name}"] = str(value)
    return found
