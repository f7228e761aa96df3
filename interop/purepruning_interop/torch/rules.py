"""One rule for every ATen operator: which method of the flow it is.

``RULES[name](walk, op)`` returns the values of the results, or None where it does not apply. An
operator that is neither here nor element by element keeps its operands whole, and is reported.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from purepruning.coupling.flow import Flow, Value, numbers_as_even, whole
from purepruning.coupling.scalars import UNKNOWN
from purepruning_interop.torch.program import Op, Program, Sym, Var, numel

#: Element-wise operators whose masked value follows from zero alone, or that choose.
NAMED = {
    "mul": "mul",
    "multiply": "mul",
    "div": "div",
    "divide": "div",
    "true_divide": "div",
    "logical_and": "and",
    "bitwise_and": "and",
    "__and__": "and",
}

#: Other element-wise operators: at removed positions they are computed from numbers.
ELEMENTWISE = frozenset(
    [
        "abs",
        "absolute",
        "acos",
        "acosh",
        "add",
        "addcdiv",
        "addcmul",
        "arccos",
        "arcsin",
        "arctan",
        "asin",
        "asinh",
        "atan",
        "atan2",
        "atanh",
        "bitwise_left_shift",
        "bitwise_not",
        "bitwise_or",
        "bitwise_right_shift",
        "bitwise_xor",
        "ceil",
        "celu",
        "clamp",
        "clamp_max",
        "clamp_min",
        "clip",
        "copysign",
        "cos",
        "cosh",
        "deg2rad",
        "digamma",
        "elu",
        "eq",
        "erf",
        "erfc",
        "erfinv",
        "exp",
        "exp2",
        "expm1",
        "fix",
        "floor",
        "floor_divide",
        "fmax",
        "fmin",
        "fmod",
        "frac",
        "ge",
        "gelu",
        "greater",
        "greater_equal",
        "gt",
        "hardshrink",
        "hardsigmoid",
        "hardswish",
        "hardtanh",
        "heaviside",
        "hypot",
        "i0",
        "igamma",
        "igammac",
        "isfinite",
        "isinf",
        "isnan",
        "ldexp",
        "le",
        "leaky_relu",
        "lerp",
        "less",
        "less_equal",
        "lgamma",
        "log",
        "log10",
        "log1p",
        "log2",
        "log_sigmoid",
        "logaddexp",
        "logaddexp2",
        "logical_not",
        "logical_or",
        "logical_xor",
        "logit",
        "lt",
        "maximum",
        "minimum",
        "mish",
        "nan_to_num",
        "ne",
        "neg",
        "negative",
        "nextafter",
        "not_equal",
        "polygamma",
        "polar",
        "complex",
        "pow",
        "rad2deg",
        "reciprocal",
        "relu",
        "relu6",
        "remainder",
        "round",
        "rsqrt",
        "rsub",
        "selu",
        "sgn",
        "sigmoid",
        "sign",
        "signbit",
        "silu",
        "sin",
        "sinc",
        "sinh",
        "softplus",
        "softshrink",
        "special_erf",
        "special_erfc",
        "special_expit",
        "special_log1p",
        "sqrt",
        "square",
        "sub",
        "subtract",
        "tan",
        "tanh",
        "tanhshrink",
        "threshold",
        "trunc",
        "xlogy",
        "__or__",
        "__xor__",
        "__lshift__",
        "__rshift__",
    ]
)

#: What passes its first argument on.
IDENTITY = frozenset(
    [
        "alias",
        "clone",
        "contiguous",
        "conj",
        "detach",
        "dropout",
        "feature_dropout",
        "alpha_dropout",
        "feature_alpha_dropout",
        "lift_fresh",
        "lift_fresh_copy",
        "positive",
        "resolve_conj",
        "resolve_neg",
        "to",
        "type_as",
        "_to_copy",
        "_conj",
        "view_as_real_copy",
        "real",
        "native_dropout",
        "requires_grad_",
        "_to_cpu",
        "cpu",
        "float",
        "double",
        "half",
        "bfloat16",
    ]
)

#: Through these a parameter is still that parameter.
PASSING = frozenset(
    [
        "alias",
        "clone",
        "contiguous",
        "detach",
        "lift_fresh",
        "to",
        "_to_copy",
        "permute",
        "transpose",
        "t",
    ]
)


@dataclasses.dataclass
class Walk:
    """The state of walking through a program: what rules need besides the operation."""

    flow: Flow
    program: Program
    values: dict[int, Value]
    uses: Mapping[str, int]
    folded: Mapping[int, np.ndarray]
    index: int = 0
    memory: dict[Any, dict[tuple[str, ...], float]] = dataclasses.field(default_factory=dict)
    parts: dict[int, Value] = dataclasses.field(default_factory=dict)

    def value(self, x: Any) -> Value:
        """Returns what is known of an argument: a tensor, or a number."""
        if isinstance(x, Var):
            return self.values[x.number]
        if isinstance(x, Sym):
            return whole(())
        return whole((), np.asarray(x))

    def shape(self, op: Op, i: int = 0) -> tuple[Any, ...]:
        """Returns the shape of a result."""
        number = op.outputs[i]
        assert number is not None
        return self.program.avals[number].shape

    def where(self, part: str = "") -> tuple[int, str]:
        """What a part of the present operation is called in the flow's records."""
        return self.index, part

    def concrete(self, x: Any) -> np.ndarray | None:
        """Returns a tensor that depends on constants alone."""
        if not isinstance(x, Var):
            return None if isinstance(x, Sym) or x is None else np.asarray(x)
        return self.folded.get(x.number)


def walk(
    program: Program,
    leaves: Mapping[str, Value],
    flow: Flow,
    uses: Mapping[str, int],
    folded: Mapping[int, np.ndarray],
) -> tuple[dict[int, Value], dict[int, Value]]:
    """Returns the values of all tensors of a program, and of channels by groups, by operation.

    Args:
        program: what is walked through.
        leaves: values of parameters and buffers by path.
        flow: where the atoms are.
        uses: how often each leaf is used.
        folded: tensors that depend on constants alone, by number.
    """
    values: dict[int, Value] = {}
    for number in program.inputs:
        if number is not None:
            values[number] = whole(program.avals[number].shape)
    for number, path in program.leaves.items():
        values[number] = leaves[path]
    for number, tensor in program.constants.items():
        values[number] = flow.constant(tuple(tensor.shape), _uniform(tensor))
    state = Walk(flow, program, values, uses, folded)
    for index, op in enumerate(program.ops):
        state.index = index
        if op.symbol is not None:
            continue
        for number, value in zip(op.outputs, _apply(state, op), strict=True):
            if number is not None:
                values[number] = value
    return values, state.parts


def _uniform(tensor: torch.Tensor) -> Any:
    if 0 < tensor.numel() <= 1 << 16 and not tensor.is_complex() and tensor.device.type != "meta":
        first = tensor.reshape(-1)[0]
        if bool((tensor == first).all()):
            return np.asarray(first.double().cpu())
    return None


def _apply(state: Walk, op: Op) -> list[Value]:
    found = None
    if op.name in RULES:
        found = RULES[op.name](state, op)
    if found is None:
        operands = [state.value(v) for v in op.tensors]
        shapes = [() if n is None else state.program.avals[n].shape for n in op.outputs]
        return state.flow.opaque(op.name, operands, shapes)
    if op.name not in GHOSTS:
        # What the shrunk program cannot compute again is not known.
        found = [_without_even(v) for v in found]
    return found


def _without_even(value: Value) -> Value:
    dead = tuple(
        np.where(np.isfinite(d), d, UNKNOWN)
        if np.ndim(d)
        else (d if math.isfinite(float(d)) else UNKNOWN)
        for d in value.dead
    )
    return dataclasses.replace(value, dead=dead)


# Element by element.


