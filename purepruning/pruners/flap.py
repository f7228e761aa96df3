"""FLAP: units whose activations fluctuate little can be replaced by their mean."""

from __future__ import annotations

from typing import Any

import numpy as np

from purepruning.arguments import flag, is_finite
from purepruning.arrays import by_numpy, int32, namespace, sqrt, stop_gradient
from purepruning.config.allocation import Allocation
from purepruning.config.config import Config
from purepruning.exact_sum import exact_sum
from purepruning.layers import Layer
from purepruning.linear_algebra import matmul
from purepruning.masks import apply_masks
from purepruning.matrices import as_matrices, form
from purepruning.pruners.coupled import allocation_of, units_pruned
from purepruning.pruners.read_units import Reader, readers_of
from purepruning.selection.problem import n_stacked
from purepruning.selection.prune import check_values
from purepruning.stats.accumulate import value
from purepruning.stats.checks import weight_of
from purepruning.stats.inputs import InputStats
from purepruning.trees import flatten
from purepruning.types import Masks, Params


def flap(
    params: Params, stats: InputStats, config: Config, *, compensate: bool = True
) -> tuple[Params, Masks]:
    r"""Returns parameters and masks: units that fluctuate least go, and biases hold their means.

    For the layers l that read coupled units, with weight $W$ and inputs x, every column j has

    $$m^l_j = \operatorname{Var}(x_j) \, \lVert W_{:,j} \rVert_2^2, \qquad
      z^l_j = \frac{m^l_j - \operatorname{mean}_{j'} m^l_{j'}}{\operatorname{std}_{j'} m^l_{j'}},$$

    a unit scores the mean of $z^l_j$ over its columns in all of these layers, and the layers'
    outputs keep their mean by $b^l \leftarrow b^l + \sum_{j \text{ pruned}} W_{:,j}
    \operatorname{mean}(x_j)$. Scores of different layers can be compared, so that
    ``scope="global"`` divides the sparsity among them, as in the paper. Stacked layers are
    standardised each for itself.

    An et al. 2024, arXiv:2312.11983. Its code squares the scores of attention once more, and takes
    the change of the mean for none when it adds up variances of batches.

    Args:
        params: the parameters.
        stats: ``"sums"`` and ``"squares"`` of :mod:`purepruning.stats.inputs`, of
            :attr:`purepruning.Config.readers`.
        config: the resolved rules, with a coupling.
        compensate: whether biases are changed. All layers that are watched must have one then; give
            those that have none zeros (in torch ``layer.bias = nn.Parameter(torch.zeros(n))``)
            before the model is coupled.

    Raises:
        TypeError: ``stats`` are no input statistics, or of another framework.
        KeyError: ``params`` lack a weight or bias of a layer that is watched.
        ValueError: the config has no coupling; the statistics are empty, hold no sums or squares,
            or are of no layer that reads some of the units; a layer has no bias; or, where values
            are known, a weight is NaN or infinite. See also
            :func:`purepruning.prune` for the form of the masks, ties, NaN and errors.

    >>> import jax.numpy as jnp
    >>> import purepruning as pp
    >>> from purepruning.stats import inputs
    >>> params = {"up": jnp.ones((1, 3)), "down": jnp.ones((3, 1)), "bias": jnp.zeros(1)}
    >>> fn = lambda p, x: x @ p["up"] @ p["down"] + p["bias"][None]
    >>> coupling = pp.couple(fn, params, jnp.ones((1, 1)))
    >>> up = pp.make_layer(params, "up", "Linear", out_axes=1, in_axes=0)
    >>> down = pp.make_layer(params, "down", "Linear", bias="bias", out_axes=1, in_axes=0)
    >>> rules = [{"sparsity": 0.4, "op_names": ["up"]}]
    >>> config = pp.resolve(rules, [up, down], coupling=coupling)
    >>> stats = inputs.init(params, config.readers, keep=["sums", "squares"])
    >>> seen = {"down": jnp.array([[1.0, 5.0, 0.0], [3.0, 5.0, 9.0]])}
    >>> stats = inputs.update(stats, seen, config.readers)
    >>> params, masks = flap(params, stats, config)
    >>> masks["up"].tolist(), params["bias"].tolist()
    ([[True, False, True]], [5.0])
    """
    flag(compensate, "flap: compensate")
    tree = flatten(params)
    readers = readers_of("flap", tree, stats, config, ["sums", "squares"])
    if not readers:
        return params, tree.rebuild({})
    allocation = allocation_of("flap", config)
    weights = [_weight(r.layer, tree.leaves) for r in readers]
    biases = _biases(readers, tree.leaves) if compensate else []
    totals = [r.totals for r in readers]
    n_units = allocation.coupling.n_units
    sizes = np.zeros(n_units)
    for r in readers:
        sizes[r.places.units - 1] += r.places.sizes

    def score(weights: list[Any], totals: list[Any]) -> Any:
        of_columns = map(_standardised, readers, weights, totals)
        parts = [r.places.sums(z, n_units) for r, z in zip(readers, of_columns, strict=True)]
        xp, total = namespace(parts[0]), sum(parts[1:], parts[0])
        return total / xp.astype(int32(xp, np.maximum(sizes, 1), total), xp.float32)

    masks, removed = units_pruned("flap", by_numpy(score, weights, totals), params, config)

    def shifted(biases: list[Any], weights: list[Any], totals: list[Any], removed: Any) -> Any:
        rows = zip(readers, biases, weights, totals, strict=True)
        return {
            r.layer.bias: _shifted(r, bias, weight, total, removed, allocation)
            for r, bias, weight, total in rows
        }

    new = by_numpy(shifted, biases, weights, totals, removed) if compensate else {}
    return apply_masks(tree.rebuild({**tree.leaves, **new}), masks), masks


