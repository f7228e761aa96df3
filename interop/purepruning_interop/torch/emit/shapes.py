"""Operators that move positions, with smaller sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from purepruning_interop.torch.emit.emitter import Emitter
from purepruning_interop.torch.emit.graph_module import OpenSize, aten
from purepruning_interop.torch.program import Op, Var
from purepruning_interop.torch.rules.indexing import index_axes, known_places
from purepruning_interop.torch.rules.shapes import pad_widths, roll_shifts, scatter_places, slice_of


# Operations that hold sizes. Each returns a node, a list of nodes, or None for as it is.
def _sized(e: Emitter, op: Op, given: Sequence[Any] | None, spare: bool) -> list[Any]:
    """Returns the sizes of a result; ``given`` are those the program was written with."""
    number = op.outputs[0]
    assert number is not None
    found: list[Any] = []
    for d, n in enumerate(e.shape(number)):
        if not e.open(number, d):
            found.append(n)
        elif e.s.kept(e.values[number].axes[d]) is not None:
            found.append(-1)
        elif given is not None:
            found.append(e.small(given[d]))
        else:
            found.append(-1)
    if found.count(-1) > spare:
        raise OpenSize
    return found


def _reshape(e: Emitter, op: Op) -> Any:
    if op.name == "flatten" or op.name == "ravel":
        return None
    source = e.small(op.tensors[0])
    if op.name == "unflatten":
        number = op.outputs[0]
        assert number is not None
        dim = op.args["dim"] % e.value(op.tensors[0]).ndim
        sizes = [
            n if not e.open(number, dim + i) else -1
            for i, n in enumerate(e.shape(number)[dim : dim + len(op.args["sizes"])])
        ]
        return e.as_is(op, sizes=sizes)
    given = op.args.get("size", op.args.get("shape"))
    return e.call(aten.reshape.default, source, _sized(e, op, given, True))


def _expand(e: Emitter, op: Op) -> Any:
    number = op.outputs[0]
    assert number is not None
    given = op.args.get("size")
    other = op.args.get("other")
    sizes = []
    for d, n in enumerate(e.shape(number)):
        if not e.open(number, d):
            sizes.append(n)
        elif given is not None:
            sizes.append(e.small(given[d]))
        else:
            sizes.append(e.call(aten.sym_size.int, e.small(other), d))
        if e.open(number, d) and e.s.kept(e.values[number].axes[d]) is not None:
            raise OpenSize
    return e.call(aten.expand.default, e.small(op.args["self"]), sizes)


def _copy(e: Emitter, op: Op) -> Any:
    number = op.outputs[0]
    assert number is not None
    source, into = op.args["src"], op.args["self"]
    node = e.small(source)
    if e.program.avals[source.number].dtype != e.program.avals[number].dtype:
        node = e.call(aten._to_copy.default, node, dtype=e.program.avals[number].dtype)
    sizes = [
        e.call(aten.sym_size.int, e.small(into), d) if e.open(number, d) else n
        for d, n in enumerate(e.shape(number))
    ]
    return e.call(aten.expand.default, node, sizes)


def _squeeze(e: Emitter, op: Op) -> Any:
    """Squeezes what had size 1, not what has it now."""
    value = e.value(op.args["self"])
    dims = op.args.get("dim")
    dims = range(value.ndim) if dims is None else [dims] if isinstance(dims, int) else dims
    axes = [d % value.ndim for d in dims if value.shape[d % value.ndim] == 1]
    return e.call(aten.squeeze.dims, e.small(op.args["self"]), axes)


def _slice(e: Emitter, op: Op) -> Any:
    source, number = op.args["self"], op.outputs[0]
    assert number is not None
    value, out = e.value(source), e.values[number]
    axis = op.args.get("dim", 0) % value.ndim
    if e.s.kept(value.axes[axis]) is None and e.s.kept(out.axes[axis]) is None:
        return None
    if value.shape[axis] == out.shape[axis] and value.axes[axis] is out.axes[axis]:
        return e.small(source)
    e.closed(source.number, axis)
    if op.name == "narrow":
        start, step = op.args["start"] % value.shape[axis], 1
    else:
        start, step = slice_of(op, value.shape[axis])
    places = start + step * np.arange(out.shape[axis])
    return e.pick(
        e.small(source), value.axes[axis], out.axes[axis], places, axis, value.shape[axis]
    )


def _split(e: Emitter, op: Op) -> Any:
    source = op.tensors[0]
    axis = op.args.get("dim", 0) % e.value(source).ndim
    if e.s.kept(e.value(source).axes[axis]) is None:
        return None
    e.closed(source.number, axis)
    sizes = [e.shape(n)[axis] for n in op.outputs if n is not None]
    return e.call(aten.split_with_sizes.default, e.small(source), sizes, axis)


def _slice_scatter(e: Emitter, op: Op) -> Any:
    into, source, number = op.args["self"], op.args["src"], op.outputs[0]
    assert number is not None
    value, other, out = e.value(into), e.value(source), e.values[number]
    axis = op.args.get("dim", 0) % value.ndim
    node, other_axes, other_size = e.small(source), list(other.axes), None
    if op.name == "select_scatter":
        node = e.call(aten.unsqueeze.default, node, axis)
        other_axes.insert(axis, None)
        other_size = 1
    else:
        other_size = other.shape[axis]
    n = value.shape[axis]
    places = scatter_places(op, n, other_size)
    assert places is not None
    if (places >= n).all():
        return e.pick(node, other_axes[axis], out.axes[axis], places - n, axis, other_size)
    if all(e.s.kept(x) is None for x in (value.axes[axis], other_axes[axis], out.axes[axis])):
        return None
    e.closed(into.number, axis)
    left, right = e.s.kept(value.axes[axis]), e.s.kept(other_axes[axis])
    left = np.arange(n) if left is None else left
    right = n + (np.arange(other_size) if right is None else right)
    there = np.concatenate([left, right])
    chosen = e.s.kept(out.axes[axis])
    places = places if chosen is None else places[chosen]
    joined = e.call(aten.cat.default, [e.small(into), node], axis)
    return e.by_index(joined, np.searchsorted(there, places), axis, len(there))


def _pad(e: Emitter, op: Op) -> Any:
    source, number = op.args["self"], op.outputs[0]
    assert number is not None
    value, out = e.value(source), e.values[number]
    node = e.small(source)
    pairs = []
    changed = False
    for axis, low, high in pad_widths(op, value.ndim):
        kept, chosen = e.s.kept(value.axes[axis]), e.s.kept(out.axes[axis])
        if kept is None and chosen is None:
            pairs.append((e.small(low), e.small(high)))
            continue
        e.closed(source.number, axis)
        changed = True
        n = value.shape[axis]
        left = np.arange(n) if kept is None else kept
        inner = left[(left >= max(-low, 0)) & (left < n - max(-high, 0))]
        node = e.by_index(node, np.searchsorted(left, inner), axis, len(left))
        before, total = max(low, 0), out.shape[axis]
        chosen = np.arange(total) if chosen is None else chosen
        behind = total - max(high, 0)
        pairs.append((int((chosen < before).sum()), int((chosen >= behind).sum())))
    if not changed:
        return None
    value_of = op.args.get("value")
    fill = 0 if value_of is None else value_of
    flat = [n for pair in pairs for n in pair]
    return e.call(aten.constant_pad_nd.default, node, flat, fill)


def _roll(e: Emitter, op: Op) -> Any:
    source, number = op.args["self"], op.outputs[0]
    assert number is not None
    value, out = e.value(source), e.values[number]
    node, rest = e.small(source), []
    shifts = roll_shifts(op, value.shape)
    assert shifts is not None
    for axis, by in shifts:
        if e.s.kept(value.axes[axis]) is None:
            rest.append((axis, e.small(by)))
            continue
        e.closed(source.number, axis)
        places = np.roll(np.arange(value.shape[axis]), by)
        node = e.pick(node, value.axes[axis], out.axes[axis], places, axis, value.shape[axis])
    if rest:
        node = e.call(aten.roll.default, node, [by for _, by in rest], [a for a, _ in rest])
    return node


def _repeat_interleave(e: Emitter, op: Op) -> Any:
    return e.as_is(op, output_size=None) if "output_size" in op.args else None


def _index(e: Emitter, op: Op) -> Any:
    source, number = op.args["self"], op.outputs[0]
    assert number is not None
    value, out = e.value(source), e.values[number]
    if op.name == "index_select":
        axis, index = op.args["dim"] % value.ndim, op.args["index"]
    else:
        axes = index_axes(op)
        if len(axes) != 1:
            return None
        axis, index = axes[0], op.args["indices"][axes[0]]
    if e.s.kept(value.axes[axis]) is None:
        return None
    e.closed(source.number, axis)
    places = known_places(e.found.folded.get(index.number), value.shape[axis])
    assert places is not None
    return e.pick(
        e.small(source), value.axes[axis], out.axes[axis], places, axis, value.shape[axis]
    )


def _channel_shuffle(e: Emitter, op: Op) -> Any:
    x, split = op.args["self"], e.found.parts[e.index]
    groups, positions = e.s.kept(split.axes[1]), e.s.kept(split.axes[2])
    count = split.shape[1] if groups is None else len(groups)
    each = split.shape[2] if positions is None else len(positions)
    sizes = e.sizes(x.number)
    node = e.call(aten.reshape.default, e.small(x), [sizes[0], count, each, *sizes[2:]])
    node = e.call(aten.transpose.int, node, 1, 2)
    return e.call(aten.reshape.default, node, [sizes[0], count * each, *sizes[2:]])


def source(e: Emitter, op: Op) -> Any:
    """Makes a tensor of the new sizes, or makes the full one and cuts it."""
    number = op.outputs[0]
    assert number is not None
    value = e.values[number]
    if not e.s.touched(value) and not op.name.endswith("_like"):
        return None
    if "size" in op.args:
        sizes = [
            e.small(given) if e.open(number, d) else n
            for d, (given, n) in enumerate(zip(op.args["size"], e.shape(number), strict=True))
        ]
        if any(e.open(number, d) and e.s.kept(a) is not None for d, a in enumerate(value.axes)):
            raise OpenSize
        return e.as_is(op, size=sizes)
    if op.name.endswith("_like"):
        like = op.args["self"]
        sizes = [
            e.call(aten.sym_size.int, e.small(like), d) if e.open(number, d) else n
            for d, n in enumerate(e.shape(number))
        ]
        aval = e.program.avals[number]
        fill = {"zeros_like": 0, "ones_like": 1, "empty_like": 0}.get(op.name)
        fill = op.args["fill_value"] if fill is None else fill
        return e.call(aten.new_full.default, e.small(like), sizes, e.small(fill), dtype=aval.dtype)
    node = e.as_is(op)
    for a, axis in enumerate(value.axes):
        kept = e.s.kept(axis)
        if kept is not None:
            e.closed(number, a)
            node = e.by_index(node, kept, a, value.shape[a])
    return node


def _fill(e: Emitter, op: Op) -> Any:
    number, into = op.outputs[0], op.args["self"]
    assert number is not None
    sizes = [
        e.call(aten.sym_size.int, e.small(into), d) if e.open(number, d) else n
        for d, n in enumerate(e.shape(number))
    ]
    value = op.args.get("value", 0)
    if isinstance(value, Var):
        return e.call(aten.expand.default, e.small(value), sizes)
    return e.call(aten.new_full.default, e.small(into), sizes, value)
