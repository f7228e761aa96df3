"""A jaxpr as a flat program: calls are entered, every variable is a number used once.

``jit`` and its like are inlined. What has a meaning of its own (loops, branches, ``remat``, custom
derivatives) stays an operation with inner programs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from purepruning.jaxpr.internals import Literal, bind, jaxpr_and_consts
from purepruning.jaxpr.primitives import ELEMENTWISE

#: Primitives that only call another jaxpr, and the parameter that holds it.
_CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr"}


#: Primitives that keep inner programs, and the parameters that hold them.
INNER = {
    "scan": ("jaxpr",),
    "while": ("cond_jaxpr", "body_jaxpr"),
    "remat2": ("jaxpr",),
    "checkpoint": ("jaxpr",),
    "custom_jvp_call": ("call_jaxpr",),
    "custom_vjp_call": ("call_jaxpr",),
}


@dataclasses.dataclass
class Op:
    """One operation: a primitive, its parameters, and the numbers of its variables.

    ``context`` holds the settings it was traced under; ``scope`` names its place in the model.
    """

    name: str
    primitive: Any
    params: dict[str, Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    context: Any
    inner: tuple[Program, ...] = ()
    scope: str = ""


@dataclasses.dataclass
class Program:
    """Operations in order; ``avals`` has the shape and dtype of every variable.

    ``folded`` remembers variables that were asked for and depend on constants alone, None where
    they do not (see :func:`purepruning.jaxpr.constants.concrete`).
    """

    inputs: list[int] = dataclasses.field(default_factory=list)
    outputs: list[int] = dataclasses.field(default_factory=list)
    ops: list[Op] = dataclasses.field(default_factory=list)
    constants: dict[int, Any] = dataclasses.field(default_factory=dict)
    avals: list[Any] = dataclasses.field(default_factory=list)
    folded: dict[int, Any] = dataclasses.field(default_factory=dict, repr=False)

    @functools.cached_property
    def makers(self) -> dict[int, Op]:
        """By variable, the operation that makes it; for a program that is complete."""
        return {out: op for op in self.ops for out in op.outputs}

    def new(self, aval: Any) -> int:
        """Returns the number of a new variable."""
        self.avals.append(aval)
        return len(self.avals) - 1


def flatten_jaxpr(closed: Any, scope: str = "", custom: bool = True) -> Program:
    """Returns the program of a (closed) jaxpr; ``custom``: with those of its derivatives."""
    jaxpr, consts = jaxpr_and_consts(closed)
    program = Program()
    for var in jaxpr.invars:
        program.inputs.append(program.new(var.aval))
    program.outputs = _inline(program, jaxpr, consts, list(program.inputs), scope, custom)
    return program


def _inline(
    program: Program,
    jaxpr: Any,
    consts: Sequence[Any],
    arguments: list[int],
    scope: str,
    custom: bool,
) -> list[int]:
    numbers: dict[Any, int] = dict(zip(jaxpr.invars, arguments, strict=True))
    for var, value in zip(jaxpr.constvars, consts, strict=True):
        numbers[var] = program.new(var.aval)
        program.constants[numbers[var]] = value

    def number(atom: Any) -> int:
        if isinstance(atom, Literal):
            n = program.new(atom.aval)
            program.constants[n] = atom.val
            return n
        return numbers[atom]

    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        inputs = [number(v) for v in eqn.invars]
        here = f"{scope}/{eqn.source_info.name_stack}".strip("/")
        if name in _CALLS and _CALLS[name] in eqn.params:
            inner = jaxpr_and_consts(eqn.params[_CALLS[name]])
            outputs = _inline(program, *inner, inputs, here, custom)
            for var, out in zip(eqn.outvars, outputs, strict=True):
                numbers[var] = out
            continue
        inside: tuple[Program, ...] = ()
        if name == "cond":
            inside = tuple(flatten_jaxpr(b, here, custom) for b in eqn.params["branches"])
        elif name in INNER and all(key in eqn.params for key in INNER[name]):
            inside = tuple(flatten_jaxpr(eqn.params[key], here, custom) for key in INNER[name])
            own = name == "custom_vjp_call" or (
                name == "custom_jvp_call" and not elementwise_only(inside[0])
            )
            if custom and own:
                inside = (*inside, derivative(eqn.primitive, eqn.params, eqn.invars, eqn.outvars))
        outputs = [program.new(v.aval) for v in eqn.outvars]
        for var, out in zip(eqn.outvars, outputs, strict=True):
            numbers[var] = out
        program.ops.append(
            Op(
                name,
                eqn.primitive,
                eqn.params,
                tuple(inputs),
                tuple(outputs),
                eqn.ctx,
                inside,
                here,
            )
        )
    return [number(v) for v in jaxpr.outvars]


def trace(fn: Any, *args: Any) -> tuple[Program, Any, Any]:
    """Returns the program of ``fn(*args)``, and the shapes and the structure of its result."""
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
    leaves, structure = jax.tree.flatten(shapes)
    return flatten_jaxpr(closed), leaves, structure


def is_floating(aval: Any) -> bool:
    """Whether a variable has a derivative."""
    return bool(jnp.issubdtype(aval.dtype, jnp.inexact))


def elementwise_only(program: Program, also: Iterable[str] = ()) -> bool:
    """Whether a program works element by element, so that it can run at removed positions."""
    return all(
        (op.name in ELEMENTWISE or op.name == "integer_pow" or op.name in also)
        if not op.inner
        else op.name not in ("cond", "while", "scan") and elementwise_only(op.inner[0], also)
        for op in program.ops
    )


def derivative(
    primitive: Any, params: Any, inputs: Sequence[Any], outputs: Sequence[Any]
) -> Program:
    """Returns the program of a custom derivative, as the user wrote it.

    Of ``custom_jvp``: operands and tangents to tangents of the results. Of ``custom_vjp``: operands
    and cotangents of the results to cotangents of the operands. Only floating variables have any.
    """
    floating = [i for i, v in enumerate(inputs) if is_floating(v.aval)]

    def call(given: Sequence[Any], xs: Sequence[Any]) -> list[Any]:
        filled = list(given)
        for i, x in zip(floating, xs, strict=True):
            filled[i] = x
        found = bind(primitive, filled, params)
        return [y for y, v in zip(found, outputs, strict=True) if is_floating(v.aval)]

    def forward(given: list[Any], tangents: list[Any]) -> list[Any]:
        xs = [given[i] for i in floating]
        return jax.jvp(lambda *x: call(given, x), xs, tangents)[1]

    def backward(given: list[Any], cotangents: list[Any]) -> Sequence[Any]:
        xs = [given[i] for i in floating]
        return jax.vjp(lambda *x: call(given, x), *xs)[1](cotangents)

    def shapes(variables: Sequence[Any]) -> list[Any]:
        return [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in variables]

    given = shapes(inputs)
    if primitive.name == "custom_jvp_call":
        closed = jax.make_jaxpr(forward)(given, [given[i] for i in floating])
    else:
        closed = jax.make_jaxpr(backward)(
            given, shapes([v for v in outputs if is_floating(v.aval)])
        )
    return flatten_jaxpr(closed, custom=False)


def holds_tracers(program: Program) -> bool:
    """Whether a constant belongs to a transformation that is still going on."""
    return any(isinstance(x, jax.core.Tracer) for x in program.constants.values()) or any(
        holds_tracers(inner) for op in program.ops for inner in op.inner
    )
