"""Quantised torch modules as ONNX programs, run by onnxruntime."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import purepruning as pp
from purepruning.quantize import bnn, dorefa, integers, lsq_plus, observers, ptq
from purepruning_interop import torch as ppt
from tests.messages import raises


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(2, 6, 3)
        self.relu = torch.nn.ReLU()
        self.fc = torch.nn.Linear(6 * 16, 5)

    def forward(self, x):
        return self.fc(self.relu(self.conv(x)).flatten(1))


def prepared(bits, of, **keys):
    """A module, its quantised outputs, and what an export needs."""
    torch.manual_seed(0)
    model = Net().eval().requires_grad_(False)
    x = torch.randn(7, 2, 6, 6)
    weight = {"quant_types": ["weight"], "quant_bits": bits, "op_types": ["Conv2d", "Linear"]}
    rules = [weight | keys, {"quant_types": ["input"], "quant_bits": of, "op_types": ["Conv2d"]}]
    rules.append({"quant_types": ["output"], "quant_bits": of, "op_types": ["ReLU"]})
    config = pp.resolve_quantization(rules, ppt.layers(model), ppt.activations(model))
    params = dict(model.named_parameters())
    state = observers.init(params, config)
    _, seen = ppt.replace(model, x, at=observers.watch(state, config))
    return model, x, config, params, observers.ranges(observers.update(state, seen, config))


def run(model, x, weights, levels, config, path):
    ppt.export_onnx(model, path, weights, levels, config, x)
    plain = onnxruntime.SessionOptions()
    plain.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    results = []
    for options in (plain, onnxruntime.SessionOptions()):
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        (name,) = [i.name for i in session.get_inputs()]
        found = [session.run(None, {name: part.numpy()})[0] for part in (x, x[:3])]
        np.testing.assert_allclose(found[1], found[0][:3], rtol=1e-4, atol=1e-5)  # any batch
        results.append(found[0])
    return results, [node.op_type for node in onnx.load(path).graph.node]


@pytest.mark.parametrize(
    ("bits", "of", "keys"),
    [
        (8, 8, {}),
        (8, 8, {"quant_scheme": "per_channel_symmetric"}),
        pytest.param(4, 5, {"quant_scheme": "per_channel_affine"}, marks=pytest.mark.full),
        pytest.param(3, 4, {"quant_dtype": "int"}, marks=pytest.mark.full),
    ],
)
def test_computes_what_the_fake_quantised_module_does(bits, of, keys, tmp_path):
    model, x, config, params, ranges = prepared(bits, of, **keys)
    quantised = ptq.weights(params, None, config)
    wanted, _ = ppt.replace(model, x, at=ptq.activations(ranges, config), params=quantised)
    weights = integers.of(quantised, ptq.levels(params, config), config)
    levels = ptq.activation_levels(ranges, config)
    found, nodes = run(model, x, weights, levels, config, tmp_path / "model.onnx")
    size = np.abs(wanted.numpy()).max()
    np.testing.assert_allclose(found[0], wanted, rtol=1e-4, atol=1e-5 * size)
    # The kernels that onnxruntime fuses sum integers, and round those halfway to the other level.
    assert np.abs(found[1] - wanted.numpy()).max() < 0.1 * size
    assert nodes.count("QuantizeLinear") == 2
    assert nodes.count("DequantizeLinear") == 4


@pytest.mark.parametrize("of", [8, 4])
def test_trained_offsets_are_whole_zero_points(of, tmp_path):
    model, x, config, params, ranges = prepared(4, of)
    scales = lsq_plus.init(params, config, ranges)
    input_ = scales["conv:input"]
    trained = {**scales, "conv:input": input_._replace(offset=input_.offset - 0.3 * input_.scale)}
    rounded = lsq_plus.round_offsets(trained, config)
    quantised = lsq_plus.weights(params, rounded, config)
    at = lsq_plus.activations(rounded, config)
    wanted, _ = ppt.replace(model, x, at=at, params=quantised)
    weights = integers.of(quantised, lsq_plus.levels(rounded, config), config)
    levels = lsq_plus.activation_levels(rounded, config)
    found, nodes = run(model, x, weights, levels, config, tmp_path / "model.onnx")
    size = np.abs(wanted.numpy()).max()
    np.testing.assert_allclose(found[0], wanted, rtol=1e-4, atol=1e-5 * size)
    assert nodes.count("QuantizeLinear") == 2
    between = {**levels, "conv:input": levels["conv:input"]._replace(zero_point=2.4)}
    with raises(ValueError, "export_onnx", "'conv:input'", "2.4", "lsq_plus.round_offsets"):
        ppt.export_onnx(model, tmp_path / "m.onnx", weights, between, config, x)


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc = torch.nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(self.attention(x, x, x)[0])


def test_outputs_that_are_tuples(tmp_path):
    torch.manual_seed(0)
    model, x = Attention().eval().requires_grad_(False), torch.randn(4, 5, 8)
    rule = {"quant_types": ["output"], "quant_bits": 8, "op_types": ["MultiheadAttention"]}
    config = pp.resolve_quantization(rule, ppt.layers(model))
    state = observers.init(dict(model.named_parameters()), config)
    _, seen = ppt.replace(model, x, at=observers.watch(state, config))
    ranges = observers.ranges(observers.update(state, seen, config))
    wanted, _ = ppt.replace(model, x, at=ptq.activations(ranges, config))
    levels = ptq.activation_levels(ranges, config)
    found, nodes = run(model, x, {}, levels, config, tmp_path / "model.onnx")
    np.testing.assert_allclose(found[0], wanted, rtol=1e-4, atol=1e-5)
    assert nodes.count("QuantizeLinear") > 0


@pytest.mark.parametrize(("quantizer", "bits"), [(bnn, 1), (dorefa, 2)])
def test_levels_about_zero_are_doubled(quantizer, bits, tmp_path):
    model, x, config, params, _ = prepared(bits, 8)
    weights_only = pp.quantize.QuantizationConfig(config.weights)
    quantised = quantizer.weights(params, None, weights_only)
    weights = integers.of(quantised, quantizer.levels(weights_only), weights_only)
    wanted, _ = ppt.replace(model, x, at={}, params=quantised)
    found, _ = run(model, x, weights, {}, weights_only, tmp_path / "model.onnx")
    np.testing.assert_allclose(found[0], wanted, rtol=1e-4, atol=1e-4)


def test_what_onnx_has_not_is_refused(tmp_path):
    for bits, keys, part in [(12, {}, "12 bits"), (4, {"granularity": 2}, "every 2 inputs")]:
        model, x, config, params, ranges = prepared(bits, 8, **keys)
        quantised = ptq.weights(params, None, config)
        weights = integers.of(quantised, ptq.levels(params, config), config)
        levels = ptq.activation_levels(ranges, config)
        with raises(ValueError, "export_onnx", "'conv'", part):
            ppt.export_onnx(model, tmp_path / "m.onnx", weights, levels, config, x)
        with raises(KeyError, "export_onnx", "'conv:input'"):
            ppt.export_onnx(model, tmp_path / "m.onnx", weights, {}, config, x)
