"""The layer table of torch modules; every expectation is written by hand."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import purepruning as pp
from purepruning_interop import torch as adapter
from tests.interop.table import assert_table, row


def one(module, type, out=(0,), in_=(1,), bias="bias", **kwargs):
    """The case of a module inside a sequence, whose only weight is ``weight``."""
    if bias:
        kwargs["bias"] = f"0.{bias}"
    return nn.Sequential(module), {"0": row(type, "0.weight", out, in_, **kwargs)}


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


def recurrent(type, path, suffixes, projected=False):
    weights = {
        f"{path}.weight_{side}{s}": row(
            type,
            f"{path}.weight_{side}{s}",
            (0,),
            (1,),
            bias=None if side == "hr" else f"{path}.bias_{side}{s}",
            aliases=(path,),
        )
        for s in suffixes
        for side in (("ih", "hh", "hr") if projected else ("ih", "hh"))
    }
    return weights


class MyLinear(nn.Linear):
    """A user's subclass of a known class, with a parameter of its own."""

    def __init__(self, *args):
        super().__init__(*args)
        self.extra = nn.Parameter(torch.zeros(3, 3))


class Positions(nn.Module):
    """A module with its own parameters: weights, a list of them, and what is no weight."""

    def __init__(self):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, 4))
        self.scale = nn.Parameter(torch.zeros(4))
        self.count = nn.Parameter(torch.zeros(2, 2, dtype=torch.int64), requires_grad=False)
        self.register_buffer("running", torch.zeros(2, 2))
        self.tables = nn.ParameterList([nn.Parameter(torch.zeros(2, 3))])


