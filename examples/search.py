"""How much should each layer lose? Searches and formulas at the same budget of multiply-adds.

    python examples/search.py [--quick] [--framework torch]

A small ResNet is trained on scikit-learn's digits, and its coupled channels are pruned to a half
and to 30 % of its multiply-adds: by formulas, exactly on sensitivity curves, and by searches, which
see the loss on 128 training images. Prints what each plan leaves, how many evaluations it took, and
its test accuracy as pruned and after the same fine-tuning; draws ``search.png``. One seed:
differences of a point are noise (``benchmarks/search.py`` runs several).
"""

from __future__ import annotations

import argparse
import functools
import importlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import matplotlib.pyplot as plt
import numpy as np
from _search import ROLES, RULES, Twin, Units, units_of
from digits import batches, load_data
from rich import box
from rich.console import Console
from rich.table import Table

import purepruning as pp

BUDGETS = (0.5, 0.3)
AGENT = {"hidden": 64, "warmup": 20, "sigma_decay": 0.95, "actor_rate": 1e-3}


class Setting(NamedTuple):
    """A budget, and all that methods look at."""

    twin: Twin
    config: pp.Config
    units: Units
    problem: pp.search.Problem
    quick: bool

    def evaluate(self, trial: pp.search.Trial) -> float:
        counts = np.asarray([trial.counts[name] for name in self.units.names])
        return float(self.twin.evaluate(self.units.removed(counts)))


class Found(NamedTuple):
    """A plan, or a smaller network, and the scores of the evaluations that led to it."""

    plan: dict[str, int]
    scores: list[float]
    smaller: Twin | None = None


Method = Callable[[Setting], Found]


def uniform(s: Setting) -> Found:
    return Found(pp.search.fitted(s.problem, dict.fromkeys(s.units.names, 1.0)), [])


def by_layers(s: Setting, formula: Callable[[pp.Config], pp.Config], granularity: str) -> Found:
    """The plan in which a group loses what a formula takes of its layers, on average."""
    config = pp.resolve(RULES, s.twin.layers, granularity=granularity)
    counts = formula(config).counts
    share = {pool.name: counts[pool.name] / pool.size for pool in config.pools}
    shares = {
        pool.name: float(np.mean([share[layer.name] for layer in pool.layers]))
        for pool in s.config.pools
    }
    return Found(pp.search.fitted(s.problem, shares), [])


def erk(s: Setting) -> Found:
    return by_layers(s, functools.partial(pp.search.erk, sparsity=0.5), "output_channel")


def lamp(s: Setting) -> Found:
    formula = functools.partial(pp.search.lamp, s.twin.params, sparsity=0.5)
    return by_layers(s, formula, "element")


def global_norm(s: Setting) -> Found:
    """All units ranked together, as ``resolve(scope="global")`` does."""
    sparsity = 1 - s.problem.budgets["macs"] / s.problem.dense()["macs"]
    config = pp.resolve(
        [{**RULES[0], "sparsity": sparsity}],
        s.twin.layers,
        coupling=s.twin.coupling,
        scope="global",
        cost="macs",
    )
    masks = pp.group_norm(s.twin.params, None, config, roles=ROLES)
    removed = s.twin.coupling.chosen(masks, s.twin.params).removed
    sets = s.config.allocation.sets
    plan = {n: int(removed[x.units[0]].sum()) for n, x in zip(s.units.names, sets, strict=True)}
    return Found(plan, [])


def run(s: Setting, search: pp.search.Search) -> tuple[Any, Found]:
    result = pp.search.run_search(
        search, search.init(jax.random.key(0)), s.evaluate, problem=s.problem
    )
    scores = [row["score"] for row in result.history]
    return result.state, Found(result.best, scores)


def knapsack(s: Setting) -> Found:
    ratios = (0.3, 0.6, 0.9) if s.quick else (0.15, 0.3, 0.45, 0.6, 0.75, 0.9)
    state, found = run(s, pp.search.sensitivity(s.problem, ratios=ratios))
    curves = pp.search.curves(s.problem, state, ratios=ratios)
    return found._replace(plan=pp.search.allocate(s.problem, curves.errors(s.problem)).plan)


def netadapt(s: Setting) -> Found:
    step = 0.3 if s.quick else 0.08
    return run(s, pp.search.netadapt(s.problem, step=step, decay=1.0))[1]


