"""A quantization config as rules of qwix, whose kernels compute in integers."""

from __future__ import annotations

import re
from typing import Any

import qwix

from purepruning.quantize.config import QuantizationConfig, Target, check_quantization


def to_qwix_rules(config: QuantizationConfig) -> list[Any]:
    """Returns a ``qwix.QuantizationRule`` for every layer whose weight is quantised.

    For ``qwix.quantize_model(model, qwix.PtqProvider(rules))``, and ``QtProvider`` in training.
    qwix has a scale for every output channel where the config has one for the weight; its
    symmetric scales are ``max |w| / 127.5``, where ours are ``/ 127``.

    Raises:
        ValueError: integers that qwix has not: other than 2, 4 and 8 bits, an input without its
            weight, outputs.

    >>> from purepruning import Layer, resolve_quantization
    >>> table = [Layer("a.fc", "Linear", "a.fc.kernel", (8, 4), out_axes=(1,), in_axes=(0,))]
    >>> rule = {"quant_types": ["weight"], "quant_bits": 8, "quant_scheme": "symmetric"}
    >>> [rule] = to_qwix_rules(resolve_quantization(rule, table))
    >>> rule.module_path, rule.weight_qtype, rule.weight_calibration_method
    ('a/fc', 'int8', 'absmax')
    """
    where = "to_qwix_rules"
    check_quantization(where, config)
    inputs = {t.name: t for t in config.activations if t.what == "input"}
    weights = {t.name for t in config.weights}
    for target in config.activations:
        if target.what == "output" or target.name not in weights:
            raise ValueError(
                f"{where}: qwix quantises what layers multiply, and {target.site!r} is not that; "
                "write a rule for the weight and the input of the layer that reads it"
            )
    return [_rule(where, t, inputs.get(t.name)) for t in config.weights]


def _rule(where: str, weight: Target, read: Target | None) -> Any:
    for target in (weight, read):
        if target is not None and target.bits not in (2, 4, 8):
            raise ValueError(
                f"{where}: {target.site!r} has {target.bits} bits; qwix has kernels for 2, 4 and 8"
            )
    grouped = isinstance(weight.granularity, int)
    given: dict[str, Any] = {} if read is None else {"act_qtype": f"int{read.bits}"}
    if read is not None:
        given["act_calibration_method"] = _method(read)
    return qwix.QuantizationRule(
        module_path=re.escape(weight.name.replace(".", "/")),
        weight_qtype=f"int{weight.bits}",
        tile_size=weight.granularity if grouped else None,
        weight_calibration_method=_method(weight),
        **given,
    )


def _method(target: Target) -> str:
    return "minmax" if target.scheme == "affine" else "absmax"
