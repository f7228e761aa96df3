"""``purepruning prune``: what it writes, beside a few lines of NumPy, and what it refuses."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch

import purepruning as pp
from tests.cli.calls import call, failed, save, save_sharded, tensors

WEIGHTS = ("conv.weight", "blocks.0.fc.weight", "blocks.1.fc.weight", "embed_tokens.weight")


def lowest_gone(w, share):
    """Returns w with that share of its smallest magnitudes at zero."""
    k = int(share * w.size + 1e-9)
    found = w.copy()
    found.reshape(-1)[np.argsort(np.abs(w.reshape(-1)).astype(np.float32), kind="stable")[:k]] = 0
    return found


def load(path):
    return safetensors.numpy.load_file(path)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_weights_of_least_magnitude_are_zero_and_masks_say_which(tmp_path, capsys, dtype):
    content = tensors()
    content = {n: x.astype(dtype) if x.dtype == np.float32 else x for n, x in content.items()}
    source, out = save(tmp_path / "m.safetensors", content, format="pt"), tmp_path / "o.safetensors"
    assert (
        call(capsys, "prune", source, "--sparsity", "0.7", "--bias", "keep", "-o", out).status == 0
    )
    found = load(out)
    assert found.keys() == content.keys()
    for name, x in content.items():
        want = lowest_gone(x, 0.7) if name in WEIGHTS else x
        assert found[name].dtype == x.dtype
        np.testing.assert_array_equal(found[name], want)
    floats = {n: x for n, x in content.items() if x.dtype == dtype}
    masks = pp.load_masks(tmp_path / "o.masks.safetensors", floats)
    for name in WEIGHTS:
        np.testing.assert_array_equal(np.asarray(masks[name]), found[name] != 0)
    with safetensors.safe_open(out, "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_global_scope_ranks_all_layers_together(tmp_path, capsys):
    content = tensors()
    content["conv.weight"] += 100
    source, out = save(tmp_path / "m.safetensors", content), tmp_path / "o.safetensors"
    rules = [{"sparsity": 0.3, "op_types": ["Conv2d", "Linear"], "max_sparsity_per_layer": 0.9}]
    (tmp_path / "r.json").write_text(json.dumps(rules))
    arguments = ("--rules", tmp_path / "r.json", "--scope", "global", "-o", out, "--json")
    report = call(capsys, "prune", source, *arguments).json
    found, total = load(out), 288 + 2 * 128
    gone = {n: int((found[n] == 0).sum()) for n in WEIGHTS}
    assert sum(gone.values()) == int(0.3 * total) == report["weights_removed"]
    assert gone["conv.weight"] == 0
    assert report["weights_of_pruned_layers"] == total


def test_state_dicts_in_shards_become_safetensors_in_shards(tmp_path, capsys):
    content, source, out = tensors(), tmp_path / "model", tmp_path / "out"
    source.mkdir()
    where = {}
    for i, names in enumerate((WEIGHTS, sorted(content.keys() - set(WEIGHTS)))):
        file = f"pytorch_model-0000{i + 1}-of-00002.bin"
        torch.save({name: torch.tensor(content[name]) for name in names}, source / file)
        where |= dict.fromkeys(names, file)
    index = source / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (source / "config.json").write_text("{}")
    report = call(capsys, "prune", source, "--sparsity", "0.5", "-o", out, "--json").json
    assert report["weights_removed"] == (288 + 128 + 128 + 80) // 2
    assert sorted(p.name for p in out.iterdir()) == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "purepruning",
    ]
    found = json.loads((out / "model.safetensors.index.json").read_text())
    assert found["weight_map"]["conv.weight"] == "model-00001-of-00002.safetensors"
    assert found["metadata"]["total_size"] == sum(x.nbytes for x in content.values())
    first = load(out / "model-00001-of-00002.safetensors")
    for name in WEIGHTS:
        np.testing.assert_array_equal(first[name], lowest_gone(content[name], 0.5))


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_dry_run_says_what_the_run_does(tmp_path, capsys, scope):
    source = save(tmp_path / "m.safetensors")
    torch.save({n: torch.tensor(x) for n, x in tensors().items()}, tmp_path / "m.pt")
    for file in (source, tmp_path / "m.pt"):
        options = ("--sparsity", "0.7", "--scope", scope, "--json", "--overwrite")
        arguments = ("prune", file, *options, "-o", tmp_path / "o")
        dry, wet = (call(capsys, *arguments, *more).json for more in (("--dry-run",), ()))
        assert dry.pop("files") == {}
        assert set(wet.pop("files")) == {"weights", "masks", "report"}
        assert dry == wet


@pytest.mark.parametrize("kind", ["sharded", "torch", "single"])
def test_folders_stay_folders_with_all_else_that_is_in_them(tmp_path, capsys, kind):
    content, source, out = tensors(), tmp_path / "model", tmp_path / "out"
    if kind == "sharded":
        save_sharded(source, content)
    else:
        source.mkdir()
        if kind == "torch":
            state = {name: torch.tensor(x) for name, x in content.items()}
            torch.save(state, source / "pytorch_model.bin")
        else:
            save(source / "model.safetensors", content)
        (source / "config.json").write_text('{"model_type": "llama"}')
        (source / "tokenizer.json").write_text("{}")
    assert call(capsys, "prune", source, "--sparsity", "0.5", "-o", out).status == 0
    files = sorted(p.name for p in out.glob("*.safetensors"))
    found = {}
    for file in files:
        found |= load(out / file)
    for name, x in content.items():
        np.testing.assert_array_equal(found[name], lowest_gone(x, 0.5) if name in WEIGHTS else x)
    assert json.loads((out / "config.json").read_text()) == {"model_type": "llama"}
    assert (out / "tokenizer.json").read_text() == "{}"
    assert (out / "purepruning" / "masks.safetensors").exists()
    if kind == "sharded":
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index == json.loads((source / "model.safetensors.index.json").read_text())
    else:
        assert files == ["model.safetensors"]
    assert call(capsys, "inspect", out, "--json").json["tensors"] == len(content)


def test_two_of_four_in_the_layout_of_compressed_tensors(tmp_path, capsys):
    source, out = save_sharded(tmp_path / "model"), tmp_path / "out"
    arguments = ("--nm", "2:4", "--format", "compressed-tensors", "--exclude", "blocks.1.fc")
    assert call(capsys, "prune", source, *arguments, "-o", out).status == 0
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    found = {}
    for file in set(index.values()):
        found |= load(out / file)
    assert found.keys() == index.keys()
    w, stem = tensors()["blocks.0.fc.weight"], "blocks.0.fc"
    kept = np.zeros(w.shape, bool)
    order = np.argsort(np.abs(w).reshape(-1, 4), axis=1, kind="stable")[:, 2:]
    np.put_along_axis(kept.reshape(-1, 4), order, True, axis=1)
    unpacked = np.zeros_like(w)
    bits = np.unpackbits(found[f"{stem}.bitmask"], axis=1, bitorder="little").astype(bool)
    unpacked[bits] = found[f"{stem}.compressed"].reshape(-1)
    np.testing.assert_array_equal(unpacked, np.where(kept, w, 0))
    assert found[f"{stem}.shape"].tolist() == [[16], [8]]
    assert f"{stem}.weight" not in found
    np.testing.assert_array_equal(found["blocks.1.fc.weight"], tensors()["blocks.1.fc.weight"])
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "llama"
    ignored = config["quantization_config"]["sparsity_config"]["ignore"]
    assert ignored == ["blocks.1.fc", "lm_head"]


def test_n_of_m_leaves_what_it_does_not_fit_and_says_so(tmp_path, capsys):
    content = {"a.weight": np.ones((2, 8), np.float32), "b.weight": np.ones((2, 6), np.float32)}
    source = save(tmp_path / "m.safetensors", content)
    found = call(capsys, "prune", source, "--nm", "2:4", "-o", tmp_path / "o.safetensors")
    assert "Left whole, since 2:4 does not fit: b." in found.out
    assert (load(tmp_path / "o.safetensors")["b.weight"] == 1).all()


@pytest.mark.parametrize(
    ("options", "zeros"),
    [
        (("--pruner", "l1_norm"), 5),
        (("--pruner", "l1_filter"), 5),
        (("--pruner", "l2_norm", "--granularity", "input_channel"), 5),
        (("--pruner", "l1_norm", "--block", "2x2"), 5),
        (("--pruner", "random"), 5),
        (("--pruner", "fpgm"), 5),
    ],
)
def test_other_pruners_and_units(tmp_path, capsys, options, zeros):
    w = np.arange(1, 17, dtype=np.float32).reshape(4, 4)
    source = save(tmp_path / "m.safetensors", {"fc.weight": w})
    out = tmp_path / "o.safetensors"
    call(capsys, "prune", source, "--sparsity", "0.5", *options, "-o", out)
    found = load(out)["fc.weight"] == 0
    assert found.sum() == 8
    if options[1] in ("l1_norm", "l1_filter") and len(options) == 2:
        assert found.all(axis=1).tolist() == [True, True, False, False]
    if "input_channel" in options:
        assert found.all(axis=0).tolist() == [True, True, False, False]
    if "2x2" in options:
        assert found.reshape(2, 2, 2, 2).all(axis=(1, 3)).sum() == 2


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    source = save(tmp_path / "m.safetensors")
    out = tmp_path / "deep" / "o.safetensors"
    found = call(capsys, "prune", source, "--sparsity", "0.5", "-o", out, "--dry-run")
    assert "Nothing was written" in found.out
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_what_is_there_is_replaced_only_when_told(tmp_path, capsys):
    source, out = save(tmp_path / "m.safetensors"), tmp_path / "o.safetensors"
    out.write_text("mine")
    arguments = ("prune", source, "--sparsity", "0.5", "-o", out)
    failed(capsys, 1, *arguments, says="--overwrite")
    assert out.read_text() == "mine"
    assert call(capsys, *arguments, "--overwrite").status == 0
    assert (load(out)["conv.weight"] == 0).sum() == 144
    folder = tmp_path / "f"
    folder.mkdir()
    (folder / "old").write_text("")
    failed(capsys, 1, "prune", source, "--sparsity", "0.5", "-o", folder, says="--overwrite")
    call(capsys, "prune", source, "--sparsity", "0.5", "-o", folder, "--overwrite")
    assert sorted(p.name for p in folder.iterdir()) == ["model.safetensors", "purepruning"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ((), "give --sparsity, --nm or --rules"),
        (("--sparsity", "1.5"), "1.5"),
        (("--sparsity", "0.5", "--pruner", "levl"), "nearest: 'level'"),
        (("--sparsity", "0.5", "--pruner", "wanda"), "needs data"),
        (("--sparsity", "0.5", "--scope", "globl"), "'globl'"),
        (("--sparsity", "0.5", "--granularity", "row"), "'row'"),
        (("--sparsity", "0.5", "--granularity", "element", "--block", "2x2"), "give one"),
        (("--sparsity", "0.5", "--block", "axb"), "write 4x4"),
        (("--sparsity", "0.5", "--exclude", "fcc"), "'fcc'"),
        (("--sparsity", "0.5", "--nm", "1:4"), "leave --sparsity out"),
        (("--nm", "2of4"), "write 2:4"),
        (("--nm", "4:2"), "4"),
        (("--nm", "1:4", "--format", "compressed-tensors"), "--nm 2:4"),
        (("--nm", "2:4", "--format", "packed"), "'packed'"),
        (("--sparsity", "0.5", "--pruner", "l1_filter", "--nm", "2:4"), "leave out --nm"),
        (("--sparsity", "0.5", "--rules", "no.json"), "give one"),
        (("--rules", "no.json"), "No such file"),
    ],
)
def test_wrong_options(tmp_path, capsys, monkeypatch, options, says):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "m.safetensors")
    failed(capsys, 1, "prune", "m.safetensors", *options, "-o", "out", says=says)
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize(
    ("out", "says"),
    [("o.pt", "o.safetensors"), ("m.safetensors", "--overwrite"), ("o.safetensors", "is a folder")],
)
def test_wrong_targets(tmp_path, capsys, out, says):
    source = save_sharded(tmp_path / "model") if out == "o.safetensors" else None
    source = source or save(tmp_path / "m.safetensors")
    failed(capsys, 1, "prune", source, "--sparsity", "0.5", "-o", tmp_path / out, says=says)


def test_the_source_is_not_written_over(tmp_path, capsys):
    source = save(tmp_path / "m.safetensors")
    before = source.read_bytes()
    arguments = ("--sparsity", "0.5", "-o", source, "--overwrite")
    failed(capsys, 1, "prune", source, *arguments, says="holds the source")
    assert source.read_bytes() == before


def test_files_without_layers(tmp_path, capsys):
    source = save(tmp_path / "m.safetensors", {"x": np.ones(3, np.float32)})
    out = tmp_path / "o.safetensors"
    failed(capsys, 1, "prune", source, "--sparsity", "0.5", "-o", out, says="purepruning inspect")


def test_weights_that_are_not_numbers(tmp_path, capsys):
    content = tensors()
    content["conv.weight"][0, 0, 0, 0] = np.nan
    source, out = save(tmp_path / "m.safetensors", content), tmp_path / "o.safetensors"
    failed(capsys, 1, "prune", source, "--sparsity", "0.5", "-o", out, says=("conv", "NaN"))
