"""How far can a small CNN be pruned? Pruners against random pruning on scikit-learn's digits.

    python examples/digits.py                       # Flax and Optax
    python examples/digits.py --framework torch     # the same with the nn.Module twin

Trains one network per seed, prunes each with every pruner to several sparsities, fine-tunes them
all, prints a table and writes a plot. What is compared, and how, stands in this file, and knows no
framework; the networks and their training are in ``_digits_flax.py`` and ``_digits_torch.py``.

The split into 1347 training and 450 test images is fixed. Training and fine-tuning see training
images only. The network and its training were chosen on a quarter of those, held out; fine-tuning
was not tuned at all.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import purepruning as pp

# An NNI config list as it stands. The last rule that selects a layer counts: the outputs of the
# classifier are the ten digits, none of which can go.
RULES = [
    {"sparsity": 0.5, "op_types": ["default"]},
    {"exclude": True, "op_names": ["classifier"]},
]
SPARSITIES = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)  # in place of the rules' 0.5, all at once
BATCH = 64
TRAINING_RATE, TUNING_RATE = 5e-3, 2e-3  # Adam's, with cosine decay


class Method(NamedTuple):
    """A pruner and the units it ranks. Random pruning is the floor that the others must beat."""

    name: str
    pruner: Callable[..., Any]
    granularity: str


METHODS = (
    Method("level", pp.level, "element"),
    Method("random", pp.random_pruning, "element"),
    Method("l1_norm", pp.l1_norm, "output_channel"),
    Method("l2_norm", pp.l2_norm, "output_channel"),
    Method("fpgm", pp.fpgm, "output_channel"),
    Method("random", pp.random_pruning, "output_channel"),
)
UNITS = {"element": "weights", "output_channel": "channels"}


class Data(NamedTuple):
    """Images of 8 x 8 pixels in [0, 1], and their digits."""

    train_images: np.ndarray
    test_images: np.ndarray
    train_labels: np.ndarray
    test_labels: np.ndarray


class Settings(NamedTuple):
    """How much is computed."""

    seeds: np.ndarray
    sparsities: Sequence[float] = SPARSITIES
    training_epochs: int = 20
    tuning_epochs: int = 5


class Result(NamedTuple):
    """What became of a method's networks; arrays are (seeds, sparsities)."""

    method: Method
    pruned: np.ndarray
    tuned: np.ndarray
    density: np.ndarray
    seconds: float


def main() -> None:
    arguments, console, start = parse_arguments(), Console(), time.perf_counter()
    settings = Settings(np.arange(arguments.seeds, dtype=np.int32))
    if arguments.quick:
        settings = Settings(np.arange(2, dtype=np.int32), (0.5, 0.8, 0.95), 8, 1)
    framework = importlib.import_module(f"_digits_{arguments.framework}")
    dense, results = compete(framework, load_data(), settings, console)
    console.print(table(dense, results, settings))
    console.print("\n".join(upsets(results, settings)))
    plot = importlib.import_module("_digits_plot")  # not before: it takes a second
    plot.write(arguments.out, arguments.framework, dense, results, settings)
    console.print(f"Wrote {arguments.out}. {time.perf_counter() - start:.0f} seconds in all.")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--framework", choices=("flax", "torch"), default="flax")
    parser.add_argument("--seeds", type=int, default=5, help="how many networks (default: 5)")
    parser.add_argument("--quick", action="store_true", help="a few seconds, for a smoke test")
    parser.add_argument("--out", type=Path, default=Path("digits.png"), help="file of the plot")
    arguments = parser.parse_args()
    if arguments.seeds < 2:
        parser.error("--seeds must be at least 2: of one network there is no spread")
    return arguments


def load_data() -> Data:
    digits = load_digits()
    images, labels = (digits.images / 16).astype(np.float32), digits.target.astype(np.int64)
    return Data(*train_test_split(images, labels, test_size=450, random_state=0, stratify=labels))


def batches(images: np.ndarray, seeds: np.ndarray, epochs: int, stage: int) -> np.ndarray:
    """Returns which images every step trains on, (seeds, steps, BATCH), for either framework."""
    orders = [
        [np.random.default_rng((seed, stage, e)).permutation(len(images)) for e in range(epochs)]
        for seed in seeds.tolist()
    ]
    whole = len(images) // BATCH * BATCH
    return np.array(orders)[:, :, :whole].reshape(len(seeds), -1, BATCH)


