"""The scales of a target from a range, and the range of a weight."""

from __future__ import annotations

from typing import Any

from purepruning.arrays import namespace, stop_gradient
from purepruning.quantize.config import Target, grouped
from purepruning.quantize.fake import Scale, affine, fake_quantize, symmetric
from purepruning.quantize.integers import Levels


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
    # Ranges contain zero; taken first, that shows that pruned zeros change no range.
    below, above = xp.clip(wide, None, 0.0), xp.clip(wide, 0.0, None)
    axes = grouped(target)[1]
    if axes:
        below = xp.min(below, axis=axes, keepdims=True)
        above = xp.max(above, axis=axes, keepdims=True)
    return scale_of(target, below, above)


def range_levels(weight: Any, target: Target) -> Levels:
    """Returns how integers stand for a weight that is quantised by its own range."""
    return Levels(*weight_scale(weight, target), *target.range)


def quantized_weight(weight: Any, target: Target) -> Any:
    """Returns a weight fake-quantised by its own range."""
    return fake_quantize(weight, *weight_scale(weight, target), *target.range)
