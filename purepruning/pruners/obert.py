"""Pruning by blocks of the Fisher matrix: what the loss would feel, and how others make up."""

from __future__ import annotations

import functools
from typing import Any

from purepruning.arguments import instance, is_finite, scalar
from purepruning.arrays import compiled, namespace, stop_gradient
from purepruning.config.config import Config, check_config
from purepruning.granularity import NM, Block, Grid, fold
from purepruning.layers import Layer
from purepruning.linear_algebra import in_batches, plus_diagonal
from purepruning.masks import apply_masks, by_path, spread_mask
from purepruning.matrices import Form, form, from_matrices, in_blocks
from purepruning.pruners.reconstruction import AT_ONCE, factored, least_squares, tiles_of
from purepruning.selection.criterion import Criterion, by_name
from purepruning.selection.prune import check_values, prune, weights_of
from purepruning.stats.accumulate import CompensatedSum, value
from purepruning.stats.checks import check_totals, match, placed, refuse_empty
from purepruning.stats.fisher_blocks import FisherStats, shape, size_of
from purepruning.trees import flatten
from purepruning.types import Masks, Params


def obert(
    params: Params, stats: FisherStats, config: Config, *, damping: Any = 1e-7
) -> tuple[Params, Masks]:
    r"""Returns parameters and masks by which the loss rises least, to second order.

    With the blocks of the empirical Fisher matrix in the place of the Hessian's,
    $F = \lambda I + \frac 1N \sum_t g_t g_t^\top$ (:mod:`purepruning.stats.fisher_blocks`), what
    goes is ranked by

    $$s_q = \frac{w_q^2}{2 [F^{-1}]_{qq}}, \qquad
      s_Q = \frac 12 w_Q^\top \bigl( [F^{-1}]_{QQ} \bigr)^{-1} w_Q$$

    of single weights (of N:M too) and of blocks ``Block((1, n))``, and what stays of a block of F
    makes up for all that goes of it together:

    $$w \leftarrow w - F^{-1}_{:,Q} \bigl( [F^{-1}]_{QQ} \bigr)^{-1} w_Q.$$

    Layers may be ranked together (``scope="global"``), as in the paper. Where weights are pruned
    already, by masks, their gradients under those masks are zero, and they take no part.

    Kurtic et al. 2022, arXiv:2203.07259, which updates $F^{-1}$ gradient by gradient
    (Sherman-Morrison); sums of $g g^\top$ give the same matrix, and can be merged.

    Args:
        params, config: see :func:`purepruning.prune`, for the form of the masks, ties, NaN and
            errors too.
        stats: gradients of single examples or small batches at ``params``.
        damping: $\lambda$, 1e-7 in the paper. F is inverted in float32: below a millionth of the
            sum of its diagonal in a block, digits are lost.

    Raises:
        TypeError: ``stats`` are no such statistics, or of another framework; so is ``damping``.
        KeyError, ValueError: they are empty, or not of the layers of ``config``.
        ValueError: the config is of channels, or of blocks that lie over several outputs or divide
            the statistics' blocks unevenly; ``damping`` is negative; or, where values are known, a
            block cannot be inverted. Under ``jit`` that gives NaN.

    >>> import jax.numpy as jnp
    >>> import purepruning as pp
    >>> from purepruning.stats import fisher_blocks
    >>> params = {"fc": jnp.array([[1.0, 1.5, 4.0]])}
    >>> layer = pp.make_layer(params, "fc", "Linear", out_axes=0, in_axes=1)
    >>> stats = fisher_blocks.init(params, [layer])
    >>> grads = {"fc": jnp.array([[[2.0, 2.0, 0.0]], [[0.0, 0.5, 1.0]]])}
    >>> stats = fisher_blocks.update(stats, grads, [layer])
    >>> new, masks = obert(params, stats, pp.resolve(0.4, [layer]))
    >>> masks["fc"].tolist(), new["fc"].round(1).tolist()
    ([[False, True, True]], [[0.0, 2.5, 3.5]])
    """
    check_config("obert", config)
    instance(stats, FisherStats, "obert: stats", "the statistics of stats.fisher_blocks")
    check_totals("obert", stats)
    tree = flatten(params)
    weights = weights_of("obert", tree.leaves, config)
    check_values("obert", weights)
    forms = {x.name: form("obert", x) for x in config.layers}
    sizes = {name: size_of(stats, name) for name in forms}
    match("obert", stats.outers, {name: shape(f, sizes[name]) for name, f in forms.items()})
    refuse_empty("obert", dict.fromkeys(forms, stats.steps))
    widths = {x.name: _width(x, config, sizes[x.name]) for x in config.layers}
    if not weights:
        return params, tree.rebuild({})
    like = next(iter(weights.values()))
    damping = scalar(damping, "obert: damping", zero=True, like=like)
    steps = value(placed("obert", "", stats.steps, like))
    outers = {
        x.name: placed("obert", x.name, stats.outers[x.name], weights[x.weight])
        for x in config.layers
    }
    weights = {x.name: stop_gradient(weights[x.weight]) for x in config.layers}

    def each(function: Any, *more: dict[str, Any], **static: Any) -> dict[str, Any]:
        def all_(outers: Any, steps: Any, damping: Any, *trees: Any) -> dict[str, Any]:
            of = compiled(trees[0][config.layers[0].name], function, "f", *static)
            return {
                name: of(
                    *(outers[name], steps, damping, *(tree[name] for tree in trees)),
                    f=f,
                    **{key: x[name] for key, x in static.items()},
                )
                for name, f in forms.items()
            }

        found: dict[str, Any] = factored("obert", all_, outers, steps, damping, *more)
        bad = [name for name, x in found.items() if not is_finite(x)]
        if bad:
            raise ValueError(
                f"obert: layer {', '.join(map(repr, bad))}: a block of its Fisher matrix is "
                "singular in float32; give a larger damping"
            )
        return found

    scores = each(_scores, weights, width=widths)
    masks = prune(_OBERT, params, scores, config)
    kept = by_path(masks, tree.leaves)
    keep = {x.name: spread_mask(kept[x.weight], weights[x.name]) for x in config.layers}
    new = each(_repaired, weights, keep)
    leaves = tree.leaves | {x.weight: new[x.name] for x in config.layers}
    return apply_masks(tree.rebuild(leaves), masks), masks