def compete(
    framework: ModuleType, data: Data, settings: Settings, console: Console
) -> tuple[np.ndarray, list[Result]]:
    """Returns the accuracies of the dense networks, (seeds,), and the methods' results."""
    results = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("training", total=1 + len(METHODS))
        training = batches(data.train_images, settings.seeds, settings.training_epochs, 0)
        params, accuracies = framework.train(data, settings.seeds, training, TRAINING_RATE)
        dense = np.asarray(accuracies)  # waits, so that the first method's time is its own
        for method in METHODS:
            progress.update(task, advance=1, description=f"{method.name}, fine-tuning")
            results.append(compare(framework, method, data, params, settings))
    return dense, results


def compare(
    framework: ModuleType, method: Method, data: Data, params: Any, settings: Settings
) -> Result:
    """Returns what one pruner makes of the dense networks, whose ``params`` are stacked."""
    start = time.perf_counter()
    layers = framework.layers(data.test_images)
    config = pp.resolve(RULES, layers, granularity=method.granularity)
    # The counts of all sparsities become arrays, the only leaves of the config, to vmap over.
    config = config.with_sparsity(settings.sparsities)
    # None of the criteria needs statistics; random pruning needs a seed in their place.
    stats = settings.seeds if method.pruner is pp.random_pruning else None
    masks = framework.prune(method.pruner, params, stats, config)
    tuning = batches(data.train_images, settings.seeds, settings.tuning_epochs, 1)
    outcome = framework.fine_tune(data, params, masks, tuning, TUNING_RATE)
    pruned, tuned, density = map(np.asarray, outcome)
    return Result(method, pruned, tuned, density, time.perf_counter() - start)


def table(dense: np.ndarray, results: Sequence[Result], settings: Settings) -> Table:
    """Returns accuracies in percent: mean ± standard deviation over the seeds."""
    view = Table(
        title=f"Test accuracy in percent, mean ± deviation over {len(dense)} seeds",
        caption="seconds: all sparsities and seeds of a pruner, compilation included",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),  # with dividers and numbers, just under 80 columns
        pad_edge=False,
    )
    for name in ("pruner", "units"):
        view.add_column(name, no_wrap=True)
    for name in ("sparsity", "density", "before", "pruned", "fine-tuned", "seconds"):
        view.add_column(name, justify="right", no_wrap=True)
    for result in results:
        name, units = result.method.name, UNITS[result.method.granularity]
        for i, sparsity in enumerate(settings.sparsities):
            accuracies = map(percent, (dense, result.pruned[:, i], result.tuned[:, i]))
            cells = f"{sparsity:.0%}", f"{result.density[:, i].mean():.1%}", *accuracies
            first = i == 0
            seconds = f"{result.seconds:.1f}" if first else ""
            view.add_row(name if first else "", units if first else "", *cells, seconds)
        view.add_section()
    return view


def percent(accuracies: np.ndarray) -> str:
    return f"{100 * accuracies.mean():.1f}±{100 * accuracies.std():<4.1f}"


def upsets(results: Sequence[Result], settings: Settings) -> list[str]:
    """Returns a line for every criterion behind random pruning, ± standard error."""
    floors = {r.method.granularity: r for r in results if r.method.name == "random"}
    lines = []
    for result in results:
        floor = floors[result.method.granularity]
        for when in ("pruned", "tuned"):
            # Networks of one seed are pruned from the same dense one: compare them in pairs.
            leads = 100 * (getattr(result, when) - getattr(floor, when))
            errors = leads.std(axis=0, ddof=1) / np.sqrt(len(leads))
            for i in np.flatnonzero(leads.mean(axis=0) < 0).tolist():
                behind, error = -leads[:, i].mean(), errors[i]
                noise = ", within the noise" if behind < 2 * error else ""
                lines.append(
                    f"{result.method.name} at {settings.sparsities[i]:.0%}, {when}: "
                    f"{behind:.1f} ± {error:.1f} points behind random pruning{noise}"
                )
    return lines or ["No criterion is behind random pruning anywhere."]


if __name__ == "__main__":
    main()
