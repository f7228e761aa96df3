"""Calls every public function with wrong arguments, and reports what came of it.

One argument at a time takes every wrong value of its kind (and every tracer), the others stay
right; then several at random. ``python tests/explore/wrong_calls.py --minutes 60`` runs until then.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

if __name__ == "__main__":
    import sys

    os.environ.setdefault("KERAS_BACKEND", "jax")
    sys.path[:0] = [str(Path(__file__).parents[2])]

from tests.explore import surface as table
from tests.explore.kinds import Fate
from tests.explore.outcome import Outcome, limit_memory, outcome_of
from tests.explore.surface import Call


class Case(NamedTuple):
    """One call with something wrong."""

    call: Call
    wrong: dict[str, str]
    values: dict[str, Any]
    fate: Fate
    traced: str = ""

    def __str__(self) -> str:
        return f"{self.call.name}({', '.join(f'{k}={v}' for k, v in self.wrong.items())})"


class Result(NamedTuple):
    """A case, and what came of it: ``bad`` is None, or what is wrong with that."""

    case: Case
    outcome: Outcome
    bad: str | None


def singles(calls: tuple[Call, ...]) -> Iterator[Case]:
    """Yields every call with every single wrong argument."""
    for call in calls:
        for name, arg in call.args.items():
            for wrong in arg.kind.wrong(arg.value()):
                values = {n: a.value() for n, a in call.args.items()}
                yield Case(call, {name: wrong.label}, {**values, name: wrong.value}, wrong.fate)
            if call.works and any(map(_can_be_traced, jax.tree.leaves(arg.value()))):
                values = {n: a.value() for n, a in call.args.items()}
                yield Case(call, {name: "traced"}, values, "either", traced=name)


def _can_be_traced(leaf: Any) -> bool:
    number = isinstance(leaf, int | float) and not isinstance(leaf, bool)
    return number or isinstance(leaf, jax.Array | np.ndarray)


def _traced(case: Case) -> Any:
    """Calls with the numbers of one argument unknown, as under ``jit``."""
    leaves, treedef = jax.tree.flatten(case.values[case.traced])
    places = [i for i, leaf in enumerate(leaves) if _can_be_traced(leaf)]
    errors: list[Exception] = []

    def inner(numbers: list[Any]) -> int:
        filled = list(leaves)
        for place, number in zip(places, numbers, strict=True):
            filled[place] = number
        value = jax.tree.unflatten(treedef, filled)
        try:
            case.call({**case.values, case.traced: value})
        except Exception as error:
            errors.append(error)
        return 0

    jax.eval_shape(inner, [leaves[i] for i in places])
    if errors:
        raise errors[0]


def pairs(calls: tuple[Call, ...], rng: random.Random) -> Iterator[Case]:
    """Yields calls with two to three wrong arguments, without end."""
    while True:
        call = rng.choice(calls)
        if len(call.args) < 2:
            continue
        values = {n: a.value() for n, a in call.args.items()}
        labels, fates = {}, []
        for name in rng.sample(list(call.args), min(rng.choice((2, 2, 3)), len(call.args))):
            arg = call.args[name]
            every = list(arg.kind.wrong(values[name]))
            if every:
                wrong = rng.choice(every)
                values[name], labels[name] = wrong.value, wrong.label
                fates.append(wrong.fate)
        yield Case(call, labels, values, "refuse" if "refuse" in fates else "either")


def run(case: Case) -> Result:
    """Returns what came of a case."""
    call = case.call
    words = tuple(
        word
        for name in case.wrong
        for word in (name, *call.args[name].kind.words, *(("jit", "traces") if case.traced else ()))
        if len(word) > 1 or len(call.args) == 1
    )
    # Of an argument of one letter a message may say that it "must be" something.
    words += tuple(f": {name} must" for name in case.wrong if len(name) == 1)
    watched = {} if call.changes else case.values
    outcome = outcome_of(
        lambda: _traced(case) if case.traced else call(case.values), words, watched
    )
    bad = outcome.kind if outcome.kind in ("unclear", "hang", "damaged") else None
    if bad is None and outcome.kind == "returned" and case.fate == "refuse":
        bad = "accepted"
    return Result(case, outcome, bad)


def _say(results: list[Result], limit: int) -> None:
    counts = collections.Counter(result.bad or "well" for result in results)
    total = len(results)
    shares = ", ".join(f"{n} {kind} ({n / total:.2%})" for kind, n in counts.most_common())
    print(f"{total} wrong calls: {shares}")
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        if result.bad:
            place = result.outcome.where or result.case.call.name
            groups.setdefault((result.bad, place), []).append(result)
    for (bad, place), some in sorted(groups.items(), key=lambda item: -len(item[1]))[:limit]:
        print(f"\n{len(some)} {bad}: {place}")
        for result in some[:4]:
            print(f"    {result.case}: {result.outcome.text[:160]!r}")


def main() -> None:
    """Runs all single wrong arguments, then several at random until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=0, help="go on with random pairs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--names", type=Path, help="JSON: other names of callables and arguments")
    parser.add_argument("--only", default="", help="callables whose names contain this")
    parser.add_argument("--fast", action="store_true", help="without what traces models")
    parser.add_argument("--show", type=int, default=40, help="groups of failures to show")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    os.chdir(table.folder())  # a path may be any string
    if args.names:
        table.NAMES.update(json.loads(args.names.read_text()))
    started = time.monotonic()
    calls = tuple(c for c in table.surface(slow=not args.fast) if args.only in c.name)
    for call in (c for c in calls if c.works):
        call({n: a.value() for n, a in call.args.items()})
    limit_memory()
    results = [run(case) for case in singles(calls)]
    _say(results, args.show)
    more: list[Result] = []
    for case in pairs(calls, random.Random(args.seed)):
        if time.monotonic() - started > 60 * args.minutes:
            break
        more.append(run(case)._replace())
    if more:
        print("\nSeveral wrong arguments:")
        _say(more, args.show)


if __name__ == "__main__":
    main()
