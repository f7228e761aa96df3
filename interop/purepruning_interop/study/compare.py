"""Means, spreads, and what is more than chance."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtrit  # JAX needs SciPy too


class Interval(NamedTuple):
    """A mean, its spread, and how far it may be off.

    Attributes:
        mean: over the seeds.
        deviation: of single networks, with n - 1; NaN of one.
        low, high: 95 % confidence interval of the mean, by Student's t; NaN of one.
    """

    mean: float
    deviation: float
    low: float
    high: float


class Comparison(NamedTuple):
    """A method at a sparsity, against chance with the same networks, units and numbers of them.

    Attributes:
        method: ``criterion:units``.
        sparsity: what was asked for.
        density: weights left of the layers that are pruned.
        pruned, tuned: scores.
        pruned_lead, tuned_lead: by how much they are above those of random pruning: differences
            within pairs of networks of one seed; None of random pruning itself.
    """

    method: str
    sparsity: float
    density: float
    pruned: Interval
    tuned: Interval
    pruned_lead: Interval | None
    tuned_lead: Interval | None


def interval(values: Any) -> Interval:
    """Returns mean, deviation and 95 % confidence interval of independent numbers.

    >>> mean, deviation, low, high = interval([1.0, 2.0, 3.0])
    >>> mean, deviation, round(low, 3), round(high, 3)
    (2.0, 1.0, -0.484, 4.484)
    """
    x = np.asarray(values, np.float64)
    mean = float(x.mean())
    if len(x) < 2:
        return Interval(mean, np.nan, np.nan, np.nan)
    deviation = float(x.std(ddof=1))
    half = float(stdtrit(len(x) - 1, 0.975)) * deviation / np.sqrt(len(x))
    return Interval(mean, deviation, float(mean - half), float(mean + half))


def verdict(lead: Interval | None) -> str:
    """Returns what a confidence interval says: ``"ahead"``, ``"behind"`` or ``"no difference"``.

    >>> verdict(interval([1.0, 2.0, 3.0])), verdict(interval([1.0, 1.1, 1.2]))
    ('no difference', 'ahead')
    """
    if lead is None:
        return "baseline"
    return "ahead" if lead.low > 0 else "behind" if lead.high < 0 else "no difference"


def compared(study: Any) -> list[Comparison]:
    """Returns a row for each method and sparsity of a :class:`Study`, in its order."""
    rows = []
    for method in study.methods:
        of, chance = study.outcomes[str(method)], study.outcomes[f"random:{method.units}"]
        is_chance = of is chance
        weights = study.sizes[study.pruned_layers].sum()
        for i, sparsity in enumerate(study.sparsities):
            leads = [
                None if is_chance else interval(a[:, i] - b[:, i])
                for a, b in ((of.pruned, chance.pruned), (of.tuned, chance.tuned))
            ]
            kept = of.kept[:, i, study.pruned_layers].sum() / len(of.kept)
            rows.append(
                Comparison(
                    str(method),
                    sparsity,
                    float(kept / weights),
                    interval(of.pruned[:, i]),
                    interval(of.tuned[:, i]),
                    *leads,
                )
            )
    return rows
