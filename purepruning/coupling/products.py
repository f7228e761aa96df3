"""How atoms flow through contractions and convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from purepruning.coupling.atoms import Axis
from purepruning.coupling.flow import Flow
from purepruning.coupling.removed_values import UNKNOWN
from purepruning.coupling.value import (
    AtRemoved,
    Contraction,
    Value,
    as_line,
    is_free,
    is_zero,
    made_of_parameters,
    through_product,
    weights_of,
    zero_or_unknown,
)


def contract(
    flow: Flow,
    left: Value,
    right: Value,
    contracted: Sequence[tuple[int, int]],
    batch: Sequence[tuple[int, int]],
    where: Any,
) -> Value:
    """Returns the product of two arrays: batch axes first, then those of left, of right."""
    for a, b in contracted:
        flow.atoms.same(left.axes[a], right.axes[b], "contracted together")
        _check_contracted(flow, left, a, right, b)
    for a, b in batch:
        flow.atoms.same(left.axes[a], right.axes[b], "contracted together")
    _note_roles(flow, left, {a for a, _ in contracted}, {a for a, _ in batch}, right)
    _note_roles(flow, right, {b for _, b in contracted}, {b for _, b in batch}, left)
    if contracted and left.origins is None and right.origins is None:
        heads = [left.axes[a] for a, _ in batch if left.axes[a] is not None]
        if heads:
            used = {a for a, _ in batch}
            flow.heads += heads  # type: ignore[arg-type]
            flow.head_positions += [
                x for a, x in enumerate(left.axes) if x is not None and a not in used
            ]
            used = {b for _, b in batch}
            flow.head_positions += [
                x for b, x in enumerate(right.axes) if x is not None and b not in used
            ]
    free_left = [
        a for a in range(left.ndim) if a not in {x for p in (contracted, batch) for x, _ in p}
    ]
    free_right = [
        b for b in range(right.ndim) if b not in {y for p in (contracted, batch) for _, y in p}
    ]
    axes = [None if right.axes[b] is None else left.axes[a] for a, b in batch]
    at_removed: list[AtRemoved] = [
        0.0 if is_zero(left.at_removed[a]) or is_zero(right.at_removed[b]) else UNKNOWN
        for a, b in batch
    ]
    shape = [left.shape[a] for a, _ in batch]
    for value, free in ((left, free_left), (right, free_right)):
        axes += [value.axes[a] for a in free]
        at_removed += [through_product(value.at_removed[a]) for a in free]
        shape += [value.shape[a] for a in free]
    flow.contractions[where] = Contraction(
        (*shape, *(left.shape[a] for a, _ in contracted)),
        (*axes, *(left.axes[a] for a, _ in contracted)),
        weights_of(left, right),
    )
    return Value(
        tuple(shape),
        tuple(axes),
        tuple(at_removed),
        None,
        made_of_parameters(left, right, len(shape)),
    )


def _check_contracted(flow: Flow, left: Value, a: int, right: Value, b: int) -> None:
    x = flow.atoms.resolve(left.axes[a])
    if x is None or right.axes[b] is None:
        return
    n = len(x)
    one = np.broadcast_to(as_line(left.at_removed[a]), (n,))
    two = np.broadcast_to(as_line(right.at_removed[b]), (n,))
    _note_nonzero(flow, left, a, two)
    _note_nonzero(flow, right, b, one)
    lost = (one != 0.0) & (two != 0.0)
    if lost.any():
        flow.atoms.keep(x[lost], "contracted, and not zero where it is masked")


def _note_nonzero(flow: Flow, value: Value, axis: int, other: AtRemoved) -> None:
    """Notes where a parameter reads what is not zero once its makers are masked."""
    if value.origins is not None and not is_zero(other):
        flow.nonzero.update(value.origins[axis])


def _note_roles(
    flow: Flow, value: Value, contracted: set[int], batch: set[int], other: Value
) -> None:
    if value.origins is None:
        return
    for a, origin in enumerate(value.origins):
        if a in contracted:
            beside = {p for d, o in enumerate(value.origins) if d != a for p, _ in o}
            # The scale and the bias of a norm of parameters read nothing.
            flow.sinks.update(o for o in origin if other.origins is None or o[0] in beside)
        elif other.origins is None:  # what two parameters make is a parameter
            flow.sources.update(origin)


def convolve(
    flow: Flow,
    left: Value,
    right: Value,
    *,
    left_axes: tuple[int, int],
    right_axes: tuple[int, int],
    groups: int,
    shape: Sequence[Any],
    out_axes: tuple[int, int],
    where: Any,
    once: bool,
    transposed: bool = False,
) -> Value:
    """Returns a convolution. Taps and spatial axes cannot be pruned; channels couple by groups.

    With groups, the kernel's stored inputs belong to another group for every block of its
    outputs. Where the kernel is a parameter used nowhere else (``once``), each group loses
    inputs and outputs of its own, equally many in all groups; otherwise all groups lose the
    same positions, or whole groups go.

    Args:
        left, right: input and kernel.
        left_axes, out_axes: batch and channel axis of input and output.
        right_axes: output and input axis of the kernel.
        groups: number of groups.
        shape: shape of the output.
        where: what the front end calls the operation.
        once: whether this is the only use of the kernel.
        transposed: whether the kernel stores all inputs and the outputs of one group.
    """
    batch, feature = left_axes
    out, into = right_axes
    flow.keep(left, "a spatial axis", [a for a in range(left.ndim) if a not in left_axes])
    flow.keep(right, "taps of a kernel", [a for a in range(right.ndim) if a not in right_axes])
    _note_roles(flow, right, {into}, set(), left)
    for a, origin in enumerate(right.origins or ()):
        if a not in right_axes:
            flow.taps.update(origin)
    if groups == 1:
        flow.atoms.same(left.axes[feature], right.axes[into], "contracted together")
        _check_contracted(flow, left, feature, right, into)
        channels, per_group = right.axes[out], left.axes[feature]
        per_size = left.shape[feature]
    else:
        _note_nonzero(flow, right, into, left.at_removed[feature])
        channels, per_group, per_size = _grouped(
            flow, left, feature, right, out, into, groups, once, transposed
        )
    axes: list[Axis] = [None] * len(shape)
    at_removed: list[AtRemoved] = [UNKNOWN] * len(shape)
    axes[out_axes[0]], at_removed[out_axes[0]] = (
        left.axes[batch],
        zero_or_unknown(left.at_removed[batch]),
    )
    axes[out_axes[1]] = channels
    at_removed[out_axes[1]] = 0.0 if is_zero(right.at_removed[out]) else UNKNOWN
    taps = [right.shape[a] for a in range(right.ndim) if a not in right_axes]
    # Transposed convolutions multiply at every position of the input, others of the output.
    spatial = (
        [left.shape[a] for a in range(left.ndim) if a not in left_axes]
        if transposed
        else [n for d, n in enumerate(shape) if d not in out_axes]
    )
    sizes = (shape[out_axes[0]], *spatial, *taps, shape[out_axes[1]], per_size)
    flow.contractions[where] = Contraction(
        sizes,
        (axes[out_axes[0]], *(None,) * (len(spatial) + len(taps)), channels, per_group),
        weights_of(left, right),
    )
    return Value(tuple(shape), tuple(axes), tuple(at_removed))


def _grouped(
    flow: Flow,
    left: Value,
    feature: int,
    right: Value,
    out: int,
    into: int,
    groups: int,
    once: bool,
    transposed: bool,
) -> tuple[Axis, Axis, int]:
    """Couples the channels of a grouped convolution; returns those of its output."""
    atoms = flow.atoms
    # The kernel stores one of its sides per group: ``shared`` is that side, ``full`` the other.
    full, shared = (into, out) if transposed else (out, into)
    n_full, n_shared = right.shape[full] // groups, right.shape[shared]
    inputs = left.axes[feature]
    if transposed:
        outputs: Axis = atoms.fresh(groups * n_shared)
        atoms.same(inputs, right.axes[full], "contracted together")
        ends = (outputs, inputs)
    else:
        outputs = right.axes[full]
        ends = (inputs, outputs)
    n_in = n_full if transposed else n_shared
    if n_shared == 1 and n_full == 1:
        atoms.same(ends[0], right.axes[full], "a channel and its own kernel")
        if right.origins is not None:
            flow.depthwise.update(path for path, _ in right.origins[full])
        return right.axes[full], None, 1
    known = [atoms.resolve(x) for x in ends]
    direct = right.leaf is not None and once and n_shared > 1 and n_full > 1
    if direct and all(x is not None and is_free(x) for x in known):
        path, order = right.leaf  # type: ignore[misc]
        stored = known[0].reshape(groups, n_shared, 1)  # type: ignore[union-attr]
        flow.by_block[path, order[shared]] = (order[full], stored)
        atoms.keep(right.axes[shared], "stored per group")
        flow.equal_parts += [x.reshape(groups, -1) for x in known]  # type: ignore[union-attr]
        return outputs, stored[0], n_in
    first = atoms.split(ends[0], (groups, n_shared), "groups of a convolution")
    second = atoms.split(right.axes[full], (groups, n_full), "groups of a convolution")
    atoms.same(first[0], second[0], "groups of a convolution")
    atoms.same(first[1], right.axes[shared], "positions in a group")
    return outputs, first[1] if not transposed else second[1], n_in
