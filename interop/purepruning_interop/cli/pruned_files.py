"""The files of ``purepruning prune``: weights, masks and report, whole or not at all."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import purepruning as pp
from purepruning.arguments import one_of
from purepruning_interop.checkpoints import (
    Aside,
    Checkpoint,
    Entry,
    entry_of,
    two_four_config,
    two_four_tensors,
    write_tensors,
)
from purepruning_interop.checkpoints.read import INDEX, SINGLE
from purepruning_interop.checkpoints.write import check_target
from purepruning_interop.cli import output
from purepruning_interop.cli.contents import is_float
from purepruning_interop.cli.pruned import Pruned

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


def write(found: Pruned, out: Path, layout: str, overwrite: bool) -> dict[str, str]:
    """Writes weights, masks and report; returns the files by kind.

    Raises:
        NotWritten: the system would not take it; nothing is left.
    """
    report = (json.dumps(found.report(), indent=2) + "\n").encode()
    with Aside(out, overwrite=overwrite) as aside:
        if _is_file(out):
            return _one_file(found, out, aside, report)
        (aside.folder / BESIDE).mkdir()
        pp.save_masks(aside.folder / BESIDE / "masks.safetensors", found.masks, _floats(found))
        aside.write(f"{BESIDE}/report.json", report)
        _folder(found, aside, layout == "compressed-tensors")
        aside.commit_folder()
    return {
        "weights": str(out),
        "masks": str(out / BESIDE / "masks.safetensors"),
        "report": str(out / BESIDE / "report.json"),
    }


def _one_file(found: Pruned, out: Path, aside: Aside, report: bytes) -> dict[str, str]:
    masks, told = f"{out.stem}.masks.safetensors", f"{out.stem}.report.json"
    pp.save_masks(aside.folder / masks, found.masks, _floats(found))
    aside.write(told, report)
    (file,) = found.checkpoint.files
    entries = _entries(found, file, pack=False)
    _write_with_progress({aside.folder / out.name: (entries, _metadata(found, file))})
    aside.commit_files([masks, told, out.name])
    places = {"weights": out.name, "masks": masks, "report": told}
    return {kind: str(out.with_name(name)) for kind, name in places.items()}


def _folder(found: Pruned, aside: Aside, pack: bool) -> None:
    """Writes shards, their index, and what else the source's folder holds."""
    checkpoint = found.checkpoint
    several = len(checkpoint.files) > 1
    shards: dict[Path, tuple[dict[str, Entry], Mapping[str, str]]] = {}
    weight_map: dict[str, str] = {}
    for file in checkpoint.files:
        name = file.replace("pytorch_model", "model", 1) if several else SINGLE
        name = str(Path(name).with_suffix(".safetensors"))
        entries = _entries(found, file, pack)
        shards[aside.folder / name] = (entries, _metadata(found, file))
        weight_map |= dict.fromkeys(entries, name)
    _write_with_progress(shards)
    if several:
        written = [entry for entries, _ in shards.values() for entry in entries.values()]
        sizes = [entry.dtype.itemsize * math.prod(entry.shape) for entry in written]
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        aside.write(INDEX, (json.dumps(index, indent=2, sort_keys=True) + "\n").encode())
    config = {}
    if checkpoint.is_folder:
        config = _copy_rest(checkpoint, aside)
    if pack:
        packed = set(_packed(found))
        dense = [x.name for x in found.layers if x.type == "Linear" and x.weight not in packed]
        if not any(x.name == "lm_head" for x in found.layers):
            dense.append("lm_head")  # tied to the embedding, and not in the file
        config = two_four_config(config, dense, found.global_sparsity)
    if config:
        aside.write("config.json", (json.dumps(config, indent=2) + "\n").encode())


def _copy_rest(checkpoint: Checkpoint, aside: Aside) -> dict[str, Any]:
    """Copies what is no weights; returns what ``config.json`` holds, which is not copied."""
    config: dict[str, Any] = {}
    for path in sorted(checkpoint.path.iterdir()):
        if not path.is_file() or path.suffix in (".safetensors", ".bin", ".pt", ".pth"):
            continue
        if path.name.endswith(".index.json"):
            continue
        if path.name == "config.json":
            try:
                config = json.loads(path.read_bytes())
            except ValueError as error:
                raise ValueError(f"{path}: {error}; mend the JSON there") from None
            continue
        shutil.copyfile(path, aside.folder / path.name)
    return config


def _entries(found: Pruned, file: str, pack: bool) -> dict[str, Entry]:
    """Returns what is to be written of one file, by name."""
    packed = _packed(found) if pack else {}
    entries: dict[str, Entry] = {}
    for name in found.checkpoint.files[file]:
        tensor, mask = found.checkpoint.tensors[name], found.masks.get(name)
        if name in packed:
            entries |= _two_four(name, tensor, packed[name])
        elif mask is None:
            entries[name] = entry_of(tensor)
        else:
            entries[name] = Entry(tensor.dtype, tensor.shape, _masked(tensor, mask))
    return entries


def _two_four(name: str, tensor: np.ndarray, mask: np.ndarray) -> dict[str, Entry]:
    rows, columns = tensor.shape
    stem = name.removesuffix(".weight")
    known = {
        f"{stem}.compressed": (tensor.dtype, (rows, columns // 2)),
        f"{stem}.bitmask": (np.dtype(np.uint8), (rows, -(-columns // 8))),
        f"{stem}.shape": (np.dtype(np.int64), (2, 1)),
    }

    def part_of(part: str) -> Callable[[], np.ndarray]:
        return lambda: two_four_tensors(name, tensor, mask)[part]

    return {part: Entry(*row, part_of(part)) for part, row in known.items()}


def _packed(found: Pruned) -> dict[str, np.ndarray]:
    """Returns the masks of the weights that the packed layout takes, by name."""
    if found.config.granularity != pp.NM(keep=2, of=4):
        raise ValueError("--format compressed-tensors is of 2:4; give --nm 2:4")
    packed = {}
    for layer in found.layers:
        mask, tensor = found.masks[layer.weight], found.checkpoint.tensors[layer.weight]
        fits = layer.type == "Linear" and layer.in_axes == (1,) and tensor.ndim == 2
        named = layer.weight.endswith(".weight") and tensor.dtype.name in _PACKED
        if mask is not None and fits and named:
            packed[layer.weight] = mask
    if not packed:
        raise ValueError(
            "--format compressed-tensors: no pruned layer is a matrix (out, in) called '*.weight'; "
            "leave --format out"
        )
    return packed


def _masked(tensor: np.ndarray, mask: np.ndarray) -> Callable[[], np.ndarray]:
    return lambda: np.where(mask, tensor, np.zeros((), tensor.dtype))


def _write_with_progress(
    shards: Mapping[Path, tuple[dict[str, Entry], Mapping[str, str]]],
) -> None:
    with output.progress() as bar:
        task = bar.add_task("writing", total=sum(len(entries) for entries, _ in shards.values()))

        def counted(entry: Entry) -> Entry:
            def make() -> np.ndarray:
                bar.advance(task)
                return entry.make()

            return entry._replace(make=make)

        for path, (entries, metadata) in shards.items():
            write_tensors(path, {n: counted(e) for n, e in entries.items()}, metadata)


def _metadata(found: Pruned, file: str) -> Mapping[str, str]:
    return found.checkpoint.metadata.get(file) or {"format": "pt"}


def _floats(found: Pruned) -> dict[str, np.ndarray]:
    return {n: x for n, x in found.checkpoint.tensors.items() if is_float(x)}


def _is_file(out: Path) -> bool:
    return out.suffix == ".safetensors"
