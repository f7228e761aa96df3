"""Transposable N:M: masks that are N:M along the inputs and along the outputs."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np

from purepruning.arguments import shown
from purepruning.arrays import by_numpy, compiled, int32, is_concrete, namespace, stop_gradient
from purepruning.config.config import Config, check_config
from purepruning.granularity import NM
from purepruning.layers import Layer
from purepruning.linear_algebra import matmul
from purepruning.matrices import as_matrices, form, from_matrices
from purepruning.selection.prune import check_values, weights_of
from purepruning.trees import flatten
from purepruning.types import Masks, Params

#: Groups of so many weights have few enough patterns to try them all: 90 of 2:4.
MOST = 4


def transposable(params: Params, stats: None, config: Config) -> Masks:
    r"""Returns masks that keep N of M weights of every output, and of every input, at once.

    Of every M x M block of a layer's matrix, the pattern P with N ones in each row and column that

    $$\max_P \sum_{ij} P_{ij} |w_{ij}|,$$

    the first of equal ones (in the order of their bits), found by trying all: 90 of 2:4, as one
    product of the blocks with all patterns. So the transposed weight, with which gradients go back,
    is N:M too. For configs of ``NM`` with groups of 2 to 4. The tree is that of a pruner
    (:func:`purepruning.prune`). Sums are of float32 products, which round in their own order: of
    integers they are exact, and masks the same in every framework.

    Hubara et al. 2021, arXiv:2102.08124, which solves blocks one by one as a flow problem.

    Raises:
        KeyError, TypeError, ValueError: as :func:`purepruning.prune`.
        ValueError: the config is not of ``NM``, of larger groups, inverted, or has masks; or M does
            not divide the outputs of a layer.

    >>> import jax.numpy as jnp
    >>> import purepruning as pp
    >>> params = {"w": jnp.array([[3.0, 2.0], [2.0, 0.0]])}
    >>> layer = pp.make_layer(params, "w", "Linear", out_axes=1, in_axes=0)
    >>> config = pp.resolve([{"op_types": ["Linear"]}], [layer], granularity=pp.NM(1, 2))
    >>> pp.level(params, None, config)["w"].astype(int).tolist()
    [[1, 1], [0, 0]]
    >>> transposable(params, None, config)["w"].astype(int).tolist()
    [[0, 1], [1, 0]]
    """
    name = "transposable"
    check_config(name, config)
    if stats is not None:
        raise TypeError(f"{name} takes stats=None, got {shown(stats)}")
    nm = config.granularity
    if not isinstance(nm, NM) or nm.of > MOST:
        raise ValueError(
            f"{name} prunes N:M of groups of up to {MOST}, but the config has granularity={nm!r}; "
            "give resolve granularity=NM(keep=2, of=4)"
        )
    if config.inverted or config.masks:
        raise ValueError(
            f"{name} cannot go on from masks or be inverted; give the config that resolve returned"
        )
    tree = flatten(params)
    weights = weights_of(name, tree.leaves, config)
    check_values(name, weights)
    for layer in config.layers:
        f = form(name, layer)
        if f.out % nm.of or f.columns % nm.of:
            raise ValueError(
                f"{name}: layer {layer.name!r} has {f.out} outputs and {f.columns} inputs to an "
                f"output (of each group), which {nm.of} does not divide; exclude it"
            )
    if not weights:
        return tree.rebuild({})

    def solve(weights: dict[str, Any]) -> dict[str, Any]:
        masks = {}
        for layer in config.layers:
            weight = weights[layer.weight]
            of_layer = compiled(weight, _mask, "layer", "nm")
            masks[layer.weight], nan = of_layer(weight, layer=layer, nm=nm)
            if is_concrete(nan) and bool(nan):
                raise ValueError(f"{name}: scores of layer {layer.name!r} are NaN")
        return masks

    return tree.rebuild(by_numpy(solve, {p: stop_gradient(x) for p, x in weights.items()}))


@functools.cache
def patterns(nm: NM) -> np.ndarray:
    """Returns every M x M pattern with N ones in each row and column, flat, in lexicographic order.

    >>> patterns(NM(2, 4)).shape
    (90, 16)
    """
    ones = itertools.combinations(range(nm.of), nm.keep)
    rows = sorted(tuple(int(i in some) for i in range(nm.of)) for some in ones)
    found = [
        np.concatenate(some)
        for some in itertools.product(rows, repeat=nm.of)
        if all(sum(column) == nm.keep for column in zip(*some, strict=True))
    ]
    return np.asarray(found, np.int32)


def _mask(weight: Any, *, layer: Layer, nm: NM) -> tuple[Any, Any]:
    """Returns the mask of a layer, and whether a weight is NaN."""
    xp, f, n = namespace(weight), form("transposable", layer), nm.of
    size = as_matrices(xp.abs(xp.astype(weight, xp.float32)), f)
    split = (f.members, f.out // n, n, f.columns // n, n)
    blocks = xp.reshape(xp.permute_dims(xp.reshape(size, split), (0, 1, 3, 2, 4)), (-1, n * n))
    every = int32(xp, patterns(nm), weight)
    sums = matmul(xp, blocks, xp.astype(xp.matrix_transpose(every), xp.float32))
    best = xp.take(every, xp.argmax(sums, axis=1), axis=0)
    keep = xp.reshape(best == 1, (split[0], split[1], split[3], n, n))
    keep = xp.reshape(xp.permute_dims(keep, (0, 1, 3, 2, 4)), (f.members, f.out, f.columns))
    return from_matrices(keep, f), xp.any(size != size)
