"""Optimal brain compression: the least harmful weight goes, the others make up for it, again."""

from __future__ import annotations

from typing import Any, NamedTuple

from purepruning.arrays import iota, namespace
from purepruning.config.config import Config
from purepruning.linear_algebra import in_batches, matmul, repeat
from purepruning.pruners.reconstruction import (
    AT_ONCE,
    Pattern,
    least_squares,
    reconstruct,
    solved_layers,
)
from purepruning.selection.keys import ordered_bits
from purepruning.selection.problem import kernel_of
from purepruning.stats.inputs import InputStats
from purepruning.types import Masks, Params


def obc(
    params: Params, stats: InputStats, config: Config, *, damping: Any = 1e-4
) -> tuple[Params, Masks]:
    r"""Returns parameters and masks by which the outputs of every layer change least, greedily.

    Of every row, with the inverse of $H = \sum_t x_t x_t^\top$ over what the row still has, the
    weight goes whose removal adds least to the squared error, and the others make up for it:

    $$p = \arg\min_p \frac{w_p^2}{[H^{-1}]_{pp}}, \qquad
      w \leftarrow w - \frac{w_p}{[H^{-1}]_{pp}} H^{-1}_{:,p}, \qquad
      H^{-1} \leftarrow H^{-1} - \frac{H^{-1}_{:,p} H^{-1}_{p,:}}{[H^{-1}]_{pp}}.$$

    Blocks go by $w_B [H^{-1}_{BB}]^{-1} w_B^\top$. How many go of each row is found over all rows
    of a layer: the next one always goes where it adds least. Of N:M no group loses more than it
    may. The weights that stay are then the least squares solution on their places, what the
    updates come to without their rounding.

    Exact, and slow: $O(\text{out} \cdot \text{columns}^3)$ operations. For layers of up to some
    hundred columns, and to tell how far others are from it.

    Frantar et al. 2022, arXiv:2208.11580 (OBC, ExactOBS); Hassibi and Stork 1992 (optimal brain
    surgeon).

    Args:
        params, stats, config: see :func:`purepruning.pruners.reconstruction.reconstruct`, for
            errors too.
        damping: how much of the mean of its diagonal is added to that of $H$.

    >>> import jax.numpy as jnp
    >>> import purepruning as pp
    >>> from purepruning.stats import inputs
    >>> params = {"fc": jnp.array([[1.0, 3.0]])}
    >>> layer = pp.make_layer(params, "fc", "Linear", out_axes=0, in_axes=1)
    >>> stats = inputs.init(params, [layer], keep=["grams"])
    >>> stats = inputs.update(stats, {"fc": jnp.array([[1.0, 1.0], [1.0, 1.1]])}, [layer])
    >>> new, masks = obc(params, stats, pp.resolve(0.5, [layer]))
    >>> masks["fc"].tolist(), new["fc"].round(2).tolist()
    ([[False, True]], [[0.0, 3.95]])
    """
    return reconstruct("obc", _solve, params, stats, config, damping)


def obc_errors(
    params: Params, stats: InputStats, config: Config, *, damping: Any = 1e-4
) -> dict[str, Any]:
    """Returns by layer name the squared error after every removal, ``(members, rows, units + 1)``.

    Rows are those of blocks (of single weights, outputs), and units the blocks in one of them. The
    first of each row is 0, the last the error without any of it; how a search can divide a
    sparsity among rows and layers follows from them. The config's counts do not matter, but those
    of N:M do. Arguments and errors are those of :func:`obc`.
    """
    return solved_layers("obc_errors", _errors, params, stats, config, damping)


class Trace(NamedTuple):
    """What happens to rows of blocks, ``(rows, ...)``.

    Attributes:
        rank: of every block, after how many others it went; ``units`` if it never did.
        key: of every removal, the largest error that it or one before it adds.
        errors: squared error after so many removals.
    """

    rank: Any
    key: Any
    errors: Any


def _solve(w: Any, h: Any, counts: Any, pattern: Pattern) -> tuple[Any, Any]:
    """Returns weights and what stays of them, ``(members, columns, out)``."""
    xp = namespace(w)
    new, keep = [], []
    for m in range(w.shape[0]):
        rows, inverse = _rows(w[m], pattern), xp.linalg.inv(h[m])
        trace = _traces(rows, inverse, pattern)
        taken = xp.full_like(trace.rank[:, 0], trace.key.shape[1])
        if pattern.nm is None:
            keys = xp.reshape(ordered_bits(xp, trace.key), (1, -1))
            low = kernel_of(keys).lowest(keys, counts[m : m + 1], None)
            gone = xp.reshape(low, tuple(trace.key.shape))
            taken = xp.sum(xp.astype(gone, xp.int32), axis=1, dtype=xp.int32)
        stays = trace.rank >= taken[:, None]  # (rows, blocks)
        columns = xp.reshape(
            xp.broadcast_to(stays[:, :, None], (*stays.shape, pattern.columns)),
            (stays.shape[0], -1),
        )
        keep.append(_back(xp.broadcast_to(columns[:, None], tuple(rows.shape))))
        new.append(_back(_least_squares(rows, h[m], columns)))
    return xp.stack(new), xp.stack(keep)


