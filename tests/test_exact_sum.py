import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from purepruning.exact_sum import exact_sum, power_of_two_scale

INF, NAN = float("inf"), float("nan")


def sums(values, axes=(-1,)):
    """The sums in NumPy from every framework, which have to be the same, bit for bit."""
    values = np.asarray(values, np.float32)
    results = [
        np.asarray(exact_sum(jnp.asarray(values), axes)),
        np.asarray(jax.jit(exact_sum, static_argnums=1)(jnp.asarray(values), axes)),
        exact_sum(torch.from_numpy(values.copy()), axes).numpy(),
    ]
    with np.errstate(invalid="ignore", over="ignore"):
        results.append(np.asarray(exact_sum(values, axes)))
    for other in results[1:]:
        np.testing.assert_array_equal(other.view(np.int32), results[0].view(np.int32))
    return results[0]


def ulps(got, values):
    """How far a sum is from the true one, in units in the last place of the true one."""
    true = math.fsum(np.asarray(values, np.float64))
    return abs(float(got) - true) / float(np.spacing(np.float32(true)))


# Eight shapes are enough, and each is compiled once.
numbers = st.sampled_from([1, 2, 3, 7, 16, 100, 1000, 4099])
magnitudes = st.floats(1e-30, 1e30)


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), numbers, magnitudes, st.sampled_from([0.0, 1.0, 20.0]))
def test_is_within_two_ulps_of_the_true_sum_of_non_negative_terms(seed, n, magnitude, spread):
    rng = np.random.default_rng(seed)
    values = np.abs(rng.normal(size=n)) * np.exp(spread * rng.normal(size=n))
    values = (values / values.max() * magnitude).astype(np.float32)
    assert ulps(sums(values), values) <= 2


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1), numbers)
def test_no_order_of_the_terms_changes_a_bit(seed, n):
    rng = np.random.default_rng(seed)
    values = (rng.normal(size=n) * np.exp(5 * rng.normal(size=n))).astype(np.float32)
    assert sums(values) == sums(values[rng.permutation(n)]) == sums(values[::-1])


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((3, 300_000), (1,)),  # parts of one sum
        ((300_000, 3), (0,)),
        ((300_000, 3), (1,)),  # parts of the sums
        ((150, 4, 250, 4), (1, 3)),
        ((2, 150_001, 1, 3), (0, 2)),
        ((150_001, 2, 3), (0, 1, 2)),
    ],
)
def test_numpy_adds_large_arrays_in_parts(shape, axes):
    rng = np.random.default_rng(0)
    values = rng.normal(size=shape).astype(np.float32) * np.exp2(rng.integers(-9, 9, shape[-1:]))
    values = values.astype(np.float32)
    expected = np.asarray(exact_sum(jnp.asarray(values), axes))
    np.testing.assert_array_equal(exact_sum(values, axes), expected, strict=True)


def test_numpy_counts_terms_of_large_arrays_often_in_parts():
    values = np.arange(400_000, dtype=np.float32).reshape(100_000, 4) % 1000
    times = 1 + np.arange(100_000).reshape(-1, 1) % 2
    expected = (values.sum(1) * times[:, 0]).astype(np.float32)
    np.testing.assert_array_equal(exact_sum(values, (1,), times), expected, strict=True)
    shuffled = np.asfortranarray(values.T)
    np.testing.assert_array_equal(exact_sum(shuffled, (0,), times.T), expected, strict=True)


def test_naive_sums_do_depend_on_the_order():
    """What all this is for: without it the test above fails."""
    values = np.random.default_rng(0).normal(size=(200, 1000)).astype(np.float32)
    assert np.any(jnp.sum(values, axis=1) != jnp.sum(values[:, ::-1], axis=1))


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20)
def test_terms_of_both_signs_lose_less_than_the_last_bit_of_the_largest(seed):
    rng = np.random.default_rng(seed)
    values = (rng.normal(size=100) * np.exp(5 * rng.normal(size=100))).astype(np.float32)
    error = abs(float(sums(values)) - math.fsum(values.astype(np.float64)))
    assert error <= 2**-24 * np.abs(values).max() + 2**-23 * abs(math.fsum(values))


