"""What the layers of a Haiku function read and put out: seen or replaced, by pure functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import haiku as hk

from purepruning.layers import Activation, Layer
from purepruning_interop import _capture
from purepruning_interop._activations import activation_rows, with_activations
from purepruning_interop._marks import run, trace
from purepruning_interop._table import join
from purepruning_interop.haiku.layers import (
    Tracked,
    applied,
    check,
    dotted,
    leading_arguments,
    marker,
    split,
)


def capture(
    model: Any,
    variables: Mapping[str, Any],
    /,
    *inputs: Any,
    layers: Iterable[str | Layer],
    rng: Any = None,
    of: _capture.Of = "outputs",
    **kwargs: Any,
) -> tuple[Any, dict[str, Any]]:
    """Returns ``(model.apply(...), {layer: its output})`` for the layers asked for.

    A pure function of arrays, for ``jax.jit``, ``jax.grad`` (through the outputs too) and
    ``jax.vmap``. The first part is just what ``apply`` returns: with a state, a pair of the result
    and the new state. An output is what the module's ``__call__`` returned, before any activation
    that follows: that of a layer under ``hk.scan`` or ``hk.layer_stack`` is stacked, the steps on a
    new leading axis; under a vmap likewise, after the axes of scans. A layer called several times
    gives the list of its outputs. Without ``jax.jit`` around it every call is traced anew.

    Args:
        model: what ``hk.transform``, ``hk.transform_with_state`` or ``hk.without_apply_rng``
            returned; of a multi-transformed one, ``hk.Transformed(init, apply.f)``.
        variables: its parameters, or ``{"params": params, "state": state}`` for one with a state.
        *inputs, **kwargs: what a call takes after params, state and key.
        layers: rows of the layer table, or names: of a module that has parameters itself, or of
            one of its parameters, with dots for ``/`` and ``/~/``.
        of: ``"outputs"``, or ``"inputs"``: the first argument of each layer's call instead, for
            :mod:`purepruning.stats.inputs`.
        rng: the key that ``apply`` takes, or None.

    Raises:
        TypeError: ``model`` has no ``apply``, ``variables`` are no mapping of mappings, or the
            state, or the key, is missing or too much.
        ValueError: a layer is unknown, is never called in this forward pass, or is called where
            there is no one output: inside ``hk.cond``, ``hk.switch``, ``hk.while_loop`` or a
            function with a custom derivative.

    >>> import haiku as hk, jax.numpy as jnp
    >>> model = hk.transform(lambda x: hk.nets.MLP([2], activate_final=True)(x))
    >>> params = {"mlp/~/linear_0": {"w": jnp.array([[1.0, -2.0]]), "b": jnp.zeros(2)}}
    >>> y, outputs = capture(model, params, jnp.ones((1, 1)), layers=["mlp.linear_0"])
    >>> y.tolist(), outputs["mlp.linear_0"].tolist()
    ([[1.0, 0.0]], [[1.0, -2.0]])
    """
    where = "capture(model, variables, *inputs)"
    at = _capture.looking(where, layers, of)
    return _capture.captured(_replace(where, model, variables, inputs, at, rng, kwargs))


def replace(
    model: Any,
    variables: Mapping[str, Any],
    /,
    *inputs: Any,
    at: Mapping[str, Callable[[Any], tuple[Any, Any]]],
    rng: Any = None,
    **kwargs: Any,
) -> tuple[Any, dict[str, Any]]:
    """Returns ``(model.apply(...), {site: what was found})`` with functions at sites of the model.

    A site is a layer's name with ``":input"`` or ``":output"``; its function is given what the
    layer reads (the first argument of its call) or puts out, and
    returns a pair: what takes its place, of the same shape and dtype, and anything that is to be
    found. So quantizers reach activations without a wrapped model. Otherwise as :func:`capture`.

    Activation functions are sites too, by the names that :func:`activations` lists.

    Args:
        model, variables, *inputs, rng, **kwargs: as for :func:`capture`.
        at: the functions, by site.

    Raises:
        TypeError, ValueError: as :func:`capture`; or a function returns no pair, or another shape.

    >>> import haiku as hk, jax.numpy as jnp
    >>> model = hk.transform(lambda x: hk.nets.MLP([2], activate_final=True)(x))
    >>> params = {"mlp/~/linear_0": {"w": jnp.array([[1.0, -2.0]]), "b": jnp.zeros(2)}}
    >>> at = {"mlp.linear_0:input": lambda x: (10 * x, x.shape)}
    >>> y, found = replace(model, params, jnp.ones((1, 1)), at=at)
    >>> y.tolist(), found["mlp.linear_0:input"]
    ([[10.0, 0.0]], (1, 1))
    """
    where = "replace(model, variables, *inputs)"
    functions = _capture.sites(where, at)
    return _capture.replaced(_replace(where, model, variables, inputs, functions, rng, kwargs))


def activations(
    model: Any, variables: Mapping[str, Any], /, *inputs: Any, rng: Any = None, **kwargs: Any
) -> tuple[Activation, ...]:
    """Returns a row for every activation function that a call of the model calls, in order.

    They are those of ``jax.nn``, found in the program by name. A ReLU that is written out
    (``jnp.maximum(x, 0)``, ``x * (x > 0)``, ``jnp.where(x > 0, x, 0)``) is a ReLU too, and what
    computes a GELU is a GELU. Names count the calls of each: ``"relu1"``, ``"relu2"``,
    ``"relu6_1"``. Nothing is computed; arguments are those of :func:`capture`.
    """
    where = "activations(model, variables, *inputs)"
    check(where, model, variables)
    params, state = split(variables)
    leading = leading_arguments(where, model, state, rng)

    def apply(params: Any, leading: Any, inputs: Any, kwargs: Any) -> Any:
        return applied(where, model, params, *leading, *inputs, **kwargs)

    return activation_rows(trace(object(), apply, params, leading, inputs, kwargs).jaxpr.jaxpr)


def _replace(
    where: str,
    model: Any,
    variables: Mapping[str, Any],
    inputs: tuple[Any, ...],
    at: Mapping[_capture.Site, _capture.Function],
    rng: Any,
    kwargs: dict[str, Any],
) -> tuple[Any, dict[_capture.Site, Any]]:
    check(where, model, variables)
    params, state = split(variables)
    names = dotted(params)
    known = {join(name, key): module for module, name in names.items() for key in params[module]}
    known |= {name: module for module, name in names.items() if name}
    asked = [site.name for site in at]
    modules = _capture.find(where, asked, with_activations(asked, known))
    sides = _capture.sides(at, modules)
    leading = leading_arguments(where, model, state, rng)
    called: list[dict[Any, str]] = []

    def apply(params: Any, leading: Any, inputs: Any, kwargs: Any) -> Any:
        boxed = {
            module: {key: Tracked(leaf, module) for key, leaf in own.items()}
            if module in sides
            else own
            for module, own in params.items()
        }
        get, intercept, of_calls = marker(sides)
        called.append(of_calls)

        def inside() -> Any:
            with hk.custom_getter(get), hk.intercept_methods(intercept):
                return model.apply(boxed, *leading, *inputs, **kwargs)

        # A getter stands inside a transformed function only, and must come before the model's own.
        return applied(where, hk.transform(inside), {}, None)

    program = trace(tuple(sides.items()), apply, params, leading, inputs, kwargs)
    functions = _capture.joined(at, modules)
    keys = {(call, "input"): (name, "input") for call, name in called[-1].items()}
    by_call = {key: functions[of] for key, of in keys.items() if of in functions}
    result, calls = run(where, program, functions | by_call)
    for key, found in list(calls.items()):
        if key in keys:
            calls.setdefault(keys[key], []).extend(found)
    return result, _capture.found_by_site(where, at, modules, calls)
