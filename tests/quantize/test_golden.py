"""Numbers of the real NNI 2.10, on a 4 x 3 linear layer without bias, whose ReLU is quantised.

What differs on purpose is here too: ties are rounded before the zero point is added (as ONNX does),
unsigned symmetric integers lie around 128, naive quantisation rounds.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import purepruning as pp
from purepruning.layers import Activation, Layer
from purepruning.quantize import bnn, dorefa, lsq, naive, qat
from purepruning.quantize.ranges import weight_scale
from purepruning_interop import linen
from purepruning_interop import torch as ppt

W = np.array([[1, -2, 3.5], [0, 4, -1], [2, 2, 2], [-3, 0.3, 1]], np.float32)
X = np.array([[[1, 0.5, -0.25], [-1, 2, 0]], [[2, 1, 0.5], [0.5, -0.5, 1]]], np.float32)
TABLE = [Layer("fc", "Linear", "fc.weight", (4, 3), out_axes=(0,), in_axes=(1,))]
frameworks = pytest.mark.parametrize("framework", ["numpy", "jax", "jit", "torch"])


def config_of(**keys):
    rule = {"quant_types": ["weight"], "quant_bits": 8, "op_types": ["Linear"]} | keys
    return pp.resolve_quantization([rule], TABLE)


def quantized(framework, weights, config, state=None, **options):
    as_array = {"torch": torch.tensor, "numpy": np.array}.get(framework, jnp.asarray)
    params = {"fc.weight": as_array(W)}
    if framework == "jit":
        return np.asarray(
            jax.jit(lambda p: weights(p, state, config, **options))(params)["fc.weight"]
        )
    state = qat.init(params, config) if weights is qat.weights else state
    return np.asarray(weights(params, state, config, **options)["fc.weight"])


SCHEMES = [
    ("per_tensor_affine", [0.02745098] * 4, 109, [0.98823529, -2.00392151, 3.48627448]),
    ("per_tensor_symmetric", [0.03149606] * 4, 0, [1.00787401, -2.01574802, 3.49606299]),
    (
        "per_channel_symmetric",
        [0.02755906, 0.03149606, 0.01574803, 0.02362205],
        0,
        [0.99212599, -2.01181102, 3.5],
    ),
]


@pytest.mark.parametrize(("scheme", "scale", "zero", "row"), SCHEMES)
def test_qat_weights(scheme, scale, zero, row):
    config = config_of(quant_scheme=scheme)
    found = weight_scale(W, config.weights[0])
    np.testing.assert_allclose(np.broadcast_to(found.scale, (4, 1))[:, 0], scale, rtol=3e-7)
    assert (np.asarray(found.zero_point) == zero).all()
    for framework in ("numpy", "jax", "torch"):
        np.testing.assert_allclose(quantized(framework, qat.weights, config)[0], row, rtol=3e-7)


def test_three_bits_and_the_tie_that_onnx_rounds_otherwise():
    """NNI makes 3 of 3.5, for its half is rounded to even with the zero point, 3, in it."""
    expected = [[1, -2, 4], [0, 4, -1], [2, 2, 2], [-3, 0, 1]]
    np.testing.assert_array_equal(quantized("jax", qat.weights, config_of(quant_bits=3)), expected)


@frameworks
def test_naive(framework):
    cut = quantized(framework, naive.weights, config_of(), rounding="truncate")
    np.testing.assert_allclose(cut[0], [0.97637796, -1.98425198, 3.49606299], rtol=3e-7)
    np.testing.assert_allclose(cut[3], [-2.99212599, 0.28346455, 0.97637796], rtol=3e-7)
    rounded = quantized(framework, naive.weights, config_of())
    np.testing.assert_allclose(rounded[0], [1.00787401, -2.01574802, 3.49606299], rtol=3e-7)


@frameworks
@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        (2, [[1, -1, 1], [1 / 3, 1, -1], [1, 1, 1], [-1, 1 / 3, 1]]),
        (1, [[1, -1, 1], [-1, 1, -1], [1, 1, 1], [-1, 1, 1]]),
    ],
)
def test_dorefa(framework, bits, expected):
    found = quantized(framework, dorefa.weights, config_of(quant_bits=bits))
    np.testing.assert_allclose(found, expected, atol=2e-7)


@frameworks
def test_bnn(framework):
    found = quantized(framework, bnn.weights, config_of(quant_bits=1))
    np.testing.assert_array_equal(found, np.where(W < 0, -1, 1))


@frameworks
def test_lsq(framework):
    config = config_of(quant_bits=4)
    scales = lsq.init({"fc.weight": W}, config)
    np.testing.assert_allclose(scales["fc:weight"], [[1.37327087]], rtol=2e-7)
    if framework == "torch":
        scales = {"fc:weight": torch.tensor(np.asarray(scales["fc:weight"]))}
    s = 1.37327087
    expected = [[s, -s, 3 * s], [0, 3 * s, -s], [s, s, s], [-2 * s, 0, s]]
    np.testing.assert_allclose(
        quantized(framework, lsq.weights, config, scales), expected, rtol=3e-7
    )


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.relu(nn.Dense(4, use_bias=False, name="fc")(x))


class TorchNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(3, 4, bias=False)
        self.relu1 = torch.nn.ReLU()

    def forward(self, x):
        return self.relu1(self.fc(x))


RULES = [
    {"quant_types": ["weight"], "quant_bits": 8, "op_types": ["Linear"]},
    {"quant_types": ["output"], "quant_bits": 8, "op_types": ["ReLU"]},
]
OUTPUTS = [[0, 2.2632525, 2.51472497, 0], [0, 8.01568604, 2.01178002, 3.58348322]]
GRADIENT = [[0, 0, 0], [0, 2.5, -0.25], [0, 2.5, -0.25], [-1, 2, 0]]
TRAJECTORIES = [
    ("per_tensor_affine", (8.01568604, 8.00566673), (0.03143406, 0.03139477)),
    ("per_tensor_symmetric", (8.0, 7.99055147), (0.03137255, 0.0313355)),
    ("per_channel_symmetric", (8.0, 7.99000025), (0.03137255, 0.03133333)),
]


def flax_run(scheme):
    """Outputs and gradient of the first step, and the state after each of two."""
    net, params = Net(), {"fc": {"kernel": jnp.asarray(W.T)}}
    layers, rows = linen.layers(net, params, X[0]), linen.activations(net, params, X[0])
    config = pp.resolve_quantization([RULES[0] | {"quant_scheme": scheme}, RULES[1]], layers, rows)

    @jax.jit
    def step(params, state, x):
        def loss(params):
            at = qat.activations(state, config)
            y, seen = linen.replace(net, qat.weights(params, state, config), x, at=at)
            return jnp.sum(y), (y, seen)

        grads, (y, seen) = jax.grad(loss, has_aux=True)(params)
        return y, grads["fc"]["kernel"].T, qat.update(state, seen, config)

    y, gradient, first = step(params, qat.init(params, config), X[0])
    second = step(params, first, X[1])[2]
    assert step._cache_size() == 1
    return y, gradient, [first, second]


def torch_run(scheme):
    net = TorchNet()
    params = {"fc.weight": torch.tensor(W, requires_grad=True)}
    rows = ppt.activations(net)
    rules = [RULES[0] | {"quant_scheme": scheme}, RULES[1]]
    config = pp.resolve_quantization(rules, ppt.layers(net), rows)
    state, states, results = qat.init(params, config), [], []
    for x in X:
        weights = qat.weights(params, state, config)
        at = qat.activations(state, config)
        y, seen = ppt.replace(net, torch.tensor(x), at=at, params=weights)
        (gradient,) = torch.autograd.grad(y.sum(), params.values())
        state = qat.update(state, seen, config)
        states.append(state)
        results.append((y.detach(), gradient))
    return *results[0], states


@pytest.mark.parametrize("run", [flax_run, torch_run])
@pytest.mark.parametrize(("scheme", "largest", "scales"), TRAJECTORIES)
def test_two_steps_of_qat(run, scheme, largest, scales):
    y, gradient, states = run(scheme)
    if scheme == "per_tensor_affine":
        np.testing.assert_allclose(y, OUTPUTS, rtol=1e-6)
        np.testing.assert_array_equal(gradient, GRADIENT)
    for state, high, scale in zip(states, largest, scales, strict=True):
        average = state.averages["relu1:output"]
        assert float(average.low) == 0
        np.testing.assert_allclose(float(average.high), high, rtol=1e-6)
        np.testing.assert_allclose(float(average.high) / 255, scale, rtol=1e-6)
    assert [int(state.step) for state in states] == [1, 2]


def test_symmetric_unsigned_is_about_128():
    """NNI 2.10 puts its zero at 127 of 255, so that the largest number is not reached."""
    config = config_of(quant_scheme="per_tensor_symmetric", quant_dtype="uint")
    scale = weight_scale(W, config.weights[0])
    np.testing.assert_allclose(float(scale.scale[0, 0]), 4 / 127, rtol=2e-7)
    assert float(scale.zero_point[0, 0]) == 128
    assert quantized("jax", qat.weights, config)[1, 1] == pytest.approx(4, rel=3e-7)


def test_activation_rows_are_plain_data():
    assert Activation("relu1", "ReLU").names == ("relu1",)
