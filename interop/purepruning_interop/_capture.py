"""What every adapter's ``replace`` and ``capture`` do with what they are asked for.

``replace`` runs a model with functions at *sites*: at the first argument of a layer's call
(``"conv1:input"``) or at what it returns (``"conv1:output"``). Such a function returns the value
that goes on from there, and what it found. Of a layer that the forward pass calls once, that comes
back as it is; of one called several times as the *list*, in the order of the calls. ``capture`` is
the special case whose functions change nothing and find what they see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

from purepruning.arguments import collection, missing, one_of, shown
from purepruning.layers import Layer

Key = TypeVar("Key")

#: What stands at a site: the value that goes on, and what is found.
Function: TypeAlias = Callable[[Any], tuple[Any, Any]]


def asked(where: str, layers: Any) -> tuple[str, ...]:
    """Returns the names that a caller's ``layers`` gives, each once.

    Raises:
        TypeError: it is no iterable of names and rows of a layer table.
    """
    wanted = f"{where}: layers must list layer names or rows of a layer table"
    if isinstance(layers, str | Layer) or not isinstance(layers, Iterable):
        raise TypeError(f"{wanted}, such as [{layers!r:.60}]; got {type(layers).__name__}")
    names: dict[str, None] = {}
    for layer in layers if isinstance(layers, Mapping) else collection(layers, where, wanted):
        if not isinstance(layer, str | Layer):
            raise TypeError(f"{wanted}; got {layer!r:.60}")
        names[layer.name if isinstance(layer, Layer) else layer] = None
    return tuple(names)


class Site(NamedTuple):
    """Where a function stands: at the ``"input"`` or the ``"output"`` of a layer, by name."""

    name: str
    side: str


def sites(where: str, at: Any) -> dict[Site, Function]:
    """Returns the functions of ``replace`` by site.

    Raises:
        TypeError: it is no mapping from strings to functions.
        ValueError: a string names no side.
    """
    if not isinstance(at, Mapping):
        raise TypeError(
            f"{where}: at must map sites such as 'conv1:output' to functions, got "
            f"{type(at).__name__}"
        )
    found: dict[Site, Function] = {}
    for site, function in at.items():
        name, colon, side = site.rpartition(":") if isinstance(site, str) else ("", "", "")
        if not colon or side not in ("input", "output"):
            raise ValueError(
                f"{where}: at: a site is a layer's name with ':input' or ':output', such as "
                f"'conv1:output', got {shown(site)}"
            )
        if not callable(function):
            raise TypeError(
                f"{where}: at {site!r} must be a function that returns the new value and what is "
                f"found, got {shown(function)}"
            )
        found[Site(name, side)] = function
    return found


def looking(
    where: str, layers: Any, of: Of, look: Function = lambda value: (value, value)
) -> dict[Site, Function]:
    """Returns the functions that ``capture`` is: they find what layers put out, or read."""
    one_of(f"{where}: of", of, ("outputs", "inputs"))
    return {Site(name, of.removesuffix("s")): look for name in asked(where, layers)}


def captured(found: tuple[Any, dict[Site, Any]]) -> tuple[Any, dict[str, Any]]:
    """Returns what ``capture`` does, from what was found."""
    result, values = found
    return result, {site.name: value for site, value in values.items()}


def replaced(found: tuple[Any, dict[Site, Any]]) -> tuple[Any, dict[str, Any]]:
    """Returns what ``replace`` does, from what was found."""
    result, values = found
    return result, {f"{site.name}:{site.side}": value for site, value in values.items()}


def joined(at: Mapping[Site, Function], modules: Mapping[str, Key]) -> dict[Any, Function]:
    """Returns one function for every side of every module, at which several names may meet.

    Where several do, each is given what the one before has made, and what they find is a dict.
    """
    by_key: dict[tuple[Key, str], dict[Site, Function]] = {}
    for site, function in at.items():
        by_key.setdefault((modules[site.name], site.side), {})[site] = function

    def all_of(functions: Mapping[Site, Function], value: Any) -> tuple[Any, Any]:
        found = {}
        for site, function in functions.items():
            result = function(value)
            if not isinstance(result, tuple) or len(result) != 2:
                raise TypeError(
                    f"the function at '{site.name}:{site.side}' must return a pair, the value that "
                    f"goes on and what is found, got {type(result).__name__}"
                )
            value, found[site] = result
        return value, found

    return {key: partial(all_of, functions) for key, functions in by_key.items()}


def sides(at: Iterable[Site], modules: Mapping[str, Key]) -> dict[Key, tuple[str, ...]]:
    """Returns at which sides of which modules functions stand."""
    found: dict[Key, set[str]] = {}
    for site in at:
        found.setdefault(modules[site.name], set()).add(site.side)
    return {module: tuple(sorted(some)) for module, some in found.items()}


#: What of a layer ``capture`` gives.
Of = Literal["outputs", "inputs"]


def call_model(model: Any, method: Any, inputs: Any, kwargs: Any) -> Any:
    """Returns what a model's call returns, or that of a method by name, or a function of it."""
    if callable(method):
        return method(model, *inputs, **kwargs)
    return getattr(model, method or "__call__")(*inputs, **kwargs)


def with_first(args: Any, kwargs: Any, change: Callable[[Any], Any]) -> tuple[Any, Any]:
    """Returns the arguments of a call with the first one changed.

    Raises:
        ValueError: there is none.
    """
    if args:
        return (change(args[0]), *args[1:]), kwargs
    if not kwargs:
        raise ValueError(
            "a layer whose input is asked for is called without arguments; ask for its output"
        )
    name = next(iter(kwargs))
    return args, {**kwargs, name: change(kwargs[name])}


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


def found_by_site(
    where: str,
    at: Mapping[Site, Function],
    modules: Mapping[str, Key],
    calls: Mapping[Any, Sequence[Mapping[Site, Any]]],
) -> dict[Site, Any]:
    """Returns what was found at each site, from the calls that were seen.

    Raises:
        ValueError: layers were never called.
    """
    found = {
        site: [call[site] for call in calls.get((modules[site.name], site.side), ())] for site in at
    }
    never = [site for site, values in found.items() if not values]
    if never:
        names, quant_types = (list(dict.fromkeys(some)) for some in zip(*never, strict=True))
        first, *more = map(repr, names)
        rule = {"op_names": names, "quant_types": quant_types, "exclude": True}
        raise ValueError(
            f"{where}: layer {first} is never called in this forward pass"
            f"{', nor is '.join(['', *more])}; its weights may be used without calling it, or a "
            f"method other than __call__; leave it out, of a quantizer's rules by {rule} at the end"
        )
    return {site: values[0] if len(values) == 1 else values for site, values in found.items()}
