"""How atoms flow through reductions, running sums and windows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from purepruning.coupling import reductions
from purepruning.coupling.value import Value
from purepruning.jaxpr.program import Op
from purepruning.jaxpr.rules.shapes import same, shape_of
from purepruning.jaxpr.walk import Rule, Walk


# Reductions.
def _reduce_sum(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    return [reductions.reduce_sum(state.flow, xs[0], op.params["axes"], state.where)]


def _reduce_whole(what: str) -> Callable[..., list[Value] | None]:
    def rule(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
        return [reductions.reduce_whole(state.flow, x, op.params["axes"], what) for x in xs]

    return rule


def _extreme(what: str, sign: int) -> Callable[..., list[Value] | None]:
    def rule(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
        axes = op.params["axes"]
        return [reductions.reduce_extreme(state.flow, xs[0], axes, what, sign)]

    return rule


def _running_sum(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    return [reductions.running_sum(state.flow, xs[0], op.params["axis"], state.where)]


def _along(what: str, key: str) -> Callable[..., list[Value] | None]:
    def rule(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
        if len(xs) > 1:
            joint = state.flow.unify(xs)
            xs = [dataclasses.replace(x, axes=joint.axes) for x in xs]
        shapes = [state.program.avals[n].shape for n in op.outputs]
        axis = op.params.get(key, -1) % max(xs[0].ndim, 1)
        source = xs if len(xs) == len(shapes) else [xs[0]] * len(shapes)
        # Sums of exponentials of zeros are logarithms, and the indices of zeros are 0, 1, 2, ...
        return [
            reductions.along_whole(
                state.flow,
                x,
                [axis],
                s,
                what,
                op.name != "cumlogsumexp" and (op.name != "top_k" or i == 0),
            )
            for i, (x, s) in enumerate(zip(source, shapes, strict=True))
        ]

    return rule


def _fft(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    n = len(op.params["fft_lengths"])
    axes = range(xs[0].ndim - n, xs[0].ndim)
    return [
        reductions.along_whole(state.flow, xs[0], axes, shape_of(state, op), "a Fourier transform")
    ]


def _window(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    any_function = op.name == "reduce_window"  # of an operand and where it starts from
    if len(xs) > 1 + any_function:
        return None
    sizes = op.params["window_dimensions"]
    strides = op.params["window_strides"]
    axes = [
        a
        for a, n in enumerate(sizes)
        if n != 1 or strides[a] != 1 or not same(xs[0].shape[a], shape_of(state, op)[a])
    ]
    shape = shape_of(state, op)
    return [reductions.along_whole(state.flow, xs[0], axes, shape, "a window", not any_function)]


RULES: dict[str, Rule] = {
    "reduce_sum": _reduce_sum,
    "reduce_max": _extreme("a maximum over it", 1),
    "reduce_min": _extreme("a minimum over it", -1),
    "reduce_prod": _reduce_whole("a product over it"),
    "reduce_and": _reduce_whole("all over it"),
    "reduce_or": _reduce_whole("any over it"),
    "reduce_xor": _reduce_whole("xor over it"),
    "argmax": _reduce_whole("an argmax over it"),
    "argmin": _reduce_whole("an argmin over it"),
    "cumsum": _running_sum,
    "cumprod": _along("a running product", "axis"),
    "cummax": _along("a running maximum", "axis"),
    "cummin": _along("a running minimum", "axis"),
    "cumlogsumexp": _along("a running sum of exponentials", "axis"),
    "sort": _along("a sort", "dimension"),
    "top_k": _along("a sort", "axis"),
    "fft": _fft,
    "reduce_window_max": _window,
    "reduce_window_min": _window,
    "reduce_window_sum": _window,
    "reduce_window": _window,
}
