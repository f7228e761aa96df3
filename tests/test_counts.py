"""Fractions to counts, where a fraction comes in a precision that cannot hold it."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from purepruning.counts import count_of


@pytest.mark.parametrize(
    ("dtype", "n"), [(np.float32, 10_000), (np.float16, 100), (ml_dtypes.bfloat16, 100)]
)
def test_decimals_in_any_precision_are_taken_as_they_were_written(dtype, n):
    assert [count_of(dtype(k / n), n) for k in range(n + 1)] == list(range(n + 1))


def test_fractions_in_float32():
    wrong = [
        (k, n) for n in range(1, 120) for k in range(n + 1) if count_of(np.float32(k / n), n) != k
    ]
    assert not wrong


def test_numbers_that_arithmetic_left_a_little_below():
    assert count_of(np.float32(0.39999998), 10) == 4
    assert count_of(np.float32(0.6666666), 3) == 2
    assert count_of(jnp.float32(1) - jnp.float32(0.6), 10) == 4


@pytest.mark.parametrize("k", [1, 453, 5000, 9999])
def test_large_layers_lose_no_unit_more(k):
    assert count_of(np.float32(k / 10_000), 10**9) == k * 10**5


def test_small_numbers():
    assert count_of(np.float32(1e-30), 10**6) == 0
    assert count_of(np.float32(1e-6), 10**6) == 1
