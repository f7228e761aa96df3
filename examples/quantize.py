"""Bits against accuracy: quantizers on scikit-learn's digits, alone and after pruning.

    python examples/quantize.py                       # Flax and Optax
    python examples/quantize.py --framework torch     # the same with the nn.Module twin

Trains one small CNN per seed, quantises it in eleven ways, and trains those on that are trained.
What is quantised, and how, stands in this file and knows no framework: ``forward`` is the same
source for both. Networks and training are in ``_quantize_flax.py`` and ``_quantize_torch.py``.
"""

from __future__ import annotations

import argparse
import importlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from digits import Data, batches, load_data
from rich import box
from rich.console import Console
from rich.table import Table

import purepruning as pp
from purepruning.quantize import bnn, dorefa, integers, lsq, naive, observers, ptq, qat

RATE, TUNING_RATE = 5e-3, 2e-3  # Adam's, with cosine decay
SPARSITY = 0.32  # of the channels of every hidden layer, which removes half of the multiply-adds


class Recipe(NamedTuple):
    """A quantizer, the bits of weights and of what layers read, and whether it is trained."""

    name: str
    kind: str
    weight_bits: int = 8
    input_bits: int | None = None
    trained: bool = True
    pruned: bool = False


RECIPES = (
    Recipe("float", "float", trained=False),
    Recipe("naive 8", "naive", 8, trained=False),
    Recipe("PTQ 8", "ptq", 8, 8, trained=False),
    Recipe("QAT 8", "qat", 8, 8),
    Recipe("QAT 4", "qat", 4, 4),
    Recipe("QAT 2", "qat", 2, 2),
    Recipe("DoReFa 2", "dorefa", 2),
    Recipe("BNN", "bnn", 1),
    Recipe("LSQ 4", "lsq", 4, 4),
    Recipe("LSQ 2", "lsq", 2, 2),
    Recipe("pruned, QAT 8", "qat", 8, 8, pruned=True),
)


class Result(NamedTuple):
    """What became of a recipe's networks."""

    recipe: Recipe
    accuracies: np.ndarray
    bytes: int
    milliseconds: float | None


def rules(recipe: Recipe) -> list[dict[str, Any]]:
    """Returns rules as NNI writes them: images keep 8 bits, and what follows a ReLU is unsigned."""
    if recipe.kind == "float":
        return [{"op_types": ["Linear"], "exclude": True}]
    scheme = {} if recipe.kind in ("bnn", "dorefa") else {"quant_scheme": "per_channel_symmetric"}
    found = [{"quant_types": ["weight"], "quant_bits": recipe.weight_bits, **scheme}]
    if recipe.input_bits is not None:
        read = {"quant_types": ["input"], "quant_dtype": "uint"}
        found += [read | {"quant_bits": recipe.input_bits}]
        found += [read | {"quant_bits": 8, "op_names": ["conv1"]}]
    return found


def init(recipe: Recipe, params: Any, config: Any, replace: Callable[..., Any], x: Any) -> Any:
    """Returns what is trained, and the state beside it; ``x`` are images to look at."""
    if recipe.kind == "lsq":
        _, seen = replace(params, x, lsq.watch(config))
        return (params, lsq.init(params, config, seen)), None
    if recipe.kind == "ptq":
        state = observers.init(params, config)
        _, seen = replace(params, x, observers.watch(state, config))
        return params, observers.ranges(observers.update(state, seen, config))
    return params, qat.init(params, config) if recipe.kind == "qat" else None


def quantised(recipe: Recipe, trained: Any, state: Any, config: Any) -> Any:
    """Returns the weights that the model computes with."""
    if recipe.kind == "lsq":
        return lsq.weights(*trained, config)
    if recipe.kind == "float":
        return trained
    module = {"naive": naive, "ptq": ptq, "qat": qat, "dorefa": dorefa, "bnn": bnn}[recipe.kind]
    return module.weights(trained, state if recipe.kind == "qat" else None, config)


def sites(recipe: Recipe, trained: Any, state: Any, config: Any, training: bool) -> Any:
    """Returns the functions at what layers read."""
    if recipe.input_bits is None:
        return {}
    if recipe.kind == "lsq":
        return lsq.activations(trained[1], config)
    if recipe.kind == "ptq":
        return ptq.activations(state, config)
    return qat.activations(state, config, training=training)


def forward(
    recipe: Recipe,
    trained: Any,
    state: Any,
    config: Any,
    replace: Callable[..., Any],
    x: Any,
    *,
    training: bool = False,
) -> tuple[Any, Any]:
    """Returns logits, and what was seen at the sites."""
    at = sites(recipe, trained, state, config, training)
    return replace(quantised(recipe, trained, state, config), x, at)


def after_step(recipe: Recipe, trained: Any, state: Any, seen: Any, config: Any) -> Any:
    """Returns what is trained, and the state, after an optimizer's step."""
    if recipe.kind == "bnn":
        trained = bnn.clip(trained, config)
    return trained, qat.update(state, seen, config) if recipe.kind == "qat" else state


