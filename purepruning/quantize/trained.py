"""What quantizers with trained scales share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from purepruning.arguments import floats, whole_number
from purepruning.arrays import namespace, stop_gradient
from purepruning.quantize.config import QuantizationConfig, Target, group_size, grouped
from purepruning.quantize.fake import checked_scale
from purepruning.quantize.targets import each_weight
from purepruning.types import Params


def stepped(x: Any, scale: Any, low: int, high: int, size: int) -> Any:
    """Returns float32 ``x`` in steps of a scale, with gradients for both, see ``lsq.quantize``."""
    xp = namespace(x)
    constant, step = stop_gradient(x), stop_gradient(scale)
    steps = constant * (1 / step)
    inside = (steps >= low) & (steps <= high)
    whole = xp.round(xp.clip(steps, low, high))
    slope = xp.where(inside, whole - steps, whole) * gradient_scale(high, size)
    # Both are zero, with a derivative of one.
    of_x = xp.where(inside, x - constant, 0.0)
    value = whole * step + of_x + slope * (scale - step)
    return xp.where(constant == constant, value, x)


def checked(where: str, x: Any, scale: Any, low: Any, high: Any, size: Any) -> Any:
    """Returns the scale that ``quantize`` of a module is given, its arguments looked at."""
    floats(x, f"{where}: x")
    whole_number(size, f"{where}: size", 1, 2**63 - 1)
    whole_number(low, f"{where}: low", -(2**31), 0)
    whole_number(high, f"{where}: high", 1, 2**31 - 1)
    return checked_scale(scale, f"{where}: scale", x)


def gradient_scale(high: int, size: int) -> float:
    """Returns the factor of the gradient of a scale that ``size`` numbers share."""
    return 1 / math.sqrt(high * size)


def integer_range(where: str, target: Target, *, unsigned: bool) -> tuple[int, int]:
    """Returns the smallest and largest integer: all those of the bits.

    Raises:
        ValueError: none of them is positive.
    """
    if unsigned:
        return 0, 2**target.bits - 1
    if target.bits == 1:
        raise ValueError(
            f"{where}: rule {target.rule}: integers of 1 bit are -1 and 0; write 2 bits, or "
            "'quant_dtype': 'uint'"
        )
    return -(2 ** (target.bits - 1)), 2 ** (target.bits - 1) - 1


def symmetric_range(where: str, target: Target) -> tuple[int, int]:
    """Returns the smallest and largest integer where the zero point is 0: signed unless said.

    Raises:
        ValueError: the rule says that the scheme is affine.
    """
    if target.scheme == "affine" and target.is_scheme_given:
        quantizer, per = where.partition(".")[0], "per_channel_" * (target.granularity == "channel")
        other = "qat" if target.what == "weight" else "lsq_plus"
        raise ValueError(
            f"{where}: rule {target.rule}: quant_scheme of the {target.what} of {target.name!r} is "
            f"affine, but {quantizer} has no zero point there; write 'quant_scheme': "
            f"{{{target.what!r}: '{per}symmetric'}}, or use {other}"
        )
    return integer_range(where, target, unsigned=target.dtype == "uint")


def quantized_weights(
    where: str, params: Params, scales: Mapping[str, Any], config: QuantizationConfig
) -> Params:
    """Returns ``params`` with their weights in steps of the scales, by site."""
    for target in config.weights:
        _check_scale(where, target, scales[target.site])

    def quantized(weight: Any, target: Target, scales: Mapping[str, Any]) -> Any:
        xp = namespace(weight)
        low, high = symmetric_range(where, target)
        wide = xp.astype(weight, xp.float32)
        found = stepped(wide, scales[target.site], low, high, group_size(target))
        return xp.astype(found, weight.dtype)

    used = {target.site: scales[target.site] for target in config.weights}
    return each_weight(where, params, config, quantized, used)


def or_one(scale: Any) -> Any:
    """Returns a scale to begin with; 1 in the place of 0, of what has no range."""
    return namespace(scale).where(scale == 0, 1.0, scale)


def _check_scale(where: str, target: Target, scale: Any) -> None:
    argument = f"{where}: scales[{target.site!r}]"
    floats(scale, argument)
    shape, axes = grouped(target)
    wanted = tuple(1 if a in axes else n for a, n in enumerate(shape))
    if tuple(scale.shape) not in (wanted, ()):
        source = where.rpartition(".")[0]
        raise ValueError(
            f"{argument} has shape {tuple(scale.shape)}, but by its rule {wanted}; give what "
            f"{source}.init returned for this config"
        )
