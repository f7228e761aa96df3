"""``purepruning inspect`` of checkpoints: what it prints, and what it refuses."""

import json

import numpy as np
import pytest
import torch

from tests.cli.calls import call, failed, save, save_sharded, tensors

COUNT = 8 * 4 * 9 + 3 * 8 - 8 + 2 * (16 * 8 + 16) + 80  # without the running mean


def test_layers_are_guessed_and_said_to_be(tmp_path, capsys):
    found = call(capsys, "inspect", save(tmp_path / "m.safetensors"))
    assert found.status == 0
    assert found.err == ""
    assert f"{COUNT:,} parameters in 10 tensors" in found.out
    assert "types are guessed" in found.out
    assert "blocks.{0-1}.fc  ×2" in found.out
    rows = {line.split()[0]: line.split() for line in found.out.splitlines() if line}
    assert rows["conv"][1:] == ["Conv2d", "8x4x3x3", "float32", "288", "100.0%"]
    assert rows["bn"][1] == "BatchNorm"
    assert "2 other tensors: bn.num_batches_tracked, bn.running_mean." in found.out


@pytest.mark.parametrize("kind", ["safetensors", "sharded", "torch", "nested torch"])
def test_kinds_of_files_hold_the_same(tmp_path, capsys, kind):
    path, content = tmp_path / "m.pt", tensors()
    state = {name: torch.tensor(x) for name, x in content.items()}
    if kind == "safetensors":
        save(path := tmp_path / "m.safetensors")
    elif kind == "sharded":
        save_sharded(path := tmp_path / "model")
    elif kind == "torch":
        torch.save(state, path)
    else:
        torch.save({"epoch": 3, "state_dict": state}, path)
    found = call(capsys, "inspect", path, "--json").json
    assert found["parameters"] == COUNT
    assert {x["weight"] for x in found["layers"]} == {n for n in content if n.endswith("weight")}
    assert found["left_out"] == []
    assert sum(found["files"].values()) == 10


def test_bfloat16_state_dicts_of_torch(tmp_path, capsys):
    w = torch.tensor([[1.0, 2, 0, 0, 3, 0, 4, 0]], dtype=torch.bfloat16)
    torch.save({"fc.weight": w}, tmp_path / "m.pt")
    (layer,) = call(capsys, "inspect", tmp_path / "m.pt", "--json").json["layers"]
    assert (layer["dtype"], layer["nm"], layer["nonzero"]) == ("bfloat16", "2:4", 4)


def test_rules_show_what_they_would_remove(tmp_path, capsys):
    save(tmp_path / "m.safetensors")
    rules = [
        {"sparsity": 0.7, "op_types": ["Linear"]},
        {"op_names": ["blocks.1.fc"], "exclude": True},
    ]
    (tmp_path / "r.json").write_text(json.dumps(rules))
    found = call(capsys, "inspect", tmp_path / "m.safetensors", "--rules", tmp_path / "r.json")
    assert "would remove 89 of 128 weights in 1 layers" in found.out


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('[{"sparsity": 0.5, "op_names": ["blocks.0.fv"]}]', ("rule 0", "'blocks.0.fc'")),
        ('[{"sparsty": 0.5}]', ("'sparsty'", "'sparsity'")),
        ("[{", ("line 1", "mend the JSON")),
        ("[]", "no rules"),
        ("3", "list of objects"),
        ('{"purepruning": 1, "steps": []}', "purepruning run"),
    ],
)
def test_wrong_rules(tmp_path, capsys, content, says):
    (tmp_path / "r.json").write_text(content)
    path = save(tmp_path / "m.safetensors")
    failed(capsys, 1, "inspect", path, "--rules", tmp_path / "r.json", says=says)


def test_files_that_are_not_there_or_damaged(tmp_path, capsys):
    failed(capsys, 1, "inspect", tmp_path / "no.safetensors", says="there is no")
    path = save(tmp_path / "m.safetensors")
    whole = path.read_bytes()
    for size in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        failed(capsys, 1, "inspect", path, says="is damaged")
    (tmp_path / "m.pt").write_bytes(b"nothing")
    failed(capsys, 1, "inspect", tmp_path / "m.pt", says="weights_only=True")
    (tmp_path / "m.txt").write_bytes(b"")
    failed(capsys, 1, "inspect", tmp_path / "m.txt", says=".safetensors or .pt")
    (tmp_path / "empty").mkdir()
    failed(capsys, 1, "inspect", tmp_path / "empty", says="model.safetensors.index.json")


def test_pickles_are_not_run(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").mkdir, ())

    torch.save({"w": Evil()}, tmp_path / "m.pt")
    failed(capsys, 1, "inspect", tmp_path / "m.pt", says="weights_only=True")
    assert not (tmp_path / "ran").exists()


def test_sharded_folders_that_do_not_agree_with_their_index(tmp_path, capsys):
    folder = save_sharded(tmp_path / "a")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shard = content["weight_map"]["conv.weight"]
    changed = {**content["weight_map"], "conv.wait": shard}
    index.write_text(json.dumps({"weight_map": changed}))
    failed(capsys, 1, "inspect", folder, says=("'conv.wait'", "'conv.weight'"))
    index.write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    failed(capsys, 1, "inspect", folder, says="must lie in the folder")
    index.write_text("{}")
    failed(capsys, 1, "inspect", folder, says="weight_map")
    index.write_text(json.dumps(content))
    (folder / shard).unlink()
    failed(capsys, 1, "inspect", folder, says="is missing")


def test_wrong_usage(tmp_path, capsys):
    failed(capsys, 2, "inspect", says="Missing argument 'SOURCE'")
    failed(capsys, 2, "inspekt", says="Did you mean 'inspect'?")
    failed(capsys, 2, "inspect", "x", "--tip", says="--t")


def test_names_with_brackets_are_no_markup(tmp_path, capsys):
    save(tmp_path / "[red]m.safetensors", {"[bold]fc.weight": np.zeros((4, 4), np.float32)})
    found = call(capsys, "inspect", tmp_path / "[red]m.safetensors")
    assert "[bold]fc" in found.out
    assert "[red]m" in found.out
