"""Outputs of the layers of a Haiku function, as a pure function."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import haiku as hk

from purepruning.layers import Layer
from purepruning_interop import _capture
from purepruning_interop._marks import collect
from purepruning_interop._table import join
from purepruning_interop.haiku.layers import (
    Tracked,
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
    check(where, model, variables)
    _capture.check_of(where, of)
    params, state = split(variables)
    names = dotted(params)
    known = {join(name, key): module for module, name in names.items() for key in params[module]}
    known |= {name: module for module, name in names.items() if name}
    modules = _capture.find(where, _capture.asked(where, layers), known)
    marked = frozenset(modules.values())
    leading = leading_arguments(where, model, state, rng)

    def apply(params: Any, leading: Any, inputs: Any, kwargs: Any) -> Any:
        boxed = {
            module: {key: Tracked(leaf, module) for key, leaf in own.items()}
            if module in marked
            else own
            for module, own in params.items()
        }
        get, intercept = marker(of)

        def run() -> Any:
            with hk.custom_getter(get), hk.intercept_methods(intercept):
                return model.apply(boxed, *leading, *inputs, **kwargs)

        # A getter stands inside a transformed function only, and must come before the model's own.
        return hk.transform(run).apply({}, None)

    result, calls = collect(where, (marked, of), apply, params, leading, inputs, kwargs)
    return result, _capture.outputs(where, modules, calls)
