"""Pruning by relative importance: how much of its row and column a weight makes, and its input."""

from __future__ import annotations

from typing import Any

from purepruning.arrays import namespace, sqrt
from purepruning.config.config import Config
from purepruning.exact_sum import exact_sum
from purepruning.matrices import as_matrices, from_matrices
from purepruning.pruners.calibrated import Columns, of_columns, totals_of
from purepruning.selection.criterion import Criterion, summed
from purepruning.selection.prune import prune
from purepruning.stats.accumulate import value
from purepruning.stats.inputs import InputStats
from purepruning.types import Masks, Params


def ria(params: Params, stats: InputStats, config: Config) -> Masks:
    r"""Returns masks that prune the weights of smallest relative importance and activation.

    $$s_{ij} = \Bigl(\frac{|w_{ij}|}{\sum_{i'} |w_{i'j}|} + \frac{|w_{ij}|}{\sum_{j'} |w_{ij'}|}
      \Bigr) \lVert x_j \rVert_2^{1/2}$$

    over all inputs $x$ that ``stats`` have seen (``"squares"`` of :mod:`purepruning.stats.inputs`).
    A part whose weights are all zero counts nothing. Sums are exact
    (:mod:`purepruning.exact_sum`). Weights are ranked within a layer, N:M within its groups;
    channels and blocks score the exact sum over their weights.

    Zhang et al. 2024, "Plug-and-Play: An Efficient Post-Training Pruning Method for Large Language
    Models", ICLR; without its channel permutation.

    Raises:
        TypeError: ``stats`` are no input statistics, or of another framework.
        KeyError, ValueError: they are empty, not of the layers of ``config``, or hold no squares.
            See also :func:`purepruning.prune` for the form of the masks, ties, NaN and errors.

    >>> import jax.numpy as jnp
    >>> import purepruning as pp
    >>> from purepruning.stats import inputs
    >>> params = {"fc": jnp.array([[1.0, -4.0], [3.0, 4.0]])}
    >>> layer = pp.make_layer(params, "fc", "Linear", out_axes=0, in_axes=1)
    >>> stats = inputs.init(params, [layer])
    >>> stats = inputs.update(stats, {"fc": jnp.array([[1.0, 1.0]])}, [layer])
    >>> ria(params, stats, pp.resolve(0.5, [layer]))["fc"].astype(int).tolist()
    [[0, 1], [1, 0]]
    """
    return prune(_RIA, params, totals_of("ria", params, stats, config, "squares"), config)


def _element(weight: Any, layer_stats: Columns) -> Any:
    xp, f = namespace(weight), layer_stats.columns_of
    size = as_matrices(xp.abs(xp.astype(weight, xp.float32)), f)
    parts = [_share(size, axis) for axis in (1, 2)]
    norms = sqrt(sqrt(value(layer_stats.total)))
    return from_matrices((parts[0] + parts[1]) * norms[:, None, :], f)


def _share(size: Any, axis: int) -> Any:
    xp = namespace(size)
    total = xp.expand_dims(exact_sum(size, (axis,)), axis=axis)
    return xp.where(total == 0, 0.0, size / xp.where(total == 0, 1.0, total))


_unit = summed(_element)


_RIA = Criterion("ria", element=_element, channel=_unit, block=_unit, of=of_columns)
