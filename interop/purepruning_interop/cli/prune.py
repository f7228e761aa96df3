"""``purepruning prune``: a checkpoint with its lowest-ranked weights at zero, and the masks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def prune(
    source: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="A .safetensors file, a folder of Hugging Face's, or a state dict (.pt).",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            help="Where to write: a .safetensors file, with masks and a report beside it; or a "
            "folder, with masks and report in its folder 'purepruning'.",
        ),
    ],
    rules: Annotated[Path | None, typer.Option(help="Rules (JSON or YAML): a config_list.")] = None,
    sparsity: Annotated[
        float | None,
        typer.Option(help="Fraction to prune of all kernels and embeddings, without rules."),
    ] = None,
    pruner: Annotated[
        str,
        typer.Option(
            help="level, l1_norm, l2_norm, fpgm, slim, random; or NNI's name, such as l1_filter."
        ),
    ] = "level",
    scope: Annotated[
        str, typer.Option(help="layer: each by itself; global: all ranked together.")
    ] = "layer",
    granularity: Annotated[
        str | None,
        typer.Option(help="element, output_channel or input_channel; by the pruner unless given."),
    ] = None,
    nm: Annotated[
        str | None,
        typer.Option("--nm", metavar="N:M", help="Keep N of every M weights along the inputs."),
    ] = None,
    block: Annotated[
        str | None,
        typer.Option(metavar="AxB", help="Prune tiles of so many outputs x inputs (x taps)."),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="LAYER", help="A layer to leave as it is; may be given again."),
    ] = None,
    bias: Annotated[
        str, typer.Option(help="follow: biases go with their channel; keep: they stay.")
    ] = "follow",
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Of --pruner random.")] = 0,
    layout: Annotated[
        str,
        typer.Option(
            "--format",
            help="dense: zeros in their places. compressed-tensors: 2:4 packed, a folder for vLLM "
            "(before 0.19.1, which reads packed 2:4 no more).",
        ),
    ] = "dense",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at OUT.")] = False,
    every: Annotated[
        bool, typer.Option("--every", help="List every layer, not blocks of the same ones in one.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Prune a checkpoint, without its model's code; write weights and masks.

    For example: [bold]purepruning prune model.safetensors --sparsity 0.8 -o pruned.safetensors[/]
    """
    from purepruning_interop.checkpoints import read_checkpoint
    from purepruning_interop.cli import output
    from purepruning_interop.cli.pruned import Wanted, job_of, show
    from purepruning_interop.cli.pruned_files import check_out, count, write

    wanted = Wanted(
        rules=rules,
        sparsity=sparsity,
        pruner=pruner,
        scope=scope,
        granularity=granularity,
        nm=nm,
        block=block,
        exclude=tuple(exclude or ()),
        bias=bias,
        seed=seed,
    )
    checkpoint = read_checkpoint(source)
    check_out(checkpoint, out, layout, overwrite)
    job = job_of(checkpoint, wanted)
    found, files = (count(job), {}) if dry_run else write(job, out, layout, overwrite)
    if as_json:
        output.show_json({**found.report(), "files": files})
    else:
        show(found, every, files)
