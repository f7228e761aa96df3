"""SparseGPT: columns from left to right, what goes is made up for by the columns behind."""

from __future__ import annotations

from typing import Any

from purepruning.arrays import iota, namespace
from purepruning.config.config import Config
from purepruning.linear_algebra import matmul, minus_outer, put_rows, repeat, rows_at
from purepruning.pruners.reconstruction import Pattern, reconstruct, share, upper_factor
from purepruning.stats.inputs import InputStats
from purepruning.types import Masks, Params

#: Columns that are ranked together, as in the paper, and columns that are updated one by one.
COLUMNS, FEW = 128, 16


def sparse_gpt(
    params: Params, stats: InputStats, config: Config, *, damping: Any = 0.01
) -> tuple[Params, Masks]:
    r"""Returns parameters and masks by which the outputs of every layer change little.

    Columns j are gone through from left to right. With $U$ upper triangular,
    $(H + \lambda I)^{-1} = U^\top U$, and W as the columns before have left it,

    $$s_{ij} = \frac{w_{ij}^2}{U_{jj}^2}, \qquad
      W_{:,j:} \leftarrow W_{:,j:} - \frac{W_{:,j} - \hat W_{:,j}}{U_{jj}} U_{j,j:}.$$

    In every 128 columns, or their nearest multiple of a block's, the weights or blocks of lowest
    score go, so many that the count of the layer is met exactly; of N:M as soon as the columns of
    its group come up. $\lambda$ is the ``damping`` times the mean of the diagonal of
    $H = \sum_t x_t x_t^\top$ (``"grams"`` of :mod:`purepruning.stats.inputs`).

    $U$ is the inverse of the factor of $H + \lambda I = R R^\top$, and never formed: what the
    columns before a block have changed is added to it by one product with $R$.

    Frantar and Alistarh 2023, arXiv:2301.00774. Its code prunes one weight too many of every 128
    columns.

    Args:
        params, stats, config: see :func:`purepruning.pruners.reconstruction.reconstruct`, for
            errors too.
        damping: 0.01 in the paper's code.

    >>> import jax.numpy as jnp
    >>> import purepruning as pp
    >>> from purepruning.stats import inputs
    >>> params = {"fc": jnp.array([[1.0, 3.0]])}
    >>> layer = pp.make_layer(params, "fc", "Linear", out_axes=0, in_axes=1)
    >>> stats = inputs.init(params, [layer], keep=["grams"])
    >>> stats = inputs.update(stats, {"fc": jnp.array([[1.0, 1.0], [1.0, 1.1]])}, [layer])
    >>> new, masks = sparse_gpt(params, stats, pp.resolve(0.5, [layer]))
    >>> masks["fc"].tolist(), new["fc"].round(1).tolist()
    ([[False, True]], [[0.0, 3.9]])
    """
    return reconstruct("sparse_gpt", _solve, params, stats, config, damping)


