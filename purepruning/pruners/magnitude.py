"""Magnitude pruning: what is small matters little."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from purepruning.arrays import array_like, bits_float, float_bits, namespace, sqrt
from purepruning.config.config import Config
from purepruning.exact_sum import by_sums, largest_magnitude, power_of_two_scale, sum_of_terms
from purepruning.granularity import Grid, fold
from purepruning.selection.criterion import Criterion
from purepruning.selection.keys import Piece
from purepruning.selection.prune import prune
from purepruning.types import Masks, Params


def level(params: Params, stats: None, config: Config) -> Masks:
    r"""Returns masks that prune the weights of smallest magnitude.

    $$s_i = |w_i|$$

    Magnitudes are compared in float32. For configs of single elements or N:M, with ``stats=None``;
    see :func:`purepruning.prune` for the form of the masks, ties, NaN and errors.

    Han et al. 2015, arXiv:1506.02626; NNI's Level pruner.

    >>> import jax.numpy as jnp
    >>> import purepruning as pp
    >>> params = {"w": jnp.array([[1.0, -2.0, 3.5], [0.0, 4.0, -1.0]])}
    >>> layer = pp.make_layer(params, "w", "Linear", out_axes=0, in_axes=1)
    >>> config = pp.resolve([{"sparsity": 0.5, "op_types": ["Linear"]}], [layer])
    >>> level(params, None, config)["w"].astype(int).tolist()
    [[0, 1, 1], [0, 1, 0]]
    """
    return prune(_LEVEL, params, stats, config)


def l1_norm(params: Params, stats: None, config: Config) -> Masks:
    r"""Returns masks that prune the channels or blocks of smallest L1 norm.

    $$s_u = \sum_{i \in u} |w_i|$$

    For configs of output channels, input channels or blocks; a block cut off at the edge is scaled
    up to the size of a whole one. Norms are summed exactly (:mod:`purepruning.exact_sum`), so that
    the same weights give the same masks in every framework, layout and device count, and blocks of
    equal means tie whatever their sizes are. See
    :func:`purepruning.prune` for the form of the masks, ties, NaN and errors.

    Li et al. 2016, arXiv:1608.08710; NNI's L1 norm (L1 filter) pruner.
    """
    return prune(_L1, params, stats, config)


def l2_norm(params: Params, stats: None, config: Config) -> Masks:
    r"""Returns masks that prune the channels or blocks of smallest L2 norm.

    $$s_u = \sqrt{\sum_{i \in u} w_i^2}$$

    Units are ranked by the sums of squares, since rounded roots of different sums may be equal;
    where channels are coupled, norms are added. Otherwise as :func:`l1_norm`. NNI's L2 norm (L2
    filter) pruner.
    """
    return prune(_L2, params, stats, config)


def element(weight: Any, layer_stats: None) -> Piece:
    """Returns single weights, which score their magnitude."""
    return Piece((weight,), _magnitude, indexed=False)


def _magnitude(arrays: tuple[Any, ...], index: Any, layer_stats: tuple[()]) -> Any:
    return _size(arrays[0])


def _size(weight: Any) -> Any:
    xp = namespace(weight)
    return xp.abs(xp.astype(weight, xp.float32))


def l1(weight: Any, layer_stats: None, g: Grid) -> Any:
    """Returns the sums of magnitudes of all units, ``(stacked, units)``."""
    times, share = _edges(g, weight)

    def total(weight: Any, axes: tuple[int, ...], across: Any = None) -> Any:
        return _shared(sum_of_terms(_size, (weight,), axes, times, across), share)

    return fold(namespace(weight), weight, g, total, _size)


def _l2(weight: Any, layer_stats: None, g: Grid) -> Any:
    """Returns the L2 norms of all units, ``(stacked, units)``."""

    def root(squares: Any, unscale: Any) -> Any:
        return sqrt(squares) * unscale

    return _of_squares(weight, g, root)


def _l2_rank(weight: Any, layer_stats: None, g: Grid) -> Any:
    """Returns what ranks units by their sums of squares, ``(stacked, units)``."""
    return _of_squares(weight, g, ordered_squares)


def _of_squares(weight: Any, g: Grid, finish: Callable[[Any, Any], Any]) -> Any:
    """Returns ``finish(squares, unscale)`` of sums of squares that are ``squares * unscale**2``."""
    xp = namespace(weight)
    times, share = _edges(g, weight)

    def finished(squares: Any, scale: Any) -> Any:
        return finish(squares, bits_float(xp, (254 << 23) - float_bits(xp, scale)))

    def total(weight: Any, axes: tuple[int, ...], across: Any = None) -> Any:
        # Squares are taken of numbers near 1: the largest of them neither overflow nor vanish.
        def scale_of(weight: Any) -> Any:
            top = largest_magnitude(_size, (weight,), axes, across)
            return power_of_two_scale(top, 0, 63)[0]

        scale = by_sums(scale_of, (weight,), axes)
        squares = sum_of_terms(_scaled_square, (weight, scale), axes, times, across)
        squares = _shared(squares, share)
        return by_sums(finished, (squares, xp.reshape(scale, squares.shape)), ())

    return fold(xp, weight, g, total, _size)


def _scaled_square(weight: Any, scale: Any) -> Any:
    scaled = _size(weight) * scale
    return scaled * scaled


def ordered_squares(squares: Any, unscale: Any) -> Any:
    """Returns float32 in the order of ``squares * unscale**2``, ``unscale`` a power of two.

    Exponents of float32 do not reach for all squares of float32. Results are the products
    themselves between 2**-120 and 2**121. What lies beyond is moved closer, with 18 of its 23 bits.
    """
    xp = namespace(squares)
    bits, scale = float_bits(xp, squares), float_bits(xp, unscale)
    exponent = (bits >> 23) - 127 + 2 * ((scale >> 23) - 127)
    inside = xp.clip(exponent, -120, 121)
    rest = ((exponent - inside) << 23) + (bits & 0x7FFFFF)
    rest = xp.where((exponent < -120) | (exponent > 120), rest >> 5, rest)
    ordered = bits_float(xp, ((inside + 127) << 23) + rest)
    return xp.where((squares > 0) & xp.isfinite(squares), ordered, squares)


#: Up to so many terms of a unit, each counted as often as it counts, are summed as such.
_MOST_TERMS = 2**22


def _edges(g: Grid, like: Any) -> tuple[np.ndarray | None, Any]:
    """Returns how often weights are to count, and a factor for the sums: as of whole blocks."""
    if not g.is_padded:
        return None, None
    repeats, least = g.repeats, int(g.repeats.min())
    if int(repeats.max()) * math.prod(g.split[a] for a in g.inside) <= _MOST_TERMS:
        return repeats, float(np.float32(1 / least))
    return None, array_like(like, np.squeeze(repeats / least, g.inside).astype(np.float32))


def _shared(sums: Any, share: Any) -> Any:
    return sums if share is None else sums * share


_LEVEL = Criterion("level", element=element, on_shards=True)


_L1 = Criterion("l1_norm", channel=l1, block=l1, terms=element, on_shards=True)


_L2 = Criterion("l2_norm", channel=_l2, block=_l2, rank=_l2_rank, on_shards=True)
