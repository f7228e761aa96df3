"""The files of ``purepruning prune``: weights, masks and report, whole or not at all.

:func:`purepruning.prune_files` writes them. What it does not know is done before it and after it: a
state dict of torch is written as safetensors first, and 2:4 weights are packed in their files.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import purepruning as pp
from purepruning.arguments import one_of
from purepruning.saving.files import write_whole
from purepruning.saving.tensors import INDEX, SINGLE
from purepruning.streaming import MASKS, Streamed
from purepruning_interop.checkpoints import (
    Aside,
    Checkpoint,
    as_safetensors,
    pack_file,
    two_four_config,
)
from purepruning_interop.checkpoints.write import check_target
from purepruning_interop.cli import output
from purepruning_interop.cli.pruned import Job, Pruned

#: The folder of masks and report in a folder of weights, where no loader of weights looks.
BESIDE = "purepruning"
#: dtypes that ``sparse-24-bitmask`` is read in.
_PACKED = ("float16", "bfloat16", "float32")


def check_out(checkpoint: Checkpoint, out: Path, layout: str, overwrite: bool) -> None:
    """Raises before anything is computed where ``out`` is no place for the result."""
    one_of("--format", layout, ("dense", "compressed-tensors"))
    check_target(out, overwrite)
    if _is_file(out) and (checkpoint.is_folder or layout != "dense"):
        raise ValueError(f"--out {out}: the result is a folder; name one")
    if not _is_file(out) and out.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        raise ValueError(
            f"--out {out}: nothing is pickled; name {out.with_suffix('.safetensors').name}"
        )
    source = checkpoint.path.resolve()
    if out.resolve() in (source, *source.parents):
        raise ValueError(f"--out {out}: this holds the source; name another")


def count(job: Job) -> Pruned:
    """Returns what would be pruned; nothing is written."""
    with tempfile.TemporaryDirectory() as folder:
        return Pruned(job, _prune(job, Path(folder) / "source", None).pruned)


def write(job: Job, out: Path, layout: str, overwrite: bool) -> tuple[Pruned, dict[str, str]]:
    """Writes weights, masks and report; returns what was pruned, and the files by kind.

    Raises:
        ValueError: a score is NaN, or the layout does not fit.
        NotWritten: the system would not take it; nothing is left.
    """
    packed = _packed(job) if layout == "compressed-tensors" else []
    with Aside(out, overwrite=overwrite, asked=_asked(job, layout)) as aside:
        folder = aside.folder / "pruned" if _is_file(out) else aside.folder
        done = _prune(job, aside.folder / ".torch", folder)
        shutil.rmtree(aside.folder / ".torch", ignore_errors=True)
        found = Pruned(job, done.pruned)
        report = (json.dumps(found.report(), indent=2) + "\n").encode()
        if _is_file(out):
            places = {"masks": f"{out.stem}.masks.safetensors", "report": f"{out.stem}.report.json"}
            done.files[-1].rename(aside.folder / places["masks"])
            done.files[0].rename(aside.folder / out.name)
            aside.write(places["report"], report)
            aside.commit_files([*places.values(), out.name])
            return found, {
                k: str(out.with_name(v)) for k, v in {"weights": out.name, **places}.items()
            }
        weights = list(done.files[:-1])
        if len(weights) == 1 and not (folder / INDEX).exists():
            weights = [weights[0].rename(folder / SINGLE)]
        if packed:
            _pack(found, weights, done.files[-1], packed)
        aside.write(f"{BESIDE}/report.json", report)
        done.files[-1].rename(folder / BESIDE / MASKS)
        aside.commit_folder()
    beside = {"masks": str(out / BESIDE / MASKS), "report": str(out / BESIDE / "report.json")}
    return found, {"weights": str(out), **beside}


def _prune(job: Job, converted: Path, target: Path | None) -> Streamed:
    """Prunes the files of a checkpoint; those of torch are written anew to a folder before."""
    source = job.checkpoint.path
    with output.progress() as bar:
        task = bar.add_task("reading", total=None)
        if job.checkpoint.kind == "torch":
            source = as_safetensors(job.checkpoint, converted)

        def show(done: int, of: int, name: str) -> None:
            bar.update(task, description=f"pruning {name}", completed=done, total=of)

        return pp.prune_files(
            job.pruner, source, target, job.config, stats=job.stats, progress=show
        )


def _asked(job: Job, layout: str) -> str | None:
    """Returns a digest of the job, if another call can go on with it: where there are files."""
    checkpoint, config = job.checkpoint, job.config
    if checkpoint.kind != "sharded safetensors":
        return None
    states = [(checkpoint.path / file).stat() for file in checkpoint.files]
    what = (
        pp.__version__,
        str(checkpoint.path.resolve()),
        [(state.st_size, state.st_mtime_ns) for state in states],
        (job.name, str(job.stats), layout),
        (config.scope, str(config.granularity), config.bias, config.counts),
        [(pool.layers, pool.caps) for pool in config.pools],
    )
    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]


def _packed(job: Job) -> list[str]:
    """Returns the names of the weights that the packed layout takes."""
    if job.config.granularity != pp.NM(keep=2, of=4):
        raise ValueError("--format compressed-tensors is of 2:4; give --nm 2:4")
    pruned = {layer.weight for layer in job.config.layers}
    packed = []
    for layer in job.layers:
        tensor = job.checkpoint.tensors[layer.weight]
        fits = layer.type == "Linear" and layer.in_axes == (1,) and tensor.ndim == 2
        named = layer.weight.endswith(".weight") and tensor.dtype.name in _PACKED
        if layer.weight in pruned and fits and named:
            packed.append(layer.weight)
    if not packed:
        raise ValueError(
            "--format compressed-tensors: no pruned layer is a matrix (out, in) called '*.weight'; "
            "leave --format out"
        )
    return packed


def _pack(found: Pruned, weights: list[Path], masks: Path, packed: list[str]) -> None:
    """Packs weights in their files, and says so in the index and the model's config."""
    folder, layers = masks.parent, found.job.layers
    config = folder / "config.json"
    try:
        before: Mapping[str, Any] = json.loads(config.read_bytes()) if config.exists() else {}
        if not isinstance(before, dict):
            raise ValueError("it is no object")
    except ValueError as error:
        raise ValueError(
            f"{found.job.checkpoint.path / 'config.json'}: {error}; mend the JSON there"
        ) from None
    where: dict[str, str] = {}
    size = 0
    for file in weights:
        sizes = pack_file(file, masks, packed)
        where |= dict.fromkeys(sizes, file.name)
        size += sum(sizes.values())
    if (folder / INDEX).exists():
        _write(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": where})
    dense = [x.name for x in layers if x.type == "Linear" and x.weight not in packed]
    if not any(x.name == "lm_head" for x in layers):
        dense.append("lm_head")  # tied to the embedding, and not in the file
    _write(config, two_four_config(before, dense, found.global_sparsity))


def _write(path: Path, content: Any) -> None:
    write_whole(path, (json.dumps(content, indent=2) + "\n").encode())


def _is_file(out: Path) -> bool:
    return out.suffix == ".safetensors"
