"""Running a traced program with smaller arrays: the same operations, other sizes.

Only operations that something was removed from are touched, and of those only what holds a size.
Everything here is traceable: it runs under ``jit``, ``grad``, ``vmap`` and ``export``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from purepruning.coupling.removal import WITHOUT, Removal, axis_before
from purepruning.coupling.value import Value
from purepruning.jaxpr.internals import bind
from purepruning.jaxpr.primitives import ELEMENTWISE, SOURCES
from purepruning.jaxpr.program import Op, Program
from purepruning.jaxpr.walk import Trace


def take(array: Any, positions: np.ndarray, axis: int) -> Any:
    """Returns the given positions of an axis."""
    return jnp.take(array, positions, axis=axis, mode="clip")


#: ``(run, operation, arrays, values of operands, values of results) -> results``.
Emit = Callable[["Run", Op, list[Any], list[Value], list[Value]], Any]


class Run:
    """One run of one program: small arrays by variable, made in order.

    ``emit`` holds for every primitive what runs it where something was removed.
    """

    def __init__(
        self, program: Program, trace: Trace, s: Removal, emit: Mapping[str, Emit]
    ) -> None:
        self.program, self.trace, self.s, self.emit = program, trace, s, emit
        self.values = trace.values
        self.arrays: dict[int, Any] = {}
        self.makers: dict[int, Op] = {}
        self.index = 0

    def run(self, program: Program, trace: Trace, arguments: Sequence[Any]) -> list[Any]:
        """Returns the results of another program, such as one inside this one."""
        return Run(program, trace, self.s, self.emit).results(arguments)

    def results(self, arguments: Sequence[Any]) -> list[Any]:
        """Returns the results of the program from small arguments."""
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
        """Returns the small array of a variable."""
        if n not in self.arrays:
            self.arrays[n] = self.cut(self.program.constants[n], self.values[n])
        return self.arrays[n]

    def cut(self, array: Any, value: Value) -> Any:
        """Returns what is left of a full array."""
        for a, axis in enumerate(value.axes):
            kept = self.s.kept(axis)
            if kept is not None:
                array = take(array, kept, a)
        return array

    def apply(self, op: Op) -> list[Any]:
        """Returns the results of one operation."""
        s = self.s
        operands = [self.values[n] for n in op.inputs]
        results = [self.values[n] for n in op.outputs]
        if self.is_of_nothing(op, operands, results):
            avals = [self.program.avals[n] for n in op.outputs]
            return [jnp.zeros(s.shape(v), x.dtype) for v, x in zip(results, avals, strict=True)]
        arrays = [self.read(n) for n in op.inputs]
        if op.name in ("div", "mul") and (mean := self.mean(op)) is not None:
            arrays = _with_divisor(arrays, operands, mean, op.name, s)
        inside = op.inner and any(_touched_inside(s, t) for t in self.inner())
        if not inside and not any(map(s.touched, (*operands, *results))):
            return self.bind(op, arrays, op.params)
        rule = self.emit.get(op.name)
        if rule is not None:
            found = rule(self, op, arrays, operands, results)
            return list(found) if isinstance(found, (list, tuple)) else [found]
        if op.name in SOURCES:
            full = self.bind(op, arrays, op.params)
            return [self.cut(a, v) for a, v in zip(full, results, strict=True)]
        return self.bind(op, arrays, op.params)

    def is_of_nothing(self, op: Op, operands: list[Value], results: list[Value]) -> bool:
        """Whether an operation runs inside of a branch that went, or sums what is left behind it.

        XLA knows no convolution of no channels; the sum of no products is zero.
        """
        if op.inner or not any(_is_emptied(self.s, v) for v in operands):
            return False
        return op.name == "conv_general_dilated" or all(_is_emptied(self.s, v) for v in results)

    def inner(self) -> list[Trace]:
        """Returns the traces of the programs inside the present operation."""
        return [t for copies in self.trace.inner.get(self.index, ()) for t in copies]

    def bind(self, op: Op, arrays: Sequence[Any], params: dict[str, Any]) -> list[Any]:
        """Returns the results of an operation on these arrays, with these parameters."""
        with op.context.manager:
            found = bind(op.primitive, arrays, params)
        return list(found) if op.primitive.multiple_results else [found]

    def mean(self, op: Op) -> Any:
        """Returns the sum whose number of terms the operation divides by; None if it does not."""
        if self.s.norms != "kept":
            return None
        return self.s.flow.means.get((self.trace.number, self.index))

    # What masked models hold at removed positions, for statistics.

    def masked(self, n: int, axis: int) -> Any:
        """Returns what the masked model holds at removed positions of an axis.

        The array has all axes of the variable; along ``axis`` it has one position for each removed
        one, or a single one for all of them.
        """
        value, s = self.values[n], self.s
        kept = s.kept(value.axes[axis])
        assert kept is not None
        gone = np.setdiff1d(np.arange(value.shape[axis]), kept)
        at_removed = np.atleast_1d(np.asarray(value.at_removed[axis], float))
        at_removed = at_removed if len(at_removed) == 1 else at_removed[gone]
        dtype = self.program.avals[n].dtype
        if np.isfinite(at_removed).all():
            shape = [1] * value.ndim
            shape[axis] = len(at_removed)
            return jnp.asarray(at_removed.reshape(shape), dtype)
        op = self.makers[n]
        if op.name == "broadcast_in_dim":
            dims = op.params["broadcast_dimensions"]
            source = self.read(op.inputs[0])
            shape = list(s.shape(value))
            shape[axis] = 1
            if axis in dims and self.values[op.inputs[0]].shape[dims.index(axis)] != 1:
                source = self.masked(op.inputs[0], dims.index(axis))
                shape[axis] = source.shape[dims.index(axis)]
            return jax.lax.broadcast_in_dim(_fit(source, shape, dims), shape, dims)
        if op.name in ("reshape", "squeeze", "expand_dims"):
            old = self.values[op.inputs[0]]
            place = axis_before(old.shape, value.shape, axis)
            source = self.masked(op.inputs[0], place)
            shape = list(s.shape(value))
            shape[axis] = source.shape[place]
            whole = list(s.shape(old))
            whole[place] = source.shape[place]
            return jnp.reshape(jnp.broadcast_to(source, whole), shape)
        if op.name == "rev":
            return self.bind(op, [self.masked(op.inputs[0], axis)], op.params)[0]
        if op.name == "optimization_barrier":
            return self.masked(op.inputs[op.outputs.index(n)], axis)
        if op.name == "transpose":
            order = op.params["permutation"]
            return jnp.transpose(self.masked(op.inputs[0], order[axis]), order)
        if op.name == "dot_general":
            return self._masked_product(op, axis)
        if op.name in ELEMENTWISE or op.name == "integer_pow" or op.inner:
            return self._masked_elementwise(op, axis, op.outputs.index(n))
        raise NotImplementedError(f"no value at removed positions through {op.name}; {WITHOUT}")

    def _masked_product(self, op: Op, axis: int) -> Any:
        (left, right), (batch_left, batch_right) = op.params["dimension_numbers"]
        sides = []
        for n, used in zip(op.inputs, ((*left, *batch_left), (*right, *batch_right)), strict=True):
            sides.append([a for a in range(self.values[n].ndim) if a not in used])
        place = axis - len(batch_left)
        which = int(place >= len(sides[0]))
        arrays = [self.read(n) for n in op.inputs]
        source = sides[which][place - which * len(sides[0])]
        arrays[which] = self.masked(op.inputs[which], source)
        shape = list(self.s.shape(self.values[op.inputs[which]]))
        shape[source] = arrays[which].shape[source]
        arrays[which] = jnp.broadcast_to(arrays[which], shape)
        return self.bind(op, arrays, op.params)[0]

    def _masked_elementwise(self, op: Op, axis: int, which: int = 0) -> Any:
        parts = []
        for n in op.inputs:
            value = self.values[n]
            if value.ndim == 0 or value.shape[axis] == 1 or value.axes[axis] is None:
                parts.append(self.read(n))
            else:
                parts.append(self.masked(n, axis))
        shape = np.broadcast_shapes(*(p.shape for p in parts))
        parts = [p if p.ndim == 0 else jnp.broadcast_to(p, shape) for p in parts]
        if op.inner:
            return _elementwise(op.inner[0], parts)[which]
        return self.bind(op, parts, op.params)[which]


def _is_emptied(s: Removal, value: Value) -> bool:
    kept = [s.kept(axis) for axis in value.axes]
    return any(k is not None and not len(k) for k in kept)


def _elementwise(program: Program, arguments: Sequence[Any]) -> list[Any]:
    """Returns the results of an element-wise program, on arrays of any shape."""
    arrays = dict(zip(program.inputs, arguments, strict=True)) | program.constants
    for op in program.ops:
        given = [arrays[n] for n in op.inputs]
        if op.inner:
            found = _elementwise(op.inner[0], given)
        else:
            found = bind(op.primitive, given, op.params)
            found = found if op.primitive.multiple_results else [found]
        arrays.update(zip(op.outputs, found, strict=True))
    return [arrays[n] for n in program.outputs]


def _touched_inside(s: Removal, trace: Trace) -> bool:
    """Whether a program inside another loses anything; layers of a stack do by themselves."""
    return any(map(s.touched, trace.values.values())) or any(
        _touched_inside(s, t)
        for groups in trace.inner.values()
        for copies in groups
        for t in copies
    )


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


def _with_divisor(
    arrays: list[Any], operands: Sequence[Value], mean: Any, name: str, s: Removal
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
