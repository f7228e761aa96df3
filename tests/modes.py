"""The ways to run a pruner: every one must give the same masks.

A mode is ``(pruner, params, stats, config) -> {path: mask}``, all in NumPy: parameters and masks
are flat dicts of arrays.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch

from purepruning.namespace import flatten


def as_jax(params):
    return {path: jnp.asarray(x) for path, x in params.items()}


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


@functools.cache
def _jitted(pruner):
    return jax.jit(lambda params, config, stats: pruner(params, stats, config), static_argnums=2)


@functools.cache
def _vmapped(pruner, params, counts):
    def run(params, config, stats):
        return jax.vmap(lambda p, c: pruner(p, stats, c), in_axes=(params_axis, counts_axis))(
            params, config
        )

    params_axis, counts_axis = (0 if params else None), (0 if counts else None)
    return jax.jit(run, static_argnums=2)


def _with_decoys(params):
    """``params`` stacked between others of the same sizes."""
    decoys = {path: x.reshape(-1)[::-1].reshape(x.shape) for path, x in params.items()}
    return {path: np.stack([decoys[path], x, decoys[path]]) for path, x in params.items()}


def _counts_with_decoys(config):
    return {name: np.asarray([0, k, k // 2], np.int32) for name, k in config.counts.items()}


def _row(masks):
    return {path: mask[1] for path, mask in as_numpy(masks).items()}


def jax_eager(pruner, params, stats, config):
    return as_numpy(pruner(as_jax(params), stats, config))


def jax_jit(pruner, params, stats, config):
    return as_numpy(_jitted(pruner)(as_jax(params), config, stats))


def jax_vmap_params(pruner, params, stats, config):
    stacked = as_jax(_with_decoys(params))
    return _row(_vmapped(pruner, True, False)(stacked, config, stats))


def jax_vmap_counts(pruner, params, stats, config):
    config = config.with_counts(_counts_with_decoys(config))
    return _row(_vmapped(pruner, False, True)(as_jax(params), config, stats))


def torch_eager(pruner, params, stats, config):
    return as_numpy(pruner(as_torch(params), stats, config))


def torch_vmap(pruner, params, stats, config):
    stacked = as_torch(_with_decoys(params))
    return _row(torch.func.vmap(lambda p: pruner(p, stats, config))(stacked))


def torch_vmap_counts(pruner, params, stats, config):
    params, counts = as_torch(params), as_torch(_counts_with_decoys(config))
    run = torch.func.vmap(lambda c: pruner(params, stats, config.with_counts(c)))
    return _row(run(counts))


MODES = {
    mode.__name__: mode
    for mode in (
        jax_eager,
        jax_jit,
        jax_vmap_params,
        jax_vmap_counts,
        torch_eager,
        torch_vmap,
        torch_vmap_counts,
    )
}
#: Modes that map over counts: not for N:M, whose counts are fixed.
OVER_COUNTS = ("jax_vmap_counts", "torch_vmap_counts")
