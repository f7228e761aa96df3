"""Values from inside a JAX function: marked while it is traced, taken out of its program, replaced.

An adapter marks inputs and outputs of layers with :func:`mark`, which is the identity, while the
model runs inside :func:`collect`. That traces the model to a jaxpr and runs the jaxpr with
functions at the marks, each of which returns the value that goes on from there, and what it found:
a further result. Calls of activation functions are found in the jaxpr itself, without marks.
Nothing is carried out of a trace in a Python list, so that a mark may stand inside
``jax.lax.scan``, ``jax.checkpoint``, ``jax.jit`` or ``jax.vmap``, whichever framework put it there,
and so that the result can itself be jitted, batched and differentiated.

A value inside a scan comes out stacked, with the steps on a new leading axis (those of the
outermost scan first); one inside a vmap likewise, with the batch on a leading axis, after those of
scans. Inside ``cond``, ``while_loop`` and functions with a derivative of their own there is no
such value that exists once for all, or its gradient could not be right: they are refused.
"""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

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
from purepruning_interop._activations import (
    Call,
    activation_name,
    calls_in,
    calls_of_activations,
)
from purepruning_interop._table import split_static

_mark = identity("purepruning_mark")


# JAX keeps the traces of inner jitted functions. A trace with marks must serve no other call, nor
# one without marks this one: what is marked is part of the key they are kept under.
_marking = jax.make_user_context(None)


#: What says which value a mark is of: hashable, such as ``(module, "output")``.
Key: TypeAlias = Hashable

#: What is done at a mark: returns the value that goes on from there, and what is found.
At: TypeAlias = Callable[[Any], tuple[Any, Any]]


def mark(key: Key, value: Any) -> Any:
    """Returns ``value``, any pytree, and marks it for the :func:`collect` around the call."""
    arrays, put = split_static(value)
    return put(_mark.bind(*arrays, layer=key, put=put, ranks=tuple(x.ndim for x in arrays)))


def is_mark(eqn: JaxprEqn) -> bool:
    """Whether an equation is a mark; its key is the parameter ``"layer"``.

    The parameter ``"ranks"`` says how many axes the arrays had before ``vmap`` added leading ones.
    """
    return eqn.primitive is _mark


