"""2:4 weights packed: beside what compressed-tensors 0.11 makes of them."""

import numpy as np
import pytest

from purepruning_interop.checkpoints import two_four_config, two_four_tensors


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
