"""Quantised weights as integers, packed at their width, and back.

    quantised = qat.weights(params, state, config)
    weights = integers.of(quantised, qat.levels(params, config), config)
    weights["conv1:weight"].integers

``levels`` of every quantizer say how integers stand for its weights. Quantise, then mask, then
convert: ``of(apply_masks(quantised, masks), ...)`` fails where zero is no level (DoReFa, BNN), and
is exact everywhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from purepruning.arguments import instance, whole_number
from purepruning.arrays import as_numpy, by_numpy, is_concrete, is_torch, namespace
from purepruning.quantize.config import QuantizationConfig, Target, grouped
from purepruning.quantize.targets import check_sites, weights_of
from purepruning.types import Array, Params


class Levels(NamedTuple):
    """How the integers from ``low`` to ``high`` stand for numbers: ``scale * (q - zero_point)``.

    Scales and zero points are float32, of as many axes as the weight in the shape in which its
    groups are an axis, or scalars. A zero point need not be whole: the signs -1 and 1 are 0 and 1
    with scale 2 and zero point 0.5.
    """

    scale: Any
    zero_point: Any
    low: int
    high: int


class IntegerWeight(NamedTuple):
    """A weight as integers.

    Attributes:
        integers: NumPy, of the weight's shape; int8, uint8 or int32, the first that holds them.
        scale, zero_point: NumPy float32, see :class:`Levels`.
        bits: the width at which :func:`pack` stores them.
        low: the smallest integer of the levels.
        grouped: the shape in which scales broadcast.
    """

    integers: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray
    bits: int
    low: int
    grouped: tuple[int, ...]

    def values(self) -> np.ndarray:
        """Returns the numbers: bit for bit those that fake quantisation gives, but in float32."""
        q = self.integers.reshape(self.grouped).astype(np.float32)
        return ((q - self.zero_point) * self.scale).reshape(self.integers.shape)


def of(
    quantised: Params, levels: Mapping[str, Levels], config: QuantizationConfig
) -> dict[str, IntegerWeight]:
    """Returns by site the integers of weights that are quantised.

    Args:
        quantised: the parameters as ``weights`` of a quantizer returned them.
        levels: what ``levels`` of that quantizer returned.
        config: the resolved rules.

    Raises:
        TypeError: ``jit`` or ``vmap`` traces a weight or its levels.
        KeyError: there are no levels of a weight.
        ValueError: a weight is none of its levels; it was not quantised, or by other ones.

    >>> import numpy as np
    >>> import purepruning as pp
    >>> params = {"fc.w": np.array([[0.5, -0.25]], np.float32)}
    >>> layer = pp.make_layer(params, "fc.w", "Linear", name="fc", out_axes=0, in_axes=1)
    >>> config = pp.resolve_quantization([{"quant_types": ["weight"], "quant_bits": 8}], [layer])
    >>> of(params, {"fc:weight": Levels(0.25, 100.0, 0, 255)}, config)["fc:weight"].integers
    array([[102,  99]], dtype=uint8)
    """
    found = weights_of("integers.of", quantised, config)
    check_sites("integers.of: levels", levels, config.weights, "levels of the quantizer")
    result = {}
    for target in config.weights:
        where = f"integers.of: levels[{target.site!r}]"
        instance(levels[target.site], Levels, where, "what levels of the quantizer returned")
        for end in ("low", "high"):
            whole_number(getattr(levels[target.site], end), f"{where}.{end}", -(2**31))
        weight = on_host(found[target.owner.weight])
        result[target.site] = _integers(weight, levels[target.site], target)
    return result


def _integers(weight: np.ndarray, levels: Levels, target: Target) -> IntegerWeight:
    scale, zero = (np.asarray(on_host(x), np.float32) for x in levels[:2])
    shape = grouped(target)[0]
    q = np.round(weight.astype(np.float64).reshape(shape) / scale.astype(np.float64) + zero)
    dtype: Any = np.int8 if levels.low < 0 else np.uint8
    if max(-levels.low - 1, levels.high) > np.iinfo(dtype).max:
        dtype = np.int32
    integers = np.clip(q, levels.low, levels.high).astype(dtype).reshape(weight.shape)
    bits = int(levels.high - levels.low).bit_length()
    result = IntegerWeight(integers, scale, zero, bits, levels.low, shape)
    nearest = result.values()
    off = np.abs(nearest - weight.astype(np.float32))
    step = np.broadcast_to(scale, shape).reshape(weight.shape)
    # Half a unit in the last place is what rounding to the weight's own dtype changes.
    allowed = 1e-2 * step + float(jnp.finfo(weight.dtype).eps) / 2 * np.abs(nearest)
    if not (off <= allowed).all():
        at = np.unravel_index(int(np.argmax(off / allowed)), weight.shape)
        raise ValueError(
            f"integers.of: the weight of layer {target.name!r} is {weight[at]!s} at "
            f"{tuple(map(int, at))}, which is none of its levels; the nearest is "
            f"{nearest[at]!s}; give the quantised weights, and the levels of the same "
            "quantizer"
        )
    return result


def pack(weight: IntegerWeight) -> np.ndarray:
    """Returns the integers as bytes, ``bits`` each, in order, the highest bit first.

    >>> weight = IntegerWeight(np.int8([[-1, 0, 1]]), np.ones(()), np.zeros(()), 2, -1, (1, 3))
    >>> [f"{byte:08b}" for byte in pack(weight)]
    ['00011000']
    """
    instance(weight, IntegerWeight, "integers.pack: weight", "what integers.of returned")
    instance(weight.integers, np.ndarray, "integers.pack: weight.integers", "NumPy's, known ones")
    unsigned = (weight.integers.astype(np.int64) - weight.low).reshape(-1, 1)
    return np.packbits((unsigned >> np.arange(weight.bits - 1, -1, -1)) & 1)


def unpack(packed: np.ndarray, shape: tuple[int, ...], bits: int, low: int, dtype: Any) -> Any:
    """Returns the integers that :func:`pack` made bytes of."""
    n = int(np.prod(shape))
    bit = np.unpackbits(packed, count=n * bits).reshape(n, bits).astype(np.int64)
    return ((bit << np.arange(bits - 1, -1, -1)).sum(1) + low).astype(dtype).reshape(shape)


def in_steps(scale: float, bits: int) -> Levels:
    """Returns levels in equal steps about zero, which is none of them."""
    return Levels(scale, (2**bits - 1) / 2, 0, 2**bits - 1)


def weight_levels(
    where: str,
    params: Params,
    config: QuantizationConfig,
    function: Callable[[Any, Target], Levels],
) -> dict[str, Levels]:
    """Returns by site the levels that ``function(weight, target)`` gives."""

    def each(weights: Mapping[str, Any]) -> dict[str, Levels]:
        found = {}
        for target in config.weights:
            weight: Array = weights[target.owner.weight]
            xp = namespace(weight)
            wide = xp.astype(weight, xp.float32)
            found[target.site] = function(xp.reshape(wide, grouped(target)[0]), target)
        return found

    result: dict[str, Levels] = by_numpy(each, weights_of(where, params, config))
    return result


def on_host(x: Any) -> Any:
    """Returns an array of any framework and device as NumPy's, of the same dtype.

    Raises:
        TypeError: ``jit`` or ``vmap`` traces it.
    """
    if not is_concrete(x):
        raise TypeError(
            "integers: the numbers are not known under jit or vmap; call this outside of them"
        )
    return as_numpy(x.detach().cpu()) if is_torch(x) else np.asarray(x)
