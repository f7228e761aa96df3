"""Small models, tables, configs and masks that calls are made with, in both frameworks."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import keras
import numpy as np
import torch
import torch.nn.utils.prune
from flax import nnx

import purepruning as pp

#: Two linear layers with a norm between.
SHAPES = {"a.w": (4, 6), "a.b": (6,), "n.w": (6,), "n.b": (6,), "b.w": (6, 4), "b.b": (4,)}


def values(seed: int = 0) -> dict[str, np.ndarray]:
    """Returns distinct numbers by path."""
    rng = np.random.default_rng(seed)
    return {p: (rng.permutation(np.prod(s)) + 1.0).reshape(s) for p, s in SHAPES.items()}


def tree(flat: dict[str, Any]) -> dict[str, Any]:
    """Returns a nested dict from one by path."""
    found: dict[str, Any] = {}
    for path, x in flat.items():
        owner, _, leaf = path.partition(".")
        found.setdefault(owner, {})[leaf] = x
    return found


def apply(p: Any, x: Any) -> Any:
    """Returns the output of the model."""
    h = jax.nn.relu(x @ p["a"]["w"] + p["a"]["b"][None])
    h = h * p["n"]["w"][None] + p["n"]["b"][None]
    return h @ p["b"]["w"] + p["b"]["b"][None]


@functools.cache
def coupling() -> pp.Coupling:
    """Returns the coupling of the model."""
    params = tree({p: jax.ShapeDtypeStruct(s, "float32") for p, s in SHAPES.items()})
    return pp.couple(apply, params, jnp.ones((2, 4)))


@functools.cache
def other_coupling() -> pp.Coupling:
    """Returns the coupling of another function."""
    params = {"w": jnp.ones((2, 5)), "v": jnp.ones((5, 1))}
    return pp.couple(lambda p, x: x @ p["w"] @ p["v"], params, jnp.ones((1, 2)))


@functools.cache
def folder() -> Path:
    """Returns a folder for files, which goes when the process ends."""
    kept = tempfile.TemporaryDirectory()
    _KEPT.append(kept)
    return Path(kept.name)


_KEPT: list[Any] = []


class Side:
    """Parameters, tables, configs, masks and statistics in one framework."""

    def __init__(self, framework: str) -> None:
        self.name, self.is_torch = framework, framework == "torch"
        self.params, self.grads = self.of(values()), self.of(values(1))
        self.layers = tuple(
            pp.make_layer(
                self.params, f"{n}.w", "Linear", name=n, out_axes=1, in_axes=0, bias=f"{n}.b"
            )
            for n in ("a", "b")
        )
        norm = pp.make_layer(self.params, "n.w", "BatchNorm1d", name="n", out_axes=0, bias="n.b")
        self.norms = (norm,)
        self.rules = [{"sparsity": 0.5, "op_types": ["Linear"]}]
        self.coupled_rules = [{"sparsity": 0.5, "op_names": ["a"]}]
        self.config = pp.resolve(self.rules, self.layers)
        self.total = pp.resolve(self.rules, self.layers, scope="global")
        self.channels = pp.resolve(self.rules, self.layers, granularity="output_channel")
        self.nm = pp.resolve([{"op_types": ["Linear"]}], self.layers, granularity=pp.NM(1, 2))
        self.of_norms = pp.resolve(
            [{"sparsity": 0.5, "op_types": ["BatchNorm1d"]}],
            self.norms,
            scope="global",
            granularity="output_channel",
        )
        self.coupled = pp.resolve(self.coupled_rules, self.layers, coupling=coupling())
        self.masks = pp.level(self.params, None, self.config)
        self.channel_masks = pp.l1_norm(self.params, None, self.channels)
        self.unit_masks = pp.l1_norm(self.params, None, self.coupled)
        self.outputs = {
            row.name: self.array(np.ones((3, row.out_channels), np.float32)) for row in self.layers
        }
        stranger = pp.Layer("z", "Linear", "z.w", (4, 6), (1,), (0,))
        bigger = pp.Layer("a", "Linear", "a.w", (4, 7), (1,), (0,))
        self.other = pp.resolve(self.rules, [stranger])
        self.bigger = pp.resolve(self.rules, [bigger])
        self.unsaid = pp.resolve([{"op_types": ["Linear"]}], self.layers)
        self.other_params = self.of({"z.w": values()["a.w"]})

    def array(self, x: Any) -> Any:
        """Returns an array of the framework, of float32 where it is of floats."""
        x = np.asarray(x)
        x = x.astype(np.float32) if x.dtype == np.float64 else x
        return torch.tensor(x) if self.is_torch else jax.device_put(x)

    def of(self, flat: dict[str, np.ndarray]) -> Any:
        """Returns parameters of the framework."""
        arrays = {path: self.array(x) for path, x in flat.items()}
        return arrays if self.is_torch else tree(arrays)


@functools.cache
def sides() -> tuple[Side, Side]:
    """Returns JAX's side and torch's."""
    return Side("jax"), Side("torch")


def torch_model() -> torch.nn.Module:
    """Returns a small torch module."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 4))


def torch_model_of_torch_prune() -> torch.nn.Module:
    """Returns the same, pruned by ``torch.nn.utils.prune``."""
    model = torch_model()
    torch.nn.utils.prune.l1_unstructured(model[0], "weight", 0.5)
    return model


class Linen(nn.Module):
    """A small Linen module."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        """Returns the output of two dense layers."""
        return nn.Dense(4, name="b")(nn.relu(nn.Dense(6, name="a")(x)))


def keras_model() -> Any:
    """Returns a small Keras model."""
    a = keras.layers.Dense(6, activation="relu", use_bias=False, name="a")
    b = keras.layers.Dense(4, use_bias=False, name="b")
    return keras.Sequential([keras.Input((4,)), a, b])


class NNX(nnx.Module):
    """A small NNX module."""

    def __init__(self) -> None:
        self.a = nnx.Linear(4, 6, rngs=nnx.Rngs(0))
        self.b = nnx.Linear(6, 4, rngs=nnx.Rngs(1))

    def __call__(self, x: Any) -> Any:
        """Returns the output of two linear layers."""
        return self.b(nnx.relu(self.a(x)))
