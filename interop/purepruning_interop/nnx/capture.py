"""Outputs of the layers of an NNX model, as a pure function."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
from flax import nnx

from purepruning.layers import Layer
from purepruning_interop import _capture
from purepruning_interop._marks import KEY, collect
from purepruning_interop._table import join
from purepruning_interop.nnx.layers import check, marking, walk


def capture(
    model: nnx.Module,
    /,
    *inputs: Any,
    layers: Iterable[str | Layer],
    method: Callable[..., Any] | str | None = None,
    mutable: Any = False,
    of: _capture.Of = "outputs",
    **kwargs: Any,
) -> tuple[Any, dict[str, Any]]:
    """Returns ``(model(*inputs), {layer: its output})`` for the layers asked for.

    The model is not changed: a copy runs (``nnx.split``, ``nnx.merge``), so what the call does to
    variables (statistics of a batch norm, counts of random keys) is dropped, or with ``mutable``
    returned: ``((result, state), outputs)``, for ``nnx.update(model, state)``. Works under
    ``nnx.jit`` and other transforms of NNX with the model as argument, and under those of JAX with
    a merged one; gradients flow through the outputs too.

    An output is what the layer's ``__call__`` returned, before any activation that follows: that
    of a layer under ``nnx.scan`` is stacked, the steps on a new leading axis; under ``nnx.vmap``
    likewise, after the axes of scans. A layer called several times gives the list of its outputs,
    under whichever of its names. Without ``nnx.jit`` around it every call is traced anew.

    Args:
        model: the module.
        *inputs, **kwargs: what a call of the model takes.
        layers: rows of the layer table, or names; the dotted path of any module is a name, that of
            a parameter stands for the module that owns it.
        of: ``"outputs"``, or ``"inputs"``: the first argument of each layer's call instead, for
            :mod:`purepruning.stats.inputs`.
        method: what to call instead: the name of a method, or a function of the model and inputs.
        mutable: an ``nnx`` filter, such as ``nnx.BatchStat``: the variables to return.

    Raises:
        TypeError: ``model`` is no ``nnx.Module``.
        ValueError: a layer is unknown, is never called in this forward pass, or is called where
            there is no one output: inside ``nnx.cond``, ``nnx.switch``, ``nnx.while_loop`` or
            ``nnx.custom_vjp``.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> model = nnx.Sequential(nnx.Linear(1, 2, rngs=nnx.Rngs(0)), nnx.relu)
    >>> model.layers[0].kernel[...] = jnp.array([[1.0, -2.0]])
    >>> y, outputs = capture(model, jnp.ones((1, 1)), layers=["layers.0"])
    >>> y.tolist(), outputs["layers.0"].tolist()
    ([[1.0, 0.0]], [[1.0, -2.0]])
    """
    where = "capture(model, *inputs)"
    check(where, model)
    _capture.check_of(where, of)
    found = list(walk(model, "", ()))
    first = {id(module): name for name, module, _ in reversed(found)}
    known = {join(name, key): first[id(module)] for name, module, own in found for key in own}
    known |= {name: first[id(module)] for name, module, _ in found}
    modules = _capture.find(where, _capture.asked(where, layers), known)
    marked = frozenset(modules.values())
    graphdef, state = nnx.split(model)

    def call(state: Any, inputs: Any, kwargs: Any) -> Any:
        copy = nnx.merge(graphdef, state)
        for name, module, _ in list(walk(copy, "", ())):
            if name in marked and callable(module):
                pytree = not jax.tree_util.all_leaves([module])
                object.__setattr__(module, "__class__", marking(type(module), pytree))
                vars(module)[KEY] = (name, of)
        if callable(method):
            result = method(copy, *inputs, **kwargs)
        else:
            result = getattr(copy, method or "__call__")(*inputs, **kwargs)
        return result if mutable is False else (result, nnx.state(copy, mutable))

    result, calls = collect(where, (marked, of), call, state, inputs, kwargs)
    return result, _capture.outputs(where, modules, calls)
