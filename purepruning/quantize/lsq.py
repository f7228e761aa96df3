r"""Learned step size quantisation: scales are trained beside the weights.

Esser et al. 2019, arXiv:1902.08153. The scales are a pytree of their own, by site: give
``(params, scales)`` to the optimizer, and inside of the loss

    weights = lsq.weights(params, scales, config)
    logits, _ = linen.replace(model, weights, x, at=lsq.activations(scales, config))

Zero points are 0, so that pruned weights stay zero; rules that say ``"affine"`` are refused.
Integers are $-2^{b-1}, \dots, 2^{b-1} - 1$;
where a rule says ``'quant_dtype': 'uint'``, as for what follows a ReLU, $0, \dots, 2^b - 1$.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

from purepruning.arguments import floats
from purepruning.arrays import by_numpy, namespace, stop_gradient
from purepruning.quantize.config import (
    QuantizationConfig,
    Target,
    check_quantization,
    grouped,
)
from purepruning.quantize.integers import Levels
from purepruning.quantize.targets import (
    AtSite,
    arrays_at,
    check_sites,
    map_arrays,
    refuse_start,
    weights_of,
)
from purepruning.quantize.trained import (
    checked,
    or_one,
    quantized_weights,
    stepped,
    symmetric_range,
)
from purepruning.types import Array, Params


def watch(config: QuantizationConfig) -> dict[str, AtSite]:
    """Returns functions for ``replace`` that change nothing and find what :func:`init` needs."""
    check_quantization("lsq.watch", config)

    def at(target: Target) -> AtSite:
        def look(value: Any) -> tuple[Any, Any]:
            return value, _mean_magnitude(arrays_at("lsq.watch", target, value))

        return look

    return {target.site: at(target) for target in config.activations}


def init(
    params: Params, config: QuantizationConfig, seen: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    r"""Returns the scales to begin with, by site, $2 \, \mathrm{mean} |x| / \sqrt{high}$.

    Args:
        params: the parameters.
        config: the resolved rules.
        seen: what ``replace(..., at=lsq.watch(config))`` found in a first batch; not needed where
            only weights are quantised.

    Raises:
        KeyError: nothing was seen at a site.
        ValueError: the rules have a start step, or an integer range without a positive number.
    """
    refuse_start("lsq.init", config)
    seen = {} if seen is None else seen
    check_sites("lsq.init: seen", seen, config.activations, "replace(..., at=lsq.watch(config))")

    def of_weights(weights: Mapping[str, Any]) -> dict[str, Any]:
        scales = {}
        for target in config.weights:
            shape, axes = grouped(target)
            weight = stop_gradient(weights[target.owner.weight])
            xp = namespace(weight)
            size = xp.abs(xp.reshape(xp.astype(weight, xp.float32), shape))
            mean = xp.mean(size, axis=axes, keepdims=True) if axes else size
            scales[target.site] = _first(mean, target)
        return scales

    scales = by_numpy(of_weights, weights_of("lsq.init", params, config))
    for target in config.activations:
        calls = seen[target.site]
        calls = calls if isinstance(calls, list) else [calls]
        for call in calls:
            floats(call, f"lsq.init: seen[{target.site!r}]")
        xp = namespace(calls[0])
        means = [xp.mean(call) for call in calls]
        scales[target.site] = _first(functools.reduce(xp.add, means) / len(means), target)
    return scales


def weights(params: Params, scales: Mapping[str, Any], config: QuantizationConfig) -> Params:
    """Returns ``params`` with the weights of ``config`` quantised by trained scales.

    See :func:`quantize` for the value and both gradients.

    Raises:
        KeyError: there is no scale of a weight.

    >>> import jax.numpy as jnp
    >>> import purepruning as pp
    >>> params = {"fc.w": jnp.array([[1.0, -2.0, 3.5]])}
    >>> layer = pp.make_layer(params, "fc.w", "Linear", name="fc", out_axes=0, in_axes=1)
    >>> config = pp.resolve_quantization([{"quant_types": ["weight"], "quant_bits": 4}], [layer])
    >>> scales = {"fc:weight": jnp.array([[1.5]])}
    >>> weights(params, scales, config)["fc.w"].tolist()
    [[1.5, -1.5, 3.0]]
    """
    refuse_start("lsq.weights", config)
    check_sites("lsq.weights: scales", scales, config.weights, "lsq.init")
    return quantized_weights("lsq.weights", params, scales, config)


def levels(scales: Mapping[str, Any], config: QuantizationConfig) -> dict[str, Levels]:
    """Returns by site how integers stand for quantised weights, for :mod:`integers`."""
    check_quantization("lsq.levels", config)
    _check_scales("lsq.levels", scales, config.weights)
    return {t.site: _levels(t, scales) for t in config.weights}


def activation_levels(scales: Mapping[str, Any], config: QuantizationConfig) -> dict[str, Levels]:
    """Returns by site how integers stand for inputs and outputs."""
    check_quantization("lsq.activation_levels", config)
    _check_scales("lsq.activation_levels", scales, config.activations)
    return {t.site: _levels(t, scales) for t in config.activations}


def activations(scales: Mapping[str, Any], config: QuantizationConfig) -> dict[str, AtSite]:
    """Returns functions for ``replace`` that quantise inputs and outputs by trained scales.

    Raises:
        KeyError: there is no scale of a site.
    """
    refuse_start("lsq.activations", config)
    _check_scales("lsq.activations", scales, config.activations)

    def at(target: Target) -> AtSite:
        def quantized(x: Any) -> Any:
            return quantize(
                x, scales[target.site], *symmetric_range("lsq", target), math.prod(x.shape)
            )

        return lambda value: (map_arrays(quantized, value), None)

    return {target.site: at(target) for target in config.activations}


def quantize(x: Array, scale: Array, low: int, high: int, size: int) -> Any:
    r"""Returns ``x`` quantised by a scale, with gradients for both.

    $$\hat x = s \, \mathrm{round}(\mathrm{clip}(x / s, low, high)), \qquad
      \frac{\partial \hat x}{\partial x} := 1[low \le x / s \le high]$$
    $$\frac{\partial \hat x}{\partial s} := \frac{1}{\sqrt{high \cdot n}}
      \begin{cases} \mathrm{round}(x / s) - x / s & \text{inside} \\
      low \text{ or } high & \text{outside} \end{cases}$$

    Args:
        x: any array.
        scale: positive; a scalar, or of as many axes as ``x``.
        low, high: the smallest and largest integer.
        size: $n$, how many numbers share a scale.

    >>> import jax, jax.numpy as jnp
    >>> x, s = jnp.float32(1.7), jnp.float32(1.0)
    >>> dx, ds = jax.grad(lambda x, s: quantize(x, s, -8, 7, 1), argnums=(0, 1))(x, s)
    >>> float(dx), float(ds)
    (1.0, 0.1133893)
    """
    scale = checked("lsq.quantize", x, scale, low, high, size)
    xp = namespace(x)
    return xp.astype(stepped(xp.astype(x, xp.float32), scale, low, high, size), x.dtype)


def _check_scales(where: str, scales: Any, targets: tuple[Target, ...]) -> None:
    check_sites(f"{where}: scales", scales, targets, "lsq.init")
    for target in targets:
        floats(scales[target.site], f"{where}: scales[{target.site!r}]")


def _levels(target: Target, scales: Mapping[str, Any]) -> Levels:
    return Levels(scales[target.site], 0.0, *symmetric_range("lsq", target))


def _first(mean: Any, target: Target) -> Any:
    return or_one(mean * (2 / math.sqrt(symmetric_range("lsq", target)[1])))


def _mean_magnitude(arrays: list[Any]) -> Any:
    xp = namespace(arrays[0])
    total = sum(xp.sum(xp.abs(stop_gradient(xp.astype(x, xp.float32)))) for x in arrays)
    return total / sum(math.prod(x.shape) for x in arrays)
