"""What shrinking did, in any framework, and checks that coupling and model belong together."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np

from purepruning.coupling.coupling import Coupling
from purepruning.coupling.describe import number
from purepruning.coupling.plan import Plan

Norms = Literal["original", "kept"]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ShrinkReport:
    """What a shrunk model lost.

    Attributes:
        plan: which positions stay; data that cuts other checkpoints and optimizer states.
        masks: the complete masks: the masked model that equals the shrunk one.
        params, macs: parameters and multiply-adds before and after.
        norms: which meaning of means over shrunk axes was used.
        statistics: how many sums are corrected for removed positions, with ``norms="original"``.
        restored: units that the masks prune and that stay, since not all that makes them agreed.
        extended: units that go although not all that makes them is masked.
    """

    plan: Plan
    masks: Any
    params: tuple[int, int]
    macs: tuple[Any, Any]
    norms: str
    statistics: int
    restored: tuple[int, ...]
    extended: tuple[int, ...]

    def __repr__(self) -> str:
        return f"{type(self).__name__}(params={self.params}, macs={self.macs})"

    def __str__(self) -> str:
        (p, q), (m, k) = self.params, self.macs
        lines = [
            f"parameters {p:,} -> {q:,} ({q / max(p, 1):.1%})",
            f"multiply-adds {number(m)} -> {number(k)}"
            + (f" ({k / max(m, 1):.1%})" if isinstance(m, int) else ""),
            f"units removed: {len(self.plan.removed)}",
            f"norms: {self.norms}"
            + (f", {self.statistics} statistics corrected" if self.norms == "original" else ""),
        ]
        if self.restored:
            lines.append(f"units kept although masked, for others need them: {len(self.restored)}")
        if self.extended:
            lines.append(f"units removed although not masked everywhere: {len(self.extended)}")
        return "\n".join(lines)


def check_same(expected: Coupling, found: Coupling) -> None:
    """Raises ValueError if two couplings are not of the same parameters, coupled alike."""
    for path in {*expected.leaves, *found.leaves}:
        one, other = expected.leaves.get(path), found.leaves.get(path)
        same = (
            one is not None
            and other is not None
            and one.shape == other.shape
            and all(
                (a is None) == (b is None) and (a is None or b is None or np.array_equal(a, b))
                for a, b in zip(one.units, other.units, strict=True)
            )
        )
        if not same:
            raise ValueError(
                f"coupling does not belong to this function and these parameters: {path!r} differs"
            )


def check_coupling(coupling: Any) -> None:
    """Raises TypeError for what is no coupling."""
    if not isinstance(coupling, Coupling):
        raise TypeError(f"coupling must be what couple() returns, got {type(coupling).__name__}")
