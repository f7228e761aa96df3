"""Fake quantisation and scales: values, gradients, and the same bits in every framework."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from purepruning.quantize import (
    QuantizationConfig,
    Scale,
    affine,
    bnn,
    dorefa,
    fake_quantize,
    fold_batch_norm,
    integers,
    lsq,
    qat,
    symmetric,
)
from purepruning.quantize.fake import round_through, to_integers
from tests.messages import raises

F = np.float32


def oracle(x, scale, zero, low, high):
    """What the docstring says, in float64 but for the product that says which integer is next."""
    whole = np.round(np.asarray(x, F) * (F(1) / F(scale))).astype(np.float64) + zero
    return (np.clip(whole, low, high) - zero) * np.float64(F(scale)), (whole >= low) & (
        whole <= high
    )


def test_values_and_gradients_by_hand():
    x = jnp.array([-1.26, -1.25, -1.0, 0.24, 0.25, 0.75, 2.5, 2.74, 2.76, jnp.inf, -jnp.inf])
    # Steps of 0.5 from -1 to 2.5; halves go to the even integer.
    expected = [-1, -1, -1, 0, 0, 1, 2.5, 2.5, 2.5, 2.5, -1]
    passes = [0, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0]
    for value, wanted, passed in zip(x, expected, passes, strict=True):
        got = jax.value_and_grad(fake_quantize)(value, 0.5, 2, 0, 7)
        assert [float(g) for g in got] == [wanted, passed]
        t = torch.tensor(float(value), requires_grad=True)
        y = fake_quantize(t, 0.5, 2, 0, 7)
        y.backward()
        assert [y.item(), t.grad.item()] == [wanted, passed]
    of_both = jax.grad(fake_quantize, argnums=(1, 2))(jnp.float32(0.3), 0.5, 2.0, 0, 7)
    assert [float(g) for g in of_both] == [0, 0]


@pytest.mark.parametrize("rule", [affine, symmetric])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_agrees_with_numpy_in_double_precision(rule, bits):
    x = np.random.default_rng(bits).normal(size=500).astype(F)
    low, high = (0, 2**bits - 1) if rule is affine else (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)
    scale, zero = rule(x.min(), x.max(), low, high)
    wanted, passed = oracle(x, scale, zero, low, high)
    np.testing.assert_allclose(fake_quantize(x, scale, zero, low, high), wanted, rtol=1e-6)
    grads = jax.grad(lambda x: jnp.sum(fake_quantize(x, scale, zero, low, high)))(jnp.asarray(x))
    np.testing.assert_array_equal(grads, passed)
    assert passed.all()  # a tensor's own range clips nothing, so that all of it is trained
    assert np.abs(np.asarray(wanted) - x).max() <= 0.5001 * float(scale)


def ranged(x, rule, low, high, axis):
    """A tensor quantised by its own range, in any framework."""
    xp = jnp if isinstance(x, jax.Array) else torch if isinstance(x, torch.Tensor) else np
    smallest, largest = (
        (xp.min(x), xp.max(x))
        if axis is None
        else (xp.amin(x, axis, keepdims=True), xp.amax(x, axis, keepdims=True))
    )
    scale = rule(smallest, largest, low, high)
    return (fake_quantize(x, *scale, low, high), *scale, to_integers(x, *scale, low, high))


@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize(
    ("rule", "low", "high"), [(affine, 0, 255), (affine, -7, 7), (symmetric, -127, 127)]
)
def test_same_bits_in_every_framework_and_mode(rule, low, high, axis):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(3, 40, 50)) * 10.0 ** rng.integers(-4, 4, (3, 40, 1))).astype(F)
    one = functools.partial(ranged, rule=rule, low=low, high=high, axis=axis)
    wanted = [one(part) for part in x]
    wanted = [np.stack(parts) for parts in zip(*wanted, strict=True)]
    modes = {
        "jit": jax.jit(jax.vmap(one))(x),
        "eager": [jnp.stack(p) for p in zip(*map(one, jnp.asarray(x)), strict=True)],
        "torch": [torch.stack(p) for p in zip(*map(one, torch.tensor(x)), strict=True)],
        "torch.vmap": torch.func.vmap(one)(torch.tensor(x)),
    }
    for mode, found in modes.items():
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(np.asarray(a), b, err_msg=mode)


def test_zero_is_exact_and_pruned_channels_are_no_nan():
    x = np.array([[0, 0, 0], [-1, 0, 3], [1e-42, 0, 0]], F)
    for rule, low, high in ((affine, 0, 15), (symmetric, -7, 7)):
        scale = rule(x.min(1, keepdims=True), x.max(1, keepdims=True), low, high)
        y = fake_quantize(x, *scale, low, high)
        assert np.isfinite(y).all()
        assert (y[x == 0] == 0).all()
        assert scale.scale[0] == 1


@pytest.mark.parametrize("power", [-20, 1, 30])
def test_scales_with_the_tensor(power):
    x = np.random.default_rng(1).normal(size=200).astype(F)
    for rule, low, high in ((affine, 0, 15), (symmetric, -7, 7)):
        a = fake_quantize(x, *rule(x.min(), x.max(), low, high), low, high)
        y = x * F(2.0**power)
        b = fake_quantize(y, *rule(y.min(), y.max(), low, high), low, high)
        np.testing.assert_array_equal(a * F(2.0**power), b)


def test_quantising_twice_changes_nothing():
    x = np.random.default_rng(2).normal(size=1000).astype(F)
    for rule, low, high in ((affine, 0, 255), (symmetric, -127, 127)):
        scale = rule(x.min(), x.max(), low, high)
        y = fake_quantize(x, *scale, low, high)
        np.testing.assert_array_equal(fake_quantize(y, *scale, low, high), y)


def test_symmetric_unsigned_is_signed_moved():
    assert symmetric(F(-2), F(1.27), 1, 255) == Scale(F(2 / 127), 128)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_keeps_the_dtype_and_computes_in_float32(dtype):
    x = jnp.linspace(-1, 1, 41).astype(dtype)
    y = fake_quantize(x, 0.1, 0, -7, 7)
    assert y.dtype == x.dtype
    wide = fake_quantize(x.astype(jnp.float32), 0.1, 0, -7, 7)
    np.testing.assert_array_equal(y, wide.astype(dtype))
    grad = jax.grad(lambda x: jnp.sum(fake_quantize(x, 0.1, 0, -7, 7)))(x)
    assert (grad.dtype, set(grad.tolist())) == (x.dtype, {0, 1})


def test_nan_stays_nan():
    for x in (jnp.array([jnp.nan, 1.0]), torch.tensor([torch.nan, 1.0])):
        y = np.asarray(fake_quantize(x, 0.5, 0, -7, 7))
        assert np.isnan(y[0])
        assert y[1] == 1
        scale = symmetric(x[0], x[0], -7, 7)
        assert np.isnan(np.asarray(scale.scale))


def test_round_through():
    x = torch.tensor([0.5, 1.5, -0.4], requires_grad=True)
    y = round_through(x)
    y.sum().backward()
    assert (y.tolist(), x.grad.tolist()) == ([0, 2, 0], [1, 1, 1])


X = jnp.ones((2, 3))
ONE, THREE = jnp.float32(1), jnp.ones(3)
EMPTY = QuantizationConfig()
MISTAKES = [
    (
        TypeError,
        "fake_quantize: x must be an array of floats",
        lambda: fake_quantize("a", 1, 0, 0, 7),
    ),
    (TypeError, "array of floats", lambda: fake_quantize(jnp.arange(3), 1.0, 0, 0, 7)),
    (ValueError, "fake_quantize: scale", lambda: fake_quantize(X, 0.0, 0, 0, 7)),
    (ValueError, "fake_quantize: scale", lambda: fake_quantize(X, -1.0, 0, 0, 7)),
    (ValueError, "high must be at least 8, got 0", lambda: fake_quantize(X, 1.0, 0, 7, 0)),
    (TypeError, "low must be an integer", lambda: fake_quantize(X, 1.0, 0, 0.5, 7)),
    (ValueError, "affine: high must be at least 8", lambda: affine(ONE, ONE, 7, 7)),
    (TypeError, "affine: smallest", lambda: affine("a", ONE, 0, 7)),
    (TypeError, "symmetric: largest", lambda: symmetric(ONE, None, 0, 7)),
    (ValueError, "dorefa.activation: bits", lambda: dorefa.activation(X, 0)),
    (TypeError, "dorefa.gradient: g", lambda: dorefa.gradient(3, 1, 2)),
    (ValueError, "dorefa.gradient: bits", lambda: dorefa.gradient(X, 1, 0)),
    (TypeError, "bnn.activation: x", lambda: bnn.activation(jnp.arange(3))),
    (TypeError, "lsq.quantize: x", lambda: lsq.quantize(None, ONE, -8, 7, 1)),
    (ValueError, "lsq.quantize: size", lambda: lsq.quantize(X, ONE, -8, 7, 0)),
    (ValueError, "lsq.quantize: scale has shape (3,)", lambda: lsq.quantize(X, THREE, -8, 7, 1)),
    (TypeError, "lsq.watch: config", lambda: lsq.watch(None)),
    (TypeError, "fake_quantize: scale", lambda: fake_quantize(X, True, 0, 0, 7)),
    (ValueError, "fake_quantize: scale has shape", lambda: fake_quantize(X, THREE, 0, 0, 7)),
    (TypeError, "another framework", lambda: fake_quantize(X, torch.tensor(1.0), 0, 0, 7)),
    (ValueError, "affine: high", lambda: affine(ONE, ONE, 0, 2**31)),
    (TypeError, "qat.update: state.step", lambda: qat.update(qat.State(5, {}), {}, EMPTY)),
    (TypeError, "fold_batch_norm: out_axis must be", lambda: folded(out_axis=True)),
    (ValueError, "lsq.quantize: high", lambda: lsq.quantize(X, ONE, -8, 0, 1)),
    (TypeError, "integers.pack: weight", lambda: integers.pack(3)),
    (TypeError, "fold_batch_norm: weight", lambda: folded(weight=[[1.0]])),
    (TypeError, "fold_batch_norm: epsilon", lambda: folded(epsilon="a")),
    (ValueError, "fold_batch_norm: epsilon", lambda: folded(epsilon=-1.0)),
    (TypeError, "fold_batch_norm: out_axis", lambda: folded(out_axis="a")),
]


def test_scales_that_are_known_where_numbers_are_traced():
    """What JAX compares inside of jit is traced, though both are known."""
    scale = jnp.float32(0.5)
    found = jax.jit(lambda x: fake_quantize(x, scale, 0, -8, 7))(jnp.array([0.3, 9.0]))
    assert found.tolist() == [0.5, 3.5]
    minus = -scale
    with raises(ValueError, "fake_quantize: scale"):
        jax.jit(lambda x: fake_quantize(x, minus, 0, -8, 7))(jnp.ones(2))


def folded(*, weight=X, out_axis=0, epsilon=1e-5):
    arrays = (jnp.ones(2),) * 4
    return fold_batch_norm(weight, None, *arrays, out_axis=out_axis, epsilon=epsilon)


@pytest.mark.parametrize(("error", "part", "call"), MISTAKES, ids=[m[1] for m in MISTAKES])
def test_mistakes_are_named(error, part, call):
    with raises(error, part):
        call()
