"""One shot on a language model: magnitude, Wanda, RIA, SparseGPT and ALPS, uniform and with OWL.

    python examples/language_model.py           # about a million weights, some minutes
    python examples/language_model.py --quick   # under half a minute, for a smoke test

A character-level GPT in plain JAX learns the sources of Python's standard library, which every
Python ships. It is then pruned without any training, block by block: block i + 1 is calibrated with
what the pruned block i makes of the data. Validation loss is in bits per character. ``--obc`` adds
optimal brain compression, which is exact and takes minutes.
"""

from __future__ import annotations

import argparse
import math
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

import purepruning as pp
from purepruning.stats import inputs

RULES = [{"op_types": ["Linear"]}]
RATE = 3e-3  # Adam's, with cosine decay


class Settings(NamedTuple):
    """Sizes of the model, of its training and of what it is calibrated and judged by."""

    blocks: int = 4
    width: int = 144
    heads: int = 4
    context: int = 128
    batch: int = 16
    steps: int = 900
    characters: int = 2_000_000
    calibration: int = 64  # contexts
    validation: int = 128
    sparsities: tuple[float, ...] = (0.5, 0.6, 0.7)


QUICK = Settings(2, 48, 2, 32, 32, 400, 60_000, 32, 64, (0.6,))
Params = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model, for a smoke test")
    parser.add_argument("--obc", action="store_true", help="also OBC, for minutes")
    arguments, console, start = parser.parse_args(), Console(), time.perf_counter()
    settings = QUICK if arguments.quick else Settings()
    train, valid, letters = text(settings)
    params = trained(train, letters, settings)
    dense = bits(params, valid, settings)
    weights = sum(x.size for x in jax.tree.leaves(params))
    console.print(
        f"{weights:,} weights, {len(train):,} characters, {dense:.3f} bits per character after "
        f"{time.perf_counter() - start:.0f} seconds."
    )
    some = contexts(train, settings.calibration, settings)
    methods = METHODS | ({"OBC": pp.obc} if arguments.obc else {})
    found = {
        (name, how): pruned(params, some, method, how, settings)
        for how in allocations(settings)
        for name, method in methods.items()
    }
    losses = {key: bits(p, valid, settings) for key, p in found.items()}
    console.print(table(losses, list(methods), dense, settings))
    console.print("\n".join(order(losses, settings)))
    console.print(f"{time.perf_counter() - start:.0f} seconds in all.")


# The text and the model.


def text(settings: Settings) -> tuple[np.ndarray, np.ndarray, int]:
    """Returns text to train on and to validate by, as letters by number, and how many there are."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in folder.glob("*.py") if path.is_file())
    whole = "".join(path.read_text("utf-8", "ignore") for path in files)
    codes = np.frombuffer(whole.encode("ascii", "ignore"), np.uint8)
    letters, numbers = np.unique(codes[: settings.characters], return_inverse=True)
    cut = int(0.9 * len(numbers))
    numbers = numbers.astype(np.int32)
    return numbers[:cut], numbers[cut:], len(letters)


def contexts(numbers: np.ndarray, n: int, settings: Settings) -> Any:
    """Returns n pieces of text, ``(n, context + 1)``, always the same ones."""
    starts = np.random.default_rng(0).integers(0, len(numbers) - settings.context - 1, n)
    return jnp.asarray(np.stack([numbers[s : s + settings.context + 1] for s in starts]))


def init(key: Any, letters: int, settings: Settings) -> Params:
    d = settings.width
    shapes = {"qkv": (d, 3 * d), "out": (d, d), "up": (d, 4 * d), "down": (4 * d, d)}
    keys = iter(jax.random.split(key, 2 + len(shapes) * settings.blocks))

    def normal(shape: tuple[int, ...], scale: float) -> Any:
        return scale * jax.random.normal(next(keys), shape)

    blocks = {
        f"block{i}": {
            **{name: normal(s, s[0] ** -0.5) for name, s in shapes.items()},
            "norm1": jnp.ones(d),
            "norm2": jnp.ones(d),
        }
        for i in range(settings.blocks)
    }
    places = normal((settings.context, d), 0.02)
    return {"letters": normal((letters, d), 0.02), "places": places, **blocks, "norm": jnp.ones(d)}


def normed(x: Any, scale: Any) -> Any:
    return x * scale * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def block(p: Params, x: Any, settings: Settings) -> tuple[Any, dict[str, Any]]:
    """Returns the output of a block, and what its linear layers are given."""
    n, t, d = x.shape
    a = normed(x, p["norm1"])
    q, k, v = jnp.split((a @ p["qkv"]).reshape(n, t, settings.heads, -1), 3, axis=-1)
    scores = jnp.einsum("nthd,nshd->nhts", q, k) / math.sqrt(d // settings.heads)
    scores = jnp.where(jnp.tril(jnp.ones((t, t), bool)), scores, -1e9)
    mixed = jnp.einsum("nhts,nshd->nthd", jax.nn.softmax(scores), v).reshape(n, t, d)
    x = x + mixed @ p["out"]
    b = normed(x, p["norm2"])
    c = jax.nn.gelu(b @ p["up"])
    return x + c @ p["down"], {"qkv": a, "out": mixed, "up": b, "down": c}


def loss(params: Params, rows: Any, settings: Settings) -> Any:
    """Returns the mean cross-entropy, in bits per character."""
    x = params["letters"][rows[:, :-1]] + params["places"][: rows.shape[1] - 1]
    for i in range(settings.blocks):
        x, _ = block(params[f"block{i}"], x, settings)
    logits = normed(x, params["norm"]) @ params["letters"].T
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:])
    return entropy.mean() / math.log(2)


def trained(numbers: np.ndarray, letters: int, settings: Settings) -> Params:
    transform = optax.adam(optax.cosine_decay_schedule(RATE, settings.steps))
    params = init(jax.random.key(0), letters, settings)

    @jax.jit
    def step(params: Params, state: Any, rows: Any) -> tuple[Params, Any]:
        grads = jax.grad(loss)(params, rows, settings)
        updates, state = transform.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    length = settings.context + 1
    state, rng = transform.init(params), np.random.default_rng(1)
    for _ in range(settings.steps):
        starts = rng.integers(0, len(numbers) - length, settings.batch)
        rows = np.stack([numbers[s : s + length] for s in starts])
        params, state = step(params, state, rows)
    return params


def bits(params: Params, numbers: np.ndarray, settings: Settings) -> float:
    rows = contexts(numbers, settings.validation, settings)
    return float(jax.jit(loss, static_argnums=2)(params, rows, settings))


# One shot, block by block.


def magnitude(params: Params, stats: Any, config: pp.Config) -> Any:
    return pp.apply_masks(params, pp.level(params, None, config)), None


def by_masks(pruner: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a pruner of masks as one that returns parameters too, as those that repair do."""

    def prune(params: Params, stats: Any, config: pp.Config) -> Any:
        masks = pruner(params, stats, config)
        return pp.apply_masks(params, masks), masks

    return prune


