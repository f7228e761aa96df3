"""Few cases of many: every combination of the values that matter together."""

import heapq
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest


def covering(
    cases: Iterable[tuple],
    *,
    factors: Callable[..., tuple] = lambda *case: case,
    strength: int = 2,
    together: Sequence[Sequence[int]] = (),
) -> list[tuple]:
    """Returns some of ``cases``, in their order, that combine all that the whole of them combine.

    Every combination of the values of ``strength`` factors that occurs in ``cases`` occurs in the
    result, and so does every one of the factors at each of the positions ``together``, for those of
    which more than ``strength`` matter at once. What cannot be combined is left out of ``cases``.
    The factors are the entries of a case, or what ``factors`` returns for them.

    The case with most of what is missing is taken, the first of equal ones, until nothing is, so
    that the result depends on ``cases`` alone. It has at most ``1 + ln(n)`` times as many cases as
    the fewest possible, with ``n`` combinations in a case (Chvátal 1979, Math. Oper. Res. 4, 233).
    """
    cases = list(cases)
    values = [factors(*case) for case in cases]
    positions = range(len(values[0]) if values else 0)
    sets = {*itertools.combinations(positions, strength), *map(tuple, together)}
    combinations = [{(s, *(found[i] for i in s)) for s in sets} for found in values]
    missing = set().union(*combinations)
    # What a case adds only falls, so it is counted again only when no other promises more.
    heap = [(-len(found), i) for i, found in enumerate(combinations)]
    heapq.heapify(heap)
    taken = []
    while missing:
        promised, i = heapq.heappop(heap)
        gain = len(combinations[i] & missing)
        if gain < -promised:
            heapq.heappush(heap, (-gain, i))
            continue
        missing -= combinations[i]
        taken.append(i)
    return [cases[i] for i in sorted(taken)]


def every(n: int, cases: Iterable[Any]) -> list:
    """Returns ``cases`` as parameters of a test; all but every n-th run with --full only."""
    return [pytest.param(c, marks=[pytest.mark.full] * (i % n > 0)) for i, c in enumerate(cases)]


def covered(cases: Sequence[tuple], keep: Iterable[tuple], ids: Iterable[str]) -> list:
    """Returns ``cases`` as parameters of a test; those that are not in ``keep`` run with --full."""
    kept = set(keep)
    return [
        pytest.param(*case, id=name, marks=() if case in kept else pytest.mark.full)
        for case, name in zip(cases, ids, strict=True)
    ]
