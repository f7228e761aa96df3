"""Values from inside a JAX function: marked while it is traced, and taken out of its program.

An adapter marks the outputs of layers with :func:`mark`, which is the identity, while the model
runs inside :func:`collect`. That traces the model to a jaxpr and runs the jaxpr with the marked
values as further results. Nothing is carried out of a trace in a Python list, so that a mark may
stand inside ``jax.lax.scan``, ``jax.checkpoint``, ``jax.jit`` or ``jax.vmap``, whichever framework
put it there, and so that the result can itself be jitted, batched and differentiated.

A value inside a scan comes out stacked, with the steps on a new leading axis (those of the
outermost scan first); one inside a vmap likewise, with the batch on a leading axis, after those of
scans. Inside ``cond``, ``while_loop`` and functions with a derivative of their own there is no
such value that exists once for all, or its gradient could not be right: they are refused.
"""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from purepruning.jaxpr.internals import (
    ClosedJaxpr,
    Jaxpr,
    JaxprEqn,
    Literal,
    bind,
    identity,
    inner_jaxprs,
    jaxpr_and_consts,
    scan_sizes,
)
from purepruning_interop import _capture
from purepruning_interop._table import split_static

_mark = identity("purepruning_mark")


# JAX keeps the traces of inner jitted functions. A trace with marks must serve no other call, nor
# one without marks this one: what is marked is part of the key they are kept under.
_marking = jax.make_user_context(None)


def mark(key: str | Pending, value: Any) -> Any:
    """Returns ``value``, any pytree, and marks it for the :func:`collect` around the call."""
    arrays, put = split_static(value)
    return put(_mark.bind(*arrays, layer=key, put=put))


class Pending:
    """A key that is not known yet when a value is marked; without one, nothing is."""

    def __init__(self) -> None:
        self.key: str | None = None


def called(
    key: str | Pending, of: _capture.Of, call: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    """Returns ``call(*args, **kwargs)``, with its result or its first argument marked."""
    if of == "inputs":
        where = "capture(..., of='inputs')"
        args, kwargs = _capture.with_first(where, args, kwargs, lambda x: mark(key, x))
        return call(*args, **kwargs)
    return mark(key, call(*args, **kwargs))


#: The attribute of a module of :func:`marking_class` that holds its key, and what is marked.
KEY = "_purepruning_key"


def marking_class(cls: Any, body: dict[str, Any] | None = None, **options: Any) -> Any:
    """Returns a subclass of a module class whose instances mark their calls: :func:`called`.

    So ``isinstance`` and all attributes are as before. ``body`` and ``options`` are further
    arguments of the metaclass.
    """

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        key, of = getattr(self, KEY)
        return called(key, of, super(subclass, self).__call__, args, kwargs)

    body = {"__call__": __call__, "__module__": cls.__module__, **(body or {})}
    subclass: Any = type(cls)(cls.__name__, (cls,), body, **options)
    return subclass


@contextlib.contextmanager
def marking(*key: Any) -> Iterator[None]:
    """While it lasts, functions jitted inside the model have traces for this (hashable) key."""
    with _marking(key):
        yield


class Program(NamedTuple):
    """A traced function with marks in it, its arguments, and how its results are put together."""

    jaxpr: ClosedJaxpr
    arrays: Sequence[Any]
    rebuild: Callable[[Sequence[Any]], Any]


def trace(key: Any, function: Callable[..., Any], *args: Any) -> Program:
    """Returns the program of ``function(*args)``, for :func:`run`.

    Args:
        key: what decides which values are marked; hashable.
        function: the function to trace; what it returns may hold other things than arrays.
        *args: its arguments, pytrees; what in them is no array is not traced.
    """
    arrays, put = split_static(args)
    rebuild: list[Callable[[Sequence[Any]], Any]] = []

    def arrays_only(arrays: Sequence[Any]) -> Sequence[Any]:
        found, put_back = split_static(function(*put(arrays)))
        rebuild.append(put_back)
        return found

    with marking(key):
        closed = jax.make_jaxpr(arrays_only)(arrays)
    return Program(closed, arrays, rebuild[-1])


def run(where: str, program: Program) -> tuple[Any, dict[str, list[Any]]]:
    """Returns the result of a program, and the marked values by key, in the program's order.

    Raises:
        ValueError: a marked value stands where it cannot be taken out; the message begins with
            ``where``.
    """
    closed = program.jaxpr
    results, taken = _run(where, closed.jaxpr, closed.consts, program.arrays)
    values = defaultdict(list)
    for mark in taken:
        values[mark.key].append(mark.put(mark.arrays))
    return program.rebuild(results), dict(values)


def collect(
    where: str, key: Any, function: Callable[..., Any], *args: Any
) -> tuple[Any, dict[str, list[Any]]]:
    """Returns ``function(*args)`` and the marked values by key: :func:`trace`, :func:`run`."""
    return run(where, trace(key, function, *args))


def marked(program: Program) -> tuple[set[str], bool]:
    """Returns the keys of a program's marks, and whether one trace with marks is used repeatedly.

    That is so where a jitted function is called several times.
    """
    keys: set[str] = set()
    uses: Counter[int] = Counter()

    def look(jaxpr: Jaxpr) -> bool:
        found = False
        for eqn in jaxpr.eqns:
            if (key := _key(eqn)) is not None:
                keys.add(key)
                found = True
            for inner in inner_jaxprs(eqn.params):
                if look(inner):
                    uses[id(inner)] += 1
                    found = True
        return found

    look(program.jaxpr.jaxpr)
    return keys, any(n > 1 for n in uses.values())


class _Taken(NamedTuple):
    """A marked value: its arrays, and the function that puts them back into what it was."""

    key: str
    put: Callable[[Sequence[Any]], Any]
    arrays: list[Any]


def _run(
    where: str, jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any]
) -> tuple[list[Any], list[_Taken]]:
    """Returns the results of a jaxpr and its marked values; a value is dropped after its last use.

    Equations without marks are run as they are.
    """
    last: dict[Any, int] = {}
    for i, eqn in enumerate(jaxpr.eqns):
        last |= {v: i for v in eqn.invars if not isinstance(v, Literal)}
    last |= {v: len(jaxpr.eqns) for v in jaxpr.outvars if not isinstance(v, Literal)}
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    taken: list[_Taken] = []

    def read(v: Any) -> Any:
        return v.val if isinstance(v, Literal) else env[v]

    for i, eqn in enumerate(jaxpr.eqns):
        values = [read(v) for v in eqn.invars]
        if eqn.primitive is _mark:
            if (key := _key(eqn)) is not None:
                taken.append(_Taken(key, eqn.params["put"], values))
            results = values
        elif not (keys := _keys(eqn)):
            with eqn.ctx.manager:
                results = bind(eqn.primitive, values, eqn.params)
            results = results if eqn.primitive.multiple_results else [results]
        elif rule := _RULES.get(eqn.primitive.name):
            results, more = rule(where, eqn, values)
            taken += more
        else:
            name = eqn.primitive.name
            raise ValueError(
                f"{where}: layer {keys[0]!r} is called inside {_REFUSED.get(name, repr(name))}"
            )
        env.update(zip(eqn.outvars, results, strict=True))
        for v in [*eqn.invars, *eqn.outvars]:
            if not isinstance(v, Literal) and last.get(v, -1) <= i:
                env.pop(v, None)
    return [read(v) for v in jaxpr.outvars], taken


