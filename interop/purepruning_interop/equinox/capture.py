"""Outputs of the layers of an Equinox model, as a pure function."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import equinox as eqx
import jax

from purepruning.layers import Layer
from purepruning_interop import _capture
from purepruning_interop._marks import KEY, collect
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
    check(where, model)
    _capture.check_of(where, of)
    found = list(walk(model, ""))
    holders = {name for name, node, _ in found if isinstance(node, eqx.Module)}
    known = {join(name, key): name for name, _, own in found for key in own}
    known |= {name: name for name in holders}
    modules = _capture.find(where, _capture.asked(where, layers), known)
    marked = frozenset(modules.values())

    def call(model: Any, inputs: Any, kwargs: Any) -> Any:
        copy = _with_marks(model, "", marked, of)
        if callable(method):
            return method(copy, *inputs, **kwargs)
        return getattr(copy, method or "__call__")(*inputs, **kwargs)

    result, calls = collect(where, (marked, of), call, model, inputs, kwargs)
    return result, _capture.outputs(where, modules, calls)


def _with_marks(node: Any, name: str, marked: frozenset[str], of: _capture.Of) -> Any:
    """Returns ``node`` with the modules of these names replaced by ones that mark their calls.

    They are of a subclass, so that ``isinstance`` and attributes are as before.
    """
    if any(key.startswith(f"{name}." if name else "") and key != name for key in marked):
        entries, treedef = jax.tree_util.tree_flatten_with_path(
            node, is_leaf=lambda child: child is not node
        )
        parts = []
        for keys, child in entries:
            key = jax.tree_util.keystr(keys, simple=True, separator=".")
            parts.append(_with_marks(child, join(name, key), marked, of))
        node = jax.tree.unflatten(treedef, parts)
    if name not in marked or not callable(node):
        return node
    cls: Any = type(node)
    copy: Any = object.__new__(marking(cls))
    for field, value in {**vars(node), KEY: (name, of)}.items():
        object.__setattr__(copy, field, value)
    return copy
