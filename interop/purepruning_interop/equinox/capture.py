"""What the layers of an Equinox model read and put out: seen or replaced, by pure functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import equinox as eqx
import jax

from purepruning.layers import Activation, Layer
from purepruning_interop import _capture
from purepruning_interop._activations import activation_rows, with_activations
from purepruning_interop._marks import KEY, Program, run, trace
from purepruning_interop._table import join
from purepruning_interop.equinox.layers import check, marking, walk


def capture(
    model: Any,
    /,
    *inputs: Any,
    layers: Iterable[str | Layer],
    method: Callable[..., Any] | str | None = None,
    of: _capture.Of = "outputs",
    **kwargs: Any,
) -> tuple[Any, dict[str, Any]]:
    """Returns ``(model(*inputs), {layer: its output})`` for the layers asked for.

    A pure function, for ``eqx.filter_jit``, ``eqx.filter_grad`` (through the outputs too) and
    ``eqx.filter_vmap``; the model is not changed. The first part is just what the model returns:
    of a model with a state, a pair of the result and the new state. A model of one example is
    mapped over a batch as usual, ``jax.vmap(lambda x: capture(model, x, layers=names))(batch)``,
    and then the outputs have the batch as leading axis.

    An output is what the layer's ``__call__`` returned, before any activation that follows: that
    of a layer called inside ``jax.lax.scan`` is stacked, the steps on a new leading axis; inside
    ``jax.vmap`` likewise, after the axes of scans. A layer called several times gives the list of
    its outputs. Without a jit around it every call is traced anew.

    Args:
        model: a module, or a pytree of modules.
        *inputs, **kwargs: what a call of the model takes.
        layers: rows of the layer table, or names; the dotted path of any module is a name, that of
            a parameter stands for the module that owns it.
        of: ``"outputs"``, or ``"inputs"``: the first argument of each layer's call instead, for
            :mod:`purepruning.stats.inputs`.
        method: what to call instead: the name of a method, or a function of the model and inputs.

    Raises:
        TypeError: ``model`` contains no ``eqx.Module``.
        ValueError: a layer is unknown, is never called in this forward pass, or is called where
            there is no one output: inside ``jax.lax.cond``, ``jax.lax.while_loop`` or a function
            with a custom derivative.

    >>> import equinox as eqx, jax, jax.numpy as jnp
    >>> model = eqx.nn.MLP(2, 1, width_size=3, depth=1, key=jax.random.key(0))
    >>> y, outputs = capture(model, jnp.ones(2), layers=["layers.0"])
    >>> y.shape, outputs["layers.0"].shape
    ((1,), (3,))
    """
    where = "capture(model, *inputs)"
    at = _capture.looking(where, layers, of)
    return _capture.captured(_replace(where, model, inputs, at, method, kwargs))


def replace(
    model: Any,
    /,
    *inputs: Any,
    at: Mapping[str, Callable[[Any], tuple[Any, Any]]],
    method: Callable[..., Any] | str | None = None,
    **kwargs: Any,
) -> tuple[Any, dict[str, Any]]:
    """Returns ``(model(*inputs), {site: what was found})`` with functions at sites of the model.

    A site is a layer's name with ``":input"`` or ``":output"``; its function is given what the
    layer reads (the first argument of its call) or puts out, and
    returns a pair: what takes its place, of the same shape and dtype, and anything that is to be
    found. So quantizers reach activations without a wrapped model. Otherwise as :func:`capture`.

    A model of one example is given one by ``jax.vmap``, and then so is a function. To give it the
    whole batch, as quantizers need, call the mapped model:
    ``replace(model, batch, at=at, method=lambda model, batch: jax.vmap(model)(batch))``.

    Activation functions are sites too, by the names that :func:`activations` lists.

    Args:
        model, *inputs, method, **kwargs: as for :func:`capture`.
        at: the functions, by site.

    Raises:
        TypeError, ValueError: as :func:`capture`; or a function returns no pair, or another shape.

    >>> import equinox as eqx, jax, jax.numpy as jnp
    >>> model = eqx.nn.MLP(2, 1, width_size=3, depth=1, key=jax.random.key(0))
    >>> at = {"layers.1:input": lambda h: (0 * h, h.shape), "relu1:output": lambda h: (h, None)}
    >>> y, found = replace(model, jnp.ones(2), at=at)
    >>> bool(y[0] == model.layers[1].bias[0]), found["layers.1:input"]
    (True, (3,))
    """
    where = "replace(model, *inputs)"
    functions = _capture.sites(where, at)
    return _capture.replaced(_replace(where, model, inputs, functions, method, kwargs))


def activations(
    model: Any, /, *inputs: Any, method: Callable[..., Any] | str | None = None, **kwargs: Any
) -> tuple[Activation, ...]:
    """Returns a row for every activation function that a call of the model calls, in order.

    They are those of ``jax.nn``, found in the program by name. A ReLU that is written out
    (``jnp.maximum(x, 0)``, ``x * (x > 0)``, ``jnp.where(x > 0, x, 0)``) is a ReLU too, and what
    computes a GELU is a GELU. Names count the calls of each: ``"relu1"``, ``"relu2"``,
    ``"relu6_1"``. Nothing is computed; arguments are those of :func:`capture`.
    """
    check("activations(model, *inputs)", model)

    def call(model: Any, inputs: Any, kwargs: Any) -> Any:
        return _capture.call_model(model, method, inputs, kwargs)

    return activation_rows(trace(object(), call, model, inputs, kwargs).jaxpr.jaxpr)


def _replace(
    where: str,
    model: Any,
    inputs: tuple[Any, ...],
    at: Mapping[_capture.Site, _capture.Function],
    method: Callable[..., Any] | str | None,
    kwargs: dict[str, Any],
) -> tuple[Any, dict[_capture.Site, Any]]:
    check(where, model)
    found = list(walk(model, ""))
    holders = {name for name, node, _ in found if isinstance(node, eqx.Module)}
    known = {join(name, key): name for name, _, own in found for key in own}
    known |= {name: name for name in holders}
    names = [site.name for site in at]
    modules = _capture.find(where, names, with_activations(names, known))
    sides = _capture.sides(at, modules)

    program = marked_program(model, inputs, sides, method, kwargs)
    result, calls = run(where, program, _capture.joined(at, modules))
    return result, _capture.found_by_site(where, at, modules, calls)


def marked_program(
    model: Any,
    inputs: tuple[Any, ...],
    sides: Mapping[str, tuple[str, ...]],
    method: Any,
    kwargs: dict[str, Any],
) -> Program:
    """Returns the program of a call, with marks at these sides of modules, by name."""

    def call(model: Any, inputs: Any, kwargs: Any) -> Any:
        return _capture.call_model(_with_marks(model, "", sides), method, inputs, kwargs)

    return trace(tuple(sides.items()), call, model, inputs, kwargs)


def _with_marks(node: Any, name: str, sides: Mapping[str, tuple[str, ...]]) -> Any:
    """Returns ``node`` with the modules of these names replaced by ones that mark what they return.

    They are of a subclass, so that ``isinstance`` and attributes are as before.
    """
    if any(key.startswith(f"{name}." if name else "") and key != name for key in sides):
        entries, treedef = jax.tree_util.tree_flatten_with_path(
            node, is_leaf=lambda child: child is not node
        )
        parts = []
        for keys, child in entries:
            key = jax.tree_util.keystr(keys, simple=True, separator=".")
            parts.append(_with_marks(child, join(name, key), sides))
        node = jax.tree.unflatten(treedef, parts)
    if name not in sides or not callable(node):
        return node
    cls: Any = type(node)
    copy: Any = object.__new__(marking(cls))
    for field, value in {**vars(node), KEY: (name, sides[name])}.items():
        object.__setattr__(copy, field, value)
    return copy
