"""What all statistics check, before any of it is changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from purepruning.arguments import instance, is_finite, missing, shown
from purepruning.arrays import (
    array_like,
    has_values,
    is_array,
    is_concrete,
    is_torch,
)
from purepruning.config.config import Config
from purepruning.layers import Layer, Layers, checked_table
from purepruning.shards import box_of, is_sharded, local, reduced
from purepruning.stats.accumulate import CompensatedSum, Totals, WideCount
from purepruning.trees import flatten


def watched(where: str, layers: Config | Layers) -> tuple[Layer, ...]:
    """Returns the rows that ``layers`` stands for; a config stands for those that it prunes.

    Raises:
        TypeError: it is neither a config nor rows of a layer table.
    """
    if isinstance(layers, Config):
        return layers.layers
    return checked_table(layers, f"{where}: layers")


def check_totals(where: str, stats: Any) -> None:
    """Raises unless every field of statistics is made of totals: arrays of numbers by layer name.

    Raises:
        TypeError: something else is found in one.
    """
    for field, totals in stats._asdict().items():
        single = "dict" not in str(type(stats).__annotations__[field])
        if not single:
            instance(totals, Mapping, f"{where}: statistics: {field}", "a dict by layer name")
        named = {"": totals} if single else totals
        for name, total in named.items():
            what = f"{where}: statistics: {field}" + (f" of layer {name!r}" if name else "")
            counts = "WideCount" in str(type(stats).__annotations__[field])
            wanted = WideCount if counts else CompensatedSum
            instance(total, wanted, what, f"a total of stats.accumulate ({wanted.__name__})")
            if not all(is_array(x) and has_values(x) for x in total):
                raise TypeError(f"{what} must hold arrays, got {', '.join(map(shown, total))}")
            if tuple(total.high.shape) != tuple(total.low.shape):
                shapes = [tuple(x.shape) for x in total]
                raise ValueError(f"{what} has parts of different shapes, {shapes}")


def match(
    where: str,
    totals: Totals,
    wanted: Mapping[str, Sequence[int]],
) -> None:
    """Raises unless there is a total for each wanted layer, in its shape."""
    for name, shape in wanted.items():
        if name not in totals:
            raise KeyError(missing(f"{where}: statistics have no layer {name!r}", name, totals))
        got = tuple(getattr(totals[name].high, "shape", ()))
        if got != tuple(shape):
            raise ValueError(
                f"{where}: statistics of layer {name!r} have shape {got}, but the layer needs "
                f"{tuple(shape)}; are they of another model, or of another granularity?"
            )


def placed(where: str, name: str, total: Any, like: Any) -> Any:
    """Returns a layer's total with its arrays where ``like`` is; NumPy arrays become tensors.

    Raises:
        TypeError: the total is of torch, and ``like`` is not.
    """
    if any(map(is_torch, total)) and not is_torch(like):
        raise TypeError(
            f"{where}: statistics of layer {name!r} are torch tensors, but its weight is "
            f"{type(like).__name__}"
        )
    return type(total)(*(array_like(like, x) for x in total))


def weight_of(where: str, what: str, layer: Layer, leaves: Mapping[str, Any]) -> Any:
    """Returns the leaf of a layer's weight; ``what`` says what the leaves are.

    Raises:
        KeyError: there is none.
        TypeError: it is no array.
        ValueError: it has another shape than in the layer table.
    """
    where = f"{where}: layer {layer.name!r}"
    if layer.weight not in leaves:
        raise KeyError(missing(f"{where}: {what} have no {layer.weight!r}", layer.weight, leaves))
    x = leaves[layer.weight]
    if not is_array(x):
        raise TypeError(f"{where}: {layer.weight!r} must be an array in {what}, got {shown(x)}")
    if tuple(x.shape) != layer.shape:
        raise ValueError(
            f"{where}: {layer.weight!r} has shape {tuple(x.shape)} in {what}, but {layer.shape} in "
            "the layer table"
        )
    return x


def gradient_leaves(grads: Any) -> dict[str, Any]:
    """Returns gradients by path; in torch, those that are not None."""
    if isinstance(grads, Mapping) and any(map(is_torch, grads.values())):
        grads = {name: grad for name, grad in grads.items() if grad is not None}
    return flatten(grads).leaves


def captured(
    where: str, what: str, layer: Layer, given: Mapping[str, Any], total: WideCount
) -> list[Any]:
    """Returns what was captured of a layer, its inputs or outputs, of which ``total`` is to count.

    Raises:
        KeyError: nothing was.
        TypeError: one is no array with values, or of another framework than the total.
    """
    if layer.name not in given:
        message = f"{where}: no {what} of layer {layer.name!r}; the forward pass may not reach it"
        raise KeyError(missing(message, layer.name, given))
    found = given[layer.name]
    arrays = found if isinstance(found, list) else [found]
    where = f"{where}: the {what} of layer {layer.name!r}"
    for x in arrays:
        if not (is_array(x) and has_values(x)):
            raise TypeError(f"{where} must be an array, got {shown(x)}")
        if is_torch(x) != is_torch(total.high):
            raise TypeError(
                f"{where} and its statistics are of two frameworks, JAX and torch; make them by "
                "init of the parameters that the model runs with"
            )
    return arrays


def refuse_non_finite(where: str, what: str, arrays: Mapping[str, Iterable[Any]]) -> None:
    """Raises if an array is NaN or infinite somewhere, where values are known."""
    flags = {name: [_is_finite(x) for x in some] for name, some in arrays.items()}
    sharded = {name: box_of(x) for name, some in arrays.items() for x in some if is_sharded(x)}
    wrong = [np.asarray([not all(flags[name])], np.int32) for name in sharded]
    found = zip(sharded, reduced(list(sharded.values()), wrong), strict=True)
    flags |= {name: [not count[0]] for name, count in found}
    bad = [name for name, some in flags.items() if not all(some)]
    if bad:
        raise ValueError(
            f"{where}: {what} of layer {', '.join(map(repr, bad))} is NaN or infinite; the "
            "statistics are unchanged"
        )


def _is_finite(x: Any) -> bool:
    """Whether an array, or of a DTensor what this process has of it, is finite."""
    mine = local(x)
    return 0 in mine.shape or is_finite(mine)


def refuse_empty(where: str, seen: Mapping[str, WideCount]) -> None:
    """Raises if nothing was counted for some layer, where values are known."""
    for name, total in seen.items():
        if is_concrete(total.high) and not int(total.high) and not int(total.low):
            raise ValueError(
                f"{where}: statistics of layer {name!r} are empty: nothing was added by update"
            )
