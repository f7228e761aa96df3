"""Flax NNX: the language models of tunix, small.

::

    pip install --no-deps google-tunix
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from typing import Any

import jax

from tests.coupling.entry import Entry, draw_inputs, fill, tokens

PACKAGES = ("flax", "google-tunix")

WORDS = 30
SIZES = {
    "num_layers": 2,
    "embed_dim": 16,
    "hidden_dim": 24,
    "num_heads": 4,
    "head_dim": 8,
    "num_kv_heads": 2,
}
ROTARY = {"vocab_size": WORDS, "rope_theta": 10_000, "norm_eps": 1e-6}
IDS = tokens(2, 6, below=WORDS)


def _tunix(module: str) -> Any:
    """A module of tunix, without what the package imports to train."""
    if "tunix" not in sys.modules:
        found = importlib.util.find_spec("tunix")
        if found is None:
            raise ModuleNotFoundError("no tunix", name="tunix")
        package = types.ModuleType("tunix")
        package.__path__ = list(found.submodule_search_locations)
        sys.modules["tunix"] = package
    return importlib.import_module(f"tunix.models.{module}.model")


def language_model(name: str, family: str, module: str, cls: str, **options: Any) -> Entry:
    def build(key):
        import jax.numpy as jnp
        from flax import nnx

        models = _tunix(module)
        config = models.ModelConfig(**SIZES | options)
        made = nnx.eval_shape(lambda: getattr(models, cls)(config, rngs=nnx.Rngs(0)))
        graph, state, other = nnx.split(made, nnx.Param, ...)
        state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), state)
        other = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), other)

        def fn(state, ids):
            length = ids.shape[1]
            positions = jnp.broadcast_to(jnp.arange(length)[None], ids.shape)
            mask = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (2, length, length))
            made = nnx.merge(graph, state, other, copy=True)
            return made(ids, positions, None, mask)[0]

        return fn, fill(state, key), draw_inputs((IDS,), key)

    return Entry(f"tunix_{name}", "nnx", family, build)


GEMMA = {"num_embed": WORDS, "sliding_window_size": 4}

MODELS = (
    language_model("llama3", "llama", "llama3", "Llama3", **ROTARY),
    language_model("llama3_tied", "llama", "llama3", "Llama3", **ROTARY, weight_tying=True),
    language_model("qwen2", "llama", "qwen2", "Qwen2", **ROTARY),
    language_model("qwen3", "llama", "qwen3", "Qwen3", **ROTARY, use_tied_embedding=True),
    language_model(
        "qwen3_experts", "experts", "qwen3", "Qwen3", **ROTARY, num_experts=4, num_experts_per_tok=2
    ),
    language_model("gemma3", "llama", "gemma3", "Gemma3", **GEMMA),
)
