"""Batch norms of a Haiku function that can be folded into the layers in front of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import haiku as hk

from purepruning.quantize import BatchNorm
from purepruning.trees import flatten
from purepruning_interop._batch_norms import Norm, behind_layers, foldable
from purepruning_interop._marks import called, trace
from purepruning_interop._table import join
from purepruning_interop.haiku.layers import (
    applied,
    check,
    dotted,
    layers,
    leading_arguments,
    split,
)

_WHERE = "batch_norms(model, variables, *inputs)"


def batch_norms(
    model: Any, variables: Mapping[str, Any], /, *inputs: Any, rng: Any = None, **kwargs: Any
) -> tuple[BatchNorm, ...]:
    """Returns a row for every batch norm that alone reads what a linear layer or convolution makes.

    For :func:`purepruning.quantize.fold_batch_norms`, whose statistics are then the state. Layers
    and norms that are called several times, are inside ``hk.layer_stack``, ``hk.lift`` or different
    jitted parts of the function are left out, and so are norms that are given scale or offset by
    the call, or average over other axes than all but the channels. Paths are those of
    ``variables["params"]`` and of ``variables["state"]``. Nothing is computed; arguments are those
    of :func:`capture`.

    Raises:
        TypeError, ValueError: as :func:`capture`.

    >>> import haiku as hk, jax, jax.numpy as jnp
    >>> def function(x, train):
    ...     return hk.BatchNorm(True, True, 0.9)(hk.Linear(2)(x), train)
    >>> model, x = hk.transform_with_state(function), jnp.ones((1, 3))
    >>> params, state = model.init(jax.random.key(0), x, True)
    >>> norms = batch_norms(model, {"params": params, "state": state}, x, False)
    >>> [(norm.layer.name, norm.name, norm.mean) for norm in norms]
    [('linear', 'batch_norm', 'batch_norm/~/mean_ema.average')]
    """
    check(_WHERE, model, variables)
    params, state = split(variables)
    leading = leading_arguments(_WHERE, model, state, rng)
    statistics = flatten({} if state is None else state).leaves
    found = foldable(layers(model, params, *inputs, **kwargs))
    norms: dict[str, Norm] = {}

    def intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        module: Any = context.module
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        name, sides = module.module_name, ("output",)
        if isinstance(module, hk.BatchNorm):
            sides = ("input",)
            norm = _norm(name, module, statistics)
            if norm is not None and not _is_given(args, kwargs):
                norms[name] = norm
        wanted = name in found or name in norms
        return called(name, sides if wanted else (), call, args, kwargs)

    def apply(params: Any, leading: Any, inputs: Any, kwargs: Any) -> Any:
        def inside() -> Any:
            with hk.intercept_methods(intercept):
                return model.apply(params, *leading, *inputs, **kwargs)

        return applied(_WHERE, hk.transform(inside), {}, None)

    program = trace(object(), apply, params, leading, inputs, kwargs)
    names = dotted([*params, *norms])
    named = {name: norm._replace(name=names[name]) for name, norm in norms.items()}
    return tuple(
        row
        for row in behind_layers(program, found, named)
        if math.prod(statistics[row.mean].shape) == row.layer.shape[row.layer.out_axes[0]]
    )


def _is_given(args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of a norm is given a scale or an offset."""
    return len(args) > 3 or any(kwargs.get(name) is not None for name in ("scale", "offset"))


def _norm(name: str, module: hk.BatchNorm, statistics: Mapping[str, Any]) -> Norm | None:
    """Returns the norm of a module whose statistics are those of its channels alone."""
    mean, variance = (
        join(average.module_name, "average") for average in (module.mean_ema, module.var_ema)
    )
    if mean not in statistics or variance not in statistics:
        return None
    shape, axis = tuple(statistics[mean].shape), module.channel_index
    if len(shape) <= axis or shape[axis] != math.prod(shape):
        return None
    return Norm(
        name=name,
        axis=axis,
        epsilon=module.eps,
        scale=join(name, "scale") if module.create_scale else None,
        offset=join(name, "offset") if module.create_offset else None,
        mean=mean,
        variance=variance,
    )
