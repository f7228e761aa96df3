import dataclasses
import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import purepruning as pp
from purepruning import NM, Block, Config, Layer, arrays, count_of, resolve
from purepruning.config import rules
from purepruning.config.rules import Gradual
from purepruning.selection import prune
from tests.messages import raises

TABLE = (
    Layer("conv1", "Conv2d", "conv1.w", (3, 3, 3, 16), (3,), (2,), class_name="Conv"),
    Layer("block.conv2", "Conv2d", "conv2.w", (3, 3, 16, 10), (3,), (2,), class_name="Conv"),
    Layer("block.bn", "BatchNorm", "bn.w", (10,), (0,), class_name="BatchNorm"),
    Layer("fc1", "Linear", "fc1.w", (40, 25), (1,), (0,), class_name="Dense", aliases=("tied",)),
    Layer("fc2", "Linear", "fc2.w", (25, 7), (1,), (0,), class_name="Dense"),
    Layer("scan", "Linear", "scan.w", (6, 8, 5), (2,), (1,), stack_axes=(0,), class_name="Dense"),
)
SIZES = {x.name: int(np.prod(x.shape)) for x in TABLE}
ANY = {"op_types": ["default"]}


def selected(*rules, **options):
    """Names of the layers that ``rules`` prune, in the order of the config."""
    return [layer.name for layer in resolve(rules, TABLE, **options).layers]


# Counts.


@given(st.integers(1, 2**31 - 1).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))))
def test_the_fraction_of_a_count_gives_the_count(n_and_k):
    n, k = n_and_k
    assert count_of(k / n, n) == k
    # One minus a density is rounded twice, and float noise never costs a unit either.
    assert count_of(1 - (n - k) / n, n) == k


@given(st.integers(0, 10**6), st.integers(1, 10**6))
def test_decimals_mean_what_they_say(millionths, n):
    """The largest k with k / n <= sparsity, where the sparsity is taken as it is written."""
    exact = Fraction(millionths, 10**6) * n
    assert count_of(millionths / 10**6, n) == exact.numerator // exact.denominator


@given(st.floats(0, 1), st.integers(1, 2**31 - 1))
def test_any_float_is_the_largest_count_up_to_noise(sparsity, n):
    k, noise = count_of(sparsity, n), Fraction(1, 10**14)
    assert 0 <= k <= n
    assert Fraction(k, n) <= Fraction(sparsity) + noise
    assert k == n or Fraction(k + 1, n) > Fraction(sparsity)


@pytest.mark.parametrize(
    ("sparsity", "n", "count"),
    [
        (0, 10, 0),
        (1, 10, 10),
        (0.29, 100, 29),  # int(0.29 * 100) is 28
        (0.57, 100, 57),
        (0.58, 50, 29),
        (0.7, 10, 7),
        (1 - 0.9, 10, 1),  # 0.09999999999999998
        (0.1 + 0.2, 10, 3),
        (0.999, 10, 9),
        (0.55, 9, 4),
        (0.5, 1, 0),
        (0.8, 0, 0),
    ],
)
def test_counts_by_hand(sparsity, n, count):
    assert count_of(sparsity, n) == count


def test_numbers_of_lower_precision_mean_their_decimals():
    config = resolve(
        [ANY | {"sparsity": np.float32(0.7)}], TABLE[1:2], granularity="output_channel"
    )
    assert config.counts == {"block.conv2": 7}  # float32 0.7 is 0.69999999
    for sweep in (
        np.linspace(0, 1, 11, dtype=np.float32)[:-1],
        jnp.linspace(0, 1, 11)[:-1],
        np.linspace(0, 1, 11)[:-1].astype(np.float16),
        [x / 10 for x in range(10)],
    ):
        counts = config.with_sparsity(sweep).counts["block.conv2"]
        assert counts.tolist() == list(range(10))
        assert counts.dtype == np.int32


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))))
def test_a_fraction_in_float32_gives_the_count_too(n_and_k):
    n, k = n_and_k
    some = rules.fraction(np.float32(k / n), "sparsity")
    assert count_of(some, n) == k
    assert count_of(np.float32(k / n), n) == k
    # One place off, as after a little arithmetic.
    for other in (np.nextafter(np.float32(k / n), np.float32(x)) for x in (0, 1)):
        assert count_of(other, n) == k


# Selection.