METHODS: dict[str, Callable[..., Any]] = {
    "magnitude": magnitude,
    "Wanda": by_masks(pp.wanda),
    "RIA": by_masks(pp.ria),
    "SparseGPT": pp.sparse_gpt,
    "ALPS": pp.alps,
}


def layers(params: Params, name: str) -> list[pp.Layer]:
    """Returns the rows of one block; weights are (inputs, outputs)."""
    return [
        pp.make_layer(
            params, f"{name}.{key}", "Linear", name=f"{name}.{key}", out_axes=1, in_axes=0
        )
        for key in ("qkv", "out", "up", "down")
    ]


def seen(params: Params, x: Any, name: str, settings: Settings) -> tuple[Any, Any]:
    """Returns statistics of what the layers of one block are given, and the block's output."""
    table = layers(params, name)
    x, given = block(params[name], x, settings)
    stats = inputs.init(params, table, keep=["squares", "grams"])
    named = {f"{name}.{key}": value for key, value in given.items()}
    return inputs.update(stats, named, table), x


def pruned(
    params: Params, rows: Any, method: Callable[..., Any], how: Any, settings: Settings
) -> Params:
    """Returns the parameters after pruning all blocks, the first one first."""
    sparsity, allocation = how
    x = params["letters"][rows[:, :-1]] + params["places"][: rows.shape[1] - 1]
    shares = None if allocation == "uniform" else outliers(params, x, sparsity, settings)
    for i in range(settings.blocks):
        name = f"block{i}"
        stats, _ = seen(params, x, name, settings)
        if sparsity == "2:4":
            config = pp.resolve(RULES, layers(params, name), granularity=pp.NM(keep=2, of=4))
        else:
            config = pp.resolve(RULES, layers(params, name))
            config = config.with_sparsity(sparsity if shares is None else shares[i])
        params, _ = method(params, stats, config)
        x, _ = block(params[name], x, settings)  # the next block sees what this one has become
    return params


def outliers(params: Params, x: Any, sparsity: float, settings: Settings) -> list[float]:
    """Returns OWL's sparsity of every block, from Wanda's scores in the dense model."""
    scores, first = {}, []
    for i in range(settings.blocks):
        name, table = f"block{i}", layers(params, f"block{i}")
        stats, x = seen(params, x, name, settings)
        found = pp.wanda_scores(params, stats, pp.resolve(RULES, table))
        # One sparsity for a whole block: the first layer stands for all of them.
        first.append(table[0])
        scores[table[0].name] = np.concatenate([np.asarray(s).reshape(-1) for s in found.values()])
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


if __name__ == "__main__":
    main()
