"""What pruners take from statistics of inputs: the totals of one layer, by column of its matrix."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax

from purepruning.arguments import instance
from purepruning.arrays import namespace
from purepruning.config.config import Config, check_config
from purepruning.layers import Layer
from purepruning.matrices import Form, form, from_matrices
from purepruning.stats import inputs
from purepruning.stats.accumulate import CompensatedSum
from purepruning.stats.checks import check_totals, match, placed, refuse_empty
from purepruning.trees import flatten


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["total"], meta_fields=["columns_of"]
)
@dataclasses.dataclass(frozen=True)
class Columns:
    """A total of one layer, and which weights belong to its columns.

    Attributes:
        total: ``(members, columns)``.
        columns_of: how the weight is taken apart into matrices.
    """

    total: CompensatedSum
    columns_of: Form

    def spread(self, x: Any) -> Any:
        """Returns ``(members, columns)`` in the shape of the weight."""
        f = self.columns_of
        whole = namespace(x).broadcast_to(x[:, None, :], (f.members, f.out, f.columns))
        return from_matrices(whole, f)


def totals_of(
    pruner: str, params: Any, stats: Any, config: Config, kind: inputs.Kept
) -> dict[str, CompensatedSum]:
    """Returns one total of every layer that is pruned, by layer name, checked.

    Raises:
        TypeError: ``stats`` are no input statistics, or of another framework.
        KeyError, ValueError: they are empty, not of these layers, or do not hold that total.
    """
    check_config(pruner, config)
    expected = "the statistics of stats.inputs"
    instance(stats, inputs.InputStats, f"{pruner}: stats", expected)
    check_totals(pruner, stats)
    totals = getattr(stats, kind)
    if config.layers and not totals:
        raise ValueError(
            f"{pruner}: the statistics do not hold {kind!r}; make them with "
            f"inputs.init(..., keep=[{kind!r}])"
        )
    forms = {layer.name: form(pruner, layer) for layer in config.layers}
    square = kind == "grams"
    shapes = {name: (f.members, f.columns) + (f.columns,) * square for name, f in forms.items()}
    match(pruner, totals, shapes)
    match(pruner, stats.positions, dict.fromkeys(shapes, ()))
    refuse_empty(pruner, {name: stats.positions[name] for name in shapes})
    leaves = flatten(params).leaves
    return {
        layer.name: placed(pruner, layer.name, totals[layer.name], leaves.get(layer.weight))
        for layer in config.layers
    }


def of_columns(totals: dict[str, CompensatedSum], layer: Layer) -> Columns:
    """Returns what a criterion is given of one layer."""
    return Columns(totals[layer.name], form("columns", layer))
