"""How atoms flow through products and convolutions."""

from __future__ import annotations

from purepruning.coupling import products, reductions, shapes
from purepruning.coupling.value import Value
from purepruning.jaxpr.program import Op
from purepruning.jaxpr.rules.shapes import shape_of
from purepruning.jaxpr.walk import Rule, Walk


# Products.
def _dot_general(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    (left, right), (batch_left, batch_right) = op.params["dimension_numbers"]
    pairs = list(zip(left, right, strict=True))
    batch = list(zip(batch_left, batch_right, strict=True))
    return [products.contract(state.flow, xs[0], xs[1], pairs, batch, state.where)]


def _convolution(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    if op.params["batch_group_count"] != 1:
        return None
    numbers = op.params["dimension_numbers"]
    left, right, out = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
    once = xs[1].leaf is not None and state.uses.get(xs[1].leaf[0], 0) == 1 and state.depth == 0
    return [
        products.convolve(
            state.flow,
            xs[0],
            xs[1],
            left_axes=(left[0], left[1]),
            right_axes=(right[0], right[1]),
            groups=op.params["feature_group_count"],
            shape=shape_of(state, op),
            out_axes=(out[0], out[1]),
            where=state.where,
            once=once,
        )
    ]


def _ragged_dot(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    """Rows of the left, each with the matrix of its group: ``(m, k), (g, k, n) -> (m, n)``."""
    numbers = op.params["ragged_dot_dimension_numbers"]
    (left, right), (batch_left, batch_right) = numbers.dot_dimension_numbers
    groups, ragged = numbers.rhs_group_dimensions, numbers.lhs_ragged_dimensions
    if len(groups) != 1 or any(a in (*left, *batch_left) for a in ragged):
        return None
    state.flow.keep(xs[1], "a group of a ragged product", groups)
    state.flow.keep(xs[2], "sizes of groups")
    rest = [a for a in range(xs[1].ndim) if a not in groups]
    one = shapes.select_axes(state.flow, xs[1], rest)
    pairs = [(a, rest.index(b)) for a, b in zip(left, right, strict=True)]
    batch = [(a, rest.index(b)) for a, b in zip(batch_left, batch_right, strict=True)]
    return [products.contract(state.flow, xs[0], one, pairs, batch, state.where)]


def _triangular_solve(state: Walk, op: Op, xs: list[Value]) -> list[Value] | None:
    """Solved along one axis of the right-hand sides, alike for every position of the other."""
    state.flow.keep(xs[0], "a matrix that is solved with")
    axis = xs[1].ndim - (2 if op.params["left_side"] else 1)
    return [reductions.along_whole(state.flow, xs[1], [axis], xs[1].shape, "a system of equations")]


RULES: dict[str, Rule] = {
    "ragged_dot_general": _ragged_dot,
    "triangular_solve": _triangular_solve,
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
}
