"""Variables of a jaxpr that depend on constants alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from purepruning.jaxpr.internals import bind
from purepruning.jaxpr.program import Op, Program


def concrete(program: Program, number: int, limit: int = 1 << 20) -> np.ndarray | None:
    """Returns the array a variable is, if it depends on constants only and is not large.

    What moves numbers, counts or compares is computed by NumPy, since XLA would compile it for
    every shape; functions that round are left to XLA, so that indices made of them are the same.
    """
    if number in program.constants:
        return np.asarray(program.constants[number])
    if number not in program.folded:
        program.folded[number] = _folded(program, number, limit)
    return program.folded[number]


def _folded(program: Program, number: int, limit: int) -> np.ndarray | None:
    makers = program.makers
    memory: dict[int, Any] = dict(program.constants)
    memory |= {n: x for n, x in program.folded.items() if x is not None}

    def known(n: int) -> bool:
        stack, seen = [n], set()
        while stack:
            n = stack.pop()
            if n in memory or n in seen:
                continue
            seen.add(n)
            if n not in makers or makers[n].inner:
                return False
            shape = program.avals[n].shape
            if not all(isinstance(k, int) for k in shape) or math.prod(shape) > limit:
                return False
            stack += makers[n].inputs
        return True

    def evaluate(n: int) -> Any:
        if n not in memory:
            op = makers[n]
            arrays = [evaluate(i) for i in op.inputs]
            memory.update(zip(op.outputs, _run(program, op, arrays), strict=True))
        return memory[n]

    if not known(number):
        return None
    with jax.ensure_compile_time_eval():
        try:
            return np.asarray(evaluate(number))
        except Exception:  # a key, or a primitive that cannot run alone: not a constant to us
            return None


def _run(program: Program, op: Op, arrays: Sequence[Any]) -> Sequence[Any]:
    """Returns the results of an operation on known arrays."""
    avals = [program.avals[n] for n in (*op.inputs, *op.outputs)]
    if op.name in _BY_NUMPY and all(_plain(aval.dtype) for aval in avals):
        with np.errstate(all="ignore"):
            found = _BY_NUMPY[op.name](op.params, *map(np.asarray, arrays))
        if found is not None:
            return [np.asarray(found, avals[-1].dtype)]
    found = bind(op.primitive, [jnp.asarray(x) for x in arrays], op.params)
    return found if op.primitive.multiple_results else [found]


def _plain(dtype: Any) -> bool:
    """Whether NumPy computes with a dtype as XLA does: integers, booleans, float32, float64."""
    return not jnp.issubdtype(dtype, jax.dtypes.extended) and np.dtype(dtype).kind + str(
        np.dtype(dtype).itemsize
    ) in {"b1", "f4", "f8", *(f"{k}{n}" for k in "iu" for n in (1, 2, 4, 8))}


def _iota(p: Mapping[str, Any]) -> np.ndarray:
    shape, d = p["shape"], p["dimension"]
    line = np.arange(shape[d]).reshape([-1 if a == d else 1 for a in range(len(shape))])
    return np.broadcast_to(line, shape)


def _broadcast(p: Mapping[str, Any], x: np.ndarray) -> np.ndarray:
    shape = [1] * len(p["shape"])
    for a, d in enumerate(p["broadcast_dimensions"]):
        shape[d] = x.shape[a]
    return np.broadcast_to(x.reshape(shape), p["shape"])


def _convert(p: Mapping[str, Any], x: np.ndarray) -> np.ndarray | None:
    new = np.dtype(p["new_dtype"])
    if x.dtype.kind == "f" and new.kind in "iu":
        # Out of range XLA clips, where NumPy wraps around.
        low, high = np.iinfo(new).min, np.iinfo(new).max
        if not ((x >= low) & (x < high)).all():
            return None
    return x.astype(new)


def _select(p: Mapping[str, Any], which: np.ndarray, *cases: np.ndarray) -> np.ndarray:
    return np.choose(np.broadcast_to(which, cases[0].shape).astype(np.int64), cases)


def _slice(p: Mapping[str, Any], x: np.ndarray) -> np.ndarray:
    strides = p["strides"] or (1,) * x.ndim
    ends = zip(p["start_indices"], p["limit_indices"], strides, strict=True)
    return x[tuple(slice(*end) for end in ends)]


def _reshape(p: Mapping[str, Any], x: np.ndarray) -> np.ndarray:
    order = p.get("dimensions")
    return (x if order is None else x.transpose(order)).reshape(p["new_sizes"])


def _quotient(p: Mapping[str, Any], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    if x.dtype.kind == "f":
        return np.divide(x, y)
    return (x - _remainder(p, x, y)) // y  # towards zero


def _remainder(p: Mapping[str, Any], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    if x.dtype.kind != "f" and not y.all():
        raise ZeroDivisionError
    return np.fmod(x, y)


def _plainly(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda p, *xs: function(*xs)


#: Primitives that NumPy computes exactly as XLA does, from their parameters and operands.
_BY_NUMPY: dict[str, Callable[..., Any]] = {
    "iota": _iota,
    "broadcast_in_dim": _broadcast,
    "convert_element_type": _convert,
    "select_n": _select,
    "slice": _slice,
    "reshape": _reshape,
    "squeeze": lambda p, x: np.squeeze(x, tuple(p["dimensions"])),
    "expand_dims": lambda p, x: np.expand_dims(x, tuple(p["dimensions"])),
    "transpose": lambda p, x: np.transpose(x, p["permutation"]),
    "rev": lambda p, x: np.flip(x, p["dimensions"]),
    "concatenate": lambda p, *xs: np.concatenate(xs, p["dimension"]),
    "div": _quotient,
    "rem": _remainder,
    "copy": _plainly(np.asarray),
    "stop_gradient": _plainly(np.asarray),
    "clamp": _plainly(lambda low, x, high: np.minimum(np.maximum(x, low), high)),
    **{
        name: _plainly(function)
        for name, function in {
            "add": np.add,
            "sub": np.subtract,
            "mul": np.multiply,
            "max": np.maximum,
            "min": np.minimum,
            "neg": np.negative,
            "abs": np.abs,
            "sign": np.sign,
            "floor": np.floor,
            "ceil": np.ceil,
            "eq": np.equal,
            "ne": np.not_equal,
            "lt": np.less,
            "le": np.less_equal,
            "gt": np.greater,
            "ge": np.greater_equal,
            "and": np.bitwise_and,
            "or": np.bitwise_or,
            "xor": np.bitwise_xor,
            "not": np.invert,
        }.items()
    },
}
