"""State dicts of torch as files of safetensors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from purepruning.saving.tensors import INDEX, SINGLE, of_array, write_tensors
from purepruning_interop.checkpoints.read import TORCH_SUFFIXES, Checkpoint


def as_safetensors(checkpoint: Checkpoint, folder: Path) -> Path:
    """Writes a checkpoint of torch anew, and what lies beside it; returns what to read.

    One file becomes ``model.safetensors``; ``pytorch_model-00001-of-00002.bin`` becomes
    ``model-00001-of-00002.safetensors``, with an index. No tensor is in memory that was mapped.

    Args:
        checkpoint: what :func:`read_checkpoint` returned.
        folder: the folder to write to; it is made.

    Raises:
        OSError: it cannot be written.
    """
    folder.mkdir()
    where: dict[str, str] = {}
    for file, names in checkpoint.files.items():
        stem = Path(file.replace("pytorch_model", "model", 1)).stem
        new = f"{stem}.safetensors" if len(checkpoint.files) > 1 else SINGLE
        tensors = {name: of_array(checkpoint.tensors[name]) for name in names}
        write_tensors(folder / new, tensors, {"format": "pt"})
        where |= dict.fromkeys(names, new)
    if len(checkpoint.files) > 1:
        size = sum(x.nbytes for x in checkpoint.tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    if checkpoint.is_folder:
        for path in checkpoint.path.iterdir():
            weights = path.suffix in (".safetensors", *TORCH_SUFFIXES)
            if path.is_file() and not weights and not path.name.endswith(".index.json"):
                shutil.copyfile(path, folder / path.name)
    return folder