def _keys(eqn: JaxprEqn) -> list[str]:
    """Returns the keys of the marks inside the programs that an equation holds."""
    keys: list[str] = []
    for inner in inner_jaxprs(eqn.params):
        for e in inner.eqns:
            key = _key(e)
            keys += _keys(e) if key is None else [key]
    return keys


def _key(eqn: JaxprEqn) -> str | None:
    """Returns the key of a mark; None for any other equation, and for a mark without one."""
    if eqn.primitive is not _mark:
        return None
    key: str | Pending = eqn.params["layer"]
    return key.key if isinstance(key, Pending) else key


def _call(where: str, eqn: JaxprEqn, values: Sequence[Any]) -> Any:
    inner = eqn.params["jaxpr" if "jaxpr" in eqn.params else "call_jaxpr"]
    return _run(where, *jaxpr_and_consts(inner), values)


def _checkpoint(where: str, eqn: JaxprEqn, values: Sequence[Any]) -> Any:
    inner = jaxpr_and_consts(eqn.params["jaxpr"])
    run, put = _split(lambda *values: _run(where, *inner, values))
    params = {name: eqn.params[name] for name in ("policy", "prevent_cse")}
    return put(jax.checkpoint(run, **params)(*values))


def _scan(where: str, eqn: JaxprEqn, values: Sequence[Any]) -> Any:
    inner = jaxpr_and_consts(eqn.params["jaxpr"])
    first, carried = scan_sizes(eqn.params)
    run, put = _split(lambda *values: _run(where, *inner, values))

    def step(carry: Any, slices: Any) -> Any:
        results, arrays = run(*values[:first], *carry, *slices)
        return results[:carried], (results[carried:], arrays)

    params = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    start = first + carried
    carry, (rest, arrays) = jax.lax.scan(step, values[first:start], values[start:], **params)
    return put(([*carry, *rest], arrays))


def _split(run: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[[Any], Any]]:
    """Returns ``run`` with arrays alone as results, and the function that adds the rest again."""
    seen: list[list[_Taken]] = []

    def arrays_only(*values: Any) -> Any:
        results, taken = run(*values)
        seen.append([mark._replace(arrays=[]) for mark in taken])  # no tracer outlives its trace
        return results, [mark.arrays for mark in taken]

    def put(found: Any) -> tuple[list[Any], list[_Taken]]:
        results, arrays = found
        marks = zip(seen[-1], arrays, strict=True)
        return results, [mark._replace(arrays=list(a)) for mark, a in marks]

    return arrays_only, put


_RULES: dict[str, Callable[[str, JaxprEqn, Sequence[Any]], Any]] = {
    "jit": _call,
    "closed_call": _call,
    "remat2": _checkpoint,
    "scan": _scan,
}


_REFUSED = {
    "cond": "jax.lax.cond or switch, where only one branch runs: it has an output or has none",
    "while": "jax.lax.while_loop (or a fori_loop of that kind), whose number of steps, and so of "
    "outputs, is not known in advance; jax.lax.scan has no such limit",
    "custom_jvp_call": "jax.custom_jvp, which knows the derivative of its own results only",
    "custom_vjp_call": "jax.custom_vjp, which knows the derivative of its own results only",
    "shard_map": "jax.shard_map; call capture inside the mapped function instead",
}
