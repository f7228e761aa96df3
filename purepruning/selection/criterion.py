"""What a pruner ranks by, and how a layer is scored."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from purepruning.arrays import (
    as_numpy,
    chosen,
    in_framework,
    is_concrete,
    is_numpy,
    is_torch,
    namespace,
    replicated,
)
from purepruning.exact_sum import exact_sum
from purepruning.granularity import Grid, any_of, fold
from purepruning.layers import Layer
from purepruning.masks import spread_mask
from purepruning.selection.keys import Piece
from purepruning.selection.unit_sums import Runs, unit_sums

LOWEST_FINITE = float(np.finfo(np.float32).min)


class Criterion(NamedTuple):
    """What a pruner ranks by. Larger scores are more important; they are compared in float32.

    Layers of one shape are scored by one compiled function, so that scores depend on a layer only
    through its weight, its grid and what ``of`` returns for it. Arrays are of the framework of the
    parameters, whatever the call goes through inside (functions of this library alone are given
    NumPy's); one that takes operations from :func:`purepruning.criteria.namespace` serves all.

    Attributes:
        name: the pruner's name, for messages.
        element: ``(weight, layer_stats) -> scores``: how single weights score, in the shape of the
            weight, for elements and N:M; None if the criterion has no such meaning.
        channel: ``(weight, layer_stats, grid) -> scores``: how channels score, ``(stacked,
            units)`` as :func:`purepruning.criteria.reduce_units` returns them; None if the
            criterion has no such meaning.
        block: the same for blocks.
        of: ``(stats, layer) -> layer_stats``: what the statistics say of one layer, a tree of
            arrays; None if the pruner takes ``stats=None``.
        rank: as ``channel``, the same order of channels and blocks in other numbers, of which fewer
            are rounded to the same; None if there are none. Where channels are coupled, scores are
            added, and these are not.
        terms: as ``element``, of criteria whose ``channel`` is
            :func:`purepruning.exact_sum.exact_sum` over a unit: what is summed, none of it
            negative. Compiled code then sums many layers at once; None if there is no such sum.
        rows: whether, in layer scope, single weights are compared with those of the same output
            alone (:mod:`purepruning.selection.by_row`).
        on_shards: whether ``element`` scores a weight by its own numbers alone (of statistics, by
            those in its place), and ``channel`` reads weights through
            :func:`purepruning.criteria.reduce_units` with its exact sum alone. Where a weight lies
            over processes, each then scores its shard; the weights of others are put together,
            one layer at a time.
    """

    name: str
    element: Callable[[Any, Any], Any] | None = None
    channel: Callable[[Any, Any, Grid], Any] | None = None
    block: Callable[[Any, Any, Grid], Any] | None = None
    of: Callable[[Any, Layer], Any] | None = None
    rank: Callable[[Any, Any, Grid], Any] | None = None
    terms: Callable[[Any, Any], Any] | None = None
    rows: bool = False
    on_shards: bool = False


def by_name(stats: Mapping[str, Any], layer: Layer) -> Any:
    """Returns what statistics by layer name say of one layer."""
    return stats[layer.name]


def summed(element: Callable[[Any, Any], Any]) -> Callable[[Any, Any, Grid], Any]:
    """Returns how units score the exact sum of what ``element`` returns for their weights."""

    def unit(weight: Any, layer_stats: Any, g: Grid) -> Any:
        return fold(namespace(weight), element(weight, layer_stats), g, exact_sum)

    return unit


@dataclasses.dataclass(frozen=True)
class Checked:
    """A function of a criterion whose results are checked; compiled code is looked up by it.

    Attributes:
        criterion: name of the criterion.
        field: ``"element"``, ``"channel"``, ``"block"``, ``"rank"`` or ``"terms"``.
        function: what stands there.
        framework: of the parameters: ``"jax"``, ``"torch"`` or ``"numpy"``.
    """

    criterion: str
    field: str
    function: Callable[..., Any]
    framework: str = "numpy"

    def __call__(self, weight: Any, layer_stats: Any, *grids: Grid) -> Any:
        """Returns what the function does: a piece, or float32 ``(stacked, units)``."""
        inside = is_numpy(weight)
        if inside and not _is_built_in(self.function):
            own = functools.partial(in_framework, self.framework)
            weight, layer_stats = jax.tree.map(own, (weight, layer_stats))
        scores = self._scores(weight, layer_stats, *grids)
        return jax.tree.map(as_numpy, scores) if inside else scores

    def _scores(self, weight: Any, layer_stats: Any, *grids: Grid) -> Any:
        try:
            scores = self.function(weight, layer_stats, *grids)
        except Exception as error:
            error.add_note(
                f"This is in {self.field} of the criterion {self.criterion!r}, which is given "
                f"{type(weight).__name__}; take operations from criteria.namespace(weight)."
            )
            raise
        if isinstance(scores, Piece) and not grids:
            return scores
        shape = (grids[0].n_stacked, grids[0].n_units) if grids else tuple(weight.shape)
        scores = self._checked(scores, weight, shape)
        return scores if grids else Piece((scores,), stored, indexed=False)

    def _checked(self, scores: Any, weight: Any, shape: tuple[int, ...]) -> Any:
        where = f"{self.criterion}: {self.field} must return"
        if not hasattr(scores, "shape") or is_torch(scores) != is_torch(weight):
            raise TypeError(
                f"{where} an array as the weight is, got {type(scores).__name__} for "
                f"{type(weight).__name__}"
            )
        if tuple(scores.shape) != shape:
            by_weight = self.field in ("element", "terms")
            units = "the shape of the weight, " if by_weight else "(stacked, units) = "
            raise ValueError(
                f"{where} scores of {units}{shape}, for a weight of shape {tuple(weight.shape)}, "
                f"got {tuple(scores.shape)}"
            )
        if isinstance(weight, np.ndarray) and is_concrete(scores):
            scores = np.asarray(scores)  # of a criterion in jax.numpy, where NumPy was handed in
        xp = namespace(scores)
        if not xp.isdtype(scores.dtype, ("real floating", "integral")):
            raise TypeError(f"{where} real numbers, got {scores.dtype}")
        return xp.astype(scores, xp.float32)


def _is_built_in(function: Any) -> bool:
    """Whether a function is this library's, and takes arrays of any framework."""
    while isinstance(function, functools.partial):
        function = function.func
    module = getattr(function, "__module__", None) or type(function).__module__
    return str(module).partition(".")[0] == "purepruning"


def stored(arrays: tuple[Any, ...], index: Any, layer_stats: Any) -> Any:
    """Returns the scores of a piece whose array they are."""
    return arrays[0]


class Source(NamedTuple):
    """What a layer is scored from: its weight, what the statistics say of it, and its mask so far.

    The mask is None where nothing is pruned already.
    """

    weight: Any
    layer_stats: Any
    keep: Any


class Score(NamedTuple):
    """How layers are scored: by a criterion; what is pruned already has the lowest score there is.

    Attributes:
        of: the criterion's function for the units of the config.
        inverted: whether the units of highest score are pruned.
        terms: as in :class:`Criterion`; None if the units of the config are no such sums.
    """

    of: Callable[..., Any]
    inverted: bool
    terms: Callable[[Any, Any], Piece] | None = None

    def piece(self, source: Source) -> Piece:
        """Returns the single weights of a layer, with their scores."""
        piece: Piece = self.of(source.weight, source.layer_stats)
        if source.keep is None and not self.inverted:
            return piece
        if source.keep is not None:
            keep = spread_mask(source.keep, source.weight)
            piece = piece._replace(arrays=(*piece.arrays, keep))
        masked = source.keep is not None
        return piece._replace(score=_Adjusted(piece.score, self.inverted, masked))

    def channels(self, source: Source, g: Grid) -> tuple[Any, Any]:
        """Returns the scores of channels, 0 where pruned already, and which are not (or None)."""
        scores = replicated(self.of(source.weight, source.layer_stats, g))
        scores = -scores if self.inverted else scores
        if source.keep is None:
            return scores, None
        whole = spread_mask(source.keep, source.weight)
        keep = replicated(fold(namespace(whole), whole, g, any_of))
        return namespace(scores).where(keep, scores, 0.0), keep

    def units(self, source: Source, g: Grid) -> Any:
        """Returns the scores of the units of a layer, ``(stacked, units)``."""
        scores = replicated(self.of(source.weight, source.layer_stats, g))
        keep = None
        if source.keep is not None:
            whole = spread_mask(source.keep, source.weight)
            keep = replicated(fold(namespace(whole), whole, g, any_of))
        return with_lowest(scores, keep, self.inverted)

    def sums(self, sources: Sequence[Source], places: Sequence[Runs]) -> Any:
        """Returns what :meth:`units` does, of layers without stacks, in one vector ``(units,)``."""
        assert self.terms is not None
        pieces = [self.terms(source.weight, source.layer_stats) for source in sources]
        masked = [source for source in sources if source.keep is not None]
        keeps = [spread_mask(source.keep, source.weight) for source in masked]
        scores, keep = unit_sums(pieces, places, keeps)
        return with_lowest(scores, keep, self.inverted)


@dataclasses.dataclass(frozen=True)
class _Adjusted:
    """The score of a piece whose last array is its mask so far, if it is masked."""

    score: Callable[..., Any]
    inverted: bool
    masked: bool

    def __call__(self, arrays: tuple[Any, ...], index: Any, layer_stats: Any) -> Any:
        keep = arrays[-1] if self.masked else None
        scores = self.score(arrays[:-1] if self.masked else arrays, index, layer_stats)
        return with_lowest(scores, keep, self.inverted)


def with_lowest(scores: Any, keep: Any, inverted: bool) -> Any:
    """Returns scores with the lowest there is where ``keep``, if given, is False."""
    scores = -scores if inverted else scores
    if keep is None:
        return scores
    # Scores of -inf still rank above what is pruned already.
    return chosen(keep, namespace(scores).clip(scores, min=LOWEST_FINITE), -math.inf)