def called(
    key: Hashable, sides: Iterable[str], call: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    """Returns ``call(*args, **kwargs)``, its first argument and its result marked as asked."""
    if "input" in sides:
        args, kwargs = _capture.with_first(args, kwargs, lambda x: mark((key, "input"), x))
    result = call(*args, **kwargs)
    return mark((key, "output"), result) if "output" in sides else result


#: The attribute of a module of :func:`marking_class` that holds its name and the sides to mark.
KEY = "_purepruning_key"


def marking_class(
    cls: Any, body: dict[str, Any] | None = None, *, method: str = "__call__", **options: Any
) -> Any:
    """Returns a subclass of a module class whose instances mark what a call reads and returns.

    So ``isinstance`` and all attributes are as before. ``body`` and ``options`` are further
    arguments of the metaclass; ``method`` is what is called.
    """

    def marked(self: Any, *args: Any, **kwargs: Any) -> Any:
        name, sides = getattr(self, KEY)
        return called(name, sides, getattr(super(subclass, self), method), args, kwargs)

    body = {method: marked, "__module__": cls.__module__, **(body or {})}
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


def run(
    where: str, program: Program, at: Mapping[Key, At] | None = None
) -> tuple[Any, dict[Key, list[Any]]]:
    """Returns the result of a program, and what was found by key, in the program's order.

    Args:
        where: begins messages.
        program: what :func:`trace` returned.
        at: the functions at marks, by key, and at activation functions, by ``(name, side)``; what
            has none is passed by. Without it, all marked values are found as they are.

    Raises:
        ValueError: a marked value stands where it cannot be taken out, or is replaced by one of
            another shape or dtype.
    """
    closed = program.jaxpr
    runner = _Runner(where, at)
    results, taken = runner.run(closed.jaxpr, closed.consts, program.arrays, Counter())
    values = defaultdict(list)
    for mark in taken:
        values[mark.key].append(mark.put(mark.arrays))
    return program.rebuild(results), dict(values)


def collect(
    where: str,
    key: Any,
    function: Callable[..., Any],
    *args: Any,
    at: Mapping[Key, At] | None = None,
) -> tuple[Any, dict[Key, list[Any]]]:
    """Returns ``function(*args)`` and what was found by key: :func:`trace`, :func:`run`."""
    return run(where, trace(key, function, *args), at)


def marked(program: Program) -> tuple[set[Key], bool]:
    """Returns the keys of a program's marks, and whether one trace with marks is used repeatedly.

    That is so where a jitted function is called several times.
    """
    keys: set[Key] = set()
    uses: Counter[int] = Counter()

    def look(jaxpr: Jaxpr) -> bool:
        found = False
        for eqn in jaxpr.eqns:
            if is_mark(eqn):
                keys.add(eqn.params["layer"])
                found = True
            for inner in inner_jaxprs(eqn.params):
                if look(inner):
                    uses[id(inner)] += 1
                    found = True
        return found

    look(program.jaxpr.jaxpr)
    return keys, any(n > 1 for n in uses.values())


class _Taken(NamedTuple):
    """What was found: its arrays, and the function that puts them back into what it was."""

    key: Key
    put: Callable[[Sequence[Any]], Any]
    arrays: list[Any]


class _Runner(NamedTuple):
    """Runs the jaxprs of one program."""

    where: str
    at: Mapping[Key, At] | None

    def run(
        self, jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any], before: Counter[str]
    ) -> tuple[list[Any], list[_Taken]]:
        """Returns the results of a jaxpr, and what was found; values go after their last use.

        Equations with nothing to do in them are run as they are. ``before`` counts the calls of
        activation functions that came before.
        """
        last: dict[Any, int] = {}
        for i, eqn in enumerate(jaxpr.eqns):
            last |= {v: i for v in eqn.invars if not isinstance(v, Literal)}
        last |= {v: len(jaxpr.eqns) for v in jaxpr.outvars if not isinstance(v, Literal)}
        env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
        taken: list[_Taken] = []
        before = before.copy()

        def read(v: Any) -> Any:
            return v.val if isinstance(v, Literal) else env[v]

        for i, (eqn, call) in enumerate(zip(jaxpr.eqns, calls_in(jaxpr), strict=True)):
            results, more = self._equation(eqn, call, [read(v) for v in eqn.invars], before)
            before += _calls_of(eqn, call)
            taken += more
            env.update(zip(eqn.outvars, results, strict=True))
            for v in [*eqn.invars, *eqn.outvars]:
                if not isinstance(v, Literal) and last.get(v, -1) <= i:
                    env.pop(v, None)
        return [read(v) for v in jaxpr.outvars], taken

    def _equation(
        self, eqn: JaxprEqn, call: Call | None, values: list[Any], before: Counter[str]
    ) -> tuple[Sequence[Any], list[_Taken]]:
        if is_mark(eqn):
            return self._at_mark(eqn, values)
        if call is not None:
            name = activation_name(call.function, before[call.function] + 1)
            return self._at_activation(name, call, eqn, values)
        keys = self._keys(eqn, before)
        if not keys:
            return _bound(eqn, values), []
        if rule := _RULES.get(eqn.primitive.name):
            found: tuple[Sequence[Any], list[_Taken]] = rule(self, eqn, values, before)
            return found
        name = eqn.primitive.name
        first = keys[0][0] if isinstance(keys[0], tuple) else keys[0]
        raise ValueError(
            f"{self.where}: layer {first!r} is called inside {_REFUSED.get(name, repr(name))}"
        )

    def _at_mark(self, eqn: JaxprEqn, values: list[Any]) -> tuple[Sequence[Any], list[_Taken]]:
        key, put = eqn.params["layer"], eqn.params["put"]
        if self.at is None:
            return values, [_Taken(key, put, values)]
        if key not in self.at:
            return values, []
        return self._replaced(key, put, values)

    def _at_activation(
        self, name: str, call: Call, eqn: JaxprEqn, values: list[Any]
    ) -> tuple[Sequence[Any], list[_Taken]]:
        found: list[_Taken] = []
        if self.at and (name, "input") in self.at:
            if call.operand is None:
                remedy = (
                    "ask for the output of the layer that makes it"
                    if call.function == "gelu"  # which jax.nn writes out itself
                    else f"write jax.nn.{call.function}(x) in the model"
                )
                raise ValueError(
                    f"{self.where}: {name!r} is written out, so that what it reads is read in "
                    f"several places; {remedy}"
                )
            argument, found = self._replaced((name, "input"), _only, [values[call.operand]])
            values[call.operand] = argument[0]
        results = _bound(eqn, values)
        if self.at and (name, "output") in self.at:
            results, more = self._replaced((name, "output"), _only, results)
            found = [*found, *more]
        return results, found

    def _replaced(
        self, key: Any, put: Callable[[Sequence[Any]], Any], values: Sequence[Any]
    ) -> tuple[Sequence[Any], list[_Taken]]:
        """Returns the arrays that take the place of ``values``, and what the function found."""
        assert self.at is not None
        new, found = self.at[key](put(values))
        arrays, _ = split_static(new)
        old, now = ([(tuple(x.shape), str(x.dtype)) for x in some] for some in (values, arrays))
        if old != now:
            raise ValueError(
                f"{self.where}: at '{key[0]}:{key[1]}' the function returned arrays of {now} for "
                f"{old}; return a value of the same shapes and dtypes"
            )
        found_arrays, put_found = split_static(found)
        return arrays, [_Taken(key, put_found, found_arrays)]

    def _keys(self, eqn: JaxprEqn, before: Counter[str]) -> list[Any]:
        """Returns the keys at which something is done inside the programs an equation holds."""
        keys: list[Any] = []
        before = before.copy()
        for inner in inner_jaxprs(eqn.params):
            for e, call in zip(inner.eqns, calls_in(inner), strict=True):
                if is_mark(e):
                    keys += [e.params["layer"]]
                elif call is not None:
                    name = activation_name(call.function, before[call.function] + 1)
                    keys += [(name, side) for side in ("input", "output") if self.at]
                else:
                    keys += self._keys(e, before)
                before += _calls_of(e, call)
        return keys if self.at is None else [key for key in keys if key in self.at]


