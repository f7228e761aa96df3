"""The JAX side of ``language_model.py``: a GPT in plain functions of a dict of arrays."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _gpt import RATE, Settings, Text, contexts

import purepruning as pp
from purepruning.stats import blocks, inputs

MATRICES = {"qkv": None, "out": "out_bias", "up": None, "down": "down_bias"}


class Model(NamedTuple):
    """``fn(params, letters) -> logits``, and its parameters."""

    fn: Callable[..., Any]
    params: dict[str, Any]


def init(key: Any, letters: int, settings: Settings) -> dict[str, Any]:
    d = settings.width
    shapes = {"qkv": (d, 3 * d), "out": (d, d), "up": (d, 4 * d), "down": (4 * d, d)}
    keys = iter(jax.random.split(key, 2 + len(shapes) * settings.blocks))

    def normal(shape: tuple[int, ...], scale: float) -> Any:
        return scale * jax.random.normal(next(keys), shape)

    each = {
        f"block{i}": {
            **{name: normal(s, s[0] ** -0.5) for name, s in shapes.items()},
            **{name: jnp.zeros(d) for name in ("out_bias", "down_bias")},
            **{name: jnp.ones(d) for name in ("norm1", "norm2")},
        }
        for i in range(settings.blocks)
    }
    places = normal((settings.context, d), 0.02)
    return {"letters": normal((letters, d), 0.02), "places": places, **each, "norm": jnp.ones(d)}


def normed(x: Any, scale: Any) -> Any:
    return x * scale * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def block(p: dict[str, Any], x: Any, heads: int) -> tuple[Any, dict[str, Any]]:
    """Returns the output of a block, and what its linear layers are given."""
    n, t, d = x.shape
    a = normed(x, p["norm1"])
    q, k, v = jnp.split((a @ p["qkv"]).reshape(n, t, 3 * heads, -1), 3, axis=2)
    scores = jnp.einsum("nthd,nshd->nhts", q, k) / math.sqrt(d // heads)
    scores = jnp.where(jnp.tril(jnp.ones((t, t), bool)), scores, -1e9)
    mixed = jnp.einsum("nhts,nshd->nthd", jax.nn.softmax(scores), v).reshape(n, t, d)
    x = x + mixed @ p["out"] + p["out_bias"]
    b = normed(x, p["norm2"])
    c = jax.nn.gelu(b @ p["up"])
    return x + c @ p["down"] + p["down_bias"], {"qkv": a, "out": mixed, "up": b, "down": c}


def begin(params: dict[str, Any], letters: Any) -> Any:
    return params["letters"][letters] + params["places"][: letters.shape[1]]


def run(params: dict[str, Any], letters: Any, heads: int) -> tuple[Any, list[Any], dict[str, Any]]:
    """Returns the logits, the stream between blocks, and the inputs of all linear layers."""
    x = begin(params, letters)
    states, given = [x], {}
    for i in range(sum(name.startswith("block") for name in params)):
        x, some = block(params[f"block{i}"], x, heads)
        states.append(x)
        given |= {f"block{i}.{name}": value for name, value in some.items()}
    return normed(x, params["norm"]) @ params["letters"].T, states, given


def loss(model: Model, rows: Any) -> Any:
    """Returns the mean cross-entropy, in bits per character."""
    logits = model.fn(model.params, rows[:, :-1])
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:])
    return entropy.mean() / math.log(2)


class Side:
    """What ``language_model.py`` asks of a framework."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.losses: dict[Any, Any] = {}

    def fn(self, params: dict[str, Any], letters: Any) -> Any:
        return run(params, letters, self.settings.heads)[0]

    def trained(self, text: Text) -> Model:
        settings = self.settings
        transform = optax.adam(optax.cosine_decay_schedule(RATE, settings.steps))
        params = init(jax.random.key(0), text.letters, settings)

        @jax.jit
        def step(params: Any, state: Any, rows: Any) -> tuple[Any, Any]:
            grads = jax.grad(lambda p: loss(Model(self.fn, p), rows))(params)
            updates, state = transform.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        state = transform.init(params)
        for i in range(settings.steps):
            rows = contexts(text.train, settings.batch, settings, seed=i + 1)
            params, state = step(params, state, rows)
        return Model(self.fn, params)

    def parameters(self, model: Model) -> int:
        return sum(x.size for x in jax.tree.leaves(model.params))

    def bits(self, model: Model, rows: np.ndarray) -> float:
        if model.fn not in self.losses:  # compiled once for all parameters of one function
            self.losses[model.fn] = jax.jit(lambda p, rows: loss(Model(model.fn, p), rows))
        return float(self.losses[model.fn](model.params, rows))

    def forward(self, model: Model, rows: np.ndarray) -> Callable[[], Any]:
        """Returns what runs the model once."""
        fn, letters = jax.jit(model.fn), jnp.asarray(rows[:, :-1])
        return lambda: fn(model.params, letters).block_until_ready()

    # One shot, block by block.

    def begin(self, model: Model, rows: np.ndarray) -> Any:
        return begin(model.params, rows[:, :-1])

    def layers(self, model: Model, i: int) -> list[pp.Layer]:
        """Returns the rows of one block; weights are (inputs, outputs)."""
        return [self._layer(model, f"block{i}", name) for name in MATRICES]

    def _layer(self, model: Model, owner: str, name: str) -> pp.Layer:
        bias = MATRICES[name] and f"{owner}.{MATRICES[name]}"
        path = f"{owner}.{name}"
        return pp.make_layer(
            model.params, path, "Linear", name=path, bias=bias, out_axes=1, in_axes=0
        )

    def seen(self, model: Model, i: int, x: Any) -> inputs.InputStats:
        """Returns statistics of what the layers of one block are given."""
        table = self.layers(model, i)
        given = block(model.params[f"block{i}"], x, self.settings.heads)[1]
        stats = inputs.init(model.params, table, keep=["squares", "grams"])
        return inputs.update(stats, {f"block{i}.{n}": v for n, v in given.items()}, table)

    def after(self, model: Model, i: int, x: Any) -> Any:
        return block(model.params[f"block{i}"], x, self.settings.heads)[0]

    def params(self, model: Model) -> dict[str, Any]:
        return model.params

    def with_params(self, model: Model, params: dict[str, Any]) -> Model:
        return Model(model.fn, params)

    # Whole heads, neurons and blocks.

    def couple(self, model: Model, rows: np.ndarray) -> tuple[list[pp.Layer], pp.Coupling]:
        table = [x for i in range(self.settings.blocks) for x in self.layers(model, i)]
        return table, pp.couple(model.fn, model.params, jnp.asarray(rows[:1, :-1]))

    def read(self, model: Model, rows: np.ndarray, readers: Iterable[pp.Layer]) -> Any:
        """Returns statistics of what the readers of coupled units are given."""
        stats = inputs.init(model.params, readers, keep=["sums", "squares", "means"])
        given = run(model.params, rows[:, :-1], self.settings.heads)[2]
        return inputs.update(stats, given, readers)

    def shrunk(self, model: Model, masks: Any, coupling: pp.Coupling, rows: np.ndarray) -> Model:
        small = pp.shrink(model.fn, model.params, masks, coupling, jnp.asarray(rows[:1, :-1]))
        return Model(small.fn, small.params)

    def turned(self, model: Model, rows: np.ndarray) -> blocks.BlockStats:
        states = run(model.params, rows[:, :-1], self.settings.heads)[1]
        return blocks.update(blocks.init(model.params, self.settings.blocks), states)

    def without(self, model: Model, dropped: Iterable[int]) -> Model:
        return Model(model.fn, pp.drop_blocks(model.params, dropped, at="block{}"))
