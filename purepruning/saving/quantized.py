"""Quantised models in files: a calibration in JSON, by NNI's names, and weights in safetensors.

The JSON file is what NNI's ``export_model`` returns, by layer: ``weight_bits``, ``weight_scale``,
``weight_zero_point``, ``input_bits``, ``tracked_min_input``, ``tracked_max_input``, and the same of
outputs. The safetensors file beside it holds the weights: packed at their width, with scales, where
they are quantised, and whole where they are not. (NNI writes floats, and reads no scales back.)
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy

from purepruning.arguments import instance, missing, shown
from purepruning.arrays import (
    array_like,
    has_values,
    is_array,
    is_concrete,
    is_numpy,
    is_torch,
    jax_array,
)
from purepruning.quantize import integers
from purepruning.quantize.config import QuantizationConfig, check_quantization
from purepruning.quantize.integers import IntegerWeight
from purepruning.quantize.observers import Range
from purepruning.quantize.targets import check_sites, weights_of
from purepruning.saving.files import (
    BROKEN,
    check_sum,
    checksum,
    file_path,
    read_whole,
    unreadable,
    write_whole,
)
from purepruning.trees import flatten
from purepruning.types import Params
from purepruning.versions import __version__

FORMAT_VERSION = 1


class QuantizedModel(NamedTuple):
    """What a file of a quantised model holds.

    Attributes:
        params: a tree like the one that was given: quantised weights as they were, bit for bit.
        weights: the integers by site.
        ranges: the ranges of inputs and outputs by site.
    """

    params: Params
    weights: dict[str, IntegerWeight]
    ranges: dict[str, Range]


def save_quantized(
    path: str | os.PathLike[str],
    params: Params,
    weights: Mapping[str, IntegerWeight],
    ranges: Mapping[str, Range],
    config: QuantizationConfig,
) -> None:
    """Writes a quantised model to ``path``, in safetensors, and its calibration to a JSON file.

    The latter is ``model.json`` beside ``model.safetensors``, and has ``.json`` added to any other
    name. Both appear whole or not at all.

    Args:
        path: the safetensors file.
        params: all parameters; those with integers are not written.
        weights: what :func:`purepruning.quantize.integers.of` returned.
        ranges: of inputs and outputs: what :func:`purepruning.quantize.observers.ranges` returned.
        config: the resolved rules.

    Raises:
        KeyError: a weight or a range of the config is missing.
        OSError: a file cannot be written.

    >>> import tempfile, numpy as np
    >>> import purepruning as pp
    >>> from purepruning.quantize import integers, ptq
    >>> params = {"fc.w": np.array([[1.0, -2.0, 5.0]], np.float32)}
    >>> layer = pp.make_layer(params, "fc.w", "Linear", name="fc", out_axes=0, in_axes=1)
    >>> config = pp.resolve_quantization([{"quant_types": ["weight"], "quant_bits": 3}], [layer])
    >>> weights = integers.of(ptq.weights(params, None, config), ptq.levels(params, config), config)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_quantized(folder + "/model.safetensors", params, weights, {}, config)
    ...     load_quantized(folder + "/model.safetensors", params).params["fc.w"].tolist()
    [[1.0, -2.0, 5.0]]
    """
    where = "save_quantized"
    target, leaves = file_path(path, where), flatten(params).leaves
    check_quantization(where, config)
    weights_of(where, params, config)
    check_sites(f"{where}: weights", weights, config.weights, "integers.of")
    check_sites(f"{where}: ranges", ranges, config.activations, "observers.ranges")
    for name, x in leaves.items():
        if not (is_array(x) and has_values(x) and is_concrete(x)):
            raise TypeError(
                f"{where}: the parameter {name!r} must be a known array, got {shown(x)}; save "
                "outside of jit and vmap"
            )
    arrays: dict[str, np.ndarray] = {}
    rows: dict[str, Any] = {}
    for t in config.weights:
        weight = weights[t.site]
        instance(
            weight, IntegerWeight, f"{where}: weights[{t.site!r}]", "what integers.of returned"
        )
        name = t.owner.weight
        arrays |= {f"{name}:integers": integers.pack(weight), f"{name}:scale": weight.scale}
        arrays[f"{name}:zero_point"] = weight.zero_point
        rows[name] = {
            "site": t.site,
            "shape": list(weight.integers.shape),
            "grouped": list(weight.grouped),
            "bits": weight.bits,
            "low": weight.low,
            "dtype": str(weight.integers.dtype),
        }
    arrays |= {name: _as_stored(x) for name, x in leaves.items() if name not in rows}
    header = {
        "format": "quantized",
        "format_version": FORMAT_VERSION,
        "library_version": __version__,
        "weights": rows,
        "crc32": {name: checksum(x) for name, x in arrays.items()},
    }
    arrays = {name: np.asarray(x, order="C") for name, x in arrays.items()}
    content = safetensors.numpy.save(arrays, {"purepruning": json.dumps(header, sort_keys=True)})
    calibration = json.dumps(_calibration(where, weights, ranges, config), indent=1)
    write_whole(target, content)
    write_whole(_json_of(target), calibration.encode())


def load_quantized(path: str | os.PathLike[str], params: Params) -> QuantizedModel:
    """Returns what :func:`save_quantized` wrote.

    Args:
        path: the safetensors file; the JSON file lies beside it.
        params: a tree of the same structure, for names and framework; shapes will do.

    Raises:
        FileNotFoundError: one of the files is missing.
        KeyError: the file has no parameter of a name in ``params``.
        ValueError: a file is damaged, or was not written by :func:`save_quantized`, or a parameter
            has another shape than in ``params``.
    """
    target, tree = file_path(path, "load_quantized"), flatten(params)
    if not tree.leaves:
        raise ValueError(f"load_quantized: params hold no parameter, got {shown(params)}")
    header, arrays = read_whole(target, "quantized", FORMAT_VERSION)
    weights, values = {}, {}
    try:
        for name, crc in header["crc32"].items():
            check_sum(name, arrays[name], {"crc32": crc})
        for name, row in header["weights"].items():
            shape = tuple(row["shape"])
            q = integers.unpack(
                arrays[f"{name}:integers"], shape, row["bits"], row["low"], row["dtype"]
            )
            weights[row["site"]] = IntegerWeight(
                q,
                arrays[f"{name}:scale"],
                arrays[f"{name}:zero_point"],
                row["bits"],
                row["low"],
                tuple(row["grouped"]),
            )
            values[name] = weights[row["site"]].values()
        ranges = _ranges(json.loads(_json_of(target).read_text()))
    except BROKEN as error:
        raise unreadable(target, "quantized", error) from error
    found = {}
    for name, like in tree.leaves.items():
        if not is_array(like):
            raise TypeError(
                f"load_quantized: the parameter {name!r} must be an array, got {shown(like)}"
            )
        if name not in values and name not in arrays:
            message = f"load_quantized: {target} has no parameter {name!r}"
            raise KeyError(missing(message, name, [*values, *arrays]))
        value = values[name] if name in values else arrays[name]
        if tuple(value.shape) != tuple(like.shape):
            raise ValueError(
                f"load_quantized: {target}: the parameter {name!r} has shape "
                f"{tuple(value.shape)}, that of params {tuple(like.shape)}; give params of the "
                "model that was saved"
            )
        found[name] = _as_leaf(like, value)
    return QuantizedModel(tree.rebuild(found), weights, ranges)


def _json_of(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(".safetensors") + ".json")


def _calibration(
    where: str,
    weights: Mapping[str, IntegerWeight],
    ranges: Mapping[str, Range],
    config: QuantizationConfig,
) -> dict[str, dict[str, Any]]:
    """Returns the bits, scales and ranges by layer, under NNI's names."""
    found: dict[str, dict[str, Any]] = {}
    for t in config.targets:
        row = found.setdefault(t.name, {})
        row[f"{t.what}_bits"] = t.bits
        if t.what == "weight":
            row["weight_scale"] = weights[t.site].scale.tolist()
            row["weight_zero_point"] = weights[t.site].zero_point.tolist()
            continue
        instance(ranges[t.site], Range, f"{where}: ranges[{t.site!r}]", "a Range")
        for name, bound in zip(("min", "max"), ranges[t.site], strict=True):
            row[f"tracked_{name}_{t.what}"] = float(integers.on_host(bound))
    return found


def _ranges(calibration: Mapping[str, Mapping[str, Any]]) -> dict[str, Range]:
    return {
        f"{name}:{what}": Range(
            np.float32(row[f"tracked_min_{what}"]), np.float32(row[f"tracked_max_{what}"])
        )
        for name, row in calibration.items()
        for what in ("input", "output")
        if f"tracked_min_{what}" in row
    }


def _as_leaf(like: Any, x: Any) -> Any:
    """Returns an array of NumPy in the framework and dtype of ``like``."""
    if is_torch(like):
        return array_like(like, x).to(like.dtype)
    x = x.astype(like.dtype)
    return x if is_numpy(like) else jax_array(x)


def _as_stored(x: Any) -> np.ndarray:
    """Returns an array of NumPy; in float32 if of a dtype that safetensors' NumPy side has not."""
    found = integers.on_host(x)
    return found.astype(np.float32) if found.dtype.kind == "V" else found