def _elementwise(s: Walk, op: Op) -> list[Value] | None:
    tensors = op.tensors
    name = NAMED.get(op.name, "")
    operands = [s.value(v) for v in tensors]
    whole_numbers = name == "and" and s.program.avals[tensors[0].number].dtype != torch.bool
    if len(tensors) > 1 and name and not op.args.get("rounding_mode") and not whole_numbers:
        value = s.flow.elementwise(name, operands, s.shape(op), s.where())
    else:
        value = s.flow.elementwise(
            op.name if not name else f"{name} by a number",
            operands,
            s.shape(op),
            s.where(),
            _function(s, op),
        )
    if name in ("mul", "div") and not op.args.get("rounding_mode"):
        _note_mean(s, op, name)
    return [value]


def _function(s: Walk, op: Op) -> Callable[..., float]:
    """Returns the operator as a function of numbers, one for each tensor it reads."""
    rest = {k: "x" if isinstance(v, Var) else repr(v) for k, v in op.args.items()}
    dtypes = tuple(s.program.avals[v.number].dtype for v in op.tensors)
    memory = s.memory.setdefault((op.target, tuple(rest.items()), dtypes), {})

    def function(*numbers: Any) -> float:
        key = tuple(repr(float(n)) for n in numbers)
        if key not in memory:
            memory[key] = _run_on_numbers(op, [float(n) for n in numbers], dtypes)
        return memory[key]

    return function


def _run_on_numbers(op: Op, numbers: Sequence[float], dtypes: Sequence[torch.dtype] = ()) -> float:
    own = [torch.float64 if d == torch.float32 else d for d in dtypes]
    for kinds in (own, *([d] * len(numbers) for d in (torch.float64, torch.bool, torch.int64))):
        if len(kinds) != len(numbers):
            continue
        rest = iter(zip(numbers, kinds, strict=True))
        args = {
            k: _scalar(*next(rest)) if isinstance(v, Var) else (v.hint if isinstance(v, Sym) else v)
            for k, v in op.args.items()
        }
        try:
            found = _call(op, args)
            if found.is_complex():
                return 0.0 if found == 0 else UNKNOWN
            return float(found)
        except (RuntimeError, TypeError, NotImplementedError, ValueError):
            continue
    return UNKNOWN


