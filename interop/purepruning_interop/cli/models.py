"""Models by ``package.module:function``: made, given inputs and weights."""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from purepruning.arguments import adapter_of, missing, shown
from purepruning.trees import flatten
from purepruning_interop.checkpoints import read_checkpoint

_ADAPTERS = ("torch", "linen", "nnx", "equinox", "keras")


@dataclasses.dataclass(frozen=True)
class Given:
    """A model, and what it is called with.

    Attributes:
        source: ``package.module:function``.
        name: its adapter's name.
        model: the module; of Linen module and variables, together.
        inputs: example inputs.
    """

    source: str
    name: str
    model: Any
    inputs: tuple[Any, ...]

    @property
    def adapter(self) -> Any:
        """The adapter, with ``layers``, ``count``, ``couple`` and ``shrink``."""
        return importlib.import_module(f"purepruning_interop.{self.name}")

    @property
    def edge(self) -> Any:
        """What differs between frameworks beside that: arrays in and out."""
        return edge_of(self.name)

    @property
    def first(self) -> tuple[Any, ...]:
        """The first arguments of the adapter's functions."""
        if self.name == "linen":
            return self.model.module, self.model.variables
        return (self.model,)


def edge_of(name: str) -> Any:
    """Returns the module of a framework in ``recipes.edges``."""
    return importlib.import_module(f"purepruning_interop.recipes.edges.{name}")


def is_model(source: str) -> bool:
    """Whether a source is ``package.module:function``, and no file."""
    return bool(re.fullmatch(r"[\w.]+:\w+", source)) and not Path(source).exists()


def make_model(source: str, inputs: list[str], weights: Path | None = None) -> Given:
    """Returns what ``package.module:function`` returns when it is called without arguments.

    It returns a torch, NNX, Equinox or Keras model, or ``(model, *inputs)``; of Linen
    ``(module, variables, *inputs)``.

    Args:
        source: ``package.module:function``; modules of the current folder too.
        inputs: example inputs in place of those, such as ``1x3x32x32`` or ``int:1x16``.
        weights: a checkpoint to read into it.

    Raises:
        ValueError, TypeError, OSError: it is no such function, or what it made does not fit.
    """
    made = called(source, lambda found: adapter_of(found) is not None)
    first, *rest = made if isinstance(made, tuple) and made else (made,)
    name = adapter_of(first)
    if name not in _ADAPTERS:
        raise TypeError(
            f"{source} must return a torch, Linen, NNX, Equinox or Keras model, maybe with "
            f"inputs behind it, got {type(first).__name__}; return one"
        )
    model = first
    if name == "linen":
        if not rest:
            raise TypeError(
                f"{source} returns a Linen module alone; return (module, variables, *inputs)"
            )
        model = edge_of(name).Bound(first, rest.pop(0))
    found = [edge_of(name).zeros(()) if x is None else x for x in rest]
    if inputs:
        found = [_input(name, text) for text in inputs]
    if not found:
        raise ValueError(
            f"{source} returns no inputs; return (model, *inputs), or give --input 1x3x32x32"
        )
    given = Given(source, name, model, tuple(found))
    return given if weights is None else _with_weights(given, weights)


def called(source: str, is_one: Callable[[Any], bool]) -> Any:
    """Returns what ``package.module:function`` returns, or what it names, if that is one already.

    Raises:
        ValueError, TypeError: there is no such function, or what it raised.
    """
    module_name, _, name = source.partition(":")
    if not name or not all(part.isidentifier() for part in module_name.split(".")):
        raise ValueError(f"{source!r} must be package.module:function; write both parts")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise raised_by(source, error) from error
        raise ValueError(
            f"{source}: there is no module {error.name!r}; run this where it can be imported"
        ) from None
    except (Exception, SystemExit) as error:  # the user's own module, which may raise anything
        raise raised_by(source, error) from error
    found = getattr(module, name, None)
    if found is None:
        known = [n for n, x in vars(module).items() if x is not None and not n.startswith("_")]
        raise ValueError(missing(f"{source}: the module has no {name!r}", name, known))
    if is_one(found) and not isinstance(found, type):
        return found
    if not callable(found):
        raise TypeError(f"{source} must be a function without arguments, got {shown(found)}")
    try:
        return found()
    except (Exception, SystemExit) as error:  # the user's own function
        raise raised_by(source, error) from error


def raised_by(source: str, error: BaseException) -> ValueError:
    """Returns the error for what a user's own code raised."""
    words = " ".join(str(error).split())
    return ValueError(
        f"{source} raised {type(error).__name__}: {words}; purepruning --traceback ... shows where"
    )


def _input(name: str, text: str) -> Any:
    found = re.fullmatch(r"(int:)?(\d+(?:x\d+)*)", text)
    if found is None:
        raise ValueError(f"--input must be a shape as 1x3x32x32 or int:1x16, got {text!r}")
    shape = tuple(map(int, found[2].split("x")))
    zeros = edge_of(name).zeros(shape)
    if not found[1]:
        return zeros
    return zeros.long() if name == "torch" else zeros.astype(np.int32)


def _with_weights(given: Given, path: Path) -> Given:
    """Returns the model with the arrays of a checkpoint, by their names."""
    tree, tensors = given.edge.arrays(given.model), read_checkpoint(path).tensors
    arrays = arrays_into(tree, given.name, tensors, path, given.source)
    return dataclasses.replace(given, model=given.edge.restored(given.model, arrays))


def arrays_into(
    tree: Any, framework: str, tensors: Mapping[str, np.ndarray], path: Path, source: str
) -> Any:
    """Returns a tree with the arrays of a checkpoint in the places of its leaves, by their names.

    Args:
        tree: the arrays of a model.
        framework: ``"torch"``, or any on JAX.
        tensors: the checkpoint's.
        path, source: of the checkpoint and the model, for messages.

    Raises:
        ValueError: names or shapes are not the same.
    """
    named = {name.replace("/", "."): x for name, x in tensors.items()}
    flat, values = flatten(tree), {}
    for name, leaf in flat.leaves.items():
        plain = name.replace("/", ".")
        if plain not in named:
            raise ValueError(missing(f"{path} has no {plain!r}, which {source} has", plain, named))
        array = named.pop(plain)
        if array.shape != tuple(leaf.shape):
            raise ValueError(
                f"{path}: {plain!r} has shape {array.shape}, and {source} makes it "
                f"{tuple(leaf.shape)}; name the checkpoint of this model"
            )
        values[name] = _like(framework, array, leaf)
    if named:
        first = min(named)
        raise ValueError(
            missing(f"{path} has {first!r}, which {source} has not", first, flat.leaves)
        )
    return flat.rebuild(values)


def _like(framework: str, array: np.ndarray, leaf: Any) -> Any:
    if framework != "torch":
        import jax.numpy as jnp

        return jnp.asarray(np.asarray(array), leaf.dtype)
    import torch

    array = np.array(array)  # torch writes to what it is given
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array).to(leaf.dtype)
