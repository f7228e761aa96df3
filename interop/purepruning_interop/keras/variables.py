"""A Keras model's variables as a dictionary of arrays, and the model as a function of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import keras

from purepruning.arguments import missing, shown
from purepruning.arrays import copied
from purepruning_interop._capture import call_model
from purepruning_interop.keras.walk import check, walk

#: What to call of a model: the name of a method, or a function of the model and inputs.
Method = Callable[..., Any] | str | None


def params(model: Any, /) -> dict[str, jax.Array]:
    """Returns the variables of ``model`` as arrays, by path: ``"encoder/dense/kernel"``.

    A path is made of the names of the layers around a variable and its own, joined by ``/``:
    ``variable.path`` without the name of the model itself. Those that are not trained, such as the
    averages of a batch norm, are among them; states of random numbers, of metrics and of the
    optimizer are not. They are copies, which ``fit`` does not touch. Keras numbers layers without a
    name through the whole process (``dense_3``): name layers whose masks are to be saved.

    Args:
        model: a built model or layer: functional, sequential or subclassed.

    Raises:
        TypeError: ``model`` is no Keras layer.
        ValueError: it has no variables yet, since it has not been called.

    >>> import keras
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="last")])
    >>> {path: x.shape for path, x in params(model).items()}
    {'last/kernel': (3, 2), 'last/bias': (2,)}
    """
    check("params(model)", model)
    return _copies(variables(model))


def load(model: Any, params: Mapping[str, Any], /) -> None:
    """Writes arrays into the variables of ``model``: those of a masked tree, say.

    Args:
        model: the model, which is changed.
        params: arrays by path, as :func:`params` returns them; variables it does not name stay.

    Raises:
        TypeError: ``model`` is no Keras layer, or ``params`` no dictionary of arrays.
        ValueError: a path is not the model's, or an array has another shape. Nothing is written.

    >>> import keras
    >>> from purepruning_interop import keras as ppk
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="last")])
    >>> load(model, {"last/bias": [1.0, 2.0]})
    >>> ppk.params(model)["last/bias"].tolist()
    [1.0, 2.0]
    """
    where = "load(model, params)"
    check(where, model)
    found = variables(model)
    for path, array in _fitting(where, found, params).items():
        write(found[path], array)


def function(
    model: Any, /, *, method: Method = None
) -> tuple[Callable[..., Any], dict[str, jax.Array]]:
    """Returns ``fn(params, *inputs, **kwargs)``, a pure function, and its params.

    They are those of :func:`params`. What the call writes to variables (the averages of a batch
    norm) is not seen by the caller; a dropout draws the same in every call.

    Args:
        model: the model; ``training=True`` among the keywords of a call runs it as it is trained.
        method: what to call instead: the name of a method, or a function of the model and inputs.

    Raises:
        TypeError, ValueError: as :func:`params`.
    """
    check("function(model)", model)
    found = variables(model)

    def fn(params: Mapping[str, Any], *inputs: Any, **kwargs: Any) -> Any:
        return call(model, found, params, method, inputs, kwargs)[0]

    return fn, _copies(found)


def variables(model: Any) -> dict[str, Any]:
    """Returns the ``keras.Variable`` objects of a model by their keys among the parameters."""
    return {path: v for held in walk(model) for path, v in held.variables.items()}


def write(variable: Any, array: jax.Array) -> None:
    """Assigns a copy: ``fit`` gives away the memory of what its variables hold."""
    variable.assign(copied(array))


def _copies(variables: Mapping[str, Any]) -> dict[str, jax.Array]:
    return {path: copied(v.value) for path, v in variables.items()}


def current(
    where: str, variables: Mapping[str, Any], params: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Returns the arrays of all variables, with those of ``params`` in place of their own."""
    own = {path: v.value for path, v in variables.items()}
    return own if params is None else own | _fitting(where, variables, params)


def _fitting(
    where: str, variables: Mapping[str, Any], params: Mapping[str, Any]
) -> dict[str, jax.Array]:
    """Returns the arrays of ``params``, after a look at their paths and shapes."""
    if not isinstance(params, Mapping):
        raise TypeError(
            f"{where}: params must be a dictionary of arrays by path, as params(model) returns it, "
            f"got {shown(params)}"
        )
    found = {}
    for path, array in params.items():
        if path not in variables:
            message = f"{where}: the model has no variable {path!r}"
            raise ValueError(missing(message, path, variables))
        try:
            found[path] = jnp.asarray(array, variables[path].dtype)
        except (TypeError, ValueError):
            raise TypeError(f"{where}: {path!r} must be an array, got {shown(array)}") from None
        if found[path].shape != tuple(variables[path].shape):
            raise ValueError(
                f"{where}: {path!r} has shape {found[path].shape}, but in the model "
                f"{tuple(variables[path].shape)}; a smaller tree fits the model that shrink or "
                "rebuild returns"
            )
    return found


def call(
    model: Any,
    variables: Mapping[str, Any],
    params: Mapping[str, Any],
    method: Method,
    inputs: Any,
    kwargs: Mapping[str, Any],
) -> tuple[Any, dict[str, Any]]:
    """Returns what a call with these parameters returns, and what all variables then hold."""
    mapping = [(v, params[path]) for path, v in variables.items()]
    with keras.StatelessScope(state_mapping=mapping) as scope:
        result = call_model(model, method, inputs, kwargs)
    return result, {path: scope.get_current_value(v) for path, v in variables.items()}
