"""How atoms flow through products and convolutions."""

from __future__ import annotations

from purepruning.coupling import products
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


RULES: dict[str, Rule] = {
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
}
