"""One shot on a language model: single weights, then whole heads, neurons and blocks.

    python examples/language_model.py                     # about a million weights, some minutes
    python examples/language_model.py --framework torch   # the same with an nn.Module
    python examples/language_model.py --quick             # under 40 seconds, for a smoke test

A character-level GPT learns the sources of Python's standard library, which every Python ships. It
is then pruned without any further training. Single weights go block by block: block i + 1 is
calibrated with what the pruned block i makes of the data; by magnitude, Wanda, RIA, SparseGPT and
ALPS, as many in every block or by OWL. Then a quarter of the blocks' weights goes as whole heads
and neurons (FLAP, Minitron) or as whole blocks (ShortGPT, SLEB), and what is left is a smaller
model whose speed is measured. Validation loss is in bits per character. ``--obc`` adds optimal
brain compression, which is exact and takes minutes.
"""

from __future__ import annotations

import argparse
import importlib
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from _gpt import Settings, contexts, text
from rich.console import Console
from rich.table import Table

import purepruning as pp

RULES = [{"op_types": ["Linear"]}]
QUICK = Settings(4, 32, 4, 32, 32, 300, 60_000, 32, 64, (0.6,))
QUARTER = 0.25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--framework", choices=["jax", "torch"], default="jax")
    parser.add_argument("--quick", action="store_true", help="a tiny model, for a smoke test")
    parser.add_argument("--obc", action="store_true", help="also OBC, for minutes")
    arguments, console, start = parser.parse_args(), Console(), time.perf_counter()
    settings = QUICK if arguments.quick else Settings()
    side = importlib.import_module(f"_gpt_{arguments.framework}").Side(settings)
    data = text(settings)
    model = side.trained(data)
    valid = contexts(data.valid, settings.validation, settings)
    some = contexts(data.train, settings.calibration, settings)
    dense = side.bits(model, valid)
    console.print(
        f"{side.parameters(model):,} weights, {len(data.train):,} characters, {dense:.3f} bits per "
        f"character after {time.perf_counter() - start:.0f} seconds."
    )
    methods = METHODS | ({"OBC": pp.obc} if arguments.obc else {})
    losses = {
        (name, how): side.bits(pruned(side, model, some, method, how, settings), valid)
        for how in allocations(settings)
        for name, method in methods.items()
    }
    console.print(table(losses, list(methods), dense, settings))
    console.print("\n".join(order(losses, settings)))
    console.print(structures(side, smaller(side, model, some, settings), valid))
    console.print(f"{time.perf_counter() - start:.0f} seconds in all.")


# Single weights, block by block.


