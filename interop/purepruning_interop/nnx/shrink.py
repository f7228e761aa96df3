"""Coupling and shrinking of Flax NNX models: :func:`couple`, :func:`shrink`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax import nnx

import purepruning as pp
from purepruning.coupling.shrink_report import Norms
from purepruning.coupling.unit_masks import Conflicts
from purepruning_interop._native import Change, ShrunkModule, attributes, disagreement


def function(
    model: nnx.Module, call: Callable[..., Any] | None = None
) -> tuple[Callable[..., Any], Any]:
    """Returns ``fn(params, *inputs)`` and its params: all variables but the state of random keys.

    What the call writes to variables is not seen by the caller.

    Args:
        model: the model, in the mode it is to run in.
        call: ``call(model, *inputs)``; the model itself unless given.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> fn, params = function(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    >>> fn(params, jnp.ones((1, 3))).shape
    (1, 2)
    """
    graph, params, rest = _split(model)
    run = call if call is not None else type(model).__call__

    def fn(params: Any, *inputs: Any) -> Any:
        return run(nnx.merge(graph, params, rest, copy=True), *inputs)

    return fn, params


def couple(model: nnx.Module, *inputs: Any, call: Callable[..., Any] | None = None) -> pp.Coupling:
    """Returns which channels of the model's variables are coupled: :func:`purepruning.couple`.

    Raises:
        TypeError, ValueError: as ``call`` does.
    """
    fn, params = function(model, call)
    return pp.couple(fn, params, *inputs)


def shrink(
    model: nnx.Module,
    masks: Any,
    coupling: pp.Coupling,
    *inputs: Any,
    call: Callable[..., Any] | None = None,
    norms: Norms = "original",
    conflicts: Conflicts = "keep",
) -> ShrunkModule:
    """Returns a model of the same class with smaller arrays, where one computes the same.

    Attributes that name sizes (features, groups, heads) are corrected in Flax's own layers. The
    model is run on random parameters and compared with the shrunk function; where it does not run
    or differs (a layer norm over fewer channels with ``norms="original"``, a temperature that
    depends on the size of a head, a width written into a reshape), ``model`` is None and the
    function is what there is.

    Args:
        model: the model, which stays as it is.
        masks, coupling, *inputs, norms, conflicts: see :func:`purepruning.shrink`; masks are a tree
            as ``nnx.state(model)``, with None or nothing where nothing is masked.
        call: as given to :func:`couple`.

    Raises:
        ValueError, KeyError: see :func:`purepruning.shrink`.
    """
    fn, params = function(model, call)
    small = pp.shrink(fn, params, masks, coupling, *inputs, norms=norms, conflicts=conflicts)
    graph, _, rest = _split(model)
    made = nnx.merge(graph, small.params, rest, copy=True)
    modules = [(p, m) for p, m in nnx.iter_graph(made) if isinstance(m, nnx.Module)]
    for path, module in modules:
        prefix = "".join(f"{part}." for part in path)
        change = Change(small.report.plan, prefix)
        for name, value in attributes(_RULES, module, change).items():
            setattr(module, name, value)
    again, _ = function(made, call)
    reason = disagreement(again, small.fn, small.params, inputs)
    return ShrunkModule(None if reason else made, *small, reason)


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
