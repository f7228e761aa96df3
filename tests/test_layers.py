import dataclasses

import jax
import jax.numpy as jnp
import pytest
import torch

from purepruning import Layer, leaf_paths, make_layer
from purepruning.arguments import missing
from purepruning.layers import DEFAULT_OP_TYPES, OP_TYPES
from tests.messages import raises

PARAMS = {"conv": {"w": jnp.zeros((3, 3, 4, 8)), "b": jnp.zeros(8)}, "scale": jnp.zeros(4)}


def test_a_row_by_hand():
    layer = make_layer(PARAMS, "conv.w", "Conv2d", out_axes=-1, in_axes=2, bias="conv.b")
    assert layer == Layer(
        name="conv",
        type="Conv2d",
        weight="conv.w",
        shape=(3, 3, 4, 8),
        out_axes=(3,),
        in_axes=(2,),
        bias="conv.b",
        class_name="Conv2d",
    )
    assert make_layer(PARAMS, "scale", "BatchNorm2d", out_axes=0).name == "scale"
    assert make_layer(PARAMS, "scale", "BatchNorm2d", name="bn", out_axes=[0]).name == "bn"


def test_a_row_from_torch_parameters():
    params = {"fc.weight": torch.zeros(5, 4), "fc.bias": torch.zeros(5)}
    layer = make_layer(params, "fc.weight", "Linear", out_axes=0, in_axes=1, bias="fc.bias")
    assert (layer.name, layer.shape, layer.out_channels) == ("fc", (5, 4), 5)


def test_paths_that_are_not_there():
    with raises(KeyError, "'conv.v'", "nearest: 'conv.w'"):
        make_layer(PARAMS, "conv.v", "Conv2d", out_axes=3)
    with raises(KeyError, "'conv.bias'", "'conv.b'"):
        make_layer(PARAMS, "conv.w", "Conv2d", out_axes=3, bias="conv.bias")


def test_a_bias_that_does_not_fit():
    with raises(ValueError, "'conv'", "'scale'", "(4,)", "8 output channels"):
        make_layer(PARAMS, "conv.w", "Conv2d", out_axes=3, in_axes=2, bias="scale")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"out_axes": (4,)}, ("out_axes=(4,)", "(3, 3, 4, 8)")),
        ({"in_axes": (-5,)}, ("in_axes=(-5,)", "(3, 3, 4, 8)")),
        ({"stack_axes": (9,)}, ("stack_axes=(9,)",)),
        ({"out_axes": (2,)}, ("overlap", "out_axes=(2,)", "in_axes=(2,)")),
        ({"out_axes": (3, -1)}, ("overlap",)),
        ({"stack_axes": (3,)}, ("overlap", "stack_axes=(3,)")),
        ({"grouped": "both"}, ("grouped", "'both'")),
        ({"groups": 3}, ("3 groups", "8 channels")),
        ({"groups": 0}, ("groups", "at least 1", "0")),
        ({"groups": 3, "grouped": "out"}, ("3 groups", "4 channels")),
        ({"groups": 2, "out_axes": ()}, ("2 groups",)),
    ],
)
def test_rows_that_contradict_themselves(changes, parts):
    row = {"out_axes": (3,), "in_axes": (2,)} | changes
    with raises(ValueError, "'conv'", *parts):
        Layer("conv", "Conv2d", "w", (3, 3, 4, 8), **row)


def test_axes_are_sorted_and_counted_from_the_front():
    layer = Layer(
        "a", "Linear", "w", (2, 3, 4, 5), out_axes=(-1, 1), in_axes=(-2,), stack_axes=(0,)
    )
    assert (layer.out_axes, layer.in_axes, layer.stack_axes) == ((1, 3), (2,), (0,))
    assert layer.spatial_axes == ()
    assert (layer.out_channels, layer.in_channels) == (15, 4)


def test_channels_of_groups():
    conv = Layer("c", "Conv2d", "w", (8, 2, 3, 3), (0,), (1,), groups=4)
    assert (conv.out_channels, conv.in_channels, conv.spatial_axes) == (8, 8, (2, 3))
    turned = Layer("t", "ConvTranspose2d", "w", (8, 2, 3, 3), (1,), (0,), groups=4, grouped="out")
    assert (turned.out_channels, turned.in_channels) == (8, 8)


def test_types_and_class_names_select():
    conv = Layer("c", "Conv2d", "w", (3,), class_name="Conv")
    assert [conv.has_type(t) for t in ("Conv2d", "Conv", "Conv1d", "conv2d")] == [1, 1, 0, 0]
    norm = Layer("n", "BatchNorm", "w", (3,), class_name="BatchNorm")
    assert all(norm.has_type(f"BatchNorm{d}d") for d in (1, 2, 3))
    assert not norm.has_type("InstanceNorm2d")
    ranked = Layer("n", "BatchNorm2d", "w", (3,), class_name="BatchNorm")
    assert ranked.has_type("BatchNorm2d")
    assert not ranked.has_type("BatchNorm1d")
    instance = Layer("n", "InstanceNorm", "w", (3,))
    assert instance.has_type("InstanceNorm3d")
    assert not Layer("n", "LayerNorm", "w", (3,)).has_type("LayerNorm2d")


def test_names_and_types_are_static_data():
    layer = Layer("a", "Linear", "w", (2, 3), aliases=("b",))
    assert layer.names == ("a", "b")
    assert hash(layer) == hash(dataclasses.replace(layer))
    with pytest.raises(dataclasses.FrozenInstanceError):
        layer.name = "c"
    assert set(DEFAULT_OP_TYPES) < set(OP_TYPES)
    assert not any("Norm" in t for t in DEFAULT_OP_TYPES)


def test_messages_name_the_nearest():
    known = [f"block{i}.conv" for i in range(9)]
    assert missing("no x", "block1.convv", known).startswith("no x; nearest: 'block1.conv'")
    assert missing("no x", "zzz", known).endswith("known: " + repr(known[:5])[1:-1] + ", ...")
    assert missing("no x", "zzz", []).endswith("known: none")


def test_paths_of_leaves():
    tree = {"b": [jnp.zeros(1), {"w": jnp.zeros(1)}], "a": jnp.zeros(1)}
    assert leaf_paths(tree) == ("a", "b.0", "b.1.w")
    assert leaf_paths(jax.eval_shape(lambda: tree)) == ("a", "b.0", "b.1.w")
