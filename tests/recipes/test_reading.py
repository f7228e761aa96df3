"""Recipes read from files: both forms, every example of the document, and mistakes."""

import json
from pathlib import Path

import pytest

from purepruning_interop import recipes
from purepruning_interop.recipes import read_recipe, write_resolved
from tests.messages import raises
from tests.recipes.seed_recipes import SEEDS

LEVEL = {"sparsity": 0.8, "op_types": ["default"]}
AGP = SEEDS["agp"]["compression"]["config_list"][0]


def step(use, *rules, **args):
    return {"purepruning": 1, "steps": [{"use": use, "rules": list(rules), "args": args}]}


def written(folder, content, name="recipe.json"):
    path = Path(folder, name)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_there_are_twenty():
    assert len(SEEDS) == 20


@pytest.mark.parametrize("name", SEEDS)
def test_every_example_of_the_document(name, tmp_path):
    recipe = read_recipe(written(tmp_path, SEEDS[name]))
    assert (recipe.framework, [s.use for s in recipe.steps]) == ("torch", [name])
    assert recipe.steps[0].kind == SEEDS[name]["compression"]["type"]
    # The same, alone or inside of an experiment, in both spellings, and resolved.
    inner = SEEDS[name]["compression"]
    renamed = {k: v for k, v in inner.items() if k not in ("framework", "type")}
    renamed |= {f"compression_{k}": inner[k] for k in ("framework", "type")}
    experiment = {"name": "x", "script": "x.py", "resource": "gpu", **SEEDS[name]}
    write_resolved(tmp_path / "resolved.json", recipe)
    for other in (inner, renamed, experiment, tmp_path / "resolved.json"):
        assert read_recipe(other).resolved() == recipe.resolved()
    # Nothing of what was written is lost.
    for given, rule in zip(inner["config_list"], recipe.steps[0].rules, strict=False):
        assert given.items() <= rule.items()


def test_defaults_are_written_out(tmp_path):
    short = {"final_sparsity": 0.8, "end_epoch": 10, "op_types": ["default"]}
    write_resolved(tmp_path / "resolved.json", read_recipe(step("agp", short)))
    assert json.loads((tmp_path / "resolved.json").read_text()) == {
        "purepruning": 1,
        "steps": [{"use": "agp", "rules": [AGP], "args": {"pruning_algorithm": "level"}}],
    }
    naive = read_recipe(SEEDS["naive"]).steps[0].rules
    assert naive == ({"quant_types": ["weight"], "quant_bits": 8, "op_types": ["default"]},)
    assert read_recipe(SEEDS["qat"]).steps[0].rules[0]["quant_start_step"] == 0


def test_yaml_is_the_same(tmp_path):
    pytest.importorskip("yaml")
    rules = "[{sparsity: 0.8, op_types: [default]}]"
    text = f"purepruning: 1\nsteps:\n  - use: level\n    rules: {rules}\n"
    assert read_recipe(written(tmp_path, text, "r.yaml")).resolved() == (
        read_recipe(step("level", LEVEL)).resolved()
    )
    with raises(ValueError, "bad.yaml", "mend"):
        read_recipe(written(tmp_path, "a: [1", "bad.yaml"))
    with raises(ValueError, "tag.yml", "python/object", "mend"):
        read_recipe(written(tmp_path, "!!python/object/apply:os.getcwd []", "tag.yml"))


