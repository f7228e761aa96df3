"""Reading checkpoints: safetensors, one or sharded, and state dicts of torch."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from purepruning.arguments import missing, shown
from purepruning.saving.tensors import INDEX, SINGLE, read_index, read_shards

TORCH_INDEX, TORCH_SINGLE = "pytorch_model.bin.index.json", "pytorch_model.bin"
#: What files of ``torch.save`` end in.
TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
#: Where programs put the weights in what they give to ``torch.save``.
_CONTAINERS = ("state_dict", "model_state_dict", "model", "module", "params", "weights")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Tensors by name, and where they came from.

    Attributes:
        path: the file or folder.
        kind: ``"safetensors"``, ``"sharded safetensors"`` or ``"torch"``.
        tensors: the tensors; those of safetensors lie in their files until they are used.
        files: the names of the tensors of each file, by its name, in the files' order.
        inside: where in the file the weights were, such as ``"state_dict"``; empty at the top.
        left_out: what is in the file and no tensor.
    """

    path: Path
    kind: Literal["safetensors", "sharded safetensors", "torch"]
    tensors: Mapping[str, np.ndarray]
    files: Mapping[str, tuple[str, ...]]
    inside: str = ""
    left_out: tuple[str, ...] = ()

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder, as Hugging Face's libraries write one."""
        return self.path.is_dir()


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Returns what a checkpoint holds: a file, or a folder of Hugging Face's layout.

    Files end in ``.safetensors``, or in ``.pt``, ``.pth``, ``.bin`` or ``.ckpt``, which are read by
    torch with ``weights_only=True``: nothing in them is run. A folder holds
    ``model.safetensors.index.json`` and the shards that it names, or ``model.safetensors``, or the
    same of ``pytorch_model.bin``, or any files of safetensors. Tensors are mapped, not read.

    Raises:
        FileNotFoundError: there is no such file, or a shard is missing.
        ValueError: a file is damaged or of another kind, or the index does not agree with it.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no {str(path)!r}; name a file or a folder")
    if path.is_dir():
        return _folder(path)
    if path.suffix == ".safetensors":
        return _safetensors(path)
    if path.suffix in TORCH_SUFFIXES:
        tensors, inside, left_out = _torch(path)
        return Checkpoint(path, "torch", tensors, {path.name: tuple(tensors)}, inside, left_out)
    raise ValueError(
        f"{path}: a checkpoint ends in .safetensors or {', '.join(TORCH_SUFFIXES)}, or is a "
        "folder; rename or convert it"
    )


def _folder(path: Path) -> Checkpoint:
    if not (path / INDEX).exists() and not (path / SINGLE).exists():
        if (path / TORCH_INDEX).exists():
            return _sharded_torch(path)
        if (path / TORCH_SINGLE).exists():
            return dataclasses.replace(read_checkpoint(path / TORCH_SINGLE), path=path)
        if not any(path.glob("*.safetensors")):
            raise FileNotFoundError(
                f"{path}: the folder has no {INDEX}, {SINGLE} or {TORCH_SINGLE}; name a file in it"
            )
    return _safetensors(path)


def _safetensors(path: Path) -> Checkpoint:
    shards = read_shards(path)
    tensors = {name: array for shard in shards for name, array in shard.arrays().items()}
    files = {shard.file.name: tuple(shard.tensors) for shard in shards}
    kind: Any = "sharded safetensors" if len(shards) > 1 else "safetensors"
    return Checkpoint(path, kind, tensors, files)


def _sharded_torch(path: Path) -> Checkpoint:
    where = read_index(path / TORCH_INDEX)
    tensors: dict[str, np.ndarray] = {}
    files: dict[str, tuple[str, ...]] = {}
    for file in sorted(set(where.values())):
        found, _, _ = _torch(path / file)
        absent = [name for name, shard in where.items() if shard == file and name not in found]
        if absent:
            message = f"{path / file}: there is no tensor {absent[0]!r}, which {TORCH_INDEX} names"
            raise ValueError(missing(message, absent[0], found))
        files[file] = tuple(name for name in found if where.get(name) == file)
        tensors |= {name: found[name] for name in files[file]}
    return Checkpoint(path, "torch", tensors, files)


def _torch(path: Path) -> tuple[dict[str, np.ndarray], str, tuple[str, ...]]:
    """Returns the tensors of a state dict, where in the file they were, and what is no tensor."""
    try:
        import torch
    except ImportError:
        raise ValueError(
            f"{path}: a file of torch.save needs torch; pip install 'purepruning[torch]'"
        ) from None
    try:
        found = _load(torch, path)
    except Exception as error:  # of zipfile, pickle and torch, many kinds
        why = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(
            f"{path} cannot be read by torch with weights_only=True ({why[:200]}); save the "
            "state_dict() of the model alone"
        ) from None
    inside = ""
    if isinstance(found, Mapping) and not any(isinstance(x, torch.Tensor) for x in found.values()):
        inside = next((k for k in _CONTAINERS if isinstance(found.get(k), Mapping)), "")
        found = found[inside] if inside else found
    if not isinstance(found, Mapping) or not found:
        raise ValueError(f"{path} holds {shown(found)}, and no state dict; save model.state_dict()")
    tensors = {str(k): x for k, x in found.items() if isinstance(x, torch.Tensor)}
    if not tensors:
        raise ValueError(
            f"{path} holds no tensors, but {', '.join(map(repr, list(found)[:5]))}; save "
            "model.state_dict()"
        )
    left_out = tuple(str(key) for key in found if str(key) not in tensors)
    return {name: _as_numpy(torch, name, x) for name, x in tensors.items()}, inside, left_out


def _load(torch: Any, path: Path) -> Any:
    """Returns what a file holds; its tensors are mapped, but for files of torch before 1.6."""
    with path.open("rb") as file:
        mapped = file.read(4) == b"PK\x03\x04"  # a zip archive, as torch knows one
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an error says enough
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


def _as_numpy(torch: Any, name: str, x: Any) -> np.ndarray:
    if x.layout != torch.strided or x.is_quantized or x.is_meta:
        raise ValueError(f"{name!r} is a sparse, quantised or meta tensor; save it dense")
    x = x.detach().contiguous()
    bits = {torch.bfloat16: np.uint16, torch.float8_e4m3fn: np.uint8, torch.float8_e5m2: np.uint8}
    if x.dtype not in bits:
        found: np.ndarray = x.numpy()
        return found
    integers = torch.int16 if x.element_size() == 2 else torch.uint8
    dtype = {
        torch.bfloat16: ml_dtypes.bfloat16,
        torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn,
        torch.float8_e5m2: ml_dtypes.float8_e5m2,
    }
    raw: np.ndarray = x.view(integers).numpy().view(dtype[x.dtype])
    return raw