def _errors(w: Any, h: Any, counts: Any, pattern: Pattern) -> Any:
    xp = namespace(w)
    found = [_traces(_rows(w[m], pattern), xp.linalg.inv(h[m]), pattern) for m in range(len(w))]
    return xp.stack([trace.errors for trace in found])


def _rows(w: Any, pattern: Pattern) -> Any:
    """Returns ``(columns, out)`` as rows of blocks, ``(rows, outputs of a block, columns)``."""
    xp = namespace(w)
    return xp.reshape(xp.matrix_transpose(w), (-1, pattern.rows, w.shape[0]))


def _back(rows: Any) -> Any:
    xp = namespace(rows)
    return xp.matrix_transpose(xp.reshape(rows, (-1, rows.shape[2])))


def _traces(rows: Any, inverse: Any, pattern: Pattern) -> Trace:
    """Returns what happens to every row if its blocks go one after the other."""

    def some(rows: Any) -> Trace:
        return _trace(rows, inverse, pattern)

    return in_batches(some, rows, max(1, AT_ONCE // inverse.shape[0] ** 2))


def _trace(w: Any, inverse: Any, pattern: Pattern) -> Trace:
    xp, c = namespace(w), pattern.columns
    n, r, columns = w.shape
    units = columns // c
    steps = (
        units if pattern.nm is None else units // pattern.nm.of * (pattern.nm.of - pattern.nm.keep)
    )
    index = iota(xp, units, w)[None]
    inverse = xp.broadcast_to(inverse[None], (n, columns, columns)) + w[:, :1, :1] * 0
    nothing = w[:, 0, ::c] * 0
    rank = xp.astype(nothing, xp.int32) + units
    step_of = iota(xp, steps, w)[None]
    key = nothing[:, :1] + xp.zeros_like(xp.astype(step_of, xp.float32))

    def step(t: Any, state: Any) -> Any:
        w, inverse, rank, key, last = state
        blocks = xp.reshape(inverse, (n, units, c, units, c))
        own = xp.moveaxis(xp.linalg.diagonal(xp.permute_dims(blocks, (0, 2, 4, 1, 3))), -1, 1)
        here = xp.permute_dims(xp.reshape(w, (n, r, units, c)), (0, 2, 3, 1))
        free = rank == units
        if pattern.nm is not None:
            free = free & _has_room(free, pattern)
        eye = xp.astype(index[0, :c, None] == index[:, :c], xp.float32)[None, None]
        own = xp.where(free[..., None, None], own, eye)
        weighted = here / own if c == 1 else xp.linalg.solve(own, here)
        added = xp.where(free, xp.sum(here * weighted, axis=(2, 3)), float("inf"))
        p = xp.argmin(added, axis=1, keepdims=True)
        place = p[:, None, :, None]
        across = xp.take_along_axis(
            xp.reshape(inverse, (n, columns, units, c)),
            xp.broadcast_to(place, (n, columns, 1, c)),
            axis=2,
        )[:, :, 0]
        move = xp.take_along_axis(weighted, xp.broadcast_to(place, (n, 1, c, r)), axis=1)[:, 0]
        square = xp.take_along_axis(own, xp.broadcast_to(place, (n, 1, c, c)), axis=1)[:, 0]
        turned = xp.matrix_transpose(across)
        through = turned / square if c == 1 else xp.linalg.solve(square, turned)
        w = w - matmul(xp, xp.matrix_transpose(move), turned)
        inverse = inverse - matmul(xp, across, through)
        gone = index == xp.astype(p, xp.int32)
        rank = xp.where(gone & free, xp.astype(xp.zeros_like(rank), xp.int32) + t, rank)
        w = xp.where(xp.repeat(rank == units, c, axis=1)[:, None], w, 0.0)
        least = xp.min(added, axis=1, keepdims=True)
        last = xp.maximum(last, least)
        key = xp.where(step_of == t, xp.concat([last], axis=1), key)
        errors = xp.where(step_of == t, least, 0.0)
        return w, inverse, rank, key, last, errors

    def body(t: Any, state: Any) -> Any:
        *inner, total = state
        *new, errors = step(t, tuple(inner))
        return (*new, total + errors)

    state = (w, inverse, rank, key, nothing[:, :1], key * 0)
    _, _, rank, key, _, added = repeat(w, steps, body, state)
    errors = xp.cumulative_sum(added, axis=1, include_initial=True)
    return Trace(rank, key, errors)


def _has_room(free: Any, pattern: Pattern) -> Any:
    """Returns which columns are in a group of N:M that may lose one more."""
    xp, nm = namespace(free), pattern.nm
    assert nm is not None
    groups = xp.reshape(xp.astype(free, xp.int32), (free.shape[0], -1, nm.of))
    left = xp.sum(groups, axis=2, dtype=xp.int32) > nm.keep
    return xp.repeat(left, nm.of, axis=1)


def _least_squares(rows: Any, h: Any, keep: Any) -> Any:
    """Returns rows ``(n, outputs, columns)`` of least error where they stay, ``(n, columns)``."""

    def some(parts: Any) -> Any:
        return least_squares(parts[0], h[None], parts[1])

    return in_batches(some, (rows, keep), max(1, AT_ONCE // h.shape[0] ** 2))