@pytest.mark.parametrize(
    ("rule", "names"),
    [
        ({"op_types": ["Conv2d"]}, ["block.conv2", "conv1"]),
        ({"op_types": "Conv2d"}, ["block.conv2", "conv1"]),
        ({"op_types": ("Conv", "Dense")}, ["block.conv2", "conv1", "fc1", "fc2", "scan"]),
        ({"op_types": ["default"]}, ["block.conv2", "conv1", "fc1", "fc2", "scan"]),
        ({"op_types": "default"}, ["block.conv2", "conv1", "fc1", "fc2", "scan"]),
        ({"op_types": ["default", "BatchNorm2d"]}, sorted(SIZES)),
        ({"op_types": ["BatchNorm1d"]}, ["block.bn"]),
        ({"op_types": ["BatchNorm"]}, ["block.bn"]),
        ({"op_names": ["fc2", "conv1"]}, ["conv1", "fc2"]),
        ({"op_names": "tied"}, ["fc1"]),
        ({"op_partial_names": ["conv"]}, ["block.conv2", "conv1"]),
        ({"op_partial_names": ["block."]}, ["block.bn", "block.conv2"]),
        ({"op_partial_names": "tie"}, ["fc1"]),
        ({"op_names_re": r"fc\d"}, ["fc1", "fc2"]),
        ({"op_names_re": ["conv", r".*conv2$"]}, ["block.conv2", "conv1"]),
        ({"op_names_re": [".*"], "op_types": ["Conv2d"]}, ["block.conv2", "conv1"]),
        ({"op_names_re": ["ti"]}, ["fc1"]),
        ({}, ["block.conv2", "conv1", "fc1", "fc2", "scan"]),
        ({"op_types": ["Conv2d"], "op_partial_names": ["block"]}, ["block.conv2"]),
        ({"op_types": ["Linear"], "op_names": ["fc1", "fc2"], "op_partial_names": ["2"]}, ["fc2"]),
    ],
)
def test_a_rule_selects_what_satisfies_all_its_selectors(rule, names):
    assert selected(rule) == names


@pytest.mark.parametrize(
    ("rules", "names"),
    [
        ([ANY, {"op_types": ["Linear"], "exclude": True}], ["block.conv2", "conv1"]),
        ([{"op_types": ["Linear"], "exclude": True}, ANY], selected(ANY)),
        ([ANY, {"op_types": ["Linear"], "exclude": False}], selected(ANY)),
        (
            [ANY, {"op_types": ["Linear"], "exclude": True}, {"op_names": ["fc2"]}],
            ["block.conv2", "conv1", "fc2"],
        ),
        ([ANY, {"op_names": ["tied"], "exclude": True}], sorted({*selected(ANY)} - {"fc1"})),
        ([ANY, ANY | {"exclude": True}], []),
        ([{"op_names": ["fc1"], "exclude": True}], []),
        ([], []),
    ],
)
def test_later_rules_win_and_exclude_means_what_it_says(rules, names):
    assert sorted(selected(*rules)) == names


def test_a_later_rule_takes_layers_from_an_earlier_one():
    config = resolve([ANY | {"sparsity": 0.5}, {"op_names": ["fc1"], "sparsity": 0.2}], TABLE)
    assert config.counts == {"block.conv2": 720, "conv1": 216, "fc2": 87, "scan": 20, "fc1": 200}
    assert [pool.rule for pool in config.pools] == [0, 0, 0, 0, 1]


def test_nothing_is_mutated_and_iterators_are_read_once():
    rule = {"op_types": ["Conv2d"], "sparsity": 0.5}
    before = {"op_types": ["Conv2d"], "sparsity": 0.5}
    assert resolve((r for r in [rule]), iter(TABLE)) == resolve([rule], TABLE)
    assert rule == before


# Keys.

#: Every key a rule can have, with a value and the options it has a meaning under.
KEYS = {
    "op_types": ({"op_types": ["Conv2d"]}, {}),
    "op_names": ({"op_names": ["conv1"]}, {}),
    "op_partial_names": ({"op_partial_names": ["conv"]}, {}),
    "op_names_re": ({"op_names_re": ["conv"]}, {}),
    "sparsity": (ANY | {"sparsity": 0.5}, {}),
    "sparsity_per_layer": (ANY | {"sparsity_per_layer": 0.5}, {}),
    "total_sparsity": (ANY | {"total_sparsity": 0.5}, {"scope": "global"}),
    "max_sparsity_per_layer": (ANY | {"max_sparsity_per_layer": 0.9}, {"scope": "global"}),
    "exclude": (ANY | {"exclude": True}, {}),
    "allow_empty": (ANY | {"allow_empty": True, "sparsity": 1}, {}),
    "initial_sparsity": (ANY | {"initial_sparsity": 0, "final_sparsity": 0.5}, {}),
    "final_sparsity": (ANY | {"final_sparsity": 0.5}, {}),
    "start_epoch": (ANY | {"final_sparsity": 0.5, "start_epoch": 3}, {}),
    "end_epoch": (ANY | {"final_sparsity": 0.5, "end_epoch": 3}, {}),
    "frequency": (ANY | {"final_sparsity": 0.5, "frequency": 3}, {}),
    "prune_iterations": (ANY | {"sparsity": 0.5, "prune_iterations": 3}, {}),
}


