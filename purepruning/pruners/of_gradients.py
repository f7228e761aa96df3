"""What pruners take from statistics of gradients: one total of every layer, checked."""

from __future__ import annotations

from typing import Any

from purepruning.arguments import instance
from purepruning.arrays import namespace
from purepruning.config.config import Config, check_config
from purepruning.exact_sum import exact_sum
from purepruning.granularity import Grid, fold
from purepruning.selection.keys import Piece
from purepruning.stats import gradients
from purepruning.stats.accumulate import CompensatedSum, value
from purepruning.stats.checks import check_totals, match, placed, refuse_empty
from purepruning.trees import flatten


def totals_of(
    pruner: str, params: Any, stats: Any, config: Config, kind: gradients.Kept
) -> dict[str, CompensatedSum]:
    """Returns the total that scores are made of, by name of the layers that are pruned.

    Those of single weights serve every granularity, except ``"grouped"``.

    Raises:
        TypeError: ``stats`` are no gradient statistics, or of another framework.
        KeyError, ValueError: they are empty, not of these layers and units, or do not hold that
            total.
    """
    check_config(pruner, config)
    expected = "the statistics of stats.gradients"
    instance(stats, gradients.GradientStats, f"{pruner}: stats", expected)
    check_totals(pruner, stats)
    totals = getattr(stats, kind)
    if config.layers and not totals:
        if not any(stats[1:]):
            raise ValueError(f"{pruner}: the statistics were made for no layers")
        raise ValueError(
            f"{pruner}: the statistics do not hold {kind!r}; make them with "
            f"gradients.init(..., keep=[{kind!r}])"
        )
    shapes = {}
    for layer in config.layers:
        shapes[layer.name] = gradients.shape(layer, config.granularity)
        found = tuple(getattr(getattr(totals.get(layer.name), "high", None), "shape", ()))
        if kind != "grouped" and found == layer.shape:
            shapes[layer.name] = layer.shape
    match(pruner, totals, shapes)
    refuse_empty(pruner, {layer.name: stats.steps for layer in config.layers})
    leaves = flatten(params).leaves
    return {
        layer.name: placed(pruner, layer.name, totals[layer.name], leaves.get(layer.weight))
        for layer in config.layers
    }


def of_elements(weight: Any, layer_stats: CompensatedSum) -> Piece:
    """Returns single weights, which score their total."""
    return Piece(tuple(layer_stats), _total, indexed=False)


def _total(arrays: tuple[Any, ...], index: Any, layer_stats: tuple[()]) -> Any:
    return value(CompensatedSum(*arrays))


def of_units(weight: Any, layer_stats: CompensatedSum, g: Grid) -> Any:
    """Returns the total of every unit, ``(stacked, units)``, exact where it is summed here."""
    total = value(layer_stats)
    if tuple(total.shape) == tuple(weight.shape):
        return fold(namespace(total), total, g, exact_sum)
    return total
