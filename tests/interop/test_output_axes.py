"""Every adapter says which axes of a layer's output hold its channels."""

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import pytest
import torch
from flax import linen as nn
from flax import nnx

from purepruning.layers import Layer
from purepruning_interop import equinox, haiku, linen
from purepruning_interop import nnx as nnx_adapter
from purepruning_interop import torch as torch_adapter
from tests.fast import some_key

pytestmark = pytest.mark.usefixtures("unoptimized")


def axes_of(table):
    return {layer.name: layer.output_axes for layer in table}


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), name="conv")(x)
        x = nn.ConvTranspose(4, (3, 3), transpose_kernel=True, name="up")(x)
        x = nn.BatchNorm(use_running_average=True, name="norm")(x)
        x = nn.BatchNorm(use_running_average=True, axis=1, name="rows")(x)
        x = nn.DenseGeneral((2, 3), axis=-1, name="heads")(x)
        x = nn.DenseGeneral(5, axis=(-2, -1), name="merge")(x)
        x = nn.DenseGeneral(6, axis=-1, batch_dims=0, name="each")(x)
        x = nn.Einsum((6, 7, 2), "bhwc,cdn->bnhwd", name="einsum")(x)
        x = nn.Einsum((2, 7, 3), "bnhwc,ncd->bhnwd", name="batched", use_bias=False)(x)
        x = nn.Einsum((3, 4), "...c,cd->...d", name="dots", use_bias=False)(x)
        return nn.LayerNorm(name="last")(x)


def test_linen():
    x = jnp.zeros((2, 5, 5, 3))
    model = LinenModel()
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    assert axes_of(linen.layers(model, params, x)) == {
        "conv": (-1,),
        "up": (-1,),
        "norm": (-1,),
        "rows": (1,),
        "heads": (-2, -1),
        "merge": (-1,),
        "each": (0, -1),
        "einsum": (-1, -4),  # the weight's d, then its n
        "batched": (-3, -1),  # the stack axis n, then d
        "dots": (-1,),
        "last": (-1,),
    }


@pytest.mark.parametrize("axis", [0, 1])
def test_linen_scan_stacks_outputs_on_their_first_axis(axis):
    class Step(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(3, name="dense")(x), None

    stack = nn.scan(Step, variable_axes={"params": axis}, split_rngs={"params": True}, length=2)
    x = jnp.zeros((4, 3))
    params = stack().init(some_key(), x, None)["params"]
    (layer,) = linen.layers(stack(), params, x, None)
    assert (layer.stack_axes, layer.output_axes) == ((axis,), (0, -1))


def test_linen_scan_leads_the_batch_axes_of_a_layer():
    class Step(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.DenseGeneral(3, axis=-1, batch_dims=0, name="each")(x), None

    stack = nn.scan(Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
    x = jnp.zeros((4, 5, 3))
    params = stack().init(some_key(), x, None)["params"]
    (layer,) = linen.layers(stack(), params, x, None)
    assert (layer.shape, layer.stack_axes, layer.output_axes) == ((2, 4, 3, 3), (0, 1), (0, 1, -1))


def test_nnx():
    rngs = nnx.Rngs(some_key())
    model = nnx.Dict(
        conv=nnx.Conv(3, 4, (3, 3), rngs=rngs),
        heads=nnx.LinearGeneral(4, (2, 3), rngs=rngs),
        rows=nnx.BatchNorm(5, axis=1, rngs=rngs),
        norm=nnx.LayerNorm(5, rngs=rngs),
        einsum=nnx.Einsum("bc,cd->db", (3, 4), (4,), rngs=rngs),
        lora=nnx.LoRA(3, 2, 4, rngs=rngs),
    )
    assert axes_of(nnx_adapter.layers(model)) == {
        "conv": (-1,),
        "einsum": (-2,),
        "heads": (-2, -1),
        "lora.lora_a": (),
        "lora.lora_b": (-1,),
        "norm": (-1,),
        "rows": (1,),
    }


def test_equinox():
    key = some_key()
    model = [
        eqx.nn.Conv1d(3, 4, 3, key=key),
        eqx.nn.Conv2d(3, 4, 3, key=key),
        eqx.nn.Linear(3, 4, key=key),
        eqx.nn.GroupNorm(2, 4),
        eqx.nn.LayerNorm((2, 3)),
        eqx.nn.GRUCell(3, 4, key=key),
    ]
    axes = axes_of(equinox.layers(model))
    assert axes == {
        "0": (-2,),
        "1": (-3,),
        "2": (-1,),
        "3": (1,),
        "4": (-2, -1),
        "5.weight_ih": (),
        "5.weight_hh": (),
    }


def test_haiku(standard_promotion):
    def forward(x):
        x = hk.Conv2D(4, 3, name="conv")(x)
        x = hk.BatchNorm(True, True, 0.9, name="norm")(x, True)
        x = hk.GroupNorm(2, name="groups")(x)
        x = hk.Conv2D(5, 3, data_format="NCHW", name="first")(x)
        x = hk.Conv2DTranspose(6, 3, data_format="NCHW", name="up")(x)
        x = hk.DepthwiseConv2D(1, 3, data_format="NCHW", name="depth")(x)
        return hk.Linear(3, name="linear")(x)

    model, x = hk.transform_with_state(forward), jnp.zeros((2, 4, 4, 8))
    params, _ = jax.eval_shape(model.init, jax.random.key(0), x)
    assert axes_of(haiku.layers(model, params, x)) == {
        "conv": (-1,),
        "norm": (3,),
        "groups": (-1,),
        "first": (-3,),
        "up": (-3,),
        "depth": (-3,),
        "linear": (-1,),
    }


def test_torch():
    model = torch.nn.ModuleDict(
        {
            "conv": torch.nn.Conv2d(3, 4, 3),
            "up": torch.nn.ConvTranspose1d(4, 6, 3, groups=2),
            "norm": torch.nn.BatchNorm2d(4),
            "any": torch.nn.BatchNorm1d(4),
            "instance": torch.nn.InstanceNorm2d(4, affine=True),
            "groups": torch.nn.GroupNorm(2, 4),
            "layer": torch.nn.LayerNorm((2, 3)),
            "linear": torch.nn.Linear(3, 4),
            "embedding": torch.nn.Embedding(3, 4),
            "lstm": torch.nn.LSTM(3, 4, bias=False),
            "attention": torch.nn.MultiheadAttention(4, 2, bias=False),
        }
    )
    assert axes_of(torch_adapter.layers(model)) == {
        "conv": (-3,),
        "up": (-2,),
        "norm": (1,),
        "any": (1,),
        "instance": (-3,),
        "groups": (1,),
        "layer": (-2, -1),
        "linear": (-1,),
        "embedding": (-1,),
        "lstm.weight_ih_l0": (),
        "lstm.weight_hh_l0": (),
        "attention": (),
        "attention.out_proj": (-1,),
    }


def test_axes_of_the_output_follow_the_weight_axes_as_written():
    layer = Layer("x", "Linear", "x.w", (2, 3, 4), out_axes=(2, 0), output_axes=(-1, -2))
    assert (layer.out_axes, layer.output_axes) == ((0, 2), (-2, -1))
    with pytest.raises(ValueError, match=r"'x': output_axes=\(-1,\) must have one axis for each"):
        Layer("x", "Linear", "x.w", (2, 3, 4), (0,), (1,), (2,), output_axes=(-1,))
    with pytest.raises(ValueError, match="names an axis twice"):
        Layer("x", "Linear", "x.w", (2, 3), (0, 1), output_axes=(-1, -1))
