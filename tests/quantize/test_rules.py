"""Rules for quantizers: every ``config_list`` of the founding documents, keys, and mistakes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
import torch

import purepruning as pp
from purepruning.layers import Activation
from purepruning.quantize import QuantizationConfig, bnn
from purepruning_interop import linen
from purepruning_interop import torch as interop_torch
from tests.messages import raises


class TorchNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 8, 3)
        self.relu1 = torch.nn.ReLU()
        self.conv2 = torch.nn.Conv2d(8, 10, 3)
        self.relu2 = torch.nn.ReLU()
        self.conv3 = torch.nn.Conv2d(10, 10, 1)
        self.relu6_1 = torch.nn.ReLU6()
        self.fc1 = torch.nn.Linear(160, 12)
        self.relu3 = torch.nn.ReLU()
        self.fc2 = torch.nn.Linear(12, 5)

    def forward(self, x):
        x = self.relu2(self.conv2(self.relu1(self.conv1(x))))
        x = self.relu6_1(self.conv3(x))
        return self.fc2(self.relu3(self.fc1(x.flatten(1))))


class FlaxNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), padding="VALID", name="conv1")(x))
        x = nn.relu(nn.Conv(10, (3, 3), padding="VALID", name="conv2")(x))
        x = nn.relu6(nn.Conv(10, (1, 1), name="conv3")(x))
        x = nn.relu(nn.Dense(12, name="fc1")(x.reshape(x.shape[0], -1)))
        return nn.Dense(5, name="fc2")(x)


def tables():
    net, x = FlaxNet(), jnp.zeros((1, 8, 8, 3))
    params = jax.eval_shape(net.init, jax.random.key(0), x)["params"]
    model = TorchNet()
    return {
        "torch": (interop_torch.layers(model), interop_torch.activations(model)),
        "flax": (linen.layers(net, params, x), linen.activations(net, params, x)),
    }


TABLES = tables()
frameworks = pytest.mark.parametrize("framework", TABLES)
LAYERS = ("conv1", "conv2", "conv3", "fc1", "fc2")
WEIGHTS = [f"{name}:weight" for name in LAYERS]

#: auptimizer's, as they stand in its document; no other of the five has quantizers.
SEEDS = {
    "naive": ([], {}),
    "qat": (
        [
            {
                "quant_types": ["weight"],
                "quant_bits": {"weight": 8},
                "op_types": ["Conv2d", "Linear"],
            },
            {
                "quant_types": ["output"],
                "quant_bits": 8,
                "quant_start_step": 7000,
                "op_types": ["ReLU6"],
            },
        ],
        dict.fromkeys((*WEIGHTS, "relu6_1:output"), 8),
    ),
    "dorefa": (
        [{"quant_types": ["weight"], "quant_bits": 8, "op_types": ["default"]}],
        dict.fromkeys(WEIGHTS, 8),
    ),
    "bnn": (
        [
            {
                "quant_bits": 1,
                "quant_types": ["weight"],
                "op_types": ["Conv2d", "Linear"],
                "op_names": ["conv1", "conv2", "fc1", "fc2"],
            },
            {
                "quant_bits": 1,
                "quant_types": ["output"],
                "op_types": ["relu"],
                "op_names": ["relu1", "relu2", "relu3"],
            },
        ],
        {f"{name}:weight": 1 for name in ("conv1", "conv2", "fc1", "fc2")}
        | {f"relu{i}:output": 1 for i in (1, 2, 3)},
    ),
}


def resolved(rules, framework="torch"):
    return pp.resolve_quantization(rules, *TABLES[framework])


@frameworks
@pytest.mark.parametrize("name", ["qat", "dorefa", "bnn"])
def test_seeds_select_the_same_of_both_models(name, framework):
    rules, bits = SEEDS[name]
    assert resolved(rules, framework).bits == bits


@frameworks
def test_the_empty_list_selects_nothing_and_warns(framework):
    with pytest.warns(UserWarning, match="no rules, so nothing is quantised"):
        assert resolved(SEEDS["naive"][0], framework) == QuantizationConfig()


@frameworks
def test_the_start_step_is_that_of_its_rule(framework):
    starts = {t.site: t.start_step for t in resolved(SEEDS["qat"][0], framework).targets}
    assert starts == dict.fromkeys(WEIGHTS, 0) | {"relu6_1:output": 7000}


@frameworks
def test_binarised_outputs_of_relus_are_constant_and_warned_of(framework):
    config = resolved(SEEDS["bnn"][0], framework)
    with pytest.warns(UserWarning, match=r"'relu1', 'relu2', 'relu3' is never negative"):
        at = bnn.activations(config)
    y, _ = at["relu1:output"](jnp.array([0.0, 2.0]))
    assert y.tolist() == [1, 1]
    reads = {"quant_types": ["input"], "quant_bits": 1, "op_types": ["ReLU"]}
    assert len(bnn.activations(resolved(reads, framework))) == 3  # those have both signs


def test_activations_are_named_alike():
    rows = {name: [(row.name, row.type) for row in table] for name, (_, table) in TABLES.items()}
    relus = [("relu1", "ReLU"), ("relu2", "ReLU"), ("relu6_1", "ReLU6"), ("relu3", "ReLU")]
    assert rows == {"torch": relus, "flax": relus}


ONE = {"op_names": ["fc1"]}


def targets(*rules):
    return {t.site: t for t in resolved(list(rules)).targets}


def test_rules_of_one_layer_merge_by_type():
    found = targets(
        ONE | {"quant_types": ["weight", "output"], "quant_bits": {"weight": 8, "output": 6}},
        ONE | {"quant_types": ["output", "input"], "quant_bits": 4, "quant_start_step": 5},
    )
    assert {site: (t.bits, t.start_step, t.rule) for site, t in found.items()} == {
        "fc1:weight": (8, 0, 0),
        "fc1:input": (4, 5, 1),
        "fc1:output": (4, 5, 1),
    }


def test_exclude_takes_all_types_or_those_it_names():
    both = {"op_types": ["Linear"], "quant_types": ["weight", "input"], "quant_bits": 8}
    assert list(targets(both, ONE | {"exclude": True})) == ["fc2:weight", "fc2:input"]
    rest = targets(both, ONE | {"exclude": True, "quant_types": ["input"]})
    assert list(rest) == ["fc1:weight", "fc2:weight", "fc2:input"]


def test_nni_3_names_are_understood():
    rule = {"target_names": ["_input_", "weight", "_output_"], "quant_dtype": "int8"}
    found = targets(ONE | rule | {"quant_scheme": "symmetric", "granularity": "default"})
    assert {s: (t.bits, t.dtype, t.scheme) for s, t in found.items()} == {
        f"fc1:{what}": (8, "int", "symmetric") for what in ("weight", "input", "output")
    }


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, (0, 255)),
        ({"quant_dtype": "int"}, (-127, 127)),
        ({"quant_scheme": "symmetric"}, (-127, 127)),
        ({"quant_scheme": "per_tensor_symmetric", "quant_dtype": "uint"}, (1, 255)),
        ({"quant_scheme": {"weight": "per_channel_affine"}, "quant_bits": 3}, (0, 7)),
        ({"quant_bits": 1}, (0, 1)),
        ({"quant_dtype": {"weight": "int"}, "quant_bits": 4}, (-7, 7)),
    ],
)
def test_ranges_of_integers(keys, expected):
    rule = ONE | {"quant_types": ["weight"], "quant_bits": 8} | keys
    assert targets(rule)["fc1:weight"].range == expected


def test_granularities():
    rule = ONE | {"quant_types": ["weight"], "quant_bits": 8}
    for keys, expected in [
        ({}, "tensor"),
        ({"quant_scheme": "per_channel_affine"}, "channel"),
        ({"granularity": "out_channel"}, "channel"),
        ({"granularity": 40}, 40),
    ]:
        assert targets(rule | keys)["fc1:weight"].granularity == expected


ANY = {"quant_types": ["weight"], "quant_bits": 8}
RELU = {"op_names": ["relu1"], "quant_bits": 8}
MISTAKES = [
    ({"quant_bit": 8}, ("unknown key 'quant_bit'", "nearest: 'quant_bits'")),
    ({"sparsity": 0.5}, ("unknown key 'sparsity'",)),
    ({"op_names": ["fc3"]}, ("op_names", "'fc3'", "'fc1'")),
    ({"op_types": ["Conv3d"]}, ("op_types", "'Conv3d'")),
    ({"quant_types": []}, ("quant_types is empty",)),
    ({"quant_types": ["wieght"]}, ("'wieght'", "nearest: 'weight'")),
    ({"quant_types": ["bias"]}, ("biases are not quantised", "leave 'bias' out")),
    ({"target_names": ["weight"]}, ("'quant_types' and 'target_names' say the same",)),
    ({"quant_bits": 0}, ("quant_bits must be at least 1, got 0",)),
    ({"quant_bits": 32}, ("quant_bits must be at most 24, got 32",)),
    ({"quant_bits": {"output": 8}}, ("quant_bits", "'output' is not in its quant_types")),
    ({"quant_types": ["weight", "input"], "quant_bits": {"weight": 8}}, ("nothing of 'input'",)),
    ({"quant_start_step": -1}, ("quant_start_step must be at least 0",)),
    ({"quant_scheme": "afine"}, ("quant_scheme", "'afine'", "'affine'")),
    ({"quant_dtype": "float8"}, ("quant_dtype must be 'int', 'uint'", "'float8'")),
    ({"quant_dtype": "int4"}, ("quant_bits is 8, but quant_dtype has 4",)),
    ({"quant_bits": 1, "quant_scheme": "symmetric"}, ("1 bit", "'quant_scheme': 'affine'")),
    ({"granularity": "in_channel"}, ("granularity", "'in_channel'", "a number of inputs")),
    (
        {"granularity": 7, "op_names": ["fc1"]},
        ("groups of 7 do not divide the 160 inputs", "'fc1'"),
    ),
    ({"quant_types": ["input"], "granularity": "channel"}, ("an input has one scale",)),
    ({"fuse_names": []}, ("'fuse_names' is a key of NNI 3.0", "fold_batch_norm")),
    ({"exclude": 1}, ("exclude must be True or False",)),
    (RELU, ("'relu1' is an activation function and has no weight",)),
]


@pytest.mark.parametrize(("keys", "parts"), MISTAKES, ids=[str(k)[:40] for k, _ in MISTAKES])
def test_mistakes_are_named(keys, parts):
    with raises((ValueError, TypeError), "rule 1", *parts):
        resolved([ANY, ANY | keys])


def test_what_is_no_rule():
    with raises(ValueError, "rule 0 does not say what to quantise", "'quant_types'"):
        resolved({"quant_bits": 8})
    with raises(ValueError, "rule 0 does not say how many bits", "'quant_bits'"):
        resolved({"quant_types": ["weight"]})
    with raises(TypeError, "rule 0 must be a dictionary"):
        resolved([3])
    with raises(TypeError, "activations: every row"):
        pp.resolve_quantization(ANY, TABLES["torch"][0], ["relu1"])
    rule = ANY | {"quant_types": ["output"], "op_types": ["ReLU"]}
    reads = "quantise the 'input' of the layer that reads it"
    with raises(ValueError, "'ReLU'", "activations(model, ...)", reads):
        pp.resolve_quantization(rule, TABLES["torch"][0])
    with raises(ValueError, "'GELU'", "they do not list", reads):
        resolved(rule | {"op_types": ["GELU"]})


def test_an_activation_function_owns_no_weight():
    target = pp.quantize.Target(Activation("relu1", "ReLU"), "weight", 8)
    with raises(TypeError, "target 'relu1:weight': layer", "the Layer that owns the weight"):
        pp.quantize.naive.weights({}, None, pp.quantize.QuantizationConfig((target,)))


def test_bits_that_a_quantizer_has_not():
    config = resolved(ANY | {"quant_bits": 1})
    for where, of in {
        "naive.weights": lambda: pp.quantize.naive.weights({}, None, config),
        "naive.levels": lambda: pp.quantize.naive.levels({}, config),
    }.items():
        with raises(ValueError, where, "rule 0 has 1 bit", "write 2 bits, or take bnn"):
            of()
    with raises(ValueError, "dorefa.activations: gradient_bits must be at most 24, got 25"):
        pp.quantize.dorefa.activations(config, key=0, gradient_bits=25)


def test_a_config_is_static_under_jit():
    config = resolved(ANY)
    assert jax.tree.leaves(config) == []
    assert hash(config) == hash(resolved(ANY))


def test_types_of_activations_ignore_case():
    assert Activation("a", "ReLU6", "relu6").has_type("RELU6")
    assert not Activation("a", "ReLU6", "relu6").has_type("relu")