def _solve(w: Any, h: Any, counts: Any, pattern: Pattern) -> tuple[Any, Any]:
    """Returns weights and what stays of them, ``(members, columns, out)``."""
    xp = namespace(w)
    width = pattern.width
    few = -(-FEW // width) * width
    wide = min(-(-COLUMNS // few), -(-w.shape[1] // few)) * few
    n = w.shape[1]
    blocks = -(-n // wide)
    r, w = _padded(upper_factor(h), w, blocks * wide)
    # Of the framework, and under vmap of the batch, of all that goes into it.
    nothing = w * 0 + r[:, :, :1] * 0 + xp.astype(counts * 0, xp.float32)[:, None, None]

    def block(b: Any, state: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        gone, new, keep = state
        start = b * wide
        own = rows_at(w, start, wide)
        factor = rows_at(xp.matrix_transpose(rows_at(r, start, wide)), start, wide)
        inverse = xp.matrix_transpose(_inverse_of_lower(factor))
        now = own + matmul(xp, xp.matrix_transpose(inverse), _changed(r, gone, start, wide))
        column = iota(xp, wide, w) + start
        stays = None
        if pattern.nm is None:
            scores = (now * xp.linalg.diagonal(factor)[..., None]) ** 2
            if blocks * wide > n:
                scores = xp.where(column[None, :, None] < n, scores, float("inf"))
            stop = (b + 1) * wide
            stop = min(stop, n) if isinstance(stop, int) else xp.clip(stop, max=n)
            stays = pattern.keep(scores, share(counts, start, stop, n))
        now, stays = _within(now, inverse, stays, pattern, few)
        return (
            put_rows(gone, start, own - now),
            put_rows(new, start, now),
            put_rows(keep, start, stays),
        )

    _, new, keep = repeat(w, blocks, block, (nothing, nothing + 0, nothing > 0))
    return new[:, :n], keep[:, :n]


def _padded(r: Any, w: Any, n: int) -> tuple[Any, Any]:
    """Returns a factor and weights of n columns, those that are more without effect."""
    xp, more = namespace(w), n - w.shape[1]
    if not more:
        return r, w
    zeros = xp.zeros_like(w[:, :1]) + w[:, :1] * 0
    w = xp.concat([w, xp.broadcast_to(zeros, (w.shape[0], more, w.shape[2]))], axis=1)
    side = xp.broadcast_to(xp.zeros_like(r[:, :, :1]), (*r.shape[:2], more))
    r = xp.concat([r, side], axis=2)
    index = iota(xp, n, w)
    eye = xp.astype(index[-more:, None] == index[None, :], xp.float32)
    return xp.concat([r, xp.broadcast_to(eye[None], (r.shape[0], more, n))], axis=1), w


def _changed(r: Any, gone: Any, start: Any, wide: int) -> Any:
    r"""Returns what the columns before have changed: their part of $R^\top (W - \hat W)$."""
    xp = namespace(r)
    if isinstance(start, int):
        r, gone = r[:, :start], gone[:, :start]
    ours = rows_at(xp.matrix_transpose(r), start, wide)
    return matmul(xp, ours, gone)


def _inverse_of_lower(factor: Any) -> Any:
    """Returns the inverse of a block's factor, of which the transpose is given."""
    return namespace(factor).linalg.inv(factor)


def _within(now: Any, inverse: Any, stays: Any, pattern: Pattern, few: int) -> tuple[Any, Any]:
    """Returns the columns of a block, pruned one after the other, and what stays of them."""
    xp, index = namespace(now), iota(namespace(now), now.shape[1], now)
    strict = index[:few, None] < index[None, :few]

    def part(p: Any, state: Any) -> Any:
        now, keep = state
        start = p * few
        rows = rows_at(inverse, start, few)
        own = xp.matrix_transpose(rows_at(xp.matrix_transpose(rows), start, few))
        pivots = xp.linalg.diagonal(own)[..., None]
        own = xp.where(strict[None], own, 0.0)
        # A column that has been gone through is not changed any more.
        x, kept = rows_at(now, start, few) + 0.0, rows_at(keep, start, few)
        gone = xp.where(kept, 0.0, 1 / pivots)
        errors = []
        for i in range(few):
            if pattern.nm is not None and i % pattern.width == 0:
                group = slice(i, i + pattern.width)
                some = pattern.keep((x[:, group] / pivots[:, group]) ** 2, None)
                kept = put_rows(kept, i, some)
                gone = xp.where(some, 0.0, 1 / pivots[:, group])
            at = i if pattern.nm is None else i % pattern.width
            errors.append(x[:, i : i + 1] * gone[:, at : at + 1])
            column = xp.matrix_transpose(own[:, i : i + 1])
            x = minus_outer(x, i, column, errors[-1])
        behind = rows[:, :, start + few :] if isinstance(start, int) else rows
        if not isinstance(start, int):
            behind = xp.where((index >= start + few)[None, None], rows, 0.0)
        change = matmul(xp, xp.matrix_transpose(behind), xp.concat(errors, axis=1))
        keep = put_rows(keep, start, kept)
        now = put_rows(now, start, xp.where(kept, x, 0.0))
        if isinstance(start, int):
            now[:, start + few :] -= change
            return now, keep
        return now - change, keep

    keep = now > float("inf") if stays is None else stays
    return repeat(now, now.shape[1] // few, part, (now, keep))