def _weight(layer: Layer, leaves: Any) -> Any:
    weight = weight_of("flap", "params", layer, leaves)
    check_values("flap", {layer.weight: weight})
    if not namespace(weight).isdtype(weight.dtype, "real floating"):
        raise ValueError(
            f"flap: layer {layer.name!r}: {layer.weight!r} must be floating, got {weight.dtype}"
        )
    if not is_finite(weight):
        raise ValueError(f"flap: layer {layer.name!r}: {layer.weight!r} is NaN or infinite")
    return stop_gradient(weight)


def _biases(readers: list[Reader], leaves: Any) -> list[Any]:
    found = []
    for layer in (r.layer for r in readers):
        if layer.bias is None or layer.bias not in leaves:
            raise ValueError(
                f"flap: layer {layer.name!r} has no bias that could hold the means of its inputs; "
                "give it one of zeros before the model is coupled, or pass compensate=False"
            )
        found.append(stop_gradient(leaves[layer.bias]))
    return found


def _moments(totals: dict[str, Any]) -> tuple[Any, Any]:
    """Returns mean and variance of every column, ``(members, columns)``."""
    xp = namespace(totals["sums"].high)
    count = value(totals["positions"])
    mean = value(totals["sums"]) / count
    square = value(totals["squares"]) / count
    return mean, xp.clip(square - mean * mean, min=0.0)


def _standardised(reader: Reader, weight: Any, totals: dict[str, Any]) -> Any:
    """Returns $z_j$ of every column, ``(stacked, columns)``."""
    xp = namespace(weight)
    rows = as_matrices(xp.astype(weight, xp.float32), form("flap", reader.layer))
    metric = _moments(totals)[1] * exact_sum(rows * rows, (1,))
    metric = xp.reshape(metric, (n_stacked(reader.layer), -1))
    share = 1 / metric.shape[1]
    from_mean = metric - exact_sum(metric, (1,))[:, None] * share
    deviation = sqrt(exact_sum(from_mean * from_mean, (1,)) * share)[:, None]
    return xp.where(deviation > 0, from_mean / xp.where(deviation > 0, deviation, 1.0), 0.0)


def _shifted(
    reader: Reader, bias: Any, weight: Any, totals: Any, removed: Any, allocation: Allocation
) -> Any:
    """Returns the bias of a layer with the means of the columns that are pruned in it."""
    xp, f = namespace(weight), form("flap", reader.layer)
    places = allocation.place_of[reader.places.of_columns]
    gone = xp.take(removed, int32(xp, places.reshape(-1), removed))
    gone = xp.reshape(xp.any(xp.reshape(gone, places.shape), axis=1), (f.members, f.columns))
    mean = xp.where(gone, _moments(totals)[0], 0.0)
    rows = as_matrices(xp.astype(weight, xp.float32), f)
    more = matmul(xp, rows, mean[:, :, None])
    more = xp.reshape(more, tuple(bias.shape))
    return xp.astype(xp.astype(bias, xp.float32) + more, bias.dtype)
