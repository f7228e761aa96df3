"""A quantization config as one of torchao, whose kernels compute in integers."""

from __future__ import annotations

from typing import Any

import torch
from torchao.quantization import (
    FqnToConfig,
    Int8DynamicActivationIntxWeightConfig,
    IntxWeightOnlyConfig,
    MappingType,
    PerAxis,
    PerGroup,
)

from purepruning.quantize.config import QuantizationConfig, Target, check_quantization


def to_torchao_config(config: QuantizationConfig) -> Any:
    """Returns what ``torchao.quantization.quantize_(model, config, filter_fn=None)`` takes.

    Weights of linear layers get a scale for every output channel, also where the config has one for
    the whole weight, or for groups of inputs. An input of 8 bits is quantised as it comes.

    Raises:
        ValueError: what torchao has not: other layers than linear ones, more than 8 bits, outputs,
            inputs of other than 8 bits or without their weight.
    """
    where = "to_torchao_config"
    check_quantization(where, config)
    inputs = {t.name: t for t in config.activations if t.what == "input"}
    weights = {t.name for t in config.weights}
    for target in config.activations:
        if target.what == "output" or target.name not in weights or target.bits != 8:
            raise ValueError(
                f"{where}: torchao quantises 8-bit inputs of layers whose weights are quantised, "
                f"and {target.site!r} with {target.bits} bits is none; leave it out"
            )
    return FqnToConfig({t.name: _config(where, t, inputs.get(t.name)) for t in config.weights})


def _config(where: str, target: Target, read: Target | None) -> Any:
    if target.owner.type != "Linear" or target.bits > 8:
        raise ValueError(
            f"{where}: torchao quantises linear layers to at most 8 bits, and {target.name!r} is a "
            f"{target.owner.type} of {target.bits}; leave it out"
        )
    grouped = isinstance(target.granularity, int)
    granularity = PerGroup(target.granularity) if grouped else PerAxis(0)
    dtype = getattr(torch, f"int{target.bits}")
    mapping = _mapping(target)
    if read is None:
        return IntxWeightOnlyConfig(
            weight_dtype=dtype, granularity=granularity, mapping_type=mapping
        )
    return Int8DynamicActivationIntxWeightConfig(
        weight_dtype=dtype,
        weight_granularity=granularity,
        weight_mapping_type=mapping,
        act_mapping_type=_mapping(read),
    )


def _mapping(target: Target) -> Any:
    return MappingType.ASYMMETRIC if target.scheme == "affine" else MappingType.SYMMETRIC
