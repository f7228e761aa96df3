"""Statistics of single gradients: blocks along the diagonal of the Fisher matrix, summed."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from purepruning.arguments import instance, shown, whole_number
from purepruning.arrays import (
    by_numpy,
    compiled,
    has_values,
    is_array,
    is_torch,
    namespace,
    stop_gradient,
)
from purepruning.config.config import Config
from purepruning.layers import Layer, Layers
from purepruning.linear_algebra import matmul
from purepruning.matrices import Form, form, in_blocks
from purepruning.stats.accumulate import CompensatedSum, WideCount, add, count, empty_total
from purepruning.stats.checks import (
    check_totals,
    gradient_leaves,
    match,
    refuse_non_finite,
    watched,
    weight_of,
)
from purepruning.stats.merging import merged
from purepruning.trees import flatten
from purepruning.types import Params


class FisherStats(NamedTuple):
    r"""Totals over all gradients $g_t$ seen so far, by layer name.

    The matrices of a layer (:mod:`purepruning.matrices`) are read row by row, so that weights of
    neighbouring columns are neighbours, and divided into blocks of so many weights; the last one is
    filled up with weights of no gradient.

    Attributes:
        steps: gradients seen.
        outers: $\sum_t g_{tB} g_{tB}^\top$ of every block B, ``(members, blocks, size, size)``.
    """

    steps: WideCount
    outers: dict[str, CompensatedSum]


def memory(layers: Config | Layers, *, size: int = 50) -> dict[str, int]:
    """Returns by layer name how many bytes its statistics will take; nothing is made.

    Raises:
        ValueError: a layer multiplies its inputs by no matrix.

    >>> from purepruning import Layer
    >>> memory([Layer("fc", "Linear", "fc.w", (768, 768), out_axes=(1,), in_axes=(0,))])
    {'fc': 235940000}
    """
    table, size = watched("fisher_blocks.memory", layers), _size("memory", size)
    shapes = {x.name: shape(form("fisher_blocks.memory", x), size) for x in table}
    return {name: 8 * math.prod(s) for name, s in shapes.items()}


def init(params: Params, layers: Config | Layers, *, size: int = 50) -> FisherStats:
    """Returns the statistics of nothing, in the framework and on the devices of ``params``.

    Args:
        params: the model's parameters; only looked at for where they are.
        layers: the layers to watch: rows of the layer table, or a config, which stands for the
            layers that it prunes.
        size: weights of a block, 50 in the paper; for every weight of a layer, as many pairs of
            floats are kept (:func:`memory`).

    Raises:
        KeyError: a layer's weight is not in ``params``.
        ValueError: a layer multiplies its inputs by no matrix; ``size`` is not positive.
    """
    where = "fisher_blocks.init"
    size, leaves = _size("init", size), flatten(params).leaves
    table = watched(where, layers)
    shapes = {x.name: shape(form(where, x), size) for x in table}
    weights = {x.name: weight_of(where, "params", x, leaves) for x in table}
    like = next(iter(weights.values()), None)
    return FisherStats(
        empty_total(WideCount, like),
        {n: empty_total(CompensatedSum, x, shapes[n]) for n, x in weights.items()},
    )


def update(stats: FisherStats, grads: Any, layers: Config | Layers) -> FisherStats:
    """Returns the statistics with one gradient, or a batch of them, added.

    Runs under ``jit``, ``vmap`` and ``jax.lax.scan``. Gradients are those of single examples or
    small batches: of their mean the Fisher matrix is another. Sums over updates are kept in two
    floats (:mod:`purepruning.stats.accumulate`).

    Args:
        stats: the statistics so far.
        grads: the gradients of the loss, in the tree of the parameters; with one more axis in
            front for a batch, as ``vmap(grad(loss), in_axes=(None, 0))`` returns it.
        layers: the layers to watch, as in :func:`init`.

    Raises:
        KeyError: a layer has no gradient (in torch, None if the loss does not reach it), or no
            statistics.
        TypeError: a gradient is no array of floats, or of another framework than the statistics.
        ValueError: a shape is wrong; layers have batches of different sizes; or, where values are
            known, a gradient is NaN or infinite. Under ``jit`` and ``vmap`` NaN goes into the
            totals, and into the scores made of them.

    >>> import jax.numpy as jnp
    >>> import purepruning as pp
    >>> params = {"fc": jnp.ones((1, 3))}
    >>> layer = pp.make_layer(params, "fc", "Linear", out_axes=0, in_axes=1)
    >>> stats = init(params, [layer], size=2)
    >>> stats = update(stats, {"fc": jnp.array([[1.0, 2.0, 3.0]])}, [layer])
    >>> stats.outers["fc"].high.tolist()
    [[[[1.0, 2.0], [2.0, 4.0]], [[9.0, 0.0], [0.0, 0.0]]]]
    """
    where = "fisher_blocks.update"
    table = watched(where, layers)
    instance(stats, FisherStats, f"{where}: stats", "what fisher_blocks.init returned")
    check_totals(where, stats)
    slopes = gradient_leaves(grads)
    forms = {x.name: form(where, x) for x in table}
    match(where, stats.outers, {n: shape(f, size_of(stats, n)) for n, f in forms.items()})
    given = {x.name: _gradients(where, x, slopes, stats) for x in table}
    sizes = {name: x.shape[0] for name, x in given.items()}
    if len({*sizes.values()}) > 1:
        raise ValueError(
            f"{where}: gradients of layers are batches of different sizes, {sizes}; give as many "
            "of every layer"
        )
    refuse_non_finite(where, "the gradient", {name: [x] for name, x in given.items()})
    outers = dict(stats.outers)
    for layer in table:
        added = functools.partial(_added, forms[layer.name])
        outers[layer.name] = by_numpy(added, stats.outers[layer.name], given[layer.name])
    return FisherStats(count(stats.steps, next(iter(sizes.values()), 0)), outers)


def merge(a: FisherStats, b: FisherStats) -> FisherStats:
    """Returns the statistics of what both have seen.

    Exact for steps; associative and commutative for sums too, up to their 47 bits. Where each
    device or process has statistics of its own gradients, adding them leaf by leaf merges them all:
    ``jax.lax.psum(stats, axis)``, or ``torch.distributed.all_reduce`` of every tensor.

    Raises:
        ValueError: they are of different layers or blocks.
    """
    return merged("fisher_blocks", FisherStats, a, b)


def shape(f: Form, size: int) -> tuple[int, int, int, int]:
    """Returns the shape of a layer's total, for matrices of that form and blocks of that size."""
    return f.members, -(-f.out * f.columns // size), size, size


def size_of(stats: FisherStats, name: str) -> int:
    """Returns how many weights a block of a layer has; 1 where nothing is known of the layer."""
    total = stats.outers.get(name)
    return int(total.high.shape[-1]) if total is not None and total.high.ndim else 1


def _size(where: str, size: Any) -> int:
    return whole_number(size, f"fisher_blocks.{where}: size", 1, 2**15)


def _gradients(where: str, layer: Layer, slopes: Mapping[str, Any], stats: FisherStats) -> Any:
    """Returns the gradients of a layer's weight, ``(batch, *shape)``, checked."""
    x: Any = slopes.get(layer.weight)
    if is_array(x) and not (has_values(x) and namespace(x).isdtype(x.dtype, "real floating")):
        raise TypeError(
            f"{where}: layer {layer.name!r}: {layer.weight!r} must be an array of floats in "
            f"gradients, got {shown(x)}"
        )
    if not is_array(x) or x.ndim != len(layer.shape) + 1 or not x.shape[0]:
        x = weight_of(where, "gradients", layer, slopes)[None]
    weight_of(where, "gradients", layer, {layer.weight: x[0]})
    if is_torch(x) != is_torch(stats.outers[layer.name].high):
        raise TypeError(
            f"{where}: gradients of layer {layer.name!r} and its statistics are of two frameworks, "
            "JAX and torch; make them by init of the parameters that gradients are taken of"
        )
    return stop_gradient(x)


def _added(f: Form, total: CompensatedSum, x: Any) -> CompensatedSum:
    return compiled(x, _with_batch, "f")(total, x, f=f)


def _with_batch(total: CompensatedSum, x: Any, *, f: Form) -> CompensatedSum:
    xp, size = namespace(x), total.high.shape[-1]
    rows = xp.permute_dims(in_blocks(xp.astype(x, xp.float32), f, size), (1, 2, 0, 3))
    return add(total, matmul(xp, xp.matrix_transpose(rows), rows))
