"""A row about memory: what masks, criteria and statistics take above the arrays they are given."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from data import linear_layers, normal, to_jax, to_torch
from measure import one_torch_thread, peak_extra

import purepruning as pp
from purepruning.stats import activations, gradients, inputs

WAYS = ("jax", "jax, jitted", "torch")
SPARSITY = 0.5


def memory(size: tuple[int, int, int], run: Callable[..., Any]) -> dict[str, Any]:
    """Peaks of resident memory in calls, each in a process of its own."""
    # What was freed before a call and is used again would not count: large arrays get pages anew.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**16)
    found = {f"{name}, {way}": run(_peak, name, way, size) for name in CASES for way in WAYS}
    count, width, _ = size
    rows = [
        [name, *(f"{found[f'{name}, {way}']:.2f}" for way in WAYS), case.unit]
        for name, case in CASES.items()
    ]
    return {
        "title": f"peak bytes above the arguments, {count} matrices of {width} x {width}, float32",
        "ours": {},
        "instead": {},
        "checks": [],
        "table": [["call", *WAYS, "bytes for each"], *rows],
    }


class Case:
    """A call, and what its bytes are divided by."""

    def __init__(self, unit: str, make: Callable[..., Any]) -> None:
        self.unit, self.make = unit, make


def _pruner(pruner: Any, **settings: Any) -> Case:
    def make(params: Any, layers: Any, more: Any) -> Any:
        config = pp.resolve(SPARSITY, layers, **settings)
        return lambda params: pruner(params, None, config), (params,)

    return Case("weight", make)


def _apply(params: Any, layers: Any, more: Any) -> Any:
    masks = pp.level(params, None, pp.resolve(SPARSITY, layers))
    return pp.apply_masks, (params, masks)


def _wanda(params: Any, layers: Any, more: Any) -> Any:
    config, seen = pp.resolve(SPARSITY, layers), _inputs(params, layers, more)
    stats = seen[0](*seen[1])
    return lambda params, stats: pp.wanda(params, stats, config), (params, stats)


def _gradients(params: Any, layers: Any, more: Any) -> Any:
    config = pp.resolve(SPARSITY, layers)
    start = gradients.init(params, config)
    grads = {name: w + 0 for name, w in params.items()}
    return lambda stats, p, g: gradients.update(stats, p, g, config), (start, params, grads)


def _activations(params: Any, layers: Any, more: Any) -> Any:
    start, seen = activations.init(params, layers), _rows(params, layers, more)
    return (
        lambda stats, seen: activations.update(stats, seen, layers, activation="relu"),
        (start, seen),
    )


def _inputs(params: Any, layers: Any, more: Any) -> Any:
    start, seen = inputs.init(params, layers), _rows(params, layers, more)
    return lambda stats, seen: inputs.update(stats, seen, layers), (start, seen)


def _rows(params: Any, layers: Any, more: Any) -> dict[str, Any]:
    return {layer.name: more[layer.name] for layer in layers}


CHANNEL = "output_channel"
CASES = {
    "level": _pruner(pp.level),
    "level over all layers": _pruner(pp.level, scope="global"),
    "level 2:4": _pruner(pp.level, granularity=pp.NM(keep=2, of=4)),
    "l1_norm of channels": _pruner(pp.l1_norm, granularity=CHANNEL),
    "fpgm": _pruner(pp.fpgm, granularity=CHANNEL),
    "wanda": Case("weight", _wanda),
    "apply_masks": Case("weight", _apply),
    "gradients.update": Case("weight", _gradients),
    "activations.update": Case("activation", _activations),
    "inputs.update": Case("activation", _inputs),
}


def _peak(name: str, way: str, size: tuple[int, int, int]) -> float:
    """Returns the bytes of one call's peak, its result included, for each of its unit."""
    import jax

    count, width, rows = size
    if way == "torch":
        one_torch_thread()
    move = to_torch if way == "torch" else to_jax
    weights = {f"layer{i:02d}.weight": normal((width, width), i) for i in range(count)}
    layers = linear_layers(weights)
    # Activations of as many numbers as there are weights in a layer, in turn for each.
    seen = {layer.name: normal((rows, width), 100 + i) for i, layer in enumerate(layers)}
    case = CASES[name]
    function, arguments = case.make(move(weights), layers, move(seen))
    if way == "jax, jitted":
        function = jax.jit(function).lower(*arguments).compile()
    elif way == "torch":
        function(*arguments)  # loads what is loaded at the first call
    units = count * width * (width if case.unit == "weight" else rows)
    return peak_extra(lambda: jax.block_until_ready(function(*arguments))) / units
