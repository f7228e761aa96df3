"""Is a sparse network worth training from scratch? Eight ways to find its connections, on digits.

    python examples/sparse_from_scratch.py           # five seeds at 90, 95 and 98 %
    python examples/sparse_from_scratch.py --quick   # under half a minute, for a smoke test

LeNet-300-100 on scikit-learn's digits, in plain JAX. SNIP, GraSP, SynFlow and random masks (ERK)
are found before training; SET and RigL move connections as they train; AGP and lottery tickets see
the dense network train. All of them end with the same number of weights, and all seeds of a method
run in one compiled call. The last columns train each method's masks again from the same start,
shuffled within every layer: where nothing is lost by it, all that a method found is how many
connections each layer gets (Frankle et al. 2021, arXiv:2009.08576).
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import purepruning as pp
from purepruning.stats import gradients

SHAPES = {"fc1": (64, 300), "fc2": (300, 100), "classifier": (100, 10)}
BATCH, RATE = 64, 2e-3  # Adam's rate, with cosine decay
SYNFLOW_ROUNDS, TICKET_ROUNDS = 100, 5
RULES = [{"op_types": ["Linear"]}]
ALL = ("SNIP", "GraSP", "SynFlow", "random, ERK", "SET", "RigL", "AGP", "lottery")

Params = dict[str, Any]


class Settings(NamedTuple):
    """How much is computed."""

    seeds: int = 5
    sparsities: tuple[float, ...] = (0.9, 0.95, 0.98)
    epochs: int = 20
    methods: tuple[str, ...] = ALL


class Data(NamedTuple):
    """Rows of 64 pixels in [0, 1], and their digits."""

    train: Any
    test: Any
    train_labels: Any
    test_labels: Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="four methods, two seeds")
    parser.add_argument("--out", type=Path, default=Path("sparse_from_scratch.png"))
    arguments, console, start = parser.parse_args(), Console(), time.perf_counter()
    settings = Settings()
    if arguments.quick:  # compiling takes most of the time then
        settings = Settings(2, (0.95,), 3, ("SNIP", "SynFlow", "random, ERK", "RigL"))
        jax.config.update("jax_disable_most_optimizations", True)
    results = {}
    data = load_data()
    for sparsity in settings.sparsities:
        for name in settings.methods:
            results[name, sparsity] = compare(METHODS[name], sparsity, data, settings)
    dense = accuracies_of(lambda key, params, order: params, None, data, settings)
    console.print(table(dense, results, settings))
    plot(arguments.out, dense, results, settings)
    console.print(f"Wrote {arguments.out}. {time.perf_counter() - start:.0f} seconds in all.")


def load_data() -> Data:
    digits = load_digits()
    rows = (digits.images / 16).astype(np.float32).reshape(-1, 64)
    labels = digits.target.astype(np.int32)
    parts = train_test_split(rows, labels, test_size=450, random_state=0, stratify=labels)
    return Data(*map(jnp.asarray, parts))


# The network, and its training with masks that stay.


def init(key: Any) -> Params:
    params = {}
    for (name, (n, m)), k in zip(SHAPES.items(), jax.random.split(key, len(SHAPES)), strict=True):
        weight = jax.random.normal(k, (n, m)) * jnp.sqrt(2 / n)
        params[name] = {"w": weight, "b": jnp.zeros(m)}
    return params


def layers() -> list[pp.Layer]:
    params = jax.eval_shape(init, jax.random.key(0))
    return [
        pp.make_layer(params, f"{name}.w", "Linear", name=name, out_axes=1, in_axes=0)
        for name in SHAPES
    ]


def apply(params: Params, x: Any) -> Any:
    for name in SHAPES:
        x = x @ params[name]["w"] + params[name]["b"]
        x = x if name == "classifier" else jax.nn.relu(x)
    return x


def loss(params: Params, data: Data, batch: Any, temperature: float = 1.0) -> Any:
    logits = apply(params, data.train[batch]) / temperature
    return optax.softmax_cross_entropy_with_integer_labels(logits, data.train_labels[batch]).mean()


def accuracy(params: Params, data: Data) -> Any:
    return jnp.mean(jnp.argmax(apply(params, data.test), axis=-1) == data.test_labels)


def orders(settings: Settings) -> Any:
    """Returns which images each step trains on, (seeds, steps, BATCH)."""
    n = 1347 // BATCH * BATCH
    draws = [
        [np.random.default_rng((s, e)).permutation(1347)[:n] for e in range(settings.epochs)]
        for s in range(settings.seeds)
    ]
    return jnp.asarray(np.asarray(draws).reshape(settings.seeds, -1, BATCH))


def fit(params: Params, data: Data, order: Any, wrap: Callable[[Any], Any]) -> tuple[Params, Any]:
    """Returns trained parameters and the state of the optimizer that ``wrap`` makes of Adam."""
    transform = wrap(optax.adam(optax.cosine_decay_schedule(RATE, len(order))))

    def step(carry: Any, batch: Any) -> tuple[Any, None]:
        params, state = carry
        updates, state = transform.update(jax.grad(loss)(params, data, batch), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, transform.init(params)), order)[0]


def trained(params: Params, masks: Any, data: Data, order: Any) -> Params:
    keep = functools.partial(pp.keep_pruned, masks)
    return fit(pp.apply_masks(params, masks), data, order, keep)[0]


# Eight ways to find masks: (key, initial params, order, config, data) -> masks, trained params.


def scored(pruner: Any, slopes: Any, params: Params, config: pp.Config) -> Any:
    stats = gradients.init(params, config, keep=["signed"])
    return pruner(params, gradients.update(stats, params, slopes, config), config)


def snip(key: Any, params: Params, order: Any, config: pp.Config, data: Data) -> Any:
    return scored(pp.snip, jax.grad(loss)(params, data, order[0]), params, config)


def grasp(key: Any, params: Params, order: Any, config: pp.Config, data: Data) -> Any:
    flow = pp.hessian_gradient(lambda p: loss(p, data, order[:4].reshape(-1), 200.0), params)
    return scored(pp.grasp, flow, params, config)


def synflow(key: Any, params: Params, order: Any, config: pp.Config, data: Data) -> Any:
    rounds = pp.iterative(pp.synflow, config, rounds=SYNFLOW_ROUNDS)
    ones = jnp.ones((1, 64))

    def one(_: Any, state: Any) -> Any:
        at = rounds.masked(state, params)
        flow = pp.synaptic_flow(lambda p: apply(p, ones), at, config)
        stats = gradients.init(params, config, keep=["signed"])
        return rounds.step(state, params, gradients.update(stats, at, flow, config))

    return rounds.masks(jax.lax.fori_loop(0, SYNFLOW_ROUNDS, one, rounds.init(params)), params)


def random(key: Any, params: Params, order: Any, config: pp.Config, data: Data) -> Any:
    return pp.random_pruning(params, key, config)


def moving(grow: str, key: Any, params: Params, order: Any, config: pp.Config, data: Data) -> Any:
    """SET and RigL: masks, and the parameters that were trained on the way."""
    masks = pp.random_pruning(params, key, config)
    times = {"every": max(1, len(order) // 40), "end_step": 3 * len(order) // 4}

    def wrap(adam: Any) -> Any:
        return pp.sparse_training(config, adam, masks=masks, grow=grow, key=1, **times)

    params, state = fit(pp.apply_masks(params, masks), data, order, wrap)
    return pp.get_masks(state, params), params


def agp(key: Any, params: Params, order: Any, config: pp.Config, data: Data) -> Any:
    """Gradually, from step 0 to three quarters of the training."""
    steps = max(1, len(order) // 40)
    curve = pp.agp(end_step=3 * len(order) // 4, frequency=steps)
    state = curve.init(config)

    def wrap(adam: Any) -> Any:
        return pp.prune_on_schedule(pp.level, state, config, adam)

    params, state = fit(params, data, order, wrap)
    return pp.get_masks(state, params), params


def lottery(key: Any, params: Params, order: Any, config: pp.Config, data: Data) -> Any:
    """Train, prune the smallest, begin again with what is left: five times."""
    rounds = pp.iterative(pp.level, config, rounds=TICKET_ROUNDS)

    def one(_: Any, state: Any) -> Any:
        masks = rounds.masks(state, params)
        return rounds.step(state, trained(params, masks, data, order), None)

    return rounds.masks(jax.lax.fori_loop(0, TICKET_ROUNDS, one, rounds.init(params)), params)


class Method(NamedTuple):
    """How masks are found, and whether all weights are ranked together or layers have ERK's."""

    find: Callable[..., Any]
    together: bool
    trains: bool = False


