"""The coupling of any JAX function, read off its jaxpr."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from purepruning.coupling.build import build
from purepruning.coupling.coupling import Coupling
from purepruning.coupling.flow import Flow
from purepruning.coupling.value import Value, whole
from purepruning.jaxpr.program import Program, trace
from purepruning.jaxpr.rules.table import RULES
from purepruning.jaxpr.walk import Trace, leaf_uses, walk
from purepruning.trees import flatten
from purepruning.types import Params


class Analysis(NamedTuple):
    """What is known of a traced function: its program, and the value of every variable."""

    program: Program
    trace: Trace
    flow: Flow
    paths: dict[int, str]
    out_tree: Any
    coupling: Coupling
    numbers: np.ndarray  # unit of every atom


def couple(
    fn: Callable[..., Any],
    params: Params,
    *inputs: Any,
    outputs: Any = True,
) -> Coupling:
    """Returns which channels of which parameters ``fn(params, *inputs)`` couples.

    The function is traced, never run: every position of every parameter's axis starts as a unit of
    its own, and each operation of the jaxpr says which of them coincide, come apart into factors,
    or must stay. An operation without a rule keeps what it touches and is reported; it costs
    coverage, not correctness.

    Args:
        fn: any traceable function, for instance ``model.apply``. Loops, branches, ``jit``,
            ``remat`` and custom derivatives are entered.
        params: pytree of all arrays that may be cut, statistics of batch norms included; arrays or
            ``jax.ShapeDtypeStruct``.
        *inputs: the other arguments, likewise. They are never cut. What is no array is passed on.
        outputs: tree of booleans, a prefix of the function's result: whether it keeps its size
            (True) or may shrink along with the parameters (False), as updated statistics should.

    Raises:
        TypeError, ValueError: ``outputs`` is no prefix of the result; or what ``fn`` raises.

    >>> import jax, jax.numpy as jnp
    >>> def mlp(params, x):
    ...     return jax.nn.relu(x @ params["one"] + params["bias"][None]) @ params["two"]
    >>> params = {"one": jnp.ones((3, 8)), "bias": jnp.ones(8), "two": jnp.ones((8, 2))}
    >>> coupling = couple(mlp, params, jnp.ones((1, 3)))
    >>> [(f.name, len(f), [m.path for m in f.axes]) for f in coupling.families]
    [('one[1]', 8, ['bias', 'one', 'two'])]
    """
    return analyse(fn, params, inputs, outputs).coupling


def analyse(fn: Callable[..., Any], params: Any, inputs: tuple[Any, ...], outputs: Any) -> Analysis:
    """Returns the program of ``fn(params, *inputs)`` with the atoms of every variable."""
    tree = flatten(params)
    leaves = {path: leaf for path, leaf in tree.leaves.items() if _is_array(leaf)}
    names = list(leaves)
    arrays, treedef = jax.tree.flatten(inputs)
    dynamic = [i for i, x in enumerate(arrays) if _is_array(x)]

    def flat(weights: list[Any], given: list[Any]) -> Any:
        filled = list(arrays)
        for i, x in zip(dynamic, given, strict=True):
            filled[i] = x
        whole_tree = tree.rebuild({**tree.leaves, **dict(zip(names, weights, strict=True))})
        return fn(whole_tree, *jax.tree.unflatten(treedef, filled))

    program, result, out_tree = trace(
        flat, [_shape(leaves[n]) for n in names], [_shape(arrays[i]) for i in dynamic]
    )
    paths = dict(zip(program.inputs, names, strict=False))
    uses = leaf_uses(program, paths)
    flow = Flow()
    values: dict[str, Value] = {}
    for name in sorted(names):
        floating = jnp.issubdtype(leaves[name].dtype, jnp.inexact)
        values[name] = flow.leaf(name, tuple(leaves[name].shape), bool(floating))
    for name in names:
        if not uses[name]:
            flow.keep(values[name], "not used by the function")
    operands = [values[name] for name in names]
    operands += [whole(arrays[i].shape) for i in dynamic]
    found, traced = walk(program, operands, flow, uses, RULES)
    fixed = _fixed(outputs, jax.tree.unflatten(out_tree, result))
    for value, stays in zip(found, fixed, strict=True):
        if stays:
            flow.keep(value, "an output")
    coupling, numbers = build(
        flow,
        {path: v.shape for path, v in values.items()},
        {path: v.axes for path, v in values.items()},
        times=_times(program, traced),
        outputs=outputs,
    )
    return Analysis(program, traced, flow, paths, out_tree, coupling, numbers)


def _times(program: Program, trace: Trace, times: int = 1) -> dict[tuple[int, int], int]:
    """Returns how often every operation runs; of branches each counts once, loops run once."""
    found = {}
    for index, op in enumerate(program.ops):
        found[trace.number, index] = times
        for inner, copies in zip(op.inner, trace.inner.get(index, ()), strict=False):
            length = op.params["length"] if op.name == "scan" and len(copies) == 1 else 1
            for copy in copies:
                found |= _times(inner, copy, times * length)
    return found


def _fixed(outputs: Any, result: Any) -> list[bool]:
    try:
        spread = jax.tree.map(
            lambda flag, part: jax.tree.map(lambda _: flag, part), outputs, result
        )
    except (ValueError, TypeError) as error:
        raise type(error)(
            f"outputs must be a tree of booleans, a prefix of the result: {error}"
        ) from None
    flags = jax.tree.leaves(spread)
    if not all(isinstance(f, bool) for f in flags):
        raise TypeError(f"outputs must hold booleans, got {outputs!r}")
    return flags


def _is_array(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")


def _shape(x: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=getattr(x, "weak_type", False))
