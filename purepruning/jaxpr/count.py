"""Parameters, multiply-adds and activation bytes of a JAX function, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from typing import Any

from purepruning.coupling.cost import LayerCost, ModelCost
from purepruning.jaxpr.call import Call, check_function, trace_call
from purepruning.jaxpr.internals import scan_sizes
from purepruning.jaxpr.program import Op, Program
from purepruning.types import Params

#: What depends on parameters alone: their paths; None depends on inputs.
Origin = frozenset[str] | None


def count(fn: Callable[..., Any], params: Params, /, *inputs: Any, **kwargs: Any) -> ModelCost:
    """Returns parameters, multiply-adds and activation bytes of ``fn(params, *inputs, **kwargs)``.

    Read off the jaxpr: loops count as often as they run (``while`` once), of branches the most
    expensive one counts. Products of two activations (attention scores) count as well, under the
    name of their place.

    Args:
        fn, params, *inputs, **kwargs: as for :func:`purepruning.couple`.

    >>> import jax.numpy as jnp
    >>> params = {"one": {"w": jnp.ones((3, 8))}, "two": {"w": jnp.ones((8, 2))}}
    >>> fn = lambda p, x: x @ p["one"]["w"] @ p["two"]["w"]
    >>> found = count(fn, params, jnp.ones((5, 3)))
    >>> found.params, found.macs, [(x.name, x.macs) for x in found.layers]
    (40, 200, [('one', 120), ('two', 80)])
    """
    check_function(fn, "count")
    return cost_of(trace_call(fn, params, inputs, kwargs))


def cost_of(call: Call, trained: Collection[str] | None = None) -> ModelCost:
    """Returns the cost of a call, with the parameters named in ``trained``; None means all."""
    origins: list[Origin] = [frozenset([path]) for path in call.params]
    origins += [None] * len(call.given)
    products: dict[str, list[Any]] = {}
    _walk(call.program, origins, 1, products)
    sizes: dict[str, int] = {}
    for path, x in call.params.items():
        if trained is None or path in trained:
            name = _layer(path)
            sizes[name] = sizes.get(name, 0) + math.prod(x.shape)
    names = [*products, *(name for name in sizes if name not in products)]
    return ModelCost(tuple(LayerCost(n, sizes.get(n, 0), *products.get(n, [0, 0])) for n in names))


def _layer(path: str) -> str:
    return path.rpartition(".")[0] or path


def _walk(
    program: Program, given: Iterable[Origin], times: Any, products: dict[str, list[Any]]
) -> list[Origin]:
    origins: dict[int, Origin] = dict(zip(program.inputs, given, strict=True))
    origins |= {n: frozenset() for n in program.constants}
    for op in program.ops:
        inputs = [origins[n] for n in op.inputs]
        if op.name in ("dot_general", "ragged_dot_general", "conv_general_dilated"):
            out = program.avals[op.outputs[0]]
            paths = sorted(path for x in inputs if x for path in x)
            name = _layer(paths[0]) if paths else op.scope or op.name
            row = products.setdefault(name, [0, 0])
            row[0] += times * macs_of(op, program)
            row[1] += times * math.prod(out.shape) * out.dtype.itemsize
        found = _inner(op, inputs, times, products) if op.inner else None
        if found is None:
            joint: Origin = None
            if all(x is not None for x in inputs):
                joint = frozenset().union(*(x for x in inputs if x is not None))
            found = [joint] * len(op.outputs)
        origins.update(zip(op.outputs, found, strict=True))
    return [origins[n] for n in program.outputs]


def _inner(
    op: Op, inputs: list[Origin], times: Any, products: dict[str, list[Any]]
) -> list[Origin] | None:
    if op.name == "cond":
        branches: list[dict[str, list[Any]]] = []
        for program in op.inner:
            branches.append({})
            found = _walk(program, inputs[1:], times, branches[-1])
        most = max(branches, key=lambda b: sum(row[0] for row in b.values()))
        for name, row in most.items():
            mine = products.setdefault(name, [0, 0])
            mine[0], mine[1] = mine[0] + row[0], mine[1] + row[1]
        return found
    if op.name == "while":
        n, m = op.params["cond_nconsts"], op.params["body_nconsts"]
        return _walk(op.inner[1], inputs[n : n + m] + [None] * len(op.outputs), times, products)
    if op.name == "scan":
        n, m = scan_sizes(op.params)
        given = inputs[:n] + [None] * m + inputs[n + m :]
        return _walk(op.inner[0], given, times * op.params["length"], products)
    return _walk(op.inner[0], inputs, times, products)


def macs_of(op: Op, program: Program) -> Any:
    """Returns the multiply-adds of a matrix product or a convolution."""
    left, right = (program.avals[n].shape for n in op.inputs[:2])
    out = program.avals[op.outputs[0]].shape
    if op.name == "ragged_dot_general":  # every row meets the matrix of its group alone
        numbers = op.params["ragged_dot_dimension_numbers"]
        (contracted, _), _ = numbers.dot_dimension_numbers
        return math.prod(out) * math.prod(left[a] for a in contracted)
    if op.name == "dot_general":
        (contracted, _), _ = op.params["dimension_numbers"]
        return math.prod(out) * math.prod(left[a] for a in contracted)
    numbers = op.params["dimension_numbers"]
    taps = math.prod(right[a] for a in numbers.rhs_spec[2:])
    into = right[numbers.rhs_spec[1]]
    # A transposed convolution multiplies once for every position of its input.
    if any(d != 1 for d in op.params["lhs_dilation"]):
        positions = math.prod(left[a] for a in numbers.lhs_spec[2:])
        return left[numbers.lhs_spec[0]] * out[numbers.out_spec[1]] * positions * taps * into
    return math.prod(out) * taps * into
