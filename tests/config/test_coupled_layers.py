"""The layer table that a coupling knows."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import purepruning as pp
from purepruning_interop import linen as ppl


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), jnp.float32)


def test_a_plain_pytree_has_a_table():
    """Kernels of a convolution, layers stacked in a scan, an embedding and a tied head."""
    params = {
        "conv": {"w": normal(5, 3, 3, 2), "b": normal(5)},  # (out, taps, taps, in)
        "blocks": {"up": normal(3, 5, 7), "down": normal(3, 7, 5)},
        "words": normal(11, 5),
        "gain": normal(5),
    }

    def fn(p, image, token):
        shape = ("NHWC", "OHWI", "NHWC")
        h = (
            jax.lax.conv_general_dilated(
                image, p["conv"]["w"], (1, 1), "SAME", (1, 1), (1, 1), shape
            )
            + p["conv"]["b"]
        )
        h = h.mean((1, 2)) + p["words"][token] * p["gain"]
        h, _ = jax.lax.scan(
            lambda h, w: (h + jax.nn.relu(h @ w["up"]) @ w["down"], None), h, p["blocks"]
        )
        return h @ p["words"].T

    with jax.numpy_rank_promotion("allow"):
        coupling = pp.couple(fn, params, normal(4, 6, 6, 2), jnp.zeros(4, jnp.int32))
    found = {x.weight: x for x in pp.coupled_layers(coupling)}
    seen = {k: (x.name, x.type, x.out_axes, x.in_axes, x.stack_axes) for k, x in found.items()}
    assert seen == {
        "conv.w": ("conv", "Conv2d", (0,), (3,), ()),
        "blocks.up": ("blocks.up", "Linear", (2,), (1,), (0,)),
        "blocks.down": ("blocks.down", "Linear", (2,), (1,), (0,)),
        "words": ("words", "Embedding", (1,), (0,), ()),
    }


class Tokens(nn.Module):
    """A class that no adapter knows, with a weight that it contracts itself."""

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.normal(1.0), (6, 2, 4))
        return jnp.einsum("bi,ihd->bhd", x, w).reshape(x.shape[0], 8)


def test_rows_of_unknown_classes_get_axes():
    model = nn.Sequential([Tokens(), nn.relu, nn.Dense(3)])
    x = normal(5, 6)
    variables = model.init(jax.random.key(0), x)
    layers = ppl.layers(model, variables, x)
    assert layers[0].out_axes == ()
    coupling = ppl.couple(model, variables, x)
    row = pp.coupled_layers(coupling, layers)[0]
    assert (row.type, row.class_name, row.out_axes, row.in_axes) == (
        "Linear",
        "Tokens",
        (1, 2),
        (0,),
    )
    config = pp.resolve(0.5, layers, coupling=coupling)
    masks = pp.l1_norm(variables, None, config)
    small = ppl.shrink(model, variables, masks, coupling, x)
    assert small.params["params"]["layers_0"]["w"].shape == (6, 2, 2)
    masked = model.apply(pp.apply_masks(variables, small.report.masks), x)
    np.testing.assert_allclose(small.fn(small.params, x), masked, rtol=1e-4, atol=1e-5)


def test_a_row_without_output_axis_is_kept_whole():
    """A PReLU of one slope is one of the default types, and has no channels."""
    params = {"first": normal(4, 6), "slope": jnp.float32(0.3), "last": normal(6, 2)}

    def fn(p, x):
        h = x @ p["first"]
        return jnp.where(h > 0, h, h * p["slope"]) @ p["last"]

    coupling = pp.couple(fn, params, normal(3, 4))
    layers = [*pp.coupled_layers(coupling), pp.Layer("slope", "PReLU", "slope", ())]
    config = pp.resolve([{"sparsity": 0.5, "op_types": ["default"]}], layers, coupling=coupling)
    kept = {name: k.reason for k in config.kept_whole for name in k.layers}
    assert kept["slope"] == "it has no output axis"
    assert config.counts == {"first": 3}


def test_a_gain_makes_no_channels_of_its_own():
    """Weight normalisation: gain and direction are multiplied before the input comes."""
    params = {"v": normal(4, 6), "gain": normal(6), "head": normal(6, 3)}

    def fn(p, x):
        w = p["v"] * p["gain"] * jax.lax.rsqrt((p["v"] ** 2).sum(0) + 1e-6)
        return jax.nn.relu(x @ w) @ p["head"]

    x = normal(5, 4)
    with jax.numpy_rank_promotion("allow"):
        coupling = pp.couple(fn, params, x)
        config = pp.resolve(0.5, pp.coupled_layers(coupling), coupling=coupling)
        masks = pp.l1_norm(params, None, config)
        small = pp.shrink(fn, params, masks, coupling, x)
        masked = fn(pp.apply_masks(params, small.report.masks), x)
        assert jax.tree.map(jnp.shape, small.params) == {"v": (4, 3), "gain": (3,), "head": (3, 3)}
        np.testing.assert_allclose(small.fn(small.params, x), masked, rtol=1e-4, atol=1e-5)
