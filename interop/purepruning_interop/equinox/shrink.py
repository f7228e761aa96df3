"""Coupling and shrinking of Equinox models: :func:`couple`, :func:`shrink`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax

import purepruning as pp
from purepruning.coupling.shrink_report import Norms
from purepruning.coupling.unit_masks import Conflicts
from purepruning_interop._native import Change, ShrunkModule, attributes, disagreement
from purepruning_interop._table import children, join


def function(model: Any, call: Callable[..., Any] | None = None) -> tuple[Callable[..., Any], Any]:
    """Returns ``fn(params, *inputs)`` and its params: all arrays of the model.

    Args:
        model: a pytree of modules; ``(model, state)`` where there are statistics.
        call: ``call(model, *inputs)``; the model itself unless given. Equinox modules take one
            sample: for batches give ``lambda model, x: jax.vmap(model)(x)``.

    >>> import equinox as eqx, jax
    >>> fn, params = function(eqx.nn.Linear(3, 2, key=jax.random.key(0)))
    >>> fn(params, jax.numpy.ones(3)).shape
    (2,)
    """
    params, static = eqx.partition(model, eqx.is_array)

    def fn(params: Any, *inputs: Any) -> Any:
        made = eqx.combine(params, static)
        return made(*inputs) if call is None else call(made, *inputs)

    return fn, params


def couple(model: Any, *inputs: Any, call: Callable[..., Any] | None = None) -> pp.Coupling:
    """Returns which channels of the model's arrays are coupled: :func:`purepruning.couple`.

    Raises:
        TypeError, ValueError: as ``call`` does.
    """
    fn, params = function(model, call)
    return pp.couple(fn, params, *inputs)


def shrink(
    model: Any,
    masks: Any,
    coupling: pp.Coupling,
    *inputs: Any,
    call: Callable[..., Any] | None = None,
    norms: Norms = "original",
    conflicts: Conflicts = "keep",
) -> ShrunkModule:
    """Returns a model of the same classes with smaller arrays, where one computes the same.

    Attributes that name sizes (features, channels, groups, heads) are corrected in Equinox's own
    layers. The model is run on random parameters and compared with the shrunk function; where it
    does not run or differs, ``model`` is None and the function is what there is.

    Args:
        model: the model, which stays as it is.
        masks, coupling, *inputs, norms, conflicts: see :func:`purepruning.shrink`.
        call: as given to :func:`couple`.

    Raises:
        ValueError, KeyError: see :func:`purepruning.shrink`.
    """
    fn, params = function(model, call)
    small = pp.shrink(fn, params, masks, coupling, *inputs, norms=norms, conflicts=conflicts)
    _, static = eqx.partition(model, eqx.is_array)
    made = eqx.combine(small.params, static)  # new modules all the way down
    for path, module in _modules(made):
        change = Change(small.report.plan, f"{path}." if path else "")
        for name, value in attributes(_RULES, module, change).items():
            object.__setattr__(module, name, value)
    again, own = function(made, call)
    structure = jax.tree.structure(own)  # corrected attributes are part of it

    def native(params: Any, *inputs: Any) -> Any:
        return again(jax.tree.unflatten(structure, jax.tree.leaves(params)), *inputs)

    reason = disagreement(native, small.fn, small.params, inputs)
    return ShrunkModule(None if reason else made, *small, reason)


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
