"""What a pruner ranks by, and how a layer is scored."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from purepruning.arrays import namespace, replicated
from purepruning.granularity import Grid, any_of, fold
from purepruning.layers import Layer
from purepruning.masks import spread_mask
from purepruning.selection.keys import Piece

LOWEST_FINITE = float(np.finfo(np.float32).min)


class Criterion(NamedTuple):
    """What a pruner ranks by. Scores are float32, and larger ones are more important.

    Layers of one shape are scored by one compiled function, so that scores depend on a layer only
    through its weight, its grid and what ``of`` returns for it.

    Attributes:
        name: the pruner's name, for messages.
        element: ``(weight, own) -> Piece``: how single weights score, for elements and N:M; None if
            the criterion has no such meaning.
        channel: ``(weight, own, grid) -> (members, units)``: how channels score; None if the
            criterion has no such meaning.
        block: the same for blocks.
        of: ``(stats, layer) -> own``: what the statistics say of one layer, a tree of arrays; None
            if the pruner takes ``stats=None``.
    """

    name: str
    element: Callable[[Any, Any], Piece] | None = None
    channel: Callable[[Any, Any, Grid], Any] | None = None
    block: Callable[[Any, Any, Grid], Any] | None = None
    of: Callable[[Any, Layer], Any] | None = None


class Source(NamedTuple):
    """What a layer is scored from: its weight, what the statistics say of it, and its mask so far.

    The mask is None where nothing is pruned already.
    """

    weight: Any
    own: Any
    keep: Any


class Score(NamedTuple):
    """How layers are scored: by a criterion; what is pruned already has the lowest score there is.

    Attributes:
        of: the criterion's function for the units of the config.
        inverted: whether the units of highest score are pruned.
    """

    of: Callable[..., Any]
    inverted: bool

    def piece(self, source: Source) -> Piece:
        """Returns the single weights of a layer, with their scores."""
        piece: Piece = self.of(source.weight, source.own)
        if source.keep is None and not self.inverted:
            return piece
        if source.keep is not None:
            keep = spread_mask(source.keep, source.weight)
            piece = piece._replace(arrays=(*piece.arrays, keep))
        masked = source.keep is not None
        return piece._replace(score=_Adjusted(piece.score, self.inverted, masked))

    def channels(self, source: Source, g: Grid) -> tuple[Any, Any]:
        """Returns the scores of channels, 0 where pruned already, and which are not (or None)."""
        scores = replicated(self.of(source.weight, source.own, g))
        scores = -scores if self.inverted else scores
        if source.keep is None:
            return scores, None
        whole = spread_mask(source.keep, source.weight)
        keep = replicated(fold(namespace(whole), whole, g, any_of))
        return namespace(scores).where(keep, scores, 0.0), keep

    def units(self, source: Source, g: Grid) -> Any:
        """Returns the scores of the units of a layer, ``(members, units)``."""
        scores = replicated(self.of(source.weight, source.own, g))
        keep = None
        if source.keep is not None:
            whole = spread_mask(source.keep, source.weight)
            keep = replicated(fold(namespace(whole), whole, g, any_of))
        return _with_lowest(scores, keep, self.inverted)


@dataclasses.dataclass(frozen=True)
class _Adjusted:
    """The score of a piece whose last array is its mask so far, if it is masked."""

    score: Callable[..., Any]
    inverted: bool
    masked: bool

    def __call__(self, arrays: tuple[Any, ...], index: Any, own: Any) -> Any:
        keep = arrays[-1] if self.masked else None
        scores = self.score(arrays[:-1] if self.masked else arrays, index, own)
        return _with_lowest(scores, keep, self.inverted)


def _with_lowest(scores: Any, keep: Any, inverted: bool) -> Any:
    scores = -scores if inverted else scores
    if keep is None:
        return scores
    xp = namespace(scores)
    # Scores of -inf still rank above what is pruned already.
    return xp.where(keep, xp.clip(scores, min=LOWEST_FINITE), -math.inf)
