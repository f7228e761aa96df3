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
    "scan": (scanned, STACKED, X, 14),  # 6 that a table looks up
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
    "added to one channel": (
        lambda p, x: jax.nn.relu(x @ p["a"]).at[:, 2].add(1.0) @ p["c"],
        P,
        X,
        7,
    ),
    "two channels multiplied": (
        lambda p, x: jax.nn.relu(x @ p["a"]).at[:, jnp.array([1, 6])].mul(3.0) @ p["c"],
        P,
        X,
        6,
    ),
    "cosine of one channel": (
        lambda p, x: jax.nn.relu(x @ p["a"]).at[:, 2].apply(jnp.cos) @ p["c"],
        P,
        X,
        7,
    ),
    "cosine of one row": (
        lambda p, x: jax.nn.relu(x @ p["a"]).at[1].apply(jnp.cos) @ p["c"],
        P,
        X,
        8,
    ),
    "window of any function": (
        lambda p, x: (
            lax.reduce_window(x @ p["a"], 0.0, lambda a, b: a + 2 * b, (2, 1), (1, 1), "VALID")
            @ p["c"]
        ),
        P,
        X,
        8,
    ),
    "triangular system": (
        lambda p, x: (
            lax.linalg.triangular_solve(
                jnp.tril(jnp.ones((4, 4))), x @ p["a"], left_side=True, lower=True
            )
            @ p["c"]
        ),
        P,
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


def agree(fn, params, small, x):
    expected = fn(pp.apply_masks(params, small.report.masks), x)
    np.testing.assert_allclose(small.fn(small.params, x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_masked_and_shrunk_program_agree(case):
    fn, params, x, n_units = CASES[case]
    coupling, small = halved(fn, params, x)
    assert coupling.n_units == n_units
    assert small.report.params[1] < small.report.params[0]
    sizes = jax.tree.map(jnp.size, small.params)
    assert sum(jax.tree.leaves(sizes)) == small.report.params[1]
    agree(fn, params, small, x)


def test_unread_parameters_of_a_scan_stay_and_integers_keep_their_values():
    _, small = halved(scanned, STACKED, X)
    assert small.report.masks["table"] is None
    assert small.report.masks["unused"] is None
    assert small.params["unused"].shape == (3, 6, 6)
    np.testing.assert_array_equal(small.params["table"], STACKED["table"][:, 3:])


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


@pytest.mark.parametrize("leaf", ["mask", "count", "index"])
def test_tables_of_integers_are_cut_and_never_masked(leaf):
    tables = {
        "mask": jnp.asarray(np.random.default_rng(5).random((6, 8)) > 0.3),
        "count": jnp.arange(8) % 3,
        "index": jnp.arange(8)[::-1],
    }
    use = {
        "mask": lambda p, x: jax.nn.relu(x @ jnp.where(p["t"], p["a"], 0)),
        "count": lambda p, x: jax.nn.relu(x @ p["a"]) * p["t"][None].astype(jnp.float32),
        "index": lambda p, x: jax.nn.relu(x @ p["a"])[:, p["t"]],
    }[leaf]
    params = P | {"t": tables[leaf]}

    def fn(p, x):
        return use(p, x) @ p["c"]

    coupling, small = halved(fn, params, X)
    agree(fn, params, small, X)
    assert coupling.n_units == 8
    assert small.params["t"].dtype == tables[leaf].dtype
    assert small.params["t"].shape == (*tables[leaf].shape[:-1], 4)
    assert small.report.masks["t"] is None


def test_debugging_freezes_nothing():
    seen = []

    def fn(p, x):
        h = jax.nn.relu(x @ p["a"])
        jax.debug.callback(lambda h: seen.append(h.shape), h)
        return h @ p["c"]

    _, small = halved(fn, P, X)
    agree(fn, P, small, X)
    jax.effects_barrier()
    assert (4, 4) in seen


def test_a_ragged_product_couples_all_groups():
    params = {"a": P["a"], "e": normal(5, 2, 8, 10), "o": normal(6, 10, 3)}

    def fn(p, x):
        h = jax.nn.relu(x @ p["a"])
        return jax.lax.ragged_dot(h, p["e"], jnp.array([1, 3])) @ p["o"]

    _, small = halved(fn, params, X)
    agree(fn, params, small, X)
    assert small.params["e"].shape == (2, 4, 5)


def test_axes_that_stay_in_stacked_parameters_are_listed():
    params = {"u": normal(7, 3, 6, 8), "d": normal(8, 3, 8, 6)}

    def fn(p, x):
        return jax.lax.scan(lambda h, w: (h + jax.nn.relu(h @ w["u"]) @ w["d"], None), x, p)[0]

    coupling, _ = halved(fn, params, X)
    listed = {(f.path, f.axis): f.positions for f in coupling.frozen}
    assert listed == {("u", 0): 3, ("u", 1): 6, ("d", 0): 3, ("d", 2): 6}


def test_complex_numbers_are_padded_with_complex_zeros():
    def fn(p, x):
        z = jax.lax.complex(x @ p["a"], x @ p["b"])
        z = jax.lax.pad(z, np.complex64(0), [(1, 1, 0), (0, 0, 0)])
        return (z.real + z.imag) @ p["c"]

    rng = np.random.default_rng(0)
    shapes = {"a": (3, 8), "b": (3, 8), "c": (8, 2)}
    params = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}
    x = jnp.ones((2, 3))
    coupling = pp.couple(fn, params, x)
    assert [len(f) for f in coupling.families] == [8]
    masks = coupling.masks([1, 2, 3], params)
    small = pp.shrink(fn, params, masks, coupling, x)
    expected = fn(pp.apply_masks(params, masks), x)
    np.testing.assert_allclose(small.fn(small.params, x), expected, rtol=1e-5, atol=1e-6)
