"""What the library needs of JAX that is no stable interface: programs, and how to run their parts.

No other module imports ``jax.extend``, ``jax.interpreters`` or ``jax._src``, or knows how one
version of JAX differs from another (``tests/test_versions.py`` checks the imports).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Primitive
from jax.interpreters import ad, batching, mlir, partial_eval

__all__ = [
    "ClosedJaxpr",
    "Jaxpr",
    "JaxprEqn",
    "Literal",
    "Primitive",
    "bind",
    "identity",
    "inner_jaxprs",
    "jaxpr_and_consts",
    "scan_sizes",
]


def bind(primitive: Primitive, operands: Sequence[Any], params: Mapping[str, Any]) -> Any:
    """Returns what an equation computes from ``operands``; ``params`` are the equation's own.

    A primitive that holds functions (a custom derivative) is bound with these, and JAX says how:
    before 0.9 they stand before the operands, since then they are parameters.
    """
    found = primitive.get_bind_params(dict(params))
    functions, params = ([], found) if isinstance(found, dict) else found
    return primitive.bind(*functions, *operands, **params)


def inner_jaxprs(params: Mapping[str, Any]) -> Iterator[Jaxpr]:
    """Yields the jaxprs among an equation's parameters.

    ``jaxprs_in_params``, which is in ``jax.core`` until 0.9 and in ``jax.extend.core`` since 0.10.
    """
    for value in params.values():
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, Jaxpr | ClosedJaxpr):
                yield jaxpr_and_consts(one)[0]


def jaxpr_and_consts(jaxpr: Any) -> tuple[Jaxpr, Sequence[Any]]:
    """Returns a jaxpr and its constants, closed or not: from 0.12 there is one class for both."""
    return (jaxpr.jaxpr, jaxpr.consts) if hasattr(jaxpr, "consts") else (jaxpr, ())


def scan_sizes(params: Mapping[str, Any]) -> tuple[int, int]:
    """Returns how many operands of a scan are constants, and how many are carried.

    Numbers until 0.10; from 0.11 the lengths of the first two parts of a tree.
    """
    if "ft_in" in params:
        constants, carried, _ = params["ft_in"].unpack()
        return len(constants), len(carried)
    return params["num_consts"], params["num_carry"]


def identity(name: str) -> Primitive:
    """Returns a new primitive that returns its operands, whatever its parameters are.

    It has several results, and no derivative of its own: tangents pass through unmarked. Batched,
    operands have their batch in front, and those without one stay so. Its parameters must not be
    called ``key``, a name that caches of JAX before 0.9 take for themselves.
    """
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_impl(lambda *arrays, **params: list(arrays))
    primitive.def_abstract_eval(lambda *avals, **params: list(avals))
    mlir.register_lowering(primitive, lambda ctx, *values, **params: values)

    def jvp(primals: Any, tangents: Any, **params: Any) -> Any:
        return primitive.bind(*primals, **params), list(tangents)

    def batch(arrays: Any, axes: Any, **params: Any) -> Any:
        # What is not mapped (the state of a batch norm) must not become so.
        pairs = zip(arrays, axes, strict=True)
        front = [x if axis is None else jax.numpy.moveaxis(x, axis, 0) for x, axis in pairs]
        return primitive.bind(*front, **params), [None if axis is None else 0 for axis in axes]

    def known(trace: Any, *arrays: Any, **params: Any) -> Any:
        # Linen's nn.scan runs its body once more, to see what does not depend on the loop, and
        # uses no other part of that: a mark in it would stand for a second call.
        return list(arrays)

    ad.primitive_jvps[primitive] = jvp
    batching.primitive_batchers[primitive] = batch
    rules: dict[Primitive, Callable[..., Any]] = partial_eval.custom_partial_eval_rules
    rules[primitive] = known
    return primitive