METHODS = {
    "SNIP": Method(snip, True),
    "GraSP": Method(grasp, True),
    "SynFlow": Method(synflow, True),
    "random, ERK": Method(random, False),
    "SET": Method(functools.partial(moving, "random"), False, True),
    "RigL": Method(functools.partial(moving, "gradient"), False, True),
    "AGP": Method(agp, True, True),
    "lottery": Method(lottery, True),
}


class Result(NamedTuple):
    """Test accuracies, (seeds,), and the weights that are left."""

    accuracy: np.ndarray
    shuffled: np.ndarray
    density: np.ndarray


def compare(method: Method, sparsity: float, data: Data, settings: Settings) -> Result:
    """Returns what a method reaches, and what its masks do shuffled within every layer."""
    own = pp.resolve(RULES, layers())  # of masks that are shuffled: each layer by itself
    if method.together:
        config = pp.resolve(RULES, layers(), scope="global").with_sparsity(sparsity)
    else:
        config = pp.search.erk(own, sparsity=sparsity)

    def one(key: Any, order: Any) -> tuple[Any, ...]:
        params = init(key)
        found = method.find(key, params, order, config, data)
        masks, ours = found if method.trains else (found, trained(params, found, data, order))
        weights = {name: {"w": masks[name]["w"], "b": None} for name in SHAPES}
        # With a key of its own: random masks and their shuffle must not be drawn alike.
        mixed = pp.shuffle_masks(weights, own, jax.random.fold_in(key, 1))
        other = trained(params, mixed, data, order)
        density = pp.density(weights, params)
        return accuracy(ours, data), accuracy(other, data), density

    return Result(*map(np.asarray, mapped(one, settings)))


