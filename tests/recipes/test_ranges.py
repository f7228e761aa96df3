"""Search ranges: expanded to flat names, replaced by values, searched by a grid and at random."""

import numpy as np
import optuna
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


def shares(found):
    return [rule["sparsity"] for rule in found.steps[0].rules]


TPE = {"by": "optuna", "n_samples": 30, "seed": 3}
SPACE = [
    {"op_types": ["Linear"], "sparsity": {"range": [0.2, 0.8], "type": "float"}},
    {"op_types": ["Conv2d"], "sparsity": {"range": [0.9, 0.3, 0.5], "type": "choice"}},
]


def bowl(found):
    a, b = shares(found)
    return -((a - 0.35) ** 2) - (b - 0.3) ** 2


def test_optuna_suggests_by_the_scores_so_far():
    found = search_recipe(recipe(*SPACE), bowl, **TPE)
    values = [tuple(row["values"].values()) for row in found.history]
    assert found.values["1.sparsity"] == 0.3
    assert abs(found.values["0.sparsity"] - 0.35) < 0.03
    # Later suggestions are nearer than those of the start, which are random.
    near = [abs(a - 0.35) for a, _ in values]
    assert np.mean(near[20:]) < np.mean(near[:10]) / 2
    assert {b for _, b in values} == {0.9, 0.3, 0.5}
    least = search_recipe(recipe(*SPACE), lambda r: -bowl(r), target="min", **TPE)
    assert [row["values"] for row in least.history] == [row["values"] for row in found.history]
    # What a plain loop over optuna is given.
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        direction="maximize", sampler=optuna.samplers.TPESampler(seed=TPE["seed"])
    )
    for a, b in values:
        trial = study.ask()
        one = trial.suggest_float("0.sparsity", 0.2, 0.8)
        two = [0.9, 0.3, 0.5][trial.suggest_categorical("1.sparsity", range(3))]
        assert (a, b) == (one, two)
        study.tell(trial, -((a - 0.35) ** 2) - (b - 0.3) ** 2)


def test_a_stopped_search_by_optuna_goes_on(tmp_path):
    calls = []

    def stopped(found):
        calls.append(found)
        if len(calls) == 13:
            raise KeyboardInterrupt
        return bowl(found)

    few = {**TPE, "n_samples": 16}
    with pytest.raises(KeyboardInterrupt):
        search_recipe(recipe(*SPACE), stopped, folder=tmp_path, **few)
    found = search_recipe(recipe(*SPACE), stopped, folder=tmp_path, **few)
    assert len(calls) == 17  # the one that was stopped is the only one done again
    whole = search_recipe(recipe(*SPACE), bowl, **few)
    assert [row["values"] for row in found.history] == [row["values"] for row in whole.history]
    calls.clear()
    again = search_recipe(recipe(*SPACE), stopped, folder=tmp_path, **few)
    assert not calls
    assert [row["values"] for row in again.history] == [row["values"] for row in whole.history]


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
    with raises(TypeError, "optuna search needs n_samples"):
        search_recipe(recipe(rule), len, by="optuna")
    with raises(ValueError, "submit", "leave it out"):
        search_recipe(recipe(rule), len, by="optuna", n_samples=2, submit=map)
    with raises(ValueError, "by", "'grid'"):
        search_recipe(recipe(rule), len, by="tpe")
    with raises(ValueError, "no ranges"):
        search_recipe(recipe({**rule, "sparsity": 0.5}), len)
