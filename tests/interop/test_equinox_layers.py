"""The layer table of Equinox models; every expectation is written by hand."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

from purepruning.trees import leaf_paths
from purepruning_interop import equinox as adapter
from tests.fast import some_key
from tests.interop.table import assert_table, row

nn = eqx.nn
KEY = some_key()


def one(make, type, leaf="weight", out=(0,), in_=(1,), bias="bias", **kwargs):
    """The case of a module inside a list, whose only weight is ``leaf``."""
    if bias:
        kwargs["bias"] = f"0.{bias}"
    return lambda: [make()], {"0": row(type, f"0.{leaf}", out, in_, **kwargs)}


def linear(name, bias=True, aliases=()):
    return {
        name: row(
            "Linear",
            f"{name}.weight",
            (0,),
            (1,),
            bias=f"{name}.bias" if bias else None,
            aliases=aliases,
        )
    }


class MyLinear(nn.Linear):
    """A user's subclass of a known class."""


class Net(eqx.Module):
    """Submodules in lists and dicts, arrays of its own, and leaves that are no arrays."""

    blocks: list
    by_name: dict
    pos_embed: jax.Array
    tables: tuple
    scale: jax.Array
    count: jax.Array
    activation: Callable
    rate: float = 0.5

    def __init__(self):
        self.blocks = [nn.Linear(2, 2, key=KEY), jax.nn.relu, nn.Linear(2, 2, key=KEY)]
        self.by_name = {"head": MyLinear(2, 2, use_bias=False, key=KEY)}
        self.pos_embed = jnp.zeros((5, 4))
        self.tables = (jnp.zeros((2, 3)),)
        self.scale = jnp.zeros(4)
        self.count = jnp.zeros((2, 2), int)
        self.activation = jax.nn.gelu


class Inside(eqx.Module):
    net: Net


class Tied(eqx.Module):
    shared: nn.Shared

    def __init__(self):
        pair = nn.Embedding(7, 4, key=KEY), nn.Linear(4, 7, key=KEY)
        self.shared = nn.Shared(pair, lambda p: p[1].weight, lambda p: p[0].weight)


class TiedTransposed(eqx.Module):
    shared: nn.Shared

    def __init__(self):
        pair = nn.Linear(4, 7, key=KEY), nn.Linear(7, 4, key=KEY)
        self.shared = nn.Shared(pair, lambda p: p[1].weight, lambda p: p[0].weight.T)


class Block(eqx.Module):
    conv: nn.Conv2d
    up: nn.ConvTranspose1d
    norm: nn.LayerNorm
    cell: nn.LSTMCell

    def __init__(self, key):
        self.conv = nn.Conv2d(4, 6, 3, groups=2, key=key)
        self.up = nn.ConvTranspose1d(4, 6, 3, key=key)
        self.norm = nn.LayerNorm((3, 4))
        self.cell = nn.LSTMCell(2, 3, key=key)


NET = {
    "net.pos_embed": row("Net", "net.pos_embed", aliases=("net",)),
    "net.tables.0": row("Net", "net.tables.0", aliases=("net",)),
    **linear("net.blocks.0"),
    **linear("net.blocks.2"),
    **linear("net.by_name.head", bias=False),
}

