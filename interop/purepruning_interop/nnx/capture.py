"""What the layers of an NNX model read and put out: seen or replaced, by pure functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from flax import nnx

from purepruning.layers import Activation, Layer
from purepruning_interop import _capture
from purepruning_interop._activations import activation_rows, with_activations
from purepruning_interop._marks import KEY, Program, run, trace
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
    at = _capture.looking(where, layers, of)
    found = _replace(where, model, inputs, at, method, mutable, kwargs)
    return _capture.captured(found)


def replace(
    model: nnx.Module,
    /,
    *inputs: Any,
    at: Mapping[str, Callable[[Any], tuple[Any, Any]]],
    method: Callable[..., Any] | str | None = None,
    mutable: Any = False,
    **kwargs: Any,
) -> tuple[Any, dict[str, Any]]:
    """Returns ``(model(*inputs), {site: what was found})`` with functions at sites of the model.

    A site is a layer's name with ``":input"`` or ``":output"``; its function is given what the
    layer reads (the first argument of its call) or puts out, and
    returns a pair: what takes its place, of the same shape and dtype, and anything that is to be
    found. So quantizers reach activations without a wrapped model. Otherwise as :func:`capture`.

    Activation functions are sites too, by the names that :func:`activations` lists.

    Args:
        model, *inputs, method, mutable, **kwargs: as for :func:`capture`.
        at: the functions, by site.

    Raises:
        TypeError, ValueError: as :func:`capture`; or a function returns no pair, or another shape.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> model = nnx.Sequential(nnx.Linear(1, 2, rngs=nnx.Rngs(0)), nnx.relu)
    >>> model.layers[0].kernel[...] = jnp.array([[1.0, -2.0]])
    >>> at = {"layers.0:input": lambda x: (10 * x, x.shape), "relu1:output": lambda y: (-y, None)}
    >>> y, found = replace(model, jnp.ones((1, 1)), at=at)
    >>> y.tolist(), found["layers.0:input"]
    ([[-10.0, -0.0]], (1, 1))
    """
    where = "replace(model, *inputs)"
    functions = _capture.sites(where, at)
    found = _replace(where, model, inputs, functions, method, mutable, kwargs)
    return _capture.replaced(found)


def activations(
    model: nnx.Module,
    /,
    *inputs: Any,
    method: Callable[..., Any] | str | None = None,
    **kwargs: Any,
) -> tuple[Activation, ...]:
    """Returns a row for every activation function that a call of the model calls, in order.

    They are those of ``jax.nn``, found in the program by name. A ReLU that is written out
    (``jnp.maximum(x, 0)``, ``x * (x > 0)``, ``jnp.where(x > 0, x, 0)``) is a ReLU too, and what
    computes a GELU is a GELU. Names count the calls of each: ``"relu1"``, ``"relu2"``,
    ``"relu6_1"``. Nothing is computed; arguments are those of :func:`capture`.
    """
    check("activations(model, *inputs)", model)
    graphdef, state = nnx.split(model)

    def call(state: Any, inputs: Any, kwargs: Any) -> Any:
        return _capture.call_model(nnx.merge(graphdef, state), method, inputs, kwargs)

    return activation_rows(trace(object(), call, state, inputs, kwargs).jaxpr.jaxpr)


def _replace(
    where: str,
    model: nnx.Module,
    inputs: tuple[Any, ...],
    at: Mapping[_capture.Site, _capture.Function],
    method: Callable[..., Any] | str | None,
    mutable: Any,
    kwargs: dict[str, Any],
) -> tuple[Any, dict[_capture.Site, Any]]:
    check(where, model)
    found = list(walk(model, "", ()))
    first = {id(module): name for name, module, _ in reversed(found)}
    known = {join(name, key): first[id(module)] for name, module, own in found for key in own}
    known |= {name: first[id(module)] for name, module, _ in found}
    names = [site.name for site in at]
    modules = _capture.find(where, names, with_activations(names, known))
    program = marked_program(model, inputs, _capture.sides(at, modules), method, mutable, kwargs)
    result, calls = run(where, program, _capture.joined(at, modules))
    return result, _capture.found_by_site(where, at, modules, calls)


def marked_program(
    model: nnx.Module,
    inputs: tuple[Any, ...],
    sides: Mapping[str, tuple[str, ...]],
    method: Any,
    mutable: Any,
    kwargs: dict[str, Any],
) -> Program:
    """Returns the program of a call, with marks at these sides of modules, by name."""
    graphdef, state = nnx.split(model)

    def call(state: Any, inputs: Any, kwargs: Any) -> Any:
        copy = nnx.merge(graphdef, state)
        for name, module, _ in list(walk(copy, "", ())):
            if name in sides and callable(module):
                pytree = not jax.tree_util.all_leaves([module])
                object.__setattr__(module, "__class__", marking(type(module), pytree))
                vars(module)[KEY] = name, sides[name]
        result = _capture.call_model(copy, method, inputs, kwargs)
        return result if mutable is False else (result, nnx.state(copy, mutable))

    return trace(tuple(sides.items()), call, state, inputs, kwargs)