def test_every_key_is_accepted():
    assert KEYS.keys() | {"units"} == set(rules._KEYS)  # that one is for couplings
    for key, (rule, options) in KEYS.items():
        assert key in rule
        assert isinstance(resolve([rule], TABLE, **options), Config)


@pytest.mark.parametrize("key", ["sparsity", "sparsity_per_layer", "final_sparsity"])
@pytest.mark.parametrize("value", [0, 0.0, 0.3, np.float64(0.3), np.float32(0.5), np.int64(0)])
def test_sparsity_per_layer(key, value):
    config = resolve([ANY | {key: value}], TABLE)
    assert config.counts == {
        x.name: int(float(value) * SIZES[x.name] / (6 if x.name == "scan" else 1))
        for x in TABLE
        if x.name != "block.bn"
    }


@pytest.mark.parametrize("key", ["sparsity", "total_sparsity", "final_sparsity"])
def test_sparsity_of_all_layers_together(key):
    config = resolve([ANY | {key: 0.3}], TABLE, scope="global")
    total = sum(SIZES.values()) - 10
    assert config.counts == {"rule 0": int(0.3 * total)}
    (pool,) = config.pools
    assert (pool.name, pool.size, pool.rule) == ("rule 0", total, 0)
    assert pool.caps == (1425, 427, 990, 173, 39)


@pytest.mark.parametrize(
    ("granularity", "counts"),
    [
        ("output_channel", {"block.conv2": 5, "conv1": 8, "fc1": 12, "fc2": 3, "scan": 2}),
        ("out_channel", {"block.conv2": 5, "conv1": 8, "fc1": 12, "fc2": 3, "scan": 2}),
        ("input_channel", {"block.conv2": 8, "conv1": 1, "fc1": 20, "fc2": 12, "scan": 4}),
        ("in_channel", {"block.conv2": 8, "conv1": 1, "fc1": 20, "fc2": 12, "scan": 4}),
        (Block((4, 2)), {"block.conv2": 108, "conv1": 36, "fc1": 70, "fc2": 13, "scan": 4}),
    ],
    ids=str,
)
def test_counts_are_of_units(granularity, counts):
    assert resolve([ANY | {"sparsity": 0.5}], TABLE, granularity=granularity).counts == counts


def test_caps_are_of_units_of_each_stacked_layer():
    def caps(value):
        rule = ANY | {"max_sparsity_per_layer": value, "allow_empty": value == 1}
        config = resolve([rule], TABLE, scope="global", granularity="output_channel")
        return dict(zip((x.name for x in config.layers), config.pools[0].caps, strict=True))

    assert caps(0.5) == {"block.conv2": 5, "conv1": 8, "fc1": 12, "fc2": 3, "scan": 2}
    assert caps(1) == {"block.conv2": 10, "conv1": 16, "fc1": 25, "fc2": 7, "scan": 5}
    assert caps({"fc2": 0.3, "tied": 0}) == {
        "block.conv2": 9,
        "conv1": 15,
        "fc1": 0,
        "fc2": 2,
        "scan": 4,
    }


def test_a_budget_that_the_caps_do_not_reach_is_an_error():
    layers = TABLE[3:5]  # 1000 and 175 weights: caps of 500 and 87
    rule = ANY | {"max_sparsity_per_layer": 0.5}
    config = resolve([rule | {"sparsity": 587 / 1175}], layers, scope="global")
    assert config.counts == {"rule 0": 587}
    with raises(ValueError, "rule 0", "sparsity", "588", "1175", "587", "max_sparsity_per_layer"):
        resolve([rule | {"sparsity": 588 / 1175}], layers, scope="global")
    with raises(ValueError, "'rule 0'", "588", "587", "max_sparsity_per_layer"):
        config.with_sparsity(588 / 1175)
    # By default one in a hundred stays: 990 and 173.
    config = resolve([ANY | {"sparsity": 0.98}], layers, scope="global")
    assert config.counts == {"rule 0": 1151}
    with raises(ValueError, "1164", "1163", "0.99"):
        config.with_sparsity(0.991)
    # Of channels, 12 of 40 weights and 3 of 25.
    options = {"scope": "global", "granularity": "output_channel"}
    assert resolve([rule | {"sparsity": 555 / 1175}], layers, **options).counts == {"rule 0": 555}
    with raises(ValueError, "556", "555"):
        resolve([rule | {"sparsity": 556 / 1175}], layers, **options)
    # Of tiles of 4 x 10 the last row of fc1 is 1 x 10: 14 of 28 tiles have at most 560 weights.
    options = {"scope": "global", "granularity": Block((4, 10))}
    resolve([rule | {"sparsity": 560 / 1000}], layers[:1], **options)
    with raises(ValueError, "561", "560"):
        resolve([rule | {"sparsity": 561 / 1000}], layers[:1], **options)


