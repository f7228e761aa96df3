"""Config lists of NNI 3.0, read by ``from_nni``: against the same in rules written by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

import purepruning as pp
from purepruning import Block, Layer
from tests.coupling import models
from tests.messages import raises

TABLE = (
    Layer("conv1", "Conv2d", "conv1", (3, 3, 4, 10), (3,), (2,), bias="conv1b"),
    Layer("conv2", "Conv2d", "conv2", (3, 3, 10, 8), (3,), (2,)),
    Layer("norm", "BatchNorm2d", "norm", (10,), (0,)),
    Layer("head.fc1", "Linear", "fc1", (8, 20), (1,), (0,)),
    Layer("head.fc2", "Linear", "fc2", (20, 6), (1,), (0,)),
)
CONVS = {"op_types": ["Conv2d"]}
LINEARS = {"op_types": ["Linear"]}


def counts(config_list, name="level", **options):
    return pp.from_nni(name, config_list, TABLE, **options).config.counts


@pytest.mark.parametrize(
    ("config_list", "selected"),
    [
        ([CONVS], {"conv1": 180, "conv2": 360}),
        (
            [{"op_names": ["conv1"], "op_names_re": [r"head\..*"]}],
            {"conv1", "head.fc1", "head.fc2"},
        ),
        ([{"op_names_re": ["head"], "op_names": ["conv1"], **LINEARS}], {"head.fc1", "head.fc2"}),
        ([{"op_names_re": [r"conv\d"], "exclude_op_names": ["conv1"]}], {"conv2"}),
        (
            [{"op_types": ["Conv2d", "Linear"], "exclude_op_names_re": [".*1"]}],
            {"conv2", "head.fc2"},
        ),
        (
            [{"op_names_re": [".*"], "exclude_op_types": ["Conv2d", "BatchNorm2d"]}],
            {"head.fc1", "head.fc2"},
        ),
        # An exclusion is that of its entry only.
        ([{**CONVS, "exclude_op_names": ["conv1"]}, {"op_names": ["conv1"]}], {"conv1", "conv2"}),
    ],
)
def test_what_an_entry_selects(config_list, selected):
    found = counts([{"sparse_ratio": 0.5} | entry for entry in config_list])
    assert found.keys() == set(selected)
    if isinstance(selected, dict):
        assert found == selected


def test_the_first_entry_counts():
    ratios = [{"sparse_ratio": 0.25} | CONVS, {"sparse_ratio": 0.5, "op_names_re": [".*1"]}]
    assert counts(ratios) == {"conv1": 90, "conv2": 180, "head.fc1": 80}
    with raises(ValueError, "rule 2", "'conv1'", "first entry counts", "leave it out"):
        counts([*ratios, {"sparse_ratio": 0.5} | CONVS])


def test_settings_by_target():
    entry = {"target_settings": {"weight": {"sparse_ratio": 0.5, "granularity": "out_channel"}}}
    same = {"sparse_ratio": 0.5, "granularity": "out_channel"}
    for said in (entry, same, entry | same):
        recipe = pp.from_nni("level", [CONVS | said], TABLE)
        assert recipe.pruner is pp.l1_norm
        assert recipe.config == pp.resolve(
            [{"op_names": ["conv1", "conv2"], "sparsity": 0.5}], TABLE, granularity="output_channel"
        )
    with raises(ValueError, "rule 0", "sparse_ratio", "0.4", "0.5", "target_settings"):
        counts([CONVS | entry | {"sparse_ratio": 0.4}])


def test_biases_follow_unless_weights_are_the_only_target():
    entry = CONVS | {"sparse_ratio": 0.5}
    for targets, bias in ((["weight", "bias"], "follow"), (["weight"], "keep"), ("weight", "keep")):
        config = pp.from_nni("l1", [entry | {"target_names": targets}], TABLE).config
        assert config.bias == bias
    align = {"align": {"module_name": None, "target_name": "weight", "dims": [0]}}
    settings = {"bias": align | {"apply_method": "mul"}}
    assert counts([entry | {"target_settings": settings}]) == counts([entry])


@pytest.mark.parametrize(
    ("said", "granularity"),
    [
        ("default", "output_channel"),
        ("out_channel", "output_channel"),
        ("in_channel", "input_channel"),
        ("per_channel", "input_channel"),
        ([4, 2], Block((4, 2))),
        ([-1], Block((1, -1))),
    ],
)
def test_granularities(said, granularity):
    entry = LINEARS | {"sparse_ratio": 0.5, "granularity": said}
    assert pp.from_nni("l1", [entry], TABLE).config.granularity == granularity


def test_blocks_are_of_the_last_axes():
    entry = CONVS | {"sparse_ratio": 0.5, "granularity": [3, 3]}
    assert pp.from_nni("l1", [entry], TABLE).config.granularity == Block((1, 1, 3, 3))
    both = {"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.5, "granularity": [3, 3]}
    with raises(ValueError, "rule 0", "[2, 4]", "axes", "entry of their own"):
        pp.from_nni("l1", [both], TABLE)


def test_bounds_of_a_layer():
    bounds = {"min_sparse_ratio": 0.2, "max_sparse_ratio": 0.6}
    for ratio, expected in ((0.1, 72), (0.5, 180), (0.9, 216)):
        entry = {"op_names": ["conv1"], "sparse_ratio": ratio} | bounds
        assert counts([entry]) == {"conv1": expected}  # of 360


def test_global_groups():
    groups = [
        {"op_names": ["conv1"], "sparse_ratio": 0.5, "global_group_id": 7, "max_sparse_ratio": 0.6},
        {"op_names": ["head.fc1"], "sparse_ratio": 0.25, "global_group_id": "b"},
        {"op_names": ["conv2"], "sparse_ratio": 0.5, "global_group_id": 7},
    ]
    config = pp.from_nni("level", groups, TABLE).config
    expected = pp.resolve(
        [
            {
                "op_names": ["conv1", "conv2"],
                "sparsity": 0.5,
                "max_sparsity_per_layer": {"conv1": 0.6},
            },
            {"op_names": ["head.fc1"], "sparsity": 0.25},
        ],
        TABLE,
        scope="global",
    )
    assert config == expected
    with raises(ValueError, "rules 0 and 1", "sparse_ratio"):
        counts([groups[0], groups[1] | {"global_group_id": 7}])
    with raises(ValueError, "rules 0 and 1", "global_group_id", "pp.merge_masks"):
        counts([groups[0], LINEARS | {"sparse_ratio": 0.5}])
    with raises(ValueError, "rule 0", "min_sparse_ratio", "global_group_id"):
        counts([groups[0] | {"min_sparse_ratio": 0.1}])


def test_dependency_groups_are_found_by_the_coupling():
    shapes = {k: jnp.zeros(s) for k, s in models.Added.shapes.items()}
    coupling = pp.couple(models.Added.fn, shapes, models.Added.x)
    entries = [{"op_names": ["one", "two"], "sparse_ratio": 0.3, "dependency_group_id": "a"}]
    recipe = pp.from_nni("l1", entries, models.Added.layers, coupling=coupling)
    assert recipe.config.counts == {"one + two": 3}
    # The outputs of the model are no part of it.
    all_of_them = [{"op_names_re": [".*"], "sparse_ratio": 0.3}]
    recipe = pp.from_nni("l1", all_of_them, models.Added.layers, coupling=coupling)
    assert recipe.config.counts == {"one + two": 3}
    assert [x.layers for x in recipe.config.kept_whole] == [("fc",)]
    for key, value in (("dependency_group_id", 1), ("internal_metric_block", 2)):
        with raises(ValueError, "rule 0", key, "coupling=pp.couple("):
            counts([CONVS | {"sparse_ratio": 0.5, key: value}], "l1")


def test_gradual_lists_of_3():
    entries = [{"op_names": ["conv1"], "sparse_ratio": 0.8}]
    recipe = pp.from_nni("agp", entries, TABLE, pruning_algorithm="level", total_iteration=4)
    # NNI 3.0: 1 - (1 - t / T)^3 of 0.8 at t = 1..T: .4625, .7, .7875, .8 of 360.
    assert recipe.schedule.init(recipe.config).counts["conv1"].tolist()[2:] == [166, 252, 283, 288]


def test_masks_of_a_list_of_3():
    rng = np.random.default_rng(0)
    params = {
        x.weight: jnp.asarray(rng.permutation(np.prod(x.shape)).reshape(x.shape), jnp.float32)
        for x in TABLE
    }
    pruner, _, config = pp.from_nni("LevelPruner", [LINEARS | {"sparse_ratio": 0.25}], TABLE)
    masks = pruner(params, None, config)
    np.testing.assert_array_equal(masks["fc1"], params["fc1"] >= 40)
    np.testing.assert_array_equal(masks["fc2"], params["fc2"] >= 30)
    assert masks["conv1"] is None


ENTRY = CONVS | {"sparse_ratio": 0.5}


@pytest.mark.parametrize(
    ("config_list", "error", "parts"),
    [
        (
            [ENTRY, LINEARS | {"sparsity": 0.5}],
            ValueError,
            ("rule 1", "'sparsity'", "'sparse_ratio'", "rule 0"),
        ),
        ([CONVS | {"sparsity": 0.5}, ENTRY], ValueError, ("rule 0", "'sparsity'", "rule 1")),
        (
            [ENTRY | {"sparse_rato": 0.5}],
            ValueError,
            ("rule 0", "'sparse_rato'", "nearest: 'sparse_ratio'"),
        ),
        ([ENTRY, 3], TypeError, ("rule 1", "dictionary", "int")),
        ([{"sparse_ratio": 0.5}], ValueError, ("rule 0", "selects nothing", "op_names_re")),
        ([CONVS | {"granularity": "default"}], ValueError, ("rule 0", "no sparse_ratio")),
        ([ENTRY | {"sparse_ratio": 1.5}], ValueError, ("rule 0", "sparse_ratio", "[0, 1]", "1.5")),
        (
            [CONVS | {"sparse_threshold": 0.5}],
            ValueError,
            ("rule 0", "sparse_threshold", "pp.movement"),
        ),
        ([ENTRY | {"op_names": ["cnv1"]}], ValueError, ("rule 0", "op_names", "nearest: 'conv")),
        (
            [ENTRY | {"exclude_op_names": ["cnv1"]}],
            ValueError,
            ("exclude_op_names", "rule 0", "nearest: 'conv"),
        ),
        (
            [ENTRY | {"exclude_op_types": 3}],
            TypeError,
            ("exclude_op_types", "rule 0", "list of strings"),
        ),
        (
            [ENTRY | {"target_names": ["_output_"]}],
            ValueError,
            ("rule 0", "'_output_'", "leave it out"),
        ),
        ([ENTRY | {"target_names": ["bias"]}], ValueError, ("rule 0", "target_names", "'weight'")),
        (
            [ENTRY | {"target_settings": {"weight": {"ratio": 1}}}],
            ValueError,
            ("target_settings['weight']", "'ratio'"),
        ),
        (
            [ENTRY | {"target_settings": {"bias": {"sparse_ratio": 0.5}}}],
            ValueError,
            ("rule 0", "'bias'", "sparse_ratio=0.5"),
        ),
        ([ENTRY | {"apply_method": "add"}], ValueError, ("rule 0", "apply_method", "'add'")),
        (
            [ENTRY | {"granularity": "filter"}],
            ValueError,
            ("rule 0", "granularity", "'filter'", "'out_channel'"),
        ),
        (
            [ENTRY, LINEARS | {"sparse_ratio": 0.5, "granularity": "in_channel"}],
            ValueError,
            ("rules 0 and 1", "granularity"),
        ),
        ([ENTRY | {"sparse_ratio": 1}], ValueError, ("sparsity", "allow_empty")),
    ],
)
def test_mistakes(config_list, error, parts):
    with raises(error, *parts):
        counts(config_list, "l1")


def test_a_layer_may_be_emptied_where_its_entry_says_so():
    assert counts([ENTRY | {"sparse_ratio": 1, "allow_empty": True}], "l1") == {
        "conv1": 10,
        "conv2": 8,
    }
