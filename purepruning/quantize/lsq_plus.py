r"""LSQ+: scales and offsets are trained beside the weights.

Bhalgat et al. 2020, arXiv:2004.09576, for what a Swish or a GELU puts out, whose range reaches less
far below zero than above. Scales and offsets are a pytree of their own, by site: give
``(params, scales)`` to the optimizer, and inside of the loss

    weights = lsq_plus.weights(params, scales, config)
    logits, _ = linen.replace(model, weights, x, at=lsq_plus.activations(scales, config))

They begin with the ranges that observers have seen in a few batches, see :func:`init`.

Inputs and outputs have an offset where their scheme is ``"affine"``, which it is unless a rule
says; integers are $0, \dots, 2^b - 1$ there, and $-2^{b-1}, \dots, 2^{b-1} - 1$ where a rule says
``'quant_dtype': 'int'``. Symmetric ones and weights have none, as in the paper, so that pruned
weights stay zero, and rules that say ``"affine"`` of a weight are refused: they are those of
:mod:`purepruning.quantize.lsq`, but for the first scales.

A trained offset is no whole number of steps, so that zero is no level. Integer kernels need one:
:func:`round_offsets`, before the model is evaluated and exported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from purepruning.arguments import floats, instance
from purepruning.arrays import by_numpy, namespace, stop_gradient
from purepruning.quantize.config import QuantizationConfig, Target, check_quantization, grouped
from purepruning.quantize.fake import check_fits
from purepruning.quantize.integers import Levels, on_host
from purepruning.quantize.observers import Range
from purepruning.quantize.targets import (
    AtSite,
    check_sites,
    map_arrays,
    refuse_start,
    weights_of,
)
from purepruning.quantize.trained import (
    checked,
    gradient_scale,
    integer_range,
    or_one,
    quantized_weights,
    stepped,
    symmetric_range,
)
from purepruning.types import Array, Params

#: Zero points nearer to a whole number than this are whole, but for rounding.
_WHOLE = 1e-3


class TrainedScale(NamedTuple):
    """How integers stand for numbers: ``scale * integer + offset``; both are trained.

    Attributes:
        scale: float32; of a weight of as many axes as it.
        offset: float32; None where zero stands for itself.
    """

    scale: Any
    offset: Any


def init(
    params: Params, config: QuantizationConfig, ranges: Mapping[str, Range] | None = None
) -> dict[str, TrainedScale]:
    r"""Returns the scales and offsets to begin with, by site.

    Of weights, with their mean and standard deviation, and of activations of a range:

    $$s = \frac{\max(|\mu - 3\sigma|, |\mu + 3\sigma|)}{2^{b-1}}, \qquad
      s = \frac{r_{max} - r_{min}}{high - low}, \quad \beta = r_{min} - low \cdot s$$

    Activations without an offset have $s = \max(|r_{min}|, |r_{max}|) / high$.

    Args:
        params: the parameters.
        config: the resolved rules.
        ranges: what :func:`purepruning.quantize.observers.ranges` returned; not needed where only
            weights are quantised. Of histograms with a ``coverage`` below 1 they are without
            outliers.

    Raises:
        KeyError: there is no range of a site.
        ValueError: the rules have a start step, or an integer range without a positive number.

    >>> import jax.numpy as jnp
    >>> import purepruning as pp
    >>> params = {"fc.w": jnp.array([[1.0, -1.0]])}
    >>> layer = pp.make_layer(params, "fc.w", "Linear", name="fc", out_axes=0, in_axes=1)
    >>> rule = {"quant_types": ["weight", "input"], "quant_bits": 2}
    >>> config = pp.resolve_quantization(rule, [layer])
    >>> scales = init(params, config, {"fc:input": Range(jnp.float32(-0.5), jnp.float32(1.0))})
    >>> scales["fc:weight"].scale.tolist(), [float(x) for x in scales["fc:input"]]
    ([[1.5]], [0.5, -0.5])
    """
    refuse_start("lsq_plus.init", config)
    ranges = {} if ranges is None else ranges
    check_sites("lsq_plus.init: ranges", ranges, config.activations, "observers.ranges")
    for site in (target.site for target in config.activations):
        wanted = "a Range, as observers.ranges returns"
        instance(ranges[site], Range, f"lsq_plus.init: ranges[{site!r}]", wanted)
        for end in ranges[site]:
            floats(end, f"lsq_plus.init: ranges[{site!r}]")

    def of_weights(weights: Mapping[str, Any]) -> dict[str, TrainedScale]:
        return {t.site: _of_weight(weights[t.owner.weight], t) for t in config.weights}

    of_range = {t.site: _of_range(*ranges[t.site], t) for t in config.activations}
    return by_numpy(of_weights, weights_of("lsq_plus.init", params, config)) | of_range


def weights(
    params: Params, scales: Mapping[str, TrainedScale], config: QuantizationConfig
) -> Params:
    """Returns ``params`` with the weights of ``config`` quantised by trained scales.

    As :func:`purepruning.quantize.lsq.weights`.

    Raises:
        KeyError: there is no scale of a weight.
    """
    refuse_start("lsq_plus.weights", config)
    found = _scales("lsq_plus.weights", scales, config.weights)
    of_weights = {site: scale.scale for site, scale in found.items()}
    return quantized_weights("lsq_plus.weights", params, of_weights, config)


def levels(scales: Mapping[str, TrainedScale], config: QuantizationConfig) -> dict[str, Levels]:
    """Returns by site how integers stand for quantised weights, for :mod:`integers`."""
    check_quantization("lsq_plus.levels", config)
    found = _scales("lsq_plus.levels", scales, config.weights)
    return {
        t.site: Levels(found[t.site].scale, 0.0, *symmetric_range("lsq_plus", t))
        for t in config.weights
    }


def activations(
    scales: Mapping[str, TrainedScale], config: QuantizationConfig
) -> dict[str, AtSite]:
    """Returns functions for ``replace`` that quantise inputs and outputs; they find nothing.

    Raises:
        KeyError: there is no scale of a site.
    """
    refuse_start("lsq_plus.activations", config)
    found = _scales("lsq_plus.activations", scales, config.activations)

    def at(target: Target) -> AtSite:
        scale = found[target.site]

        def quantized(x: Any) -> Any:
            return quantize(x, *scale, *_range(target), math.prod(x.shape))

        return lambda value: (map_arrays(quantized, value), None)

    return {target.site: at(target) for target in config.activations}


def activation_levels(
    scales: Mapping[str, TrainedScale], config: QuantizationConfig
) -> dict[str, Levels]:
    """Returns by site how integers stand for inputs and outputs, for integer kernels.

    Raises:
        TypeError: ``jit`` or ``vmap`` traces the scales.
        ValueError: the zero point that an offset makes, ``-offset / scale``, is not one of the
            integers; see :func:`round_offsets`.
    """
    check_quantization("lsq_plus.activation_levels", config)
    found = _scales("lsq_plus.activation_levels", scales, config.activations)
    return {t.site: _levels(found[t.site], t) for t in config.activations}


def round_offsets(
    scales: Mapping[str, TrainedScale], config: QuantizationConfig
) -> dict[str, TrainedScale]:
    r"""Returns the scales with offsets that make zero one of the levels.

    $$\beta' = -s \, \mathrm{clip}(\mathrm{round}(-\beta / s), low, high)$$

    A level moves by half a step at most, and a range that did not contain zero moves until it does.
    The result is what is exported: evaluate the model by it, or train on with these offsets held.

    >>> import numpy as np
    >>> import purepruning as pp
    >>> row = pp.Layer("fc", "Linear", "fc.w", (8, 4), out_axes=(0,), in_axes=(1,))
    >>> config = pp.resolve_quantization({"quant_types": ["input"], "quant_bits": 2}, [row])
    >>> scales = {"fc:input": TrainedScale(np.float32(0.5), np.float32(-0.7))}
    >>> float(round_offsets(scales, config)["fc:input"].offset)
    -0.5
    """
    check_quantization("lsq_plus.round_offsets", config)
    found = _scales("lsq_plus.round_offsets", scales, config.activations)

    def rounded(target: Target) -> TrainedScale:
        scale, offset = found[target.site]
        if offset is None:
            return found[target.site]
        xp = namespace(offset)
        zero_point = xp.clip(xp.round(-offset / scale), *_range(target))
        return TrainedScale(scale, -(scale * zero_point))

    return {**scales, **{target.site: rounded(target) for target in config.activations}}


def quantize(x: Array, scale: Array, offset: Array | None, low: int, high: int, size: int) -> Any:
    r"""Returns ``x`` quantised by a scale and an offset, with gradients for all three.

    $$\hat x = s \, \mathrm{round}(\mathrm{clip}((x - \beta) / s, low, high)) + \beta$$

    Derivatives by $x$ and by $s$ are those of :func:`purepruning.quantize.lsq.quantize` at
    $x - \beta$, and

    $$\frac{\partial \hat x}{\partial \beta} := \frac{1}{\sqrt{high \cdot n}}
      \begin{cases} 0 & low \le (x - \beta) / s \le high \\ 1 & \text{elsewhere} \end{cases}$$

    Args:
        x: any array.
        scale: positive; a scalar, or of as many axes as ``x``.
        offset: of the scale's shape; None for zero.
        low, high: the smallest and largest integer.
        size: $n$, how many numbers share a scale.

    >>> import jax, jax.numpy as jnp
    >>> x, s, beta = jnp.float32(3.0), jnp.float32(0.5), jnp.float32(-0.25)
    >>> float(quantize(x, s, beta, 0, 3, 1))
    1.25
    >>> by = jax.grad(quantize, argnums=(0, 1, 2))
    >>> [float(g) for g in by(x, s, beta, 0, 3, 1)]
    [0.0, 1.7320508, 0.5773503]
    """
    scale = checked("lsq_plus.quantize", x, scale, low, high, size)
    xp = namespace(x)
    wide = xp.astype(x, xp.float32)
    if offset is None:
        return xp.astype(stepped(wide, scale, low, high, size), x.dtype)
    check_fits(offset, "lsq_plus.quantize: offset", x)
    constant = stop_gradient(offset)
    slow = constant + (offset - constant) * gradient_scale(high, size)
    return xp.astype(stepped(wide - slow, scale, low, high, size) + slow, x.dtype)


def _range(target: Target) -> tuple[int, int]:
    """Returns the smallest and largest integer of an input or output."""
    if target.scheme == "affine":
        return integer_range("lsq_plus", target, unsigned=target.is_unsigned)
    return symmetric_range("lsq_plus", target)


def _of_weight(weight: Any, target: Target) -> TrainedScale:
    xp = namespace(weight)
    shape, axes = grouped(target)
    wide = stop_gradient(xp.reshape(xp.astype(weight, xp.float32), shape))
    mean = xp.mean(wide, axis=axes, keepdims=True) if axes else wide
    square = (wide - mean) ** 2
    deviation = (xp.mean(square, axis=axes, keepdims=True) if axes else square) ** 0.5
    low, high = symmetric_range("lsq_plus", target)
    # The larger of |mean - 3 deviation| and |mean + 3 deviation|.
    return TrainedScale(or_one((xp.abs(mean) + 3 * deviation) * (1 / max(-low, high))), None)


def _of_range(smallest: Any, largest: Any, target: Target) -> TrainedScale:
    xp = namespace(smallest)
    low, high = _range(target)
    if target.scheme == "symmetric":
        largest = xp.maximum(xp.abs(smallest), xp.abs(largest))
        return TrainedScale(or_one(largest * (1 / high)), None)
    scale = or_one((largest - smallest) * (1 / (high - low)))
    return TrainedScale(scale, smallest - low * scale)


def _scales(
    where: str, scales: Mapping[str, TrainedScale], targets: tuple[Target, ...]
) -> dict[str, TrainedScale]:
    """Returns the scales of the targets.

    Raises:
        TypeError, KeyError, ValueError: there is none of a target, or not as its rule says.
    """
    check_sites(f"{where}: scales", scales, targets, "lsq_plus.init")
    found = {}
    for target in targets:
        scale, argument = scales[target.site], f"{where}: scales[{target.site!r}]"
        instance(scale, TrainedScale, argument, "a TrainedScale, as lsq_plus.init returns")
        floats(scale.scale, f"{argument}.scale")
        wanted = target.what != "weight" and target.scheme == "affine"
        if wanted:
            floats(scale.offset, f"{argument}.offset")
        elif scale.offset is not None:
            kind = "weights" if target.what == "weight" else "symmetric schemes"
            raise ValueError(
                f"{argument} has an offset, but {kind} have none; give what lsq_plus.init "
                "returned for this config"
            )
        found[target.site] = scale
    return found


def _levels(scale: TrainedScale, target: Target) -> Levels:
    low, high = _range(target)
    if scale.offset is None:
        return Levels(scale.scale, 0.0, low, high)
    zero_point = float(-on_host(scale.offset).astype(np.float64) / on_host(scale.scale))
    whole = round(zero_point)
    if abs(zero_point - whole) > _WHOLE or not low <= whole <= high:
        raise ValueError(
            f"lsq_plus.activation_levels: at {target.site!r} zero is the integer {zero_point:g}, "
            f"and integers are the whole numbers from {low} to {high}; call "
            "lsq_plus.round_offsets, and evaluate by what it returns"
        )
    return Levels(scale.scale, float(whole), low, high)