def annealing(s: Setting) -> Found:
    rate, most = (0.5, 3) if s.quick else (0.95, 60)
    return run(s, pp.search.annealing(s.problem, cool_down_rate=rate, max_proposals=most))[1]


def evolution(s: Setting) -> Found:
    generations, offspring = (2, 3) if s.quick else (8, 8)
    search = pp.search.evolution(s.problem, generations=generations, offspring=offspring)
    return run(s, search)[1]


def amc(s: Setting) -> Found:
    episodes = 3 if s.quick else 80
    return run(s, pp.search.amc(s.problem, episodes=episodes, lower=0.1, hyper=AGENT))[1]


def auto_compress(s: Setting) -> Found:
    """Rounds of annealing, ADMM and shrinking; each sees what the one before has left."""
    scores: list[float] = []

    def evaluate(twin: Twin, counts: dict[str, int]) -> float:
        units = units_of(config_of(twin), twin.scores)
        found = np.asarray([counts[name] for name in units.names])
        scores.append(float(twin.evaluate(units.removed(found))))
        return scores[-1]

    def compress(twin: Twin, counts: dict[str, int]) -> Twin:
        config = config_of(twin)
        units = units_of(config, twin.scores)
        found = np.asarray([counts[name] for name in units.names])
        assert twin.compress is not None
        return twin.compress(config.with_counts(counts), units.removed(found))

    result = pp.search.auto_compress(
        s.twin,
        {"macs": s.problem.budgets["macs"]},
        problem=lambda twin, budget: pp.search.problem(config_of(twin), budget),
        evaluate=evaluate,
        compress=compress,
        key=jax.random.key(0),
        rounds=1 if s.quick else 2,
        cool_down_rate=0.5 if s.quick else 0.9,
        max_proposals=2 if s.quick else 40,
    )
    return Found({}, scores, result.model)


def config_of(twin: Twin) -> pp.Config:
    """Returns the rules resolved for a network."""
    return pp.resolve(RULES, twin.layers, coupling=twin.coupling, extra="none")


METHODS: dict[str, Method] = {
    "uniform": uniform,
    "ERK": erk,
    "LAMP": lamp,
    "global norm": global_norm,
    "knapsack": knapsack,
    "annealing": annealing,
    "NetAdapt": netadapt,
    "evolution": evolution,
    "AMC": amc,
    "AutoCompress": auto_compress,
}
SHORTER = ("uniform", "global norm", "knapsack", "NetAdapt", "evolution")


class Row(NamedTuple):
    """A method at a budget."""

    method: str
    budget: float
    left: float
    seconds: float
    pruned: float
    tuned: float
    found: Found


def compare(twin: Twin, methods: dict[str, Method], *, quick: bool) -> list[Row]:
    """Returns a row for every method and budget."""
    config = config_of(twin)
    units = units_of(config, twin.scores)
    rows = []
    for budget in BUDGETS[:1] if quick else BUDGETS:
        problem = pp.search.problem(config, {"macs": budget})
        setting = Setting(twin, config, units, problem, quick)
        for name, method in methods.items():
            start = time.perf_counter()
            found = method(setting)
            seconds = time.perf_counter() - start
            dense = problem.dense()["macs"]
            if found.smaller is None:
                left = problem.measure(found.plan)["macs"] / dense
                counts = np.asarray([found.plan[n] for n in units.names])
                pruned, tuned = twin.accuracies(units.removed(counts))
            else:
                small = found.smaller
                left = small.coupling.cost()[1] / dense
                pruned, tuned = small.accuracies(np.zeros(small.coupling.n_units + 1, bool))
            assert left <= budget
            rows.append(Row(name, budget, left, seconds, pruned, tuned, found))
    return rows


def table(rows: list[Row]) -> Table:
    view = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    view.add_column("", no_wrap=True)
    for name in ("asked,\n%", "left,\n%", "evalu-\nations", "s", "pruned,\n%", "tuned,\n%"):
        view.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        numbers = [f"{100 * x:.1f}" for x in (row.pruned, row.tuned)]
        view.add_row(
            row.method,
            f"{100 * row.budget:.0f}",
            f"{100 * row.left:.2f}",
            str(len(row.found.scores)),
            f"{row.seconds:.1f}",
            *numbers,
        )
    return view


