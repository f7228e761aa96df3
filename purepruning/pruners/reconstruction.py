r"""Pruners that also change the weights that stay, so that a layer's outputs change least.

They are ``(params, stats, config) -> (params, masks)``: for every layer of matrix $W$ and inputs of
Gram matrix $H = \sum_t x_t x_t^\top$ they look for weights with

$$\min_{\hat W} \sum_t \lVert W x_t - \hat W x_t \rVert^2
  = \operatorname{tr} (W - \hat W) H (W - \hat W)^\top$$

of which so many are zero as the config says. Each is a function of one layer's matrices, handed to
:func:`reconstruct`, which does all else.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from purepruning.arguments import is_finite, scalar
from purepruning.arrays import (
    by_numpy,
    compiled,
    int32,
    iota,
    is_concrete,
    namespace,
    stop_gradient,
)
from purepruning.config.config import Config
from purepruning.granularity import NM, Block, grid
from purepruning.layers import Layer
from purepruning.linear_algebra import cholesky, contiguous, matmul, plus_diagonal
from purepruning.masks import apply_masks
from purepruning.matrices import Form, as_matrices, form, from_matrices
from purepruning.pruners.calibrated import totals_of
from purepruning.selection.biases import with_biases
from purepruning.selection.keys import ordered_bits
from purepruning.selection.nm import highest_of_groups
from purepruning.selection.problem import kernel_of, n_stacked
from purepruning.selection.prune import check_values, checked_counts, weights_of
from purepruning.stats.accumulate import value
from purepruning.stats.inputs import InputStats
from purepruning.trees import Flat, flatten
from purepruning.types import Masks, Params


@dataclasses.dataclass(frozen=True)
class Pattern:
    """What goes together, in matrices that are transposed: ``(members, columns, out)``.

    Attributes:
        rows, columns: how many outputs and columns a unit has; 1 and 1 are single weights.
        nm: where groups of columns keep so many.
    """

    rows: int = 1
    columns: int = 1
    nm: NM | None = None

    @property
    def width(self) -> int:
        """Columns that are not divided."""
        return self.columns if self.nm is None else self.nm.of

    def keep(self, scores: Any, counts: Any) -> Any:
        """Returns which weights stay where ``counts (members,)`` units of lowest score go.

        Scores of a unit are added. NaN is highest.
        """
        xp = namespace(scores)
        members, columns, out = scores.shape
        if self.nm is not None:
            shape = (members, columns // self.nm.of, self.nm.of, out)
            keys = ordered_bits(xp, xp.reshape(scores, shape))
            return xp.reshape(highest_of_groups(keys, 2, self.nm), scores.shape)
        tiles = (members, columns // self.columns, self.columns, out // self.rows, self.rows)
        whole = scores
        if self.columns * self.rows > 1:
            whole = xp.sum(xp.reshape(scores, tiles), axis=(2, 4))
        keys = xp.reshape(ordered_bits(xp, whole), (members, -1))
        keep = ~kernel_of(keys).lowest(keys, counts, None)
        if self.columns * self.rows == 1:
            return xp.reshape(keep, scores.shape)
        units = xp.reshape(keep, (members, tiles[1], 1, tiles[3], 1))
        return xp.reshape(xp.broadcast_to(units, tiles), scores.shape)


#: Floats of matrices that are held at once where every row of blocks has one of its own.
AT_ONCE = 1 << 25

#: ``(weights, grams, counts, pattern, damping) -> (weights, keep)`` of one layer: float32
#: ``(members, columns, out)`` and ``(members, columns, columns)``, and how many units each member
#: loses.
Solve = Callable[..., tuple[Any, Any]]


def reconstruct(
    name: str, solve: Solve, params: Params, stats: InputStats, config: Config, damping: Any
) -> tuple[Params, Masks]:
    """Returns parameters and masks: of every layer of the config what ``solve`` makes of it.

    Sparsities, granularity and the form of the masks are those of :func:`purepruning.prune`.
    Groups of a convolution lose equally many. Pruned weights, and pruned biases, are zero in the
    parameters returned; those that stay have their dtype.

    Raises:
        TypeError: ``stats`` are no input statistics, or of another framework.
        KeyError, ValueError: they are empty, not of the layers of ``config``, or hold no Gram
            matrices (``inputs.init(..., keep=["grams"])``).
        ValueError: the config is of channels, of global scope, coupled, inverted or has masks; a
            block does not divide a weight, or lies over several taps; or, where values are known, a
            weight is NaN or infinite, or a Gram matrix cannot be factored. Under ``jit`` those give
            NaN.
    """
    given = _checked(name, params, stats, config, damping)
    if not given.weights:
        return params, given.tree.rebuild({})
    tree = given.tree

    def solved(*arrays: Any) -> Any:
        found = _of_layers(*arrays, name=name, given=given, config=config, of=_layer, solve=solve)
        new, masks = ({x.weight: found[x.name][i] for x in config.layers} for i in range(2))
        return new, with_biases(masks, tree, config)

    new, masks = given.run(name, solved)
    masks = tree.rebuild(masks)
    return apply_masks(tree.rebuild({**tree.leaves, **new}), masks), masks


def solved_layers(
    name: str,
    function: Callable[..., Any],
    params: Params,
    stats: InputStats,
    config: Config,
    damping: Any,
) -> dict[str, Any]:
    """Returns by layer name what ``function`` makes of its matrices; arguments as ``solve``'s."""
    given = _checked(name, params, stats, config, damping, counted=False)
    solved = functools.partial(
        _of_layers, name=name, given=given, config=config, of=_matrices, solve=function
    )
    found: dict[str, Any] = given.run(name, solved)
    return found


