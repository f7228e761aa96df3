"""What every adapter's ``capture`` does with the layers it is asked for, in JAX or in torch.

``capture`` returns what the plain call returns, and the output (or, with ``of="inputs"``, the first
argument) of each layer by the name it was asked for. A layer that the forward pass calls once gives
it as it is; one called several times gives the *list*, in the order of the calls (a tuple is what a
layer returned as a tuple, such as attention).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

from purepruning.arguments import missing, one_of
from purepruning.layers import Layer

Key = TypeVar("Key")

#: What of a layer is captured.
Of = Literal["outputs", "inputs"]


def check_of(where: str, of: Any) -> None:
    """Raises ValueError for what is no part of a call."""
    one_of(f"{where}: of", of, ("outputs", "inputs"))


def with_first(where: str, args: Any, kwargs: Any, change: Callable[[Any], Any]) -> tuple[Any, Any]:
    """Returns the arguments of a call with the first one changed.

    Raises:
        ValueError: there is none.
    """
    if args:
        return (change(args[0]), *args[1:]), kwargs
    if not kwargs:
        raise ValueError(f"{where}: a layer whose input is asked for is called without arguments")
    name = next(iter(kwargs))
    return args, {**kwargs, name: change(kwargs[name])}


def asked(where: str, layers: Any) -> tuple[str, ...]:
    """Returns the names that a caller's ``layers`` gives, each once.

    Raises:
        TypeError: it is no iterable of names and rows of a layer table.
    """
    wanted = f"{where}: layers must list layer names or rows of a layer table"
    if isinstance(layers, str | Layer) or not isinstance(layers, Iterable):
        raise TypeError(f"{wanted}, such as [{layers!r:.60}]; got {type(layers).__name__}")
    names: dict[str, None] = {}
    for layer in layers:
        if not isinstance(layer, str | Layer):
            raise TypeError(f"{wanted}; got {layer!r:.60}")
        names[layer.name if isinstance(layer, Layer) else layer] = None
    return tuple(names)


def find(where: str, names: Iterable[str], known: Mapping[str, Key]) -> dict[str, Key]:
    """Returns the module that each name stands for.

    Raises:
        ValueError: a name is not known; the message lists the nearest.
    """
    names = tuple(names)
    for name in names:
        if name not in known:
            raise unknown(where, name, known)
    return {name: known[name] for name in names}


def unknown(where: str, name: str, known: Iterable[str]) -> ValueError:
    """Returns the error for a name that is no layer's."""
    return ValueError(
        missing(f"{where}: the model has no layer {name!r}", name, filter(None, known))
    )


def outputs(
    where: str,
    modules: Mapping[str, Key],
    calls: Mapping[Key, Sequence[Any]],
) -> dict[str, Any]:
    """Returns the output of each layer asked for, from the calls that were seen.

    Raises:
        ValueError: a layer was never called.
    """
    result = {}
    for name, module in modules.items():
        found = calls.get(module, ())
        if not found:
            raise ValueError(
                f"{where}: layer {name!r} is never called in this forward pass; its weights may be "
                "used without calling it, or a method other than __call__"
            )
        result[name] = found[0] if len(found) == 1 else list(found)
    return result
