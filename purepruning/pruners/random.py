"""Random pruning: the floor that every criterion has to beat."""

from __future__ import annotations

from typing import Any

from purepruning.arrays import iota, namespace
from purepruning.config.config import Config
from purepruning.granularity import Grid
from purepruning.layers import Layer
from purepruning.random_bits import key_words, noise, own_words
from purepruning.selection.criterion import Criterion
from purepruning.selection.keys import Piece
from purepruning.selection.prune import prune
from purepruning.types import Masks, Params, Stats


def random_pruning(params: Params, stats: Stats, config: Config) -> Masks:
    """Returns masks that prune units at random.

    The key stands in the place of the statistics: a seed below 2**32, a ``jax.random`` key, or two
    32-bit words in an integer array or tensor; seed 5 and ``jax.random.key(5)`` are the same. Every
    unit's score is a hash of the key, the layer's name and the unit's position, so that
    masks are the same in every framework, a layer's mask does not depend on the other layers, and
    ``vmap`` over keys gives many masks at once. For configs of any granularity. See
    :func:`purepruning.prune` for the form of the masks and errors.

    Raises:
        TypeError: no key was given, or something that is not one.
        ValueError: a seed that is no 32-bit number.
    """
    return prune(_RANDOM, params, key_words(stats), config)


def _of(words: tuple[Any, Any], layer: Layer) -> tuple[Any, Any, int]:
    return own_words(words, layer.name)


def _element(weight: Any, layer_stats: tuple[Any, Any, Any]) -> Piece:
    return Piece((weight,), _score_element, layer_stats)


def _score_element(arrays: tuple[Any, ...], index: Any, layer_stats: tuple[Any, Any, Any]) -> Any:
    return noise(index, layer_stats)


def _unit(weight: Any, layer_stats: tuple[Any, Any, Any], g: Grid) -> Any:
    xp = namespace(weight)
    index = xp.reshape(iota(xp, g.n_stacked * g.n_units, weight), (g.n_stacked, g.n_units))
    return noise(index, layer_stats)


_RANDOM = Criterion(
    "random_pruning", element=_element, channel=_unit, block=_unit, of=_of, on_shards=True
)