def by_masks(pruner: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a pruner of masks as one that returns parameters too, as those that repair do."""

    def prune(params: Any, stats: Any, config: pp.Config) -> Any:
        masks = pruner(params, stats, config)
        return pp.apply_masks(params, masks), masks

    return prune


METHODS: dict[str, Callable[..., Any]] = {
    "magnitude": by_masks(lambda params, stats, config: pp.level(params, None, config)),
    "Wanda": by_masks(pp.wanda),
    "RIA": by_masks(pp.ria),
    "SparseGPT": pp.sparse_gpt,
    "ALPS": pp.alps,
}


def pruned(
    side: Any, model: Any, rows: np.ndarray, method: Any, how: Any, settings: Settings
) -> Any:
    """Returns the model after pruning all blocks, the first one first."""
    sparsity, allocation = how
    x = side.begin(model, rows)
    shares = None if allocation == "uniform" else outliers(side, model, x, sparsity, settings)
    for i in range(settings.blocks):
        layers = side.layers(model, i)
        if sparsity == "2:4":
            config = pp.resolve(RULES, layers, granularity=pp.NM(keep=2, of=4))
        else:
            config = pp.resolve(RULES, layers)
            config = config.with_sparsity(sparsity if shares is None else shares[i])
        params, _ = method(side.params(model), side.seen(model, i, x), config)
        model = side.with_params(model, params)
        x = side.after(model, i, x)  # the next block sees what this one has become
    return model


def outliers(side: Any, model: Any, x: Any, sparsity: float, settings: Settings) -> list[float]:
    """Returns OWL's sparsity of every block, from Wanda's scores in the dense model."""
    scores, first = {}, []
    for i in range(settings.blocks):
        config = pp.resolve(RULES, side.layers(model, i))
        found = pp.wanda_scores(side.params(model), side.seen(model, i, x), config)
        # One sparsity for a whole block: the first layer stands for all of them.
        first.append(config.layers[0])
        scores[first[-1].name] = np.concatenate([np.asarray(s).reshape(-1) for s in found.values()])
        x = side.after(model, i, x)
    config = pp.search.owl(scores, pp.resolve(RULES, first), sparsity=sparsity)
    return [config.counts[row.name] / math.prod(row.shape) for row in first]


def allocations(settings: Settings) -> list[tuple[Any, str]]:
    both = [(s, how) for s in settings.sparsities for how in ("uniform", "OWL")]
    return [*both, ("2:4", "uniform")]


def table(losses: dict[Any, float], names: list[str], dense: float, settings: Settings) -> Table:
    view = Table(title=f"Bits per character, {dense:.3f} before pruning")
    for name in ("pruned", "layers", *names):
        view.add_column(name, justify="right")
    for sparsity, how in allocations(settings):
        what = sparsity if isinstance(sparsity, str) else f"{sparsity:.0%}"
        view.add_row(what, how, *(f"{losses[name, (sparsity, how)]:.3f}" for name in names))
    return view


def order(losses: dict[Any, float], settings: Settings) -> list[str]:
    """Returns whether the known order came out: repaired, then Wanda, then magnitude."""
    lines = []
    for sparsity in (s for s in settings.sparsities if s >= 0.6):
        names = ("SparseGPT", "ALPS", "Wanda", "magnitude")
        gpt, alps, wanda, size = (losses[name, (sparsity, "uniform")] for name in names)
        holds = max(gpt, alps) < wanda < size
        verdict = "as known" if holds else "not as known: see how far the model has been trained"
        lines.append(f"{sparsity:.0%}: SparseGPT and ALPS, Wanda, magnitude: {verdict}.")
    return lines


# Whole heads, neurons and blocks: smaller models.


def smaller(side: Any, model: Any, rows: np.ndarray, settings: Settings) -> dict[str, Any]:
    """Returns models with a quarter less in their blocks, by what chose it."""
    drop = round(QUARTER * settings.blocks)
    depth = {
        "ShortGPT, depth": pp.short_gpt(side.turned(model, rows), drop),
        "SLEB, depth": pp.sleb(
            lambda kept: side.bits(
                side.without(model, set(range(settings.blocks)) - set(kept)), rows
            ),
            settings.blocks,
            drop,
        ),
    }
    found = {name: side.without(model, dropped) for name, dropped in depth.items()}
    layers, coupling = side.couple(model, rows)
    rules = [{"op_names_re": [r".*\.(qkv|up)"], "sparsity": QUARTER}]
    even = pp.resolve(rules, layers, coupling=coupling)
    # As many parameters as without a quarter of the blocks.
    left = side.parameters(next(iter(found.values()))) / side.parameters(model)
    rules[0]["sparsity"] = 1 - left
    whole = pp.resolve(rules, layers, coupling=coupling, scope="global")
    stats, params = side.read(model, rows, even.readers), side.params(model)
    for name, method, config in (
        ("magnitude, width", by_masks(lambda p, s, c: pp.group_norm(p, None, c)), even),
        ("Minitron, width", by_masks(lambda p, s, c: pp.minitron(p, s, c)), even),
        ("FLAP without means", lambda p, s, c: pp.flap(p, s, c, compensate=False), whole),
        ("FLAP, width", pp.flap, whole),
    ):
        new, masks = method(params, stats, config)
        found[name] = side.shrunk(side.with_params(model, new), masks, coupling, rows)
    return {"dense": model} | found


def structures(side: Any, models: dict[str, Any], rows: np.ndarray) -> Table:
    view = Table(title="A quarter of the blocks' weights less, and no training after it")
    for name in ("", "weights", "bits", "characters/s", "speed"):
        view.add_column(name, justify="left" if not name else "right")
    took = seconds({name: side.forward(model, rows) for name, model in models.items()})
    speeds = {name: rows[:, 1:].size / least for name, least in took.items()}
    for name, model in models.items():
        view.add_row(
            name,
            f"{side.parameters(model):,}",
            f"{side.bits(model, rows):.3f}",
            f"{speeds[name]:,.0f}",
            f"{speeds[name] / speeds['dense']:.2f}x",
        )
    return view


def seconds(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Returns the shortest time of each call; they take turns, as machines change their pace."""
    least = dict.fromkeys(calls, math.inf)
    for _ in range(10):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            least[name] = min(least[name], time.perf_counter() - start)
    return least


if __name__ == "__main__":
    main()