def _calls_of(eqn: JaxprEqn, call: Call | None) -> Counter[str]:
    """Returns how often an equation, which may be a call itself, calls activation functions."""
    if call is not None:
        return Counter([call.function])
    return sum(map(calls_of_activations, inner_jaxprs(eqn.params)), Counter())


def _only(values: Sequence[Any]) -> Any:
    return values[0]


def _bound(eqn: JaxprEqn, values: Sequence[Any]) -> Sequence[Any]:
    with eqn.ctx.manager:
        results = bind(eqn.primitive, values, eqn.params)
    found: Sequence[Any] = results if eqn.primitive.multiple_results else [results]
    return found


def _call(runner: _Runner, eqn: JaxprEqn, values: Sequence[Any], before: Counter[str]) -> Any:
    inner = eqn.params["jaxpr" if "jaxpr" in eqn.params else "call_jaxpr"]
    return runner.run(*jaxpr_and_consts(inner), values, before)


def _checkpoint(runner: _Runner, eqn: JaxprEqn, values: Sequence[Any], before: Counter[str]) -> Any:
    inner = jaxpr_and_consts(eqn.params["jaxpr"])
    run, put = _split(lambda *values: runner.run(*inner, values, before))
    params = {name: eqn.params[name] for name in ("policy", "prevent_cse")}
    return put(jax.checkpoint(run, **params)(*values))


def _scan(runner: _Runner, eqn: JaxprEqn, values: Sequence[Any], before: Counter[str]) -> Any:
    inner = jaxpr_and_consts(eqn.params["jaxpr"])
    first, carried = scan_sizes(eqn.params)
    run, put = _split(lambda *values: runner.run(*inner, values, before))

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


_RULES: dict[str, Callable[..., Any]] = {
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
