"""Compressors by auptimizer's names and arguments, for a model of any framework."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import purepruning as pp
from purepruning.arguments import adapter_of, missing, shown
from purepruning_interop.recipes.compressor import Compressor
from purepruning_interop.recipes.names import FOLDERS, NEEDED, Given
from purepruning_interop.recipes.pruning import (
    ADMM,
    AGP,
    ByActivations,
    ByGradients,
    ByWeights,
    Shrinking,
    Tickets,
)
from purepruning_interop.recipes.quantization import Quantizing
from purepruning_interop.recipes.recipe import Recipe, Step, check_argument, read_recipe, within
from purepruning_interop.recipes.searches import AutoCompress, Searching

#: Which models other names of frameworks stand for: TensorFlow's are run by Keras, on JAX.
_MODELS = {"flax": ("linen", "nnx"), "tensorflow": ("keras",)}

#: What runs a step; a step of pruning that is not named here prunes at once, by weights.
_CLASSES: dict[str, type[Compressor]] = {
    "activation_apoz_rank_filter": ByActivations,
    "activation_mean_rank_filter": ByActivations,
    "taylor_fo_weight_filter": ByGradients,
    "agp": AGP,
    "lottery_ticket": Tickets,
    "admm": ADMM,
    "net_adapt": Searching,
    "simulated_annealing": Searching,
    "sensitivity": Searching,
    "amc": Searching,
    "auto_compress": AutoCompress,
    "naive": Quantizing,
    "qat": Quantizing,
    "dorefa": Quantizing,
    "bnn": Quantizing,
    "shrink": Shrinking,
}


#: Steps that call a model.
_OF_MODELS = ("auto_compress", "naive", "qat", "dorefa", "bnn")


def create_compressor(
    model: Any,
    recipe: Recipe | str | os.PathLike[str] | Mapping[str, Any],
    *args: Any,
    step: int | None = None,
    variables: Any = None,
    inputs: Sequence[Any] | None = None,
    data: Iterable[Any] | None = None,
    loss: Callable[..., Any] | None = None,
    layers: Iterable[pp.Layer] | None = None,
    apply: Callable[..., Any] | None = None,
    capture: Callable[..., Any] | None = None,
    **kwargs: Any,
) -> Compressor:
    """Returns the compressor of a recipe for a model.

    Further arguments are those of auptimizer for each compressor, by position or by name:
    ``create_compressor(model, recipe, optimizer)``, ``create_compressor(model, recipe,
    evaluator=evaluator)``. What a recipe's ``args`` say holds unless it is said here. Evaluators,
    trainers, loaders and optimizers always come from here.

    A torch or NNX module and a Keras model are changed in place; the framework ``"tensorflow"`` of
    a recipe means Keras, on JAX. Of Linen the variables are the model, of Equinox the
    module: methods return it, and take what was trained since as ``model``. Evaluators and the like
    are called as auptimizer calls them; of their arguments, the model that was given here stands
    for the model as it is at the call.

    Args:
        model: a torch, Linen, NNX or Equinox module, or a built Keras model; or, with ``layers``,
            parameters alone: a tree of JAX arrays, or a flat dict of torch tensors, which is not
            changed.
        recipe: a recipe, its file, or what a file holds.
        *args: auptimizer's arguments, in its order.
        step: which step of the recipe; needed where it has several.
        variables: of a Linen module.
        inputs: example inputs, as ``dummy_input``: a Linen module, a coupling and, in JAX,
            quantised activations need them. Of Equinox, of one example.
        data: batches for statistics, each a tuple of inputs (of activations), or what ``loss``
            takes (of gradients). Without it, torch's are those of training.
        loss: ``(model, batch) -> scalar``, for gradients.
        layers: of parameters alone, the layer table.
        apply: of parameters alone, ``(params, *inputs) -> outputs`` in JAX: what is coupled, shrunk
            and counted.
        capture: of parameters alone, ``(params, *inputs) -> {layer name: output}``.
        **kwargs: auptimizer's arguments, by name.

    Raises:
        ValueError, TypeError, KeyError: a mistake in the recipe or the arguments, by file, step,
            rule and key. Nothing has been done to the model then.
    """
    recipe = recipe if isinstance(recipe, Recipe) else read_recipe(recipe)
    with within(recipe.source):
        number = _which(recipe, step)
        chosen = recipe.steps[number]
        if layers is None and (apply is not None or capture is not None):
            raise TypeError("apply and capture are of parameters alone; give layers= with them")
        adapter = "tree" if layers is not None else _adapter(model, recipe.framework)
        with within(f"step {number} ({chosen.use})"):
            if recipe.ranges:
                raise ValueError(
                    f"{next(iter(recipe.ranges))} is a range; call search_recipe, or write a number"
                )
            given = _bound(chosen, args, kwargs)
            if adapter == "tree" and chosen.use in _OF_MODELS:
                raise ValueError("this runs modules, not parameters alone; give a module")
            own = {"variables": variables, "inputs": inputs, "data": data, "loss": loss}
            own |= {"layers": layers, "apply": apply, "capture": capture}
            return _CLASSES.get(chosen.use, ByWeights)(model, adapter, chosen, given, own)


def _which(recipe: Recipe, step: int | None) -> int:
    if step is None and len(recipe.steps) == 1:
        return 0
    if isinstance(step, int) and 0 <= step < len(recipe.steps):
        return step
    raise ValueError(
        f"the recipe has {len(recipe.steps)} steps, got step={shown(step)}; give the number of one"
    )


def _adapter(model: Any, framework: str | None) -> str:
    found = adapter_of(model)
    if found not in ("torch", "linen", "nnx", "equinox", "keras"):
        raise TypeError(
            f"create_compressor: model must be a torch, Linen, NNX or Equinox module or a Keras "
            f"model, got {type(model).__name__}; for parameters alone give layers=, their table"
        )
    if framework is not None and found not in _MODELS.get(framework, (framework,)):
        raise ValueError(
            f"the recipe's framework is {framework!r} and the model's {found!r}; change the recipe"
        )
    return str(found)


def _bound(step: Step, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns all arguments of a compressor by name."""
    known = step.named.arguments
    if len(args) > len(known):
        raise TypeError(
            f"{step.use} takes at most {len(known)} arguments after model and recipe, got "
            f"{len(args)}"
        )
    given = dict(zip(known, args, strict=False))
    for name, value in kwargs.items():
        if name not in known:
            raise TypeError(missing(f"{step.use} has no argument {name!r}", name, known))
        if name in given:
            raise TypeError(f"{step.use}: {name!r} is given twice; leave one of them out")
        given[name] = value
    for name, value in given.items():
        default = known[name]
        # auptimizer's documents write its defaults out; folders are not written to unless named.
        if not isinstance(default, Given) and not (name in FOLDERS and value in ("./", "./logs")):
            check_argument(name, name, value, default)
    given = {k: v for k, v in given.items() if not (k in FOLDERS and v in ("./", "./logs"))}
    result = {k: None if isinstance(v, Given) else v for k, v in known.items()}
    result |= dict(step.args) | given
    for name, default in known.items():
        if default is NEEDED and result[name] is None:
            raise TypeError(f"{step.use} needs {name!r}; give it to create_compressor")
    return result
