r"""DoReFa-Net: weights squeezed by tanh, activations clipped to [0, 1], gradients with noise.

Zhou et al. 2016, arXiv:1606.06160. A weight of exactly zero does not stay zero: masks are applied
after quantising.
"""

from __future__ import annotations

import functools
import math
from typing import Any

from purepruning.arguments import floats, whole_number
from purepruning.arrays import iota, map_gradient, namespace, stop_gradient
from purepruning.quantize.config import MOST_BITS, QuantizationConfig, Target
from purepruning.quantize.fake import fake_quantize, round_through
from purepruning.quantize.integers import Levels, in_steps
from purepruning.quantize.targets import (
    AtSite,
    each_weight,
    map_arrays,
    refuse_granularity,
    refuse_start,
)
from purepruning.random_bits import key_words, own_words, uniform
from purepruning.types import Array, Params


def weights(params: Params, state: None, config: QuantizationConfig) -> Params:
    r"""Returns ``params`` with the weights of ``config`` in $2^b$ equal steps from -1 to 1.

    $$\hat W = 2 \, Q_b\!\left(\frac{\tanh W}{2 \max |\tanh W|} + \tfrac12\right) - 1, \qquad
      Q_b(t) = \frac{\mathrm{round}((2^b - 1) t)}{2^b - 1}$$

    The derivative of rounding is taken as one; tanh and the maximum have theirs (in NNI 2 the
    derivative is one altogether). For one bit the paper has another formula,
    $\mathrm{sign}(W) \, \mathrm{mean} |W|$; here, as in NNI, this one gives -1 and 1. There
    is no zero point: the rules' scheme changes nothing.

    Raises:
        ValueError: the rules have a start step or a granularity.

    >>> import jax.numpy as jnp
    >>> import purepruning as pp
    >>> params = {"fc.w": jnp.array([[1.0, -2.0, 0.0]])}
    >>> layer = pp.make_layer(params, "fc.w", "Linear", out_axes=0, in_axes=1)
    >>> config = pp.resolve_quantization([{"quant_types": ["weight"], "quant_bits": 2}], [layer])
    >>> weights(params, None, config)["fc.w"].tolist()
    [[1.0, -1.0, 0.3333334]]
    """
    refuse_start("dorefa.weights", config)
    refuse_granularity("dorefa.weights", config)
    return each_weight("dorefa.weights", params, config, _weight)


def _weight(weight: Any, target: Target) -> Any:
    xp = namespace(weight)
    squeezed = xp.tanh(xp.astype(weight, xp.float32))
    axes = tuple(a for a in range(weight.ndim) if a not in target.owner.stack_axes)
    # The magnitude's derivative at zero differs between frameworks; the largest is not there.
    signs = stop_gradient(xp.where(squeezed < 0, -1.0, 1.0))
    largest = xp.max(squeezed * signs, axis=axes, keepdims=True)
    unit = squeezed / (2 * xp.where(largest > 0, largest, 1.0)) + 0.5
    n = 2**target.bits - 1
    return xp.astype((round_through(unit * n) - n / 2) * (2 / n), weight.dtype)


def levels(config: QuantizationConfig) -> dict[str, Levels]:
    """Returns by site how integers stand for quantised weights, for :mod:`integers`."""
    refuse_granularity("dorefa.levels", config)
    return {t.site: in_steps(2 / (2**t.bits - 1), t.bits) for t in config.weights}


def activations(
    config: QuantizationConfig, *, key: Any = None, gradient_bits: int | None = None
) -> dict[str, AtSite]:
    r"""Returns functions for an adapter's ``replace``: they quantise activations, and gradients.

    Inputs and outputs of ``config`` are clipped to [0, 1] and rounded to $2^b$ equal steps there;
    the derivative is one inside, and zero where they were clipped to an end.

    With ``gradient_bits`` = $k$, gradients of the outputs of all layers whose weights are quantised
    are quantised on the way back, of every example $i$ of the leading axis by

    $$\tilde g_i = 2 m_i \left[Q_k\!\left(\frac{g_i}{2 m_i} + \tfrac12 + N\right) - \tfrac12\right],
      \quad m_i = \max |g_i|, \quad N \sim \frac{U(-\frac12, \frac12)}{2^k - 1}$$

    with noise that depends on the key, the layer and the position, the same in every framework.

    Args:
        config: the resolved rules.
        key: for ``gradient_bits``: a seed, a JAX key or two words; a new one for every step.
        gradient_bits: in how many bits gradients are quantised; None leaves them as they are.

    Raises:
        ValueError: a key or ``gradient_bits`` came without the other, or the rules have a start
            step.
    """
    refuse_start("dorefa.activations", config)
    if (key is None) != (gradient_bits is None):
        raise ValueError("dorefa.activations: key and gradient_bits belong together; give both")

    def at(target: Target) -> AtSite:
        return lambda value: (map_arrays(lambda x: activation(x, target.bits), value), None)

    found: dict[str, AtSite] = {target.site: at(target) for target in config.activations}
    if gradient_bits is None:
        return found
    bits = whole_number(gradient_bits, "dorefa.activations: gradient_bits", 1, MOST_BITS)
    words = key_words(key)

    def backward(name: str, first: AtSite | None) -> AtSite:
        def quantize(value: Any) -> tuple[Any, None]:
            value = value if first is None else first(value)[0]
            own = own_words(words, name)
            return map_arrays(lambda x: map_gradient(_gradient_in(bits), x, *own), value), None

        return quantize

    sites = {f"{target.name}:output": target.name for target in config.weights}
    return found | {site: backward(name, found.get(site)) for site, name in sites.items()}


def activation(x: Array, bits: int) -> Any:
    """Returns ``x`` clipped to [0, 1] and rounded to ``2**bits`` equal steps there.

    >>> import numpy as np
    >>> activation(np.float32([-1, 0.2, 0.4, 2]), 1).tolist()
    [0.0, 0.0, 0.0, 1.0]
    """
    n = 2 ** whole_number(bits, "dorefa.activation: bits", 1, MOST_BITS) - 1
    floats(x, "dorefa.activation: x")
    return fake_quantize(x, namespace(x).asarray(1 / n, dtype=namespace(x).float32), 0, 0, n)


def gradient(g: Array, key: Any, bits: int, *, name: str = "") -> Any:
    """Returns a gradient quantised with noise, every example of the leading axis by its largest.

    The formula is that of :func:`activations`; ``name`` is the layer's.
    """
    floats(g, "dorefa.gradient: g")
    bits = whole_number(bits, "dorefa.gradient: bits", 1, MOST_BITS)
    return _gradient(g, *own_words(key_words(key), name), bits=bits)


@functools.cache
def _gradient_in(bits: int) -> Any:
    return functools.partial(_gradient, bits=bits)


def _gradient(g: Any, *own: Any, bits: int) -> Any:
    xp = namespace(g)
    wide = xp.astype(g, xp.float32)
    axes = tuple(range(1, g.ndim))
    largest = xp.max(xp.abs(wide), axis=axes, keepdims=True) if axes else xp.abs(wide)
    twice = 2 * xp.where(largest > 0, largest, 1.0)
    n = 2**bits - 1
    index = xp.reshape(iota(xp, math.prod(g.shape), g), g.shape)
    noise = (uniform(index, (own[0], own[1], own[2])) - 0.5) * (1 / n)
    whole = xp.clip(xp.round((wide * (1 / twice) + 0.5 + noise) * n), 0, n)
    return xp.astype(xp.where(largest > 0, twice * (whole * (1 / n) - 0.5), 0.0), g.dtype)
