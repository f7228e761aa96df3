"""Statistics of inputs: by the outputs that a layer makes of them, and by NumPy."""

import dataclasses

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import purepruning as pp
from purepruning import Layer
from purepruning.layers import Window
from purepruning.matrices import as_matrices, form, from_matrices
from purepruning.stats import inputs
from purepruning.stats.accumulate import value
from purepruning_interop import equinox as eqx_interop
from purepruning_interop import haiku as haiku_interop
from purepruning_interop import linen as linen_interop
from purepruning_interop import nnx as nnx_interop
from purepruning_interop import torch as torch_interop
from tests.messages import raises
from tests.modes import as_jax, as_torch

pytestmark = pytest.mark.usefixtures("unoptimized")


class _Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 2), strides=2, kernel_dilation=2, feature_group_count=2, name="conv")(x)
        x = nn.Conv(6, (3, 3), padding=((1, 0), (2, 1)), use_bias=False, name="same")(x)
        x = nn.MultiHeadDotProductAttention(2, name="attention")(x.reshape(x.shape[0], -1, 6))
        return nn.Dense(3, use_bias=False, name="head")(x)


class _NNX(nnx.Module):
    def __init__(self, rngs):
        more = {"feature_group_count": 2, "kernel_dilation": 2, "rngs": rngs}
        self.conv = nnx.Conv(4, 8, (3, 2), strides=2, padding="VALID", **more)
        self.head = nnx.Linear(8, 3, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.head(self.conv(x))


class _Equinox(eqx.Module):
    conv: eqx.nn.Conv2d
    head: eqx.nn.Linear

    def __init__(self, key):
        more = {"stride": (2, 1), "padding": 1, "dilation": (1, 2), "groups": 2, "key": key}
        self.conv = eqx.nn.Conv2d(4, 8, (3, 2), **more)
        self.head = eqx.nn.Linear(8, 3, use_bias=False, key=key)

    def __call__(self, x):
        return self.head(self.conv(x).mean((1, 2)))


def _haiku(x):
    x = hk.Conv2D(8, (3, 2), stride=2, padding="SAME", feature_group_count=2, name="conv")(x)
    x = hk.DepthwiseConv2D(2, 2, rate=2, padding="VALID", name="depth")(x)
    return hk.Linear(3, with_bias=False, name="head")(x.mean((1, 2)))


def _linen_case(x):
    model = _Linen()
    params = model.init(jax.random.key(0), x)["params"]
    table = linen_interop.layers(model, params, x)

    def run(of):
        names = [layer.name for layer in table]
        return linen_interop.capture(model, params, x, layers=names, of=of)[1]

    return table, params, run


def _nnx_case(x):
    model = _NNX(nnx.Rngs(0))
    table = nnx_interop.layers(model)
    return (
        table,
        nnx.state(model, nnx.Param),
        lambda of: nnx_interop.capture(model, x, layers=table, of=of)[1],
    )


def _equinox_case(x):
    model = _Equinox(jax.random.key(0))
    x = jnp.moveaxis(x, -1, 1)
    table = eqx_interop.layers(model)

    def run(of):
        return jax.vmap(lambda x: eqx_interop.capture(model, x, layers=table, of=of)[1])(x)

    return table, eqx.filter(model, eqx.is_inexact_array), run


def _haiku_case(x):
    model = hk.without_apply_rng(hk.transform(_haiku))
    params = model.init(jax.random.key(0), x)
    table = haiku_interop.layers(model, params, x)
    return table, params, lambda of: haiku_interop.capture(model, params, x, layers=table, of=of)[1]


def _torch_case(x):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(4, 8, (3, 2), stride=2, padding=(1, 0), groups=2),
        torch.nn.ReLU(inplace=True),
        torch.nn.Conv2d(8, 6, 3, padding="same", dilation=2, bias=False),
        torch.nn.Flatten(2),
        torch.nn.Linear(12, 3),
    )
    x = torch.from_numpy(np.array(x)).movedim(-1, 1)
    table = torch_interop.layers(model)
    return (
        table,
        dict(model.named_parameters()),
        lambda of: torch_interop.capture(model, x, layers=table, of=of)[1],
    )


CASES = {
    "linen": _linen_case,
    "nnx": _nnx_case,
    "equinox": _equinox_case,
    "haiku": _haiku_case,
    "torch": _torch_case,
}


