"""Pruned parameters as sparse matrices of JAX: ``jax.experimental.sparse.BCOO``."""

from __future__ import annotations

from typing import Any

import numpy as np
from jax.experimental import sparse

from purepruning.arguments import shown
from purepruning.arrays import by_numpy, has_values, is_torch, jax_array
from purepruning.masks import by_path, to_numpy
from purepruning.trees import flatten
from purepruning.types import Masks, Params


def to_bcoo(params: Params, masks: Masks) -> Params:
    """Returns ``params`` with a ``jax.experimental.sparse.BCOO`` for each that has a mask.

    It holds the weights that are kept, zeros among them too, and their indices, sorted and unique
    (``n_batch=0``, ``n_dense=0``, int32): ``x @ w`` and ``w @ x`` take it in the place of the
    array, and ``w.todense()`` is what :func:`purepruning.apply_masks` makes. Kept weights may be
    traced, masks not. Gradients are had by ``jax.experimental.sparse.grad``, or of ``w.data``.

    Fewer bytes only where less than about a quarter of a matrix in float32 stays: each kept weight
    takes 8 bytes of indices. On a CPU products are slower than dense ones at every usual sparsity
    (row ``bcoo`` of the benchmarks).

    Raises:
        KeyError, ValueError, TypeError: the masks do not fit ``params``, as in
            :func:`purepruning.apply_masks`; or are not known (under ``jit``).
        TypeError: a parameter that has a mask is a tensor of torch, or only a shape.
        ValueError: a parameter that has a mask is a scalar.

    >>> import jax.numpy as jnp
    >>> params = {"w": jnp.array([[1.0, 2.0], [3.0, 4.0]]), "b": jnp.ones(2)}
    >>> masks = {"w": jnp.array([[False, True], [True, False]]), "b": None}
    >>> sparse = to_bcoo(params, masks)
    >>> sparse["w"].data.tolist(), sparse["w"].indices.tolist()
    ([2.0, 3.0], [[0, 1], [1, 0]])
    >>> (jnp.ones(2) @ sparse["w"] + sparse["b"]).tolist()
    [4.0, 3.0]
    """
    tree = flatten(params)
    kept = {}
    for name, mask in by_path(masks, tree.leaves).items():
        leaf = tree.leaves[name]
        if is_torch(leaf) or not has_values(leaf):
            raise TypeError(
                f"to_bcoo: {name!r} must be an array of JAX or NumPy, got {shown(leaf)}; in torch "
                "use the tensor's to_sparse()"
            )
        if not leaf.shape:
            raise ValueError(f"to_bcoo: {name!r} is a scalar; leave its mask out")
        kept[name] = _kept(leaf, to_numpy(mask))
    return tree.rebuild({**tree.leaves, **kept})


def _kept(x: Any, mask: np.ndarray) -> sparse.BCOO:
    at = np.nonzero(np.broadcast_to(mask, x.shape))
    data = by_numpy(lambda x: x[at], x)
    indices = jax_array(np.stack(at, axis=-1).astype(np.int32))
    if isinstance(data, np.ndarray):
        data = jax_array(data)
    return sparse.BCOO((data, indices), shape=x.shape, indices_sorted=True, unique_indices=True)
