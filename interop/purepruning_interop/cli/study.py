"""``purepruning study``: every criterion at every sparsity against chance, on a task."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from purepruning_interop.study import Comparison, Study

_BLANK = "\N{NO-BREAK SPACE}"  # which is not taken away at the end of a cell


def study(
    task: Annotated[
        str,
        typer.Argument(
            metavar="TASK",
            help="package.module:task (a Task of purepruning_interop.tasks, or a function that "
            "returns one), or 'digits'.",
        ),
    ],
    pruners: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[:UNITS],...",
            help="What to compare: level, taylor_fo:channels, ...; all of them unless given. "
            "Random pruning is always there.",
        ),
    ] = None,
    sparsities: Annotated[
        str, typer.Option(metavar="S,...", help="Fractions to prune.")
    ] = "0.3,0.5,0.7,0.8,0.9,0.95",
    seeds: Annotated[int, typer.Option(min=2, help="How many networks.")] = 10,
    epochs: Annotated[
        int | None, typer.Option(min=0, help="Of fine-tuning; the task's unless given.")
    ] = None,
    scope: Annotated[
        str, typer.Option(help="layer: each by itself; global: all ranked together.")
    ] = "layer",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Folder of the study; study-TASK unless given. A stopped study in "
            "it goes on; one that is there is extended by more seeds or pruners.",
        ),
    ] = None,
    at_once: Annotated[
        int | None,
        typer.Option(min=1, help="Seeds in one call; 1 on a CPU, all elsewhere, unless given."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparisons as JSON.")] = False,
) -> None:
    """Compare criteria with chance: networks of several seeds, pruned, fine-tuned, judged.

    Writes report.html, with curves and confidence intervals, into its folder. For example:
    [bold]purepruning study digits[/]
    """
    from purepruning_interop.checkpoints import NotWritten
    from purepruning_interop.cli.output import progress, show_json
    from purepruning_interop.cli.tasks import task_of
    from purepruning_interop.report import write_report
    from purepruning_interop.study import compared, report_of, run_study

    found = task_of(task)
    folder = Path(f"study-{found.name}") if out is None else out
    try:
        with progress() as bar:
            shown = bar.add_task("starting", total=None)
            done = run_study(
                found,
                _names(pruners),
                sparsities=_numbers(sparsities),
                seeds=seeds,
                epochs=epochs,
                scope=scope,
                folder=folder,
                at_once=at_once,
                progress=lambda n, total, what: bar.update(
                    shown, completed=n, total=total, description=what
                ),
            )
        again = _command(task, pruners, sparsities, seeds, epochs, scope, out)
        write_report(folder / "report.html", report_of(done, [again]))
    except OSError as error:
        raise NotWritten(f"{folder}: {error.strerror or error}") from error
    rows = compared(done)
    if as_json:
        show_json({"report": str(folder / "report.html"), "comparisons": _plain(rows)})
    else:
        _show(done, rows)
        print(f"Wrote {folder / 'report.html'}")


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"--sparsities must be numbers with commas between them, got {text!r}; write 0.5,0.9"
        ) from None


def _command(
    task: str,
    pruners: str | None,
    sparsities: str,
    seeds: int,
    epochs: int | None,
    scope: str,
    out: Path | None,
) -> str:
    """Returns the command with all that decides what comes out."""
    parts: list[Any] = ["purepruning", "study", task]
    parts += [] if pruners is None else ["--pruners", pruners]
    parts += ["--sparsities", sparsities, "--seeds", seeds]
    parts += [] if epochs is None else ["--epochs", epochs]
    parts += [] if scope == "layer" else ["--scope", scope]
    parts += [] if out is None else ["--out", out]
    return shlex.join(map(str, parts))


def _plain(rows: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Returns comparisons as JSON has them: numbers that are none are null."""
    from purepruning_interop.study.compare import verdict

    def plain(value: Any) -> Any:
        if hasattr(value, "_asdict"):
            return {key: plain(x) for key, x in value._asdict().items()}
        return None if isinstance(value, float) and value != value else value

    return [{**plain(row), "verdict": verdict(row.tuned_lead)} for row in rows]


def _show(done: Study, rows: Sequence[Comparison]) -> None:
    """Prints fine-tuned scores, a table for each kind of units: pruners by sparsities."""
    from purepruning_interop.cli.output import console, table
    from purepruning_interop.study.compare import verdict

    percent = done.metric == "accuracy"
    mark = {"ahead": "▲", "behind": "▼"}

    def cell(row: Comparison) -> str:
        mean, deviation = row.tuned.mean, row.tuned.deviation
        text = (
            f"{100 * mean:.1f}±{100 * deviation:.1f}" if percent else f"{mean:.4g}±{deviation:.2g}"
        )
        return f"{text} {mark.get(verdict(row.tuned_lead), _BLANK)}"

    dense = f"{100 * done.dense.mean():.1f} %" if percent else f"{done.dense.mean():.4g}"
    print(
        f"{done.task}: {done.metric} after {done.epochs} epochs of fine-tuning, mean ± deviation "
        f"over {len(done.seeds)} seeds; {dense} before pruning. ▲ ahead of chance, ▼ behind, at "
        "95 % confidence."
    )
    for units in dict.fromkeys(method.units for method in done.methods):
        columns = [(units, False), *((f"{s:.4g}{2 * _BLANK}", True) for s in done.sparsities)]
        of = {m: [r for r in rows if r.method == str(m)] for m in done.methods if m.units == units}
        lines = [[m.criterion, *map(cell, found)] for m, found in of.items()]
        print()
        console().print(table(columns, lines))
    print()