def _of_layers(
    weights: dict[str, Any],
    grams: dict[str, Any],
    counts: dict[str, Any],
    damping: Any,
    *,
    name: str,
    given: _Given,
    config: Config,
    of: Callable[..., Any],
    solve: Callable[..., Any],
) -> dict[str, Any]:
    """Returns by layer name what ``of``, :func:`_layer` or :func:`_matrices`, makes of it."""
    found = {}
    for layer in config.layers:
        weight = weights[layer.weight]
        found[layer.name] = compiled(weight, of, "solve", "layer", "pattern")(
            weight,
            grams[layer.name],
            counts.get(layer.name, 0),
            damping,
            solve=solve,
            layer=layer,
            pattern=given.patterns[layer.name],
        )
        if not all(map(is_finite, (weight, *jax.tree.leaves(found[layer.name])))):
            raise ValueError(
                f"{name}: layer {layer.name!r}: its weights are, or came out, NaN or infinite; see "
                "whether they and the statistics are finite, and give a larger damping"
            )
    return found


class _Given(NamedTuple):
    """What came, checked."""

    tree: Flat
    weights: dict[str, Any]
    grams: dict[str, Any]
    counts: dict[str, Any]
    damping: Any
    patterns: dict[str, Pattern]

    def run(self, name: str, function: Callable[..., Any]) -> Any:
        """Returns what a function makes of the arrays."""
        return factored(name, function, self.weights, self.grams, self.counts, self.damping)


def factored(name: str, function: Callable[..., Any], *trees: Any) -> Any:
    """Returns :func:`purepruning.arrays.by_numpy` of a function that factors matrices.

    Raises:
        ValueError: one cannot be.
    """
    try:
        return by_numpy(function, *trees)
    except (np.linalg.LinAlgError, RuntimeError) as error:  # torch raises one of the latter
        known = ("cholesky", "definite", "singular")
        if not any(word in str(error).lower() for word in known):
            raise
        raise ValueError(
            f"{name}: a matrix of the statistics cannot be factored: {error}; give a larger damping"
        ) from None


def _checked(
    name: str,
    params: Params,
    stats: InputStats,
    config: Config,
    damping: Any,
    *,
    counted: bool = True,
) -> _Given:
    grams = totals_of(name, params, stats, config, "grams")
    tree = flatten(params)
    weights = weights_of(name, tree.leaves, config)
    like = next(iter(weights.values()), None)
    damping = scalar(damping, f"{name}: damping", zero=True, like=like)
    damping = float(damping) if is_concrete(damping) else damping
    check_values(name, weights)
    patterns = {layer.name: _pattern(name, layer, config) for layer in config.layers}
    counts: dict[str, Any] = {}
    if counted and not isinstance(config.granularity, NM):
        by_pool = checked_counts(name, config)
        counts = {x.name: by_pool[pool.name] for pool in config.pools for x in pool.layers}
    weights = {path: stop_gradient(x) for path, x in weights.items()}
    return _Given(tree, weights, grams, counts, damping, patterns)


def _pattern(name: str, layer: Layer, config: Config) -> Pattern:
    """Returns what goes together in the matrices of a layer."""
    if config.scope != "layer" or config.allocation is not None:
        raise ValueError(
            f"{name} prunes every layer to its own count; resolve with scope='layer' and without a "
            "coupling (pp.resolve takes a sparsity for each layer)"
        )
    if config.inverted or config.masks:
        raise ValueError(
            f"{name} changes the weights that stay, and cannot go on from masks or be inverted; "
            "give the config that resolve returned"
        )
    granularity = config.granularity
    if granularity == "element":
        return Pattern()
    if isinstance(granularity, NM):
        return Pattern(nm=granularity)
    if not isinstance(granularity, Block):
        raise ValueError(
            f"{name} prunes single weights, N:M and blocks, but the config has "
            f"granularity={granularity!r}; resolve without granularity"
        )
    return tiles_of(name, layer, granularity)


