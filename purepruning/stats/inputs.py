"""Statistics of layer inputs: what the matrix of each layer is multiplied by, over a data set."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from purepruning.arguments import instance, some_of
from purepruning.arrays import (
    by_numpy,
    compiled,
    namespace,
    stop_gradient,
)
from purepruning.config.config import Config
from purepruning.layers import Layer, Layers
from purepruning.linear_algebra import matmul
from purepruning.matrices import form, input_axes, input_rows, mean_magnitudes
from purepruning.stats.accumulate import (
    CompensatedSum,
    WideCount,
    add,
    count,
    empty_total,
)
from purepruning.stats.checks import (
    captured,
    check_totals,
    match,
    refuse_non_finite,
    watched,
    weight_of,
)
from purepruning.stats.merging import merged
from purepruning.trees import flatten
from purepruning.types import Params

Kept = Literal["sums", "squares", "means", "grams"]


KEPT: tuple[Kept, ...] = ("sums", "squares", "means", "grams")

#: Rows that are multiplied at once. Within them a Gram matrix has the rounding of one product of
#: float32 matrices; what is added up over parts and batches has 47 bits.
ROWS = 8192


class InputStats(NamedTuple):
    r"""Totals over all inputs $x_t$ seen so far, by layer name.

    A layer's inputs are rows of ``columns`` numbers, one for each column of its matrix: the input
    channels of a linear layer; of a convolution those of every tap (im2col), tap by tap. Members
    are stacked layers, and the groups of a convolution (:mod:`purepruning.matrices`). What is not
    asked for is an empty dict, and takes no memory; :func:`memory` says how much the others take.

    Attributes:
        positions: rows seen: tokens, or output positions of a convolution.
        sums: $\sum_t x_t$, ``(members, columns)``.
        squares: $\sum_t x_t^2$, ``(members, columns)``.
        means: over examples, the squares of their mean magnitudes,
            $\sum_b (\frac{1}{T} \sum_t |x_{bt}|)^2$, ``(members, columns)``. Examples lie along the
            first axis of an input that holds neither stacked layers nor channels; means are over
            all other positions, and the same for all taps of a convolution.
        grams: $\sum_t x_t x_t^\top$, ``(members, columns, columns)``.
    """

    positions: dict[str, WideCount]
    sums: dict[str, CompensatedSum]
    squares: dict[str, CompensatedSum]
    means: dict[str, CompensatedSum]
    grams: dict[str, CompensatedSum]


def memory(layers: Config | Layers, *, keep: Iterable[Kept] = ("squares",)) -> dict[str, int]:
    """Returns by layer name how many bytes its statistics will take; nothing is made.

    Raises:
        ValueError: a layer multiplies its inputs by no matrix; ``keep`` names something else.

    >>> from purepruning import Layer
    >>> layer = Layer("fc", "Linear", "fc.w", (4096, 11008), out_axes=(1,), in_axes=(0,))
    >>> memory([layer]), memory([layer], keep=["grams"])
    ({'fc': 32776}, {'fc': 134217736})
    """
    kinds = some_of("inputs.memory: keep", keep, KEPT)
    shapes = {x.name: _shapes("inputs.memory", x) for x in watched("inputs.memory", layers)}
    return {
        name: 8 + sum(8 * math.prod(shape[kind]) for kind in kinds)
        for name, shape in shapes.items()
    }


def init(
    params: Params, layers: Config | Layers, *, keep: Iterable[Kept] = ("squares",)
) -> InputStats:
    """Returns the statistics of nothing, in the framework and on the devices of ``params``.

    Args:
        params: the model's parameters; only looked at for where they are.
        layers: the layers to watch: rows of the layer table, or a config, which stands for the
            layers that it prunes.
        keep: which totals are needed: ``"squares"`` for norms, ``"grams"`` for criteria that
            rebuild a layer's output, ``"sums"`` for means of channels, ``"means"`` for
            :func:`purepruning.minitron`.

    Raises:
        KeyError: a layer's weight is not in ``params``.
        ValueError: a layer multiplies its inputs by no matrix, or is a convolution whose window is
            not known; ``keep`` names something else.
    """
    where = "inputs.init"
    kinds = some_of(f"{where}: keep", keep, KEPT)
    leaves, table = flatten(params).leaves, watched(where, layers)
    shapes = {layer.name: _shapes(where, layer) for layer in table}
    weights = {layer.name: weight_of(where, "params", layer, leaves) for layer in table}

    def sums(kind: Kept) -> dict[str, CompensatedSum]:
        if kind not in kinds:
            return {}
        return {n: empty_total(CompensatedSum, x, shapes[n][kind]) for n, x in weights.items()}

    return InputStats({n: empty_total(WideCount, x) for n, x in weights.items()}, *map(sums, KEPT))


def update(stats: InputStats, inputs: Mapping[str, Any], layers: Config | Layers) -> InputStats:
    """Returns the statistics with one batch of inputs added.

    Runs under ``jit``, ``vmap`` and ``jax.lax.scan``. Products are of float32, at full precision;
    sums over parts of 8,192 rows and over batches are kept in two floats
    (:mod:`purepruning.stats.accumulate`), so that their error does not grow with the number of
    tokens: after a million, an entry of a Gram matrix is as good as the products of single parts.

    Args:
        stats: the statistics so far.
        inputs: the input of every watched layer, as an adapter's ``capture(..., of="inputs")``
            returns them; a list of inputs for a layer that is called several times. Others are
            ignored.
        layers: the layers to watch, as in :func:`init`.

    Raises:
        KeyError: a layer has no input, or no statistics.
        TypeError: an input is no array of floats.
        ValueError: an input has other channels than its layer; or, where values are known, a NaN or
            infinity. Under ``jit`` and ``vmap`` NaN goes into the totals, and into the scores made
            of them.

    >>> import jax.numpy as jnp
    >>> import purepruning as pp
    >>> params = {"fc.w": jnp.ones((2, 4))}
    >>> layer = pp.make_layer(params, "fc.w", "Linear", name="fc", out_axes=1, in_axes=0)
    >>> stats = init(params, [layer], keep=["squares", "grams"])
    >>> stats = update(stats, {"fc": jnp.array([[1.0, -2.0], [3.0, 1.0]])}, [layer])
    >>> stats.squares["fc"].high.tolist(), stats.grams["fc"].high.tolist()
    ([[10.0, 5.0]], [[[10.0, 1.0], [1.0, 5.0]]])
    """
    where = "inputs.update"
    table = watched(where, layers)
    instance(stats, InputStats, f"{where}: stats", "what inputs.init returned")
    check_totals(where, stats)
    instance(inputs, Mapping, f"{where}: inputs", "a mapping by layer name, as capture returns")
    shapes = {layer.name: _shapes(where, layer) for layer in table}
    keep = tuple(kind for kind in KEPT if getattr(stats, kind))
    for kind in keep:
        match(where, getattr(stats, kind), {name: s[kind] for name, s in shapes.items()})
    match(where, stats.positions, dict.fromkeys(shapes, ()))
    given = {layer.name: _inputs(where, layer, inputs, stats) for layer in table}
    refuse_non_finite(where, "the input", given)
    new = InputStats(*(dict(field) for field in stats))  # type: ignore[arg-type]
    for layer in table:
        old = {kind: getattr(stats, kind)[layer.name] for kind in keep}
        for x in map(stop_gradient, given[layer.name]):
            old, n = by_numpy(functools.partial(_added, layer), old, x)
            new.positions[layer.name] = count(new.positions[layer.name], n)
        for kind in keep:
            getattr(new, kind)[layer.name] = old[kind]
    return new


def merge(a: InputStats, b: InputStats) -> InputStats:
    """Returns the statistics of what both have seen.

    Exact for positions; associative and commutative for sums too, up to their 47 bits. Where each
    device or process has statistics of its own data, adding them leaf by leaf merges them all:
    ``jax.lax.psum(stats, axis)``, or ``torch.distributed.all_reduce`` of every tensor.

    Raises:
        ValueError: they keep different things, or are of different layers or shapes.
    """
    return merged("inputs", InputStats, a, b)


def _shapes(where: str, layer: Layer) -> dict[str, tuple[int, ...]]:
    f = form(where, layer)
    if layer.spatial_axes and layer.window is None:
        raise ValueError(
            f"{where}: layer {layer.name!r}: how its convolution moves over the input is not known "
            "(its padding may be other than zeros); give its row a window, "
            "dataclasses.replace(layer, window=purepruning.layers.Window(...)), or leave it out"
        )
    row = (f.members, f.columns)
    return {"sums": row, "squares": row, "means": row, "grams": (*row, f.columns)}


def _inputs(where: str, layer: Layer, inputs: Mapping[str, Any], stats: InputStats) -> list[Any]:
    """Returns the inputs of a layer, checked against what the table says of them."""
    arrays = captured(where, "input", layer, inputs, stats.positions[layer.name])
    where = f"{where}: the input of layer {layer.name!r}"
    wanted = [layer.shape[a] for a in layer.stack_axes]
    ins = [layer.shape[a] for a in layer.in_axes]
    ins[0] *= layer.groups
    for x in arrays:
        if not namespace(x).isdtype(x.dtype, "real floating"):
            raise TypeError(f"{where} must be floating, got {x.dtype}")
        least = len(wanted) + len(layer.spatial_axes) + len(ins)
        stack, spatial, channels = input_axes(layer, max(x.ndim, least))
        axes = (*stack, *channels)
        fits = x.ndim >= least and len({*axes, *spatial}) == least
        if not fits or [x.shape[a] for a in axes] != wanted + ins:
            raise ValueError(
                f"{where} has shape {tuple(x.shape)}, but by its layer table row axes {axes} are "
                f"of sizes {tuple(wanted + ins)}"
            )
    return arrays


def _added(layer: Layer, old: dict[str, CompensatedSum], x: Any) -> tuple[dict[str, Any], int]:
    """Returns the totals of a layer with one input added, and how many rows it has."""
    xp, n = namespace(x), 0
    x = xp.astype(x, xp.float32)
    of_rows = {kind: total for kind, total in old.items() if kind != "means"}
    for rows in input_rows(x, layer, ROWS):
        n += rows.shape[1]
        of_rows = compiled(rows, _with_rows)(of_rows, rows)
    if "means" in old:
        means = mean_magnitudes(x, layer)
        of_rows["means"] = add(old["means"], xp.sum(means * means, axis=1, dtype=xp.float32))
    return of_rows, n


def _with_rows(old: dict[str, CompensatedSum], rows: Any) -> dict[str, CompensatedSum]:
    xp = namespace(rows)
    new = {}
    for kind, total in old.items():
        if kind == "grams":
            term = matmul(xp, xp.matrix_transpose(rows), rows)
        else:
            term = xp.sum(rows if kind == "sums" else rows * rows, axis=1, dtype=xp.float32)
        new[kind] = add(total, term)
    return new