class Shared(nn.Module):
    """A module reached twice, and two parameters with two owners each."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.block = nn.Sequential(nn.Linear(4, 4))
        self.again = self.block
        self.raw = nn.Parameter(torch.zeros(4, 4))
        self.lm_head = nn.Linear(4, 7)
        self.lm_head.weight = self.embedding.weight
        self.tail = nn.Linear(4, 4)
        self.tail.weight = self.raw


class Halve(nn.Module):
    def forward(self, x):
        return x / 2


def halved():
    module = nn.Sequential(nn.Conv2d(4, 6, 3))
    parametrize.register_parametrization(module[0], "weight", Halve())
    return module


def pruned():
    module = nn.Sequential(nn.Linear(4, 6))
    prune.l1_unstructured(module[0], "weight", 3)
    return module


CASES = {
    "linear": one(nn.Linear(3, 4), "Linear"),
    "linear without bias": one(nn.Linear(3, 4, bias=False), "Linear", bias=None),
    "root": (nn.Linear(3, 4), {"weight": row("Linear", "weight", (0,), (1,), bias="bias")}),
    "bilinear": one(nn.Bilinear(3, 4, 5), "Bilinear", in_=(1, 2)),
    "conv1d": one(nn.Conv1d(4, 6, 3), "Conv1d"),
    "depthwise": one(nn.Conv2d(4, 8, 3, groups=4), "Conv2d", groups=4),
    "conv3d": one(nn.Conv3d(4, 6, 3), "Conv3d"),
    **{
        f"{kind.__name__} in groups": one(
            kind(4, 6, 3, groups=2), kind.__name__, (1,), (0,), groups=2, grouped="out"
        )
        for kind in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    },
    "embedding": one(nn.Embedding(7, 4), "Embedding", (1,), (0,), bias=None),
    "embedding bag": one(nn.EmbeddingBag(7, 4), "EmbeddingBag", (1,), (0,), bias=None),
    "prelu": one(nn.PReLU(4), "PReLU", in_=(), bias=None),
    **{
        f"{kind.__name__}": one(kind(4, affine=True), kind.__name__, in_=())
        for kind in (
            nn.BatchNorm1d,
            nn.BatchNorm2d,
            nn.BatchNorm3d,
            nn.InstanceNorm1d,
            nn.InstanceNorm2d,
            nn.InstanceNorm3d,
        )
    },
    "sync batch norm": one(nn.SyncBatchNorm(4), "BatchNorm", in_=()),
    "layer norm": one(nn.LayerNorm((3, 4)), "LayerNorm", (0, 1), ()),
    "rms norm": one(nn.RMSNorm(4), "RMSNorm", in_=(), bias=None),
    "group norm": one(nn.GroupNorm(2, 4), "GroupNorm", in_=()),
    "norms without weight": (
        nn.Sequential(
            nn.BatchNorm2d(4, affine=False),
            nn.InstanceNorm2d(4),
            nn.LayerNorm((3, 4), elementwise_affine=False),
        ),
        {},
    ),
    "lstm": (
        nn.ModuleDict({"a": nn.LSTM(3, 4, 2, bidirectional=True, proj_size=2)}),
        recurrent("LSTM", "a", ["_l0", "_l0_reverse", "_l1", "_l1_reverse"], projected=True),
    ),
    "gru": (nn.ModuleDict({"a": nn.GRU(3, 4)}), recurrent("GRU", "a", ["_l0"])),
    "rnn": (nn.ModuleDict({"a": nn.RNN(3, 4)}), recurrent("RNN", "a", ["_l0"])),
    "cells": (
        nn.ModuleDict({"g": nn.GRUCell(3, 4), "l": nn.LSTMCell(3, 4), "r": nn.RNNCell(3, 4)}),
        {
            **recurrent("GRU", "g", [""]),
            **recurrent("LSTM", "l", [""]),
            **recurrent("RNN", "r", [""]),
        },
    ),
    "attention": (
        nn.ModuleDict({"a": nn.MultiheadAttention(8, 2, add_bias_kv=True)}),
        {
            "a": row("MultiheadAttention", "a.in_proj_weight", (0,), (1,), bias="a.in_proj_bias"),
            **linear("a.out_proj"),
        },
    ),
    "attention of several widths": (
        nn.ModuleDict({"a": nn.MultiheadAttention(8, 2, kdim=4, vdim=6)}),
        {
            **{
                f"a.{p}_proj_weight": row(
                    "MultiheadAttention", f"a.{p}_proj_weight", (0,), (1,), aliases=("a",)
                )
                for p in "qkv"
            },
            **linear("a.out_proj"),
        },
    ),
    "subclass with a parameter of its own": (
        nn.Sequential(MyLinear(3, 4)),
        {**linear("0"), "0.extra": row("", "0.extra")},
    ),
    "own parameters": (
        nn.ModuleDict({"a": Positions()}),
        {
            "a.pos_embed": row("Positions", "a.pos_embed", aliases=("a",)),
            "a.tables.0": row("ParameterList", "a.tables.0", aliases=("a.tables",)),
        },
    ),
    "shared module and tied parameters": (
        Shared(),
        {
            # The root's own parameter comes first; what it is, its other owner knows.
            "tail": row("Linear", "raw", (0,), (1,), bias="tail.bias", aliases=("raw",)),
            "embedding": row("Embedding", "embedding.weight", (1,), (0,), aliases=("lm_head",)),
            **linear("block.0", aliases=("again.0",)),
        },
    ),
    "parametrized by one raw weight": (
        halved(),
        {"0": row("Conv2d", "0.parametrizations.weight.original", (0,), (1,), bias="0.bias")},
    ),
    "parametrized by several": (
        nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4))),
        {
            f"0.parametrizations.weight.original{i}": row(
                "ParametrizationList",
                f"0.parametrizations.weight.original{i}",
                aliases=("0.parametrizations.weight",),
            )
            for i in (0, 1)
        },
    ),
    "pruned by torch": (
        pruned(),
        {"0": row("Linear", "0.weight_orig", (0,), (1,), bias="0.bias")},
    ),
}


@pytest.mark.parametrize("case", CASES, ids=list(CASES))
def test_table(case):
    model, expected = CASES[case]
    assert_table(adapter.layers(model), dict(model.named_parameters()), expected)


def test_class_names():
    model = nn.Sequential(
        MyLinear(3, 4), nn.MultiheadAttention(8, 2), nn.SyncBatchNorm(4), *halved(), Positions()
    )
    table = {layer.name: layer for layer in adapter.layers(model)}
    assert {name: layer.class_name for name, layer in table.items()} == {
        "0": "MyLinear",
        "0.extra": "",
        "1": "MultiheadAttention",
        "1.out_proj": "NonDynamicallyQuantizableLinear",
        "2": "SyncBatchNorm",
        "3": "Conv2d",
        "4.pos_embed": "Positions",
        "4.tables.0": "ParameterList",
    }
    assert table["0"].has_type("MyLinear")
    assert table["0"].has_type("Linear")
    assert table["2"].has_type("BatchNorm2d")


def test_channels_of_grouped_transposed_convolution():
    (layer,) = adapter.layers(nn.ConvTranspose2d(4, 6, 3, groups=2))
    assert (layer.out_channels, layer.in_channels) == (6, 4)


def test_nothing_is_computed():
    with torch.device("meta"):
        model = nn.TransformerEncoderLayer(8, 2)
    names = [layer.name for layer in adapter.layers(model)]
    assert names == ["self_attn", "self_attn.out_proj", "linear1", "linear2", "norm1", "norm2"]


def test_a_sparsity_prunes_all_kernels_and_embeddings_and_no_norm_or_bias():
    with torch.device("meta"):
        model = nn.Sequential(
            nn.Embedding(9, 8), nn.TransformerEncoderLayer(8, 2), nn.LSTM(8, 4), Positions()
        )
    kernels = [
        "0.weight",
        "1.linear1.weight",
        "1.linear2.weight",
        "1.self_attn.in_proj_weight",
        "1.self_attn.out_proj.weight",
        "2.weight_hh_l0",
        "2.weight_ih_l0",
    ]
    config = pp.resolve(0.5, adapter.layers(model))
    assert sorted(layer.weight for layer in config.layers) == kernels


def test_lazy_modules():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten())
    with pytest.raises(ValueError, match=r"layer '0' \(LazyConv2d\) has no shape yet"):
        adapter.layers(model)
    model(torch.zeros(2, 3, 5, 5))
    assert [layer.type for layer in adapter.layers(model)] == ["Conv2d", "BatchNorm2d"]


@pytest.mark.parametrize("wrong", [nn.Linear, nn.Linear(2, 2).state_dict(), None])
def test_what_is_no_module(wrong):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module instance, got"):
        adapter.layers(wrong)


def test_parameter_with_too_few_axes():
    model = nn.Linear(3, 4)
    model.weight = nn.Parameter(torch.zeros(12))
    with pytest.raises(ValueError, match=r"'weight' of Linear has shape \(12,\).* 2 axes"):
        adapter.layers(model)
