"""Quantised torch modules as ONNX programs that integer kernels can run."""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from purepruning.quantize.config import QuantizationConfig, Target, check_quantization
from purepruning.quantize.integers import IntegerWeight, Levels
from purepruning.quantize.targets import check_sites, map_arrays
from purepruning_interop.torch.capture import replace
from purepruning_interop.torch.program import check_whole


def export_onnx(
    model: torch.nn.Module,
    path: str | os.PathLike[str],
    weights: Mapping[str, IntegerWeight],
    levels: Mapping[str, Levels],
    config: QuantizationConfig,
    *inputs: Any,
) -> None:
    """Writes ``model`` as an ONNX program with its weights as integers; returns nothing.

    Weights are int8 or uint8 and go through DequantizeLinear, with one scale or one for every
    output channel; inputs and outputs go through QuantizeLinear and DequantizeLinear. Below 8 bits
    integers are of the narrower range, and numbers are clipped to what it holds. The first axis of
    every input may have any size. The module is left as it was.

    Args:
        model: the module, in evaluation mode.
        path: the file.
        weights: what :func:`purepruning.quantize.integers.of` returned.
        levels: of inputs and outputs: what ``activation_levels`` of the quantizer returned; of
            ``qat``, :func:`purepruning.quantize.ptq.activation_levels`.
        config: the resolved rules.
        *inputs: what a call of the model takes.

    Raises:
        TypeError: ``model`` is no module.
        KeyError: the integers of a weight, or the levels of a site, are missing.
        ValueError: more than 8 bits, scales by group, or levels that int8 has not, such as those
            of a zero point that is no whole number.
    """
    where = "export_onnx(model, path, ...)"
    check_whole(where, model)
    check_quantization(where, config)
    check_sites(f"{where}: weights", weights, config.weights, "integers.of")
    check_sites(f"{where}: levels", levels, config.activations, "ptq.activation_levels")
    quantised = _Quantised(model, weights, levels, config)
    batch = tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs)
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)  # it warns of packages that are not installed
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Registers the operators that the exporter writes as QuantizeLinear and back.
            importlib.import_module("torch.ao.quantization.fx._decomposed")
            program = torch.onnx.export(
                quantised, inputs, dynamo=True, verbose=False, dynamic_shapes=(batch,)
            )
            assert program is not None
            program.save(os.fspath(path))
    finally:
        exporter.setLevel(level)


class _Quantised(torch.nn.Module):
    """A module that computes from integers, by operators that ONNX knows."""

    def __init__(
        self,
        model: torch.nn.Module,
        weights: Mapping[str, IntegerWeight],
        levels: Mapping[str, Levels],
        config: QuantizationConfig,
    ) -> None:
        super().__init__()
        self.model = model
        self._weights: list[tuple[str, Any, Any]] = []
        for i, target in enumerate(config.weights):
            q, scale, zero, axis = _of_weight(weights[target.site], target)
            self.register_buffer(f"integers{i}", q)
            self.register_buffer(f"scale{i}", scale)
            self.register_buffer(f"zero{i}", zero)
            bounds = torch.iinfo(q.dtype)
            one = (float(scale[0]), int(zero[0])) if axis is None else (axis,)
            self._weights.append((target.owner.weight, one, (bounds.min, bounds.max, q.dtype)))
        self._at = {t.site: _at_site(levels[t.site], t) for t in config.activations}

    def forward(self, *inputs: Any) -> Any:
        q = torch.ops.quantized_decomposed
        params = {}
        for i, (name, one, of_dtype) in enumerate(self._weights):
            x, scale, zero = (getattr(self, f"{n}{i}") for n in ("integers", "scale", "zero"))
            if len(one) == 2:
                params[name] = q.dequantize_per_tensor(x, *one, *of_dtype)
            else:
                params[name] = q.dequantize_per_channel(x, scale, zero, *one, *of_dtype)
        return replace(self.model, *inputs, at=self._at, params=params)[0]


def _of_weight(weight: IntegerWeight, target: Target) -> tuple[Any, Any, Any, int | None]:
    """Returns integers, scales and zero points as tensors, and the axis of channels."""
    q, scale, zero = weight.integers.astype(np.int64), weight.scale, weight.zero_point
    dtype = weight.integers.dtype
    if not (zero == np.round(zero)).all():  # halfway between two levels
        q, scale, zero = 2 * q - np.int64(2 * zero), scale / 2, np.zeros_like(zero)
        dtype = np.dtype(np.int8)
    bounds = np.iinfo(dtype)
    if dtype.itemsize > 1 or q.min() < bounds.min or q.max() > bounds.max:
        raise ValueError(
            f"export_onnx: the {target.bits} bits of the weight of layer {target.name!r} do not "
            "fit into 8; quantise it to 8 bits or fewer (7 with dorefa)"
        )
    if isinstance(target.granularity, int):
        raise ValueError(
            f"export_onnx: layer {target.name!r} has a scale for every {target.granularity} "
            "inputs, which DequantizeLinear of this opset has not; quantise by channel"
        )
    by_channel = scale.size > 1
    axis = target.owner.out_axes[0] if by_channel else None
    shape = (scale.size,)
    zeros = np.broadcast_to(zero, scale.shape).reshape(shape).astype(dtype)
    scales = np.ascontiguousarray(scale.reshape(shape))
    return torch.from_numpy(q.astype(dtype)), torch.from_numpy(scales), torch.tensor(zeros), axis


def _at_site(levels: Levels, target: Target) -> Any:
    """Returns the function that quantises what stands at a site."""
    scale, zero = float(levels.scale), float(levels.zero_point)
    dtype = torch.int8 if levels.low < 0 else torch.uint8
    bounds = torch.iinfo(dtype)
    if target.bits > 8:
        raise ValueError(
            f"export_onnx: the {target.bits} bits at {target.site!r} do not fit into 8; quantise "
            "to 8 bits or fewer"
        )
    if not (zero.is_integer() and bounds.min <= zero <= bounds.max):
        raise ValueError(
            f"export_onnx: the zero point {zero:g} at {target.site!r} is no number of {dtype}; of "
            "lsq_plus, call lsq_plus.round_offsets first, and evaluate by what it returns"
        )
    narrow = (levels.low, levels.high) != (bounds.min, bounds.max)
    given = scale, int(zero), bounds.min, bounds.max, dtype

    def quantised(x: Any) -> Any:
        q = torch.ops.quantized_decomposed
        if narrow:
            x = torch.clamp(x, (levels.low - zero) * scale, (levels.high - zero) * scale)
        return q.dequantize_per_tensor(q.quantize_per_tensor(x, *given), *given)

    return lambda value: (map_arrays(quantised, value), None)
