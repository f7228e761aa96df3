"""Coupling, shrinking and costs of Haiku functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

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
from purepruning_interop.haiku.layers import applied, check, leading_arguments, split

_REASON = "a Haiku function makes parameters of the sizes that it names"


def function(
    model: Any, variables: Mapping[str, Any], /
) -> tuple[Callable[..., Any], Mapping[str, Any]]:
    """Returns ``fn(variables, *inputs, rng=None, **kwargs)``, ``model.apply``, and the variables.

    Args:
        model: what ``hk.transform``, ``hk.transform_with_state`` or ``hk.without_apply_rng``
            returned; of a multi-transformed one, ``hk.Transformed(init, apply.f)``.
        variables: its parameters, or ``{"params": params, "state": state}`` for one with a state;
            ``fn`` takes the same, and then returns what ``apply`` does, with the new state.

    Raises:
        TypeError: ``model`` is no transformed function, ``variables`` are not of this form, or a
            state is missing or too much.

    >>> import haiku as hk, jax, jax.numpy as jnp
    >>> model, x = hk.transform(lambda x: hk.Linear(2)(x)), jnp.ones((1, 3))
    >>> fn, params = function(model, model.init(jax.random.key(0), x))
    >>> fn(params, x).shape
    (1, 2)
    """
    where = "function(model, variables)"
    check(where, model, variables)
    leading_arguments(where, model, split(variables)[1], None)

    def fn(variables: Mapping[str, Any], *inputs: Any, rng: Any = None, **kwargs: Any) -> Any:
        params, state = split(variables)
        leading = leading_arguments(where, model, state, rng)
        return applied(where, model, params, *leading, *inputs, **kwargs)

    return fn, variables


def couple(
    model: Any,
    variables: Mapping[str, Any],
    /,
    *inputs: Any,
    outputs: Any = True,
    rng: Any = None,
    **kwargs: Any,
) -> pp.Coupling:
    """Returns which channels of the model's variables are coupled: :func:`purepruning.couple`.

    Args:
        model: what ``hk.transform`` and its like returned.
        variables: its parameters, or ``{"params": params, "state": state}``; arrays or shapes.
            Paths are those of what is passed. Parts of a state that only training reads are
            coupled in training only: to train the small model on, couple it as it is trained.
        *inputs, **kwargs: what a call takes after params, state and key. Keywords ``outputs`` and
            ``rng`` of the function's own cannot be given; wrap it.
        outputs: which outputs of the function stay whole, as for :func:`purepruning.couple`. A
            state that is returned with them shrinks with the one that is passed.
        rng: the key that ``apply`` takes, or None.

    Raises:
        TypeError: as :func:`function`.
        ValueError: ``outputs`` is no prefix of the result; or what the function raises.

    >>> import haiku as hk, jax
    >>> model = hk.transform(lambda x: hk.nets.MLP([8, 4])(x))
    >>> x = jax.ShapeDtypeStruct((1, 2), "float32")
    >>> couple(model, jax.eval_shape(model.init, jax.random.key(0), x), x)
    Coupling(8 units in 1 families)
    """
    check("couple(model, variables, *inputs)", model, variables)
    fn, _ = function(model, variables)
    outputs = _outputs(variables, outputs)
    return pp.couple(fn, variables, *inputs, outputs=outputs, rng=rng, **kwargs)


def count(
    model: Any, variables: Mapping[str, Any], /, *inputs: Any, rng: Any = None, **kwargs: Any
) -> ModelCost:
    """Returns parameters, multiply-adds and activation bytes: :func:`purepruning.count`.

    A state is no parameter.

    Args:
        model, variables, *inputs, rng, **kwargs: as for :func:`couple`.

    Raises:
        TypeError, ValueError: as :func:`couple`.
    """
    check("count(model, variables, *inputs)", model, variables)
    fn, _ = function(model, variables)
    call = trace_call(fn, variables, inputs, {"rng": rng, **kwargs})
    return cost_of(call, _trained(variables))


def shrink(
    model: Any,
    variables: Mapping[str, Any],
    masks: Masks,
    coupling: pp.Coupling,
    /,
    *inputs: Any,
    rng: Any = None,
    norms: Norms = "original",
    conflicts: Conflicts = "keep",
    **kwargs: Any,
) -> Shrunk:
    """Returns the smaller variables and the function to call with them.

    There is no smaller Haiku function (``model`` is None): it makes parameters of the sizes that
    it names. ``fn(params, *inputs, rng=None, **kwargs)`` is in place of ``model.apply``; ``params``
    are of the form of ``variables``, and a state that ``fn`` returns is as small as the one there.

    Args:
        model, variables, *inputs, rng, **kwargs: as for :func:`couple`. Keywords ``norms`` and
            ``conflicts`` of the function's own cannot be given either.
        masks, coupling, norms, conflicts: see :func:`purepruning.shrink`.

    Raises:
        TypeError, ValueError, KeyError: as :func:`couple`, and see :func:`purepruning.shrink`.
    """
    check("shrink(model, variables, masks, coupling, *inputs)", model, variables)
    fn, _ = function(model, variables)
    options: dict[str, Any] = {"norms": norms, "conflicts": conflicts, "rng": rng, **kwargs}
    small = pp.shrink(fn, variables, masks, coupling, *inputs, **options)
    return as_function(small, _REASON, _trained(variables))


def rebuild(
    model: Any,
    variables: Mapping[str, Any],
    plan: pp.Plan,
    /,
    *inputs: Any,
    rng: Any = None,
    norms: Norms = "original",
    **kwargs: Any,
) -> Shrunk:
    """Returns what :func:`shrink` returned, again, from the plan of its report.

    Args:
        model, *inputs, rng, norms, **kwargs: as for :func:`shrink`.
        variables: as for :func:`shrink`; they may be shapes
            (``jax.eval_shape(model.init, key, x)``), and then the result's are.
        plan: of the report, maybe from a file (:func:`purepruning.load_plan`).

    Raises:
        TypeError, ValueError: as :func:`couple`, and see :func:`purepruning.rebuild`.
    """
    check("rebuild(model, variables, plan, *inputs)", model, variables)
    fn, _ = function(model, variables)
    options: dict[str, Any] = {"outputs": _outputs(variables, True), "norms": norms, "rng": rng}
    small = pp.rebuild(fn, variables, plan, *inputs, **options, **kwargs)
    return as_function(small, _REASON, _trained(variables))


def _outputs(variables: Mapping[str, Any], outputs: Any) -> Any:
    return outputs if split(variables)[1] is None else (outputs, State("state."))


def _trained(variables: Mapping[str, Any]) -> list[str]:
    params, state = split(variables)
    prefix = "" if state is None else "params"
    return [join(prefix, path) for path in pp.leaf_paths(params)]
