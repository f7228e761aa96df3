"""``purepruning shrink``: a smaller model that computes what the pruned one does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def shrink(
    source: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:FUNCTION",
            help="A function without arguments that returns (model, *inputs); of Linen (module, "
            "variables, *inputs). Modules of the current folder are found.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", help="The folder to write: weights, plan, masks and report of it."
        ),
    ],
    rules: Annotated[Path | None, typer.Option(help="Rules (JSON or YAML): a config_list.")] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="Fraction of every layer's channels to remove.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="COST=SHARE",
            help="The share of the whole model's macs or params that may be left: macs=0.5. "
            "Channels of all layers are ranked together.",
        ),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="A checkpoint to read into the model first.")
    ] = None,
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            metavar="SHAPE",
            help="An example input, where the function returns none: 1x3x32x32, or int:1x16.",
        ),
    ] = None,
    pruner: Annotated[str, typer.Option(help="l1_norm, l2_norm, fpgm or random.")] = "l1_norm",
    round_to: Annotated[
        int, typer.Option(min=1, help="Channels that are kept are a multiple of this.")
    ] = 1,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Of --pruner random.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at OUT.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Remove channels of a torch, Flax (Linen, NNX), Equinox or Keras model.

    For example: [bold]purepruning shrink nets:make --budget macs=0.5 -o small[/]
    """
    from purepruning_interop.checkpoints.write import check_target
    from purepruning_interop.cli import output
    from purepruning_interop.cli.models import make_model
    from purepruning_interop.cli.shrunk import Wanted, show, shrink_model, write

    wanted = Wanted(rules, sparsity, budget, pruner, round_to, seed)
    wanted.check()
    if not dry_run:
        check_target(out, overwrite)
    found = shrink_model(make_model(source, inputs or [], weights), wanted)
    files = {} if dry_run else write(found, out, overwrite)
    if as_json:
        output.show_json({**found.report(), "files": files})
    else:
        show(found, files)
