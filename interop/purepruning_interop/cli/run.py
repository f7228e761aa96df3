"""``purepruning run``: a recipe done to a task, in a folder from which it goes on when killed."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer


class By(enum.StrEnum):
    """How recipes of one with ranges are found."""

    grid = "grid"
    random = "random"
    optuna = "optuna"


def run(
    recipe: Annotated[
        Path,
        typer.Argument(help="A recipe (JSON or YAML): auptimizer's 'compression', or steps."),
    ],
    task: Annotated[
        str,
        typer.Option(help="package.module:task, a Task or what returns one; or digits."),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="The run folder; an unfinished run in it goes on."),
    ],
    seed: Annotated[
        int, typer.Option(min=0, max=2**31 - 1, help="Of the network, its training, and searches.")
    ] = 0,
    epochs: Annotated[
        int | None,
        typer.Option(min=0, help="Of each fine-tuning; the task's own unless given."),
    ] = None,
    trial_epochs: Annotated[
        int, typer.Option(min=0, help="How long trials of NetAdapt and sensitivity are tuned.")
    ] = 0,
    samples: Annotated[
        int | None,
        typer.Option(
            min=1, help="How many recipes of one with ranges to try; a grid unless given."
        ),
    ] = None,
    by: Annotated[
        By | None,
        typer.Option(help="How they are found; at random, if there are samples, unless given."),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="A checkpoint of the trained network; else it is trained.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Begin anew where there is another run.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train, prune, search, tune and export by a recipe; call it again to go on.

    For example: [bold]purepruning run recipe.json --task digits -o run[/]
    """
    from purepruning_interop.cli.ran import run_and_show

    run_and_show(
        recipe,
        task,
        out,
        seed=seed,
        epochs=epochs,
        trial_epochs=trial_epochs,
        samples=samples,
        by=None if by is None else by.value,
        weights=weights,
        overwrite=overwrite,
        as_json=as_json,
    )
