"""Masks in few bytes: by hand in each layout, back again, and nothing else passes."""

import math

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from purepruning.saving.positions import decode, encode
from tests.messages import raises


def test_bits_by_hand():
    # Ten elements in C order, the first in the lowest bit: 0b01100101 and 0b10.
    mask = np.array([[1, 0, 1, 0, 0], [1, 1, 0, 0, 1]], bool)
    row, content = encode(mask)
    assert row == {"layout": "bits"}
    assert content.tolist() == [0b01100101, 0b10]


def test_bytes_by_hand():
    # Of four bytes the second is other than zero: 0b0010, and then that byte, with element 11.
    mask = np.zeros(32, bool)
    mask[11] = True
    row, content = encode(mask)
    assert row == {"layout": "bytes"}
    assert content.tolist() == [0b0010, 0b1000]


def test_patterns_by_hand():
    # Of four bits two are set in 0b0011, 0b0101, 0b0110, 0b1001, 0b1010, 0b1100: numbers 0 to 5.
    # Groups keep {0, 1}, {2, 3} and {0, 3}: 0, 5 and 3, three bits each: 0b011_101_000.
    mask = np.array([[1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 0, 1]], bool)
    row, content = encode(mask)
    assert row == {"layout": "nm", "keep": 2, "of": 4, "axis": 1}
    assert content.tolist() == [0b11101000, 0b0]
    # Along the other axis, where the groups of the transposed mask come one after another.
    row, again = encode(mask.T.copy())
    assert row == {"layout": "nm", "keep": 2, "of": 4, "axis": 0}
    assert again.tolist() == content.tolist()


@pytest.mark.parametrize(("keep", "of"), [(1, 2), (1, 4), (2, 4), (3, 4), (2, 8), (4, 8), (3, 16)])
def test_groups_take_as_few_bits_as_hold_the_largest_number(keep, of):
    rng = np.random.default_rng(0)
    mask = rng.permuted(np.tile(np.arange(of) < keep, (24, 3, 1)), axis=-1).reshape(24, 3 * of)
    row, content = encode(mask)
    assert row == {"layout": "nm", "keep": keep, "of": of, "axis": 1}
    assert content.size == math.ceil(24 * 3 * math.ceil(math.log2(math.comb(of, keep))) / 8)
    np.testing.assert_array_equal(decode(row, content, mask.shape), mask)


def test_many_groups_come_back():
    rng = np.random.default_rng(0)
    mask = rng.permuted(np.tile([1, 1, 0, 0], (2**18 + 5, 1)), axis=-1).astype(bool)
    row, content = encode(mask)
    assert row["layout"] == "nm"
    np.testing.assert_array_equal(decode(row, content, mask.shape), mask)


@hypothesis.given(
    shape=st.lists(st.integers(0, 9), max_size=3),
    density=st.sampled_from([0, 0.01, 0.1, 0.5, 0.9, 1]),
    seed=st.integers(0, 99),
)
def test_any_mask_comes_back(shape, density, seed):
    mask = np.random.default_rng(seed).random(shape) < density
    mask = np.asarray(mask)
    row, content = encode(mask)
    assert content.dtype == np.uint8
    assert content.size <= math.ceil(mask.size / 8)
    np.testing.assert_array_equal(decode(row, content, mask.shape), mask)


@pytest.mark.parametrize("layout", ["bits", "bytes", "nm"])
def test_any_bytes_are_that_mask_or_an_error(layout):
    # What is decoded is encoded to the same bytes, where the layout is the one chosen: one mask
    # has one encoding, and nothing is read past its end.
    rng = np.random.default_rng(0)
    row = {"layout": layout} | ({"keep": 2, "of": 4, "axis": 0} if layout == "nm" else {})
    refused = 0
    for _ in range(300):
        content = rng.integers(0, 12, rng.integers(0, 5)).astype(np.uint8)
        try:
            mask = decode(row, content, (20,))
        except ValueError:
            refused += 1
            continue
        chosen, again = encode(mask)
        assert chosen != row or again.tolist() == content.tolist()
    assert 0 < refused < 300


NM = {"layout": "nm", "keep": 2, "of": 4, "axis": 0}


@pytest.mark.parametrize(
    ("row", "content", "shape", "words"),
    [
        ({"layout": "bits"}, [0, 0], (7,), ("2 bytes for 7 bits",)),
        ({"layout": "bits"}, [], (7,), ("0 bytes for 7 bits",)),
        ({"layout": "bits"}, [128], (7,), ("behind the 7",)),
        ({"layout": "bytes"}, [], (7,), ("0 bytes for 1 bits",)),
        ({"layout": "bytes"}, [1], (7,), ("0 bytes are not the 1 marked",)),
        ({"layout": "bytes"}, [0, 1], (7,), ("1 bytes are not the 0 marked",)),
        ({"layout": "bytes"}, [1, 0], (7,), ("1 bytes are not the 1 marked",)),
        ({"layout": "bytes"}, [2, 1], (7,), ("behind the 1",)),
        ({"layout": "bytes"}, [1, 128], (7,), ("behind the 7",)),
        (NM, [6], (4,), ("pattern 6", "2 of 4 has 6")),
        (NM, [8], (4,), ("behind the 3",)),
        (NM, [0, 0], (4,), ("2 bytes for 1 groups of 3 bits",)),
        (NM, [0], (5,), ("no groups of 4",)),
        (NM | {"axis": 1}, [0], (4,), ("axis 1",)),
        (NM | {"axis": True}, [0], (4, 4), ("axis True",)),
        (NM | {"keep": 4}, [0], (4,), ("4 of 4",)),
        (NM | {"of": 2**40}, [0], (4,), ("of 1099511627776",)),
        ({"layout": "other"}, [0], (4,), ("'other'",)),
    ],
)
def test_broken_bytes(row, content, shape, words):
    with raises(ValueError, *words):
        decode(row, np.asarray(content, np.uint8), shape)
