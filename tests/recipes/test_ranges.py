"""Search ranges: expanded to flat names, replaced by values, searched by a grid and at random."""

import numpy as np
import pytest

from purepruning_interop.recipes import create_compressor, expand, read_recipe, search_recipe
from purepruning_interop.recipes.ranges import range_of
from tests.messages import raises
from tests.recipes import nets


def recipe(*rules, use="level"):
    return read_recipe({"purepruning": 1, "steps": [{"use": use, "rules": list(rules)}]})


SHARE = {"range": [0.2, 0.8], "type": "float", "n": 4}


def test_names_are_auptimizers():
    named = {"op_names": ["conv1", "conv2"], "sparsity": SHARE}
    bits = {"weight": {"range": [2, 8], "type": "int"}}
    assert list(expand(recipe(named, {"op_types": ["Linear"], "sparsity": SHARE})).ranges) == [
        "0.sparsity",
        "1.sparsity",
        "2.sparsity",
    ]
    assert list(expand(recipe({**named, "expand_op_names": False})).ranges) == ["0.sparsity"]
    quantised = {"op_types": ["Linear"], "quant_types": ["weight"], "quant_bits": bits}
    assert list(recipe(quantised, use="dorefa").ranges) == ["0.quant_bits.weight"]


@pytest.mark.parametrize(
    ("given", "points"),
    [
        ({"range": [0, 3], "type": "int"}, [0, 1, 2, 3]),
        ({"range": [2, 8], "type": "int", "interval": 3}, [2, 5, 8]),
        ({"range": [0.0, 1.0], "type": "float", "n": 3}, [0.0, 0.5, 1.0]),
        ({"range": [0.1, 0.4], "type": "float", "interval": 0.1, "n": 9}, [0.1, 0.2, 0.3, 0.4]),
        ({"range": [0.5, 0.9, 0.1], "type": "choice"}, [0.5, 0.9, 0.1]),
    ],
)
def test_grids(given, points):
    grid = range_of(given, "").grid()
    assert np.allclose(grid, points)
    assert len(grid) == len(points)


def test_the_best_of_a_grid(tmp_path):
    first = {"op_names": ["conv1", "conv2"], "sparsity": SHARE}

    def evaluate(found):
        a, b = (rule["sparsity"] for rule in found.steps[0].rules)
        return -((a - 0.4) ** 2) - (b - 0.8) ** 2

    found = search_recipe(recipe(first), evaluate, by="grid", folder=tmp_path)
    assert len(found.history) == 16
    assert found.values == pytest.approx({"0.sparsity": 0.4, "1.sparsity": 0.8})
    assert (tmp_path / "trials.jsonl").read_text().count("\n") == 16
    worst = search_recipe(recipe(first), evaluate, by="grid", target="min")
    assert worst.values == pytest.approx({"0.sparsity": 0.8, "1.sparsity": 0.2})


def test_random_draws_are_within_the_range_and_repeat():
    rule = {"op_types": ["Linear"], "sparsity": {"range": [0.2, 0.8], "type": "float"}}
    runs = [
        search_recipe(
            recipe(rule), lambda r: r.steps[0].rules[0]["sparsity"], n_samples=20, seed=seed
        )
        for seed in (0, 0, 1)
    ]
    drawn = [[row["values"]["0.sparsity"] for row in run.history] for run in runs]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(0.2 <= x < 0.8 for x in drawn[0])
    assert runs[0].values["0.sparsity"] == max(drawn[0])


def test_a_search_on_a_model():
    rule = {"op_types": ["Linear"], "sparsity": {"range": [0.5, 0.9], "type": "choice"}}

    def evaluate(found):
        compressor = create_compressor(nets.torch_net(), found)
        return float((compressor.compress().fc1.weight == 0).sum())

    found = search_recipe(recipe(rule), evaluate, by="grid", target="min")
    assert [row["score"] for row in found.history] == [1024, 1843]
    assert found.recipe.steps[0].rules[0]["sparsity"] == 0.5
    with raises(ValueError, "0.sparsity", "search_recipe"):
        create_compressor(nets.torch_net(), recipe(rule))


def test_wrong_calls():
    rule = {"op_types": ["Linear"], "sparsity": SHARE}
    with raises(TypeError, "n_samples"):
        search_recipe(recipe(rule), len)
    with raises(ValueError, "by", "'grid'"):
        search_recipe(recipe(rule), len, by="tpe")
    with raises(ValueError, "no ranges"):
        search_recipe(recipe({**rule, "sparsity": 0.5}), len)
