"""Products and factors of matrices, and loops over parts of them.

A loop owns the arrays of its state, so that NumPy and torch write into them.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from purepruning.arrays import is_concrete, is_numpy, is_torch, namespace


def matmul(xp: Any, a: Any, b: Any) -> Any:
    """Returns the product of float32 matrices; in JAX at full precision whatever the default is.

    In torch the user's setting holds, ``torch.backends.cuda.matmul.allow_tf32``.
    """
    return jnp.matmul(a, b, precision="highest") if xp is jnp else xp.matmul(a, b)


def repeat(like: Any, n: int, body: Callable[[Any, Any], Any], state: Any, done: Any = None) -> Any:
    """Returns ``state`` after ``state = body(i, state)`` for i from 0 up to n.

    A loop of XLA in JAX, of Python elsewhere. With ``done``, ``(state) -> bool``, ``state`` stays
    as it is from when that holds.
    """
    if namespace(like) is jnp:
        if done is None:
            return jax.lax.fori_loop(0, n, body, state)
        return jax.lax.while_loop(
            lambda x: (x[0] < n) & ~done(x[1]), lambda x: (x[0] + 1, body(*x)), (0, state)
        )[1]
    for i in range(n):
        over = None if done is None else done(state)
        if over is not None and is_concrete(over) and bool(over):
            break
        new = body(i, state)
        if over is not None and not is_concrete(over):  # under torch's vmap, some go on
            choose = functools.partial(namespace(over).where, over)
            new = jax.tree.map(choose, state, new)
        state = new
    return state


def rows_at(x: Any, start: Any, size: int) -> Any:
    """Returns ``size`` entries of the last axis but one from ``start`` on, which may be traced."""
    if namespace(x) is jnp:
        return jax.lax.dynamic_slice_in_dim(x, start, size, axis=x.ndim - 2)
    return x[..., start : start + size, :]


def put_rows(x: Any, start: Any, values: Any) -> Any:
    """Returns ``x``, which is overwritten, with ``values`` there, along the last axis but one."""
    if namespace(x) is jnp:
        return jax.lax.dynamic_update_slice_in_dim(x, values, start, axis=x.ndim - 2)
    x[..., start : start + values.shape[-2], :] = values
    return x


def minus_outer(x: Any, i: int, column: Any, row: Any) -> Any:
    """Returns ``x``, which is overwritten, minus ``column * row`` in the rows behind row ``i``.

    ``column`` is zero up to ``i``.
    """
    if namespace(x) is jnp:
        return x - column * row
    x[..., i + 1 :, :] -= column[..., i + 1 :, :] * row
    return x


def contiguous(x: Any) -> Any:
    """Returns ``x`` with its last axis dense in memory, where that can be said."""
    if is_torch(x):
        return x.contiguous()
    return np.ascontiguousarray(x) if is_numpy(x) else x


def plus_diagonal(x: Any, values: Any) -> Any:
    """Returns matrices ``(..., n, n)`` with ``values (..., n)`` added to their diagonals."""
    if namespace(x) is jnp:
        n = jnp.arange(x.shape[-1])
        return x.at[..., n, n].add(values)
    if is_torch(x):
        return x + sys.modules["torch"].diag_embed(values)
    x, at = x.copy(), np.arange(x.shape[-1])
    x[..., at, at] += values
    return x


def cholesky(x: Any) -> Any:
    """Returns the lower factors of symmetric matrices ``(..., n, n)``.

    NumPy's of large ones by products of blocks, which takes it a third of the time.
    """
    if not is_numpy(x) or x.shape[-1] <= _CHOLESKY:
        return namespace(x).linalg.cholesky(x)
    x = x.copy()
    n, size = x.shape[-1], _CHOLESKY
    for start in range(0, n, size):
        stop = min(start + size, n)
        own = np.linalg.cholesky(x[..., start:stop, start:stop])
        x[..., start:stop, start:stop] = own
        x[..., start:stop, stop:] = 0
        if stop < n:
            below = x[..., stop:, start:stop] @ np.linalg.inv(own).swapaxes(-1, -2)
            x[..., stop:, start:stop] = below
            for at in range(stop, n, size):
                some = below[..., at - stop : at - stop + size, :]
                rest = below[..., at - stop :, :]
                x[..., at:, at : at + size] -= rest @ some.swapaxes(-1, -2)
    return x


_CHOLESKY = 128


def in_batches(function: Callable[[Any], Any], x: Any, size: int) -> Any:
    """Returns ``function`` of so many entries of the first axes of a tree at a time, as one."""
    like = jax.tree.leaves(x)[0]
    n = like.shape[0]
    if n <= size:
        return function(x)

    def some(start: int, stop: int) -> Any:
        return jax.tree.map(lambda y: y[start:stop], x)

    if namespace(like) is jnp and not is_concrete(like):
        whole = n - n % size
        parts = jax.tree.map(lambda y: jnp.reshape(y, (-1, size, *y.shape[1:])), some(0, whole))
        found = jax.tree.map(
            lambda y: jnp.reshape(y, (whole, *y.shape[2:])), jax.lax.map(function, parts)
        )
        pieces = [found, function(some(whole, n))] if whole < n else [found]
    else:
        pieces = [function(some(start, start + size)) for start in range(0, n, size)]
    return jax.tree.map(lambda *all_: namespace(like).concat(all_, axis=0), *pieces)
