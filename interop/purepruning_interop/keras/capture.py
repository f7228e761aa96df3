"""What the layers of a Keras model read and put out: seen or replaced, by pure functions."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from purepruning.layers import Activation, Layer
from purepruning_interop import _capture
from purepruning_interop._activations import activation_rows, with_activations
from purepruning_interop._marks import KEY, collect, marking_class, trace
from purepruning_interop.keras.variables import Method, call, current, function, variables
from purepruning_interop.keras.walk import check, walk


def capture(
    model: Any,
    /,
    *inputs: Any,
    layers: Iterable[str | Layer],
    params: Mapping[str, Any] | None = None,
    method: Method = None,
    mutable: bool = False,
    of: _capture.Of = "outputs",
    **kwargs: Any,
) -> tuple[Any, dict[str, Any]]:
    """Returns ``(model(*inputs), {layer: its output})`` for the layers asked for.

    A pure function of the inputs and ``params``, for ``jax.jit``, ``jax.grad`` (through outputs
    too) and ``jax.vmap``. What the call writes to variables (averages of a batch norm) is dropped,
    or with ``mutable`` returned: ``((result, params), outputs)``, for ``load(model, params)``.
    While it is traced, layers of the model are of classes that mark their calls: one thread at a
    time.

    An output is what the layer's call returned, with its own ``activation`` applied: that is a part
    of a Keras layer. One of a recurrent cell is stacked, the steps on a new leading axis. A layer
    called several times gives the list of its outputs. Every call is traced anew.

    Args:
        model: the built model.
        *inputs, **kwargs: what a call of the model takes, ``training=True`` included.
        layers: rows of the layer table, or names; the name of any layer is one, and the path of a
            variable stands for the layer that holds it.
        of: ``"outputs"``, or ``"inputs"``: the first argument of each layer's call instead, for
            :mod:`purepruning.stats.inputs`.
        params: arrays in place of those of the model's variables, by path; what is not in it is
            as in the model.
        method: what to call instead: the name of a method, or a function of the model and inputs.
        mutable: whether to return the variables as they are after the call.

    Raises:
        TypeError: ``model`` is no Keras layer.
        ValueError: a layer is unknown, or never called in this forward pass.

    >>> import keras, numpy as np
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.ReLU(name="relu")])
    >>> y, outputs = capture(model, np.float32([[1.0, -2.0, 3.0]]), layers=["relu"], of="inputs")
    >>> y.tolist(), outputs["relu"].tolist()
    ([[1.0, 0.0, 3.0]], [[1.0, -2.0, 3.0]])
    """
    where = "capture(model, *inputs)"
    at = _capture.looking(where, layers, of)
    found = _replace(where, model, params, inputs, at, method, mutable, kwargs)
    return _capture.captured(found)


def replace(
    model: Any,
    /,
    *inputs: Any,
    at: Mapping[str, Callable[[Any], tuple[Any, Any]]],
    params: Mapping[str, Any] | None = None,
    method: Method = None,
    mutable: bool = False,
    **kwargs: Any,
) -> tuple[Any, dict[str, Any]]:
    """Returns ``(model(*inputs), {site: what was found})`` with functions at sites of the model.

    A site is a layer's name with ``":input"`` or ``":output"``; its function is given what the
    layer reads (the first argument of its call) or puts out, and returns a pair: what takes its
    place, of the same shape and dtype, and anything that is to be found. So quantizers reach
    activations without a wrapped model. Otherwise as :func:`capture`.

    Activation functions are sites too, by the names that :func:`activations` lists.

    Args:
        model, *inputs, params, method, mutable, **kwargs: as for :func:`capture`.
        at: the functions, by site.

    Raises:
        TypeError, ValueError: as :func:`capture`; or a function returns no pair, or another shape.
    """
    where = "replace(model, *inputs)"
    functions = _capture.sites(where, at)
    found = _replace(where, model, params, inputs, functions, method, mutable, kwargs)
    return _capture.replaced(found)


def activations(
    model: Any, /, *inputs: Any, method: Method = None, **kwargs: Any
) -> tuple[Activation, ...]:
    """Returns a row for every activation function that a call of the model calls, in order.

    They are those of ``jax.nn``, found in the program by name, whether a layer's ``activation`` or
    a layer of its own; what computes a GELU is a GELU. Names count the calls of each:
    ``"relu1"``, ``"relu2"``, ``"relu6_1"``. Nothing is computed; arguments are those of
    :func:`capture`.
    """
    check("activations(model, *inputs)", model)
    fn, params = function(model, method=method)

    def run(params: Any, inputs: Any, kwargs: Any) -> Any:
        return fn(params, *inputs, **kwargs)

    return activation_rows(trace(object(), run, params, inputs, kwargs).jaxpr.jaxpr)


def _replace(
    where: str,
    model: Any,
    params: Mapping[str, Any] | None,
    inputs: tuple[Any, ...],
    at: Mapping[_capture.Site, _capture.Function],
    method: Method,
    mutable: bool,
    kwargs: dict[str, Any],
) -> tuple[Any, dict[_capture.Site, Any]]:
    check(where, model)
    found = walk(model)
    known = {name: held.names[0] for held in found for name in (*held.names, *held.variables)}
    names = [site.name for site in at]
    modules = _capture.find(where, names, with_activations(names, known))
    sides = _capture.sides(at, modules)
    own = variables(model)
    arrays = current(where, own, params)

    marked = {held.names[0]: held.layer for held in found if held.names[0] in sides}
    cells = {id(layer) for layer in marked.values()}
    holders = [h.layer for h in found if id(getattr(h.layer, "cell", None)) in cells]

    def run(params: Any, inputs: Any, kwargs: Any) -> Any:
        with _marking(marked, sides, holders):
            result, after = call(model, own, params, method, inputs, kwargs)
        return (result, after) if mutable else result

    result, calls = collect(
        where,
        tuple(sides.items()),
        run,
        arrays,
        inputs,
        kwargs,
        at=_capture.joined(at, modules),
    )
    return result, _capture.found_by_site(where, at, modules, calls)


@contextlib.contextmanager
def _marking(
    layers: Mapping[str, Any], sides: Mapping[str, tuple[str, ...]], holders: Iterable[Any]
) -> Iterator[None]:
    """While it lasts, these layers mark their calls: they are of a subclass of their own.

    It is their ``call`` that does, since ``TimeDistributed`` calls nothing else. ``holders`` are
    the recurrent layers around cells, which must not compute them in an optimised way of their own.
    """
    classes = {name: type(layer) for name, layer in layers.items()}
    optimised = [(holder, vars(holder).get("use_cudnn")) for holder in holders]
    try:
        for name, layer in layers.items():
            cls: Any = classes[name]
            object.__setattr__(layer, "__class__", _marking_class(cls))
            vars(layer)[KEY] = name, sides[name]
        for holder, _ in optimised:
            vars(holder)["use_cudnn"] = False
        yield
    finally:
        for name, layer in layers.items():
            object.__setattr__(layer, "__class__", classes[name])
            vars(layer).pop(KEY, None)
        for holder, value in optimised:
            vars(holder)["use_cudnn"] = value


@functools.cache
def _marking_class(cls: Any) -> Any:
    return marking_class(cls, method="call")
