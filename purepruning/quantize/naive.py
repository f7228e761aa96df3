"""Naive quantisation: weights as integer multiples of their largest magnitude over the highest.

NNI's NaiveQuantizer has 8 bits, cuts fractions off, and keeps the largest scale that a layer ever
had; here numbers are rounded unless ``rounding="truncate"``, and scales are those of the weights.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from purepruning.arguments import one_of
from purepruning.arrays import namespace, stop_gradient
from purepruning.quantize.config import QuantizationConfig, Target
from purepruning.quantize.integers import Levels, weight_levels
from purepruning.quantize.ranges import range_levels, weight_scale
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

    Raises:
        ValueError: the rules have a start step, or say 1 bit, which has no integer beside 0.

    >>> import jax.numpy as jnp
    >>> import purepruning as pp
    >>> params = {"fc.w": jnp.array([[0.3, -1.27]])}
    >>> layer = pp.make_layer(params, "fc.w", "Linear", out_axes=0, in_axes=1)
    >>> config = pp.resolve_quantization([{"quant_types": ["weight"], "quant_bits": 8}], [layer])
    >>> weights(params, None, config)["fc.w"].tolist()
    [[0.3, -1.27]]
    """
    one_of("naive.weights: rounding", rounding, ("nearest", "truncate"))

    def quantized(weight: Any, target: Target) -> Any:
        xp = namespace(weight)
        wide = xp.astype(weight, xp.float32)
        constant = stop_gradient(wide)
        scale = weight_scale(constant, target).scale
        whole = (xp.trunc if rounding == "truncate" else xp.round)(constant * (1 / scale))
        return xp.astype(whole * scale + (wide - constant), weight.dtype)

    return each_weight("naive.weights", params, _symmetric("naive.weights", config), quantized)


def levels(params: Params, config: QuantizationConfig) -> dict[str, Levels]:
    """Returns by site how integers stand for quantised weights, for :mod:`integers`."""
    return weight_levels("naive.levels", params, _symmetric("naive.levels", config), range_levels)


def _symmetric(where: str, config: QuantizationConfig) -> QuantizationConfig:
    """Returns the config with the scheme that weights have here."""
    refuse_start(where, config)
    for target in config.weights:
        if target.bits == 1:
            raise ValueError(
                f"{where}: rule {target.rule} has 1 bit, whose only integer here is 0; write 2 "
                "bits, or take bnn"
            )
    return QuantizationConfig(
        tuple(dataclasses.replace(t, scheme="symmetric", dtype=None) for t in config.weights)
    )