def accuracies_of(change: Any, masks: Any, data: Data, settings: Settings) -> np.ndarray:
    """Returns the test accuracies of dense networks."""

    def one(key: Any, order: Any) -> Any:
        params, _ = fit(init(key), data, order, lambda adam: adam)
        return accuracy(params, data)

    return np.asarray(mapped(one, settings))


def mapped(one: Callable[..., Any], settings: Settings) -> Any:
    keys = jax.vmap(jax.random.key)(jnp.arange(settings.seeds))
    return jax.jit(jax.vmap(one))(keys, orders(settings))


# What came of it.


def table(dense: np.ndarray, results: dict[Any, Result], settings: Settings) -> Table:
    view = Table(
        title=f"Test accuracy in percent, mean ± deviation over {settings.seeds} seeds",
        caption=f"dense: {percent(dense)}",
    )
    view.add_column("method")
    for name in ("sparsity", "density", "accuracy", "shuffled", "lost by shuffling"):
        view.add_column(name, justify="right")
    for (name, sparsity), r in results.items():
        lost = 100 * (r.accuracy - r.shuffled)
        error = lost.std(ddof=1) / np.sqrt(len(lost))
        cells = f"{sparsity:.0%}", f"{r.density.mean():.1%}", percent(r.accuracy)
        view.add_row(name, *cells, percent(r.shuffled), f"{lost.mean():.1f} ± {error:.1f}")
        if name == settings.methods[-1]:
            view.add_section()
    return view


def percent(accuracies: np.ndarray) -> str:
    return f"{100 * accuracies.mean():.1f} ± {100 * accuracies.std():.1f}"


def plot(path: Path, dense: np.ndarray, results: dict[Any, Result], settings: Settings) -> None:
    figure = Figure(figsize=(8, 4), layout="constrained")
    names = list(settings.methods)
    panels = figure.subplots(1, len(settings.sparsities), sharey=True, squeeze=False)[0]
    fields = (("accuracy", "as found", "#0072b2"), ("shuffled", "shuffled in layers", "#888888"))
    for axes, sparsity in zip(panels, settings.sparsities, strict=True):
        for offset, (field, label, colour) in zip((-0.12, 0.12), fields, strict=True):
            found = [100 * getattr(results[name, sparsity], field) for name in names]
            means, deviations = np.mean(found, axis=1), np.std(found, axis=1)
            places = np.arange(len(names)) + offset
            axes.errorbar(means, places, xerr=deviations, fmt="o", color=colour, label=label)
        line = axes.axvline(100 * dense.mean(), color="black", linewidth=0.8, linestyle=":")
        axes.set_yticks(range(len(names)), names)
        axes.grid(axis="x", linewidth=0.3)
        axes.set_title(f"{sparsity:.0%} pruned")
    panels[0].invert_yaxis()  # which all share
    line.set_label("dense")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(
        "LeNet-300-100 on digits: test accuracy in percent, mean and deviation over seeds"
    )
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
