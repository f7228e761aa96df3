"""What the layers of a Linen model read and put out: seen or replaced, by pure functions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from flax import linen as nn
from flax.core import meta

from purepruning.layers import Activation, Layer
from purepruning.trees import flatten
from purepruning_interop import _capture
from purepruning_interop._activations import activation_rows, is_activation
from purepruning_interop._marks import Program, marked, marking, run, trace
from purepruning_interop.linen.layers import MISFITS, check, marker, misfit


def capture(
    model: nn.Module,
    variables: Mapping[str, Any],
    /,
    *inputs: Any,
    layers: Iterable[str | Layer],
    rngs: Any = None,
    method: Callable[..., Any] | str | None = None,
    mutable: Any = False,
    of: _capture.Of = "outputs",
    **kwargs: Any,
) -> tuple[Any, dict[str, Any]]:
    """Returns ``(model.apply(...), {layer: its output})`` for the layers asked for.

    A pure function of arrays, for ``jax.jit``, ``jax.grad`` (through the outputs too) and
    ``jax.vmap``. The first part is just what ``model.apply`` returns, so with ``mutable`` a pair
    of the result and the updated variables. An output is what the layer's ``__call__`` returned,
    before any activation that follows: that of a layer under ``nn.scan`` is stacked, the steps on a
    new leading axis; under ``nn.vmap`` likewise, after the axes of scans; ``nn.remat`` and
    ``nn.jit`` change nothing. A layer called several times gives the list of its outputs.

    Without ``jax.jit`` around it every call is traced anew. The parts of an
    ``nn.OptimizedLSTMCell`` are never called; the cell is.

    Args:
        model: the Linen module.
        variables: what ``model.init`` returned, or only its ``"params"``.
        *inputs: what a call of the model takes.
        layers: rows of the layer table, or names; the dotted path of any module is a name, that of
            a parameter stands for the module that owns it.
        of: ``"outputs"``, or ``"inputs"``: the first argument of each layer's call instead, for
            :mod:`purepruning.stats.inputs`.
        rngs, method, mutable, **kwargs: as for ``model.apply``.

    Raises:
        TypeError: an argument is of a wrong type, or the inputs do not fit the method.
        ValueError: a layer is unknown, is never called in this forward pass, or is called where
            there is no one output: inside ``nn.cond``, ``nn.switch``, ``nn.while_loop`` or
            ``nn.custom_vjp``.

    >>> import jax.numpy as jnp
    >>> from flax import linen as nn
    >>> model = nn.Sequential([nn.Dense(2), nn.relu])
    >>> params = {"layers_0": {"kernel": jnp.array([[1.0, -2.0]]), "bias": jnp.zeros(2)}}
    >>> y, outputs = capture(model, params, jnp.ones((1, 1)), layers=["layers_0"])
    >>> y.tolist(), outputs["layers_0"].tolist()
    ([[1.0, 0.0]], [[1.0, -2.0]])
    """
    where = "capture(model, variables, *inputs)"
    options = {"rngs": rngs, "method": method, "mutable": mutable}
    at = _capture.looking(where, layers, of)
    return _capture.captured(_replace(where, model, variables, inputs, at, options, kwargs))


def replace(
    model: nn.Module,
    variables: Mapping[str, Any],
    /,
    *inputs: Any,
    at: Mapping[str, Callable[[Any], tuple[Any, Any]]],
    rngs: Any = None,
    method: Callable[..., Any] | str | None = None,
    mutable: Any = False,
    **kwargs: Any,
) -> tuple[Any, dict[str, Any]]:
    """Returns ``(model.apply(...), {site: what was found})`` with functions at sites of the model.

    A site is a layer's name with ``":input"`` or ``":output"``; its function is given what the
    layer reads (the first argument of its call) or puts out, and
    returns a pair: what takes its place, of the same shape and dtype, and anything that is to be
    found. So quantizers reach activations without a wrapped model. Otherwise as :func:`capture`,
    under ``jax.jit``, ``jax.grad`` and ``jax.vmap`` too; under ``nn.scan`` a function is called
    once for every step, and what it finds is stacked.

    Activation functions are sites too, by the names that :func:`activations` lists.

    Args:
        model, variables, *inputs, rngs, method, mutable, **kwargs: as for :func:`capture`.
        at: the functions, by site.

    Raises:
        TypeError, ValueError: as :func:`capture`; or a function returns no pair, or another shape.

    >>> import jax.numpy as jnp
    >>> from flax import linen as nn
    >>> model = nn.Sequential([nn.Dense(2), nn.relu])
    >>> params = {"layers_0": {"kernel": jnp.array([[1.0, -2.0]]), "bias": jnp.zeros(2)}}
    >>> at = {"layers_0:input": lambda x: (10 * x, x.shape), "relu1:output": lambda y: (-y, None)}
    >>> y, found = replace(model, params, jnp.ones((1, 1)), at=at)
    >>> y.tolist(), found["layers_0:input"]
    ([[-10.0, -0.0]], (1, 1))
    """
    where = "replace(model, variables, *inputs)"
    options = {"rngs": rngs, "method": method, "mutable": mutable}
    functions = _capture.sites(where, at)
    return _capture.replaced(_replace(where, model, variables, inputs, functions, options, kwargs))


def activations(
    model: nn.Module,
    variables: Mapping[str, Any],
    /,
    *inputs: Any,
    rngs: Any = None,
    method: Callable[..., Any] | str | None = None,
    mutable: Any = False,
    **kwargs: Any,
) -> tuple[Activation, ...]:
    """Returns a row for every activation function that a call of the model calls, in order.

    They are those of ``jax.nn``, found in the program by name. A ReLU that is written out
    (``jnp.maximum(x, 0)``, ``x * (x > 0)``, ``jnp.where(x > 0, x, 0)``) is a ReLU too, and what
    computes a GELU is a GELU. Names count the calls of each: ``"relu1"``, ``"relu2"``,
    ``"relu6_1"``. Nothing is computed; arguments are those of :func:`capture`.
    """
    where = "activations(model, variables, *inputs)"
    options = {"rngs": rngs, "method": method, "mutable": mutable}
    check(where, model, variables, inputs, {"method": method, **kwargs})
    variables = _whole(variables)

    def apply(variables: Any, inputs: Any, options: Any, kwargs: Any) -> Any:
        try:
            return model.apply(variables, *inputs, **options, **kwargs)
        except MISFITS as error:
            raise misfit(where, model, error) from error

    return activation_rows(trace(object(), apply, variables, inputs, options, kwargs).jaxpr.jaxpr)


def _whole(variables: Mapping[str, Any]) -> Mapping[str, Any]:
    return variables if isinstance(variables.get("params"), Mapping) else {"params": variables}


def _replace(
    where: str,
    model: nn.Module,
    variables: Mapping[str, Any],
    inputs: tuple[Any, ...],
    at: Mapping[_capture.Site, _capture.Function],
    options: dict[str, Any],
    kwargs: dict[str, Any],
) -> tuple[Any, dict[_capture.Site, Any]]:
    check(where, model, variables, inputs, {"method": options["method"], **kwargs})
    variables = _whole(variables)
    paths = flatten(meta.unbox(variables["params"])).leaves
    owners = {path: path.rpartition(".")[0] for path in paths}
    modules = {site.name: owners.get(site.name, site.name) for site in at}
    holders = {f"{owner}." for owner in owners.values()}
    functions = {
        name
        for name, path in modules.items()
        if is_activation(path) and not any(o.startswith(f"{path}.") for o in holders)
    }
    wanted = frozenset((modules[s.name], s.side) for s in at if s.name not in functions)
    program, seen = marked_program(where, model, (variables, inputs, options, kwargs), wanted)
    for name, path in modules.items():
        holds = any(owner.startswith(f"{path}.") for owner in holders)
        if path and path not in seen and not holds and name not in functions:
            raise _capture.unknown(where, name, [*owners.values(), *seen])
    result, calls = run(where, program, _capture.joined(at, modules))
    return result, _capture.found_by_site(where, at, modules, calls)


def marked_program(
    where: str, model: nn.Module, arguments: tuple[Any, ...], wanted: frozenset[tuple[str, str]]
) -> tuple[Program, dict[str, None]]:
    """Returns the program of ``model.apply`` with marks, and the paths of all that was called.

    Args:
        where: begins messages.
        model: the module.
        arguments: variables, inputs, options and keywords of the call.
        wanted: what is marked: a module's path, and ``"input"`` or ``"output"``.
    """
    seen: dict[str, None] = {}

    def apply(variables: Any, inputs: Any, options: Any, kwargs: Any, *, afresh: bool) -> Any:
        with contextlib.ExitStack() as contexts:

            def renew() -> None:
                if afresh:
                    contexts.enter_context(marking(object()))

            renew()
            contexts.enter_context(nn.intercept_methods(marker(wanted, seen, renew)))
            try:
                return model.apply(variables, *inputs, **options, **kwargs)
            except MISFITS as error:
                raise misfit(where, model, error) from error

    # nn.jit takes modules that differ in nothing but the name for the same, and traces the first
    # only. Where that may have happened, everything is traced once more, each call for itself.
    program = trace(wanted, partial(apply, afresh=False), *arguments)
    found, several = marked(program)
    if several or found != wanted:
        program = trace(wanted, partial(apply, afresh=True), *arguments)
    return program, seen