def test_gradual_keys_are_for_a_schedule_to_read():
    agp = {
        "initial_sparsity": 0,
        "final_sparsity": 0.8,
        "start_epoch": 0,
        "end_epoch": 10,
        "frequency": 1,
    }
    config = resolve([{"op_names": ["fc2"]} | agp], TABLE)
    assert config.counts == {"fc2": 140}
    assert config.pools[0].gradual == Gradual(0.0, 0.8, 0, 10, 1)
    short = resolve([{"op_names": ["fc2"], "sparsity": 0.6, "start_epoch": 4}], TABLE)
    assert short.pools[0].gradual == Gradual(None, 0.6, 4, None, None)
    assert resolve([{"op_names": ["fc2"], "sparsity": 0.6}], TABLE).pools[0].gradual is None


def test_prune_iterations_are_kept():
    config = resolve([ANY | {"sparsity": 0.8, "prune_iterations": 5}], TABLE)
    assert {pool.prune_iterations for pool in config.pools} == {5}
    same = {"prune_iterations": 5, "sparsity": 0.5}
    resolve([ANY | same, {"op_names": ["fc1"]} | same], TABLE)
    resolve([ANY | same, {"op_names": ["fc1"], "sparsity": 0.5}], TABLE)
    with raises(ValueError, "prune_iterations", "[4, 5]"):
        resolve([ANY | same, {"op_names": ["fc1"]} | same | {"prune_iterations": 4}], TABLE)


@pytest.mark.parametrize("key", ["quant_types", "quant_bits", "quant_start_step"])
def test_rules_for_quantizers_go_elsewhere(key):
    with raises(ValueError, "rule 0", repr(key), "pp.resolve_quantization"):
        resolve([ANY | {key: 8}], TABLE)


# Errors: the rule's number, the key, what came, and the nearest names.

