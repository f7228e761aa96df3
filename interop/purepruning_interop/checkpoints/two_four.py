"""2:4 weights in the layout of the package compressed-tensors: ``sparse-24-bitmask``.

Of a matrix ``(out, in)`` called ``X.weight`` there are ``X.compressed``, ``(out, in / 2)``: the two
of every four in a row that are kept, in their order; ``X.bitmask``, ``(out, ceil(in / 8))``
bytes: where they were, the first in the lowest bit; and ``X.shape``, ``(2, 1)`` integers. The
entry ``quantization_config`` of ``config.json`` tells readers of it.

Source: compressed-tensors 0.11, ``compressors/sparse_compressors/sparse_24_bitmask.py``. Versions
up to 0.14 have it; vLLM reads such folders before its version 0.19.1, where packed 2:4 was removed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from purepruning.saving.tensors import Stored, of_array, read_shards, write_tensors

#: The version of compressed-tensors whose layout this is.
VERSION = "0.11.0"
_ELEMENTS = 2**20  # that are packed at a time


def two_four_tensors(name: str, weight: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the three tensors that stand for a 2:4 weight, by name.

    Args:
        name: of the weight; it ends in ``.weight``.
        weight: ``(out, in)``.
        mask: what is kept, exactly two of every four in a row.

    Raises:
        ValueError: it is no such weight.

    >>> w = np.array([[0, 1, 2, 0, 5, 0, 0, 6.0]])
    >>> found = two_four_tensors("fc.weight", w, w != 0)
    >>> found["fc.compressed"].tolist(), found["fc.bitmask"].tolist(), found["fc.shape"].tolist()
    ([[1.0, 2.0, 5.0, 6.0]], [[150]], [[1], [8]])
    """
    if not name.endswith(".weight") or weight.ndim != 2 or weight.shape[1] % 4:
        raise ValueError(
            f"{name!r} of shape {weight.shape}: this layout is of matrices called '*.weight', "
            "whose rows fours divide; leave it out"
        )
    kept = np.broadcast_to(mask, weight.shape)
    if (kept.reshape(-1, 4).sum(1, dtype=np.int8) != 2).any():
        raise ValueError(f"{name!r}: its mask does not keep two of every four; prune it by 2:4")
    rows, columns = weight.shape
    stem = name.removesuffix(".weight")
    return {
        f"{stem}.compressed": weight[kept].reshape(rows, columns // 2),
        f"{stem}.bitmask": np.packbits(kept, axis=-1, bitorder="little"),
        f"{stem}.shape": np.array([[rows], [columns]], np.int64),
    }


def pack_file(file: Path, masks: Path, names: Iterable[str]) -> dict[str, int]:
    """Packs weights of a file of safetensors in their place; returns bytes by name of all of it.

    Rows are packed some at a time, and the file appears whole.

    Args:
        file: what :func:`purepruning.prune_files` wrote.
        masks: the masks that it wrote.
        names: of the weights to pack; those of other files are left out.

    Raises:
        ValueError: one is no 2:4 weight, or its mask is missing.
        OSError: the file cannot be written.
    """
    (shard,), (bits,) = read_shards(file), read_shards(masks)
    packed = {name for name in names if name in shard.tensors}
    tensors: dict[str, tuple[str, tuple[int, ...], int, Iterator[Any]]] = {}
    for name, t in shard.tensors.items():
        if name not in packed:
            tensors[name] = (t.dtype, t.shape, t.stop - t.start, t.pieces())
            continue
        (rows, columns), stem = t.shape, name.removesuffix(".weight")
        shape = np.array([[rows], [columns]], np.int64)
        sizes = ((t.stop - t.start) // 2, rows * -(-columns // 8))
        parts = [
            ("compressed", t.dtype, (rows, columns // 2), sizes[0]),
            ("bitmask", "U8", (rows, -(-columns // 8)), sizes[1]),
        ]
        for part, dtype, of, size in parts:
            pieces = _pieces(name, part, t, bits.tensors[name])
            tensors[f"{stem}.{part}"] = (dtype, of, size, pieces)
        tensors[f"{stem}.shape"] = of_array(shape)
    write_tensors(file, tensors, shard.metadata)
    return {name: row[2] for name, row in tensors.items()}


def _pieces(name: str, part: str, weight: Stored, bits: Stored) -> Iterator[Any]:
    """Yields one of the tensors that stand for a weight, some rows at a time."""
    array, packed = weight.array(), bits.array()
    rows, columns = array.shape
    step = 2 * max(1, _ELEMENTS // (2 * columns))  # whole bytes of bits, since fours divide columns
    stem = name.removesuffix(".weight")
    for start in range(0, rows, step):
        some = array[start : start + step]
        first = start * columns // 8
        chunk = np.asarray(packed[first : first + -(-some.size // 8)])
        mask = np.unpackbits(chunk, count=some.size, bitorder="little").astype(bool)
        found = two_four_tensors(name, some, mask.reshape(some.shape))[f"{stem}.{part}"]
        yield np.ascontiguousarray(found).view(np.uint8).data


def two_four_config(
    config: Mapping[str, Any], dense: Iterable[str], global_sparsity: float
) -> dict[str, Any]:
    """Returns a ``config.json`` with what readers of the layout look for.

    Args:
        config: what it holds already.
        dense: names of the linear layers that are not in the layout.
        global_sparsity: fraction of all weights that is zero.
    """
    sparsity = {
        "format": "sparse-24-bitmask",
        "targets": ["Linear"],
        "ignore": sorted(dense),
        "global_sparsity": round(global_sparsity, 6),
        "sparsity_structure": "2:4",
        "registry_requires_subclass": False,
    }
    found = {
        "quant_method": "compressed-tensors",
        "version": VERSION,
        "format": "dense",
        "config_groups": {},
        "ignore": [],
        "quantization_status": "compressed",
        "sparsity_config": sparsity,
    }
    return {**config, "quantization_config": found}
