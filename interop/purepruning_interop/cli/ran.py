"""A run by the command line: its progress and its table."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from purepruning_interop.checkpoints import read_checkpoint
from purepruning_interop.cli import output
from purepruning_interop.cli.models import arrays_into
from purepruning_interop.cli.tasks import task_of
from purepruning_interop.recipes import read_recipe
from purepruning_interop.report import write_report
from purepruning_interop.runs import By, Outcome, Settings, report_of, run_recipe
from purepruning_interop.runs.folder import writing
from purepruning_interop.tasks import Task


def run_and_show(
    recipe: Path,
    task_name: str,
    out: Path,
    *,
    seed: int,
    epochs: int | None,
    trial_epochs: int,
    samples: int | None,
    by: By | None,
    weights: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Does the run and prints what came of it.

    Raises:
        ValueError, TypeError, KeyError, OSError: recipe, task or folder do not fit.
        NotWritten: a file cannot be written.
    """
    found = read_recipe(recipe)
    task = task_of(task_name)
    start = None if weights is None else _start(task, task_name, weights, seed)
    words = ["purepruning", "run", str(recipe), "--task", task_name, "--seed", str(seed)]
    words += [] if epochs is None else ["--epochs", str(epochs)]
    words += [] if not trial_epochs else ["--trial-epochs", str(trial_epochs)]
    words += [] if samples is None else ["--samples", str(samples)]
    words += [] if by is None else ["--by", by]
    words += [] if weights is None else ["--weights", str(weights)]
    again = shlex.join([*words, "-o", str(out)])
    asked = {"task": task_name, "weights": None if weights is None else str(weights)}
    with output.progress() as bar:
        line = bar.add_task("checking", total=1)

        def show(done: int, of: int, what: str) -> None:
            bar.update(line, description=what, completed=done, total=of)

        outcome = run_recipe(
            found,
            task,
            out,
            Settings(seed, epochs, trial_epochs),
            start=start,
            asked=asked,
            samples=samples,
            by=by,
            anew=overwrite,
            show=show,
        )
    page = out / "report.html"
    with writing(out):
        write_report(page, report_of(outcome, task, [again]))
    outcome = outcome._replace(files={**outcome.files, "report": str(page)})
    if as_json:
        output.show_json(_as_json(outcome, task, out))
    else:
        _show(outcome, task, out)


def _start(task: Task, name: str, weights: Path, seed: int) -> Any:
    framework = "linen" if task.traced else "torch"
    return arrays_into(task.init(seed), framework, read_checkpoint(weights).tensors, weights, name)


def _as_json(outcome: Outcome, task: Task, out: Path) -> dict[str, Any]:
    last = outcome.history[-1]
    return {
        "task": task.name,
        "folder": str(out),
        "metric": task.metric,
        "score": last["score"],
        "density": last["density"],
        "values": outcome.values,
        "history": outcome.history,
        "files": outcome.files,
    }


def _show(outcome: Outcome, task: Task, out: Path) -> None:
    console = output.console()
    columns = (("step", False), ("stage", False), ("density", True), (task.metric, True))
    steps = outcome.recipe.steps
    rows = []
    for row in outcome.history:
        step = "" if row["step"] is None else f"{row['step']} {steps[row['step']].use}"
        cells = (step, row["what"], output.percent(row["density"]), _score(row["score"], task))
        rows.append((*cells, f"{row['seconds']:.1f} s"))
    console.print(output.table((*columns, ("time", True)), rows))
    console.print()
    for name, value in outcome.values.items():
        console.print(f"best {output.escaped(name)} = {value}", soft_wrap=True)
    for kind, path in {**outcome.files, "folder": str(out)}.items():
        console.print(f"{kind:8} {output.escaped(path)}", soft_wrap=True)


def _score(score: float | None, task: Task) -> str:
    if score is None:
        return "none"
    return output.percent(score) if task.metric == "accuracy" else f"{score:.4g}"
