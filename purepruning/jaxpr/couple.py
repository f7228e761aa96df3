"""The coupling of any JAX function, read off its jaxpr."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from purepruning.arguments import shown
from purepruning.coupling.build import build
from purepruning.coupling.coupling import Coupling
from purepruning.coupling.flow import Flow
from purepruning.coupling.value import Value, whole
from purepruning.jaxpr.call import Call, check_function, trace_call
from purepruning.jaxpr.program import Program
from purepruning.jaxpr.rules.table import RULES
from purepruning.jaxpr.walk import Trace, leaf_uses, walk
from purepruning.trees import flatten
from purepruning.types import Params


@dataclasses.dataclass(frozen=True)
class State:
    """In place of a boolean in ``outputs``: what replaces the parameters whose paths begin so.

    It shrinks with them, whether or not the function reads them.
    """

    prefix: str


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
    /,
    *inputs: Any,
    outputs: Any = True,
    **kwargs: Any,
) -> Coupling:
    """Returns which channels of which parameters ``fn(params, *inputs, **kwargs)`` couples.

    The function is traced, never run: every position of every parameter's axis starts as a unit of
    its own, and each operation of the jaxpr says which of them coincide, come apart into factors,
    or must stay. An operation without a rule keeps what it touches and is reported: less is
    pruned, and results stay equal.

    Args:
        fn: any traceable function, for instance ``model.apply``. Loops, branches, ``jit``,
            ``remat`` and custom derivatives are entered.
        params: pytree of all arrays that may be cut, statistics of batch norms included; arrays or
            ``jax.ShapeDtypeStruct``.
        *inputs, **kwargs: the other arguments, likewise. They are never cut. What is no array is
            passed on. A keyword ``outputs`` of the function's own cannot be given; wrap it.
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
    check_function(fn, "couple")
    return analyse(trace_call(fn, params, inputs, kwargs), outputs).coupling


def analyse(call: Call, outputs: Any, tables: bool = False) -> Analysis:
    """Returns the program of a call with the atoms of every variable.

    Args:
        call: the traced call.
        outputs: as for :func:`couple`; also :class:`State`.
        tables: whether there are units of tables that no layer makes or reads.
    """
    program, names = call.program, list(call.params)
    paths = dict(zip(program.inputs, names, strict=False))
    uses = leaf_uses(program, paths)
    kinds = output_kinds(call, outputs)
    flow = Flow()
    values: dict[str, Value] = {}
    for name in sorted(names):
        floating = jnp.issubdtype(call.params[name].dtype, jnp.inexact)
        values[name] = flow.leaf(name, tuple(call.params[name].shape), True, table=not floating)
    for name in names:
        if not uses[name] and name not in kinds:
            flow.keep(values[name], "not used by the function")
    operands = [values[name] for name in names]
    operands += [whole(x.shape) for x in call.given]
    found, traced = walk(program, operands, flow, uses, RULES)
    for value, kind in zip(found, kinds, strict=True):
        if kind is True:
            flow.keep(value, "an output")
        elif isinstance(kind, str) and kind in values and values[kind].shape == value.shape:
            flow.unify([values[kind], value], "comes back as it went in")
    coupling, numbers = build(
        flow,
        {path: v.shape for path, v in values.items()},
        {path: v.axes for path, v in values.items()},
        times=_times(program, traced),
        outputs=outputs,
        tables=tables,
    )
    return Analysis(program, traced, flow, paths, call.out_tree, coupling, numbers)


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


def output_kinds(call: Call, outputs: Any) -> list[bool | str]:
    """Returns for every leaf of a call's result whether it stays whole, or which leaf it replaces.

    Raises:
        TypeError, ValueError: ``outputs`` is no tree of booleans that is a prefix of the result.
    """

    def spread(kind: Any, part: Any) -> Any:
        if not isinstance(kind, State):
            return jax.tree.map(lambda _: kind, part)
        flat = flatten(part)
        return flat.rebuild({path: f"{kind.prefix}{path}" for path in flat.leaves})

    result = jax.tree.unflatten(call.out_tree, call.result)
    try:
        kinds = jax.tree.leaves(jax.tree.map(spread, outputs, result))
    except (ValueError, TypeError) as error:
        raise type(error)(
            f"outputs must be a tree of booleans, a prefix of the result: {error}"
        ) from None
    check_outputs(outputs)
    return kinds


def check_outputs(outputs: Any) -> None:
    """Raises TypeError for what is no tree of booleans."""
    leaves = jax.tree.leaves(outputs)
    if not leaves or not all(isinstance(leaf, bool | State) for leaf in leaves):
        raise TypeError(f"outputs must be a tree of booleans, got {shown(outputs)}")