def _scalar(number: float, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(number, dtype=torch.float64).to(dtype)


def _call(op: Op, args: Mapping[str, Any]) -> Any:
    given = [v for k, v in args.items() if k not in op.keywords]
    return op.target(*given, **{k: v for k, v in args.items() if k in op.keywords})


def _note_mean(s: Walk, op: Op, name: str) -> None:
    """Notes a sum that is divided by the number of its terms."""
    a, b = list(op.args.values())[:2]
    for one, by in ((a, b), (b, a)) if name == "mul" else ((a, b),):
        value = s.value(one)
        if not isinstance(one, Var) or value.summed is None:
            continue
        known = s.concrete(by)
        if known is None or np.size(known) != 1 or float(known.reshape(())) == 0:
            continue
        factor = float(known.reshape(()))
        s.flow.scaled_sum(value, factor if name == "div" else 1 / factor, s.where())
        return


def _identity(s: Walk, op: Op) -> list[Value] | None:
    first = op.tensors[0]
    source = s.value(first)
    if source.shape != s.shape(op):
        return None
    leaf = source.leaf if op.name in PASSING else None
    value = dataclasses.replace(source, leaf=leaf)
    result = op.outputs[0]
    assert result is not None
    before, after = s.program.avals[first.number].dtype, s.program.avals[result].dtype
    if torch.promote_types(before, after) != after:  # what is rounded, the program computes
        value = dataclasses.replace(numbers_as_even(value), known=None)
    return [value, *(whole(s.shape(op, i)) for i in range(1, len(op.outputs)))]


def _where(s: Walk, op: Op) -> list[Value] | None:
    if len(op.outputs) != 1 or "self" not in op.args or "other" not in op.args:
        return None
    condition, one, other = (s.value(op.args[k]) for k in ("condition", "self", "other"))
    return [s.flow.elementwise("select_n", [condition, other, one], s.shape(op), s.where())]


def _masked_fill(s: Walk, op: Op) -> list[Value] | None:
    x, mask, value = (s.value(op.args[k]) for k in ("self", "mask", "value"))
    return [s.flow.elementwise("select_n", [mask, x, value], s.shape(op), s.where())]


def _copy(s: Walk, op: Op) -> list[Value] | None:
    source, shape = s.value(op.args["src"]), s.shape(op)
    n = len(shape) - source.ndim
    return [s.flow.broadcast(source, shape, range(n, len(shape)))]


def _prelu(s: Walk, op: Op) -> list[Value] | None:
    x, weight = s.value(op.args["self"]), s.value(op.args["weight"])
    if op.name == "prelu" and weight.ndim == 1 and x.ndim > 1 and weight.shape[0] != 1:
        weight = _along_channel(s, weight, x.ndim, 1)
    keep = _function_of(lambda a, w: a if a > 0 else a * w)
    return [s.flow.elementwise("prelu", [x, weight], s.shape(op), s.where(), keep)]


def _function_of(f: Callable[..., float]) -> Callable[..., float]:
    return lambda *numbers: f(*(float(n) for n in numbers))


def _along_channel(s: Walk, value: Value, ndim: int, axis: int) -> Value:
    """Returns a vector as an array that broadcasts along one axis."""
    order: list[int | None] = [None] * ndim
    order[axis] = 0
    return s.flow.select_axes(value, order)


def _number(s: Walk, f: Callable[[float], float], value: Value, name: str) -> Value:
    return s.flow.elementwise(name, [value], value.shape, None, _function_of(f))


# Shapes.


def _reshape(s: Walk, op: Op) -> list[Value] | None:
    if op.name == "view" and "dtype" in op.args:
        return None
    value = s.value(op.tensors[0])
    reshaped = s.flow.reshape(value, s.shape(op))
    if value.known is not None and np.size(value.known) == 1:
        reshaped = dataclasses.replace(reshaped, known=value.known)
    return [reshaped]


def _permute(s: Walk, op: Op) -> list[Value] | None:
    value = s.value(op.tensors[0])
    n = value.ndim
    if op.name == "permute":
        order = [d % n for d in op.args["dims"]]
    elif op.name in ("movedim", "moveaxis"):
        ends = [op.args["source"], op.args["destination"]]
        ends = [end if isinstance(end, (list, tuple)) else [end] for end in ends]
        sources, places = ([d % n for d in end] for end in ends)
        order = [d for d in range(n) if d not in sources]
        for place, source in sorted(zip(places, sources, strict=True)):
            order.insert(place, source)
    else:
        order = list(range(n))
        if n > 1 or op.name == "transpose":
            one, other = {
                "transpose": lambda: (op.args["dim0"], op.args["dim1"]),
                "swapaxes": lambda: (op.args["axis0"], op.args["axis1"]),
                "swapdims": lambda: (op.args["dim0"], op.args["dim1"]),
            }.get(op.name, lambda: (-2, -1))()
            if n:
                order[one % n], order[other % n] = order[other % n], order[one % n]
    return [s.flow.transpose(value, order)]


def _squeeze(s: Walk, op: Op) -> list[Value] | None:
    value = s.value(op.args["self"])
    dims = op.args.get("dim")
    if dims is None:
        dims = list(range(value.ndim))
    dims = [dims] if isinstance(dims, int) else dims
    axes = [d % value.ndim for d in dims if value.ndim and value.shape[d % value.ndim] == 1]
    return [s.flow.squeeze(value, axes)] if axes else [value]


def _unsqueeze(s: Walk, op: Op) -> list[Value] | None:
    value = s.value(op.args["self"])
    order: list[int | None] = list(range(value.ndim))
    order.insert(op.args["dim"] % (value.ndim + 1), None)
    return [s.flow.select_axes(value, order)]


def _expand(s: Walk, op: Op) -> list[Value] | None:
    value, shape = s.value(op.args["self"]), s.shape(op)
    n = len(shape) - value.ndim
    return [s.flow.broadcast(value, shape, range(n, len(shape)))]


def _cat(s: Walk, op: Op) -> list[Value] | None:
    tensors = [x for x in op.args["tensors"] if s.program.avals[x.number].shape != (0,)]
    values = [s.value(x) for x in tensors]
    if len(values) == 1:
        return [values[0]]
    return [s.flow.concatenate(values, op.args.get("dim", 0) % values[0].ndim)]


def _stack(s: Walk, op: Op) -> list[Value] | None:
    value = s.flow.unify([s.value(x) for x in op.args["tensors"]])
    order: list[int | None] = list(range(value.ndim))
    order.insert(op.args.get("dim", 0) % (value.ndim + 1), None)
    found = s.flow.select_axes(value, order)
    return [dataclasses.replace(found, shape=s.shape(op), summed=None)]


def _split(s: Walk, op: Op) -> list[Value] | None:
    value = s.value(op.tensors[0])
    axis = op.args.get("dim", 0) % value.ndim
    found, start = [], 0
    for i in range(len(op.outputs)):
        size = s.shape(op, i)[axis]
        found.append(s.flow.part(value, axis, start, size))
        start = start + size if isinstance(size, int) and isinstance(start, int) else start
    return found


def _unbind(s: Walk, op: Op) -> list[Value] | None:
    value = s.value(op.args["self"])
    axis = op.args.get("dim", 0) % value.ndim
    return [_picked(s, value, axis) for _ in op.outputs]


def _picked(s: Walk, value: Value, axis: int) -> Value:
    s.flow.keep(value, "a position that is picked out", [axis])
    found = s.flow.select_axes(value, [a for a in range(value.ndim) if a != axis])
    return dataclasses.replace(found, summed=None)


def _select(s: Walk, op: Op) -> list[Value] | None:
    value = s.value(op.args["self"])
    return [_picked(s, value, op.args["dim"] % value.ndim)]


def slice_of(op: Op, n: int) -> tuple[int, int]:
    """Returns start and step of a slice of an axis of ``n`` positions."""
    start, step = op.args.get("start") or 0, op.args.get("step", 1)
    start = start if not isinstance(start, Sym) else start.hint
    return min(max(start + n if start < 0 else start, 0), n), step


def _slice(s: Walk, op: Op) -> list[Value] | None:
    value, shape = s.value(op.args["self"]), s.shape(op)
    axis = op.args.get("dim", 0) % value.ndim
    if op.name == "narrow":
        start, step = op.args["start"], 1
        if not isinstance(start, int):
            return None
        start = start % value.shape[axis] if start < 0 else start
    else:
        if value.shape[axis] is shape[axis] or value.shape[axis] == shape[axis]:
            return [value]
        if value.axes[axis] is None:
            return [s.flow.resized(value, axis, shape[axis])]
        start, step = slice_of(op, value.shape[axis])
    return [s.flow.part(value, axis, start, shape[axis], step)]


def _slice_scatter(s: Walk, op: Op) -> list[Value] | None:
    value, source = s.value(op.args["self"]), s.value(op.args["src"])
    axis = op.args.get("dim", 0) % value.ndim
    if op.name == "select_scatter":
        order: list[int | None] = list(range(source.ndim))
        order.insert(axis, None)
        source = s.flow.select_axes(source, order)
    places = scatter_places(op, value.shape[axis], source.shape[axis])
    if places is None:
        return None
    if (places >= value.shape[axis]).all():
        return [s.flow.take(source, axis, places - value.shape[axis])]
    joined = s.flow.concatenate([value, source], axis)
    return [
        s.flow.part(joined, axis, 0, value.shape[axis])
        if joined.axes[axis] is None
        else s.flow.take(joined, axis, places)
    ]


def scatter_places(op: Op, n: Any, size: Any) -> np.ndarray | None:
    """Returns for every position where it comes from in the two tensors behind each other."""
    if not isinstance(n, int) or not isinstance(size, int):
        return None
    places = np.arange(n)
    if op.name == "select_scatter":
        if not isinstance(op.args["index"], int):
            return None
        places[op.args["index"]] = n
    else:
        start, step = slice_of(op, n)
        places[start : start + step * size : step] = n + np.arange(size)
    return places


def _flip(s: Walk, op: Op) -> list[Value] | None:
    value = s.value(op.args["self"])
    dims = {"fliplr": [1], "flipud": [0]}.get(op.name) or op.args["dims"]
    for d in dims:
        axis = d % value.ndim
        if value.axes[axis] is not None:
            value = s.flow.take(value, axis, np.arange(value.shape[axis])[::-1])
    return [value]


def roll_shifts(op: Op, shape: Sequence[Any]) -> list[tuple[int, Any]] | None:
    """Returns by how much every axis is rolled; None where all are rolled as one."""
    if not op.args["dims"]:
        return None
    shifts = op.args["shifts"]
    return [(d % len(shape), k) for d, k in zip(op.args["dims"], shifts, strict=True)]


def _roll(s: Walk, op: Op) -> list[Value] | None:
    value = s.value(op.args["self"])
    shifts = roll_shifts(op, value.shape)
    if shifts is None:
        return None
    for axis, by in shifts:
        if value.axes[axis] is not None:
            if not isinstance(by, int):
                return None
            value = s.flow.take(value, axis, np.roll(np.arange(value.shape[axis]), by))
    return [value]


def _repeat(s: Walk, op: Op) -> list[Value] | None:
    value, shape = s.value(op.args["self"]), s.shape(op)
    times = op.args["repeats" if op.name == "repeat" else "dims"]
    new = len(shape) - value.ndim
    value = s.flow.select_axes(value, [None] * new + list(range(value.ndim)))
    times = [1] * (len(shape) - len(times)) + list(times)
    for axis, k in enumerate(times):
        if isinstance(k, int) and k == 1:
            continue
        if value.axes[axis] is None:
            value = s.flow.resized(value, axis, shape[axis])
        elif isinstance(k, int):
            value = s.flow.take(value, axis, np.tile(np.arange(value.shape[axis]), k))
        else:
            return None
    return [value]


def _repeat_interleave(s: Walk, op: Op) -> list[Value] | None:
    if "self" not in op.args:
        return None
    value = s.value(op.args["self"])
    axis, times = op.args["dim"], op.args["repeats"]
    if axis is None or not isinstance(times, int):
        return None
    axis %= value.ndim
    if value.axes[axis] is None:
        return [s.flow.resized(value, axis, s.shape(op)[axis])]
    return [s.flow.take(value, axis, np.repeat(np.arange(value.shape[axis]), times))]


def pad_widths(op: Op, ndim: int) -> list[tuple[int, int, int]]:
    """Returns the axes that are padded, with how much before and behind."""
    pads = op.args["pad"] if "pad" in op.args else op.args["padding"]
    pairs = [(pads[i], pads[i + 1]) for i in range(0, len(pads), 2)]
    return [(ndim - 1 - i, low, high) for i, (low, high) in enumerate(pairs)]


def _pad(s: Walk, op: Op) -> list[Value] | None:
    value, shape = s.value(op.args["self"]), s.shape(op)
    constant = op.name == "constant_pad_nd" or op.args.get("mode") == "constant"
    widths = pad_widths(op, value.ndim)
    if not constant or not all(isinstance(n, int) for w in widths for n in w):
        axes = [a for a, low, high in widths if not (_is_zero(low) and _is_zero(high))]
        return [s.flow.along_whole(value, axes, shape, "padding")]
    fill = op.args.get("value")
    fill = 0.0 if fill is None else float(fill)
    padded = {a for a, low, high in widths if low or high}
    for axis, low, high in widths:
        if low or high:
            value = s.flow.pad(value, axis, low, high, fill)
    # Padding along one axis also fills positions removed along the others.
    dead = tuple(
        d if (np.asarray(d) == fill).all() or padded <= {a} else UNKNOWN
        for a, d in enumerate(value.dead)
    )
    return [dataclasses.replace(value, shape=shape, dead=dead, leaf=None)]


def _is_zero(n: Any) -> bool:
    return isinstance(n, int) and n == 0


def _zero(dead: Any) -> bool:
    return bool((np.asarray(dead) == 0.0).all())


# Reductions.


def dims_of(op: Op, ndim: int, key: str = "dim") -> list[int]:
    """Returns the axes an operation goes over; all where it names none."""
    dims = op.args.get(key)
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return list(range(ndim))
    return [d % ndim for d in (dims if isinstance(dims, (list, tuple)) else [dims])] if ndim else []


def _kept_dims(s: Walk, value: Value, axes: Sequence[int], keep: Any, ndim: int) -> Value:
    """Returns a reduced value with its axes back as axes of size 1, if ``keep``."""
    if not keep:
        return value
    rest = iter(range(value.ndim))
    return s.flow.select_axes(value, [None if a in set(axes) else next(rest) for a in range(ndim)])


def _sum(s: Walk, op: Op) -> list[Value] | None:
    value = s.value(op.args["self"])
    axes = dims_of(op, value.ndim)
    total = s.flow.reduce_sum(value, axes, s.where("sum"))
    return [_kept_dims(s, total, axes, op.args.get("keepdim"), value.ndim)]


def _mean(s: Walk, op: Op) -> list[Value] | None:
    value = s.value(op.args["self"])
    axes = dims_of(op, value.ndim)
    mean = _mean_over(s, value, axes, "")
    return [_kept_dims(s, mean, axes, op.args.get("keepdim"), value.ndim)]


def _mean_over(s: Walk, value: Value, axes: Sequence[int], part: str, fewer: int = 0) -> Value:
    total = s.flow.reduce_sum(value, axes, s.where(f"{part}sum"))
    n = numel([value.shape[a] for a in axes])
    if n:
        s.flow.scaled_sum(total, n - fewer, s.where(f"{part}mean"))
    return dataclasses.replace(total, summed=None)


def _moments(
    s: Walk, value: Value, axes: Sequence[int], fewer: int = 0, part: str = ""
) -> tuple[Value, Value, Value]:
    """Returns mean, variance and what is left after the mean is taken off, all axes kept."""
    mean = _kept_dims(s, _mean_over(s, value, axes, f"{part}mean "), axes, True, value.ndim)
    centred = s.flow.elementwise("sub", [value, mean], value.shape)
    squares = s.flow.elementwise("square", [centred], value.shape)
    variance = _mean_over(s, squares, axes, f"{part}variance ", fewer)
    return mean, _kept_dims(s, variance, axes, True, value.ndim), centred


def _var(s: Walk, op: Op) -> list[Value] | None:
    value = s.value(op.args["self"])
    axes = dims_of(op, value.ndim)
    correction = op.args.get("correction")
    if "unbiased" in op.args:
        correction = int(op.args["unbiased"])
    correction = 1 if correction is None else correction
    if not isinstance(correction, int):
        return None
    mean, variance, _ = _moments(s, value, axes, correction)
    if "std" in op.name:
        variance = _number(s, math.sqrt, variance, "sqrt")
    found = [variance, mean] if "mean" in op.name else [variance]
    if not op.args.get("keepdim"):
        found = [s.flow.select_axes(v, [a for a in range(v.ndim) if a not in axes]) for v in found]
    return found


def _vector_norm(s: Walk, op: Op) -> list[Value] | None:
    value = s.value(op.args["self"])
    order = op.args.get("ord", op.args.get("p"))
    axes = dims_of(op, value.ndim)
    if order is None:
        order = 2
    if not isinstance(order, (int, float)) or order <= 0 or math.isinf(order):
        return None
    for a in axes:  # zeros add nothing; anything else stays
        _keep_unless_zero(s, value, a, "in a norm, and not zero where it is masked")
    total = s.flow.reduce_sum(value, axes, s.where("sum"))
    root = _number(s, lambda x: 0.0 if x == 0 else math.nan, total, "root")
    return [_kept_dims(s, root, axes, op.args.get("keepdim"), value.ndim)]


def _keep_unless_zero(s: Walk, value: Value, axis: int, reason: str) -> None:
    x = s.flow.atoms.resolve(value.axes[axis])
    if x is not None:
        dead = np.broadcast_to(np.atleast_1d(np.asarray(value.dead[axis], float)), (len(x),))
        if (dead != 0.0).any():
            s.flow.atoms.keep(x[dead != 0.0], reason)


def _reduce_whole(what: str) -> Callable[[Walk, Op], list[Value] | None]:
    def rule(s: Walk, op: Op) -> list[Value] | None:
        if "other" in op.args:  # the maximum of two tensors
            return _elementwise(s, op)
        value = s.value(op.args["self"])
        axes = dims_of(op, value.ndim)
        found = s.flow.reduce_whole(value, axes, what)
        found = _kept_dims(s, found, axes, op.args.get("keepdim"), value.ndim)
        return [found] + [_unknown(found)] * (len(op.outputs) - 1)

    return rule


def _unknown(value: Value) -> Value:
    return dataclasses.replace(value, dead=(UNKNOWN,) * value.ndim, known=None, summed=None)


def _running_sum(s: Walk, op: Op) -> list[Value] | None:
    value = s.value(op.args["self"])
    if not value.ndim:
        return [value]
    return [s.flow.running_sum(value, op.args["dim"] % value.ndim, s.where())]


def _along(what: str, key: str = "dim", linear: bool = True) -> Callable[..., list[Value] | None]:
    def rule(s: Walk, op: Op) -> list[Value] | None:
        value = s.value(op.args["self"])
        axis = op.args.get(key)
        axes = [] if not value.ndim else [(-1 if axis is None else axis) % value.ndim]
        found = []
        for i in range(len(op.outputs)):
            one = s.flow.along_whole(value, axes, s.shape(op, i), what)
            found.append(one if linear and i == 0 else _unknown(one))
        return found

    return rule


def _within(rank: int | None, what: str, linear: bool = True) -> Callable[..., list[Value] | None]:
    """A rule for what happens within the last axes, position by position of the others."""

    def rule(s: Walk, op: Op) -> list[Value] | None:
        value = s.value(op.args["self"] if "self" in op.args else op.args["input"])
        k = rank if rank is not None else value.ndim - 2
        axes = list(range(value.ndim - k, value.ndim))
        found = []
        for i in range(len(op.outputs)):
            one = s.flow.along_whole(value, axes, s.shape(op, i), what)
            found.append(one if linear and i == 0 else _unknown(one))
        return found

    return rule


# Norms.


def _scale(s: Walk, value: Value, weight: Value | None, bias: Value | None) -> Value:
    if weight is not None:
        value = s.flow.elementwise("mul", [value, weight], value.shape)
    if bias is not None:
        value = s.flow.elementwise("add", [value, bias], value.shape)
    return value


def _optional(s: Walk, x: Any) -> Value | None:
    return None if x is None else s.value(x)


def _normalised(s: Walk, centred: Value, variance: Value, eps: float) -> Value:
    inverse = _number(
        s,
        lambda v: 1 / math.sqrt(v + eps) if v + eps > 0 else math.inf,
        variance,
        "inverse deviation",
    )
    return s.flow.elementwise("mul", [centred, inverse], centred.shape)


def _rest(s: Walk, op: Op, value: Value) -> list[Value]:
    """Returns the result, and what else an operation returns, of which nothing is known."""
    return [
        value,
        *(whole(()) if n is None else whole(s.program.avals[n].shape) for n in op.outputs[1:]),
    ]


def _unused(s: Walk, op: Op) -> bool:
    """Whether only the first result of an operation is used."""
    rest = {n for n in op.outputs[1:] if n is not None}
    return not rest or not any(
        v.number in rest for o in s.program.ops[s.index + 1 :] for v in o.tensors
    )


def _layer_norm(s: Walk, op: Op) -> list[Value] | None:
    value = s.value(op.args["input"])
    if not _unused(s, op):
        return None
    axes = list(range(value.ndim - len(op.args["normalized_shape"]), value.ndim))
    _, variance, centred = _moments(s, value, axes)
    found = _normalised(s, centred, variance, op.args["eps"])
    weight, bias = (_optional(s, op.args[k]) for k in ("weight", "bias"))
    return _rest(s, op, _scale(s, found, weight, bias))


def _rms_norm(s: Walk, op: Op) -> list[Value] | None:
    value = s.value(op.args["input"])
    if not _unused(s, op):
        return None
    axes = list(range(value.ndim - len(op.args["normalized_shape"]), value.ndim))
    squares = s.flow.elementwise("square", [value], value.shape)
    mean = _kept_dims(s, _mean_over(s, squares, axes, "square "), axes, True, value.ndim)
    eps = op.args["eps"]
    eps = 1e-7 if eps is None else eps
    found = _normalised(s, value, mean, eps)
    return _rest(s, op, _scale(s, found, _optional(s, op.args["weight"]), None))


def _group_norm(s: Walk, op: Op) -> list[Value] | None:
    value = s.value(op.args["input"])
    groups = op.args.get("num_groups", op.args.get("group"))
    if not _unused(s, op) or not isinstance(groups, int):
        return None
    n, channels, *spatial = value.shape
    split = s.flow.reshape(value, (n, groups, channels // groups, *spatial))
    s.parts[s.index] = split
    _, variance, centred = _moments(s, split, list(range(2, split.ndim)))
    found = s.flow.reshape(_normalised(s, centred, variance, op.args["eps"]), value.shape)
    weight, bias = (_optional(s, op.args[k]) for k in ("weight", "bias"))
    scales = [v and _along_channel(s, v, value.ndim, 1) for v in (weight, bias)]
    return _rest(s, op, _scale(s, found, *scales))


def _batch_norm(s: Walk, op: Op) -> list[Value] | None:
    value = s.value(op.args["input"])
    if not _unused(s, op):
        return None
    weight, bias, mean, variance = (
        (v := _optional(s, op.args.get(k))) and _along_channel(s, v, value.ndim, 1)
        for k in ("weight", "bias", "running_mean", "running_var")
    )
    own = op.args.get("use_input_stats", op.args.get("training", mean is None))
    if own or mean is None or variance is None:
        instance = op.name == "instance_norm"
        axes = [a for a in range(value.ndim) if a > 1 or (a == 0 and not instance)]
        _, variance, centred = _moments(s, value, axes)
    else:
        centred = s.flow.elementwise("sub", [value, mean], value.shape)
    found = _normalised(s, centred, variance, op.args["eps"])
    return _rest(s, op, _scale(s, found, weight, bias))


# Products.


def _shifted(s: Walk, value: Value, bias: Any) -> Value:
    return value if bias is None else s.flow.elementwise("add", [value, s.value(bias)], value.shape)


def _linear(s: Walk, op: Op) -> list[Value] | None:
    x, weight = s.value(op.args["input"]), s.value(op.args["weight"])
    found = s.flow.contract(x, weight, [(x.ndim - 1, weight.ndim - 1)], [], s.where())
    return [_shifted(s, found, op.args["bias"])]


def _matmul(s: Walk, op: Op) -> list[Value] | None:
    left, right = (s.value(v) for v in op.tensors)
    return [_product(s, left, right, s.where())]


def _product(s: Walk, left: Value, right: Value, where: Any) -> Value:
    """Returns a matrix product with numpy's rules for leading axes."""
    flow = s.flow
    row, column = left.ndim == 1, right.ndim == 1
    if row:
        left = flow.select_axes(left, [None, 0])
    if column:
        right = flow.select_axes(right, [0, None])
    if left.ndim > 2 and right.ndim == 2:
        found = flow.contract(left, right, [(left.ndim - 1, 0)], [], where)
    else:
        lead = list(np.broadcast_shapes(*(_sizes(v.shape[:-2]) for v in (left, right))))
        lead = [_true_size(d, (left, right), len(lead)) for d in range(len(lead))]
        left, right = (_led(s, v, lead) for v in (left, right))
        n = len(lead)
        batch = [(d, d) for d in range(n)]
        found = flow.contract(left, right, [(n + 1, n)], batch, where)
    drop = [found.ndim - 2] * row + [found.ndim - 1] * column
    return flow.squeeze(found, drop) if drop else found


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
    return s.flow.broadcast(value, shape, range(len(shape) - value.ndim, len(shape)))


def _addmm(s: Walk, op: Op) -> list[Value] | None:
    keys = {"addmm": ("mat1", "mat2"), "addmv": ("mat", "vec"), "baddbmm": ("batch1", "batch2")}
    left, right = (s.value(op.args[k]) for k in keys[op.name])
    found = _product(s, left, right, s.where())
    bias = s.value(op.args["self"])
    beta = op.args.get("beta", 1)
    if isinstance(beta, (int, float)) and beta == 0:
        return [found]
    return [s.flow.elementwise("add", [found, bias], found.shape)]


def _outer(s: Walk, op: Op) -> list[Value] | None:
    left, right = (s.value(v) for v in op.tensors)
    one, other = s.flow.select_axes(left, [0, None]), s.flow.select_axes(right, [None, 0])
    return [s.flow.elementwise("mul", [one, other], s.shape(op))]


def _bilinear(s: Walk, op: Op) -> list[Value] | None:
    one, other, weight = (s.value(op.args[k]) for k in ("input1", "input2", "weight"))
    found = s.flow.contract(one, weight, [(one.ndim - 1, 1)], [], s.where("first"))
    lead = [(d, d) for d in range(one.ndim - 1)]
    found = s.flow.contract(found, other, [(found.ndim - 1, other.ndim - 1)], lead, s.where())
    return [_shifted(s, found, op.args["bias"])]


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
            values[i] = s.flow.reduce_sum(value, alone, s.where(f"sum {i}"))
            names[i] = "".join(c for c in term if c in others)
    found, order = values[0], names[0]
    for i, (value, term) in enumerate(zip(values[1:], names[1:], strict=True), 1):
        later = "".join(names[i + 1 :]) + result
        shared = [c for c in order if c in term]
        pairs = [(order.index(c), term.index(c)) for c in shared]
        if any(found.shape[a] != value.shape[b] for a, b in pairs):
            return None
        found = s.flow.contract(
            found,
            value,
            [p for p, c in zip(pairs, shared, strict=True) if c not in later],
            [p for p, c in zip(pairs, shared, strict=True) if c in later],
            s.where(str(i) if i > 1 else ""),
        )
        stay = [c for c in shared if c in later]
        order = "".join(stay) + "".join(c for t in (order, term) for c in t if c not in shared)
    return [s.flow.transpose(found, [order.index(c) for c in result])]


def _attention(s: Walk, op: Op) -> list[Value] | None:
    query, key, value = (s.value(op.args[k]) for k in ("query", "key", "value"))
    flow = s.flow
    if op.args.get("enable_gqa") and query.ndim >= 3 and query.shape[-3] != key.shape[-3]:
        times = query.shape[-3] // key.shape[-3]
        key, value = (_repeated(s, v, times) for v in (key, value))
    turned = flow.transpose(key, [*range(key.ndim - 2), key.ndim - 1, key.ndim - 2])
    scores = _product(s, query, turned, s.where("scores"))
    mask = op.args.get("attn_mask")
    if mask is not None:
        scores = flow.elementwise("add_mask", [scores, s.value(mask)], scores.shape)
    flow.keep(scores, "a softmax over it", [scores.ndim - 1])
    flow.keep(scores, "attention by position", [scores.ndim - 2] if op.args["is_causal"] else [])
    shares = _unknown(
        flow.along_whole(scores, [scores.ndim - 1], scores.shape, "a softmax over it")
    )
    return _rest(s, op, _product(s, shares, value, s.where("values")))


def _repeated(s: Walk, value: Value, times: int) -> Value:
    """Returns key or value heads, each as often as query heads share it."""
    axis = value.ndim - 3
    if value.axes[axis] is None:
        return s.flow.resized(value, axis, value.shape[axis] * times)
    shape = list(value.shape)
    shape.insert(axis + 1, times)
    dims = [d for d in range(len(shape)) if d != axis + 1]
    spread = s.flow.broadcast(value, shape, dims)
    del shape[axis + 1]
    shape[axis] = value.shape[axis] * times
    return s.flow.reshape(spread, shape)


def _convolution(s: Walk, op: Op) -> list[Value] | None:
    x, weight = s.value(op.args["input"]), s.value(op.args["weight"])
    rank = weight.ndim - 2
    transposed = "transpose" in op.name or bool(op.args.get("transposed", False))
    alone = x.ndim == rank + 1  # without a batch
    if alone:
        x = s.flow.select_axes(x, [None, *range(x.ndim)])
    shape = (1, *s.shape(op)) if alone else s.shape(op)
    once = weight.leaf is not None and s.uses.get(weight.leaf[0], 0) == 1
    found = s.flow.convolve(
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
    bias = _optional(s, op.args["bias"])
    if bias is not None:
        bias = _along_channel(s, bias, found.ndim, 1)
        found = s.flow.elementwise("add", [found, bias], found.shape)
    return [s.flow.squeeze(found, [0]) if alone else found]


# Picking positions.


def _embedding(s: Walk, op: Op) -> list[Value] | None:
    table, indices = s.value(op.args["weight"]), s.value(op.args["indices"])
    s.flow.keep(table, "looked up by index", [0])
    s.flow.keep(indices, "coordinates")
    if table.origins is not None:
        s.flow.sinks.update(table.origins[0])
        s.flow.sources.update(table.origins[1])
    n = indices.ndim
    origins = None
    if table.origins is not None and indices.origins is not None:
        origins = (*(frozenset(),) * n, table.origins[1])
    return [
        Value(
            s.shape(op),
            (*(None,) * n, table.axes[1]),
            (*(UNKNOWN,) * n, 0.0 if _zero(table.dead[1]) else UNKNOWN),
            None,
            origins,
        )
    ]


def _embedding_bag(s: Walk, op: Op) -> list[Value] | None:
    table = s.value(op.args["weight"])
    s.flow.keep(table, "looked up by index", [0])
    for key in ("indices", "offsets", "per_sample_weights"):
        if isinstance(op.args.get(key), Var):
            s.flow.keep(s.value(op.args[key]), "coordinates")
    if not _unused(s, op):
        return None
    if table.origins is not None:
        s.flow.sinks.update(table.origins[0])
        s.flow.sources.update(table.origins[1])
    dead = (UNKNOWN, 0.0 if _zero(table.dead[1]) else UNKNOWN)
    return _rest(s, op, Value(s.shape(op), (None, table.axes[1]), dead))


def _index_select(s: Walk, op: Op) -> list[Value] | None:
    value = s.value(op.args["self"])
    axis = op.args["dim"] % value.ndim
    places = known_places(s.concrete(op.args["index"]), value.shape[axis])
    if value.axes[axis] is None:
        return [s.flow.resized(value, axis, s.shape(op)[axis])]
    if places is None or places.ndim != 1:
        s.flow.keep(value, "looked up by index", [axis])
        s.flow.keep(s.value(op.args["index"]), "coordinates")
        return [s.flow.resized(value, axis, s.shape(op)[axis])]
    return [s.flow.take(value, axis, places)]


def known_places(known: np.ndarray | None, n: Any) -> np.ndarray | None:
    """Returns positions an index means, or None where they are not known whole numbers."""
    if known is None or known.dtype.kind not in "iu" or not known.size:
        return None
    places = np.where(known < 0, known + n, known).astype(np.int64)
    return places if (places >= 0).all() and (places < n).all() else None


def index_axes(op: Op) -> list[int]:
    """Returns the axes that are indexed by tensors."""
    return [a for a, index in enumerate(op.args["indices"]) if index is not None]


def _index(s: Walk, op: Op) -> list[Value] | None:
    value = s.value(op.args["self"])
    axes, shape = index_axes(op), s.shape(op)
    indices = [op.args["indices"][a] for a in axes]
    values = [s.value(i) for i in indices]
    if any(s.program.avals[i.number].dtype in (torch.bool, torch.uint8) for i in indices):
        return None
    for one in values:
        s.flow.keep(one, "coordinates")
    if len(axes) == 1:
        places = known_places(s.concrete(indices[0]), value.shape[axes[0]])
        if places is not None and places.ndim == 1 and value.axes[axes[0]] is not None:
            return [s.flow.take(value, axes[0], places)]
    s.flow.keep(value, "looked up by index", axes)
    rank = max(v.ndim for v in values)
    rest = [a for a in range(value.ndim) if a not in axes]
    together = axes == list(range(axes[0], axes[0] + len(axes)))
    place = axes[0] if together else 0
    order: list[int | None] = [*rest[:place], *[None] * rank, *rest[place:]]
    if value.origins is not None:
        s.flow.sinks.update(o for a in axes for o in value.origins[a])
        s.flow.sources.update(o for a in rest for o in value.origins[a])
    found = s.flow.select_axes(value, order)
    dead = tuple(
        0.0 if _zero(d) and a is not None else UNKNOWN
        for d, a in zip(found.dead, order, strict=True)
    )
    return [dataclasses.replace(found, shape=shape, dead=dead, leaf=None, summed=None)]


def _gather(s: Walk, op: Op) -> list[Value] | None:
    """Everything along the axis stays; along others, positions face each other."""
    value, index = s.value(op.args["self"]), s.value(op.args["index"])
    axis = op.args["dim"] % value.ndim
    s.flow.keep(value, "looked up by index", [axis])
    s.flow.keep(index, "coordinates", [axis])
    axes: list[Any] = []
    for a in range(value.ndim):
        same = value.shape[a] is index.shape[a] or value.shape[a] == index.shape[a]
        if a != axis and same:
            s.flow.atoms.same(value.axes[a], index.axes[a])
            axes.append(None if value.axes[a] is None else index.axes[a])
        else:
            s.flow.keep(value, "a part whose place is computed", [a])
            s.flow.keep(index, "coordinates", [a])
            axes.append(None)
    dead = tuple(
        0.0 if x is not None and _zero(d) else UNKNOWN
        for x, d in zip(axes, value.dead, strict=True)
    )
    return [Value(index.shape, tuple(axes), dead)]


def _index_put(s: Walk, op: Op) -> list[Value] | None:
    value = s.value(op.args["self"])
    axes = index_axes(op)
    for a in axes:
        index = s.value(op.args["indices"][a])
        s.flow.keep(index, "coordinates")
        if s.program.avals[op.args["indices"][a].number].dtype in (torch.bool, torch.uint8):
            return None
    s.flow.keep(value, "written by index", axes)
    update = s.value(op.args["values"])
    rest = [a for a in range(value.ndim) if a not in axes]
    trailing = rest and rest[-1] == value.ndim - 1 and rest == list(range(len(axes), value.ndim))
    found, dead = list(value.axes), list(value.dead)
    for a in rest:
        u = a - value.ndim + update.ndim
        if trailing and u >= 0 and update.shape[u] == value.shape[a]:
            s.flow.atoms.same(found[a], update.axes[u])
            found[a] = None if update.axes[u] is None else found[a]
            dead[a] = 0.0 if _zero(dead[a]) and _zero(update.dead[u]) else UNKNOWN
        elif trailing and (u < 0 or update.shape[u] == 1) and found[a] is not None:
            dead[a] = UNKNOWN
        else:
            s.flow.keep(value, "written by index", [a])
            s.flow.keep(update, "written by index")
            found[a] = None
    for a in axes:
        found[a] = None
    for u in range(update.ndim - len(rest) if trailing else 0):
        s.flow.keep(update, "written by index", [u])
    return [Value(value.shape, tuple(found), tuple(dead))]


def _scatter(s: Walk, op: Op) -> list[Value] | None:
    for v in op.tensors:
        s.flow.keep(s.value(v), "written by index")
    return [whole(s.shape(op))]


def _unfold(s: Walk, op: Op) -> list[Value] | None:
    value, shape = s.value(op.args["self"]), s.shape(op)
    axis = op.args["dimension"] % max(value.ndim, 1)
    s.flow.keep(value, "a window", [axis])
    order: list[int | None] = [a if a != axis else None for a in range(value.ndim)]
    found = s.flow.select_axes(value, [*order, None])
    dead = tuple(0.0 if _zero(d) else UNKNOWN for d in found.dead)
    return [dataclasses.replace(found, shape=shape, dead=dead, leaf=None, summed=None)]


def _complex(s: Walk, op: Op) -> list[Value] | None:
    """Pairs of real numbers as complex ones, or the other way round."""
    value = s.value(op.args["self"])
    if op.name == "view_as_complex":
        s.flow.keep(value, "two parts of a number", [value.ndim - 1])
        found = s.flow.select_axes(value, range(value.ndim - 1))
    else:
        found = s.flow.select_axes(value, [*range(value.ndim), None])
    dead = tuple(0.0 if _zero(d) else UNKNOWN for d in found.dead)
    return [dataclasses.replace(found, shape=s.shape(op), dead=dead, summed=None)]


def _im2col(s: Walk, op: Op) -> list[Value] | None:
    """Every channel becomes as many neighbouring ones as its window has positions."""
    value, shape = s.value(op.args["self"]), s.shape(op)
    taps = math.prod(op.args["kernel_size"])
    channel = value.ndim - 3
    s.flow.keep(value, "a window", [channel + 1, channel + 2])
    order: list[int | None] = [*range(channel + 1), None, None]
    found = s.flow.select_axes(value, order)
    dead = tuple(0.0 if _zero(d) else UNKNOWN for d in found.dead)
    lead = value.shape[: channel + 1]
    found = dataclasses.replace(found, shape=(*lead, taps, shape[-1]), dead=dead, summed=None)
    return [s.flow.reshape(found, shape)]


def _col2im(s: Walk, op: Op) -> list[Value] | None:
    value, shape = s.value(op.args["self"]), s.shape(op)
    taps = math.prod(op.args["kernel_size"])
    channel = value.ndim - 2
    s.flow.keep(value, "a window", [channel + 1])
    lead = value.shape[:channel]
    split = s.flow.reshape(
        value, (*lead, value.shape[channel] // taps, taps, value.shape[channel + 1])
    )
    s.flow.keep(split, "a window", [channel + 1])
    found = s.flow.select_axes(split, [*range(channel + 1), None, None])
    dead = tuple(0.0 if _zero(d) else UNKNOWN for d in found.dead)
    return [dataclasses.replace(found, shape=shape, dead=dead, summed=None)]


def _pixel_shuffle(s: Walk, op: Op) -> list[Value] | None:
    value, shape = s.value(op.args["self"]), s.shape(op)
    *lead, channels, height, width = value.shape
    n = len(lead)
    if op.name == "pixel_shuffle":
        r = op.args["upscale_factor"]
        split = s.flow.reshape(value, (*lead, channels // r**2, r, r, height, width))
        s.flow.keep(split, "positions of a pixel", range(n + 1, n + 5))
        order = [*range(n), n, n + 3, n + 1, n + 4, n + 2]
    else:
        r = op.args["downscale_factor"]
        s.flow.keep(value, "a spatial axis", [n + 1, n + 2])
        split = s.flow.reshape(value, (*lead, channels, height // r, r, width // r, r))
        order = [*range(n), n, n + 2, n + 4, n + 1, n + 3]
    return [s.flow.reshape(s.flow.transpose(split, order), shape)]


def _channel_shuffle(s: Walk, op: Op) -> list[Value] | None:
    value, groups = s.value(op.args["self"]), op.args["groups"]
    n, channels, *spatial = value.shape
    split = s.flow.reshape(value, (n, groups, channels // groups, *spatial))
    s.parts[s.index] = split
    turned = s.flow.transpose(split, [0, 2, 1, *range(3, split.ndim)])
    return [s.flow.reshape(turned, value.shape)]


def _glu(s: Walk, op: Op) -> list[Value] | None:
    value = s.value(op.args["self"])
    axis = op.args.get("dim", -1) % value.ndim
    n = value.shape[axis] // 2
    one, other = (s.flow.part(value, axis, i * n, n) for i in range(2))
    gate = _number(s, lambda x: 0.5 + 0.5 * math.tanh(x / 2), other, "sigmoid")
    return [s.flow.elementwise("mul", [one, gate], s.shape(op))]


def _grid_sample(s: Walk, op: Op) -> list[Value] | None:
    value, grid = s.value(op.args["input"]), s.value(op.args["grid"])
    s.flow.keep(grid, "coordinates")
    return [s.flow.along_whole(value, range(2, value.ndim), s.shape(op), "sampled at coordinates")]


def _source(s: Walk, op: Op) -> list[Value] | None:
    fill = {
        "zeros": 0.0,
        "new_zeros": 0.0,
        "zeros_like": 0.0,
        "ones": 1.0,
        "new_ones": 1.0,
        "ones_like": 1.0,
    }.get(op.name, op.args.get("fill_value"))
    if op.name in ("scalar_tensor",):
        fill = op.args["s"]
    known = np.asarray(float(fill)) if isinstance(fill, (int, float)) else None
    return [s.flow.constant(s.shape(op), known)]


def _fill(s: Walk, op: Op) -> list[Value] | None:
    """A tensor overwritten with one number."""
    value = op.args.get("value", 0)
    if isinstance(value, (int, float)):
        return [s.flow.constant(s.shape(op), np.asarray(float(value)))]
    return [s.flow.broadcast(s.value(value), s.shape(op), [])]


# Recurrence.


def _recurrent(s: Walk, op: Op) -> list[Value] | None:
    """Returns what a stack of recurrent layers gives: hidden units of all layers go together."""
    if "params" not in op.args or "hx" not in op.args or "data" in op.args:
        return None
    gates = {"lstm": 4, "gru": 3}.get(op.name, 1)
    states = op.args["hx"] if isinstance(op.args["hx"], list) else [op.args["hx"]]
    values = [s.value(x) for x in states]
    hidden = values[0].shape[2]
    biased, layers = op.args["has_biases"], op.args["num_layers"]
    directions = 2 if op.args["bidirectional"] else 1
    params = [s.value(v) for v in op.args["params"]]
    per = len(params) // (layers * directions)
    if per != (4 if biased else 2) or any(v.shape[2] != hidden for v in values):
        return None  # with a projection
    flow = s.flow
    value = s.value(op.args["input"])
    feature = value.ndim - 1
    units = params[1].axes[1]  # columns of the first recurrence
    for v in values:
        flow.atoms.same(v.axes[2], units, "hidden units of a recurrence")
        flow.keep(v, "layers of a recurrence", [0, 1])
        _keep_unless_zero(s, v, 2, "a state that is not zero where it is masked")
    for axis in range(feature):
        flow.keep(value, "steps of a recurrence", [axis])
    for i in range(layers * directions):
        if i and i % directions == 0:
            value = _hidden(s, value, units, hidden, directions)
        weight, inner, *biases = params[i * per : (i + 1) * per]
        steps = math.prod(n for n in value.shape[:feature] if isinstance(n, int))
        lead = dataclasses.replace(
            value,
            shape=(steps, value.shape[feature]),
            axes=(None, value.axes[feature]),
            origins=None,
            dead=(UNKNOWN, value.dead[feature]),
        )
        flow.contract(lead, weight, [(1, 1)], [], s.where(f"input {i}"))
        state = Value((steps, hidden), (None, units), (UNKNOWN, 0.0))
        flow.contract(state, inner, [(1, 1)], [], s.where(f"state {i}"))
        for v in (weight, inner, *biases):
            rows = flow.split_axis(v, 0, (gates, hidden), "gates of a recurrence")
            flow.atoms.keep(rows[0], "gates of a recurrence")
            flow.atoms.same(rows[1], units, "hidden units of a recurrence")
    found = _hidden(s, value, units, hidden, directions)
    out = dataclasses.replace(found, shape=s.shape(op))
    last = [
        Value(s.shape(op, i), (None, None, units), (UNKNOWN, UNKNOWN, 0.0))
        for i in range(1, len(op.outputs))
    ]
    return [out, *last]


def _hidden(s: Walk, value: Value, units: Any, hidden: int, directions: int) -> Value:
    one = Value(
        (*value.shape[:-1], hidden),
        (*(None,) * (value.ndim - 1), units),
        (*(UNKNOWN,) * (value.ndim - 1), 0.0),
    )
    return s.flow.concatenate([one] * directions, value.ndim - 1) if directions > 1 else one


Rule = Callable[[Walk, Op], "list[Value] | None"]


def _table() -> dict[str, Rule]:
    rules: dict[str, Rule] = dict.fromkeys([*ELEMENTWISE, *NAMED], _elementwise)
    rules |= dict.fromkeys(IDENTITY, _identity)

    def add(rule: Rule, names: str) -> None:
        rules.update(dict.fromkeys(names.split(), rule))

    add(_where, "where")
    add(_masked_fill, "masked_fill")
    add(_copy, "copy")
    add(_prelu, "prelu _prelu_kernel")
    add(
        _reshape,
        "view reshape _unsafe_view flatten unflatten view_as reshape_as _reshape_alias"
        " view_copy ravel",
    )
    add(_permute, "permute transpose t movedim moveaxis swapaxes swapdims mT numpy_T")
    add(_squeeze, "squeeze")
    add(_unsqueeze, "unsqueeze")
    add(_expand, "expand expand_as broadcast_to expand_copy")
    add(_cat, "cat concat concatenate")
    add(_stack, "stack")
    add(_split, "split split_with_sizes chunk unsafe_split unsafe_chunk split_with_sizes_copy")
    add(_unbind, "unbind")
    add(_select, "select")
    add(_slice, "slice narrow")
    add(_slice_scatter, "slice_scatter select_scatter")
    add(_flip, "flip fliplr flipud")
    add(_roll, "roll")
    add(_repeat, "repeat tile")
    add(_repeat_interleave, "repeat_interleave")
    add(
        _pad,
        "pad constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d"
        " replication_pad1d replication_pad2d replication_pad3d",
    )
    add(_sum, "sum")
    add(_mean, "mean")
    add(_var, "var std var_mean std_mean")
    add(_vector_norm, "linalg_vector_norm norm")
    for what, names in {
        "a maximum over it": "amax max",
        "a minimum over it": "amin min",
        "a product over it": "prod",
        "any over it": "any all",
        "an index of the greatest": "argmax argmin",
        "a sum of exponentials over it": "logsumexp",
        "a median over it": "median nanmedian mode",
    }.items():
        add(_reduce_whole(what), names)
    add(_running_sum, "cumsum")
    add(
        _along("a softmax over it", linear=False),
        "softmax _softmax log_softmax _log_softmax _safe_softmax softmin",
    )
    add(_along("a running product", linear=False), "cumprod cummax cummin logcumsumexp")
    add(_along("a difference"), "diff")
    add(_along("a sort", linear=False), "sort topk argsort kthvalue")
    for rank in (1, 2, 3):
        for names in (
            "max_pool{}d",
            "max_pool{}d_with_indices",
            "avg_pool{}d",
            "adaptive_avg_pool{}d",
            "_adaptive_avg_pool{}d",
            "adaptive_max_pool{}d",
        ):
            add(_within(rank, "a window"), names.format(rank))
    add(
        _within(None, "a resized axis"),
        "upsample_nearest1d upsample_nearest2d upsample_nearest3d "
        "upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d "
        "_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_bilinear2d_aa "
        "_upsample_bicubic2d_aa",
    )
    add(_within(2, "a triangle"), "tril triu")
    add(_layer_norm, "layer_norm native_layer_norm")
    add(_rms_norm, "rms_norm _fused_rms_norm")
    add(_group_norm, "group_norm")
    add(
        _batch_norm,
        "batch_norm instance_norm _native_batch_norm_legit_no_training "
        "_native_batch_norm_legit native_batch_norm cudnn_batch_norm",
    )
    add(_linear, "linear")
    add(_matmul, "matmul mm bmm mv dot inner")
    add(_addmm, "addmm addmv baddbmm")
    add(_outer, "outer ger")
    add(_bilinear, "bilinear")
    add(_einsum, "einsum")
    add(_attention, "scaled_dot_product_attention")
    add(
        _convolution,
        "convolution conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d",
    )
    add(_embedding, "embedding")
    add(_embedding_bag, "embedding_bag _embedding_bag _embedding_bag_forward_only")
    add(_index_select, "index_select")
    add(_index, "index")
    add(_gather, "gather")
    add(_index_put, "index_put _unsafe_index_put")
    add(
        _scatter,
        "scatter scatter_add scatter_reduce index_add index_copy index_fill masked_scatter",
    )
    add(_unfold, "unfold")
    add(_complex, "view_as_complex view_as_real")
    add(_im2col, "im2col")
    add(_col2im, "col2im")
    add(_pixel_shuffle, "pixel_shuffle pixel_unshuffle")
    add(_channel_shuffle, "channel_shuffle native_channel_shuffle")
    add(_glu, "glu")
    add(_grid_sample, "grid_sampler grid_sampler_2d grid_sampler_3d")
    add(
        _source,
        "zeros ones full empty new_zeros new_ones new_full new_empty zeros_like ones_like "
        "full_like empty_like arange linspace scalar_tensor eye tril_indices triu_indices "
        "hann_window hamming_window",
    )
    add(_fill, "fill zero")
    add(_recurrent, "lstm gru rnn_tanh rnn_relu")
    return rules


RULES: dict[str, Rule] = _table()

#: Operators that make tensors from sizes alone.
SOURCES = frozenset(name for name, rule in RULES.items() if rule is _source)

#: Operations through which the shrunk program can compute what removed positions would hold.
GHOSTS = frozenset(
    name
    for name, rule in RULES.items()
    if rule
    in (
        _elementwise,
        _identity,
        _where,
        _masked_fill,
        _reshape,
        _permute,
        _squeeze,
        _unsqueeze,
        _expand,
        _copy,
    )
)


@functools.cache
def known_operators() -> frozenset[str]:
    """Returns the names of all operators that need no decomposition."""
    return frozenset(RULES) | {
        "sym_size",
        "sym_numel",
        "sym_stride",
        "item",
        "_local_scalar_dense",
        "_assert_tensor_metadata",
        "_assert_async",
        "_assert_scalar",
        "sym_constrain_range",
        "sym_constrain_range_for_size",
        "bernoulli",
        "rand",
        "randn",
        "rand_like",
        "randn_like",
        "randint",
    }


def leaf_uses(program: Program) -> dict[str, int]:
    """Returns how often each leaf is used, apart from conversions and reordered axes."""
    readers: dict[int, list[Op]] = {}
    for op in program.ops:
        for v in op.tensors:
            readers.setdefault(v.number, []).append(op)
    outputs = [v.number for v in program.outputs if isinstance(v, Var)]

    def uses(number: int) -> int:
        total = outputs.count(number)
        for op in readers.get(number, ()):
            out = op.outputs[0] if op.name in PASSING else None
            total += uses(out) if out is not None else 1
        return total

    return {path: uses(number) for number, path in program.leaves.items()}


__all__ = ["GHOSTS", "RULES", "SOURCES", "Walk", "known_operators", "leaf_uses", "walk"]
