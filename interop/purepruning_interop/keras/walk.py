"""The layers and variables of a Keras model, by name.

What Keras keeps of them has no public name below the top of a model, so that the attributes that
this needs, ``_layers``, ``_trainable_variables`` and ``_non_trainable_variables``, are read here
and nowhere else.
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterator
from typing import Any, NamedTuple

import keras

from purepruning.arguments import wrong_model


class Held(NamedTuple):
    """One layer of a model.

    Attributes:
        layer: the layer itself.
        names: the names of the layers around it and its own, joined by ``/``, once for each way to
            it; that of the model itself is empty.
        variables: the variables that it holds itself, by the keys they have among the parameters.
        trained: those keys that were made as trainable, even if they are frozen now.
    """

    layer: Any
    names: tuple[str, ...]
    variables: dict[str, Any]
    trained: tuple[str, ...]


def check(where: str, model: Any) -> None:
    """Raises for what is no model of this framework, or has no variables yet."""
    if not isinstance(model, keras.layers.Layer):
        raise wrong_model(where, model, "keras", "a keras.Model or keras.layers.Layer instance")
    if not model.built:
        raise ValueError(
            f"{where}: the model {model.name!r} has no variables yet; call it on some data, or its "
            "build(input_shape), first"
        )


def walk(model: Any) -> tuple[Held, ...]:
    """Returns the layers of a built model, the model first, each before those that it holds.

    A variable goes by the names of the layers around it and its own, ``"encoder/dense/kernel"``:
    that is ``variable.path`` without the name of the model, which Keras numbers through the
    process, and with those of models inside of it that were built alone. Where several have the
    same, numbers follow.
    """
    layers: dict[int, Any] = {}
    names: dict[str, Any] = {}
    for name, layer in _named(model, "", ()):
        layers.setdefault(id(layer), layer)
        names.setdefault(
            _free(name, {n for n, other in names.items() if other is not layer}), layer
        )
    keys: dict[int, str] = {}  # of a variable that several layers hold, the key of the first
    found = []
    for layer in layers.values():
        own = tuple(name for name, other in names.items() if other is layer)
        trained, rest = list(layer._trainable_variables), list(layer._non_trainable_variables)
        for v in (*trained, *rest):
            if id(v) not in keys:
                key = f"{own[0]}/{v.name}" if own[0] else v.name
                keys[id(v)] = _free(key, keys.values())
        by_key = {keys[id(v)]: v for v in (*trained, *rest)}
        found.append(Held(layer, own, by_key, tuple(keys[id(v)] for v in trained)))
    return tuple(found)


def _free(name: str, taken: Container[str]) -> str:
    """Returns the name, with a number behind it where it is taken."""
    numbered = (f"{name}_{i}" if i else name for i in itertools.count())
    return next(n for n in numbered if n not in taken)


def _named(layer: Any, name: str, above: tuple[int, ...]) -> Iterator[tuple[str, Any]]:
    yield name, layer
    for child in layer._layers:
        if id(child) not in above and child is not layer:
            inner = f"{name}/{child.name}" if name else child.name
            yield from _named(child, inner, (*above, id(layer)))
