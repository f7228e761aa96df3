"""Pruned parameters as sparse matrices of JAX: the same numbers, and the same products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.experimental import sparse

import purepruning as pp
from tests.messages import raises

rng = np.random.default_rng(0)
PARAMS = {
    "w": rng.integers(-4, 5, (6, 5)).astype(np.float32),  # zeros among them
    "conv": rng.standard_normal((2, 3, 4)).astype(np.float16),
    "b": np.ones(5, np.float32),
}
MASKS = {"w": rng.random((6, 5)) < 0.4, "conv": rng.random((2, 1, 4)) < 0.5, "b": None}


def on_jax(tree):
    return jax.tree.map(jax.device_put, tree)


@pytest.mark.parametrize("place", [on_jax, lambda tree: tree], ids=["jax", "numpy"])
def test_the_same_numbers(place):
    params, masks = place(PARAMS), place(MASKS)
    found = pp.to_bcoo(params, masks)
    assert found["b"] is params["b"]
    for name in ("w", "conv"):
        matrix, whole = found[name], np.broadcast_to(MASKS[name], PARAMS[name].shape)
        assert isinstance(matrix, sparse.BCOO)
        assert (matrix.nse, matrix.n_batch, matrix.n_dense) == (int(whole.sum()), 0, 0)
        assert matrix.indices.dtype == np.int32
        assert matrix.indices_sorted
        assert matrix.unique_indices
        assert matrix.dtype == PARAMS[name].dtype
        np.testing.assert_array_equal(matrix.indices, np.argwhere(whole))
        np.testing.assert_array_equal(matrix.data, PARAMS[name][whole])
        np.testing.assert_array_equal(matrix.todense(), np.where(whole, PARAMS[name], 0))


def test_the_same_products_and_gradients():
    # Whole numbers, of which every sum is exact.
    w, mask = jnp.asarray(PARAMS["w"]), jnp.asarray(MASKS["w"])
    x = jnp.asarray(rng.integers(-4, 5, (3, 6)).astype(np.float32))

    def loss(w):
        return ((x @ w) ** 2).sum()

    matrix = pp.to_bcoo({"w": w}, {"w": mask})["w"]
    dense = jnp.where(mask, w, 0)
    np.testing.assert_array_equal(jax.jit(lambda m: x @ m)(matrix), x @ dense)
    slopes = sparse.grad(loss)(matrix)
    np.testing.assert_array_equal(slopes.data, jax.grad(loss)(dense)[MASKS["w"]])


def test_traced_weights_of_known_masks():
    params, masks = on_jax(PARAMS), on_jax(MASKS)
    dense = jax.jit(lambda p: pp.to_bcoo(p, masks)["w"].todense())(params)
    np.testing.assert_array_equal(dense, np.where(MASKS["w"], PARAMS["w"], 0))
    with raises(TypeError, "not known under jit"):
        jax.jit(lambda m: pp.to_bcoo(params, {"w": m})["w"].data)(masks["w"])


def test_nothing_kept():
    found = pp.to_bcoo({"w": jnp.ones((2, 3))}, {"w": jnp.zeros((1, 3), bool)})["w"]
    assert found.nse == 0
    assert found.todense().tolist() == [[0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("params", "mask", "error", "words"),
    [
        ({"w": torch.ones(2)}, torch.ones(2, dtype=torch.bool), TypeError, ("'w'", "to_sparse()")),
        ({"w": jax.ShapeDtypeStruct((2,), "float32")}, np.ones(2, bool), TypeError, ("'w'",)),
        ({"w": jnp.ones(())}, np.ones((), bool), ValueError, ("'w'", "scalar")),
        ({"w": jnp.ones(2)}, np.ones(3, bool), ValueError, ("'w'",)),
    ],
)
def test_what_is_refused(params, mask, error, words):
    with raises(error, *words):
        pp.to_bcoo(params, {"w": mask})
