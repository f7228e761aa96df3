"""Operations of a jaxpr with smaller sizes, one function for each primitive that holds a size."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from purepruning.coupling.atoms import Axis
from purepruning.coupling.removal import Removal
from purepruning.coupling.value import Value
from purepruning.jaxpr.constants import concrete
from purepruning.jaxpr.derivatives import custom_jvp, custom_vjp
from purepruning.jaxpr.internals import scan_sizes
from purepruning.jaxpr.interpret import Emit, Run, take
from purepruning.jaxpr.primitives import SOURCES
from purepruning.jaxpr.program import Op, Program, derivative, is_floating
from purepruning.jaxpr.rules.indexing import SCATTERS, changed_axis, known_start, written_places
from purepruning.jaxpr.rules.table import RULES
from purepruning.jaxpr.walk import Trace, walk


# Operations that hold sizes.
def _broadcast(r: Run, op: Op, arrays: Any, operands: Any, results: Any) -> Any:
    return r.bind(op, arrays, {**op.params, "shape": r.s.shape(results[0])})


def _reshape(r: Run, op: Op, arrays: Any, operands: Any, results: Any) -> Any:
    return r.bind(op, arrays, {**op.params, "new_sizes": r.s.shape(results[0])})


def _slice(r: Run, op: Op, arrays: Any, operands: Any, results: Any) -> Any:
    array, value, out = arrays[0], operands[0], results[0]
    strides = op.params["strides"] or (1,) * value.ndim
    for a, (start, step) in enumerate(zip(op.params["start_indices"], strides, strict=True)):
        if value.shape[a] is out.shape[a] or value.shape[a] == out.shape[a]:
            continue
        array = _pick(r, array, value.axes[a], out.axes[a], out.shape[a], start, step, a)
    return array


def _pick(
    r: Run, array: Any, old: Axis, new: Axis, size: Any, start: int, step: int, axis: int
) -> Any:
    """Returns the part of an axis that starts at ``start``, of what is left of it."""
    kept = r.s.kept(old)
    if isinstance(size, int) and size == 0:
        return jax.lax.slice_in_dim(array, 0, 0, axis=axis)
    if kept is None:
        return jax.lax.slice_in_dim(array, start, start + (size - 1) * step + 1, step, axis)
    places = start + step * np.arange(size)
    chosen = r.s.kept(new)
    places = places if chosen is None else places[chosen]
    return _by_index(array, np.searchsorted(kept, places), axis)


def _by_index(array: Any, index: np.ndarray, axis: int) -> Any:
    """Returns positions of an axis: as a slice where they are evenly spaced."""
    steps = np.diff(index)
    if len(index) and (not len(steps) or (steps[0] > 0 and (steps == steps[0]).all())):
        step = int(steps[0]) if len(steps) else 1
        return jax.lax.slice_in_dim(array, int(index[0]), int(index[-1]) + 1, step, axis)
    return take(array, index, axis)


def _split(r: Run, op: Op, arrays: Any, operands: Any, results: Any) -> Any:
    axis = op.params["axis"]
    sizes = tuple(r.s.shape(v)[axis] for v in results)
    return r.bind(op, arrays, {**op.params, "sizes": sizes})


def _tile(r: Run, op: Op, arrays: Any, operands: Any, results: Any) -> Any:
    array, value, out = arrays[0], operands[0], results[0]
    for a, times in enumerate(op.params["reps"]):
        if times == 1:
            continue
        kept = r.s.kept(value.axes[a])
        chosen = r.s.kept(out.axes[a])
        if kept is None and chosen is None:
            reps = [1] * value.ndim
            reps[a] = times
            array = jnp.tile(array, reps)
            continue
        places = np.tile(np.arange(value.shape[a]), times)
        places = places if chosen is None else places[chosen]
        where = places if kept is None else np.searchsorted(kept, places)
        array = take(array, where, a)
    return array


def _pad(r: Run, op: Op, arrays: Any, operands: Any, results: Any) -> Any:
    value, out = operands[0], results[0]
    config = []
    array = arrays[0]
    for a, (low, high, inside) in enumerate(op.params["padding_config"]):
        kept, chosen = r.s.kept(value.axes[a]), r.s.kept(out.axes[a])
        if kept is None and chosen is None:
            config.append((low, high, inside))
            continue
        n = value.shape[a]
        if low < 0 or high < 0:
            start, size = max(-low, 0), n - max(-low, 0) - max(-high, 0)
            inner = np.arange(start, start + size)
            left = np.arange(n) if kept is None else kept
            stays = np.intersect1d(inner, left)
            array = _by_index(array, np.searchsorted(left, stays), a)
        before, total = max(low, 0), out.shape[a]
        chosen = np.arange(total) if chosen is None else chosen
        behind = total - max(high, 0)
        config.append((int((chosen < before).sum()), int((chosen >= behind).sum()), 0))
    return r.bind(op, [array, arrays[1]], {**op.params, "padding_config": tuple(config)})


def _convolution(r: Run, op: Op, arrays: Any, operands: Any, results: Any) -> Any:
    groups = op.params["feature_group_count"]
    if groups > 1:
        numbers = op.params["dimension_numbers"]
        inputs = arrays[0].shape[numbers.lhs_spec[1]]
        groups = inputs // arrays[1].shape[numbers.rhs_spec[1]]
    return r.bind(op, arrays, {**op.params, "feature_group_count": groups})


def _gather(r: Run, op: Op, arrays: Any, operands: Any, results: Any) -> Any:
    value, n = operands[0], op.params["dimension_numbers"]
    for a in n.collapsed_slice_dims:
        if value.axes[a] is not None and r.s.kept(value.axes[a]) is not None:
            return _gather_known(r, op, arrays, operands, results, a)
    small = r.s.shape(value)
    sizes = tuple(
        small[a] if k == value.shape[a] and a not in n.collapsed_slice_dims else k
        for a, k in enumerate(op.params["slice_sizes"])
    )
    return r.bind(op, arrays, {**op.params, "slice_sizes": sizes})


def _gather_known(r: Run, op: Op, arrays: Any, operands: Any, results: Any, axis: int) -> Any:
    """Returns positions that are known numbers, of what is left of their axis."""
    n, value, out = op.params["dimension_numbers"], operands[0], results[0]
    known = concrete(r.program, op.inputs[1])
    assert known is not None
    places = known[..., 0]
    batch = next(d for d in range(out.ndim) if d not in n.offset_dims)
    chosen = r.s.kept(out.axes[batch])
    places = places if chosen is None else places[chosen]
    kept = r.s.kept(value.axes[axis])
    assert kept is not None
    array = take(arrays[0], np.searchsorted(kept, places), axis)
    return jnp.moveaxis(array, axis, batch)


def _dynamic_slice(r: Run, op: Op, arrays: Any, operands: Any, results: Any) -> Any:
    value, out, array = operands[0], results[0], arrays[0]
    starts = list(arrays[1:])
    for a in range(value.ndim):
        if value.shape[a] == out.shape[a]:
            continue
        if r.s.kept(value.axes[a]) is not None:
            start = concrete(r.program, op.inputs[1 + a])
            assert start is not None
            first = int(np.clip(start, 0, value.shape[a] - out.shape[a]))
            array = _pick(r, array, value.axes[a], out.axes[a], out.shape[a], first, 1, a)
            starts[a] = jnp.zeros_like(starts[a])
    return r.bind(op, [array, *starts], {**op.params, "slice_sizes": r.s.shape(out)})


def _scatter(r: Run, op: Op, arrays: Any, operands: Any, results: Any) -> Any:
    value, updates = operands[0], operands[2]
    places = written_places(r.program, op, value, updates)
    if places is None:
        changed = changed_axis(r.program, op, value, updates)
        kept = None if changed is None else r.s.kept(value.axes[changed[0]])
        if kept is not None:  # what is written to stays, in another place
            arrays = [
                arrays[0],
                jnp.searchsorted(kept, arrays[1]).astype(arrays[1].dtype),
                arrays[2],
            ]
        return r.bind(op, arrays, op.params)
    axis, along, taken = places
    rest = [a for a in range(updates.ndim) if a not in along]
    moved = jnp.transpose(arrays[2], [*rest[:axis], *along, *rest[axis:]])
    shape = list(arrays[0].shape)
    shape[axis] = -1
    both = jnp.concatenate([arrays[0], jnp.reshape(moved, shape)], axis)
    # Where the positions of value and updates that stay lie in the two together.
    updated = [r.s.kept(updates.axes[a]) for a in along]
    kept = r.s.kept(value.axes[axis])
    left = np.ones(value.shape[axis], bool)
    if kept is not None:
        left = np.isin(np.arange(value.shape[axis]), kept)
    grid = np.ones([updates.shape[a] for a in along], bool)
    for i, positions in enumerate(updated):
        if positions is not None:
            line = np.isin(np.arange(grid.shape[i]), positions)
            grid &= np.moveaxis(line.reshape(-1, *(1,) * (grid.ndim - 1)), 0, i)
    new = np.cumsum(np.concatenate([left, grid.reshape(-1)])) - 1
    chosen = r.s.kept(results[0].axes[axis])
    return take(both, new[taken if chosen is None else taken[chosen]], axis)


def _dynamic_update_slice(r: Run, op: Op, arrays: Any, operands: Any, results: Any) -> Any:
    value, update = operands[:2]
    partial = [a for a in range(value.ndim) if value.shape[a] != update.shape[a]]
    if len(partial) == 1 and r.s.kept(results[0].axes[partial[0]]) is not None:
        axis = partial[0]
        start = known_start(r.program, op, axis, value, update)
        assert start is not None
        stop = start + update.shape[axis]
        kept = r.s.kept(value.axes[axis])
        kept = np.arange(value.shape[axis]) if kept is None else kept
        before, behind = int((kept < start).sum()), int((kept < stop).sum())
        front = jax.lax.slice_in_dim(arrays[0], 0, before, axis=axis)
        back = jax.lax.slice_in_dim(arrays[0], behind, len(kept), axis=axis)
        return jnp.concatenate([front, arrays[1], back], axis)
    return r.bind(op, arrays, op.params)


def _reduce_sum(r: Run, op: Op, arrays: Any, operands: Any, results: Any) -> Any:
    total = r.bind(op, arrays, op.params)[0]
    where = (r.trace.number, r.index)
    if r.s.norms != "original" or where not in r.s.flow.statistics:
        return total
    value = operands[0]
    for a in op.params["axes"]:
        kept = r.s.kept(value.axes[a])
        if kept is None or bool((np.asarray(value.at_removed[a]) == 0.0).all()):
            continue
        gone = value.shape[a] - len(kept)
        masked = r.masked(op.inputs[0], a)
        shape = list(r.s.shape(value))
        shape[a] = gone
        total = total + r.bind(op, [jnp.broadcast_to(masked, shape)], op.params)[0]
    return total


# Programs inside programs.
def _inner(r: Run, program: int, copy: int = 0) -> Callable[..., list[Any]]:
    op = r.program.ops[r.index]
    trace = r.trace.inner[r.index][program][copy]
    return lambda *args: r.run(op.inner[program], trace, args)


def _remat(r: Run, op: Op, arrays: Any, operands: Any, results: Any) -> Any:
    body = jax.checkpoint(
        _inner(r, 0), policy=op.params.get("policy"), prevent_cse=op.params["prevent_cse"]
    )
    return body(*arrays)


def _custom(r: Run, op: Op, arrays: Any, operands: Any, results: Any) -> Any:
    body = _inner(r, 0)
    if len(op.inner) > 1:
        rule = _inner(r, 1)
    elif op.name == "custom_jvp_call":
        rule = _derivative(r, op, operands)
    else:
        return body(*arrays)
    floating = [
        [i for i, n in enumerate(numbers) if is_floating(r.program.avals[n])]
        for numbers in (op.inputs, op.outputs)
    ]
    make = custom_jvp if op.name == "custom_jvp_call" else custom_vjp
    return make(body, rule, *floating)(*arrays)


def _derivative(r: Run, op: Op, operands: Sequence[Value]) -> Callable[..., list[Any]]:
    """Returns the derivative of a function that works element by element, on smaller arrays.

    Its program was not walked through with the rest: it moves nothing from one place to another.
    """
    avals = [[_Variable(r.program.avals[n]) for n in x] for x in (op.inputs, op.outputs)]
    program = derivative(op.primitive, op.params, *avals)
    floating = [
        v for n, v in zip(op.inputs, operands, strict=True) if is_floating(r.program.avals[n])
    ]
    slopes = [dataclasses.replace(v, leaf=None, known=None) for v in floating]
    flow, before = r.s.flow, r.s.flow.atoms.copy()
    _, trace = walk(program, [*operands, *slopes], flow, {}, RULES, r.s.later)
    after, flow.atoms = flow.atoms, before
    if any(not after.is_as(before, axis) for v in operands for axis in v.axes):

        def refuse(*_: Any) -> list[Any]:
            raise NotImplementedError(
                f"the derivative that {op.params['call_jaxpr'].jaxpr.debug_info.func_name} defines "
                "moves positions from one place to another, and some of them are removed here; "
                "leave out of the rules the layers whose channels it takes"
            )

        return refuse
    flow.atoms = after
    return lambda *arguments: r.run(program, trace, arguments)


class _Variable(NamedTuple):
    aval: Any


def _cond(r: Run, op: Op, arrays: Any, operands: Any, results: Any) -> Any:
    branches = [_inner(r, i) for i in range(len(op.inner))]
    return jax.lax.switch(arrays[0], branches, *arrays[1:])


def _while(r: Run, op: Op, arrays: Any, operands: Any, results: Any) -> Any:
    n, m = op.params["cond_nconsts"], op.params["body_nconsts"]
    ends, body = _inner(r, 0), _inner(r, 1)
    cond_consts, body_consts, carry = arrays[:n], arrays[n : n + m], arrays[n + m :]
    return jax.lax.while_loop(
        lambda c: ends(*cond_consts, *c)[0], lambda c: body(*body_consts, *c), list(carry)
    )


def _scan(r: Run, op: Op, arrays: Any, operands: Any, results: Any) -> Any:
    n, m = scan_sizes(op.params)
    length, reverse = op.params["length"], op.params["reverse"]
    consts, carry, scanned = arrays[:n], list(arrays[n : n + m]), list(arrays[n + m :])
    traces = r.trace.inner[r.index][0]
    if all(_alike(r.s, op.inner[0], traces[0], other) for other in traces[1:]):
        body = _inner(r, 0)

        def step(c: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
            found = body(*consts, *c, *x)
            return found[:m], found[m:]

        carry, out = jax.lax.scan(
            step, carry, scanned, length=length, reverse=reverse, unroll=op.params["unroll"]
        )
        return [*carry, *out]
    # Layers that lose different positions inside are different programs.
    order = range(length - 1, -1, -1) if reverse else range(length)
    rows: dict[int, list[Any]] = {}
    for layer in order:
        found = _inner(r, 0, layer)(*consts, *carry, *(x[layer] for x in scanned))
        carry, rows[layer] = found[:m], found[m:]
    stacked = [jnp.stack([rows[i][j] for i in range(length)]) for j in range(len(rows[0]))]
    return [*carry, *stacked]


def _alike(s: Removal, program: Program, one: Trace, other: Trace) -> bool:
    """Whether two layers are the same program once cut, apart from which parameters they hold."""
    arguments, placed = set(program.inputs), _placed(program)
    for n, value in one.values.items():
        twin = other.values[n]
        if s.shape(value) != s.shape(twin):
            return False
        if (n in program.constants or n in placed) and n not in arguments:
            for a, b in zip(value.axes, twin.axes, strict=True):
                one_kept, twin_kept = s.kept(a), s.kept(b)
                if (one_kept is None) != (twin_kept is None) or (
                    one_kept is not None and not np.array_equal(one_kept, np.asarray(twin_kept))
                ):
                    return False
    return all(
        _alike(s, inner, a, b)
        for index, groups in one.inner.items()
        for inner, group, twin_group in zip(
            program.ops[index].inner, groups, other.inner[index], strict=True
        )
        for a, b in zip(group, twin_group, strict=True)
    )


def _placed(program: Program) -> set[int]:
    """Variables of operations whose small form names single positions, and their operands."""
    return {n for op in program.ops if op.name in _PLACES for n in (*op.inputs, *op.outputs)}


_PLACES = {*SOURCES, "slice", "split", "tile", "pad", "gather", "dynamic_slice", "rev"}


EMIT: dict[str, Emit] = {
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "slice": _slice,
    "split": _split,
    "tile": _tile,
    "pad": _pad,
    "conv_general_dilated": _convolution,
    "gather": _gather,
    "dynamic_slice": _dynamic_slice,
    **dict.fromkeys(SCATTERS, _scatter),
    "dynamic_update_slice": _dynamic_update_slice,
    "reduce_sum": _reduce_sum,
    "remat2": _remat,
    "checkpoint": _remat,
    "custom_jvp_call": _custom,
    "custom_vjp_call": _custom,
    "cond": _cond,
    "while": _while,
    "scan": _scan,
}