def integer_weights(recipe: Recipe, trained: Any, state: Any, config: Any) -> Any:
    """Returns the quantised parameters, their integers, and the ranges of what layers read."""
    weights = quantised(recipe, trained, state, config)
    if recipe.kind == "float":
        return weights, {}, {}
    if recipe.kind in ("dorefa", "bnn"):
        levels = {"dorefa": dorefa, "bnn": bnn}[recipe.kind].levels(config)
    elif recipe.kind == "lsq":
        levels = lsq.levels(trained[1], config)
    else:
        levels = {"naive": naive, "ptq": ptq, "qat": qat}[recipe.kind].levels(trained, config)
    ranges = state if recipe.kind == "ptq" else {}
    if recipe.kind == "qat":
        ranges = observers.ranges(state.averages)
    if recipe.kind == "lsq":  # integers times scales
        ranges = {t.site: _span(trained[1][t.site], t.bits) for t in config.activations}
    return weights, integers.of(weights, levels, config), ranges


def _span(scale: Any, bits: int) -> Any:
    return observers.Range(0.0 * scale, scale * (2**bits - 1))


def size_on_disk(recipe: Recipe, trained: Any, state: Any, config: Any) -> int:
    weights, packed, ranges = integer_weights(recipe, trained, state, config)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        pp.save_quantized(path, weights, packed, ranges, config)
        return path.stat().st_size


def main() -> None:
    arguments, console, start = parse_arguments(), Console(), time.perf_counter()
    seeds = np.arange(2 if arguments.quick else arguments.seeds, dtype=np.int32)
    epochs, tuning = (4, 1) if arguments.quick else (15, 5)
    backend = importlib.import_module(f"_quantize_{arguments.framework}")
    recipes = RECIPES[::3] if arguments.quick else RECIPES
    results = run(backend, load_data(), recipes, seeds, epochs, tuning, console)
    console.print(table(results))
    plot(arguments.out, results)
    console.print(f"Wrote {arguments.out}. {time.perf_counter() - start:.0f} seconds in all.")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--framework", choices=("flax", "torch"), default="flax")
    parser.add_argument("--seeds", type=int, default=5, help="how many networks (default: 5)")
    parser.add_argument("--quick", action="store_true", help="a few seconds, for a smoke test")
    parser.add_argument("--out", type=Path, default=Path("quantize.png"), help="file of the plot")
    return parser.parse_args()


def run(
    backend: ModuleType,
    data: Data,
    recipes: tuple[Recipe, ...],
    seeds: np.ndarray,
    epochs: int,
    tuning: int,
    console: Console,
) -> list[Result]:
    """Returns a result for every recipe; ``networks`` hold all seeds."""
    first = batches(data.train_images, seeds, epochs, 0)
    second = batches(data.train_images, seeds, tuning, 1)
    dense = backend.train(data, seeds, first, RATE)
    small = backend.pruned(data, dense, SPARSITY)
    console.print(f"Pruned networks have {small.macs:.0%} of the multiply-adds.")
    results = []
    for recipe in recipes:
        networks = small if recipe.pruned else dense
        config = pp.resolve_quantization(rules(recipe), networks.layers)
        orders = second if recipe.trained else second[:, :0]
        done = backend.tune(recipe, networks, config, data, orders, TUNING_RATE)
        size = size_on_disk(recipe, done.trained, done.state, config)
        latency = backend.latency(recipe, done, config, data)
        results.append(Result(recipe, done.accuracies, size, latency))
    return results


def table(results: list[Result]) -> Table:
    timed = any(result.milliseconds is not None for result in results)
    note = (
        "ONNX: integer kernels where weights and inputs have 8 bits; elsewhere numbers are made of "
    )
    note += "integers at every run, which takes longer than floats: fewer bits save memory alone."
    view = Table(
        title="Quantised digits",
        caption=note if timed else None,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    view.add_column("network", no_wrap=True)
    for name in ("accuracy in percent", "bytes on disk", *["ONNX, ms"] * timed):
        view.add_column(name, justify="right", no_wrap=True)
    for result in results:
        accuracy = f"{100 * result.accuracies.mean():.1f} ± {100 * result.accuracies.std():.1f}"
        time_ = "" if result.milliseconds is None else f"{result.milliseconds:.2f}"
        view.add_row(result.recipe.name, accuracy, f"{result.bytes:,}", *[time_] * timed)
    return view


def plot(path: Path, results: list[Result]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for i, (result, marker) in enumerate(zip(results, "osD^v<>PX*d", strict=False)):
        mean, spread = 100 * result.accuracies.mean(), 100 * result.accuracies.std()
        name, size = result.recipe.name, result.bytes / 1024
        axes.errorbar(size, mean, spread, fmt=marker, capsize=3, color=f"C{i}", label=name)
    axes.set(
        title="A small CNN on scikit-learn's digits: mean and deviation of the seeds",
        xscale="log",
        xlabel="KiB on disk",
        ylabel="test accuracy, %",
    )
    axes.set_xticks([10, 20, 50, 100], ["10", "20", "50", "100"])
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.2)
    figure.legend(loc="outside right center")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
