"""Quantised weights as integers: exact round trips, and layers computed in integers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import purepruning as pp
from purepruning.quantize import bnn, dorefa, integers, lsq, lsq_plus, naive, observers, ptq, qat
from purepruning_interop import linen
from tests.messages import raises
from tests.modes import as_jax, as_torch

F = np.float32
RNG = np.random.default_rng(0)
PARAMS = {
    "fc": RNG.normal(size=(6, 8)).astype(F),
    "conv": RNG.normal(size=(3, 3, 4, 6)).astype(F),
}
LAYERS = [
    pp.make_layer(PARAMS, "fc", "Linear", name="fc", out_axes=0, in_axes=1),
    pp.make_layer(PARAMS, "conv", "Conv2d", name="conv", out_axes=3, in_axes=2),
]


def config_of(bits, **keys):
    return pp.resolve_quantization({"quant_types": ["weight"], "quant_bits": bits} | keys, LAYERS)


def by_range(params, config):
    return qat.weights(params, qat.init(params, config), config), qat.levels(params, config)


def by_trained_scales(params, config, module):
    scales = module.init(params, config)
    return module.weights(params, scales, config), module.levels(scales, config)


QUANTIZERS = {
    "qat": by_range,
    "ptq": lambda p, c: (ptq.weights(p, None, c), ptq.levels(p, c)),
    "naive": lambda p, c: (naive.weights(p, None, c), naive.levels(p, c)),
    "lsq": lambda p, c: by_trained_scales(p, c, lsq),
    "lsq_plus": lambda p, c: by_trained_scales(p, c, lsq_plus),
    "dorefa": lambda p, c: (dorefa.weights(p, None, c), dorefa.levels(c)),
    "bnn": lambda p, c: (bnn.weights(p, None, c), bnn.levels(c)),
}
CASES = [
    ("qat", 8, {}),
    ("qat", 8, {"quant_scheme": "per_channel_symmetric"}),
    ("qat", 3, {"granularity": 4}),
    ("qat", 12, {"quant_scheme": "symmetric"}),
    ("qat", 4, {"quant_scheme": "per_channel_affine", "quant_dtype": "int"}),
    ("ptq", 5, {}),
    ("naive", 8, {}),
    ("lsq", 2, {}),
    ("lsq", 4, {"granularity": 4}),
    ("lsq_plus", 3, {"quant_scheme": "per_channel_symmetric"}),
    ("dorefa", 2, {}),
    ("bnn", 1, {}),
]


@pytest.mark.parametrize("framework", [as_jax, as_torch])
@pytest.mark.parametrize(("name", "bits", "keys"), CASES)
def test_round_trip_is_exact(name, bits, keys, framework):
    config = config_of(bits, **keys)
    quantised, levels = QUANTIZERS[name](framework(PARAMS), config)
    found = integers.of(quantised, levels, config)
    assert found.keys() == {"fc:weight", "conv:weight"}
    for target in config.weights:
        weight = found[target.site]
        np.testing.assert_array_equal(weight.values(), np.asarray(quantised[target.name]))
        q = weight.integers
        assert weight.bits == bits
        assert q.min() >= weight.low
        assert int(q.max()) - weight.low < 2**bits
        packed = integers.pack(weight)
        assert packed.nbytes == -(-q.size * bits // 8)
        again = integers.unpack(packed, q.shape, bits, weight.low, q.dtype)
        np.testing.assert_array_equal(again, q)
        assert again.dtype == q.dtype


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_of_half_precision(bits, dtype):
    """Numbers that 8 bits need are rounded in bfloat16; they are the levels in it."""
    config = config_of(bits, quant_scheme="per_channel_symmetric")
    for as_array in (
        lambda x: jnp.asarray(x, dtype),
        lambda x: torch.tensor(x, dtype=getattr(torch, dtype)),
    ):
        params = {name: as_array(x) for name, x in PARAMS.items()}
        quantised, levels = by_range(params, config)
        for site, weight in integers.of(quantised, levels, config).items():
            found = integers.on_host(quantised[site.removesuffix(":weight")])
            assert str(found.dtype) == dtype
            np.testing.assert_array_equal(weight.values().astype(found.dtype), found)
        with raises(ValueError, "integers.of", "none of its levels"):
            integers.of(params, levels, config)


def test_masked_weights_are_exact_where_zero_is_a_level():
    masks = {"fc": RNG.random((6, 8)) < 0.5}
    config = config_of(8)
    quantised, levels = by_range(PARAMS, config)
    weight = integers.of(pp.apply_masks(quantised, masks), levels, config)["fc:weight"]
    assert (weight.values()[~masks["fc"]] == 0).all()
    quantised, levels = QUANTIZERS["bnn"](PARAMS, config_of(1))
    with raises(ValueError, "'fc'", "is 0.0 at", "none of its levels"):
        integers.of(pp.apply_masks(quantised, masks), levels, config_of(1))


def test_what_is_not_quantised_is_refused():
    config = config_of(4)
    levels = qat.levels(PARAMS, config)
    with raises(ValueError, "integers.of", "'fc'", "none of its levels", "the same quantizer"):
        integers.of(PARAMS, levels, config)
    with raises(KeyError, "integers.of: levels", "nothing of 'conv:weight'", "'fc:weight'"):
        integers.of(by_range(PARAMS, config)[0], {"fc:weight": levels["fc:weight"]}, config)
    with raises(TypeError, "integers", "not known under jit", "call this outside"):
        jax.jit(lambda params: integers.of(*by_range(params, config), config))(PARAMS)


# Integer arithmetic.

DENSE, CONV = nn.Dense(6, use_bias=False), nn.Conv(6, (3, 3), use_bias=False, padding="VALID")
SCHEMES = (
    "per_tensor_affine",
    "per_tensor_symmetric",
    "per_channel_affine",
    "per_channel_symmetric",
)
INPUTS = ("affine", "symmetric")


@pytest.mark.parametrize("dtype", ["uint", pytest.param("int", marks=pytest.mark.full)])
@pytest.mark.parametrize("of_input", INPUTS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("layer", [DENSE, CONV], ids=["Dense", "Conv"])
def test_layers_computed_in_int32_are_the_fake_quantised_ones(layer, scheme, of_input, dtype):
    """To 1e-6 of the sum of ``|q_x q_w|`` times the scales, whatever the scheme."""
    shape = (7, 30) if layer is DENSE else (3, 6, 7, 5)
    x = (RNG.normal(size=shape) + 0.5).astype(F)
    taps = (30, 6) if layer is DENSE else (3, 3, 5, 6)
    params = {"kernel": jnp.asarray(RNG.normal(size=taps).astype(F))}
    table = [
        pp.make_layer(
            params, "kernel", "Linear", name="", out_axes=len(taps) - 1, in_axes=len(taps) - 2
        )
    ]
    rules = [
        {"quant_types": ["weight"], "quant_bits": 8, "quant_scheme": scheme, "quant_dtype": dtype},
        {"quant_types": ["input"], "quant_bits": 8, "quant_scheme": of_input, "quant_dtype": dtype},
    ]
    config = pp.resolve_quantization(rules, table)
    weights = ptq.weights(params, None, config)
    state = observers.init(params, config)
    _, seen = linen.replace(layer, params, x, at=observers.watch(state, config))
    ranges = observers.ranges(observers.update(state, seen, config))
    y, _ = linen.replace(layer, weights, x, at=ptq.activations(ranges, config))
    w = integers.of(weights, ptq.levels(params, config), config)[":weight"]
    at = jax.tree.map(np.asarray, ptq.activation_levels(ranges, config)[":input"])
    q = np.clip(np.round(x * (F(1) / at.scale)) + at.zero_point, at.low, at.high).astype(np.int32)
    product = jnp.matmul if layer is DENSE else _convolve
    a, b = q - np.int32(at.zero_point), w.integers.astype(np.int32) - w.zero_point.astype(np.int32)
    total = np.asarray(product(jnp.asarray(a), jnp.asarray(b)))
    assert total.dtype == np.int32
    size = np.asarray(product(jnp.abs(a), jnp.abs(b)))
    scales = at.scale * w.scale.reshape(-1)
    off = np.abs(np.asarray(y, np.float64) - total * scales.astype(np.float64))
    assert (off <= 1e-6 * size * scales).all()


@pytest.mark.parametrize("of_input", INPUTS)
@pytest.mark.parametrize("scheme", ["affine", "symmetric"])
def test_groups_of_inputs_are_summed_in_int32_and_then_scaled(scheme, of_input):
    x = (RNG.normal(size=(7, 30)) + 0.5).astype(F)
    params = {"kernel": jnp.asarray(RNG.normal(size=(30, 6)).astype(F))}
    table = [pp.make_layer(params, "kernel", "Linear", name="", out_axes=1, in_axes=0)]
    rule = {"quant_types": ["weight"], "quant_bits": 8, "quant_scheme": scheme, "granularity": 10}
    read = {"quant_types": ["input"], "quant_bits": 8, "quant_scheme": of_input}
    config = pp.resolve_quantization([rule, read], table)
    weights = ptq.weights(params, None, config)
    ranges = {":input": observers.Range(x.min(), x.max())}
    y, _ = linen.replace(DENSE, weights, x, at=ptq.activations(ranges, config))
    w = integers.of(weights, ptq.levels(params, config), config)[":weight"]
    at = ptq.activation_levels(ranges, config)[":input"]
    q = np.clip(np.round(x * (F(1) / at.scale)) + at.zero_point, at.low, at.high).astype(np.int32)
    a = (q - np.int32(at.zero_point)).reshape(7, 3, 10)
    assert w.grouped == (3, 10, 6)
    b = w.integers.reshape(w.grouped).astype(np.int32) - w.zero_point.astype(np.int32)
    total, size = (np.einsum("ngi,gio->ngo", *f) for f in ((a, b), (abs(a), abs(b))))
    assert total.dtype == np.int32
    scales = (np.float64(at.scale) * w.scale).reshape(3, -1)
    off = np.abs(np.asarray(y, np.float64) - (total * scales).sum(1))
    assert (off <= 1e-6 * (size * scales).sum(1)).all()


def _convolve(x, w):
    """A convolution of integers, by its definition."""
    y = 0
    for i in range(3):
        for j in range(3):
            part = x[:, i : i + x.shape[1] - 2, j : j + x.shape[2] - 2]
            y = y + jnp.matmul(part, w[i, j])
    return y


def test_torch_tensors_that_need_gradients():
    config = config_of(8)
    params = {name: torch.tensor(x, requires_grad=True) for name, x in PARAMS.items()}
    quantised, levels = by_range(params, config)
    found = integers.of(quantised, levels, config)["fc:weight"]
    np.testing.assert_array_equal(found.values(), quantised["fc"].detach())
    assert jax.tree.leaves(config) == []
