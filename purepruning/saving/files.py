"""Files that appear whole or not at all, and are checked when they are read."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path

import numpy as np
import safetensors.numpy


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file that appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_whole(path: Path, kind: str, version: int) -> tuple[dict, dict[str, np.ndarray]]:
    """Returns the header and the arrays of a file of ``save_<kind>``, in the given version."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory")
    path.stat()  # FileNotFoundError, with the path; safetensors' own differs by version
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if "purepruning" not in metadata:
                raise ValueError(f"{path} holds no {kind}: it was not written by save_{kind}")
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or is damaged: {error}") from error
    try:
        header = json.loads(metadata["purepruning"])
        if header["format"] != kind or header["format_version"] != version:
            raise ValueError(
                f"format {header['format']!r}, version {header['format_version']}, by purepruning "
                f"{header['library_version']}; this is version {version} of {kind!r}"
            )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as {kind}: {error}") from error
    return header, arrays
