"""Naive quantisation: weights as integer multiples of their largest magnitude over the highest.

NNI's NaiveQuantizer has 8 bits, cuts fractions off, and keeps the largest scale that a layer ever
had; here numbers are rounded unless ``rounding="truncate"``, and scales are those of the weights.
"""

from __future__ import annotations

from typing import Any, Literal

from purepruning.arguments import one_of
from purepruning.arrays import namespace, stop_gradient
from purepruning.quantize.config import QuantizationConfig, Target, grouped
from purepruning.quantize.fake import Scale, symmetric
from purepruning.quantize.integers import Levels, weight_levels
from purepruning.quantize.targets import each_weight, refuse_start
from purepruning.types import Params


def weights(
    params: Params,
    state: None,
    config: QuantizationConfig,
    *,
    rounding: Literal["nearest", "truncate"] = "nearest",
) -> Params:
    r"""Returns ``params`` with the weights of ``config`` rounded to multiples of a scale.

    $$\hat w = s \, \mathrm{round}(w / s), \qquad s = \max |w| / (2^{b-1} - 1)$$

    Gradients are passed on as they are. Whatever the rules' scheme, integers are symmetric; their
    granularity holds.

    Args:
        params: the parameters.
        state: None; there is none.
        config: the resolved rules.
        rounding: ``"truncate"`` rounds towards zero, as NNI does.

    >>> import jax.numpy as jnp
    >>> import purepruning as pp
    >>> params = {"fc.w": jnp.array([[0.3, -1.27]])}
    >>> layer = pp.make_layer(params, "fc.w", "Linear", out_axes=0, in_axes=1)
    >>> config = pp.resolve_quantization([{"quant_types": ["weight"], "quant_bits": 8}], [layer])
    >>> weights(params, None, config)["fc.w"].tolist()
    [[0.3, -1.27]]
    """
    one_of("naive.weights: rounding", rounding, ("nearest", "truncate"))
    refuse_start("naive.weights", config)

    def quantized(weight: Any, target: Target) -> Any:
        xp = namespace(weight)
        wide = xp.astype(weight, xp.float32)
        constant = stop_gradient(wide)
        scale = naive_scale(constant, target).scale
        whole = (xp.trunc if rounding == "truncate" else xp.round)(constant * (1 / scale))
        return xp.astype(whole * scale + (wide - constant), weight.dtype)

    return each_weight("naive.weights", params, config, quantized)


def levels(params: Params, config: QuantizationConfig) -> dict[str, Levels]:
    """Returns by site how integers stand for quantised weights, for :mod:`integers`."""
    return weight_levels("naive.levels", params, config, _levels)


def _levels(weight: Any, target: Target) -> Levels:
    high = 2 ** (target.bits - 1) - 1
    return Levels(*naive_scale(weight, target), -high, high)


def naive_scale(weight: Any, target: Target) -> Scale:
    """Returns the symmetric scale, or scales, of a weight in the shape of :func:`grouped`."""
    xp = namespace(weight)
    axes, high = grouped(target)[1], 2 ** (target.bits - 1) - 1
    largest = xp.max(xp.abs(weight), axis=axes, keepdims=True) if axes else xp.abs(weight)
    return symmetric(largest, largest, -high, high)
