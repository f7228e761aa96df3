"""Training under the masks of a coupled pruner ends in the function that shrinking returns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch import nn

import purepruning as pp
from purepruning_interop import torch as ppt

pytestmark = pytest.mark.usefixtures("unoptimized", "standard_promotion")


def start():
    rng = np.random.default_rng(0)
    shapes = {"a": (6, 8), "scale": (8,), "shift": (8,), "b": (8, 10), "c": (10, 3)}
    return {k: jnp.asarray(rng.standard_normal(n) * 0.7, jnp.float32) for k, n in shapes.items()}


def fn(params, x):
    """A norm over samples, then a sigmoid: removed channels are shifted, and 0.5 behind it."""
    h = x @ params["a"]
    spread = jax.lax.rsqrt(h.var(0, keepdims=True) + 1e-5)
    h = (h - h.mean(0, keepdims=True)) * spread * params["scale"][None] + params["shift"][None]
    return jax.nn.sigmoid(jax.nn.relu(h) @ params["b"]) @ params["c"]


@pytest.mark.parametrize("jitted", [False, True])
def test_jax_training_keeps_what_is_cut_at_nothing(jitted):
    params, rng = start(), np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((16, 6)), jnp.float32)
    coupling = pp.couple(fn, params, x)
    config = pp.resolve(0.5, pp.coupled_layers(coupling), coupling=coupling)
    prune = jax.jit(pp.l1_norm, static_argnums=1) if jitted else pp.l1_norm
    masks = prune(params, None, config)
    assert masks["b"].all(0).sum() == 5  # readers of zeros are left alone
    assert masks["c"].shape == (10, 1)  # those of sigmoids are not
    optimizer = pp.keep_pruned(masks, optax.adam(0.05))
    params = pp.apply_masks(params, masks)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: jnp.mean((fn(p, x) - 1) ** 2))(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(20):
        params, state = step(params, state)
    small = pp.shrink(fn, params, masks, coupling, x)
    assert jax.tree.map(jnp.shape, small.params) == {
        "a": (6, 4),
        "scale": (4,),
        "shift": (4,),
        "b": (4, 5),
        "c": (5, 3),
    }
    np.testing.assert_allclose(small.fn(small.params, x), fn(params, x), rtol=1e-4, atol=1e-5)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b, self.head = nn.Conv2d(8, 10, 1), nn.Linear(10, 3)

    def forward(self, x):
        h = self.norm(self.a(x)).relu()
        return self.head(self.b(h).sigmoid().mean((2, 3)))


def test_torch_training_keeps_what_is_cut_at_nothing():
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(4, 3, 6, 6)
    coupling = ppt.couple(model, x)
    config = pp.resolve(0.5, ppt.layers(model), coupling=coupling)
    masks = pp.l1_norm(dict(model.named_parameters()), None, config)
    ppt.apply_(model, masks)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    ppt.keep_pruned(model, masks, optimizer)
    model.train()
    for _ in range(10):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
    model.eval()
    small = ppt.shrink(model, masks, coupling, x).model
    assert (small.a.out_channels, small.b.out_channels) == (4, 5)
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)
