"""How atoms flow through operators that rearrange channels and windows."""

from __future__ import annotations

import dataclasses
import math

from purepruning.coupling import reductions, shapes
from purepruning.coupling.removed_values import UNKNOWN
from purepruning.coupling.value import Value
from purepruning_interop.torch.program import Op
from purepruning_interop.torch.rules.elementwise import number
from purepruning_interop.torch.rules.shapes import zero
from purepruning_interop.torch.walk import Walk, rules_of


def _unfold(s: Walk, op: Op) -> list[Value] | None:
    value, shape = s.value(op.args["self"]), s.shape(op)
    axis = op.args["dimension"] % max(value.ndim, 1)
    s.flow.keep(value, "a window", [axis])
    order: list[int | None] = [a if a != axis else None for a in range(value.ndim)]
    found = shapes.select_axes(s.flow, value, [*order, None])
    at_removed = tuple(0.0 if zero(d) else UNKNOWN for d in found.at_removed)
    return [dataclasses.replace(found, shape=shape, at_removed=at_removed, leaf=None, summed=None)]


def _complex(s: Walk, op: Op) -> list[Value] | None:
    """Pairs of real numbers as complex ones, or the other way round."""
    value = s.value(op.args["self"])
    if op.name == "view_as_complex":
        s.flow.keep(value, "two parts of a number", [value.ndim - 1])
        found = shapes.select_axes(s.flow, value, range(value.ndim - 1))
    else:
        found = shapes.select_axes(s.flow, value, [*range(value.ndim), None])
    at_removed = tuple(0.0 if zero(d) else UNKNOWN for d in found.at_removed)
    return [dataclasses.replace(found, shape=s.shape(op), at_removed=at_removed, summed=None)]


def _fourier(s: Walk, op: Op) -> list[Value] | None:
    """Transformed axes stay; along others every position is transformed by itself."""
    value = s.value(op.args["self"])
    axes = [a % value.ndim for a in op.args["dim"]]
    s.flow.keep(value, "mixed by a Fourier transform", axes)
    order = [None if a in axes else a for a in range(value.ndim)]
    found = shapes.select_axes(s.flow, value, order)
    at_removed = tuple(0.0 if zero(d) else UNKNOWN for d in found.at_removed)
    return [
        dataclasses.replace(
            found, shape=s.shape(op), at_removed=at_removed, leaf=None, summed=None, origins=None
        )
    ]


def _im2col(s: Walk, op: Op) -> list[Value] | None:
    """Every channel becomes as many neighbouring ones as its window has positions."""
    value, shape = s.value(op.args["self"]), s.shape(op)
    taps = math.prod(op.args["kernel_size"])
    channel = value.ndim - 3
    s.flow.keep(value, "a window", [channel + 1, channel + 2])
    order: list[int | None] = [*range(channel + 1), None, None]
    found = shapes.select_axes(s.flow, value, order)
    at_removed = tuple(0.0 if zero(d) else UNKNOWN for d in found.at_removed)
    lead = value.shape[: channel + 1]
    found = dataclasses.replace(
        found, shape=(*lead, taps, shape[-1]), at_removed=at_removed, summed=None
    )
    return [shapes.reshape(s.flow, found, shape)]


def _col2im(s: Walk, op: Op) -> list[Value] | None:
    value, shape = s.value(op.args["self"]), s.shape(op)
    taps = math.prod(op.args["kernel_size"])
    channel = value.ndim - 2
    s.flow.keep(value, "a window", [channel + 1])
    lead = value.shape[:channel]
    split = shapes.reshape(
        s.flow, value, (*lead, value.shape[channel] // taps, taps, value.shape[channel + 1])
    )
    s.flow.keep(split, "a window", [channel + 1])
    found = shapes.select_axes(s.flow, split, [*range(channel + 1), None, None])
    at_removed = tuple(0.0 if zero(d) else UNKNOWN for d in found.at_removed)
    return [dataclasses.replace(found, shape=shape, at_removed=at_removed, summed=None)]


def _pixel_shuffle(s: Walk, op: Op) -> list[Value] | None:
    value, shape = s.value(op.args["self"]), s.shape(op)
    *lead, channels, height, width = value.shape
    n = len(lead)
    if op.name == "pixel_shuffle":
        r = op.args["upscale_factor"]
        split = shapes.reshape(s.flow, value, (*lead, channels // r**2, r, r, height, width))
        s.flow.keep(split, "positions of a pixel", range(n + 1, n + 5))
        order = [*range(n), n, n + 3, n + 1, n + 4, n + 2]
    else:
        r = op.args["downscale_factor"]
        s.flow.keep(value, "a spatial axis", [n + 1, n + 2])
        split = shapes.reshape(s.flow, value, (*lead, channels, height // r, r, width // r, r))
        order = [*range(n), n, n + 2, n + 4, n + 1, n + 3]
    return [shapes.reshape(s.flow, shapes.transpose(s.flow, split, order), shape)]


def _channel_shuffle(s: Walk, op: Op) -> list[Value] | None:
    value, groups = s.value(op.args["self"]), op.args["groups"]
    n, channels, *spatial = value.shape
    split = shapes.reshape(s.flow, value, (n, groups, channels // groups, *spatial))
    s.parts[s.index] = split
    turned = shapes.transpose(s.flow, split, [0, 2, 1, *range(3, split.ndim)])
    return [shapes.reshape(s.flow, turned, value.shape)]


def _glu(s: Walk, op: Op) -> list[Value] | None:
    value = s.value(op.args["self"])
    axis = op.args.get("dim", -1) % value.ndim
    n = value.shape[axis] // 2
    one, other = (shapes.part(s.flow, value, axis, i * n, n) for i in range(2))
    gate = number(s, lambda x: 0.5 + 0.5 * math.tanh(x / 2), other, "sigmoid")
    return [s.flow.elementwise("mul", [one, gate], s.shape(op))]


def _grid_sample(s: Walk, op: Op) -> list[Value] | None:
    value, grid = s.value(op.args["input"]), s.value(op.args["grid"])
    s.flow.atoms.same(value.axes[0], grid.axes[0])  # a grid for each image, or each head
    s.flow.keep(grid, "coordinates", range(1, grid.ndim))
    return [
        reductions.along_whole(
            s.flow, value, range(2, value.ndim), s.shape(op), "sampled at coordinates"
        )
    ]


RULES = rules_of(
    (_fourier, "_fft_r2c _fft_c2r _fft_c2c fft_r2c fft_c2r fft_c2c"),
    (_unfold, "unfold"),
    (_complex, "view_as_complex view_as_real"),
    (_im2col, "im2col"),
    (_col2im, "col2im"),
    (_pixel_shuffle, "pixel_shuffle pixel_unshuffle"),
    (_channel_shuffle, "channel_shuffle native_channel_shuffle"),
    (_glu, "glu"),
    (_grid_sample, "grid_sampler grid_sampler_2d grid_sampler_3d"),
)