WITH_NUMBER = [
    ({"op_types": ["Conv2d"], "sparsty": 0.5}, ValueError, ("'sparsty'", "nearest: 'sparsity'")),
    ({"op_types": ["Conv2d"], 5: 0.5}, ValueError, ("unknown key 5",)),
    ({"exclude": True}, ValueError, ("op_types", "op_names", "op_partial_names", "op_names_re")),
    ({"op_names_re": ["fc(1"]}, ValueError, ("op_names_re", "'fc(1'", "no regular expression")),
    ({"op_names_re": ["fcc\\d"]}, ValueError, ("op_names_re", "nearest: 'fc")),
    ({"op_names_re": [r"conv2$"]}, ValueError, ("op_names_re", "'block.conv2'", "put '.*' before")),
    ({"op_names_re": [3]}, TypeError, ("op_names_re", "list of strings")),
    (ANY | {"sparse_ratio": 0.5}, ValueError, ("'sparse_ratio'", "'sparsity'", "pp.from_nni")),
    (ANY | {"granularity": "in_channel"}, ValueError, ("'granularity'", "resolve", "NNI 3.0")),
    (ANY | {"exclude_op_names": ["a"]}, ValueError, ("'exclude_op_names'", "'exclude': True")),
    (ANY | {"exclude": 1}, TypeError, ("exclude", "1")),
    (ANY | {"allow_empty": "yes"}, TypeError, ("allow_empty", "'yes'")),
    (ANY | {"exclude": True, "sparsity": 0.5}, ValueError, ("excludes", "'sparsity'")),
    (
        ANY | {"sparsity": 0.5, "sparsity_per_layer": 0.5},
        ValueError,
        ("'sparsity'", "'sparsity_per_layer'"),
    ),
    ({"op_types": []}, ValueError, ("op_types", "empty")),
    ({"op_types": 3}, TypeError, ("op_types", "list of strings", "3")),
    ({"op_names": ["fc1", 3]}, TypeError, ("op_names", "list of strings", "['fc1', 3]")),
    ({"op_names": {"fc1"}}, TypeError, ("op_names", "list of strings")),
    ({"op_types": ["Conv3d"]}, ValueError, ("op_types", "'Conv3d'", "'Conv2d'", "'Linear'")),
    ({"op_types": ["Convv"]}, ValueError, ("op_types", "'Convv'", "nearest: 'Conv")),
    ({"op_types": ["default", "RNN"]}, ValueError, ("op_types", "'RNN'")),
    ({"op_types": ["relu"]}, ValueError, ("op_types", "'relu'")),
    ({"op_names": ["fc3"]}, ValueError, ("op_names", "'fc3'", "nearest: 'fc")),
    ({"op_names": ["block"]}, ValueError, ("op_names", "'block'", "block.", "op_partial_names")),
    ({"op_partial_names": ["blok"]}, ValueError, ("op_partial_names", "'blok'", "part of a name")),
    (
        {"op_types": ["Conv2d"], "op_names": ["fc1"]},
        ValueError,
        ("op_types=['Conv2d']", "op_names=['fc1']"),
    ),
    (ANY | {"sparsity": -0.1}, ValueError, ("sparsity", "[0, 1]", "-0.1")),
    (ANY | {"sparsity": 1.5}, ValueError, ("sparsity", "[0, 1]", "1.5")),
    (ANY | {"sparsity": float("nan")}, ValueError, ("sparsity", "nan")),
    (ANY | {"sparsity": 1}, ValueError, ("sparsity", "1", "allow_empty")),
    (ANY | {"sparsity": 1 - 1e-16}, ValueError, ("sparsity", "0.9999999999999999", "allow_empty")),
    (ANY | {"sparsity": "0.5"}, TypeError, ("sparsity", "'0.5'")),
    (ANY | {"sparsity": True}, TypeError, ("sparsity", "True")),
    (ANY | {"sparsity": None}, TypeError, ("sparsity", "None")),
    (ANY | {"sparsity": [0.5]}, TypeError, ("sparsity", "[0.5]")),
    (ANY | {"total_sparsity": 0.5}, ValueError, ("total_sparsity", "'global'", "'layer'")),
    (ANY | {"max_sparsity_per_layer": 0.5}, ValueError, ("max_sparsity_per_layer", "'global'")),
    (ANY | {"initial_sparsity": 0.5}, ValueError, ("final_sparsity",)),
    (ANY | {"start_epoch": 1}, ValueError, ("final_sparsity",)),
    (
        ANY | {"initial_sparsity": 0.5, "final_sparsity": 0.4},
        ValueError,
        ("initial_sparsity", "0.5", "final_sparsity", "0.4"),
    ),
    (ANY | {"initial_sparsity": -1, "sparsity": 0.4}, ValueError, ("initial_sparsity", "-1")),
    (ANY | {"sparsity": 0.4, "start_epoch": -1}, ValueError, ("start_epoch", "0", "-1")),
    (ANY | {"sparsity": 0.4, "start_epoch": 0.5}, TypeError, ("start_epoch", "0.5")),
    (
        ANY | {"sparsity": 0.4, "start_epoch": 5, "end_epoch": 4},
        ValueError,
        ("end_epoch", "5", "4"),
    ),
    (ANY | {"sparsity": 0.4, "frequency": 0}, ValueError, ("frequency", "1", "0")),
    (ANY | {"sparsity": 0.4, "frequency": True}, TypeError, ("frequency", "True")),
    (ANY | {"sparsity": 0.4, "prune_iterations": 0}, ValueError, ("prune_iterations", "1", "0")),
    (ANY | {"sparsity": 0.4, "prune_iterations": 2.0}, TypeError, ("prune_iterations", "2.0")),
    ([("op_types", "default")], TypeError, ("dictionary", "list")),
    ("default", TypeError, ("dictionary", "str")),
]


@pytest.mark.parametrize(("rule", "error", "parts"), WITH_NUMBER, ids=lambda x: str(x)[:60])
def test_mistakes_in_a_rule(rule, error, parts):
    with raises(error, "rule 0", *parts):
        resolve([rule], TABLE)
    with raises(error, "rule 1", *parts):
        resolve([ANY, rule], TABLE)


@pytest.mark.parametrize(
    ("rule", "error", "parts"),
    [
        (ANY | {"sparsity_per_layer": 0.5}, ValueError, ("sparsity_per_layer", "'layer'")),
        (ANY | {"max_sparsity_per_layer": 1.5}, ValueError, ("max_sparsity_per_layer", "1.5")),
        (ANY | {"max_sparsity_per_layer": "a"}, TypeError, ("max_sparsity_per_layer", "'a'")),
        (
            ANY | {"max_sparsity_per_layer": {"fc3": 0.5}},
            ValueError,
            ("max_sparsity_per_layer", "'fc3'", "nearest: 'fc"),
        ),
        (
            ANY | {"max_sparsity_per_layer": {"block.bn": 0.5}},
            ValueError,
            ("max_sparsity_per_layer", "'block.bn'"),
        ),
        (
            ANY | {"max_sparsity_per_layer": {"fc1": -1}},
            ValueError,
            ("max_sparsity_per_layer['fc1']", "-1"),
        ),
        (ANY | {"sparsity": 1, "allow_empty": True}, ValueError, ("max_sparsity_per_layer",)),
    ],
)
def test_mistakes_in_global_scope(rule, error, parts):
    with raises(error, "rule 0", *parts):
        resolve([rule], TABLE, scope="global")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"scope": "model"}, ("scope", "'layer'", "'global'", "'model'")),
        ({"bias": True}, ("bias", "'follow'", "'keep'", "True")),
        ({"granularity": "filter"}, ("granularity", "'output_channel'", "'filter'")),
        ({"granularity": 3}, ("granularity", "3")),
        ({"granularity": (2, 2)}, ("granularity", "Block", "(2, 2)")),
    ],
)
def test_mistakes_in_options(options, parts):
    with raises(ValueError, *parts):
        resolve([ANY], TABLE, **options)


