"""Filter pruning via the geometric median: what others can stand in for matters little."""

from __future__ import annotations

import math
from typing import Any

from purepruning.arrays import iota, is_numpy, is_torch, namespace, sqrt
from purepruning.config.config import Config
from purepruning.exact_sum import exact_sum, power_of_two_scale
from purepruning.granularity import Grid, by_unit
from purepruning.linear_algebra import matmul
from purepruning.selection.criterion import Criterion
from purepruning.selection.prune import prune
from purepruning.types import Masks, Params

# A layer's units, in this many blocks: distances of one block are held at a time. Compiled kernels
# lose more by a third block than its symmetry saves.
JITTED_BLOCKS, BLOCKS = 2, 4


LEAST_ROWS = 64  # of a block


def fpgm(params: Params, stats: None, config: Config) -> Masks:
    r"""Returns masks that prune the channels closest to all others of their layer.

    $$s_u = \sum_v \lVert w_u - w_v \rVert_2$$

    For configs of output or input channels, with ``stats=None``. Distances come from inner
    products, at most half of the channels at a time. They are exact, and masks the same in every
    framework, where the products of weights are exact in float32, as for integers. Otherwise a
    distance is off by as much as 3e-4 of the layer's radius (the square root of float32's
    precision) where it is small against that radius, and channels whose scores are closer than that
    may change places between frameworks. See :func:`purepruning.prune` for the form of the masks,
    ties, NaN and errors.

    He et al. 2018, arXiv:1811.00250; NNI's FPGM pruner.
    """
    return prune(_FPGM, params, stats, config)


def _distances(weight: Any, layer_stats: None, g: Grid) -> Any:
    xp = namespace(weight)
    units = by_unit(xp, xp.astype(weight, xp.float32), g)
    # Distances do not change when all units move together; near the origin their products cancel
    # least. The middle is rounded to a coarse grid, so that products of integers stay exact.
    top = xp.maximum(
        xp.max(units, axis=(1, 2), keepdims=True), -xp.min(units, axis=(1, 2), keepdims=True)
    )
    scale, unscale = power_of_two_scale(top, 3, 60)
    units = units * scale
    units = units - xp.round(xp.mean(units, axis=1, keepdims=True))
    # A block of units against itself and all behind it, from the last block on: the distances to
    # those before are known by symmetry, and a unit's square is its product with itself.
    n = g.n_units
    blocks = BLOCKS if is_torch(weight) or is_numpy(weight) else JITTED_BLOCKS
    size = max(LEAST_ROWS, -(-n // blocks))
    place = iota(xp, n, weight)
    total = squares = units[:, :0, 0]
    for start in reversed(range(0, n, size)):
        rows, behind = slice(start, start + size), slice(start, n)
        products = matmul(xp, units[:, rows, :], xp.matrix_transpose(units[:, behind, :]))
        own_squares = xp.linalg.diagonal(products[:, :, : min(size, n - start)])
        squares = xp.concat([own_squares, squares], axis=1)
        square = own_squares[:, :, None] + squares[:, None, :] - 2 * products
        itself = place[None, rows, None] == place[None, None, behind]
        distance = sqrt(xp.where(itself | (square < 0), 0.0, square))
        total = xp.concat(
            [exact_sum(distance, (2,)), total + exact_sum(distance[:, :, size:], (1,))], axis=1
        )
    # Of a channel alone the distance to itself is no number either, if one of its weights is none.
    return xp.where(xp.isfinite(top[:, :, 0]), total * unscale[:, :, 0], math.nan)


_FPGM = Criterion("fpgm", channel=_distances)