CASES = {
    "linear": one(lambda: nn.Linear(3, 4, key=KEY), "Linear"),
    "linear of scalars": one(lambda: nn.Linear("scalar", "scalar", key=KEY), "Linear"),
    "root": (
        lambda: nn.Linear(3, 4, key=KEY),
        {"weight": row("Linear", "weight", (0,), (1,), bias="bias")},
    ),
    "conv1d": one(lambda: nn.Conv1d(4, 6, 3, key=KEY), "Conv1d"),
    "depthwise": one(lambda: nn.Conv2d(4, 8, 3, groups=4, key=KEY), "Conv2d", groups=4),
    "conv3d": one(lambda: nn.Conv3d(4, 6, 3, use_bias=False, key=KEY), "Conv3d", bias=None),
    "conv of any rank": one(lambda: nn.Conv(2, 4, 6, 3, key=KEY), "Conv2d"),
    **{
        f"conv transpose {d}d": one(
            lambda d=d: nn.ConvTranspose(d, 4, 6, 3, groups=2, key=KEY),
            f"ConvTranspose{d}d",
            groups=2,
        )
        for d in (1, 2, 3)
    },
    "embedding": one(
        lambda: nn.Embedding(7, 4, key=KEY), "Embedding", out=(1,), in_=(0,), bias=None
    ),
    "layer norm": one(lambda: nn.LayerNorm((3, 4)), "LayerNorm", out=(0, 1), in_=()),
    "rms norm": one(lambda: nn.RMSNorm(4), "RMSNorm", in_=()),
    "group norm": one(lambda: nn.GroupNorm(2, 4), "GroupNorm", in_=()),
    "batch norm": one(lambda: nn.BatchNorm(4, "b", mode="batch"), "BatchNorm", in_=()),
    "batch norm, ema": one(lambda: nn.BatchNorm(4, "b", mode="ema"), "BatchNorm", in_=()),
    "norms without weight": (
        lambda: [
            nn.LayerNorm((3, 4), use_weight=False),
            nn.GroupNorm(2, channelwise_affine=False),
            nn.BatchNorm(4, "b", mode="batch", channelwise_affine=False),
        ],
        {},
    ),
    "prelu": one(nn.PReLU, "PReLU", "negative_slope", out=(), in_=(), bias=None),
    "prelu per channel": one(
        lambda: nn.PReLU(jnp.ones(4)), "PReLU", "negative_slope", in_=(), bias=None
    ),
    "attention": (
        lambda: nn.Sequential([nn.MultiheadAttention(2, 8, use_key_bias=True, key=KEY)]),
        {
            **linear("layers.0.query_proj", bias=False),
            **linear("layers.0.key_proj"),
            **linear("layers.0.value_proj", bias=False),
            **linear("layers.0.output_proj", bias=False),
        },
    ),
    "cells": (
        lambda: {"gru": nn.GRUCell(2, 3, key=KEY), "lstm": nn.LSTMCell(2, 3, key=KEY)},
        {
            f"{name}.weight_{side}": row(
                name.upper(),
                f"{name}.weight_{side}",
                (0,),
                (1,),
                bias=f"{name}.bias" if side == "ih" else None,
                aliases=(name,),
            )
            for name in ("gru", "lstm")
            for side in ("ih", "hh")
        },
    ),
    "mlp": (
        lambda: nn.MLP(2, 3, 4, 2, key=KEY),
        {**linear("layers.0"), **linear("layers.1"), **linear("layers.2")},
    ),
    "containers and own arrays": (lambda: Inside(Net()), NET),
    "weight norm": (
        lambda: [nn.WeightNorm(nn.Linear(3, 4, key=KEY))],
        {"0.g": row("WeightNorm", "0.g", aliases=("0",)), **linear("0.layer")},
    ),
    "spectral norm": (
        lambda: [nn.SpectralNorm(nn.Linear(3, 4, key=KEY), "weight", key=KEY)],
        linear("0.layer"),
    ),
    "state is no parameter": (
        lambda: [nn.StateIndex(jnp.zeros((3, 3))), nn.Linear(3, 4, key=KEY)],
        linear("1"),
    ),
    "shared": (
        Tied,
        {
            "shared.pytree.0": row(
                "Embedding",
                "shared.pytree.0.weight",
                (1,),
                (0,),
                aliases=("shared.pytree.1",),
            )
        },
    ),
    "shared, transposed": (TiedTransposed, linear("shared.pytree.0")),
    "ensemble": (
        lambda: [eqx.filter_vmap(Block)(jax.random.split(KEY, 6))],
        {
            "0.conv": row(
                "Conv2d", "0.conv.weight", (1,), (2,), stack=(0,), groups=2, bias="0.conv.bias"
            ),
            "0.up": row("ConvTranspose1d", "0.up.weight", (1,), (2,), stack=(0,), bias="0.up.bias"),
            "0.norm": row("LayerNorm", "0.norm.weight", (1, 2), stack=(0,), bias="0.norm.bias"),
            "0.cell.weight_ih": row(
                "LSTM",
                "0.cell.weight_ih",
                (1,),
                (2,),
                stack=(0,),
                bias="0.cell.bias",
                aliases=("0.cell",),
            ),
            "0.cell.weight_hh": row(
                "LSTM", "0.cell.weight_hh", (1,), (2,), stack=(0,), aliases=("0.cell",)
            ),
        },
    ),
    "ensemble of ensembles": (
        lambda: [
            eqx.filter_vmap(eqx.filter_vmap(lambda key: nn.Linear(4, 4, key=key)))(
                jax.random.split(KEY, (4, 4))
            )
        ],
        {"0": row("Linear", "0.weight", (2,), (3,), stack=(0, 1), bias="0.bias")},
    ),
    "ensemble on the last axis": (
        lambda: [
            eqx.filter_vmap(lambda key: nn.Linear(2, 3, use_bias=False, key=key), out_axes=2)(
                jax.random.split(KEY, 4)
            )
        ],
        {"0": row("Linear", "0.weight", (0,), (1,), stack=(2,))},
    ),
}


@pytest.mark.parametrize("case", CASES, ids=list(CASES))
def test_table(case):
    make, expected = CASES[case]
    model = eqx.filter_eval_shape(make)
    table = adapter.layers(model)
    assert_table(table, eqx.filter(model, lambda x: hasattr(x, "shape")), expected)


def test_concrete_filtered_and_abstract_models_have_one_table():
    model = Inside(Net())
    table = adapter.layers(model)
    params = eqx.filter(model, eqx.is_inexact_array)
    assert_table(table, params, NET)
    assert adapter.layers(params) == table
    assert {layer.weight for layer in table} < set(leaf_paths(model))
    grads = eqx.filter_grad(lambda m: jnp.sum(m.net.blocks[0].weight))(model)
    assert {layer.weight for layer in table} < set(leaf_paths(grads))


def test_filtered_shared_model_still_has_its_rows():
    table = adapter.layers(eqx.filter(Tied(), eqx.is_inexact_array))
    assert [(layer.name, layer.aliases) for layer in table] == [("shared.pytree.0", ())]


def test_class_names():
    table = adapter.layers(Inside(Net()))
    assert [layer.class_name for layer in table] == ["Net", "Net", "Linear", "Linear", "MyLinear"]
    assert table[-1].has_type("MyLinear")
    assert table[-1].has_type("Linear")


@pytest.mark.parametrize("wrong", [nn.Linear, {"weight": jnp.zeros((2, 2))}, jnp.zeros(2), None])
def test_what_holds_no_module(wrong):
    with pytest.raises(TypeError, match=r"model must be an equinox\.Module or a pytree of them"):
        adapter.layers(wrong)


def test_parameter_with_too_few_axes():
    model = eqx.tree_at(lambda m: m.weight, nn.Linear(3, 4, key=KEY), jnp.zeros(12))
    with pytest.raises(ValueError, match=r"'weight' of Linear has shape \(12,\).* 2 axes"):
        adapter.layers(model)
