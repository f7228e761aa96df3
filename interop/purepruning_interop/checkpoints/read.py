"""Reading checkpoints: safetensors, one or sharded, and state dicts of torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import safetensors

from purepruning.arguments import missing, shown

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
TORCH_INDEX, TORCH_SINGLE = "pytorch_model.bin.index.json", "pytorch_model.bin"
#: What files of ``torch.save`` end in.
TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
#: Where programs put the weights in what they give to ``torch.save``.
_CONTAINERS = ("state_dict", "model_state_dict", "model", "module", "params", "weights")

#: safetensors' names of dtypes; those of packed floats have none in NumPy.
DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    **{f"{k}{n}": np.dtype(f"{k.lower()}{n // 8}") for k in "IU" for n in (8, 16, 32, 64)},
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Tensors by name, and where they came from.

    Attributes:
        path: the file or folder.
        kind: ``"safetensors"``, ``"sharded safetensors"`` or ``"torch"``.
        tensors: the tensors; those of safetensors lie in their files until they are used.
        files: the names of the tensors of each file, by its name, in the files' order.
        metadata: what the header of each file of safetensors says beside its tensors.
        inside: where in the file the weights were, such as ``"state_dict"``; empty at the top.
        left_out: what is in the file and no tensor.
    """

    path: Path
    kind: Literal["safetensors", "sharded safetensors", "torch"]
    tensors: Mapping[str, np.ndarray]
    files: Mapping[str, tuple[str, ...]]
    metadata: Mapping[str, Mapping[str, str]]
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
    same of ``pytorch_model.bin``.

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
        tensors, metadata = _safetensors(path)
        files = {path.name: tuple(tensors)}
        return Checkpoint(path, "safetensors", tensors, files, {path.name: metadata})
    if path.suffix in TORCH_SUFFIXES:
        tensors, inside, left_out = _torch(path)
        return Checkpoint(path, "torch", tensors, {path.name: tuple(tensors)}, {}, inside, left_out)
    raise ValueError(
        f"{path}: a checkpoint ends in .safetensors or {', '.join(TORCH_SUFFIXES)}, or is a "
        "folder; rename or convert it"
    )


def _folder(path: Path) -> Checkpoint:
    for index, single, of_torch in ((INDEX, SINGLE, False), (TORCH_INDEX, TORCH_SINGLE, True)):
        if (path / index).exists():
            return _sharded(path, path / index, of_torch)
        if (path / single).exists():
            found = read_checkpoint(path / single)
            return dataclasses.replace(found, path=path)
    raise FileNotFoundError(
        f"{path}: the folder has no {INDEX}, {SINGLE} or {TORCH_SINGLE}; name a file in it"
    )


def _sharded(path: Path, index: Path, of_torch: bool) -> Checkpoint:
    where = _weight_map(index)
    tensors: dict[str, np.ndarray] = {}
    files: dict[str, tuple[str, ...]] = {}
    metadata: dict[str, Mapping[str, str]] = {}
    for file in sorted(set(where.values())):
        if not (path / file).exists():
            raise FileNotFoundError(f"{path}: the shard {file!r} is missing; fetch it again")
        if of_torch:
            found, _, _ = _torch(path / file)
        else:
            found, metadata[file] = _safetensors(path / file)
        absent = [name for name, shard in where.items() if shard == file and name not in found]
        if absent:
            message = f"{path / file}: there is no tensor {absent[0]!r}, which {index.name} names"
            raise ValueError(missing(message, absent[0], found))
        files[file] = tuple(name for name in found if where.get(name) == file)
        tensors |= {name: found[name] for name in files[file]}
    return Checkpoint(
        path, "torch" if of_torch else "sharded safetensors", tensors, files, metadata
    )


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found = json.loads(index.read_bytes())["weight_map"]
        if not found or not all(isinstance(x, str) for pair in found.items() for x in pair):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{index}: it is no index with a 'weight_map' from tensors to files; fetch it again"
        ) from None
    for file in found.values():
        if Path(file).name != file:
            raise ValueError(f"{index}: a shard must lie in the folder, got {file!r}")
    return dict(found)


def _safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns the tensors of a file, mapped into memory, and its metadata."""
    try:
        with safetensors.safe_open(path, framework="numpy"):
            pass  # it checks the header against the file
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
    except (safetensors.SafetensorError, ValueError) as error:
        raise ValueError(
            f"{path} is no safetensors file, or is damaged ({error}); fetch or write it again"
        ) from None
    metadata = header.pop("__metadata__", {})
    names = sorted(header, key=lambda name: header[name]["data_offsets"])
    contents = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)
    tensors = {name: _tensor(path, name, header[name], contents[8 + size :]) for name in names}
    return tensors, metadata


def _tensor(path: Path, name: str, row: Mapping[str, Any], contents: np.ndarray) -> np.ndarray:
    if row["dtype"] not in DTYPES:
        raise ValueError(
            f"{path}: {name!r} is of dtype {row['dtype']}, which cannot be read; convert it"
        )
    first, last = row["data_offsets"]
    raw: np.ndarray = np.asarray(contents[first:last])
    dtype = DTYPES[row["dtype"]]
    if first % dtype.alignment:
        raw = raw.copy()  # the header of older writers has any length
    return raw.view(dtype).reshape(row["shape"])


def _torch(path: Path) -> tuple[dict[str, np.ndarray], str, tuple[str, ...]]:
    """Returns the tensors of a state dict, where in the file they were, and what is no tensor."""
    try:
        import torch
    except ImportError:
        raise ValueError(
            f"{path}: a file of torch.save needs torch; pip install 'purepruning[torch]'"
        ) from None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of zipfile, pickle and torch, many kinds
        why = str(error).strip().split("\n")[0]
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


def _as_numpy(torch: Any, name: str, x: Any) -> np.ndarray:
    if x.layout != torch.strided or x.is_quantized:
        raise ValueError(f"{name!r} is a sparse or quantised tensor; save it dense")
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