@given(st.lists(st.integers(-(2**18), 2**18), min_size=16, max_size=16))
@settings(max_examples=20)
def test_integers_are_summed_exactly(values):
    assert sums(values) == sum(values)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.0], 0.0),
        ([-0.0], 0.0),
        ([1.5], 1.5),
        ([-1.5], -1.5),
        ([3.4028235e38], 3.4028235e38),
        ([3.4028235e38, 3.4028235e38], INF),
        ([1.1754944e-38, 1.1754944e-38], 2.3509887e-38),
        ([1.0, INF], INF),
        ([1.0, NAN], NAN),
        ([INF, NAN], NAN),
        ([1e-30, 1.0, -1.0], 0.0),
    ],
)
def test_single_values(values, expected):
    np.testing.assert_equal(float(sums(values)), float(np.float32(expected)))


@pytest.mark.parametrize("sign", [1, -1])
def test_nan_among_many_terms(sign):
    """A shape for which XLA takes maxima of floats from a library that passes over NaN."""
    values = np.ones((512, 64), np.float32)
    values[44, 6] = np.copysign(np.float32(NAN), np.float32(sign))
    expected = np.where(np.arange(64) == 6, NAN, 512)
    with np.errstate(all="ignore"):
        by_numpy = exact_sum(values, (0,))
    by_jax = jax.jit(lambda x: exact_sum(x, (0,)))(values)
    by_torch = exact_sum(torch.tensor(values), (0,)).numpy()
    for found in (by_numpy, by_jax, by_torch):
        np.testing.assert_array_equal(found, expected)


def test_terms_that_some_devices_flush_count_as_zero():
    """XLA on a CPU reads subnormal numbers as zero, torch does not."""
    subnormal = np.float32(1e-40)
    assert subnormal > 0
    assert sums([subnormal] * 3) == 0
    tiny = np.float32(2.0**-126)
    assert sums([tiny, subnormal, subnormal, tiny]) == 2 * tiny


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("n", [2**20, 3_000_001])
def test_many_terms(n):
    values = np.random.default_rng(n).random(n, dtype=np.float32)
    # Half of the terms far below the last bit of the sum, which a running float32 sum would lose.
    values[::2] *= 2.0**-20
    assert ulps(sums(values), values) <= 2
    ones = np.full(n, 1 + 2.0**-23, np.float32)
    assert ulps(sums(ones), ones) <= 2


def test_sums_over_any_axes():
    values = np.random.default_rng(1).integers(-99, 99, (2, 3, 4, 5)).astype(np.float32)
    for axes in [(0,), (1,), (3,), (0, 2), (1, 3), (-1, 0), (0, 1, 2, 3), (2, 1, 0)]:
        np.testing.assert_array_equal(sums(values, axes), values.sum(axis=axes))
    np.testing.assert_array_equal(sums(values, ()), values)
    np.testing.assert_array_equal(sums(np.zeros((0, 3)), (0,)), np.zeros(3))


def test_every_sum_has_its_own_scale():
    values = np.asarray([[1e30, 3e30], [1e-30, 3e-30], [1, 3]], np.float32)
    for got, row in zip(sums(values), values, strict=True):
        assert ulps(got, row) <= 1


def test_sums_under_vmap():
    values = np.random.default_rng(2).normal(size=(5, 7, 30)).astype(np.float32)
    expected = sums(values).view(np.int32)
    by_jax = jax.vmap(lambda x: exact_sum(x, (1,)))(jnp.asarray(values))
    by_torch = torch.func.vmap(lambda x: exact_sum(x, (1,)))(torch.from_numpy(values))
    np.testing.assert_array_equal(np.asarray(by_jax).view(np.int32), expected)
    np.testing.assert_array_equal(by_torch.numpy().view(np.int32), expected)


@given(st.floats(2.0**-100, 2.0**100, width=32), st.integers(1, 23))
def test_power_of_two_scales(top, bits):
    scale, unscale = (float(s) for s in power_of_two_scale(jnp.float32(top), bits, 126))
    assert 2 ** (bits - 1) <= scale * top < 2**bits
    assert math.frexp(scale)[0] == 0.5
    assert scale * unscale == 1
