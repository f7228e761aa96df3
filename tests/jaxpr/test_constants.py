"""Constants of a program: what NumPy folds is what XLA computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import purepruning as pp
from purepruning.jaxpr.constants import _BY_NUMPY, concrete
from purepruning.jaxpr.program import trace

pytestmark = pytest.mark.usefixtures("standard_promotion")

FLOATS = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4)) * 3, jnp.float32)
INTEGERS = jnp.arange(12, dtype=jnp.int32).reshape(3, 4) - 5
BYTES = jnp.arange(12, dtype=jnp.uint8).reshape(3, 4) * 20

#: By primitive, functions of no arguments that run it on constants.
FUNCTIONS = {
    "iota": [lambda: lax.broadcasted_iota(jnp.int32, (3, 4), 1)],
    "broadcast_in_dim": [lambda: lax.broadcast_in_dim(INTEGERS[0], (2, 4, 3), (1,))],
    "convert_element_type": [
        lambda: FLOATS.astype(jnp.int32),
        lambda: (FLOATS * 100).astype(jnp.int8),  # out of range
        lambda: (FLOATS / 0).astype(jnp.int32),
        lambda: INTEGERS.astype(jnp.uint8),
        lambda: FLOATS.astype(bool),
    ],
    "select_n": [
        lambda: lax.select_n(INTEGERS > 0, FLOATS, -FLOATS),
        lambda: lax.select_n((INTEGERS + 5) % 3, FLOATS, -FLOATS, FLOATS * 2),
    ],
    "slice": [lambda: lax.slice(FLOATS, (0, 1), (3, 4), (2, 2))],
    "reshape": [lambda: lax.reshape(FLOATS, (4, 3), dimensions=(1, 0))],
    "squeeze": [lambda: lax.squeeze(FLOATS[:1], (0,))],
    "expand_dims": [lambda: lax.expand_dims(FLOATS, (1,))],
    "transpose": [lambda: FLOATS.T],
    "rev": [lambda: lax.rev(FLOATS, (1,))],
    "concatenate": [lambda: lax.concatenate([FLOATS, -FLOATS], 1)],
    "div": [
        lambda: lax.div(FLOATS, FLOATS[::-1]),
        lambda: lax.div(INTEGERS, INTEGERS[::-1] * 2 + 1),
        lambda: lax.div(BYTES, BYTES // 3 + jnp.uint8(1)),
    ],
    "rem": [
        lambda: lax.rem(FLOATS, FLOATS[::-1]),
        lambda: lax.rem(INTEGERS, INTEGERS[::-1] * 2 + 1),
    ],
    "clamp": [lambda: lax.clamp(-2, INTEGERS, 3)],
    "not": [lambda: ~INTEGERS, lambda: ~(INTEGERS > 0), lambda: ~BYTES],
    "copy": [lambda: jnp.array(FLOATS, copy=True)],
    "stop_gradient": [lambda: lax.stop_gradient(FLOATS)],
} | {
    name: [lambda f=f, x=x: f(x, x[::-1]) for x in (FLOATS, INTEGERS, BYTES)]
    for name, f in {
        "add": lax.add, "sub": lax.sub, "mul": lax.mul, "max": lax.max, "min": lax.min,
        "eq": lax.eq, "ne": lax.ne, "lt": lax.lt, "le": lax.le, "gt": lax.gt, "ge": lax.ge,
    }.items()
} | {
    name: [lambda f=f, x=x: f(x) for x in xs]
    for name, (f, xs) in {
        "neg": (lax.neg, (FLOATS, INTEGERS, BYTES)), "abs": (lax.abs, (FLOATS, INTEGERS)),
        "sign": (lax.sign, (FLOATS, INTEGERS)), "floor": (lax.floor, (FLOATS,)),
        "ceil": (lax.ceil, (FLOATS,)),
    }.items()
} | {
    name: [lambda f=f, x=x: f(x, x[::-1]) for x in (INTEGERS, INTEGERS > 0)]
    for name, f in {"and": lax.bitwise_and, "or": lax.bitwise_or, "xor": lax.bitwise_xor}.items()
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(_BY_NUMPY))
def test_numpy_folds_what_xla_computes(name):
    for function in FUNCTIONS[name]:
        program, _, _ = trace(function)
        found = concrete(program, program.outputs[0])
        expected = np.asarray(jax.jit(function)())
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


def test_indices_are_folded_without_compiling(monkeypatch):
    """A shuffle of channels by arithmetic on their numbers."""
    from purepruning.jaxpr import constants

    def fn(p, x):
        order = jnp.where(jnp.arange(6) % 2 == 0, jnp.arange(6) // 2, 5 - jnp.arange(6) // 2)
        return (x @ p["a"])[:, order] @ p["b"]

    params = {"a": jnp.ones((4, 6)), "b": jnp.ones((6, 2))}
    monkeypatch.setattr(constants, "bind", None)
    coupling = pp.couple(fn, params, jnp.ones((2, 4)))
    places = np.argmax(coupling.leaves["a"].units[1] == coupling.leaves["b"].units[0].T, 0)
    assert places.tolist() == [0, 5, 1, 4, 2, 3]
