"""``purepruning inspect``: what a checkpoint holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def inspect(
    source: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="A .safetensors file, a folder of Hugging Face's, or a state dict (.pt).",
        ),
    ],
    rules: Annotated[
        Path | None, typer.Option(help="Rules (JSON or YAML); shows what they select.")
    ] = None,
    top: Annotated[int, typer.Option(min=0, help="How many of the largest tensors to list.")] = 5,
    every: Annotated[
        bool, typer.Option("--every", help="List every layer, not blocks of the same ones in one.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Show layers, sizes, densities, N:M patterns and the largest tensors."""
    from purepruning_interop.cli.contents import contents_of
    from purepruning_interop.cli.output import show_json

    found = contents_of(source, rules)
    if as_json:
        show_json(found.as_json(top))
    else:
        found.show(top, every)
