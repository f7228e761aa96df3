"""Pruning by weights and activations: a weight matters as much as what it is multiplied by."""

from __future__ import annotations

from typing import Any

from purepruning.arrays import by_numpy, is_concrete, namespace, sqrt
from purepruning.config.config import Config
from purepruning.pruners.calibrated import Columns, of_columns, totals_of
from purepruning.selection.criterion import Criterion, summed
from purepruning.selection.keys import Piece
from purepruning.selection.prune import check_values, prune, weights_of
from purepruning.stats.accumulate import value
from purepruning.stats.inputs import InputStats
from purepruning.trees import flatten
from purepruning.types import Masks, Params


def wanda(params: Params, stats: InputStats, config: Config) -> Masks:
    r"""Returns masks that prune the weights of smallest magnitude times norm of their input.

    $$s_{ij} = |w_{ij}| \, \lVert x_j \rVert_2$$

    over all inputs $x$ that ``stats`` have seen (``"squares"`` of :mod:`purepruning.stats.inputs`;
    how many they are changes no rank within a layer). In layer scope weights are compared within
    the inputs of each output, as in the paper: of every output equally many go, and what the count
    has left over is divided as :func:`purepruning.selection.by_row.row_masks` says. In global scope
    all are ranked together. N:M ranks the groups; channels and blocks score the exact sum over
    their weights.

    Sun et al. 2023, arXiv:2306.11695. Blocks of a model are pruned one after the other there, each
    by what the pruned blocks before it make of the data; that is up to the caller, who captures.

    Raises:
        TypeError: ``stats`` are no input statistics, or of another framework.
        KeyError, ValueError: they are empty, not of the layers of ``config``, or hold no squares.
            See also :func:`purepruning.prune` for the form of the masks, ties, NaN and errors.

    >>> import jax.numpy as jnp
    >>> import purepruning as pp
    >>> from purepruning.stats import inputs
    >>> params = {"fc": jnp.array([[1.0, -4.0], [3.0, 2.0]])}
    >>> layer = pp.make_layer(params, "fc", "Linear", out_axes=0, in_axes=1)
    >>> stats = inputs.init(params, [layer])
    >>> stats = inputs.update(stats, {"fc": jnp.array([[5.0, 1.0]])}, [layer])
    >>> wanda(params, stats, pp.resolve(0.5, [layer]))["fc"].astype(int).tolist()
    [[1, 0], [1, 0]]
    """
    return prune(_WANDA, params, totals_of("wanda", params, stats, config, "squares"), config)


def wanda_scores(params: Params, stats: InputStats, config: Config) -> dict[str, Any]:
    r"""Returns $|w_{ij}| \lVert x_j \rVert_2$ by layer name, float32 in the weights' shapes.

    For what looks at scores themselves, such as :func:`purepruning.search.owl`. Arguments and
    errors are those of :func:`wanda`; counts do not matter.

    >>> import jax.numpy as jnp
    >>> import purepruning as pp
    >>> from purepruning.stats import inputs
    >>> params = {"fc": jnp.array([[1.0, -4.0]])}
    >>> layers = [pp.make_layer(params, "fc", "Linear", out_axes=0, in_axes=1)]
    >>> stats = inputs.init(params, layers)
    >>> stats = inputs.update(stats, {"fc": jnp.array([[5.0, 1.0]])}, layers)
    >>> config = pp.resolve([{}], layers)
    >>> wanda_scores(params, stats, config)["fc"].tolist()
    [[5.0, 4.0]]
    """
    totals = totals_of("wanda_scores", params, stats, config, "squares")
    weights = weights_of("wanda_scores", flatten(params).leaves, config)
    check_values("wanda_scores", weights)
    given = {x.name: (weights[x.weight], of_columns(totals, x)) for x in config.layers}
    found: dict[str, Any] = by_numpy(_checked_scores, given)
    return found


def _checked_scores(given: dict[str, Any]) -> dict[str, Any]:
    scores = {name: _element(*pair) for name, pair in given.items()}
    for name, score in scores.items():
        nan = namespace(score).any(namespace(score).isnan(score))
        if is_concrete(nan) and bool(nan):
            raise ValueError(f"wanda_scores: scores of layer {name!r} are NaN")
    return scores


def _element(weight: Any, layer_stats: Columns) -> Any:
    return _product((weight, _norms(layer_stats)), None, ())


def _piece(weight: Any, layer_stats: Columns) -> Piece:
    """Returns single weights, which score part by part: no array of all scores is made."""
    return Piece((weight, _norms(layer_stats)), _product, indexed=False)


def _product(arrays: tuple[Any, ...], index: Any, layer_stats: tuple[()]) -> Any:
    weight, norms = arrays
    xp = namespace(weight)
    return xp.abs(xp.astype(weight, xp.float32, copy=False)) * norms


def _norms(layer_stats: Columns) -> Any:
    """Returns the norm of every weight's input, in the weight's shape."""
    return layer_stats.spread(sqrt(value(layer_stats.total)))


_unit = summed(_element)


_WANDA = Criterion("wanda", element=_piece, channel=_unit, block=_unit, of=of_columns, rows=True)
