"""What modules have to know once units are removed: sizes, divisors, tables."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch

from purepruning.coupling.removal import Removal
from purepruning_interop.torch.couple import Analysis
from purepruning_interop.torch.program import Op
from purepruning_interop.torch.rules.shapes import slice_of
from purepruning_interop.torch.rules.sources import SOURCES


class Uses(NamedTuple):
    """What of a program its modules have to know, by the name of the module.

    Attributes:
        means: over how many positions it takes a mean, before and after, where that changes.
        sizes: the numbers that it calls operations with, and what they become.
        groups: how many groups a group norm has left.
        channels: how many channels go into a convolution of groups, or come out where it is
            transposed.
        tables: tensors that are in no state dict, and what is left of them.
    """

    means: Mapping[str, tuple[int, int]]
    sizes: Mapping[str, Mapping[int, set[int]]]
    groups: Mapping[str, int]
    channels: Mapping[str, int]
    tables: list[tuple[torch.Tensor, torch.Tensor]]


def uses_of(found: Analysis, removed: np.ndarray) -> Uses:
    """Returns what modules have to know once units are removed.

    Args:
        found: the program and its values.
        removed: boolean by unit number.
    """
    removal = Removal(found.flow, removed[found.numbers], "original")
    ops = found.program.ops
    means, groups = {}, {}
    for (index, _), mean in found.flow.means.items():
        after = math.prod(removal.sizes(mean.lengths, mean.axes))
        if after != mean.size:
            means[ops[index].scope] = mean.size, after
    for index, split in found.parts.items():
        if ops[index].name == "group_norm":
            groups[ops[index].scope] = removal.shape(split)[1]
    channels = {}
    for op in ops:
        if op.name in CONVOLUTIONS and op.args["groups"] > 1:
            transposed = "transpose" in op.name or op.args.get("transposed", False)
            result = op.outputs[0]
            assert result is not None
            number = result if transposed else op.args["input"].number
            channels[op.scope] = removal.shape(found.values[number])[1]
    sizes: dict[str, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    for op in ops:
        for before, after in _sizes(found, removal, op):
            if isinstance(before, int) and isinstance(after, int) and before > 1:
                sizes[op.scope][before].add(after)
    return Uses(means, sizes, groups, channels, list(_tables(found, removal)))


def _sizes(found: Analysis, removal: Removal, op: Op) -> Iterator[tuple[object, object]]:
    """Yields the sizes that an operation is called with, and what they become."""
    number = next((n for n in op.outputs if n is not None), None)
    if number is None or op.symbol is not None:
        return
    shape = removal.shape(found.values[number])
    if op.name in _SHAPED or op.name in SOURCES:
        given = op.args.get("size", op.args.get("shape"))
        if isinstance(given, (list, tuple)) and len(given) == len(shape):
            yield from zip(given, shape, strict=True)
    elif op.name == "unflatten":
        given = op.args["sizes"]
        start = op.args["dim"] % (len(shape) - len(given) + 1)
        yield from zip(given, shape[start : start + len(given)], strict=True)
    elif op.name in ("split", "split_with_sizes"):
        axis = op.args["dim"] % len(shape)
        given = op.args.get("split_size", op.args.get("split_sizes"))
        parts = [removal.shape(found.values[n])[axis] for n in op.outputs if n is not None]
        yield from zip(given if isinstance(given, list) else [given], parts, strict=False)
    elif op.name == "slice":
        source = found.values[op.args["self"].number]
        axis = op.args["dim"] % source.ndim
        kept = removal.kept(source.axes[axis])
        ends = [op.args.get("start"), op.args.get("end")]
        n = source.shape[axis]
        if kept is not None and all(x is None or isinstance(x, int) for x in ends):
            start, _ = slice_of(op, n)
            yield start, int((kept < start).sum())
            end = ends[1]
            if end is not None and 0 < end < n:
                yield end, int((kept < end).sum())


CONVOLUTIONS = frozenset(
    f"{name}{rank}d" for name in ("conv", "conv_transpose") for rank in (1, 2, 3)
) | {"convolution"}


_SHAPED = frozenset(["view", "reshape", "_unsafe_view", "expand", "view_copy", "expand_copy"])


def _tables(found: Analysis, removal: Removal) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for number, tensor in found.program.constants.items():
        small = tensor
        for a, axis in enumerate(found.values[number].axes):
            if (kept := removal.kept(axis)) is not None:
                small = small.index_select(a, torch.as_tensor(kept, device=tensor.device))
        if small is not tensor:
            yield tensor, small