def tiles_of(name: str, layer: Layer, granularity: Block) -> Pattern:
    """Returns blocks as tiles of a layer's matrices.

    Raises:
        ValueError: they are not.
    """
    g, f = grid(layer, granularity), form(name, layer)
    sizes = g.sizes
    alone = (*layer.out_axes[:-1], *layer.in_axes[:-1], *layer.spatial_axes)
    rows, columns = sizes[layer.out_axes[-1]], sizes[layer.in_axes[-1]]
    ins = f.split[f.order[-1]]
    out = f.split[f.order[-1 - len(layer.spatial_axes) - len(layer.in_axes)]]
    if any(sizes[a] != 1 for a in alone) or out % rows or ins % columns:
        raise ValueError(
            f"{name}: layer {layer.name!r}: {granularity} must divide its {out} outputs and {ins} "
            "inputs, and have size 1 along all other axes; give another block"
        )
    return Pattern(rows, columns)


def _layer(
    weight: Any,
    gram: Any,
    count: Any,
    damping: Any,
    *,
    solve: Solve,
    layer: Layer,
    pattern: Pattern,
) -> tuple[Any, Any]:
    """Returns the weight of one layer and its mask."""
    xp, f = namespace(weight), form("reconstruct", layer)
    new, keep = _matrices(weight, gram, count, damping, solve=solve, layer=layer, pattern=pattern)
    new, keep = (from_matrices(xp.matrix_transpose(x), f) for x in (new, keep))
    return xp.astype(xp.where(keep, new, 0.0), weight.dtype), keep


def _matrices(
    weight: Any,
    gram: Any,
    count: Any,
    damping: Any,
    *,
    solve: Callable[..., Any],
    layer: Layer,
    pattern: Pattern,
) -> Any:
    """Returns what ``solve`` makes of the matrices of one layer."""
    xp, f = namespace(weight), form("reconstruct", layer)
    rows = as_matrices(xp.astype(weight, xp.float32), f)
    w, h = damped(contiguous(xp.matrix_transpose(rows)), value(gram), damping)
    return solve(w, h, _counts(xp, count, f, layer, w), pattern)


def damped(w: Any, gram: Any, damping: Any) -> tuple[Any, Any]:
    """Returns weights without dead columns, and $H$ plus the damping times its mean diagonal.

    What is never fed does not matter: its weights are zero, and its entry of $H$ is 1.
    """
    xp = namespace(w)
    diagonal = xp.linalg.diagonal(gram)
    dead = diagonal == 0
    more = xp.where(dead, 1.0, xp.mean(diagonal, axis=-1, keepdims=True) * damping)
    return xp.where(dead[..., None], 0.0, w), plus_diagonal(gram, xp.astype(more, xp.float32))


def _counts(xp: Any, count: Any, f: Form, layer: Layer, like: Any) -> Any:
    """Returns how many units each member loses: the groups of a layer equally many, or one more."""
    stacks = n_stacked(layer)
    groups = f.members // stacks
    k = int32(xp, count, like)
    ends = [k // groups * i + k % groups * i // groups for i in range(groups + 1)]
    each = [b - a for a, b in itertools.pairwise(ends)]
    return xp.stack(each * stacks)


def upper_factor(h: Any) -> Any:
    r"""Returns upper triangular $R$ with $H = R R^\top$: one factorisation of the reversed $H$."""
    xp = namespace(h)
    return contiguous(xp.flip(cholesky(xp.flip(h, axis=(-2, -1))), axis=(-2, -1)))


def least_squares(rows: Any, h: Any, keep: Any) -> Any:
    r"""Returns the weights of least error on the places that stay: $H_{KK} w_K = (H w)_K$.

    Args:
        rows: ``(n, outputs, columns)``.
        h: ``(n or 1, columns, columns)``.
        keep: ``(n, columns)``, the same for all outputs of a row.
    """
    xp = namespace(rows)
    index = iota(xp, h.shape[-1], h)
    eye = xp.astype(index[:, None] == index[None, :], xp.float32)[None]
    k = xp.astype(keep, xp.float32)[:, None]
    left = xp.matrix_transpose(k) * h * k + eye * (1 - k)
    # What stays is only added to, so that where nothing goes nothing is rounded.
    right = matmul(xp, rows * (1 - k), h) * k
    return rows * k + xp.matrix_transpose(xp.linalg.solve(left, xp.matrix_transpose(right)))


def share(counts: Any, start: Any, stop: Any, n: int) -> Any:
    """Returns how much of ``counts`` falls on [start, stop) of n, so that all parts add up."""

    def until(at: Any) -> Any:
        return counts // n * at + counts % n * at // n

    return until(stop) - until(start)
