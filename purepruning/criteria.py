"""What an own criterion is written with.

A criterion says how the units of one layer score; :func:`purepruning.prune` does all else. Where
scores are at hand already, :func:`purepruning.prune_scores` takes them as they are.

>>> import jax.numpy as jnp
>>> import purepruning as pp
>>> from purepruning.criteria import Criterion, namespace, prune, reduce_units
>>> def largest(weight, own, grid):
...     xp = namespace(weight)
...     return reduce_units(xp.abs(weight), grid, lambda x, axes: xp.max(x, axis=axes))
>>> MAX_NORM = Criterion("max_norm", channel=largest)
>>> params = {"w": jnp.array([[1.0, -9.0, 2.0, 0.0], [-3.0, 4.0, 2.0, 1.0]])}
>>> layer = pp.make_layer(params, "w", "Linear", out_axes=1, in_axes=0)
>>> config = pp.resolve(0.5, [layer], granularity="output_channel")
>>> prune(MAX_NORM, params, None, config)["w"].tolist()
[[True, True, False, False]]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from purepruning.arrays import namespace
from purepruning.exact_sum import exact_sum
from purepruning.granularity import Grid, fold
from purepruning.selection.criterion import Criterion
from purepruning.selection.prune import prune

__all__ = ["Criterion", "Grid", "exact_sum", "namespace", "prune", "reduce_units"]


def reduce_units(
    values: Any, grid: Grid, reduce: Callable[[Any, tuple[int, ...]], Any] = exact_sum
) -> Any:
    """Returns one number for each unit, ``(stacked, units)``, from one for each weight.

    Members are the layers stacked in one; there is one where none are.

    Args:
        values: array of the weight's shape.
        grid: how the weight divides into units, as a criterion is given it.
        reduce: ``(array, axes) -> array`` without those axes. A block that is cut off at the edge
            of a weight is filled up with zeros. :func:`exact_sum` adds alike in every framework.

    Raises:
        ValueError: the values have another shape than the weight.
    """
    if tuple(values.shape) != grid.shape:
        raise ValueError(
            f"reduce_units: values must have the shape of the weight, {grid.shape}, got "
            f"{tuple(values.shape)}"
        )
    return fold(namespace(values), values, grid, reduce)
