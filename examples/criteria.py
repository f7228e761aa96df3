"""Which criterion finds the weights that matter? All of them against random pruning, on digits.

    python examples/criteria.py

Trains one network per seed, prunes each by every criterion to several sparsities, fine-tunes them
all, prints tables and writes a plot. Three comparisons: single weights and whole channels of
the network of ``digits.py``, and channels of the same with batch norms, which slim needs. In each,
all prune the same number of units of every layer: what differs is which ones.

Slim, ADMM and movement train before they prune, as long as the network was trained to begin with;
*pruned* in the tables is after that. Norms have the statistics of all training images, taken anew
after pruning.

Data and rules are those of ``digits.py``. What had to be chosen (the rates and penalties in
``_criteria_flax.py``) was, on a quarter of the training images, held out.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import _criteria_flax as networks
import numpy as np
from digits import RULES, Result, Settings, batches, load_data, percent, upsets
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import purepruning as pp

NORM_RULES = [{"op_types": ["BatchNorm"]}]


class Method(NamedTuple):
    """A criterion, what is done before it prunes, and the units it ranks."""

    name: str
    way: networks.Way
    granularity: str


class Comparison(NamedTuple):
    """Methods that prune the same networks. Random pruning is the floor they must beat."""

    title: str
    model: Any
    methods: tuple[Method, ...]


def compare(title: str, model: Any, granularity: str, ways: dict[str, networks.Way]) -> Comparison:
    ways = {"random": networks.at_random, **ways}
    everyone = (Method(name, way, granularity) for name, way in ways.items())
    return Comparison(title, model, tuple(everyone))


COMPARISONS = (
    compare(
        "single weights",
        networks.PLAIN,
        "element",
        {
            "level": networks.by_weights(pp.level),
            "taylor_fo": networks.by_gradients(pp.taylor_fo),
            "admm": networks.by_admm(pp.level),
            "movement": networks.by_movement,
        },
    ),
    compare(
        "channels",
        networks.PLAIN,
        "output_channel",
        {
            "l1_norm": networks.by_weights(pp.l1_norm),
            "l2_norm": networks.by_weights(pp.l2_norm),
            "fpgm": networks.by_weights(pp.fpgm),
            "apoz_rank": networks.by_activations(pp.apoz_rank),
            "mean_activation_rank": networks.by_activations(pp.mean_activation_rank),
            "taylor_fo": networks.by_gradients(pp.taylor_fo),
            "taylor_fo grouped": networks.by_gradients(
                functools.partial(pp.taylor_fo, grouped=True), "grouped"
            ),
            "admm": networks.by_admm(pp.l2_norm),
            "movement": networks.by_movement,
        },
    ),
    compare(
        "channels with norms",
        networks.WITH_NORMS,
        "output_channel",
        {
            "l1_norm": networks.by_weights(pp.l1_norm),
            "taylor_fo": networks.by_gradients(pp.taylor_fo),
            "slim": networks.by_slimming,
        },
    ),
)


#: For a smoke test, one criterion of each kind, and the floors.
QUICK = {
    "single weights": ("random", "admm"),
    "channels": ("random", "apoz_rank", "taylor_fo", "movement"),
    "channels with norms": ("random", "slim"),
}


def main() -> None:
    arguments, console, start = parse_arguments(), Console(), time.perf_counter()
    settings, comparisons = Settings(np.arange(arguments.seeds, dtype=np.int32)), COMPARISONS
    if arguments.quick:
        settings = Settings(np.arange(2, dtype=np.int32), (0.5, 0.9), 4, 1)
        comparisons = tuple(quick(held) for held in COMPARISONS)
    outcomes = compete(comparisons, load_data(), settings, console)
    for held, dense, results in outcomes:
        console.print(table(held.title, dense, results, settings))
        console.print("\n".join(upsets(results, settings)), end="\n\n")
    plot = importlib.import_module("_criteria_plot")  # not before: it takes a second
    plot.write(arguments.out, outcomes, settings)
    console.print(f"Wrote {arguments.out}. {time.perf_counter() - start:.0f} seconds in all.")


def quick(held: Comparison) -> Comparison:
    some = tuple(c for c in held.methods if c.name in QUICK[held.title])
    return held._replace(methods=some)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="how many networks (default: 5)")
    parser.add_argument("--quick", action="store_true", help="some criteria, for a smoke test")
    parser.add_argument("--out", type=Path, default=Path("criteria.png"), help="file of the plot")
    arguments = parser.parse_args()
    if arguments.seeds < 2:
        parser.error("--seeds must be at least 2: of one network there is no spread")
    return arguments


def compete(
    comparisons: Sequence[Comparison], data: Any, settings: Settings, console: Console
) -> list[tuple[Comparison, np.ndarray, list[Result]]]:
    """Returns for every comparison the dense accuracies, (seeds,), and the results."""
    outcomes = []
    training = batches(data.train_images, settings.seeds, settings.training_epochs, 0)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=sum(1 + len(held.methods) for held in comparisons))
        for held in comparisons:
            progress.update(task, advance=1, description=f"{held.title}: training")
            params, accuracies = networks.train(held.model, data, settings.seeds, training)
            dense = np.asarray(accuracies)  # waits, so that the first one's time is its own
            results = []
            for method in held.methods:
                what = f"{held.title}: {method.name}"
                progress.update(task, advance=1, description=what)
                results.append(outcome(method, held.model, data, params, settings))
            outcomes.append((held, dense, results))
    return outcomes


def outcome(method: Method, model: Any, data: Any, params: Any, settings: Settings) -> Result:
    """Returns what one criterion makes of the dense networks, whose ``params`` are stacked."""
    start, seeds = time.perf_counter(), settings.seeds
    search = batches(data.train_images, seeds, settings.training_epochs, 2)
    tuning = batches(data.train_images, seeds, settings.tuning_epochs, 1)
    layers = networks.layers(model, data.test_images)
    rules = NORM_RULES if method.way is networks.by_slimming else RULES
    config = pp.resolve(rules, layers, granularity=method.granularity)
    # The counts of all sparsities become arrays, the only leaves of the config, to vmap over.
    config = config.with_sparsity(settings.sparsities)
    if method.way is networks.by_movement:
        steps = search.shape[1]
        run = {"begin_step": steps // 10, "end_step": steps * 7 // 10}
        config = pp.movement.schedule(config, steps, **run)
    found, masks = networks.find(method.way, model, data, params, config, search, seeds)
    accuracies = networks.fine_tune(model, data, found, masks, tuning)
    return Result(method, *map(np.asarray, accuracies), time.perf_counter() - start)


def table(title: str, dense: np.ndarray, results: Sequence[Result], settings: Settings) -> Table:
    """Returns accuracies in percent: mean ± standard deviation over the seeds."""
    view = Table(
        title=f"Test accuracy in percent after pruning {title}, and after fine-tuning\n"
        f"mean ± deviation over {len(dense)} seeds; before: {percent(dense)}",
        caption="s: seconds for all sparsities and seeds, compilation included",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    view.add_column("sparsity", no_wrap=True)
    for sparsity in settings.sparsities:
        view.add_column(f"{sparsity:.0%}", justify="right", no_wrap=True)
    view.add_column("s", justify="right", no_wrap=True)
    for result in results:
        for name, stage in ((result.method.name, result.pruned), ("  tuned", result.tuned)):
            seconds = f"{result.seconds:.0f}" if stage is result.pruned else ""
            view.add_row(name, *map(percent, stage.T), seconds)
        view.add_section()
    return view


if __name__ == "__main__":
    main()
