"""``purepruning inspect``: what a checkpoint or a model holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def inspect(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A .safetensors file, a folder of Hugging Face's, a state dict (.pt); or "
            "package.module:function, which returns a model, or (model, *inputs).",
        ),
    ],
    rules: Annotated[
        Path | None, typer.Option(help="Rules (JSON or YAML); shows what they select.")
    ] = None,
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input", metavar="SHAPE", help="Of a model: an example input, 1x3x32x32 or int:1x16."
        ),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(help="Of a model: where to draw its coupling (.png, .svg, .pdf)."),
    ] = None,
    top: Annotated[int, typer.Option(min=0, help="How many of the largest tensors to list.")] = 5,
    every: Annotated[
        bool, typer.Option("--every", help="List every layer, not blocks of the same ones in one.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Show layers, sizes, densities and N:M patterns; of a model costs and coupling too."""
    from purepruning_interop.cli.contents import Contents, contents_of
    from purepruning_interop.cli.model_contents import ModelContents, model_contents
    from purepruning_interop.cli.models import is_model
    from purepruning_interop.cli.output import show_json

    found: Contents | ModelContents
    if is_model(source):
        found = model_contents(source, rules, inputs or [], picture)
    elif inputs or picture is not None:
        raise ValueError(
            f"--input and --picture are of models, and {source!r} is none; leave them out"
        )
    else:
        found = contents_of(source, rules)
    if as_json:
        show_json(found.as_json(top))
    else:
        found.show(top, every)
