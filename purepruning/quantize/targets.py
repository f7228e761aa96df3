"""Applying a function of arrays to what a config names: weights in a tree, arrays at a site."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from purepruning.arguments import instance, missing, shown
from purepruning.arrays import by_numpy, has_values, is_array, namespace
from purepruning.quantize.config import QuantizationConfig, Target, check_quantization, grouped
from purepruning.trees import flatten
from purepruning.types import Params

#: What a site does: the value that stands there from now on, and what was found.
AtSite = Callable[[Any], tuple[Any, Any]]


def each_weight(
    where: str, params: Params, config: QuantizationConfig, function: Callable[..., Any], *more: Any
) -> Params:
    """Returns ``params`` with ``function(weight, target, *more)`` for every weight of the config.

    The weight has the shape that :func:`grouped` says, where its groups are an axis.
    """
    found = weights_of(where, params, config)

    def all_of_them(weights: Mapping[str, Any], more: Any) -> dict[str, Any]:
        result = {}
        for target in config.weights:
            path = target.owner.weight
            weight = weights[path]
            xp = namespace(weight)
            new = function(xp.reshape(weight, grouped(target)[0]), target, *more)
            result[path] = xp.reshape(new, weight.shape)
        return result

    tree = flatten(params)
    return tree.rebuild({**tree.leaves, **by_numpy(all_of_them, found, more)})


def weights_of(where: str, params: Params, config: QuantizationConfig) -> dict[str, Any]:
    """Returns the weights of the config's targets by path.

    Raises:
        TypeError: no config, or a weight is no array of floats.
        KeyError: params have no such leaf.
        ValueError: a weight has another shape than its row.
    """
    check_quantization(where, config)
    leaves = flatten(params).leaves
    found = {}
    for target in config.weights:
        layer = target.owner
        if layer.weight not in leaves:
            message = f"{where}: params have no weight {layer.weight!r} of layer {layer.name!r}"
            raise KeyError(missing(message, layer.weight, leaves))
        weight = leaves[layer.weight]
        if not (is_array(weight) and has_values(weight) and is_float(weight)):
            raise TypeError(
                f"{where}: the weight {layer.weight!r} must be an array of floats, got "
                f"{shown(weight)}"
            )
        if tuple(weight.shape) != layer.shape:
            raise ValueError(
                f"{where}: the weight {layer.weight!r} has shape {tuple(weight.shape)}, but by its "
                f"row of the layer table {layer.shape}; make the table from this model"
            )
        found[layer.weight] = weight
    return found


def is_float(x: Any) -> bool:
    """Whether an array is of real floating-point numbers."""
    return bool(namespace(x).isdtype(x.dtype, "real floating"))


def arrays_at(where: str, target: Target, value: Any) -> list[Any]:
    """Returns the arrays of floats in what a layer reads or puts out.

    Raises:
        TypeError: there is none.
    """
    arrays = [x for x in jax.tree.leaves(value) if is_array(x) and is_float(x)]
    if not arrays:
        rule = {"op_names": [target.name], "quant_types": [target.what], "exclude": True}
        raise TypeError(
            f"{where}: at {target.site!r} there is no array of floats, but {shown(value)}; add "
            f"{rule} behind rule {target.rule}"
        )
    return arrays


def map_arrays(function: Callable[[Any], Any], value: Any) -> Any:
    """Returns ``value`` with ``function`` of every array of floats in it."""
    return jax.tree.map(lambda x: function(x) if is_array(x) and is_float(x) else x, value)


def check_sites(where: str, given: Any, targets: Iterable[Target], source: str) -> None:
    """Raises where an argument, a mapping by site, lacks a target's.

    Args:
        where: begins messages: the function and the argument's name.
        given: the argument.
        targets: whose sites it must have.
        source: the function that returns such a mapping.

    Raises:
        TypeError: it is no mapping.
        KeyError: it has nothing of a target.
    """
    instance(given, Mapping, where, f"what {source} returned, a mapping by site")
    for target in targets:
        if target.site not in given:
            message = missing(f"{where}: there is nothing of {target.site!r}", target.site, given)
            raise KeyError(f"{message}; give what {source} returned for this config")


def any_leaf(where: str, params: Params) -> Any:
    """Returns one of the parameters, which says for which framework and device something is.

    Raises:
        ValueError: there is none.
    """
    for leaf in flatten(params).leaves.values():
        return leaf
    raise ValueError(f"{where}: params hold no array, got {shown(params)}; give the model's")


def refuse_start(where: str, config: QuantizationConfig) -> None:
    """Raises where a quantizer without steps is given rules with a start step."""
    check_quantization(where, config)
    for target in config.targets:
        if target.start_step > 1:
            raise ValueError(
                f"{where}: rule {target.rule} has 'quant_start_step': {target.start_step}, but "
                "only qat counts steps; leave it out, and quantise from that step on"
            )


def refuse_granularity(where: str, config: QuantizationConfig) -> None:
    """Raises where weights have several scales in rules for a quantizer that has none."""
    check_quantization(where, config)
    for target in config.weights:
        if target.granularity != "tensor":
            raise ValueError(
                f"{where}: rule {target.rule} has granularity {target.granularity!r}, but here a "
                "weight has no scale; leave it out"
            )
