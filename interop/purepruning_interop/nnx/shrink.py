"""Coupling, shrinking and costs of Flax NNX models."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from flax import nnx

import purepruning as pp
from purepruning.coupling.cost import ModelCost
from purepruning.coupling.shrink_report import Norms, Shrunk
from purepruning.coupling.unit_masks import Conflicts
from purepruning.jaxpr.call import trace_call
from purepruning.jaxpr.count import cost_of
from purepruning.types import Masks, Params
from purepruning_interop._native import Change, attributes, with_model
from purepruning_interop.nnx.layers import check

#: What to call of a model: the name of a method, or a function of the model and inputs.
Method = Callable[..., Any] | str | None


def function(model: nnx.Module, *, method: Method = None) -> tuple[Callable[..., Any], Params]:
    """Returns ``fn(params, *inputs, **kwargs)`` and its params.

    They are all variables of the model but the state of random keys. What the call writes to
    variables is not seen by the caller.

    Args:
        model: the model, in the mode it is to run in.
        method: what to call instead: the name of a method, or a function of the model and inputs.

    Raises:
        TypeError: ``model`` is no ``nnx.Module``.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> fn, params = function(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    >>> fn(params, jnp.ones((1, 3))).shape
    (1, 2)
    """
    check("function(model)", model)
    graph, params, rest = _split(model)
    run = method if callable(method) else getattr(type(model), method or "__call__")

    def fn(params: Any, *inputs: Any, **kwargs: Any) -> Any:
        return run(nnx.merge(graph, params, rest, copy=True), *inputs, **kwargs)

    return fn, params


def couple(
    model: nnx.Module, /, *inputs: Any, outputs: Any = True, method: Method = None, **kwargs: Any
) -> pp.Coupling:
    """Returns which channels of the model's variables are coupled: :func:`purepruning.couple`.

    Args:
        model: the model, in the mode it is to run in.
        *inputs, **kwargs: what a call of it takes; arrays may be shapes. Its own keywords
            ``outputs`` and ``method`` can be given through ``method`` only.
        outputs: which outputs stay whole, as for :func:`purepruning.couple`.
        method: what to call instead: the name of a method, or a function of the model and inputs.

    Raises:
        TypeError, ValueError: ``model`` is no ``nnx.Module``; or what the call raises.
    """
    check("couple(model, *inputs)", model)
    fn, params = function(model, method=method)
    return pp.couple(fn, params, *inputs, outputs=outputs, **kwargs)


def count(model: nnx.Module, /, *inputs: Any, method: Method = None, **kwargs: Any) -> ModelCost:
    """Returns parameters, multiply-adds and activation bytes: :func:`purepruning.count`.

    Statistics (variables that are no ``nnx.Param``) are no parameters.

    Args:
        model, *inputs, method, **kwargs: as for :func:`couple`.

    Raises:
        TypeError, ValueError: as :func:`couple`.
    """
    check("count(model, *inputs)", model)
    fn, params = function(model, method=method)
    return cost_of(trace_call(fn, params, inputs, kwargs), _trained(model))


def shrink(
    model: nnx.Module,
    masks: Masks,
    coupling: pp.Coupling,
    /,
    *inputs: Any,
    method: Method = None,
    norms: Norms = "original",
    conflicts: Conflicts = "keep",
    **kwargs: Any,
) -> Shrunk:
    """Returns a model of the same class with smaller arrays, where one computes the same.

    Attributes that name sizes (features, groups, heads) are corrected in Flax's own layers. The
    model is run on random parameters and compared with the shrunk function; where it does not run
    or differs (a layer norm over fewer channels with ``norms="original"``, a temperature that
    depends on the size of a head, a width written into a reshape), ``model`` is None and the
    function is what there is.

    Args:
        model: the model, which stays as it is.
        masks, coupling, norms, conflicts: see :func:`purepruning.shrink`; masks are a tree as
            ``nnx.state(model)``, with None or nothing where nothing is masked.
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
    model: nnx.Module,
    plan: pp.Plan,
    /,
    *inputs: Any,
    method: Method = None,
    norms: Norms = "original",
    **kwargs: Any,
) -> Shrunk:
    """Returns what :func:`shrink` returned, again, from the plan of its report.

    The weights of the small model are then put in with ``nnx.update``; those of ``model`` do not
    matter, and it may be abstract (``nnx.eval_shape``), and then the small one is.

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


def _with_model(
    model: nnx.Module, small: Shrunk, method: Method, inputs: Any, kwargs: Any
) -> Shrunk:
    graph, _, rest = _split(model)
    made = nnx.merge(graph, small.params, rest, copy=True)
    modules = [(p, m) for p, m in nnx.iter_graph(made) if isinstance(m, nnx.Module)]
    for path, module in modules:
        prefix = "".join(f"{part}." for part in path)
        change = Change(small.report.plan, prefix)
        for name, value in attributes(_RULES, module, change).items():
            setattr(module, name, value)
    as_function = functools.partial(function, method=method)
    return with_model(small, made, as_function, inputs, kwargs, _trained(model))


def _trained(model: nnx.Module) -> tuple[str, ...]:
    return pp.leaf_paths(nnx.state(model, nnx.Param))


def _split(model: nnx.Module) -> tuple[Any, Any, Any]:
    found: Any = nnx.split(model, nnx.Not(nnx.RngState), ...)
    graph, params, rest = found
    return graph, params, rest


def _linear(m: Any, c: Change) -> dict[str, Any]:
    shape = c.shape("kernel")
    return {"in_features": shape[-2], "out_features": shape[-1]} if shape else {}


def _general(m: Any, c: Change) -> dict[str, Any]:
    shape = c.shape("kernel")
    if shape is None:
        return {}
    n, k = len(m.in_features), len(m.out_features)
    return {"in_features": shape[-n - k : -k], "out_features": shape[-k:]}


def _conv(m: Any, c: Change) -> dict[str, Any]:
    shape = c.shape("kernel")
    if shape is None:
        return {}
    groups = c.conv_groups("kernel", getattr(m, "feature_group_count", 1), (-1, -2))
    return {
        "in_features": shape[-2] * groups,
        "out_features": shape[-1],
        "feature_group_count": groups,
        "kernel_shape": shape,
    }


def _norm(m: Any, c: Change) -> dict[str, Any]:
    for name in ("scale", "bias", "mean"):
        shape = c.shape(name)
        if shape:
            return {"num_features": shape[-1]}
    return {}


def _group_norm(m: Any, c: Change) -> dict[str, Any]:
    for name in ("scale", "bias"):
        if c.shape(name):
            groups, size = c.groups(name, m.num_groups)
            return {"num_features": groups * size, "num_groups": groups, "group_size": size}
    return {}


def _embed(m: Any, c: Change) -> dict[str, Any]:
    shape = c.shape("embedding")
    return {"num_embeddings": shape[0], "features": shape[1]} if shape else {}


def _attention(m: Any, c: Change) -> dict[str, Any]:
    query, out = c.shape("query.kernel"), c.shape("out.kernel")
    if query is None or out is None:
        return {}
    return {
        "in_features": query[-3],
        "num_heads": query[-2],
        "head_dim": query[-1],
        "qkv_features": query[-2] * query[-1],
        "out_features": out[-1],
    }


_RULES: dict[str, Callable[[Any, Change], dict[str, Any]]] = {
    "Linear": _linear,
    "LinearGeneral": _general,
    "Conv": _conv,
    "ConvTranspose": _conv,
    "BatchNorm": _norm,
    "LayerNorm": _norm,
    "RMSNorm": _norm,
    "InstanceNorm": _norm,
    "GroupNorm": _group_norm,
    "Embed": _embed,
    "MultiHeadAttention": _attention,
}
