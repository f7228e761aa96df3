"""Models of the same class with smaller arrays, where their forward computes the same."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import purepruning as pp
from purepruning_interop import equinox as ppe
from purepruning_interop import nnx as ppn
from tests.coupling.law import distance, half
from tests.fast import some_key

pytestmark = pytest.mark.usefixtures("unoptimized")

KEY = some_key()
IMAGE = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 3)), jnp.float32)
TOKENS = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 8)), jnp.float32)


class Mobile(nnx.Module):
    """A depthwise and a grouped convolution, batch and group norms."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.depthwise = nnx.Conv(8, 8, (3, 3), feature_group_count=8, rngs=rngs)
        self.grouped = nnx.Conv(8, 12, (1, 1), feature_group_count=2, rngs=rngs)
        self.head = nnx.Linear(12, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.stem(x)))
        x = nnx.relu(self.grouped(nnx.relu(self.depthwise(x))))
        return self.head(x.mean((1, 2)))


class Block(nnx.Module):
    """Attention and a layer norm."""

    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, 8, decode=False, rngs=rngs)
        self.up = nnx.Linear(8, 16, rngs=rngs)
        self.down = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        return self.down(nnx.gelu(self.up(x)))


def draw(tree):
    rng = np.random.default_rng(3)
    return jax.tree.map(
        lambda x: (
            jnp.asarray(rng.uniform(0.5, 1.5, x.shape), x.dtype)
            if jnp.issubdtype(x.dtype, jnp.floating)
            else x
        ),
        tree,
    )


@nnx.jit
def run(model, x):
    return model(x)


def test_nnx_convolutions_become_smaller_modules():
    model = Mobile(nnx.Rngs(KEY))
    nnx.update(model, draw(nnx.state(model)))
    coupling = ppn.couple(model, IMAGE)
    _, params = ppn.function(model)
    masks = coupling.masks(half(coupling), params)
    found = ppn.shrink(model, masks, coupling, IMAGE)
    assert found.reason == ""
    assert isinstance(found.model, Mobile)
    assert found.model.depthwise.feature_group_count == 4
    assert found.model.grouped.feature_group_count == 2
    assert (found.model.stem.out_features, found.model.norm.num_features) == (4, 4)
    masked = nnx.clone(model)
    nnx.update(masked, pp.apply_masks(params, masks))
    assert distance(run(masked, IMAGE), run(found.model, IMAGE)) < 1e-5
    assert model.stem.kernel.shape == (3, 3, 3, 8)  # the original is as it was


def test_nnx_heads_go_and_positions_change_the_temperature():
    model = Block(nnx.Rngs(KEY))
    nnx.update(model, draw(nnx.state(model)))
    coupling = ppn.couple(model, TOKENS)
    _, params = ppn.function(model)
    heads = next(f for f in coupling.families if f.kind == "head")
    found = ppn.shrink(model, coupling.masks(heads.units[:2], params), coupling, TOKENS)
    assert found.reason == ""
    assert found.model.attention.num_heads == 2
    positions = [f.units[0] for f in coupling.families if f.kind == "head_position"]
    found = ppn.shrink(model, coupling.masks(positions, params), coupling, TOKENS)
    assert found.model is None
    assert "its output differs" in found.reason
    assert found.fn(found.params, TOKENS).shape == (2, 5, 3)


class Convolutions(eqx.Module):
    """Convolutions, a group norm, linear layers."""

    stem: eqx.nn.Conv2d
    depthwise: eqx.nn.Conv2d
    norm: eqx.nn.GroupNorm
    head: eqx.nn.Linear

    def __init__(self, key):
        one, two, three = jax.random.split(key, 3)
        self.stem = eqx.nn.Conv2d(3, 8, 3, key=one)
        self.depthwise = eqx.nn.Conv2d(8, 8, 3, groups=8, key=two)
        self.norm = eqx.nn.GroupNorm(4, 8)
        self.head = eqx.nn.Linear(8, 3, key=three)

    def __call__(self, x):
        x = jax.nn.relu(self.depthwise(jax.nn.relu(self.stem(x))))
        return self.head(self.norm(x).mean((1, 2)))


@jax.jit
def each(model, x):
    return jax.vmap(model)(x)


@pytest.mark.parametrize("norms", ["original", "kept"])
def test_equinox_modules(norms):
    model = draw(Convolutions(KEY))
    x = jnp.moveaxis(IMAGE, -1, 1)
    coupling = ppe.couple(model, x, method=each)
    _, params = ppe.function(model)
    groups = next(f for f in coupling.families if f.kind == "block")
    masks = coupling.masks(groups.units[:2], params)
    found = ppe.shrink(model, masks, coupling, x, method=each, norms=norms)
    assert found.reason == ""
    assert (found.model.norm.groups, found.model.depthwise.groups) == (2, 4)
    assert distance(each(pp.apply_masks(model, masks), x), each(found.model, x)) < 1e-5
    positions = next(f for f in coupling.families if f.kind == "position")
    masks = coupling.masks(positions.units[:1], params)
    found = ppe.shrink(model, masks, coupling, x, method=each, norms=norms)
    assert (found.model is not None) == (norms == "kept")
    if norms == "original":
        assert distance(each(pp.apply_masks(model, masks), x), found.fn(found.params, x)) < 1e-5


def test_a_forward_that_names_a_width_is_reported():
    class Fixed(nnx.Module):
        def __init__(self, rngs):
            self.one = nnx.Linear(3, 8, rngs=rngs)
            self.two = nnx.Linear(8, 2, rngs=rngs)

        def __call__(self, x):
            return self.two(nnx.relu(self.one(x)).reshape(-1, 8))

    model = Fixed(nnx.Rngs(KEY))
    coupling = ppn.couple(model, IMAGE[0, 0])
    _, params = ppn.function(model)
    found = ppn.shrink(model, coupling.masks([1, 2], params), coupling, IMAGE[0, 0])
    assert found.model is None
    assert found.reason
    assert found.fn(found.params, IMAGE[0, 0]).shape == (8, 2)
