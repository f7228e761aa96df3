"""The scales of a target from a range, and the range of a weight."""

from __future__ import annotations

from typing import Any

from purepruning.arrays import namespace, stop_gradient
from purepruning.quantize.config import Target, grouped
from purepruning.quantize.fake import Scale, affine, fake_quantize, symmetric


def scale_of(target: Target, smallest: Any, largest: Any) -> Scale:
    """Returns the scale, or scales, of a target whose numbers have this range."""
    rule = affine if target.scheme == "affine" else symmetric
    return rule(smallest, largest, *target.range)


def weight_scale(weight: Any, target: Target) -> Scale:
    """Returns the scale, or scales, of a weight in the shape of :func:`grouped`, by its own range.

    They have as many axes as the weight.
    """
    xp = namespace(weight)
    wide = stop_gradient(xp.astype(weight, xp.float32))
    axes = grouped(target)[1]
    if not axes:
        return scale_of(target, wide, wide)
    smallest = xp.min(wide, axis=axes, keepdims=True)
    return scale_of(target, smallest, xp.max(wide, axis=axes, keepdims=True))


def quantized_weight(weight: Any, target: Target) -> Any:
    """Returns a weight fake-quantised by its own range."""
    return fake_quantize(weight, *weight_scale(weight, target), *target.range)
