"""Parameters, multiply-adds and activation bytes, against counts by hand."""

import jax
import jax.numpy as jnp
import pytest
import torch
from jax import export
from torch import nn

import purepruning as pp
from purepruning_interop import torch as interop


@pytest.fixture(autouse=True)
def _biases_broadcast():
    with jax.numpy_rank_promotion("allow"):
        yield


def rows(found):
    return {x.name: (x.params, x.macs, x.activation_bytes) for x in found.layers}


def convnet(params, x):
    x = jax.lax.conv_general_dilated(
        x, params["conv"]["w"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x = jax.nn.relu(x + params["conv"]["b"])
    x = jax.lax.conv_general_dilated(
        x,
        params["depthwise"]["w"],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=6,
    )
    return x.mean((1, 2)) @ params["head"]["w"] * params["scale"]


SHAPES = {
    "conv": {"w": (3, 3, 2, 6), "b": (6,)},
    "depthwise": {"w": (3, 3, 1, 6)},
    "head": {"w": (6, 5)},
    "scale": (5,),
}


def arrays(shapes):
    return jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, "float32"), shapes, is_leaf=lambda s: isinstance(s, tuple)
    )


def test_convolutions_and_products():
    found = pp.count(convnet, arrays(SHAPES), jax.ShapeDtypeStruct((7, 8, 8, 2), "float32"))
    assert rows(found) == {
        "conv": (9 * 2 * 6 + 6, 7 * 16 * 6 * 9 * 2, 7 * 16 * 6 * 4),
        "depthwise": (9 * 6, 7 * 16 * 6 * 9, 7 * 16 * 6 * 4),
        "head": (30, 7 * 30, 7 * 5 * 4),
        "scale": (5, 0, 0),
    }
    assert found.params == 114 + 54 + 30 + 5
    lines = str(found).splitlines()
    assert lines[0].split() == ["layer", "params", "MACs", "activation", "bytes"]
    assert lines[-1].split() == ["total", "203", f"{found.macs:,}", f"{found.activation_bytes:,}"]


def test_torch_counts_the_same():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 6, 3, 2, 1)
            self.depthwise = nn.Conv2d(6, 6, 3, 1, 1, groups=6, bias=False)
            self.head = nn.Linear(6, 5, bias=False)
            self.scale = nn.Parameter(torch.ones(5))

        def forward(self, x):
            x = self.depthwise(self.conv(x).relu())
            return self.head(x.mean((2, 3))) * self.scale

    found = interop.count(Net(), torch.zeros(7, 2, 8, 8))
    by_jax = pp.count(convnet, arrays(SHAPES), jax.ShapeDtypeStruct((7, 8, 8, 2), "float32"))
    assert rows(found) == rows(by_jax)


def test_loops_branches_and_products_of_activations():
    def fn(params, x):
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["stack"])
        x = jax.lax.cond(x.sum() > 0, lambda x: x @ params["long"] @ params["back"], jnp.sin, x)
        return x @ x.T

    shapes = {"stack": (3, 4, 4), "long": (4, 9), "back": (9, 4)}
    found = pp.count(fn, arrays(shapes), jax.ShapeDtypeStruct((2, 4), "float32"))
    macs = {name: macs for name, (_, macs, _) in rows(found).items()}
    assert macs.pop("stack") == 3 * 2 * 16
    assert (macs.pop("long"), macs.pop("back")) == (2 * 36, 2 * 36)
    assert list(macs.values()) == [2 * 2 * 4]  # no parameter: the place in the program


def test_a_transposed_convolution_multiplies_once_for_every_input():
    def fn(params, x):
        return jax.lax.conv_transpose(x, params["w"], (2,), "SAME")

    x = jax.ShapeDtypeStruct((1, 5, 2), "float32")
    found = pp.count(fn, arrays({"w": (3, 2, 4)}), x)
    assert found.macs == 5 * 3 * 2 * 4
    model = nn.ConvTranspose1d(2, 4, 3, 2, 1, 1, bias=False)
    assert interop.count(model, torch.zeros(1, 2, 5)).macs == found.macs


def test_before_and_after():
    """Half of the channels of every layer, but of the input and the output."""
    params = jax.tree.map(lambda s: jnp.ones(s.shape), arrays(SHAPES))
    x = jnp.ones((2, 8, 8, 2))
    coupling = pp.couple(convnet, params, x)
    small = pp.shrink(convnet, params, coupling.masks([1, 2, 3], params), coupling, x)
    before, after = pp.count(convnet, params, x), pp.count(small.fn, small.params, x)
    assert (before.params, after.params) == small.report.params
    assert (before.macs, after.macs) == small.report.macs
    assert rows(after)["conv"] == (57, rows(before)["conv"][1] // 2, 2 * 16 * 3 * 4)


def test_a_symbolic_batch():
    x = jax.ShapeDtypeStruct(export.symbolic_shape("batch, 8, 8, 2"), "float32")
    found = pp.count(convnet, arrays(SHAPES), x)
    one = pp.count(convnet, arrays(SHAPES), jax.ShapeDtypeStruct((1, 8, 8, 2), "float32"))
    assert str(found.macs) == f"{one.macs}*batch"


@pytest.mark.parametrize("missing", ["shape"])
def test_what_is_no_array_is_passed_on(missing):
    found = pp.count(
        lambda p, x, mode: x @ p["w"] if mode else x,
        {"w": jnp.ones((2, 3))},
        jnp.ones((1, 2)),
        True,
    )
    assert found.macs == 6


def test_a_row_of_a_ragged_product_meets_one_group():
    found = pp.count(
        lambda p, x: jax.lax.ragged_dot(x, p["w"], jnp.array([1, 3])),
        arrays({"w": (2, 8, 10)}),
        jax.ShapeDtypeStruct((4, 8), "float32"),
    )
    assert found.macs == 4 * 8 * 10