def one_call(twin: Twin, config: pp.Config, units: Units, *, quick: bool) -> str:
    """Times annealing as a loop on the host, and as one compiled call."""
    of = pp.search.problem(config, {"macs": BUDGETS[0]})
    n = 3 if quick else 40
    search = pp.search.annealing(of, cool_down_rate=0.99, max_proposals=n)
    evaluate = twin.traced
    assert evaluate is not None

    def score(counts: dict[str, Any]) -> Any:
        return evaluate(units.removed(jax.numpy.stack([counts[name] for name in units.names])))

    def on_host(trial: pp.search.Trial) -> float:
        counts = np.asarray([trial.counts[name] for name in units.names])
        return float(evaluate(units.removed(counts)))

    compiled = jax.jit(lambda key: pp.search.scan_search(search, key, score, n)[0])
    key, times = jax.random.key(1), []
    calls: tuple[Callable[[], Any], ...] = (
        lambda: pp.search.run_search(search, search.init(key), on_host).state,
        lambda: compiled(key),
    )
    for call in calls:
        jax.block_until_ready(call())
        start = time.perf_counter()
        state = jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
        assert int(state.proposals) == n
    return f"{n} trials of annealing: {times[0]:.2f} s in a loop, {times[1]:.2f} s in one call"


def draw(rows: list[Row], config: pp.Config, name: str) -> None:
    """Writes a picture, a line for each budget: accuracies, and what each method left of groups."""
    sizes = {pool.name: pool.size for pool in config.pools}
    budgets = sorted({row.budget for row in rows}, reverse=True)
    size = (11, 4.2 * len(budgets))
    figure, axes = plt.subplots(len(budgets), 2, figsize=size, squeeze=False, layout="constrained")
    for budget, (left, right) in zip(budgets, axes, strict=True):
        shown = [row for row in rows if row.budget == budget]
        colors = [plt.get_cmap("tab10")(i) for i in range(len(shown))]
        for row, color in zip(shown, colors, strict=True):
            evaluations = len(row.found.scores)
            left.plot(evaluations, 100 * row.pruned, "o", mfc="none", color=color)
            left.plot(evaluations, 100 * row.tuned, "o", color=color)
        left.set(
            title=f"{100 * budget:.0f} % of the multiply-adds: pruned (rings) and tuned (dots)",
            xlabel="evaluations spent",
            ylabel="test accuracy, %",
        )
        # Of groups, in percent; AutoCompress gives a smaller network, and no plan.
        plans = [[row.found.plan.get(n, np.nan) / sizes[n] for n in sizes] for row in shown]
        gone = 100 * np.asarray(plans, np.float64)
        right.imshow(gone, cmap="Greys", vmin=0, vmax=150, aspect="auto")
        for (y, x), share in np.ndenumerate(gone):
            text = "" if np.isnan(share) else f"{share:.0f}"
            right.text(x, y, text, ha="center", va="center", fontsize=8)
        # A group is named by its first layer.
        right.set_xticks(range(len(sizes)), [n.partition(" + ")[0] for n in sizes], rotation=30)
        right.set_yticks(range(len(shown)), [row.method for row in shown])
        for label, color in zip(right.get_yticklabels(), colors, strict=True):
            label.set(color=color, fontweight="bold")
        right.set_title("units pruned, % of each group")
    figure.savefig(name, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="under a minute, for a smoke test")
    parser.add_argument("--framework", choices=("flax", "torch"), default="flax")
    given = parser.parse_args()
    data, seeds = load_data(), np.array([0])
    steps = 4 if given.quick else None
    training = batches(data.train_images, seeds, 10, 0)[0, :steps]
    tuning = batches(data.train_images, seeds, 2, 1)[0, :steps]
    make = importlib.import_module(f"_search_{given.framework}").make
    twin: Twin = make(data, training, tuning, 0)
    names = SHORTER if given.framework == "torch" else tuple(METHODS)
    methods = {name: METHODS[name] for name in names}
    console = Console()
    none = np.zeros(twin.coupling.n_units + 1, bool)
    console.print(f"Unpruned: {100 * twin.accuracies(none)[0]:.1f} % of the test images are right.")
    rows = compare(twin, methods, quick=given.quick)
    console.print(table(rows))
    config = config_of(twin)
    if twin.traced is not None:
        console.print(one_call(twin, config, units_of(config, twin.scores), quick=given.quick))
    draw(rows, config, "search.png")
    console.print("Wrote search.png.")


if __name__ == "__main__":
    main()
