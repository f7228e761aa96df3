"""Do winning tickets win? Lottery tickets against their controls on scikit-learn's digits.

    python examples/lottery.py

Trains LeNet-300-100, prunes a fifth of the weights that are left, goes back, and trains again, in
14 rounds down to less than 5 % of the weights: 16 tickets at once, every round one compiled call.
Every round trains what is left in four ways:

    rewound              from the weights at initialisation: the ticket
    rewound, step 20     from the weights after 20 steps; a lottery of its own
    re-initialized       the ticket's mask, other weights of the same distribution
    shuffled             the ticket's weights at initialisation, a random mask of the same number of
                         weights in every layer

Frankle and Carbin 2019, arXiv:1803.03635. Prints a table and whether the claim holds, draws the
plot. The split into 1347 training and 450 test images is fixed; every ticket has its own
initialisation and order of batches. Initialisation, rate and shares are the paper's; what more or
fewer steps than 300 change is in README.md.
"""

from __future__ import annotations

import argparse
import importlib
import time
from pathlib import Path
from typing import NamedTuple

import _lottery_flax as network
import jax
import numpy as np
from digits import BATCH, batches, load_data
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from scipy import stats

import purepruning as pp

NAMES = network.Ways("rewound", "rewound, step 20", "re-initialized", "shuffled")
LATE = 20
SOON = 50  # steps after which learning has begun, for better or worse
CLAIM = 0.2  # the density at which the paper's claim is looked at


class Settings(NamedTuple):
    """How much is computed."""

    tickets: int = 16
    rounds: int = 14
    steps: int = 300


class Result(NamedTuple):
    """What became of the tickets: accuracies in percent, a point of a curve every few steps.

    Attributes:
        dense: learning curves of the dense networks, ``(tickets, points)``.
        curves: those of every round, by way, ``(rounds, tickets, points)``.
        density: the share of the weights that is left, ``(rounds,)``.
        steps: of every point.
    """

    dense: np.ndarray
    curves: network.Ways
    density: np.ndarray
    steps: np.ndarray


def main() -> None:
    arguments, console, start = parse_arguments(), Console(), time.perf_counter()
    settings = Settings(tickets=arguments.tickets)
    if arguments.quick:
        settings = Settings(4, 6, 100)
    result = draw(settings, console)
    for steps in (SOON, int(result.steps[-1])):
        console.print(table(result, steps), end="\n\n")
    console.print("\n".join(verdict(result)))
    plot = importlib.import_module("_lottery_plot")  # not before: it takes a second
    plot.write(arguments.out, result, NAMES, SOON)
    console.print(f"Wrote {arguments.out}. {time.perf_counter() - start:.0f} seconds in all.")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tickets", type=int, default=16, help="how many (default: 16)")
    parser.add_argument("--quick", action="store_true", help="few and short, for a smoke test")
    parser.add_argument("--out", type=Path, default=Path("lottery.png"), help="file of the plot")
    arguments = parser.parse_args()
    if arguments.tickets < 2:
        parser.error("--tickets must be at least 2: of one there is no spread")
    return arguments


def rules(rounds: int) -> list[dict[str, object]]:
    """Returns a fifth of what is left in every round; of the classifier half as much."""
    return [
        {"sparsity": 1 - 0.8**rounds, "op_types": ["Linear"]},
        {"sparsity": 1 - 0.9**rounds, "op_names": ["classifier"]},
    ]


def draw(settings: Settings, console: Console) -> Result:
    """Returns the learning curves of all tickets in all rounds."""
    data = load_data()
    data = data._replace(
        train_images=data.train_images.reshape(-1, 64), test_images=data.test_images.reshape(-1, 64)
    )
    config = pp.resolve(rules(settings.rounds), network.layers(data.test_images))
    functions = network.lottery(data, config, settings.rounds, LATE)
    seeds = np.arange(settings.tickets, dtype=np.int32)
    epochs = -(-settings.steps // (len(data.train_images) // BATCH))
    order = batches(data.train_images, seeds, epochs, 0)[:, : settings.steps]
    keys = jax.random.split(jax.random.key(0), (settings.rounds, settings.tickets))
    rounds = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("training dense networks", total=1 + settings.rounds)
        tickets, dense = jax.block_until_ready(functions.begin(seeds, order))
        for i in range(settings.rounds):
            progress.update(task, advance=1, description=f"round {i + 1} of {settings.rounds}")
            tickets, curves, density = functions.go(tickets, keys[i], order)
            rounds.append((jax.tree.map(np.asarray, curves), float(density[0])))
    curves = jax.tree.map(lambda *way: 100 * np.stack(way), *(c for c, _ in rounds))
    points = network.EVERY * np.arange(1, dense.shape[1] + 1)
    return Result(100 * np.asarray(dense), curves, np.array([d for _, d in rounds]), points)


def interval(values: np.ndarray) -> np.ndarray:
    """Returns half the 95 % confidence interval of the mean over the tickets, which are axis 0."""
    quantile = stats.t.ppf(0.975, len(values) - 1)
    return quantile * values.std(axis=0, ddof=1) / np.sqrt(len(values))


def table(result: Result, steps: int) -> Table:
    """Returns accuracies in percent after so many steps: the mean over the tickets and its 95 %."""
    at = int(np.flatnonzero(result.steps == steps)[0])
    view = Table(
        title=f"Test accuracy in percent after {steps} steps",
        caption=f"mean over {len(result.dense)} tickets ± its 95 % confidence",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    for name in ("weights left", *NAMES):
        view.add_column(name, justify="right", no_wrap=True)
    view.add_row("100.0%", *[_cell(result.dense[:, at])] * len(NAMES))
    for i, density in enumerate(result.density):
        view.add_row(f"{density:.1%}", *(_cell(way[i, :, at]) for way in result.curves))
    return view


def _cell(accuracies: np.ndarray) -> str:
    return f"{accuracies.mean():.1f}±{interval(accuracies):.1f}"


def verdict(result: Result) -> list[str]:
    """Returns for every way how far it is from the dense network at the density of the claim."""
    i = int(np.abs(result.density - CLAIM).argmin())
    lines = [f"With {result.density[i]:.1%} of the weights, against the dense network:"]
    for name, way in zip(NAMES, result.curves, strict=True):
        # A ticket and the dense network of its seed saw the same batches: compare them in pairs.
        leads = (way[i] - result.dense)[:, -1]
        lead, error = leads.mean(), interval(leads)
        word = "ahead" if lead > error else "behind" if lead < -error else "no difference"
        lines.append(f"  {name:17} {lead:+.2f} ± {error:.2f} points: {word}")
    return lines


if __name__ == "__main__":
    main()
