"""What ``search.py`` and its networks have in common; nothing here knows a framework."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import purepruning as pp

STEM = 16
RULES = [{"op_types": ["Conv2d"]}]
ROLES = ("source", "sink")
RATE, TUNING = 5e-3, 2e-3  # Adam's, with cosine decay


class Twin(NamedTuple):
    """A trained network, as searches see it.

    Attributes:
        params, coupling, layers: of the network.
        scores: the importance of every unit, by number.
        evaluate: from booleans by unit number to minus the loss on 128 training images.
        accuracies: from the same to the test accuracy as pruned, and after fine-tuning.
        traced: ``evaluate``, where it is traceable.
        compress: from the same to a smaller twin, prepared by ADMM and shrunk.
    """

    params: Any
    coupling: pp.Coupling
    layers: Any
    scores: Any
    evaluate: Callable[[Any], Any]
    accuracies: Callable[[Any], tuple[float, float]]
    traced: Callable[[Any], Any] | None
    compress: Callable[[pp.Config, Any], Twin] | None


class Units(NamedTuple):
    """Which units a plan removes: of each group those of lowest score.

    Attributes:
        names: of the groups.
        rank: by unit, how many of its part go before it; large for those that stay.
        group: by unit, its group.
    """

    names: tuple[str, ...]
    rank: np.ndarray
    group: np.ndarray

    def removed(self, counts: Any) -> Any:
        """Returns booleans by unit number, from counts in the order of the groups."""
        return counts[self.group] > self.rank


def units_of(config: pp.Config, scores: Any) -> Units:
    """Returns the units of a config's pools by their scores, ``(n_units,)``."""
    assert config.allocation is not None
    known = np.concatenate([[0.0], np.asarray(scores, np.float64)])
    rank = np.full(config.allocation.coupling.n_units + 1, 2**30, np.int32)
    group = np.zeros(len(rank), np.int32)
    for i, pool in enumerate(config.allocation.sets):
        for part in pool.units:
            rank[part[np.argsort(known[part], kind="stable")]] = np.arange(len(part))
            group[part] = i
    return Units(tuple(pool.name for pool in config.pools), rank, group)