def _width(layer: Layer, config: Config, size: int) -> int:
    """Returns how many neighbours of a row are a unit."""
    granularity = config.granularity
    if granularity == "element" or isinstance(granularity, NM):
        return 1
    if not isinstance(granularity, Block):
        raise ValueError(
            f"obert prunes single weights, N:M and blocks, but the config has "
            f"granularity={granularity!r}; resolve without granularity"
        )
    tiles = tiles_of("obert", layer, granularity)
    if tiles.rows != 1 or size % tiles.columns:
        raise ValueError(
            f"obert: layer {layer.name!r}: {granularity} must lie in one output and divide the "
            f"blocks of the statistics, of {size} weights; give another block, or another size to "
            "fisher_blocks.init"
        )
    return tiles.columns


def _by_block(
    function: Any, total: CompensatedSum, steps: Any, damping: Any, f: Form, *arrays: Any
) -> Any:
    """Returns ``function(F, *blocks)`` of all blocks of a layer, in the weight's shape."""
    xp, size = namespace(total.high), total.high.shape[-1]

    def flat(x: Any) -> Any:
        return xp.reshape(x, (-1, *x.shape[2:]))

    def some(parts: Any) -> Any:
        high, low, *rows = parts
        fisher = (high + low) / steps
        return function(plus_diagonal(fisher, 0 * high[..., 0] + damping), *rows)

    parts = (*map(flat, total), *(flat(in_blocks(x, f, size)) for x in arrays))
    found = in_batches(some, parts, max(1, AT_ONCE // size**2))
    found = xp.reshape(found, (f.members, -1))[:, : f.out * f.columns]
    return from_matrices(xp.reshape(found, (f.members, f.out, f.columns)), f)


def _scores(
    total: CompensatedSum, steps: Any, damping: Any, weight: Any, *, f: Form, width: int
) -> Any:
    """Returns what every weight's unit scores, in the weight's shape."""
    xp = namespace(weight)
    return _by_block(
        functools.partial(_unit_scores, width),
        *(total, steps, damping, f, xp.astype(weight, xp.float32)),
    )


def _unit_scores(width: int, fisher: Any, w: Any) -> Any:
    """Returns scores of units of neighbours, ``(n, size, size), (n, size) -> (n, size)``."""
    xp = namespace(w)
    inverse = xp.linalg.inv(fisher)
    if width == 1:
        diagonal = xp.linalg.diagonal(inverse)
        return xp.where(diagonal > 0, 0.5 * w * w / diagonal, float("nan"))
    starts = range(0, w.shape[1], width)
    own = xp.stack([inverse[:, i : i + width, i : i + width] for i in starts], axis=1)
    units = xp.reshape(w, (w.shape[0], -1, width, 1))
    found = 0.5 * xp.sum(units * xp.linalg.solve(own, units), axis=(2, 3))
    return xp.repeat(found, width, axis=1)


def _repaired(
    total: CompensatedSum, steps: Any, damping: Any, weight: Any, keep: Any, *, f: Form
) -> Any:
    """Returns the weights that stay, which make up for the others."""
    xp = namespace(weight)

    def some(fisher: Any, w: Any, keep: Any) -> Any:
        return least_squares(w[:, None], fisher, keep > 0)[:, 0]

    both = (xp.astype(x, xp.float32) for x in (weight, keep))
    return xp.astype(_by_block(some, total, steps, damping, f, *both), weight.dtype)


def _stored(weight: Any, scores: Any) -> Any:
    return scores


def _of_blocks(weight: Any, scores: Any, g: Grid) -> Any:
    xp = namespace(scores)
    return fold(xp, scores, g, lambda x, axes: xp.max(x, axis=axes))


_OBERT = Criterion("obert", element=_stored, block=_of_blocks, of=by_name)
