"""Coupling, shrinking and costs of Equinox models."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax

import purepruning as pp
from purepruning.coupling.cost import ModelCost
from purepruning.coupling.shrink_report import Norms, Shrunk
from purepruning.coupling.unit_masks import Conflicts
from purepruning.jaxpr.call import trace_call
from purepruning.jaxpr.count import cost_of
from purepruning.trees import flatten
from purepruning.types import Masks, Params
from purepruning_interop._native import Change, attributes, with_model
from purepruning_interop._table import children, float_shapes, join
from purepruning_interop.equinox.layers import check

#: What to call of a model: the name of a method, or a function of the model and inputs.
Method = Callable[..., Any] | str | None


def function(model: Any, *, method: Method = None) -> tuple[Callable[..., Any], Params]:
    """Returns ``fn(params, *inputs, **kwargs)`` and its params: all arrays of the model.

    Args:
        model: a pytree of modules; ``(model, state)`` where there are statistics.
        method: what to call instead: the name of a method, or a function of the model and inputs.
            Equinox modules take one sample: for batches give
            ``lambda model, x: jax.vmap(model)(x)``.

    Raises:
        TypeError: ``model`` contains no ``eqx.Module``.

    >>> import equinox as eqx, jax
    >>> fn, params = function(eqx.nn.Linear(3, 2, key=jax.random.key(0)))
    >>> fn(params, jax.numpy.ones(3)).shape
    (2,)
    """
    check("function(model)", model)
    params, static = eqx.partition(model, _is_array)

    def fn(params: Any, *inputs: Any, **kwargs: Any) -> Any:
        made = eqx.combine(params, static)
        if callable(method):
            return method(made, *inputs, **kwargs)
        return getattr(made, method or "__call__")(*inputs, **kwargs)

    return fn, params


def couple(
    model: Any, /, *inputs: Any, outputs: Any = True, method: Method = None, **kwargs: Any
) -> pp.Coupling:
    """Returns which channels of the model's arrays are coupled: :func:`purepruning.couple`.

    Args:
        model: a pytree of modules; ``(model, state)`` where there are statistics.
        *inputs, **kwargs: what a call of it takes; arrays may be shapes. Its own keywords
            ``outputs`` and ``method`` can be given through ``method`` only.
        outputs: which outputs stay whole, as for :func:`purepruning.couple`.
        method: what to call instead: the name of a method, or a function of the model and inputs.

    Raises:
        TypeError, ValueError: ``model`` contains no ``eqx.Module``; or what the call raises.
    """
    check("couple(model, *inputs)", model)
    fn, params = function(model, method=method)
    return pp.couple(fn, params, *inputs, outputs=outputs, **kwargs)


def count(model: Any, /, *inputs: Any, method: Method = None, **kwargs: Any) -> ModelCost:
    """Returns parameters, multiply-adds and activation bytes: :func:`purepruning.count`.

    Arrays of whole numbers and what belongs to an ``eqx.nn.State`` are no parameters.

    Args:
        model, *inputs, method, **kwargs: as for :func:`couple`.

    Raises:
        TypeError, ValueError: as :func:`couple`.
    """
    check("count(model, *inputs)", model)
    fn, params = function(model, method=method)
    return cost_of(trace_call(fn, params, inputs, kwargs), _trained(model))


def shrink(
    model: Any,
    masks: Masks,
    coupling: pp.Coupling,
    /,
    *inputs: Any,
    method: Method = None,
    norms: Norms = "original",
    conflicts: Conflicts = "keep",
    **kwargs: Any,
) -> Shrunk:
    """Returns a model of the same classes with smaller arrays, where one computes the same.

    Attributes that name sizes (features, channels, groups, heads) are corrected in Equinox's own
    layers. The model is run on random parameters and compared with the shrunk function; where it
    does not run or differs, ``model`` is None and the function is what there is.

    Args:
        model: the model, which stays as it is.
        masks, coupling, norms, conflicts: see :func:`purepruning.shrink`.
        *inputs, method, **kwargs: as for :func:`couple`. Keywords ``norms`` and ``conflicts`` of
            the model's own can be given through ``method`` only.

    Raises:
        TypeError, ValueError, KeyError: see :func:`purepruning.shrink`.
    """
    check("shrink(model, masks, coupling, *inputs)", model)
    fn, params = function(model, method=method)
    options: dict[str, Any] = {"norms": norms, "conflicts": conflicts, **kwargs}
    small = pp.shrink(fn, params, masks, coupling, *inputs, **options)
    return _with_model(model, small, method, inputs, kwargs)


def rebuild(
    model: Any,
    plan: pp.Plan,
    /,
    *inputs: Any,
    method: Method = None,
    norms: Norms = "original",
    **kwargs: Any,
) -> Shrunk:
    """Returns what :func:`shrink` returned, again, from the plan of its report.

    The weights of the small model are then read into it, with ``eqx.tree_deserialise_leaves``;
    those of ``model`` do not matter, and it may be abstract (``eqx.filter_eval_shape``), and then
    the small one is.

    Args:
        model: the whole model, as it is built.
        plan: of the report, maybe from a file (:func:`purepruning.load_plan`).
        *inputs, method, norms, **kwargs: as for :func:`shrink`.

    Raises:
        TypeError, ValueError: see :func:`purepruning.rebuild`.
    """
    check("rebuild(model, plan, *inputs)", model)
    fn, params = function(model, method=method)
    small = pp.rebuild(fn, params, plan, *inputs, norms=norms, **kwargs)
    return _with_model(model, small, method, inputs, kwargs)


def _with_model(model: Any, small: Shrunk, method: Method, inputs: Any, kwargs: Any) -> Shrunk:
    _, static = eqx.partition(model, _is_array)
    made = eqx.combine(small.params, static)  # new modules all the way down
    for path, module in _modules(made):
        change = Change(small.report.plan, f"{path}." if path else "")
        for name, value in attributes(_RULES, module, change).items():
            object.__setattr__(module, name, value)
    as_function = functools.partial(function, method=method)
    return with_model(small, made, as_function, inputs, kwargs, _trained(model))


def _trained(model: Any) -> tuple[str, ...]:
    def is_state(node: Any) -> bool:
        return isinstance(node, eqx.nn.State | eqx.nn.StateIndex)

    rest = jax.tree.map(lambda x: None if is_state(x) else x, model, is_leaf=is_state)
    return tuple(float_shapes(flatten(rest).leaves))


def _is_array(x: Any) -> bool:
    return eqx.is_array(x) or isinstance(x, jax.ShapeDtypeStruct)


def _modules(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, eqx.Module):
        yield path, node
    for name, child in children(node):
        yield from _modules(child, join(path, name))


def _linear(m: Any, c: Change) -> dict[str, Any]:
    shape = c.shape("weight")
    if shape is None:
        return {}
    scalar = {k: getattr(m, k) == "scalar" for k in ("in_features", "out_features")}
    found = {"in_features": shape[-1], "out_features": shape[-2]}
    return {k: v for k, v in found.items() if not scalar[k]}


def _conv(m: Any, c: Change) -> dict[str, Any]:
    shape = c.shape("weight")
    if shape is None:
        return {}
    n = len(shape) - m.num_spatial_dims
    out, into = n - 2, n - 1
    groups = c.conv_groups("weight", m.groups, (out, into))
    return {"out_channels": shape[out], "in_channels": shape[into] * groups, "groups": groups}


def _batch_norm(m: Any, c: Change) -> dict[str, Any]:
    shape = c.shape("weight")
    return {"input_size": shape[-1]} if shape else {}


def _layer_norm(m: Any, c: Change) -> dict[str, Any]:
    return {"shape": c.shape("weight")}


def _group_norm(m: Any, c: Change) -> dict[str, Any]:
    if c.shape("weight") is None:
        return {}
    groups, size = c.groups("weight", m.groups)
    return {"groups": groups, "channels": groups * size}


def _embedding(m: Any, c: Change) -> dict[str, Any]:
    shape = c.shape("weight")
    return {"num_embeddings": shape[-2], "embedding_size": shape[-1]} if shape else {}


def _attention(m: Any, c: Change) -> dict[str, Any]:
    shapes = [c.shape(f"{n}_proj.weight") for n in ("query", "key", "value", "output")]
    if any(s is None for s in shapes):
        return {}
    query, key, value, out = (s for s in shapes if s is not None)
    heads, size = c.groups("query_proj.weight", m.num_heads)
    return {
        "num_heads": heads,
        "query_size": query[1],
        "key_size": key[1],
        "value_size": value[1],
        "output_size": out[0],
        "qk_size": size,
        "vo_size": value[0] // heads,
    }


_RULES: dict[str, Callable[[Any, Change], dict[str, Any]]] = {
    "Linear": _linear,
    "Conv": _conv,
    "BatchNorm": _batch_norm,
    "LayerNorm": _layer_norm,
    "RMSNorm": _layer_norm,
    "GroupNorm": _group_norm,
    "Embedding": _embedding,
    "MultiheadAttention": _attention,
}
