"""Coupling, shrinking and costs of Keras models."""

from __future__ import annotations

import functools
from typing import Any

import purepruning as pp
from purepruning.coupling.cost import ModelCost
from purepruning.coupling.shrink_report import Norms, Shrunk
from purepruning.coupling.unit_masks import Conflicts
from purepruning.jaxpr.call import trace_call
from purepruning.jaxpr.count import cost_of
from purepruning.types import Masks
from purepruning_interop._native import as_function, with_model
from purepruning_interop.keras.smaller import Unfit, fits, smaller
from purepruning_interop.keras.variables import Method, function, load
from purepruning_interop.keras.walk import check, walk


def couple(
    model: Any, /, *inputs: Any, outputs: Any = True, method: Method = None, **kwargs: Any
) -> pp.Coupling:
    """Returns which channels of the model's variables are coupled: :func:`purepruning.couple`.

    Args:
        model: the built model.
        *inputs, **kwargs: what a call of it takes; arrays may be shapes. Its own keywords
            ``outputs`` and ``method`` can be given through ``method`` only.
        outputs: which outputs stay whole, as for :func:`purepruning.couple`.
        method: what to call instead: the name of a method, or a function of the model and inputs.

    Raises:
        TypeError, ValueError: ``model`` is no built Keras layer; or what the call raises.
    """
    check("couple(model, *inputs)", model)
    fn, params = function(model, method=method)
    return pp.couple(fn, params, *inputs, outputs=outputs, **kwargs)


def count(model: Any, /, *inputs: Any, method: Method = None, **kwargs: Any) -> ModelCost:
    """Returns parameters, multiply-adds and activation bytes: :func:`purepruning.count`.

    Variables that are not trained, such as the averages of a batch norm, are no parameters.

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
    """Returns the smaller variables, the function of them, and a smaller model where one is equal.

    A functional or sequential model is built anew from the configurations of its layers, with
    fewer units, filters, heads and groups; it is a model like any other, to be compiled, trained,
    saved and loaded. It is run on random parameters and compared with the shrunk function; where it
    does not run or differs (a layer norm over fewer channels with ``norms="original"``, a
    temperature that depends on the size of a head, a width written into a ``Reshape``), and for
    classes whose configuration names no sizes, ``model`` is None and the function is what there is.

    Args:
        model: the model, which stays as it is.
        masks, coupling, norms, conflicts: see :func:`purepruning.shrink`; masks are a dictionary by
            path as :func:`params`, with None or nothing where nothing is masked.
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

    The weights of the small model are then read into it, with :func:`load`; those of ``model`` do
    not matter.

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
    try:
        made = smaller(model, small.report.plan)
        fits(made, small.params)
    except Unfit as error:
        return as_function(small, str(error), _trained(model))
    load(made, small.params)
    as_a_function = functools.partial(function, method=method)
    return with_model(small, made, as_a_function, inputs, kwargs, _trained(model))


def _trained(model: Any) -> tuple[str, ...]:
    return tuple(path for held in walk(model) for path in held.trained)
