"""How atoms flow through element-wise operators."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from purepruning.coupling import reductions, shapes
from purepruning.coupling.removed_values import UNKNOWN
from purepruning.coupling.value import Value, numbers_as_uniform, whole
from purepruning_interop.torch.operators import ELEMENTWISE, IDENTITY, NAMED, PASSING
from purepruning_interop.torch.program import Op, Sym, Var
from purepruning_interop.torch.walk import Walk, rules_of


# Element by element.
def elementwise(s: Walk, op: Op) -> list[Value] | None:
    """Returns the result of an operator that works element by element."""
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
        reductions.scaled_sum(s.flow, value, factor if name == "div" else 1 / factor, s.where())
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
        value = dataclasses.replace(numbers_as_uniform(value), known=None)
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
    return [shapes.broadcast(s.flow, source, shape, range(n, len(shape)))]


def _prelu(s: Walk, op: Op) -> list[Value] | None:
    x, weight = s.value(op.args["self"]), s.value(op.args["weight"])
    if op.name == "prelu" and weight.ndim == 1 and x.ndim > 1 and weight.shape[0] != 1:
        weight = along_channel(s, weight, x.ndim, 1)
    keep = _function_of(lambda a, w: a if a > 0 else a * w)
    return [s.flow.elementwise("prelu", [x, weight], s.shape(op), s.where(), keep)]


def _function_of(f: Callable[..., float]) -> Callable[..., float]:
    return lambda *numbers: f(*(float(n) for n in numbers))


def along_channel(s: Walk, value: Value, ndim: int, axis: int) -> Value:
    """Returns a vector as an array that broadcasts along one axis."""
    order: list[int | None] = [None] * ndim
    order[axis] = 0
    return shapes.select_axes(s.flow, value, order)


def number(s: Walk, f: Callable[[float], float], value: Value, name: str) -> Value:
    """Returns a function of numbers applied to a value, under a name of its own."""
    return s.flow.elementwise(name, [value], value.shape, None, _function_of(f))


def _drawn_like(s: Walk, op: Op) -> list[Value] | None:
    """Random numbers, one for each position of a tensor."""
    x = s.value(op.tensors[0])
    return [Value(x.shape, x.axes, (UNKNOWN,) * x.ndim)]


def _fake_quantize(s: Walk, op: Op) -> list[Value] | None:
    """Rounded to a grid in which zero stays zero, of one scale or one for each channel."""
    x, *grid = (s.value(op.args[k]) for k in ("self", "scale", "zero_point"))
    if "axis" in op.args:
        grid = [along_channel(s, v, x.ndim, op.args["axis"] % x.ndim) for v in grid]
    value = _rounded(s, op, [x, *grid])
    return [value, *(whole(s.shape(op, i)) for i in range(1, len(op.outputs)))]


def _observed_fake_quantize(s: Walk, op: Op) -> list[Value] | None:
    """The same by ranges that are observed, which contain zero: pruned zeros do not change them."""
    x, *ranges = (s.value(op.args[k]) for k in ("self", *OBSERVED))
    operands = [x]
    if op.args["per_row_fake_quant"]:
        operands += [along_channel(s, v, x.ndim, op.args["ch_axis"] % x.ndim) for v in ranges]
    mask = [whole(s.shape(op, 1))] if len(op.outputs) > 1 else []
    return [_rounded(s, op, operands), *mask, *(ranges if len(op.outputs) > 2 else ())]


#: What an operator that observes ranges reads, and puts out again.
OBSERVED = ("running_min", "running_max", "scale", "zero_point")


def _rounded(s: Walk, op: Op, operands: list[Value]) -> Value:
    x, *grid = operands
    # Whatever the grid is at removed positions, a zero stays zero.
    grid = [dataclasses.replace(v, at_removed=(0.0,) * v.ndim, known=None) for v in grid]
    keep_zero = _function_of(lambda x, *_: 0.0 if x == 0 else UNKNOWN)
    return s.flow.elementwise("fake quantise", [x, *grid], s.shape(op), s.where(), keep_zero)


RULES = rules_of(
    (elementwise, " ".join([*ELEMENTWISE, *NAMED])),
    (_identity, " ".join(IDENTITY)),
    (_where, "where"),
    (_masked_fill, "masked_fill"),
    (_copy, "copy"),
    (_prelu, "prelu _prelu_kernel"),
    (_drawn_like, "rand_like randn_like randint_like bernoulli"),
    (
        _fake_quantize,
        "fake_quantize_per_tensor_affine fake_quantize_per_channel_affine "
        "fake_quantize_per_tensor_affine_cachemask fake_quantize_per_channel_affine_cachemask",
    ),
    (
        _observed_fake_quantize,
        "fused_moving_avg_obs_fake_quant _fused_moving_avg_obs_fq_helper "
        "_fused_moving_avg_obs_fq_helper_functional",
    ),
)

#: Those through which the shrunk program can compute what removed positions would hold.
RECOMPUTED = frozenset(
    name
    for name, rule in RULES.items()
    if rule in (elementwise, _identity, _where, _masked_fill, _copy)
)
