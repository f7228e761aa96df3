r"""Binarised networks: weights and activations are -1 or 1.

Courbariaux et al. 2016, arXiv:1602.02830. Latent weights are kept within [-1, 1] by :func:`clip`
after every step. Signs are those of the numbers, 1 of zero; with a key they are drawn,

$$P(x^b = 1) = \mathrm{clip}((x + 1) / 2, 0, 1),$$

which is the paper's stochastic binarisation, for training. A pruned weight does not stay zero:
masks are applied after binarising.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

from purepruning.arguments import floats
from purepruning.arrays import iota, namespace, stop_gradient
from purepruning.quantize.config import QuantizationConfig, Target
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

#: Activations that are never negative, so that their signs are all 1.
_NEVER_NEGATIVE = ("ReLU", "ReLU6", "Sigmoid", "Softplus", "Hardsigmoid")


def weights(params: Params, state: None, config: QuantizationConfig, *, key: Any = None) -> Params:
    """Returns ``params`` with the signs of the weights of ``config``; gradients pass as they are.

    Signs have no zero point: the rules' scheme changes nothing.

    Args:
        params: the latent weights.
        state: None; there is none.
        config: the resolved rules.
        key: draws the signs: a seed, a JAX key or two words, a new one for every step. They depend
            on it, the layer and the position, and are the same in every framework.

    Raises:
        ValueError: the rules say other than 1 bit, or have a start step or a granularity.

    >>> import jax.numpy as jnp
    >>> import purepruning as pp
    >>> params = {"fc.w": jnp.array([[0.5, -2.0, 0.0]])}
    >>> layer = pp.make_layer(params, "fc.w", "Linear", out_axes=0, in_axes=1)
    >>> config = pp.resolve_quantization([{"quant_types": ["weight"], "quant_bits": 1}], [layer])
    >>> weights(params, None, config)["fc.w"].tolist()
    [[1.0, -1.0, 1.0]]
    """
    _check("bnn.weights", config)
    words = None if key is None else key_words(key)

    def sign(weight: Any, target: Target, words: Any) -> Any:
        constant = stop_gradient(weight)
        return _sign(constant, words, target.site) + (weight - constant)

    return each_weight("bnn.weights", params, config, sign, words)


def levels(config: QuantizationConfig) -> dict[str, Levels]:
    """Returns by site how integers stand for quantised weights, for :mod:`integers`."""
    _check("bnn.levels", config)
    return {target.site: in_steps(2.0, 1) for target in config.weights}


def activations(config: QuantizationConfig, *, key: Any = None) -> dict[str, AtSite]:
    """Returns functions for an adapter's ``replace`` that binarise inputs and outputs.

    The gradient passes where the magnitude is at most 1. The output of a ReLU is never negative,
    so that its signs are all 1 and the network is constant: of that it is warned.

    Args:
        config: the resolved rules.
        key: draws the signs, as in :func:`weights`; those of all calls of a layer are drawn alike.

    Raises:
        ValueError: as :func:`weights`.
    """
    _check("bnn.activations", config)
    words = None if key is None else key_words(key)
    outputs = [t for t in config.activations if t.what == "output"]
    constant = [t.name for t in outputs if t.layer.type in _NEVER_NEGATIVE]
    if constant:
        warnings.warn(
            f"bnn.activations: the output of {', '.join(map(repr, constant))} is never negative: "
            "all its signs are 1, and what follows is constant; use a Hardtanh in its place, or "
            "binarise what it reads",
            stacklevel=2,
        )

    def at(target: Target) -> AtSite:
        return lambda value: (map_arrays(lambda x: _activation(x, words, target.site), value), None)

    return {target.site: at(target) for target in config.activations}


def activation(x: Array, key: Any = None, *, name: str = "") -> Any:
    """Returns the signs of ``x``, 1 for zero; the gradient passes where ``|x| <= 1``.

    With a ``key`` they are drawn, see the module; ``name`` is that of the site.

    >>> import jax, jax.numpy as jnp
    >>> jax.vmap(jax.value_and_grad(activation))(jnp.array([-2.0, 0.0, 1.0]))[1].tolist()
    [0.0, 1.0, 1.0]
    """
    floats(x, "bnn.activation: x")
    return _activation(x, None if key is None else key_words(key), name)


def _activation(x: Any, words: Any, name: str) -> Any:
    xp = namespace(x)
    constant = stop_gradient(x)
    through = xp.where(xp.abs(constant) <= 1, x - constant, 0.0)
    return _sign(constant, words, name) + xp.where(constant == constant, through, x)


def clip(params: Params, config: QuantizationConfig) -> Params:
    """Returns ``params`` with the latent weights of ``config`` within [-1, 1]; after every step.

    >>> import jax.numpy as jnp
    >>> import purepruning as pp
    >>> params = {"fc.w": jnp.array([[0.5, -2.0]])}
    >>> layer = pp.make_layer(params, "fc.w", "Linear", out_axes=0, in_axes=1)
    >>> config = pp.resolve_quantization([{"quant_types": ["weight"], "quant_bits": 1}], [layer])
    >>> clip(params, config)["fc.w"].tolist()
    [[0.5, -1.0]]
    """
    return each_weight("bnn.clip", params, config, lambda w, _: namespace(w).clip(w, -1.0, 1.0))


def _sign(x: Any, words: Any, name: str) -> Any:
    xp = namespace(x)
    if words is None:
        positive = ~(x < 0)
    else:
        index = xp.reshape(iota(xp, math.prod(x.shape), x), x.shape)
        chance = xp.clip((xp.astype(x, xp.float32) + 1) * 0.5, 0.0, 1.0)
        positive = uniform(index, own_words(words, name)) < chance
    return xp.astype(xp.where(positive, 1.0, -1.0), x.dtype)


def _check(where: str, config: QuantizationConfig) -> None:
    refuse_start(where, config)
    refuse_granularity(where, config)
    for target in config.targets:
        if target.bits != 1:
            raise ValueError(
                f"{where}: rule {target.rule} has 'quant_bits': {target.bits}, but a sign is 1 "
                "bit; write 1"
            )
