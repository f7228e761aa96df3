"""The ways to run a pruner: every one must give the same masks.

A mode is ``(pruner, params, stats, config) -> {path: mask}``, all in NumPy: parameters and masks
are flat dicts of arrays, statistics any tree of them. Where models are stacked, each has statistics
of its own.
"""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import torch

from purepruning import arrays
from purepruning.trees import flatten


def as_jax(params):
    # Unlike jnp.asarray, this compiles nothing.
    return {path: jax.device_put(x) for path, x in params.items()}


def as_torch(params):
    """``params`` as tensors; bfloat16, which NumPy has from ml_dtypes, goes by its bits."""

    def tensor(x):
        x = np.array(x, order="C")
        if x.dtype == jnp.bfloat16:
            return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(x)

    return {path: tensor(x) for path, x in params.items()}


def as_numpy(masks):
    return {path: np.asarray(mask) for path, mask in flatten(masks).leaves.items()}


def moved(framework, stats):
    """Statistics with every array in the framework of ``as_jax`` or ``as_torch``."""
    return jax.tree.map(lambda x: framework({"": x})[""], stats)


def stacked(tree):
    """Every array of ``tree`` between others of the same sizes."""

    def between_decoys(x):
        decoy = np.reshape(np.reshape(x, -1)[::-1], np.shape(x))
        return np.stack([decoy, x, decoy])

    return jax.tree.map(between_decoys, tree)


def off_host():
    """What eager calls do where arrays are not on a CPU: nothing is handed to NumPy."""
    return mock.patch.object(arrays, "is_on_host", return_value=False)


@functools.cache
def _jitted(pruner):
    return jax.jit(pruner)


@functools.cache
def _vmapped(pruner, *axes):
    return jax.jit(jax.vmap(pruner, in_axes=axes))


def _counts_with_decoys(config):
    return {name: np.asarray([0, k, k // 2], np.int32) for name, k in config.counts.items()}


def _row(masks):
    return {path: mask[1] for path, mask in as_numpy(masks).items()}


def jax_eager(pruner, params, stats, config):
    return as_numpy(pruner(as_jax(params), moved(as_jax, stats), config))


def jax_device(pruner, params, stats, config):
    """Eager, as on another device than a CPU."""
    with off_host():
        return jax_eager(pruner, params, stats, config)


def jax_jit(pruner, params, stats, config):
    return as_numpy(_jitted(pruner)(as_jax(params), stats, config))


def jax_vmap_params(pruner, params, stats, config):
    return _row(_vmapped(pruner, 0, 0, None)(as_jax(stacked(params)), stacked(stats), config))


def jax_vmap_counts(pruner, params, stats, config):
    config = config.with_counts(_counts_with_decoys(config))
    return _row(_vmapped(pruner, None, None, 0)(as_jax(params), stats, config))


def torch_eager(pruner, params, stats, config):
    return as_numpy(pruner(as_torch(params), moved(as_torch, stats), config))


def torch_device(pruner, params, stats, config):
    """Eager, as on another device than a CPU."""
    with off_host():
        return torch_eager(pruner, params, stats, config)


def torch_vmap(pruner, params, stats, config):
    params, stats = as_torch(stacked(params)), moved(as_torch, stacked(stats))
    axes = (0, None if stats is None else 0)
    return _row(torch.func.vmap(lambda p, s: pruner(p, s, config), in_dims=axes)(params, stats))


def torch_vmap_counts(pruner, params, stats, config):
    params, stats = as_torch(params), moved(as_torch, stats)
    counts = as_torch(_counts_with_decoys(config))
    return _row(torch.func.vmap(lambda c: pruner(params, stats, config.with_counts(c)))(counts))


MODES = {
    mode.__name__: mode
    for mode in (
        jax_eager,
        jax_device,
        jax_jit,
        jax_vmap_params,
        jax_vmap_counts,
        torch_eager,
        torch_device,
        torch_vmap,
        torch_vmap_counts,
    )
}
#: Modes that map over counts: not for N:M, whose counts are fixed.
OVER_COUNTS = ("jax_vmap_counts", "torch_vmap_counts")
OVER_PARAMS = ("jax_vmap_params", "torch_vmap")
