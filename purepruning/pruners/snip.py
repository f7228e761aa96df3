"""SNIP: what the loss would feel of a connection, before any training."""

from __future__ import annotations

from typing import Any

from purepruning.arrays import namespace
from purepruning.config.config import Config
from purepruning.granularity import Grid
from purepruning.pruners.of_gradients import of_units, totals_of
from purepruning.selection.criterion import Criterion, by_name
from purepruning.selection.keys import Piece
from purepruning.selection.prune import prune
from purepruning.stats.accumulate import CompensatedSum, value
from purepruning.stats.gradients import GradientStats
from purepruning.types import Masks, Params


def snip(params: Params, stats: GradientStats, config: Config) -> Masks:
    r"""Returns masks that prune the connections that the loss is least sensitive to.

    $$s_u = \Bigl| \sum_{i \in u} \frac{\partial L}{\partial c_i} \Bigr|_{c = 1}
      = \Bigl| \sum_{i \in u} g_i w_i \Bigr|, \qquad w \leftarrow c \odot w,$$

    with the gradients $g$ summed over all batches that ``stats`` have seen (``"signed"`` of
    :mod:`purepruning.stats.gradients`), before the magnitude is taken. The paper takes one batch at
    initialisation, ranks all weights together (``scope="global"``), and divides scores by their
    sum, which changes no rank. For configs of any granularity: a unit counts as one connection.

    In rounds, see :func:`purepruning.iterative`: iterative SNIP and FORCE.

    Lee et al. 2019, arXiv:1810.02340.

    Raises:
        TypeError: ``stats`` are no gradient statistics, or of another framework.
        KeyError, ValueError: they are empty, not of the layers and units of ``config``, or were
            made without ``keep=["signed"]``. See also :func:`purepruning.prune` for the form of the
            masks, ties, NaN and errors.

    >>> import jax.numpy as jnp
    >>> import purepruning as pp
    >>> from purepruning.stats import gradients
    >>> params, grads = {"fc": jnp.array([[1.0, -2.0]])}, {"fc": jnp.array([[-3.0, 1.0]])}
    >>> layer = pp.make_layer(params, "fc", "Linear", out_axes=1, in_axes=0)
    >>> config = pp.resolve(0.5, [layer], scope="global")
    >>> stats = gradients.init(params, config, keep=["signed"])
    >>> stats = gradients.update(stats, params, grads, config)
    >>> snip(params, stats, config)["fc"].tolist()
    [[True, False]]
    """
    return prune(_SNIP, params, totals_of("snip", params, stats, config, "signed"), config)


def element(weight: Any, layer_stats: CompensatedSum) -> Piece:
    """Returns single weights, which score the magnitude of their total."""
    return Piece(tuple(layer_stats), _magnitude, indexed=False)


def _magnitude(arrays: tuple[Any, ...], index: Any, layer_stats: tuple[()]) -> Any:
    return abs(value(CompensatedSum(*arrays)))


def unit(weight: Any, layer_stats: CompensatedSum, g: Grid) -> Any:
    """Returns the magnitude of the total of every unit."""
    return namespace(weight).abs(of_units(weight, layer_stats, g))


_SNIP = Criterion("snip", element=element, channel=unit, block=unit, of=by_name, on_shards=True)
