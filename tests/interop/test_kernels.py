"""Configs handed to qwix and torchao; where these are installed."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import purepruning as pp
from purepruning.quantize import ptq
from purepruning_interop import linen
from purepruning_interop import torch as ppt
from tests.messages import raises

X = np.random.default_rng(0).normal(size=(16, 32)).astype(np.float32)
SYMMETRIC = {"quant_scheme": "per_channel_symmetric"}


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(8, name="last")(nn.relu(nn.Dense(64, name="first")(x)))


def torch_net():
    torch.manual_seed(0)
    layers = torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8)
    return torch.nn.Sequential(*layers).requires_grad_(False)


@pytest.mark.filterwarnings("ignore")  # of Flax, about what qwix uses
@pytest.mark.parametrize("keys", [SYMMETRIC, {"granularity": 16, "quant_scheme": "affine"}])
@pytest.mark.parametrize("bits", [8, 4])
def test_qwix_computes_nearly_what_ptq_does(bits, keys):
    qwix = pytest.importorskip("qwix", reason="qwix is not installed")
    from purepruning_interop.linen.qwix import to_qwix_rules

    net = Net()
    params = net.init(jax.random.key(0), X)["params"]
    rules = {"quant_types": ["weight"], "quant_bits": bits, "op_names": ["first"]} | keys
    config = pp.resolve_quantization(rules, linen.layers(net, params, X))
    model = qwix.quantize_model(net, qwix.PtqProvider(to_qwix_rules(config)))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        abstract = jax.eval_shape(model.init, jax.random.key(0), X)["params"]
        assert type(abstract["last"]["kernel"]) is jax.ShapeDtypeStruct  # not selected
        found = model.apply({"params": qwix.quantize_params(params, abstract)}, X)
    wanted = net.apply({"params": ptq.weights(params, None, config)}, X)
    plain = net.apply({"params": params}, X)
    off, error = (jnp.abs(y - plain).max() for y in (found, wanted))
    assert 0 < off < 2 * error  # scales differ a little
    assert jnp.abs(found - wanted).max() < 2 * error


@pytest.mark.filterwarnings("ignore")  # torchao's own, at its import
@pytest.mark.parametrize("keys", [SYMMETRIC, {"granularity": 16, "quant_scheme": "affine"}])
@pytest.mark.parametrize("bits", [8, 4])
def test_torchao_computes_nearly_what_ptq_does(bits, keys):
    ao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    from purepruning_interop.torch.torchao import to_torchao_config

    model, x = torch_net(), torch.tensor(X)
    rule = {"quant_types": ["weight"], "quant_bits": bits, "op_names": ["0"]} | keys
    config = pp.resolve_quantization(rule, ppt.layers(model))
    params = dict(model.named_parameters())
    wanted, _ = ppt.replace(model, x, at={}, params=ptq.weights(params, None, config))
    plain, last = model(x), model[2].weight
    ao.quantize_(model, to_torchao_config(config), filter_fn=None)
    assert model[2].weight is last  # not selected
    found = model(x)
    off, error = ((y - plain).abs().max() for y in (found, wanted))
    assert 0 < off < 2 * error
    assert (found - wanted).abs().max() < 2 * error


@pytest.mark.filterwarnings("ignore")
def test_what_they_have_not_is_refused():
    pytest.importorskip("qwix", reason="qwix is not installed")
    pytest.importorskip("torchao", reason="torchao is not installed")
    from purepruning_interop.linen.qwix import to_qwix_rules
    from purepruning_interop.torch.torchao import to_torchao_config

    layers = ppt.layers(torch_net())
    weight = {"quant_types": ["weight"], "quant_bits": 3}
    output = {"quant_types": ["weight", "output"], "quant_bits": 8}
    with raises(ValueError, "'0:weight' has 3 bits", "2, 4 and 8"):
        to_qwix_rules(pp.resolve_quantization(weight, layers))
    for convert in (to_qwix_rules, to_torchao_config):
        with raises(ValueError, convert.__name__, "'0:output'"):
            convert(pp.resolve_quantization(output, layers))
    with raises(ValueError, "'0' is a Linear of 12"):
        to_torchao_config(pp.resolve_quantization(weight | {"quant_bits": 12}, layers))
