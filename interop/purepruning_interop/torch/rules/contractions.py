"""How atoms flow through products, convolutions and attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from purepruning.coupling import products, reductions, shapes
from purepruning.coupling.value import Value
from purepruning_interop.torch.program import Op
from purepruning_interop.torch.rules.elementwise import along_channel
from purepruning_interop.torch.rules.norms import optional, rest, shifted
from purepruning_interop.torch.rules.reductions import unknown
from purepruning_interop.torch.walk import Walk, rules_of


def _linear(s: Walk, op: Op) -> list[Value] | None:
    x, weight = s.value(op.args["input"]), s.value(op.args["weight"])
    found = products.contract(s.flow, x, weight, [(x.ndim - 1, weight.ndim - 1)], [], s.where())
    return [shifted(s, found, op.args["bias"])]


def _matmul(s: Walk, op: Op) -> list[Value] | None:
    left, right = (s.value(v) for v in op.tensors)
    return [_product(s, left, right, s.where())]


def _product(s: Walk, left: Value, right: Value, where: Any) -> Value:
    """Returns a matrix product with numpy's rules for leading axes."""
    flow = s.flow
    row, column = left.ndim == 1, right.ndim == 1
    if row:
        left = shapes.select_axes(flow, left, [None, 0])
    if column:
        right = shapes.select_axes(flow, right, [0, None])
    if left.ndim > 2 and right.ndim == 2:
        found = products.contract(flow, left, right, [(left.ndim - 1, 0)], [], where)
    else:
        lead = list(np.broadcast_shapes(*(_sizes(v.shape[:-2]) for v in (left, right))))
        lead = [_true_size(d, (left, right), len(lead)) for d in range(len(lead))]
        left, right = (_led(s, v, lead) for v in (left, right))
        n = len(lead)
        batch = [(d, d) for d in range(n)]
        found = products.contract(flow, left, right, [(n + 1, n)], batch, where)
    drop = [found.ndim - 2] * row + [found.ndim - 1] * column
    return shapes.squeeze(flow, found, drop) if drop else found


def _sizes(shape: Sequence[Any]) -> tuple[int, ...]:
    return tuple(n if isinstance(n, int) else 2 for n in shape)


def _true_size(d: int, values: Sequence[Value], n: int) -> Any:
    for v in values:
        a = d - n + v.ndim - 2
        if a >= 0 and not (isinstance(v.shape[a], int) and v.shape[a] == 1):
            return v.shape[a]
    return 1


def _led(s: Walk, value: Value, lead: Sequence[Any]) -> Value:
    shape = (*lead, *value.shape[-2:])
    if len(shape) == value.ndim and all(
        a is b or a == b for a, b in zip(shape, value.shape, strict=True)
    ):
        return value
    return shapes.broadcast(s.flow, value, shape, range(len(shape) - value.ndim, len(shape)))


def _addmm(s: Walk, op: Op) -> list[Value] | None:
    keys = {"addmm": ("mat1", "mat2"), "addmv": ("mat", "vec"), "baddbmm": ("batch1", "batch2")}
    left, right = (s.value(op.args[k]) for k in keys[op.name])
    found = _product(s, left, right, s.where())
    bias = s.value(op.args["self"])
    beta = op.args.get("beta", 1)
    if isinstance(beta, (int, float)) and beta == 0:
        return [found]
    return [s.flow.elementwise("add", [found, bias], found.shape)]


def _grouped_product(s: Walk, op: Op) -> list[Value] | None:
    """Rows, sorted by expert, times the matrix of their expert: all experts are cut alike."""
    rows, experts = (s.value(v) for v in op.tensors[:2])
    if rows.ndim != 2 or experts.ndim != 3:
        return None
    s.flow.keep(experts, "experts, of which the rows choose", [0])
    one = shapes.part(s.flow, experts, 0, 0, 1, 1)
    one = shapes.squeeze(s.flow, one, [0])
    found = products.contract(s.flow, rows, one, [(1, 0)], [], s.where())
    bias = op.args.get("bias")
    if bias is None:
        return [found]
    shift = shapes.squeeze(s.flow, shapes.part(s.flow, s.value(bias), 0, 0, 1, 1), [0])
    return [s.flow.elementwise("add", [found, shift], found.shape)]


def _outer(s: Walk, op: Op) -> list[Value] | None:
    left, right = (s.value(v) for v in op.tensors)
    one, other = (
        shapes.select_axes(s.flow, left, [0, None]),
        shapes.select_axes(s.flow, right, [None, 0]),
    )
    return [s.flow.elementwise("mul", [one, other], s.shape(op))]


def _bilinear(s: Walk, op: Op) -> list[Value] | None:
    one, other, weight = (s.value(op.args[k]) for k in ("input1", "input2", "weight"))
    found = products.contract(s.flow, one, weight, [(one.ndim - 1, 1)], [], s.where("first"))
    lead = [(d, d) for d in range(one.ndim - 1)]
    found = products.contract(
        s.flow, found, other, [(found.ndim - 1, other.ndim - 1)], lead, s.where()
    )
    return [shifted(s, found, op.args["bias"])]


