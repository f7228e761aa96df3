"""Programs of a line or two: how many units are found, and that masked and shrunk model agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import purepruning as pp

pytestmark = pytest.mark.usefixtures("unoptimized")


def normal(i, *shape):
    return jnp.asarray(np.random.default_rng(i).standard_normal(shape), jnp.float32)


X = normal(0, 4, 6)
P = {"a": normal(1, 6, 8), "c": normal(2, 8, 3)}
TWO = {"a": normal(1, 6, 8), "b": normal(3, 6, 8), "c": normal(2, 16, 3)}
LOOKED_UP = {"e": normal(1, 20, 8), "c": P["c"]}
STACKED = {
    **P,
    "w": normal(4, 3, 8, 6),
    "v": normal(5, 3, 6, 8),
    "unused": normal(6, 3, 6, 6),
    "table": jnp.tile(jnp.arange(6), (3, 1)),
}


def layer_norm(h):
    centred = h - h.mean(-1, keepdims=True)
    return centred * lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-5)


def scanned(p, x):
    def body(h, q):
        return h + jnp.tanh(h @ q["w"])[:, q["table"]] @ q["v"], None

    layers = {name: p[name] for name in ("w", "v", "unused", "table")}
    return lax.scan(body, x @ p["a"], layers)[0] @ p["c"]


def unread(p, x):
    """A loop that is handed a parameter which its body does not read."""
    return lax.fori_loop(0, 2, lambda _, h: (h[0] * 2, h[1]), (x @ p["a"], p["spare"]))[0] @ p["c"]


def without_rows(p, x):
    h = x @ p["a"]
    return h @ p["c"] + (h.reshape(2, 2, 8)[:0].reshape(0, 8) @ p["c"]).sum()


# By name: the function, its parameters, its input, and how many units it has.
CASES = {
    "empty part": (lambda p, x: (x @ p["a"])[4::2] @ p["c"], P, X, 8),
    "associative scan": (
        lambda p, x: lax.associative_scan(jnp.add, x @ p["a"], axis=0) @ p["c"],
        P,
        X,
        8,
    ),
    "reshape without elements": (without_rows, P, X, 8),
    "rows of a table": (
        lambda p, x: (x @ p["a"] + p["t"][:4]) @ p["c"],
        {**P, "t": normal(3, 50, 8)},
        X,
        8,
    ),
    "scan": (scanned, STACKED, X, 8),
    "not read in a loop": (unread, {**P, "spare": normal(7, 5)}, X, 8),
    "taken with NaN outside": (
        lambda p, i: layer_norm(jnp.take(p["e"], i, axis=0)) @ p["c"],
        LOOKED_UP,
        jnp.array([1, 2]),
        8,
    ),
    "reshape of moved axes": (
        lambda p, x: jnp.concatenate(jnp.stack([x @ p["a"], x @ p["b"]]), -1) @ p["c"],
        TWO,
        X,
        8,
    ),
    "ravel in another order": (
        lambda p, x: (x @ p["a"]).ravel(order="F") @ p["c"],
        {"a": P["a"], "c": normal(2, 32, 3)},
        X,
        8,
    ),
}


def halved(fn, params, x, **options):
    coupling = pp.couple(fn, params, x)
    pruned = coupling.lowest(np.arange(float(coupling.n_units)), 0.5)
    return coupling, pp.shrink(fn, params, coupling.masks(pruned, params), coupling, x, **options)


@pytest.mark.parametrize("case", CASES)
def test_masked_and_shrunk_program_agree(case):
    fn, params, x, n_units = CASES[case]
    coupling, small = halved(fn, params, x)
    assert coupling.n_units == n_units
    assert small.report.params[1] < small.report.params[0]
    sizes = jax.tree.map(jnp.size, small.params)
    assert sum(jax.tree.leaves(sizes)) == small.report.params[1]
    expected = fn(pp.apply_masks(params, small.report.masks), x)
    np.testing.assert_allclose(small.fn(small.params, x), expected, rtol=1e-4, atol=1e-5)


def test_unread_and_integer_parameters_of_a_scan_stay():
    _, small = halved(scanned, STACKED, X)
    assert small.report.masks["table"] is None
    assert small.report.masks["unused"] is None
    np.testing.assert_array_equal(small.params["table"], STACKED["table"])


@pytest.mark.parametrize("ddof", [0, 1])
def test_a_variance_over_what_is_kept_is_that_of_the_smaller_model(ddof):
    """``jnp.var`` computes its divisor N - ddof from numbers: that of the smaller model."""

    def fn(p, x):
        h = x @ p["a"]
        return h / jnp.sqrt(jnp.var(h, -1, keepdims=True, ddof=ddof) + 1) @ p["c"]

    _, small = halved(fn, P, X, norms="kept")
    np.testing.assert_allclose(small.fn(small.params, X), fn(small.params, X), rtol=1e-5)


def test_an_index_out_of_range_gives_nan_in_both_models():
    def fn(p, i):
        return jnp.take(p["e"], i, axis=0) @ p["c"]

    i = jnp.array([1, 99])
    _, small = halved(fn, LOOKED_UP, i)
    assert small.params["e"].shape == (20, 4)
    masked = fn(pp.apply_masks(LOOKED_UP, small.report.masks), i)
    np.testing.assert_array_equal(np.isnan(small.fn(small.params, i)), np.isnan(masked))
    assert np.isnan(masked[1]).all()
