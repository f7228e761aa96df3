"""Which search finds the better plan? The methods of ``examples/search.py`` over several seeds.

    python benchmarks/search.py [--seeds 3] [--quick]

Adds optuna's TPE (``pip install optuna``), which gets as many evaluations as evolution and proposes
how the budget is shared out, so that its plans meet the budget too. Prints accuracies as pruned and
after fine-tuning, with the half width of a 95 % confidence interval of their mean.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
#: Of Student's t, for means of 2, 3, ... seeds.
QUANTILES = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}


def tpe(setting: Any) -> Any:
    """Returns what optuna finds: shares of the groups, fitted to the budget."""
    import optuna
    from search import Found

    import purepruning as pp

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0))
    space = {n: optuna.distributions.FloatDistribution(0.0, 1.0) for n in setting.units.names}
    best, scores = None, []
    for number in range(6 if setting.quick else 72):
        trial = study.ask(space)
        plan = pp.search.fitted(setting.problem, trial.params)
        score = setting.evaluate(pp.search.Trial(number, 0, plan))
        study.tell(trial, score)
        if not scores or score > max(scores):
            best = plan
        scores.append(score)
    return Found(best, scores)


def half_width(values: np.ndarray) -> float:
    """Returns half of the 95 % confidence interval of the mean; NaN of one value."""
    n = len(values)
    if n < 2:
        return float("nan")
    return QUANTILES.get(n, 2.0) * float(values.std(ddof=1)) / n**0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    sys.path.insert(0, str(EXAMPLES))
    search = importlib.import_module("search")
    digits = importlib.import_module("digits")
    make = importlib.import_module("_search_flax").make
    methods = {**search.METHODS, "optuna TPE": tpe}
    data, found = digits.load_data(), {}
    console = Console()
    for seed in range(given.seeds):
        seeds = np.array([seed])
        epochs = (1, 1) if given.quick else (10, 2)
        training, tuning = (
            digits.batches(data.train_images, seeds, e, i)[0] for i, e in enumerate(epochs)
        )
        twin = make(data, training, tuning, seed)
        for row in search.compare(twin, methods, quick=given.quick):
            found.setdefault((row.budget, row.method), []).append(row)
        console.print(f"Seeds: {seed + 1}", table(found), sep="\n")


def table(found: dict[tuple[float, str], list[Any]]) -> Table:
    """Returns the rows so far: means over seeds."""
    view = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    view.add_column("", no_wrap=True)
    for name in ("asked,\n%", "evalu-\nations", "s", "pruned,\n%", "tuned,\n%"):
        view.add_column(name, justify="right", no_wrap=True)
    for (budget, method), rows in found.items():
        cells = []
        for field in ("pruned", "tuned"):
            values = 100 * np.asarray([getattr(row, field) for row in rows])
            cells.append(f"{values.mean():.1f} ± {half_width(values):.1f}")
        evaluations = f"{np.mean([len(row.found.scores) for row in rows]):.0f}"
        seconds = f"{np.mean([row.seconds for row in rows]):.1f}"
        view.add_row(method, f"{100 * budget:.0f}", evaluations, seconds, *cells)
    return view


if __name__ == "__main__":
    main()