def _einsum(s: Walk, op: Op) -> list[Value] | None:
    equation, tensors = op.args["equation"].replace(" ", ""), op.args["tensors"]
    values = [s.value(t) for t in tensors]
    inputs, _, output = equation.partition("->")
    terms = inputs.split(",")
    rank = max(
        (v.ndim - len(t.replace("...", "")) for t, v in zip(terms, values, strict=True)), default=0
    )
    dots = [chr(0x3B1 + i) for i in range(rank)]

    def labels(term: str, ndim: int) -> str:
        own = ndim - len(term.replace("...", ""))
        return term.replace("...", "".join(dots[rank - own :]))

    names = [labels(t, v.ndim) for t, v in zip(terms, values, strict=True)]
    if "->" in equation:
        result = output.replace("...", "".join(dots))
    else:
        joined = "".join(names)
        result = "".join(dots) + "".join(
            sorted(c for c in set(joined) - set(dots) if joined.count(c) == 1)
        )
    if any(len(set(t)) != len(t) for t in names):
        return None
    for i, (value, term) in enumerate(zip(values, names, strict=True)):
        others = "".join(names[:i] + names[i + 1 :]) + result
        alone = [a for a, c in enumerate(term) if c not in others]
        if alone:
            values[i] = reductions.reduce_sum(s.flow, value, alone, s.where(f"sum {i}"))
            names[i] = "".join(c for c in term if c in others)
    found, order = values[0], names[0]
    for i, (value, term) in enumerate(zip(values[1:], names[1:], strict=True), 1):
        later = "".join(names[i + 1 :]) + result
        shared = [c for c in order if c in term]
        pairs = [(order.index(c), term.index(c)) for c in shared]
        if any(found.shape[a] != value.shape[b] for a, b in pairs):
            return None
        found = products.contract(
            s.flow,
            found,
            value,
            [p for p, c in zip(pairs, shared, strict=True) if c not in later],
            [p for p, c in zip(pairs, shared, strict=True) if c in later],
            s.where(str(i) if i > 1 else ""),
        )
        stay = [c for c in shared if c in later]
        order = "".join(stay) + "".join(c for t in (order, term) for c in t if c not in shared)
    return [shapes.transpose(s.flow, found, [order.index(c) for c in result])]


def _attention(s: Walk, op: Op) -> list[Value] | None:
    query, key, value = (s.value(op.args[k]) for k in ("query", "key", "value"))
    flow = s.flow
    if op.args.get("enable_gqa") and query.ndim >= 3 and query.shape[-3] != key.shape[-3]:
        times = query.shape[-3] // key.shape[-3]
        key, value = (_repeated(s, v, times) for v in (key, value))
    turned = shapes.transpose(flow, key, [*range(key.ndim - 2), key.ndim - 1, key.ndim - 2])
    scores = _product(s, query, turned, s.where("scores"))
    mask = op.args.get("attn_mask")
    if mask is not None:
        scores = flow.elementwise("add_mask", [scores, s.value(mask)], scores.shape)
    flow.keep(scores, "a softmax over it", [scores.ndim - 1])
    flow.keep(scores, "attention by position", [scores.ndim - 2] if op.args["is_causal"] else [])
    shares = unknown(
        reductions.along_whole(flow, scores, [scores.ndim - 1], scores.shape, "a softmax over it")
    )
    return rest(s, op, _product(s, shares, value, s.where("values")))


def _repeated(s: Walk, value: Value, times: int) -> Value:
    """Returns key or value heads, each as often as query heads share it."""
    axis = value.ndim - 3
    if value.axes[axis] is None:
        return shapes.resized(s.flow, value, axis, value.shape[axis] * times)
    shape = list(value.shape)
    shape.insert(axis + 1, times)
    dims = [d for d in range(len(shape)) if d != axis + 1]
    spread = shapes.broadcast(s.flow, value, shape, dims)
    del shape[axis + 1]
    shape[axis] = value.shape[axis] * times
    return shapes.reshape(s.flow, spread, shape)


def _convolution(s: Walk, op: Op) -> list[Value] | None:
    x, weight = s.value(op.args["input"]), s.value(op.args["weight"])
    rank = weight.ndim - 2
    transposed = "transpose" in op.name or bool(op.args.get("transposed", False))
    alone = x.ndim == rank + 1  # without a batch
    if alone:
        x = shapes.select_axes(s.flow, x, [None, *range(x.ndim)])
    shape = (1, *s.shape(op)) if alone else s.shape(op)
    once = weight.leaf is not None and s.uses.get(weight.leaf[0], 0) == 1
    found = products.convolve(
        s.flow,
        x,
        weight,
        left_axes=(0, 1),
        right_axes=(1, 0) if transposed else (0, 1),
        groups=op.args["groups"],
        shape=shape,
        out_axes=(0, 1),
        where=s.where(),
        once=once,
        transposed=transposed,
    )
    bias = optional(s, op.args["bias"])
    if bias is not None:
        bias = along_channel(s, bias, found.ndim, 1)
        found = s.flow.elementwise("add", [found, bias], found.shape)
    return [shapes.squeeze(s.flow, found, [0]) if alone else found]


RULES = rules_of(
    (_linear, "linear"),
    (_matmul, "matmul mm bmm mv dot inner"),
    (_addmm, "addmm addmv baddbmm"),
    (_grouped_product, "_grouped_mm grouped_mm_fallback"),
    (_outer, "outer ger"),
    (_bilinear, "bilinear"),
    (_einsum, "einsum"),
    (_attention, "scaled_dot_product_attention"),
    (
        _convolution,
        "convolution conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d",
    ),
)
