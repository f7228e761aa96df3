"""Activation functions in a JAX program: they have no module, and are found by name or pattern.

The calls of each are counted in the order of the program: ``"relu1"``, ``"relu2"``, ``"relu6_1"``.
Functions of ``jax.nn`` leave their names in it. A ReLU that a model writes out, as
``jnp.maximum(x, 0)``, ``jnp.where(x > 0, x, 0)`` or ``x * (x > 0)``, is known by what it computes;
anything else in arithmetic is no activation function here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

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
