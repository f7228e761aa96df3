"""The criteria that a study compares: what each ranks, and by what statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import purepruning as pp
from purepruning.arguments import missing

Units = Literal["weights", "channels"]

#: What units are called in a config.
GRANULARITY: dict[str, str] = {"weights": "element", "channels": "output_channel"}

#: What every criterion is compared with.
CHANCE = "random"


class Criterion(NamedTuple):
    """A pruner of networks that are trained, and what it needs.

    Attributes:
        pruner: ``(params, stats, config) -> masks``, or ``-> (params, masks)`` if it ``repairs``.
        units: what it ranks.
        needs: its statistics: None, ``"seed"``, or a kind of :mod:`purepruning.stats` and what that
            is to keep.
        repairs: whether it changes weights that stay.
    """

    pruner: Callable[..., Any]
    units: tuple[Units, ...]
    needs: str | tuple[str, str] | None = None
    repairs: bool = False


_BOTH: tuple[Units, ...] = ("weights", "channels")

#: By name. Not among them: what is of initialisation alone (GraSP, SynFlow), what trains (ADMM,
#: movement pruning), what needs norms (slim), and ``fisher``, which ranks a layer as ``taylor_fo``.
CRITERIA: dict[str, Criterion] = {
    CHANCE: Criterion(pp.random_pruning, _BOTH, "seed"),
    "level": Criterion(pp.level, ("weights",)),
    "l1_norm": Criterion(pp.l1_norm, ("channels",)),
    "l2_norm": Criterion(pp.l2_norm, ("channels",)),
    "fpgm": Criterion(pp.fpgm, ("channels",)),
    "apoz_rank": Criterion(pp.apoz_rank, ("channels",), ("activations", "all")),
    "mean_activation_rank": Criterion(
        pp.mean_activation_rank, ("channels",), ("activations", "all")
    ),
    "taylor_fo": Criterion(pp.taylor_fo, _BOTH, ("gradients", "squares")),
    "snip": Criterion(pp.snip, _BOTH, ("gradients", "signed")),
    "wanda": Criterion(pp.wanda, _BOTH, ("inputs", "squares")),
    "ria": Criterion(pp.ria, ("weights",), ("inputs", "squares")),
    "sparse_gpt": Criterion(pp.sparse_gpt, ("weights",), ("inputs", "grams"), True),
    "alps": Criterion(pp.alps, ("weights",), ("inputs", "grams"), True),
}


class Method(NamedTuple):
    """A criterion and the units it ranks; ``str`` gives ``"level:weights"``."""

    criterion: str
    units: Units

    def __str__(self) -> str:
        return f"{self.criterion}:{self.units}"


def methods_of(names: Iterable[str] | None = None) -> tuple[Method, ...]:
    """Returns the methods of a study, with chance for each kind of units, first.

    Args:
        names: names of :data:`CRITERIA`, each with all units that it ranks, or with one:
            ``"taylor_fo:channels"``; all of them unless given.

    Raises:
        ValueError: there is no such criterion, or it does not rank these units.

    >>> [str(method) for method in methods_of(["level", "taylor_fo:channels"])]
    ['random:weights', 'random:channels', 'level:weights', 'taylor_fo:channels']
    """
    found: list[Method] = []
    for text in CRITERIA if names is None else names:
        name, _, units = str(text).partition(":")
        if name not in CRITERIA:
            raise ValueError(missing(f"study: there is no criterion {name!r}", name, CRITERIA))
        known = CRITERIA[name].units
        if units and units not in known:
            raise ValueError(
                f"study: {name!r} ranks {' and '.join(known)}, got {units!r}; write "
                f"{name}:{known[0]}"
            )
        found += [Method(name, u) for u in known if units in ("", u)]
    if not found:
        raise ValueError("study: there are no pruners; name some")
    kinds = [u for u in _BOTH if any(method.units == u for method in found)]
    chance = [Method(CHANCE, u) for u in kinds]
    return tuple(dict.fromkeys(chance + found))
