"""2:4 weights packed: beside what compressed-tensors 0.11 makes of them."""

import numpy as np
import pytest
import safetensors.numpy

import purepruning as pp
from purepruning_interop.checkpoints import pack_file, two_four, two_four_config, two_four_tensors


def test_what_the_package_makes_of_the_same():
    w = np.arange(1, 17, dtype=np.float32).reshape(2, 8) * np.array([1, -1, 1, -1, 1, 1, -1, 1])
    largest = np.tile([False, False, True, True], (2, 2))
    found = two_four_tensors("a.fc.weight", w.astype(np.float16), largest)
    # Printed by sparse24_bitmask_compress of compressed-tensors 0.11.0.
    assert found["a.fc.compressed"].tolist() == [[3, -4, -7, 8], [11, -12, -15, 16]]
    assert found["a.fc.compressed"].dtype == np.float16
    assert found["a.fc.bitmask"].tolist() == [[204], [204]]
    assert found["a.fc.bitmask"].dtype == np.uint8
    assert found["a.fc.shape"].tolist() == [[2], [8]]


def test_a_row_that_bytes_do_not_divide():
    mask = np.tile([True, False, False, True], (1, 3))
    found = two_four_tensors("w.weight", np.ones((1, 12), np.float32), mask)
    assert found["w.bitmask"].tolist() == [[0b10011001, 0b1001]]


@pytest.mark.parametrize(
    ("name", "shape"), [("fc.kernel", (2, 8)), ("fc.weight", (2, 6)), ("fc.weight", (2, 4, 4))]
)
def test_what_it_is_not_for(name, shape):
    with pytest.raises(ValueError, match="leave it out"):
        two_four_tensors(name, np.ones(shape), np.ones(shape, bool))


def test_masks_that_keep_another_number():
    with pytest.raises(ValueError, match="prune it by 2:4"):
        two_four_tensors("fc.weight", np.ones((1, 4)), np.array([[True, False, False, False]]))


def test_config_keeps_what_is_there():
    found = two_four_config({"model_type": "llama"}, ["lm_head"], 1 / 3)
    assert found["model_type"] == "llama"
    told = found["quantization_config"]
    assert told["quant_method"] == "compressed-tensors"
    assert told["sparsity_config"]["format"] == "sparse-24-bitmask"
    assert told["sparsity_config"]["ignore"] == ["lm_head"]
    assert told["sparsity_config"]["global_sparsity"] == 0.333333


@pytest.mark.parametrize("elements", [1, 30, 2**20])
def test_files_are_packed_by_rows_whatever_bytes_they_fill(tmp_path, monkeypatch, elements):
    """Five rows of twelve: a row is one and a half bytes of mask."""
    monkeypatch.setattr(two_four, "_ELEMENTS", elements)
    w = np.random.default_rng(0).standard_normal((5, 12)).astype(np.float16)
    params = {"fc.weight": w, "fc.bias": np.ones(5, np.float32)}
    safetensors.numpy.save_file(params, tmp_path / "m.safetensors")
    layer = pp.make_layer(params, "fc.weight", "Linear", out_axes=0, in_axes=1)
    config = pp.resolve([{"op_names": ["fc"]}], [layer], granularity=pp.NM(2, 4))
    done = pp.prune_files(pp.level, tmp_path / "m.safetensors", tmp_path / "out", config)
    sizes = pack_file(*done.files, ["fc.weight", "of.another.file.weight"])
    found = safetensors.numpy.load_file(done.files[0])
    assert sizes == {name: x.nbytes for name, x in found.items()}
    mask = np.asarray(pp.load_masks(done.files[1], params)["fc.weight"])
    expected = two_four_tensors("fc.weight", w, mask) | {"fc.bias": params["fc.bias"]}
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert found[name].dtype == x.dtype
        np.testing.assert_array_equal(found[name], x)
