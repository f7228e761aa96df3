"""A layer's weight as the matrices that its inputs are multiplied by, and its inputs as their rows.

A linear layer computes $y = W x$. The members of a layer are the layers stacked in it and the
groups of a convolution, one behind the other; each has its own matrix, ``(out, columns)``. Columns
are input positions: the taps of a kernel in their order, and for every tap the input channels of
the group, so that channels that follow each other are neighbours.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from purepruning.arrays import namespace
from purepruning.layers import Layer


class Form(NamedTuple):
    """How a weight is taken apart into matrices; all of it is known from the layer table.

    Attributes:
        members, out, columns: sizes of the matrices.
        split: the weight's shape with its groups on an axis of their own.
        order: its axes as stacks, groups, outputs, taps, inputs.
        shape: the weight's shape.
    """

    members: int
    out: int
    columns: int
    split: tuple[int, ...]
    order: tuple[int, ...]
    shape: tuple[int, ...]


def has_matrix(layer: Layer) -> bool:
    """Whether a layer multiplies its input by a matrix, or by one for each group."""
    plain = layer.type == "Linear" or layer.type in ("Conv1d", "Conv2d", "Conv3d")
    return plain and bool(layer.out_axes) and bool(layer.in_axes)


def form(where: str, layer: Layer) -> Form:
    """Returns how the weight of a layer is taken apart.

    Raises:
        ValueError: the layer multiplies its input by no matrix, or is a transposed convolution, in
            which every input meets every tap.
    """
    if not has_matrix(layer):
        raise ValueError(
            f"{where}: layer {layer.name!r} of type {layer.type!r} is no linear layer or "
            "convolution, so its inputs are not those of one matrix; leave it out of the rules"
        )
    return _form(layer)


@functools.lru_cache(maxsize=4096)
def _form(layer: Layer) -> Form:
    split, out = list(layer.shape), list(layer.out_axes)
    axes = {a: [a] for a in range(len(split))}
    if layer.groups > 1:  # the outputs of a group are neighbours
        lead = out[0]
        split[lead : lead + 1] = [layer.groups, split[lead] // layer.groups]
        axes = {a: [a] if a < lead else [a + 1] for a in axes}
        axes[lead] = [lead, lead + 1]
    groups = [axes[out[0]][0]] if layer.groups > 1 else []
    outs = [axes[out[0]][-1], *(axes[a][0] for a in out[1:])]
    stacks, taps, ins = (
        [axes[a][0] for a in some] for some in (layer.stack_axes, layer.spatial_axes, layer.in_axes)
    )

    def size(some: list[int]) -> int:
        return math.prod(split[a] for a in some)

    return Form(
        members=size(stacks + groups),
        out=size(outs),
        columns=size(taps + ins),
        split=tuple(split),
        order=(*stacks, *groups, *outs, *taps, *ins),
        shape=layer.shape,
    )


def as_matrices(x: Any, f: Form) -> Any:
    """Returns ``(..., *shape)``, of the weight's shape, as ``(..., members, out, columns)``."""
    xp, more = namespace(x), tuple(x.shape[: x.ndim - len(f.shape)])
    order = (*range(len(more)), *(len(more) + a for a in f.order))
    moved = xp.permute_dims(xp.reshape(x, (*more, *f.split)), order)
    return xp.reshape(moved, (*more, f.members, f.out, f.columns))


def in_blocks(x: Any, f: Form, size: int) -> Any:
    """Returns ``(..., *shape)``, of the weight's shape, as ``(..., members, blocks, size)``.

    The matrices are read row by row; the last block is filled up with zeros.
    """
    xp, n = namespace(x), f.out * f.columns
    rows = as_matrices(x, f)
    flat = xp.reshape(rows, (*rows.shape[:-2], n))
    if n % size:
        fill = xp.broadcast_to(xp.zeros_like(flat[..., :1]), (*flat.shape[:-1], -n % size))
        flat = xp.concat([flat, fill], axis=-1)
    return xp.reshape(flat, (*flat.shape[:-1], -1, size))


def from_matrices(x: Any, f: Form) -> Any:
    """Returns ``(members, out, columns)`` as an array of the weight's shape."""
    xp = namespace(x)
    moved = xp.reshape(x, tuple(f.split[a] for a in f.order))
    back = tuple(f.order.index(a) for a in range(len(f.order)))
    return xp.reshape(xp.permute_dims(moved, back), f.shape)


