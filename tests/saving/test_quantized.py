"""Quantised models in files."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import purepruning as pp
from purepruning.quantize import integers, ptq
from purepruning.quantize.observers import Range
from tests.messages import raises

F = np.float32
W = np.random.default_rng(0).normal(size=(6, 8)).astype(F)
RULES = [
    {"quant_types": ["weight"], "quant_bits": 3, "quant_scheme": "per_channel_affine"},
    {"quant_types": ["input", "output"], "quant_bits": {"input": 8, "output": 4}},
]
RANGES = {"fc:input": Range(F(-1.5), F(2)), "fc:output": Range(F(0), F(0.1))}


def model(framework):
    as_array = {"jax": jnp.asarray, "torch": torch.tensor}[framework]
    params = {"fc.w": as_array(W), "fc.b": as_array(W[:, 0])}
    layer = pp.make_layer(params, "fc.w", "Linear", name="fc", out_axes=0, in_axes=1, bias="fc.b")
    config = pp.resolve_quantization(RULES, [layer])
    quantised = ptq.weights(params, None, config)
    return params, quantised, integers.of(quantised, ptq.levels(params, config), config), config


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_comes_back_bit_for_bit(framework, tmp_path):
    params, quantised, weights, config = model(framework)
    scalar = {"jax": jnp.asarray, "torch": torch.tensor}[framework](7)
    params, quantised = ({**x, "steps": scalar} for x in (params, quantised))
    path = tmp_path / "model.safetensors"
    pp.save_quantized(path, quantised, weights, RANGES, config)
    found = pp.load_quantized(path, params)
    for name, x in quantised.items():
        assert isinstance(found.params[name], type(x))
        np.testing.assert_array_equal(np.asarray(found.params[name]), np.asarray(x))
    np.testing.assert_array_equal(
        found.weights["fc:weight"].integers, weights["fc:weight"].integers
    )
    assert found.weights["fc:weight"][3:] == weights["fc:weight"][3:]
    assert found.ranges == RANGES
    calibration = json.loads((tmp_path / "model.json").read_text())
    assert calibration["fc"].keys() == {
        *("weight_bits", "weight_scale", "weight_zero_point"),
        *(f"{x}_{what}" for what in ("input", "output") for x in ("tracked_min", "tracked_max")),
        *("input_bits", "output_bits"),
    }
    assert calibration["fc"]["tracked_max_output"] == pytest.approx(0.1)
    assert calibration["fc"]["weight_bits"] == 3


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_what_is_not_quantised_keeps_half_precision(framework, tmp_path):
    as_array = {"jax": jnp.asarray, "torch": torch.tensor}[framework]
    bfloat16 = {"jax": jnp.bfloat16, "torch": torch.bfloat16}[framework]
    params = {"a": as_array(W, dtype=bfloat16), "b": as_array([0.1, -3.0], dtype=bfloat16)}
    layer = pp.make_layer(params, "a", "Linear", name="fc", out_axes=0, in_axes=1)
    config = pp.resolve_quantization(RULES[0], [layer])
    quantised = ptq.weights(params, None, config)
    weights = integers.of(quantised, ptq.levels(params, config), config)
    path = tmp_path / "model.safetensors"
    pp.save_quantized(path, quantised, weights, {}, config)
    found = pp.load_quantized(path, params).params
    for name, x in quantised.items():
        assert found[name].dtype == bfloat16
        np.testing.assert_array_equal(integers.on_host(found[name]), integers.on_host(x))


def test_every_file_has_a_calibration_of_its_own(tmp_path):
    _, quantised, weights, config = model("jax")
    names = ("run.1", "run.2", "run.safetensors", "run.x.safetensors", "run.json")
    for name in names:
        pp.save_quantized(tmp_path / name, quantised, weights, RANGES, config)
    calibrations = {"run.1.json", "run.2.json", "run.json", "run.x.json", "run.json.json"}
    assert {x.name for x in tmp_path.iterdir()} == {*names, *calibrations}
    pp.load_quantized(tmp_path / "run.1", quantised)


def test_weights_take_their_width(tmp_path):
    sizes = {}
    for bits in (2, 8):
        params = {"w": np.random.default_rng(0).normal(size=(256, 256)).astype(F)}
        layer = pp.make_layer(params, "w", "Linear", name="fc", out_axes=0, in_axes=1)
        config = pp.resolve_quantization({"quant_types": ["weight"], "quant_bits": bits}, [layer])
        weights = integers.of(ptq.weights(params, None, config), ptq.levels(params, config), config)
        path = tmp_path / f"{bits}.safetensors"
        pp.save_quantized(path, params, weights, {}, config)
        sizes[bits] = path.stat().st_size
    assert sizes[2] < 256 * 256 / 4 + 1000
    assert sizes[8] < 256 * 256 + 1000


def test_both_frameworks_write_the_same_bytes(tmp_path):
    files = []
    for framework in ("jax", "torch"):
        _, quantised, weights, config = model(framework)
        pp.save_quantized(tmp_path / framework, quantised, weights, RANGES, config)
        files.append((tmp_path / framework).read_bytes())
    assert files[0] == files[1]


def test_mistakes_are_named(tmp_path):
    params, quantised, weights, config = model("jax")
    path = tmp_path / "model.safetensors"
    with raises(KeyError, "save_quantized: weights", "nothing of 'fc:weight'", "integers.of"):
        pp.save_quantized(path, quantised, {}, RANGES, config)
    with raises(KeyError, "save_quantized: ranges", "nothing of 'fc:input'", "observers.ranges"):
        pp.save_quantized(path, quantised, weights, {}, config)
    assert not path.exists()
    pp.save_quantized(path, quantised, weights, RANGES, config)
    with raises(KeyError, "load_quantized", "no parameter 'fd.w'", "'fc.w'"):
        pp.load_quantized(path, {"fd.w": W})
    with raises(ValueError, "load_quantized", "'fc.w' has shape (", "(2, 3)"):
        pp.load_quantized(path, {**params, "fc.w": np.zeros((2, 3), np.float32)})
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    with raises(ValueError, "cannot be read as quantized", "checksum"):
        pp.load_quantized(path, params)
    (tmp_path / "model.json").unlink()
    with pytest.raises((FileNotFoundError, ValueError)):
        pp.load_quantized(path, params)
