"""What all statistics check, before any of it is changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

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
from purepruning.stats.accumulate import CompensatedSum, Totals, WideCount


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


def refuse_others(
    where: str,
    a: Totals,
    b: Totals,
) -> None:
    """Raises unless ``a`` and ``b`` are of the same layers and shapes."""
    for name in [*a, *b]:
        if name not in a or name not in b:
            raise ValueError(f"{where}: only one of the statistics has layer {name!r}")
        one, other = tuple(a[name].high.shape), tuple(b[name].high.shape)
        if one != other:
            raise ValueError(
                f"{where}: statistics of layer {name!r} have shapes {one} and {other}; are they "
                "of two models?"
            )


def refuse_non_finite(where: str, what: str, arrays: Mapping[str, Iterable[Any]]) -> None:
    """Raises if an array is NaN or infinite somewhere, where values are known."""
    bad = [name for name, some in arrays.items() if not all(map(is_finite, some))]
    if bad:
        raise ValueError(
            f"{where}: {what} of layer {', '.join(map(repr, bad))} is NaN or infinite; the "
            "statistics are unchanged"
        )


def refuse_empty(where: str, seen: Mapping[str, WideCount]) -> None:
    """Raises if nothing was counted for some layer, where values are known."""
    for name, total in seen.items():
        if is_concrete(total.high) and not int(total.high) and not int(total.low):
            raise ValueError(
                f"{where}: statistics of layer {name!r} are empty: nothing was added by update"
            )