def input_axes(layer: Layer, ndim: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Returns which axes of an input hold stacked layers, spatial positions and input channels.

    As in the output: behind the batch, channels last or before the spatial axes.
    """
    n_stack, n_taps, n_in = (
        len(axes) for axes in (layer.stack_axes, layer.spatial_axes, layer.in_axes)
    )
    stack = tuple(a % ndim for a in (layer.output_axes or ())[:n_stack]) or tuple(range(n_stack))
    if layer.type == "Linear":
        return stack, (), tuple(range(ndim - n_in, ndim))
    first = bool(layer.output_axes) and (layer.output_axes or ())[-1] in (-1 - n_taps, 1)
    spatial = range(ndim - n_taps, ndim) if first else range(ndim - n_taps - 1, ndim - 1)
    return stack, tuple(spatial), (ndim - n_taps - 1,) if first else (ndim - 1,)


def input_rows(x: Any, layer: Layer, most: int) -> Iterator[Any]:
    """Yields the inputs as rows of what the matrices are multiplied by, ``(members, n, columns)``.

    Those of a convolution (im2col) are made for so many examples at a time that no part has more
    than ``most`` rows.
    """
    x, sizes = _by_example(x, layer)
    x = namespace(x).reshape(x, (x.shape[0], -1, *x.shape[3:]))
    n = x.shape[1]
    out = _out_sizes(layer, sizes)
    step = max(1, most // math.prod(out))
    for begin in range(0, n, step):
        part = x[:, begin : begin + step]
        rows = _patches(part, layer) if sizes else part[:, :, None]
        yield _by_group(rows, layer.groups)


def mean_magnitudes(x: Any, layer: Layer) -> Any:
    """Returns the mean magnitude of every input of each example, ``(members, n, columns)``.

    Means are over all positions of an example; those of a convolution are the same for all taps.
    """
    xp = namespace(x)
    x, _ = _by_example(xp.abs(x), layer)
    means = xp.mean(x, axis=tuple(range(2, x.ndim - 1)))[:, :, None]
    taps = math.prod(layer.shape[a] for a in layer.spatial_axes)
    means = xp.broadcast_to(means, (*means.shape[:2], taps, means.shape[3]))
    return _by_group(means, layer.groups)


def _by_example(x: Any, layer: Layer) -> tuple[Any, tuple[int, ...]]:
    """Returns ``(stacks, examples, positions, *spatial, channels)``, and the spatial sizes.

    Examples lie along the first axis that holds neither stacked layers nor channels.
    """
    xp = namespace(x)
    stack, spatial, channels = input_axes(layer, x.ndim)
    batch = tuple(a for a in range(x.ndim) if a not in (*stack, *spatial, *channels))
    x = xp.permute_dims(x, (*stack, *batch, *spatial, *channels))
    n_stack = math.prod(x.shape[: len(stack)])
    examples, *rest = x.shape[len(stack) : len(stack) + len(batch)] or (1,)
    sizes = tuple(x.shape[x.ndim - len(channels) - len(spatial) : x.ndim - len(channels)])
    width = math.prod(x.shape[x.ndim - len(channels) :])
    return xp.reshape(x, (n_stack, examples, math.prod(rest), *sizes, width)), sizes


def _by_group(rows: Any, groups: int) -> Any:
    """Returns ``(stacks, n, taps, channels)`` as ``(stacks * groups, n, taps * in)``."""
    xp = namespace(rows)
    stacks, n, taps, channels = rows.shape
    split = xp.reshape(rows, (stacks, n, taps, groups, channels // groups))
    moved = xp.permute_dims(split, (0, 3, 1, 2, 4))
    return xp.reshape(moved, (stacks * groups, n, taps * (channels // groups)))


def _out_sizes(layer: Layer, sizes: tuple[int, ...]) -> tuple[int, ...]:
    window = layer.window
    if window is None:
        return (1,) * len(sizes)
    taps = tuple(layer.shape[a] for a in layer.spatial_axes)
    return tuple(
        max(0, (n + sum(pad) - apart * (k - 1) - 1) // stride + 1)
        for n, k, pad, stride, apart in zip(
            sizes, taps, window.pads(sizes, taps), window.strides, window.dilation, strict=True
        )
    )


def _patches(x: Any, layer: Layer) -> Any:
    """Returns what every output position sees, ``(stacks, n * positions, taps, channels)``."""
    xp, window = namespace(x), layer.window
    assert window is not None
    sizes = tuple(x.shape[2:-1])
    taps = tuple(layer.shape[a] for a in layer.spatial_axes)
    out = _out_sizes(layer, sizes)
    for axis, (low, high) in enumerate(window.pads(sizes, taps), start=2):
        for n, front in ((low, True), (high, False)):
            fill = list(x.shape)
            fill[axis] = n
            zeros = xp.zeros_like(x[(slice(None),) * axis + (slice(0, 1),)])
            zeros = xp.broadcast_to(zeros, tuple(fill))
            x = xp.concat([zeros, x] if front else [x, zeros], axis=axis) if n else x
    seen = []
    for tap in itertools.product(*map(range, taps)):
        at: list[slice] = [slice(None), slice(None)]
        for i, n, stride, apart in zip(tap, out, window.strides, window.dilation, strict=True):
            at.append(slice(i * apart, i * apart + (n - 1) * stride + 1, stride))
        seen.append(x[tuple(at)])
    rows = xp.stack(seen, axis=-2)
    return xp.reshape(rows, (x.shape[0], x.shape[1] * math.prod(out), len(seen), x.shape[-1]))
