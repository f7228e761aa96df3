"""Running a traced program with smaller arrays: the same operations, other sizes.

Only operations that something was removed from are touched, and of those only what holds a size.
Everything here is traceable: it runs under ``jit``, ``grad``, ``vmap`` and ``export``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from purepruning.coupling.atoms import Axis
from purepruning.coupling.derivatives import custom_jvp, custom_vjp
from purepruning.coupling.flow import Flow, Value, blocks
from purepruning.coupling.primitives import ELEMENTWISE, SOURCES
from purepruning.coupling.program import Op, Program, derivative, is_floating
from purepruning.coupling.rules import Trace, concrete, known_start, walk, written_places

#: What to do about a statistic that cannot be corrected.
WITHOUT = 'norms="kept" needs none'


@dataclasses.dataclass
class Shrinking:
    """What goes, and what a mean means.

    Attributes:
        flow: the atoms of the program.
        dead: boolean by atom.
        norms: ``"original"`` keeps divisors and corrects statistics, ``"kept"`` averages over what
            is kept.
        later: numbers of programs that are walked through only when they run.
    """

    flow: Flow
    dead: np.ndarray
    norms: str
    later: list[int] = dataclasses.field(default_factory=lambda: [1 << 40])
    _kept: dict[int, tuple[Any, np.ndarray | None]] = dataclasses.field(default_factory=dict)

    def kept(self, axis: Axis) -> np.ndarray | None:
        """Returns the positions of an axis that stay; None for all."""
        if axis is None:
            return None
        if id(axis) not in self._kept:
            x = self.flow.atoms.resolve(axis)
            keep = None if x is None else ~self._is_dead(x).any(-1)
            found = None if keep is None or keep.all() else np.flatnonzero(keep)
            self._kept[id(axis)] = (axis, found)  # the axis, so that its id stays taken
        return self._kept[id(axis)][1]

    def _is_dead(self, x: np.ndarray) -> np.ndarray:
        # Atoms made since are of derivatives: what is dead of them is one with an older atom.
        old = x < len(self.dead)
        return self.dead[np.where(old, x, 0)] & old

    def touched(self, value: Value) -> bool:
        """Whether the value loses anything."""
        return any(self.kept(a) is not None for a in value.axes)

    def touched_inside(self, trace: Trace) -> bool:
        """Whether a program inside another loses anything; layers of a stack do by themselves."""
        return any(map(self.touched, trace.values.values())) or any(
            self.touched_inside(t)
            for groups in trace.inner.values()
            for copies in groups
            for t in copies
        )

    def shape(self, value: Value) -> tuple[Any, ...]:
        """Returns the shape of what is left of a value."""
        sizes = []
        for n, axis in zip(value.shape, value.axes, strict=True):
            kept = self.kept(axis)
            sizes.append(n if kept is None else len(kept))
        return tuple(sizes)

    def cut(self, array: Any, value: Value) -> Any:
        """Returns what is left of a full array."""
        for a, axis in enumerate(value.axes):
            kept = self.kept(axis)
            if kept is not None:
                array = _take(array, kept, a)
        return array


def _take(array: Any, positions: np.ndarray, axis: int) -> Any:
    return jnp.take(array, positions, axis=axis, mode="clip")


def run(program: Program, trace: Trace, arguments: Sequence[Any], s: Shrinking) -> list[Any]:
    """Returns the results of a program from small arguments."""
    return _Run(program, trace, s).results(arguments)


class _Run:
    """One run of one program: small arrays by variable, made in order."""

    def __init__(self, program: Program, trace: Trace, s: Shrinking) -> None:
        self.program, self.trace, self.s = program, trace, s
        self.values = trace.values
        self.arrays: dict[int, Any] = {}
        self.makers: dict[int, Op] = {}
        self.index = 0

    def results(self, arguments: Sequence[Any]) -> list[Any]:
        self.arrays.update(zip(self.program.inputs, arguments, strict=True))
        last = _last_uses(self.program, bool(self.s.flow.statistics))
        for index, op in enumerate(self.program.ops):
            self.index = index
            for out, array in zip(op.outputs, self.apply(op), strict=True):
                self.arrays[out] = array
                self.makers[out] = op
            for n in last.get(index, ()):
                self.arrays.pop(n, None)
        return [self.read(n) for n in self.program.outputs]

    def read(self, n: int) -> Any:
        if n not in self.arrays:
            self.arrays[n] = self.s.cut(self.program.constants[n], self.values[n])
        return self.arrays[n]

    def apply(self, op: Op) -> list[Any]:
        s = self.s
        operands = [self.values[n] for n in op.inputs]
        results = [self.values[n] for n in op.outputs]
        arrays = [self.read(n) for n in op.inputs]
        if op.name in ("div", "mul") and (mean := self.mean(op)) is not None:
            arrays = _with_divisor(arrays, operands, mean, op.name, s)
        inside = op.inner and any(map(s.touched_inside, self.inner()))
        if not inside and not any(map(s.touched, (*operands, *results))):
            return self.bind(op, arrays, op.params)
        rule = _EMIT.get(op.name)
        if rule is not None:
            found = rule(self, op, arrays, operands, results)
            return list(found) if isinstance(found, (list, tuple)) else [found]
        if op.name in SOURCES:
            full = self.bind(op, arrays, op.params)
            return [s.cut(a, v) for a, v in zip(full, results, strict=True)]
        return self.bind(op, arrays, op.params)

    def inner(self) -> list[Trace]:
        return [t for copies in self.trace.inner.get(self.index, ()) for t in copies]

    def bind(self, op: Op, arrays: Sequence[Any], params: dict[str, Any]) -> list[Any]:
        with op.context.manager:
            found = op.primitive.bind(*arrays, **op.primitive.get_bind_params(params))
        return list(found) if op.primitive.multiple_results else [found]

    def mean(self, op: Op) -> Any:
        if self.s.norms != "kept":
            return None
        return self.s.flow.means.get((self.trace.number, self.index))

    # What masked models hold at removed positions, for statistics.

    def ghost(self, n: int, axis: int) -> Any:
        """Returns what the masked model holds at removed positions of an axis.

        The array has all axes of the variable; along ``axis`` it has one position for each removed
        one, or a single one for all of them.
        """
        value, s = self.values[n], self.s
        kept = s.kept(value.axes[axis])
        assert kept is not None
        gone = np.setdiff1d(np.arange(value.shape[axis]), kept)
        dead = np.atleast_1d(np.asarray(value.dead[axis], float))
        dead = dead if len(dead) == 1 else dead[gone]
        dtype = self.program.avals[n].dtype
        if np.isfinite(dead).all():
            shape = [1] * value.ndim
            shape[axis] = len(dead)
            return jnp.asarray(dead.reshape(shape), dtype)
        op = self.makers[n]
        if op.name == "broadcast_in_dim":
            dims = op.params["broadcast_dimensions"]
            source = self.read(op.inputs[0])
            shape = list(s.shape(value))
            shape[axis] = 1
            if axis in dims and self.values[op.inputs[0]].shape[dims.index(axis)] != 1:
                source = self.ghost(op.inputs[0], dims.index(axis))
                shape[axis] = source.shape[dims.index(axis)]
            return jax.lax.broadcast_in_dim(_fit(source, shape, dims), shape, dims)
        if op.name in ("reshape", "squeeze", "expand_dims"):
            old = self.values[op.inputs[0]]
            place = _same_place(old.shape, value.shape, axis)
            source = self.ghost(op.inputs[0], place)
            shape = list(s.shape(value))
            shape[axis] = source.shape[place]
            whole = list(s.shape(old))
            whole[place] = source.shape[place]
            return jnp.reshape(jnp.broadcast_to(source, whole), shape)
        if op.name == "rev":
            return self.bind(op, [self.ghost(op.inputs[0], axis)], op.params)[0]
        if op.name == "optimization_barrier":
            return self.ghost(op.inputs[op.outputs.index(n)], axis)
        if op.name == "transpose":
            order = op.params["permutation"]
            return jnp.transpose(self.ghost(op.inputs[0], order[axis]), order)
        if op.name == "dot_general":
            return self._ghost_product(op, axis)
        if op.name in ELEMENTWISE or op.name == "integer_pow" or op.inner:
            return self._ghost_elementwise(op, axis, op.outputs.index(n))
        raise NotImplementedError(f"no value at removed positions through {op.name}; {WITHOUT}")

    def _ghost_product(self, op: Op, axis: int) -> Any:
        (left, right), (batch_left, batch_right) = op.params["dimension_numbers"]
        sides = []
        for n, used in zip(op.inputs, ((*left, *batch_left), (*right, *batch_right)), strict=True):
            sides.append([a for a in range(self.values[n].ndim) if a not in used])
        place = axis - len(batch_left)
        which = int(place >= len(sides[0]))
        arrays = [self.read(n) for n in op.inputs]
        source = sides[which][place - which * len(sides[0])]
        arrays[which] = self.ghost(op.inputs[which], source)
        shape = list(self.s.shape(self.values[op.inputs[which]]))
        shape[source] = arrays[which].shape[source]
        arrays[which] = jnp.broadcast_to(arrays[which], shape)
        return self.bind(op, arrays, op.params)[0]

    def _ghost_elementwise(self, op: Op, axis: int, which: int = 0) -> Any:
        parts = []
        for n in op.inputs:
            value = self.values[n]
            if value.ndim == 0 or value.shape[axis] == 1 or value.axes[axis] is None:
                parts.append(self.read(n))
            else:
                parts.append(self.ghost(n, axis))
        shape = np.broadcast_shapes(*(p.shape for p in parts))
        parts = [p if p.ndim == 0 else jnp.broadcast_to(p, shape) for p in parts]
        if op.inner:
            return _elementwise(op.inner[0], parts)[which]
        return self.bind(op, parts, op.params)[which]


def _elementwise(program: Program, arguments: Sequence[Any]) -> list[Any]:
    """Returns the results of an element-wise program, on arrays of any shape."""
    arrays = dict(zip(program.inputs, arguments, strict=True)) | program.constants
    for op in program.ops:
        given = [arrays[n] for n in op.inputs]
        if op.inner:
            found = _elementwise(op.inner[0], given)
        else:
            found = op.primitive.bind(*given, **op.primitive.get_bind_params(op.params))
            found = found if op.primitive.multiple_results else [found]
        arrays.update(zip(op.outputs, found, strict=True))
    return [arrays[n] for n in program.outputs]


def _last_uses(program: Program, keep_all: bool) -> dict[int, list[int]]:
    """Returns which variables are used by no later operation, by the index of the last one."""
    if keep_all:  # a correction may look back at any of them
        return {}
    last: dict[int, int] = {}
    for index, op in enumerate(program.ops):
        for n in op.inputs:
            last[n] = index
    found: dict[int, list[int]] = {}
    for n, index in last.items():
        if n not in program.outputs:
            found.setdefault(index, []).append(n)
    return found


def _fit(source: Any, shape: Sequence[int], dims: Sequence[int]) -> Any:
    """Returns the source with its axes as long as ``broadcast_in_dim`` needs them."""
    sizes = [1 if source.shape[a] == 1 else shape[d] for a, d in enumerate(dims)]
    return jnp.broadcast_to(source, sizes)


def _same_place(old: Sequence[int], new: Sequence[int], axis: int) -> int:
    for left, right in blocks(old, new):
        if right == [axis] and len(left) == 1:
            return left[0]
    raise NotImplementedError(f"a statistic over an axis that a reshape made; {WITHOUT}")


def _with_divisor(
    arrays: list[Any], operands: Sequence[Value], mean: Any, name: str, s: Shrinking
) -> list[Any]:
    """Returns the operands of a division by a number of terms, with the number that is kept."""
    left = 1
    for n, axis in zip(mean.lengths, mean.axes, strict=True):
        kept = s.kept(axis)
        left *= n if kept is None else len(kept)
    sums = 0 if operands[0].summed is mean else 1
    by = arrays[1 - sums]
    number = np.asarray(operands[1 - sums].known) if operands[1 - sums].known is not None else None
    given = mean.size if number is None else float(number if name == "div" else 1 / number)
    fewer = mean.size - given  # a divisor of N - 1 becomes one of n - 1
    ratio = (left - fewer) / given
    arrays = list(arrays)
    arrays[1 - sums] = (by * ratio if name == "div" else by / ratio).astype(by.dtype)
    return arrays


# Operations that hold sizes.


def _broadcast(r: _Run, op: Op, arrays: Any, operands: Any, results: Any) -> Any:
    return r.bind(op, arrays, {**op.params, "shape": r.s.shape(results[0])})


def _reshape(r: _Run, op: Op, arrays: Any, operands: Any, results: Any) -> Any:
    return r.bind(op, arrays, {**op.params, "new_sizes": r.s.shape(results[0])})


def _slice(r: _Run, op: Op, arrays: Any, operands: Any, results: Any) -> Any:
    array, value, out = arrays[0], operands[0], results[0]
    strides = op.params["strides"] or (1,) * value.ndim
    for a, (start, step) in enumerate(zip(op.params["start_indices"], strides, strict=True)):
        if value.shape[a] is out.shape[a] or value.shape[a] == out.shape[a]:
            continue
        array = _pick(r, array, value.axes[a], out.axes[a], out.shape[a], start, step, a)
    return array


def _pick(
    r: _Run, array: Any, old: Axis, new: Axis, size: Any, start: int, step: int, axis: int
) -> Any:
    """Returns the part of an axis that starts at ``start``, of what is left of it."""
    kept = r.s.kept(old)
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
    return _take(array, index, axis)


def _split(r: _Run, op: Op, arrays: Any, operands: Any, results: Any) -> Any:
    axis = op.params["axis"]
    sizes = tuple(r.s.shape(v)[axis] for v in results)
    return r.bind(op, arrays, {**op.params, "sizes": sizes})


def _tile(r: _Run, op: Op, arrays: Any, operands: Any, results: Any) -> Any:
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
        array = _take(array, where, a)
    return array


def _pad(r: _Run, op: Op, arrays: Any, operands: Any, results: Any) -> Any:
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


def _convolution(r: _Run, op: Op, arrays: Any, operands: Any, results: Any) -> Any:
    groups = op.params["feature_group_count"]
    if groups > 1:
        numbers = op.params["dimension_numbers"]
        inputs = arrays[0].shape[numbers.lhs_spec[1]]
        groups = inputs // arrays[1].shape[numbers.rhs_spec[1]]
    return r.bind(op, arrays, {**op.params, "feature_group_count": groups})


def _gather(r: _Run, op: Op, arrays: Any, operands: Any, results: Any) -> Any:
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


def _gather_known(r: _Run, op: Op, arrays: Any, operands: Any, results: Any, axis: int) -> Any:
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
    array = _take(arrays[0], np.searchsorted(kept, places), axis)
    return jnp.moveaxis(array, axis, batch)


def _dynamic_slice(r: _Run, op: Op, arrays: Any, operands: Any, results: Any) -> Any:
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


def _scatter(r: _Run, op: Op, arrays: Any, operands: Any, results: Any) -> Any:
    value, updates = operands[0], operands[2]
    places = written_places(r.program, op, value, updates)
    if places is None:
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
    return _take(both, new[taken if chosen is None else taken[chosen]], axis)


def _dynamic_update_slice(r: _Run, op: Op, arrays: Any, operands: Any, results: Any) -> Any:
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


def _reduce_sum(r: _Run, op: Op, arrays: Any, operands: Any, results: Any) -> Any:
    total = r.bind(op, arrays, op.params)[0]
    where = (r.trace.number, r.index)
    if r.s.norms != "original" or where not in r.s.flow.statistics:
        return total
    value = operands[0]
    for a in op.params["axes"]:
        kept = r.s.kept(value.axes[a])
        if kept is None or bool((np.asarray(value.dead[a]) == 0.0).all()):
            continue
        gone = value.shape[a] - len(kept)
        ghost = r.ghost(op.inputs[0], a)
        shape = list(r.s.shape(value))
        shape[a] = gone
        total = total + r.bind(op, [jnp.broadcast_to(ghost, shape)], op.params)[0]
    return total


# Programs inside programs.


def _inner(r: _Run, program: int, copy: int = 0) -> Callable[..., list[Any]]:
    op = r.program.ops[r.index]
    trace = r.trace.inner[r.index][program][copy]
    return lambda *args: run(op.inner[program], trace, args, r.s)


def _remat(r: _Run, op: Op, arrays: Any, operands: Any, results: Any) -> Any:
    body = jax.checkpoint(
        _inner(r, 0), policy=op.params.get("policy"), prevent_cse=op.params["prevent_cse"]
    )
    return body(*arrays)


def _custom(r: _Run, op: Op, arrays: Any, operands: Any, results: Any) -> Any:
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


def _derivative(r: _Run, op: Op, operands: Sequence[Value]) -> Callable[..., list[Any]]:
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
    _, trace = walk(program, [*operands, *slopes], flow, {}, r.s.later)
    after, flow.atoms = flow.atoms, before
    if any(not after.is_as(before, axis) for v in operands for axis in v.axes):

        def refuse(*_: Any) -> list[Any]:
            raise NotImplementedError(
                f"the derivative that {op.params['call_jaxpr'].jaxpr.debug_info.func_name} defines "
                "moves positions from one place to another, and some of them are removed here"
            )

        return refuse
    flow.atoms = after
    return lambda *arguments: run(program, trace, arguments, r.s)


class _Variable(NamedTuple):
    aval: Any


def _cond(r: _Run, op: Op, arrays: Any, operands: Any, results: Any) -> Any:
    branches = [_inner(r, i) for i in range(len(op.inner))]
    return jax.lax.switch(arrays[0], branches, *arrays[1:])


def _while(r: _Run, op: Op, arrays: Any, operands: Any, results: Any) -> Any:
    n, m = op.params["cond_nconsts"], op.params["body_nconsts"]
    ends, body = _inner(r, 0), _inner(r, 1)
    cond_consts, body_consts, carry = arrays[:n], arrays[n : n + m], arrays[n + m :]
    return jax.lax.while_loop(
        lambda c: ends(*cond_consts, *c)[0], lambda c: body(*body_consts, *c), list(carry)
    )


def _scan(r: _Run, op: Op, arrays: Any, operands: Any, results: Any) -> Any:
    n, m = op.params["num_consts"], op.params["num_carry"]
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


def _alike(s: Shrinking, program: Program, one: Trace, other: Trace) -> bool:
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

_EMIT: dict[str, Callable[..., Any]] = {
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "slice": _slice,
    "split": _split,
    "tile": _tile,
    "pad": _pad,
    "conv_general_dilated": _convolution,
    "gather": _gather,
    "dynamic_slice": _dynamic_slice,
    "scatter": _scatter,
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
