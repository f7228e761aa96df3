"""Coupling, shrinking and costs of Flax Linen models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flax import linen as nn

import purepruning as pp
from purepruning.coupling.cost import ModelCost
from purepruning.coupling.shrink_report import Norms, Shrunk
from purepruning.coupling.unit_masks import Conflicts
from purepruning.jaxpr.call import trace_call
from purepruning.jaxpr.count import cost_of
from purepruning.jaxpr.couple import State
from purepruning.types import Masks
from purepruning_interop._native import as_function
from purepruning_interop._table import join
from purepruning_interop.linen.layers import MISFITS, check, misfit

_REASON = "a Linen module makes parameters of the sizes that it names"


def function(
    model: nn.Module, variables: Mapping[str, Any], /
) -> tuple[Callable[..., Any], Mapping[str, Any]]:
    """Returns ``fn(variables, *inputs, **kwargs)``, which is ``model.apply``, and the variables.

    Args:
        model: the Linen module.
        variables: what ``model.init`` returned, or only its ``"params"``; ``fn`` takes the same.

    Raises:
        TypeError: ``model`` is no module instance, or ``variables`` is no mapping.

    >>> import jax, jax.numpy as jnp
    >>> from flax import linen as nn
    >>> model, x = nn.Dense(2), jnp.ones((1, 3))
    >>> fn, params = function(model, model.init(jax.random.key(0), x)["params"])
    >>> fn(params, x).shape
    (1, 2)
    """
    check("function(model, variables)", model, variables)

    def fn(variables: Mapping[str, Any], *inputs: Any, **kwargs: Any) -> Any:
        whole = variables if _is_whole(variables) else {"params": variables}
        try:
            return model.apply(whole, *inputs, **kwargs)
        except MISFITS as error:
            raise misfit("function(model, variables)", model, error) from error

    return fn, variables


def couple(
    model: nn.Module,
    variables: Mapping[str, Any],
    /,
    *inputs: Any,
    outputs: Any = True,
    **kwargs: Any,
) -> pp.Coupling:
    """Returns which channels of the model's variables are coupled: :func:`purepruning.couple`.

    Args:
        model: the Linen module.
        variables: what ``model.init`` returned, or only its ``"params"``; arrays or shapes. Paths
            are those of what is passed. Statistics of batch norms must be among them to be cut.
        *inputs, **kwargs: as for ``model.apply``: ``rngs``, ``method`` and ``mutable`` too. An
            ``outputs`` of the model's own can be given through ``method`` only.
        outputs: which outputs of the model stay whole, as for :func:`purepruning.couple`. What
            ``mutable`` adds to them shrinks with the variables that it replaces.

    Raises:
        TypeError: ``model`` is no module instance, ``variables`` is no mapping, or the inputs do
            not fit.
        ValueError: ``outputs`` is no prefix of the result; or what the model raises.

    >>> import jax
    >>> from flax import linen as nn
    >>> model = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(2)])
    >>> x = jax.ShapeDtypeStruct((1, 3), "float32")
    >>> couple(model, jax.eval_shape(model.init, jax.random.key(0), x), x)
    Coupling(8 units in 1 families)
    """
    check("couple(model, variables, *inputs)", model, variables, inputs, kwargs)
    fn, _ = function(model, variables)
    return pp.couple(fn, variables, *inputs, outputs=_outputs(kwargs, outputs), **kwargs)


def count(
    model: nn.Module, variables: Mapping[str, Any], /, *inputs: Any, **kwargs: Any
) -> ModelCost:
    """Returns parameters, multiply-adds and activation bytes: :func:`purepruning.count`.

    Other collections than ``"params"`` are no parameters.

    Args:
        model, variables, *inputs, **kwargs: as for :func:`couple`.

    Raises:
        TypeError, ValueError: as :func:`couple`.
    """
    check("count(model, variables, *inputs)", model, variables, inputs, kwargs)
    fn, _ = function(model, variables)
    return cost_of(trace_call(fn, variables, inputs, kwargs), _trained(variables))


def shrink(
    model: nn.Module,
    variables: Mapping[str, Any],
    masks: Masks,
    coupling: pp.Coupling,
    /,
    *inputs: Any,
    norms: Norms = "original",
    conflicts: Conflicts = "keep",
    **kwargs: Any,
) -> Shrunk:
    """Returns the smaller variables and the function to call with them.

    There is no smaller Linen module (``model`` is None): a module makes parameters of the sizes
    that it names. ``fn(params, *inputs, **kwargs)`` is in place of ``model.apply``, with the same
    ``rngs``, ``method`` and ``mutable``; updated statistics are as small as those among ``params``.

    Args:
        model, variables, *inputs, **kwargs: as for :func:`couple`. Keywords ``norms`` and
            ``conflicts`` of the model's own can be given through ``method`` only.
        masks, coupling, norms, conflicts: see :func:`purepruning.shrink`.

    Raises:
        TypeError, ValueError, KeyError: as :func:`couple`, and see :func:`purepruning.shrink`.
    """
    check("shrink(model, variables, masks, coupling, *inputs)", model, variables, inputs, kwargs)
    fn, _ = function(model, variables)
    options: dict[str, Any] = {"norms": norms, "conflicts": conflicts, **kwargs}
    small = pp.shrink(fn, variables, masks, coupling, *inputs, **options)
    return as_function(small, _REASON, _trained(variables))


def rebuild(
    model: nn.Module,
    variables: Mapping[str, Any],
    plan: pp.Plan,
    /,
    *inputs: Any,
    norms: Norms = "original",
    **kwargs: Any,
) -> Shrunk:
    """Returns what :func:`shrink` returned, again, from the plan of its report.

    Args:
        model, *inputs, norms, **kwargs: as for :func:`shrink`.
        variables: as for :func:`shrink`; they may be shapes
            (``jax.eval_shape(model.init, key, x)``), and then the result's are.
        plan: of the report, maybe from a file (:func:`purepruning.load_plan`).

    Raises:
        TypeError, ValueError: as :func:`couple`, and see :func:`purepruning.rebuild`.
    """
    check("rebuild(model, variables, plan, *inputs)", model, variables, inputs, kwargs)
    fn, _ = function(model, variables)
    options: dict[str, Any] = {"outputs": _outputs(kwargs, True), "norms": norms}
    small = pp.rebuild(fn, variables, plan, *inputs, **options, **kwargs)
    return as_function(small, _REASON, _trained(variables))


def _outputs(kwargs: Mapping[str, Any], outputs: Any) -> Any:
    return outputs if kwargs.get("mutable", False) is False else (outputs, State(""))


def _is_whole(variables: Mapping[str, Any]) -> bool:
    return isinstance(variables.get("params"), Mapping)


def _trained(variables: Mapping[str, Any]) -> list[str]:
    if not _is_whole(variables):
        return list(pp.leaf_paths(variables))
    return [join("params", path) for path in pp.leaf_paths(variables["params"])]