WRONG = [
    ({"compressor": "lvel", "config_list": [LEVEL]}, ["compressor", "'lvel'", "'level'"]),
    ({"compressor": "Level", "config_list": [LEVEL]}, ["'Level'", "'level'"]),
    ({"config_list": [LEVEL]}, ["compressor", "'agp'"]),
    ({"compressor": "level"}, ["'config_list'", "add"]),
    ({"compressor": "level", "config_list": LEVEL}, ["step 0 (level)", "'rules'", "list"]),
    ({"compressor": "level", "config_list": []}, ["step 0 (level)", "no rules"]),
    ({"compressor": "level", "type": "quantization", "config_list": [LEVEL]}, ["'pruning'"]),
    (
        {"compressor": "level", "framework": "tensrflow", "config_list": []},
        ["framework", "'tensorflow'"],
    ),
    ({"compressor": "level", "config_lst": []}, ["'config_lst'", "'config_list'"]),
    ({"type": "pruning", "compression_type": "pruning", "compressor": "level"}, ["say the same"]),
    ({"purepruning": 2, "steps": []}, ["'purepruning'", "1", "2"]),
    ({"purepruning": 1, "steps": []}, ["'steps'", "empty"]),
    ({"purepruning": 1, "steps": [{"use": "level", "rule": []}]}, ["step 0", "'rule'", "'rules'"]),
    (
        step("level", {"sparsty": 0.8, "op_types": ["default"]}),
        ["rule 0", "'sparsty'", "'sparsity'"],
    ),
    (step("level", LEVEL, {"op_types": ["Linear"]}), ["rule 1", "'sparsity'"]),
    (step("level", {"sparsity": 0.8}), ["rule 0", "op_types"]),
    (step("level", LEVEL | {"sparsity": 1.2}), ["rule 0", "sparsity", "[0, 1]", "1.2"]),
    (step("level", LEVEL | {"sparsity": 1}), ["rule 0", "sparsity", "empty"]),
    (step("level", LEVEL | {"sparsity": "0.8"}), ["rule 0", "sparsity", "'0.8'"]),
    (step("level", LEVEL | {"sparsity": True}), ["rule 0", "sparsity", "True"]),
    (step("level", LEVEL | {"op_types": [1]}), ["rule 0", "op_types", "[1]"]),
    (step("level", LEVEL | {"start_epoch": 0}), ["rule 0", "level has no key", "'start_epoch'"]),
    (step("agp", {**AGP, "end_epoch": 0.5}), ["rule 0", "end_epoch", "0.5"]),
    (step("agp", {**AGP, "start_epoch": 11}), ["rule 0", "end_epoch", "11"]),
    (step("agp", {**AGP, "frequency": 0}), ["rule 0", "frequency", "1"]),
    (step("agp", {**AGP, "initial_sparsity": 0.9}), ["rule 0", "initial_sparsity", "0.9"]),
    (step("agp", AGP, pruning_algorithm="lvel"), ["pruning_algorithm", "'lvel'", "'level'"]),
    (
        step("agp", AGP, pruning_algoritm="l1"),
        ["args", "'pruning_algoritm'", "'pruning_algorithm'"],
    ),
    (step("agp", AGP, optimizer="sgd"), ["args", "'optimizer'", "create_compressor"]),
    (step("lottery_ticket", {**LEVEL, "prune_iterations": 0}), ["rule 0", "prune_iterations", "1"]),
    (step("simulated_annealing", LEVEL, cool_down_rate=2.0), ["cool_down_rate", "2"]),
    (step("simulated_annealing", LEVEL, cool_down_rate="x"), ["cool_down_rate", "number", "'x'"]),
    (step("simulated_annealing", LEVEL, optimize_mode="max"), ["optimize_mode", "'maximize'"]),
    (step("fpgm", LEVEL, dependency_aware=1), ["dependency_aware", "true or false"]),
    (step("amc", {"op_types": ["Conv2d"]}, dataset="imagenet"), ["'imagenet'", "leave it out"]),
    (
        step("qat", {"op_types": ["Linear"], "quant_types": ["weight"], "quant_bits": 99}),
        ["quant_bits", "99"],
    ),
    (
        step("qat", {"op_types": ["Linear"], "quant_types": ["wight"], "quant_bits": 8}),
        ["'wight'", "'weight'"],
    ),
    (step("qat", {"op_types": ["Linear"], "quant_types": ["weight"]}), ["rule 0", "'quant_bits'"]),
    (
        step("level", LEVEL | {"sparsity": {"type": "float", "range": [0.2, 1.5]}}),
        ["sparsity", "1.5"],
    ),
    (step("level", LEVEL | {"sparsity": {"type": "flot", "range": [0, 1]}}), ["'flot'", "'float'"]),
    (
        step("level", LEVEL | {"sparsity": {"type": "float", "range": [0.8, 0.2]}}),
        ["sparsity", "order"],
    ),
    (step("level", LEVEL | {"sparsity": {"type": "int", "range": [0.2, 1]}}), ["'int'", "0.2"]),
    (
        step("level", LEVEL | {"sparsity": {"type": "choice", "range": [0.2, "x"]}}),
        ["sparsity", "'x'"],
    ),
    (step("level", LEVEL | {"sparsity": {"type": "float", "range": [0, 0.5], "m": 2}}), ["'m'"]),
    ([1], ["object"]),
]


@pytest.mark.parametrize(("content", "words"), WRONG, ids=lambda x: "")
def test_mistakes_are_named(content, words, tmp_path):
    path = written(tmp_path, content)
    with raises((ValueError, TypeError, KeyError), str(path), *words):
        read_recipe(path)


def test_files_that_are_none(tmp_path):
    with raises(ValueError, "line 1", "mend"):
        read_recipe(written(tmp_path, '{"a": 1,}'))
    with raises(ValueError, "'use'", "twice"):
        read_recipe(written(tmp_path, '{"purepruning": 1, "steps": [{"use": "level", "use": 1}]}'))
    with raises(ValueError, "NaN"):
        read_recipe(written(tmp_path, '{"purepruning": NaN}'))
    for name in ("deep.json", "deep.yaml"):
        with raises(ValueError, name, "nested too deeply"):
            read_recipe(written(tmp_path, "[" * 10_000 + "]" * 10_000, name))
    with raises(ValueError, "'.pkl'", "unpickled"):
        read_recipe(written(tmp_path, "", "recipe.pkl"))
    with pytest.raises(FileNotFoundError):
        read_recipe(tmp_path / "none.json")
    with raises(IsADirectoryError, "directory"):
        read_recipe(tmp_path)


def test_a_killed_writer_leaves_the_old_file(tmp_path, monkeypatch):
    recipe = read_recipe(step("level", LEVEL))
    write_resolved(tmp_path / "resolved.json", recipe)
    before = (tmp_path / "resolved.json").read_bytes()

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with raises(OSError, "No space"):
        write_resolved(tmp_path / "resolved.json", recipe)
    assert (tmp_path / "resolved.json").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_every_public_name_is_documented():
    assert all(getattr(recipes, name).__doc__ for name in recipes.__all__)
