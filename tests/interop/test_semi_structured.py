"""2:4 matrices in torch's semi-structured layout: the same numbers, and reasons for the rest."""

import pytest
import torch
from torch.sparse import SparseSemiStructuredTensorCUTLASS

import purepruning as pp
from purepruning_interop.torch import layers, to_semi_structured
from tests.messages import raises

#: torch's codes of the two positions that stay of four, two bits each, the lower one first.
CODES = {
    (0, 1): 0b0100,
    (0, 2): 0b1000,
    (1, 2): 0b1001,
    (0, 3): 0b1100,
    (1, 3): 0b1101,
    (2, 3): 0b1110,
}


def two_of_four(rows, columns, seed=0):
    torch.manual_seed(seed)
    order = torch.rand(rows, columns // 4, 4).argsort(-1)
    return (order < 2).reshape(rows, columns)


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 10)
    ).to(torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8])
def test_the_numbers_and_the_codes(dtype):
    w, mask = torch.randint(1, 9, (32, 128)).to(dtype), two_of_four(32, 128)
    found = to_semi_structured({"w": w}, {"w": mask})
    sparse = found.params["w"]
    assert isinstance(sparse, SparseSemiStructuredTensorCUTLASS)
    assert found.dense == {}
    assert torch.equal(sparse.to_dense(), torch.where(mask, w, 0))
    assert sparse.packed.tolist() == w[mask].reshape(32, 64).tolist()
    # In torch's order of the codes, which is CUTLASS's, there is each as often as in the mask.
    nibbles = [
        int(word) >> shift & 15
        for word in sparse.meta.reshape(-1).tolist()
        for shift in range(0, 8 * sparse.meta.itemsize, 4)
    ]
    kept = [tuple(row.nonzero().reshape(-1).tolist()) for row in mask.reshape(-1, 4)]
    assert sorted(nibbles) == sorted(CODES[two] for two in kept)


def test_float32_keeps_one_of_two():
    w, mask = torch.randn(32, 32), (torch.arange(32) % 2 == 1).expand(32, 32)
    found = to_semi_structured({"w": w}, {"w": mask}).params["w"]
    # Not by to_dense, which goes through halves, and of some of them drops the low bits.
    assert torch.equal(found.packed, w[mask].reshape(32, 16))


def test_a_pruned_module_takes_it():
    dense = model()
    params = dict(dense.named_parameters())
    config = pp.resolve(0.5, layers(dense), granularity=pp.NM(keep=2, of=4))
    masks = pp.level(params, None, config)
    found = to_semi_structured(dense.state_dict(), masks)
    # Ten outputs are no multiple of 32: masked, but dense.
    assert found.dense == {"2.weight": "its shape (10, 96) is no multiple of (32, 64)"}
    assert torch.equal(found.params["2.weight"], params["2.weight"] * masks["2.weight"])
    assert found.params["0.bias"].data_ptr() == params["0.bias"].data_ptr()
    dense.load_state_dict(found.params, assign=True)
    assert isinstance(dense[0].weight, SparseSemiStructuredTensorCUTLASS)
    assert torch.equal(dense[0].weight.to_dense(), params["0.weight"] * masks["0.weight"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch's sparse kernels need a GPU")
def test_the_kernels_take_it():
    w, mask = torch.randn(128, 128, dtype=torch.float16), two_of_four(128, 128)
    found = to_semi_structured({"w": w}, {"w": mask}, device="cuda").params["w"]
    x = torch.randn(64, 128, dtype=torch.float16, device="cuda")
    expected = x @ (w * mask).cuda().t()
    torch.testing.assert_close(torch.nn.functional.linear(x, found), expected)


@pytest.mark.parametrize(
    ("w", "mask", "word"),
    [
        (torch.ones(32, 64, 3, 3).half(), torch.ones(32, 64, 3, 3), "4 axes"),
        (torch.ones(32, 64).double(), torch.ones(32, 64), "float64"),
        (torch.ones(32, 66).half(), torch.ones(32, 66), "(32, 66) is no multiple of (32, 64)"),
        (torch.ones(32, 64).half(), torch.ones(32, 64), "more than 2 of 4"),
        (torch.ones(32, 64).half(), torch.ones(1, 1), "more than 2 of 4"),
        (torch.ones(32, 64), torch.arange(64).expand(32, 64) % 4 < 2, "more than 1 of 2"),
    ],
)
def test_why_not(w, mask, word):
    with raises(ValueError, "to_semi_structured", "'w'", word, "bfloat16"):
        to_semi_structured({"w": w}, {"w": mask.bool()})


def test_wrong_arguments():
    with raises(TypeError, "to_semi_structured: params", "state_dict()"):
        to_semi_structured(model(), {})
    with raises(ValueError, "there are no masks"):
        to_semi_structured(model().state_dict(), {})
    with raises(KeyError, "'v'"):
        to_semi_structured({"w": torch.ones(2)}, {"v": torch.ones(2, dtype=torch.bool)})