def test_mistakes_in_the_arguments_themselves():
    for wrong in ("default", True, None):
        with raises(TypeError, "rules", "list of dictionaries", "sparsity", repr(wrong)):
            resolve(wrong, TABLE)
    for wrong in (1.5, -1, np.float32(3)):
        with raises(ValueError, "rule 0", "sparsity", "[0, 1]", repr(wrong)):
            resolve(wrong, TABLE)
    with raises(TypeError, "every row must be a Layer", "'fc1'"):
        resolve([ANY], [*TABLE, "fc1"])
    for field in ("name", "weight"):
        twin = dataclasses.replace(TABLE[0], **{field: getattr(TABLE[1], field)})
        with raises(ValueError, f"two rows have the {field}", getattr(TABLE[1], field)):
            resolve([ANY], [*TABLE[1:], twin])


@pytest.mark.parametrize("granularity", ["element", "output_channel", "input_channel"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_sparsity_stands_for_the_default_layers(granularity, scope):
    options = {"granularity": granularity, "scope": scope}
    expected = resolve([ANY | {"sparsity": 0.5}], TABLE, **options)
    for said in (0.5, np.float32(0.5), jnp.float32(0.5), {"sparsity": 0.5}, [{"sparsity": 0.5}]):
        assert resolve(said, TABLE, **options) == expected
    assert resolve(0, TABLE, **options).counts == dict.fromkeys(expected.counts, 0)


def test_a_later_rule_takes_layers_out_of_the_default():
    config = resolve([{"sparsity": 0.5}, {"op_names_re": ["fc"], "exclude": True}], TABLE)
    assert [x.name for x in config.layers] == ["block.conv2", "conv1", "scan"]


def test_the_default_types():
    kinds = ["Conv3d", "ConvTranspose1d", "Linear", "Embedding", "MultiheadAttention", "LSTM"]
    norms = ["BatchNorm2d", "LayerNorm", "GroupNorm", "RMSNorm"]
    table = [Layer(kind, kind, kind, (4, 4), (0,), (1,)) for kind in [*kinds, "GRU", "RNN"]]
    table += [Layer(kind, kind, kind, (4,), (0,)) for kind in norms]
    table += [Layer("own", "Mine", "own", (4, 4), class_name="Mine")]
    expected = sorted([*kinds, "GRU", "RNN"])
    assert [x.name for x in resolve(0.5, table).layers] == expected
    assert [x.name for x in resolve([ANY], table).layers] == expected


def test_the_default_leaves_out_layers_without_such_units():
    table = [*TABLE, Layer("words", "Embedding", "words", (20, 8), (1,))]
    table += [Layer("act", "PReLU", "act", (16,), (0,)), Layer("none", "Linear", "n", (0, 8))]
    names = ["act", *selected(ANY), "words"]
    assert [x.name for x in resolve(0.5, table).layers] == names
    grouped = {"granularity": "input_channel"}
    assert [x.name for x in resolve(0.5, table, **grouped).layers] == selected(ANY)
    tiled = {"granularity": Block((2, 2))}
    assert [x.name for x in resolve(0.5, table, **tiled).layers] == [*selected(ANY), "words"]
    fc = [x for x in table if x.name in ("words", "scan")]
    assert [x.name for x in resolve(0.5, fc, granularity=NM(2, 4)).layers] == ["scan"]
    # A rule that names them is wrong.
    with raises(ValueError, "'words'", "input_channel"):
        resolve([ANY], table[:-2], **grouped)
    with raises(ValueError, "rule 0", "'BatchNorm'", "op_types", "op_names"):
        resolve(0.5, TABLE[2:3])
    with raises(ValueError, "rule 0", "'Embedding'", "input_channel", "op_types"):
        resolve(0.5, table[-3:-2], **grouped)


def test_layers_without_such_units():
    norm = {"op_types": ["BatchNorm2d"]}
    with raises(ValueError, "rule 0", "'block.bn'", "BatchNorm", "(10,)", "input_channel"):
        resolve([norm], TABLE, granularity="input_channel")
    with raises(ValueError, "rule 0", "'block.bn'", "Block(shape=(2, 2))"):
        resolve([norm], TABLE, granularity=Block((2, 2)))
    with raises(ValueError, "rule 0", "'block.bn'", "NM(keep=2, of=4)", "input axis"):
        resolve([norm], TABLE, granularity=NM(2, 4))
    turned = Layer("up", "ConvTranspose2d", "w", (8, 2, 1, 1), (1,), (0,), groups=4, grouped="out")
    with raises(ValueError, "rule 0", "'up'", "contracts 2", "groups of 4", "exclude"):
        resolve([{"op_types": ["ConvTranspose2d"]}], [turned], granularity=NM(2, 4))
    resolve([{"op_types": ["ConvTranspose2d"]}], [turned], granularity=NM(1, 2))
    with raises(ValueError, "rule 0", "'conv1'", "3", "groups of 4", "exclude"):
        resolve([ANY], TABLE, granularity=NM(2, 4))
    with raises(ValueError, "rule 0", "2147483648", "2147483647", "rank larger units"):
        resolve([ANY], [Layer("huge", "Linear", "w", (2**16, 2**15), (1,), (0,))])


def test_nm_has_its_sparsity_from_keep_and_of():
    config = resolve([{"op_names": ["fc1"]}], TABLE, granularity=NM(1, 4))
    assert (config.counts, [x.name for x in config.layers]) == ({}, ["fc1"])
    resolve([{"op_names": ["fc1"], "sparsity": 0.75}], TABLE, granularity=NM(1, 4))
    with raises(ValueError, "scope", "'layer'", "NM(keep=1, of=4)"):
        resolve([{"op_names": ["fc1"]}], TABLE, scope="global", granularity=NM(1, 4))
    with raises(ValueError, "rule 0", "sparsity", "0.5", "NM(keep=1, of=4)", "0.75"):
        resolve([{"op_names": ["fc1"], "sparsity": 0.5}], TABLE, granularity=NM(1, 4))
    with raises(ValueError, "NM(keep=1, of=4)"):
        config.with_sparsity(0.75)
    with raises(ValueError, "NM(keep=1, of=4)"):
        config.with_counts({"fc1": 3})


def test_emptying_a_layer_has_to_be_asked_for():
    for granularity in ("element", "output_channel"):
        config = resolve([ANY | {"sparsity": 0.5}], TABLE, granularity=granularity)
        with raises(ValueError, "'block.conv2'", "allow_empty"):
            config.with_sparsity(1)
        asked = [ANY | {"sparsity": 1, "allow_empty": True}]
        config = resolve(asked, TABLE, granularity=granularity)
        assert config.counts == {pool.name: pool.size for pool in config.pools}
    rule = ANY | {"sparsity": 1.0, "max_sparsity_per_layer": 1.0}
    with raises(ValueError, "rule 0", "allow_empty"):
        resolve([rule], TABLE, scope="global")
    config = resolve([rule | {"allow_empty": True}], TABLE, scope="global")
    assert config.counts == {"rule 0": config.pools[0].size}


# Configs.


@pytest.fixture
def config():
    return resolve([ANY | {"sparsity": 0.5}], TABLE, granularity="output_channel")


def test_with_sparsity(config):
    assert config.with_sparsity(0.2).counts == {
        "block.conv2": 2,
        "conv1": 3,
        "fc1": 5,
        "fc2": 1,
        "scan": 1,
    }
    some = config.with_sparsity({"fc1": 0.2, "conv1": [0, 0.5]}).counts
    assert some["conv1"].tolist() == [0, 8]
    assert {**some, "conv1": 0} == {"block.conv2": 5, "conv1": 0, "fc1": 5, "fc2": 3, "scan": 2}
    assert config.with_sparsity(0.5) == config
    assert config.with_sparsity([0.2, 0.4]).counts["fc1"].tolist() == [5, 10]
    assert config.with_sparsity(np.asarray([0, 1]) / 2).counts["fc1"].tolist() == [0, 12]


def test_with_sparsity_gives_the_counts_that_resolve_gives():
    for scope in ("layer", "global"):
        for sparsity in (0, 0.1, 0.29, 0.7, 0.95):
            rules = [ANY | {"sparsity": sparsity}]
            fresh = resolve(rules, TABLE, scope=scope)
            changed = resolve([ANY], TABLE, scope=scope).with_sparsity(sparsity)
            assert changed.counts == fresh.counts


@pytest.mark.parametrize(
    ("sparsity", "error", "parts"),
    [
        (1.5, ValueError, ("'block.conv2'", "[0, 1]", "1.5")),
        (-0.5, ValueError, ("'block.conv2'", "-0.5")),
        (float("nan"), ValueError, ("'block.conv2'", "nan")),
        ([0.5, 1.5], ValueError, ("'block.conv2'", "1.5")),
        (1, ValueError, ("'block.conv2'", "allow_empty")),
        ([0.5, 1], ValueError, ("'block.conv2'", "allow_empty")),
        ("0.5", TypeError, ("'block.conv2'", "'0.5'")),
        (["0.5"], TypeError, ("'block.conv2'", "'0.5'")),
        (None, TypeError, ("'block.conv2'", "None")),
        (True, TypeError, ("'block.conv2'", "True")),
        ([True, False], TypeError, ("'block.conv2'", "True")),
        ([[0.5]], TypeError, ("'block.conv2'", "[0.5]")),
        ({"fc3": 0.5}, KeyError, ("'fc3'", "nearest: 'fc")),
        ({"fc1": 1.5}, ValueError, ("'fc1'", "1.5")),
    ],
    ids=str,
)
def test_mistakes_in_with_sparsity(config, sparsity, error, parts):
    with raises(error, *parts):
        config.with_sparsity(sparsity)


def test_with_counts(config):
    counts = {"block.conv2": 1, "conv1": 2, "fc1": 3, "fc2": 4, "scan": 0}
    assert config.with_counts(counts).counts == counts
    assert config.counts["fc1"] == 12
    with raises(KeyError, "'fc3'", "nearest: 'fc"):
        config.with_counts(counts | {"fc3": 1})
    with raises(KeyError, "'scan'"):
        config.with_counts({name: k for name, k in counts.items() if name != "scan"})


def test_a_config_is_a_pytree_of_its_counts(config):
    leaves, structure = jax.tree.flatten(config)
    assert leaves == [5, 8, 12, 3, 2]
    assert jax.tree.unflatten(structure, leaves) == config
    doubled = jax.tree.map(lambda k: 2 * k, config)
    assert doubled.counts["fc1"] == 24
    assert doubled.pools == config.pools
    assert jax.tree.structure(config.with_sparsity(0.1)) == structure
    assert hash(structure) == hash(jax.tree.structure(config.with_sparsity(0.3)))
    empty = resolve([ANY], TABLE)
    assert jax.tree.leaves(empty) == []
    assert set(empty.counts.values()) == {None}


def test_one_compiled_function_serves_every_sparsity(config):
    params = {x.weight: jnp.ones(x.shape) for x in TABLE}
    prune = jax.jit(functools.partial(pp.l1_norm, stats=None))
    for sparsity in (0.0, 0.1, 0.25, 0.5, 0.8):
        masks = prune(params, config=config.with_sparsity(sparsity))
        assert int(jnp.sum(~masks["fc1.w"])) == int(25 * sparsity)
    assert prune._cache_size() == 1
    fresh = resolve([ANY | {"sparsity": 0.5}], TABLE, granularity="output_channel")
    prune(params, config=fresh)
    assert prune._cache_size() == 1


def test_rules_resolved_again_at_another_sparsity_are_not_compiled_again():
    params = {x.weight: jnp.ones(x.shape) for x in TABLE}
    compiled = arrays._jitted(prune._masks, ("plan", "check"))
    sizes = []
    for sparsity in (0.1, 0.2, 0.3):
        config = resolve([ANY | {"final_sparsity": sparsity, "prune_iterations": 4}], TABLE)
        pp.level(params, None, config)
        sizes.append(compiled._cache_size())
    assert sizes[0] == sizes[1] == sizes[2]


def test_vmap_over_a_config_gives_the_masks_of_many_sparsities(config):
    params = {x.weight: jnp.ones(x.shape) for x in TABLE}
    sparsities = np.linspace(0, 0.9, 10)
    many = config.with_sparsity(sparsities)
    masks = jax.vmap(lambda c: pp.l1_norm(params, None, c))(many)
    assert masks["fc1.w"].shape == (10, 1, 25)
    for i, sparsity in enumerate(sparsities):
        one = pp.l1_norm(params, None, config.with_sparsity(sparsity))
        assert all(bool(jnp.all(masks[x.weight][i] == one[x.weight])) for x in config.layers)


def test_configs_are_frozen_values(config):
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.scope = "global"
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.pools[0].size = 3
    assert [x.name for x in config.layers] == ["block.conv2", "conv1", "fc1", "fc2", "scan"]


@given(st.permutations(TABLE), st.integers(0, 80))
def test_the_order_of_the_table_changes_nothing(table, percent):
    for scope in ("layer", "global"):
        options = {"scope": scope, "granularity": "output_channel"}
        rules = [ANY | {"sparsity": percent / 100}]
        assert resolve(rules, table, **options) == resolve(rules, TABLE, **options)
