"""Activation functions in a JAX program: they have no module, and are found by name or pattern.

The calls of each are counted in the order of the program: ``"relu1"``, ``"relu2"``, ``"relu6_1"``.
Functions of ``jax.nn`` leave their names in it. A ReLU that a model writes out, as
``jnp.maximum(x, 0)``, ``jnp.where(x > 0, x, 0)`` or ``x * (x > 0)``, is known by what it computes,
and so is a GELU, exact or by tanh, which ``jax.nn.gelu`` writes out too; anything else in
arithmetic is no activation function here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from purepruning.jaxpr.internals import Jaxpr, JaxprEqn, Literal, inner_jaxprs
from purepruning.layers import Activation

#: Functions of ``jax.nn`` and primitives, and the canonical op types of what they compute.
ACTIVATIONS = {
    "relu": "ReLU",
    "relu6": "ReLU6",
    "leaky_relu": "LeakyReLU",
    "elu": "ELU",
    "celu": "CELU",
    "selu": "SELU",
    "gelu": "GELU",
    "silu": "SiLU",
    "mish": "Mish",
    "tanh": "Tanh",
    "hard_tanh": "Hardtanh",
    "logistic": "Sigmoid",
    "hard_sigmoid": "Hardsigmoid",
    "hard_silu": "Hardswish",
    "softplus": "Softplus",
    "log_sigmoid": "LogSigmoid",
    "soft_sign": "Softsign",
}


class Call(NamedTuple):
    """An equation that is a call of an activation function.

    Attributes:
        function: its name, one of :data:`ACTIVATIONS`.
        operand: which operand is its argument; None where it is part of other equations too.
    """

    function: str
    operand: int | None


def calls_in(jaxpr: Jaxpr) -> list[Call | None]:
    """Returns for every equation of a jaxpr the call that it is, or None.

    Linen's nn.scan leaves calls behind whose result is not used; they are none.
    """
    made_by = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
    calls: list[Call | None] = []
    for eqn in jaxpr.eqns:
        unused = all(type(v).__name__ == "DropVar" for v in eqn.outvars)
        calls.append(None if unused else _named(eqn) or _written_out(eqn, made_by))
    for i, call in enumerate(calls):
        if call is not None and call.function == "relu" and _is_variance(jaxpr, i):
            calls[i] = None
    for i, inside in _gelus(jaxpr, made_by).items():
        for j, eqn in enumerate(jaxpr.eqns):
            if any(eqn is part for part in inside):
                calls[j] = None
        calls[i] = Call("gelu", None)
    return calls


def _named(eqn: JaxprEqn) -> Call | None:
    """Returns the call of a function of ``jax.nn``, or of a primitive."""
    name = _name(eqn)
    if eqn.primitive.name == "custom_jvp_call":
        inner = next(inner_jaxprs(eqn.params), None)
        name = inner.eqns[0].params.get("name") if inner and len(inner.eqns) == 1 else None
    return Call(name, 0) if isinstance(name, str) and name in ACTIVATIONS else None


def _written_out(eqn: JaxprEqn, made_by: Mapping[Any, JaxprEqn]) -> Call | None:
    """Returns the call of a ReLU, or a ReLU6, that the arithmetic of an equation is."""
    result: Any = eqn.outvars[0].aval
    if not jnp.issubdtype(getattr(result, "dtype", int), jnp.floating):
        return None
    operands = eqn.invars

    def is_(v: Any, number: float) -> bool:
        if isinstance(v, Literal):
            return bool(v.val == number)
        made = made_by.get(v)
        if made is None or made.primitive.name not in ("broadcast_in_dim", _CONVERT):
            return False
        return is_(made.invars[0], number)

    def is_sign_of(condition: Any, x: Any, names: tuple[str, str]) -> bool:
        made = None if isinstance(condition, Literal) else made_by.get(condition)
        if made is None or made.primitive.name not in names:
            return False
        return made.invars[0] is x and is_(made.invars[1], 0)

    match _name(eqn):
        case "max" | "maximum" if _made_of(eqn, "max", operands=2):
            zeros = [i for i, v in enumerate(operands) if is_(v, 0)]
            return Call("relu", 1 - zeros[0]) if len(zeros) == 1 else None
        case "clip" if _made_of(eqn, "max", operands=2) and is_(operands[1], 0):
            return Call("relu", 0)
        case "clip" if _made_of(eqn, "max", "min", operands=3):
            both = is_(operands[1], 0) and is_(operands[2], 6)
            return Call("relu6", 0) if both else None
        case "clamp" if is_(operands[0], 0) and is_(operands[2], 6):
            return Call("relu6", 1)
        case "_where" | "select_n" as name if _made_of(eqn, "select_n", operands=3):
            condition, yes, no = operands if name == "_where" else (operands[i] for i in (0, 2, 1))
            for x, zero, names in ((yes, no, ("gt", "ge")), (no, yes, ("lt", "le"))):
                if is_(zero, 0) and is_sign_of(condition, x, names):
                    return Call("relu", None)
        case "mul" if _made_of(eqn, "mul", operands=2):
            for x, factor in (operands, operands[::-1]):
                made = None if isinstance(factor, Literal) else made_by.get(factor)
                converted = made is not None and made.primitive.name == _CONVERT
                if made and converted and is_sign_of(made.invars[0], x, ("gt", "ge")):
                    return Call("relu", None)
    return None


_CONVERT = "convert_element_type"


def _made_of(eqn: JaxprEqn, *names: str, operands: int) -> bool:
    """Whether an equation is one of these primitives, or a jitted function of all of them alone.

    Functions of a model may have any name, and other numbers of operands.
    """
    inner = {e.primitive.name for j in inner_jaxprs(eqn.params) for e in j.eqns}
    inner = inner - {_CONVERT, "broadcast_in_dim"} or {eqn.primitive.name}
    return len(eqn.invars) == operands and inner == set(names)


# GELUs. The arithmetic behind a tanh or an error function is computed at a few points.

_ERRORS: dict[str, Callable[..., Any]] = {
    "tanh": np.tanh,
    "erf": np.vectorize(math.erf),
    "erfc": np.vectorize(math.erfc),
}
_ARITHMETIC: dict[str, Callable[..., Any]] = {
    **_ERRORS,
    "mul": np.multiply,
    "add": np.add,
    "sub": np.subtract,
    "div": np.divide,
    "neg": np.negative,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "pow": np.power,
    "square": np.square,
    "integer_pow": np.power,
    "copy": np.positive,
    "broadcast_in_dim": np.positive,  # of numbers alone
    _CONVERT: np.positive,
}
#: Between -6 and 6, where the exact GELU and that by tanh differ by 5e-4 at most.
_POINTS = np.linspace(-6, 6, 25)
_GELU = _POINTS * (1 + np.vectorize(math.erf)(_POINTS / math.sqrt(2))) / 2
#: More equations than any way to write a GELU has.
_MOST = 24


def _gelus(jaxpr: Jaxpr, made_by: Mapping[Any, JaxprEqn]) -> dict[int, list[JaxprEqn]]:
    """Returns the equations whose results are GELUs, by index, and those that are part of each."""
    if not any(eqn.primitive.name in _ERRORS for eqn in jaxpr.eqns):
        return {}
    found: dict[int, list[JaxprEqn]] = {}
    for i, eqn in enumerate(jaxpr.eqns):
        if eqn.primitive.name in ("mul", "div"):
            for x in _factors(eqn, made_by):
                inside = _inside(eqn, x, made_by)
                if inside and np.abs(_computed(inside, x) - _GELU).max() < 1e-3:
                    found[i] = inside
                    break
    return found


def _factors(eqn: JaxprEqn, made_by: Mapping[Any, JaxprEqn], depth: int = 3) -> Iterator[Any]:
    """Yields what a product is a product of, and what these are: one may be the argument."""
    result: Any = eqn.outvars[0].aval
    for v in eqn.invars:
        of: Any = v.aval
        if isinstance(v, Literal) or of.shape != result.shape:
            continue
        yield v
        made = made_by.get(v)
        if made is not None and depth and made.primitive.name in ("mul", "div", "copy"):
            yield from _factors(made, made_by, depth - 1)


def _inside(eqn: JaxprEqn, x: Any, made_by: Mapping[Any, JaxprEqn]) -> list[JaxprEqn]:
    """Returns the equations, in order, that compute the result of one from ``x`` and numbers.

    There are none where it is computed from anything else, or without an error function.
    """
    found: list[JaxprEqn] = []

    def look(eqn: JaxprEqn) -> bool:
        if any(eqn is part for part in found):
            return True
        if eqn.primitive.name not in _ARITHMETIC or len(found) > _MOST:
            return False
        for v in eqn.invars:
            if v is x or isinstance(v, Literal):
                continue
            if v not in made_by or not look(made_by[v]):
                return False
        found.append(eqn)
        return True

    return found if look(eqn) and any(e.primitive.name in _ERRORS for e in found) else []


def _computed(inside: list[JaxprEqn], x: Any) -> Any:
    """Returns the result of the last of some equations at the points, for ``x``."""
    values: dict[Any, Any] = {x: _POINTS}
    with np.errstate(all="ignore"):
        for eqn in inside:
            of = [v.val if isinstance(v, Literal) else values[v] for v in eqn.invars]
            of = [np.asarray(value, np.float64) for value in of]
            if eqn.primitive.name == "integer_pow":
                of.append(np.asarray(float(eqn.params["y"])))
            values[eqn.outvars[0]] = _ARITHMETIC[eqn.primitive.name](*of)
    return np.nan_to_num(values[inside[-1].outvars[0]], nan=np.inf)


#: What stands between a variance and its root: other shapes and dtypes, and a small number.
_BEFORE_ROOTS = ("broadcast_in_dim", "reshape", "squeeze", "expand_dims", "transpose", _CONVERT)


def _is_variance(jaxpr: Jaxpr, index: int) -> bool:
    """Whether the root of an equation's result is taken: norms keep variances from being negative.

    Flax and Equinox compute them as ``max(0, mean(x**2) - mean(x)**2)``.
    """
    same = set(jaxpr.eqns[index].outvars)
    for eqn in jaxpr.eqns[index + 1 :]:
        if not any(not isinstance(v, Literal) and v in same for v in eqn.invars):
            continue
        name = eqn.primitive.name
        if name in ("rsqrt", "sqrt"):
            return True
        literal = any(isinstance(v, Literal) for v in eqn.invars)
        if name in _BEFORE_ROOTS or (name == "add" and literal):
            same.update(eqn.outvars)
    return False


def _name(eqn: JaxprEqn) -> Any:
    return eqn.params.get("name", eqn.primitive.name)


def activation_name(function: str, number: int) -> str:
    """Returns what the ``number``-th call of a function is called: ``"relu1"``, ``"relu6_1"``."""
    return f"{function}_{number}" if function[-1].isdigit() else f"{function}{number}"


def is_activation(name: str) -> bool:
    """Whether a name is what :func:`activation_name` makes."""
    function = name.rstrip("0123456789").removesuffix("_")
    return name not in ACTIVATIONS and (function in ACTIVATIONS or name.startswith("relu6_"))


def with_activations(names: Iterable[str], known: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what names stand for, activation functions among them for themselves."""
    return {name: name for name in names if is_activation(name)} | dict(known)


def calls_of_activations(jaxpr: Jaxpr) -> Counter[str]:
    """Returns how often a jaxpr calls each activation function."""
    found: Counter[str] = Counter()
    for eqn, call in zip(jaxpr.eqns, calls_in(jaxpr), strict=True):
        if call is not None:
            found[call.function] += 1
            continue
        for inner in inner_jaxprs(eqn.params):
            found += calls_of_activations(inner)
    return found


def activation_rows(jaxpr: Jaxpr) -> tuple[Activation, ...]:
    """Returns a row for every call of an activation function, in the order of the program."""
    before: Counter[str] = Counter()
    rows = []

    def look(jaxpr: Jaxpr) -> None:
        for eqn, call in zip(jaxpr.eqns, calls_in(jaxpr), strict=True):
            if call is None:
                for inner in inner_jaxprs(eqn.params):
                    look(inner)
                continue
            before[call.function] += 1
            name = activation_name(call.function, before[call.function])
            rows.append(Activation(name, ACTIVATIONS[call.function], call.function))

    look(jaxpr)
    return tuple(rows)
