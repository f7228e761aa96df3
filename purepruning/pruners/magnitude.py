"""Magnitude pruning: what is small matters little."""

from __future__ import annotations

from typing import Any

import numpy as np

from purepruning.arrays import is_torch, namespace
from purepruning.config.config import Config
from purepruning.exact_sum import exact_sum, power_of_two_scale
from purepruning.granularity import Grid, fold
from purepruning.selection.criterion import Criterion
from purepruning.selection.keys import Piece
from purepruning.selection.prune import prune


def level(params: Any, stats: None, config: Config) -> Any:
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


def l1_norm(params: Any, stats: None, config: Config) -> Any:
    r"""Returns masks that prune the channels or blocks of smallest L1 norm.

    $$s_u = \sum_{i \in u} |w_i|$$

    For configs of output channels, input channels or blocks; a block cut off at the edge is scaled
    up to the size of a whole one. Norms are summed exactly (:mod:`purepruning.exact_sum`), so that
    the same weights give the same masks in every framework, layout and device count. See
    :func:`purepruning.prune` for the form of the masks, ties, NaN and errors.

    Li et al. 2016, arXiv:1608.08710; NNI's L1 norm (L1 filter) pruner.
    """
    return prune(_L1, params, stats, config)


def l2_norm(params: Any, stats: None, config: Config) -> Any:
    r"""Returns masks that prune the channels or blocks of smallest L2 norm.

    $$s_u = \sqrt{\sum_{i \in u} w_i^2}$$

    Otherwise as :func:`l1_norm`. NNI's L2 norm (L2 filter) pruner.
    """
    return prune(_L2, params, stats, config)


def element(weight: Any, own: None) -> Piece:
    """Returns single weights, which score their magnitude."""
    return Piece((weight,), _magnitude)


def _magnitude(arrays: tuple[Any, ...], index: Any, own: tuple[()]) -> Any:
    xp = namespace(arrays[0])
    return xp.abs(xp.astype(arrays[0], xp.float32))


def l1(weight: Any, own: None, g: Grid) -> Any:
    """Returns the sums of magnitudes of all units, ``(members, units)``."""
    xp = namespace(weight)
    norm = fold(xp, xp.abs(xp.astype(weight, xp.float32)), g, exact_sum)
    return norm * _edge_scale(norm, g) if g.is_padded else norm


def _l2(weight: Any, own: None, g: Grid) -> Any:
    xp = namespace(weight)
    norm = fold(xp, xp.abs(xp.astype(weight, xp.float32)), g, _root_of_squares)
    return norm * xp.sqrt(_edge_scale(norm, g)) if g.is_padded else norm


def _root_of_squares(magnitude: Any, axes: tuple[int, ...]) -> Any:
    xp = namespace(magnitude)
    # Squares are taken of numbers near 1, so that the largest of them neither overflow nor vanish.
    scale, unscale = power_of_two_scale(xp.max(magnitude, axis=axes, keepdims=True), 0, 63)
    scaled = magnitude * scale
    return xp.sqrt(exact_sum(scaled * scaled, axes)) * xp.squeeze(unscale, axis=axes)


def _edge_scale(norm: Any, g: Grid) -> Any:
    cost = np.asarray(g.cost)
    scale = (cost.max() / cost)[None, :].astype(np.float32)
    return namespace(norm).asarray(scale, device=norm.device if is_torch(norm) else None)


_LEVEL = Criterion("level", element=element)


_L1 = Criterion("l1_norm", channel=l1, block=l1)


_L2 = Criterion("l2_norm", channel=_l2, block=_l2)
