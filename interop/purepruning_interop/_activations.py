"""Activation functions in a JAX program: they have no module, and are found by their names.

The calls of each are counted in the order of the program: ``"relu1"``, ``"relu2"``, ``"relu6_1"``.
What JAX or a model writes out in arithmetic (``jnp.maximum(x, 0)``) has no name there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from purepruning.jaxpr.internals import Jaxpr, JaxprEqn, inner_jaxprs
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


def activation_of(eqn: JaxprEqn) -> str | None:
    """Returns the name of the activation function that an equation is a call of, or None.

    Linen's nn.scan leaves calls behind whose result is not used; they are none.
    """
    if all(type(v).__name__ == "DropVar" for v in eqn.outvars):
        return None
    name = eqn.params.get("name", eqn.primitive.name)
    if eqn.primitive.name == "custom_jvp_call":
        inner = next(inner_jaxprs(eqn.params), None)
        name = inner.eqns[0].params.get("name") if inner and len(inner.eqns) == 1 else None
    return name if isinstance(name, str) and name in ACTIVATIONS else None


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


def calls_of_activations(eqn: JaxprEqn) -> Counter[str]:
    """Returns how often an equation calls each activation function."""
    function = activation_of(eqn)
    if function is not None:
        return Counter([function])
    found: Counter[str] = Counter()
    for inner in inner_jaxprs(eqn.params):
        for e in inner.eqns:
            found += calls_of_activations(e)
    return found


def activation_rows(jaxpr: Jaxpr) -> tuple[Activation, ...]:
    """Returns a row for every call of an activation function, in the order of the program."""
    before: Counter[str] = Counter()
    rows = []

    def look(jaxpr: Jaxpr) -> None:
        for eqn in jaxpr.eqns:
            function = activation_of(eqn)
            if function is None:
                for inner in inner_jaxprs(eqn.params):
                    look(inner)
                continue
            before[function] += 1
            name = activation_name(function, before[function])
            rows.append(Activation(name, ACTIVATIONS[function], function))

    look(jaxpr)
    return tuple(rows)