def _as_numpy(x):
    return x.detach().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_layers_outputs_have_the_second_moments_that_its_inputs_say(case):
    """Of outputs without bias, sum y = W sum x, and sum y y' = W (sum x x') W'."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 7, 6, 4)), jnp.float32)
    table, params, run = case(x)
    seen, made = run("inputs"), run("outputs")
    stats = inputs.init(params, table, keep=inputs.KEPT)
    stats = inputs.update(stats, seen, table)
    leaves = {p: _as_numpy(leaf) for p, leaf in pp.trees.flatten(params).leaves.items()}
    for layer in table:
        f = form("test", layer)
        weight = np.float64(as_matrices(leaves[layer.weight], f))
        y = np.float64(_as_numpy(made[layer.name]))
        axes = [a % y.ndim for a in layer.output_axes]
        y = np.moveaxis(y, axes, range(y.ndim - len(axes), y.ndim)).reshape(-1, layer.out_channels)
        if layer.bias:
            y = y - leaves[layer.bias].reshape(-1)
        y = y.reshape(len(y), f.members, f.out)
        sums, squares, gram = (
            np.float64(_as_numpy(value(getattr(stats, kind)[layer.name])))
            for kind in ("sums", "squares", "grams")
        )
        np.testing.assert_allclose(weight @ sums[..., None], y.sum(0)[..., None], atol=1e-3)
        got = weight @ gram @ weight.transpose(0, 2, 1)
        np.testing.assert_allclose(got, np.einsum("nma,nmb->mab", y, y), rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(np.diagonal(gram, axis1=1, axis2=2), squares, rtol=1e-5)
        assert int(value(stats.positions[layer.name])) == len(y)


STACK = Layer("stack", "Linear", "w", (5, 2, 3), (2,), (0,), stack_axes=(1,))


def test_matrices_of_a_stack_and_of_groups_and_back():
    weight = np.arange(30.0).reshape(5, 2, 3)
    f = form("test", STACK)
    np.testing.assert_array_equal(as_matrices(weight, f), weight.transpose(1, 2, 0))
    np.testing.assert_array_equal(from_matrices(as_matrices(weight, f), f), weight)
    grouped = Layer("conv", "Conv1d", "w", (3, 2, 6), (2,), (1,), groups=2)
    weight = np.arange(36.0).reshape(3, 2, 6)
    f = form("test", grouped)
    got = as_matrices(weight, f)
    assert got.shape == (2, 3, 6)
    np.testing.assert_array_equal(got[1, 2], weight[:, :, 5].reshape(-1))
    np.testing.assert_array_equal(from_matrices(got, f), weight)


def test_inputs_of_stacked_layers_and_of_several_calls():
    x = np.random.default_rng(1).integers(-4, 5, (2, 7, 5)).astype(np.float32)
    for framework in (as_jax, as_torch):
        params = framework({"w": np.ones(STACK.shape, np.float32)})
        stats = inputs.init(params, [STACK], keep=["grams", "squares"])
        both = [framework({"": part})[""] for part in (x[:, :3], x[:, 3:])]
        stats = inputs.update(stats, {"stack": both}, [STACK])
        assert int(value(stats.positions["stack"])) == 7
        np.testing.assert_array_equal(value(stats.grams["stack"]), np.einsum("sni,snj->sij", x, x))
        np.testing.assert_array_equal(value(stats.squares["stack"]), (x * x).sum(1))


@pytest.mark.parametrize("framework", [as_jax, as_torch])
def test_mean_magnitudes_of_examples(framework):
    """Over the positions of each example first, then the squares of all examples are added."""
    rng = np.random.default_rng(4)
    conv = Layer(
        "conv", "Conv1d", "v", (3, 2, 6), (2,), (1,), groups=2, window=Window((1,), "SAME", (1,))
    )
    x = {
        "fc": rng.normal(size=(5, 2, 3, 4)),
        "stack": rng.normal(size=(2, 7, 6, 5)),
        "conv": rng.normal(size=(3, 8, 4)),
    }
    x = {name: given.astype(np.float32) for name, given in x.items()}
    table = [LINEAR, dataclasses.replace(STACK, weight="stack"), conv]
    shapes = {layer.weight: np.ones(layer.shape, np.float32) for layer in table}
    stats = inputs.init(framework(shapes), table, keep=["means"])
    for _ in range(2):
        stats = inputs.update(stats, framework(x), table)
    of_channels = (np.abs(x["conv"]).mean(1) ** 2).sum(0)
    expected = {
        "fc": (np.abs(x["fc"]).mean((1, 2)) ** 2).sum(0)[None],
        "stack": (np.abs(x["stack"]).mean(2) ** 2).sum(1),
        "conv": np.tile(of_channels.reshape(2, 1, 2), (1, 3, 1)).reshape(2, 6),
    }
    for name, total in stats.means.items():
        np.testing.assert_allclose(_as_numpy(value(total)), 2 * expected[name], rtol=1e-5)


LINEAR = Layer("fc", "Linear", "w", (4, 3), (1,), (0,))


def test_sums_do_not_drift_in_a_million_tokens():
    """Gram matrices of a million tokens are good to the rounding of one product of matrices."""
    rng = np.random.default_rng(2)
    batch = rng.normal(1.0, 1.0, (8192, 4)).astype(np.float32)
    exact = np.float64(batch).T @ np.float64(batch)
    step = jax.jit(lambda stats, x: inputs.update(stats, {"fc": x}, [LINEAR]))
    stats = inputs.init({"w": jnp.ones((4, 3))}, [LINEAR], keep=["grams"])
    for _ in range(125):
        stats = step(stats, batch)
    assert int(value(stats.positions["fc"])) == 125 * 8192
    one = step(inputs.init({"w": jnp.ones((4, 3))}, [LINEAR], keep=["grams"]), batch)
    once = np.abs(np.float64(value(one.grams["fc"])[0]) / exact - 1).max()
    many = np.abs(np.float64(value(stats.grams["fc"])[0]) / (125 * exact) - 1).max()
    assert many <= once + 2e-7


def test_merged_statistics_are_those_of_all():
    rng = np.random.default_rng(3)
    parts = [rng.integers(-9, 9, (n, 4)).astype(np.float32) for n in (5, 1, 8)]

    def seen(*xs):
        stats = inputs.init({"w": jnp.ones((4, 3))}, [LINEAR], keep=inputs.KEPT)
        for x in xs:
            stats = inputs.update(stats, {"fc": jnp.asarray(x)}, [LINEAR])
        return stats

    a, b, c = map(seen, parts)
    left = inputs.merge(inputs.merge(a, b), c)
    right = inputs.merge(a, inputs.merge(b, c))
    for x, y, z in zip(*map(jax.tree.leaves, (left, right, seen(*parts))), strict=True):
        np.testing.assert_array_equal(x, y)
        np.testing.assert_array_equal(x, z)
    by_device = jax.vmap(
        lambda x: jax.lax.psum(
            inputs.update(
                inputs.init({"w": jnp.ones((4, 3))}, [LINEAR], keep=["grams"]), {"fc": x}, [LINEAR]
            ),
            "devices",
        ),
        axis_name="devices",
    )(jnp.stack([parts[0], parts[0]]))
    np.testing.assert_array_equal(value(by_device.grams["fc"])[0, 0], 2 * parts[0].T @ parts[0])


def test_memory_is_what_is_taken():
    table = (STACK, dataclasses.replace(LINEAR, weight="v"))
    params = {"w": jnp.ones(STACK.shape), "v": jnp.ones(LINEAR.shape)}
    for keep in (["squares"], ["sums", "grams"]):
        stats = inputs.init(params, table, keep=keep)
        taken = sum(x.nbytes for x in jax.tree.leaves(stats))
        assert sum(inputs.memory(table, keep=keep).values()) == taken


def test_wrong_inputs_raise():
    params = {"w": jnp.ones((4, 3))}
    stats = inputs.init(params, [LINEAR])
    with raises(ValueError, "layer 'fc'", "(2, 3)", "(4,)"):
        inputs.update(stats, {"fc": jnp.ones((2, 3))}, [LINEAR])
    with raises(KeyError, "no input of layer 'fc'"):
        inputs.update(stats, {}, [LINEAR])
    with raises(TypeError, "int32"):
        inputs.update(stats, {"fc": jnp.ones((2, 4), jnp.int32)}, [LINEAR])
    with raises(ValueError, "the input of layer 'fc'", "NaN"):
        inputs.update(stats, {"fc": jnp.full((2, 4), jnp.nan)}, [LINEAR])
    embedding = Layer("tokens", "Embedding", "w", (4, 3), (1,), (0,))
    with raises(ValueError, "'tokens'", "Embedding", "leave it out"):
        inputs.init(params, [embedding])
    conv = Layer("conv", "Conv1d", "w", (3, 4, 8), (2,), (1,))
    with raises(ValueError, "'conv'", "window"):
        inputs.init({"w": jnp.ones((3, 4, 8))}, [conv])
    with raises(ValueError, "keep", "'squares'"):
        inputs.init(params, [LINEAR], keep=["norms"])
