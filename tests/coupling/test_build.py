"""Parts that must lose equally many, as data: how they are joined and cut into chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import purepruning as pp
from purepruning.coupling.build import _chunks, _components


def test_chunks_lie_in_one_row_of_every_block():
    # By rows the first block has {1, 2, 3, 4} and {5, 6, 7, 8}, the second {1, 2, 5, 6} and the
    # rest; atom 0 stands for what is kept.
    first = np.array([[1, 2, 0, 3, 4], [5, 6, 7, 8, 0]])
    second = np.array([[5, 1, 6, 2], [3, 4, 8, 7]])
    assert [c.tolist() for c in _chunks([first, second])] == [[1, 2], [3, 4], [5, 6], [7, 8]]
    assert [c.tolist() for c in _chunks([first])] == [[1, 2, 3, 4], [5, 6, 7, 8]]
    uneven = np.array([[1, 2, 3, 4], [5, 6, 0, 0]])
    assert [c.tolist() for c in _chunks([uneven])] == [[1, 2], [3, 4], [5, 6]]
    assert _chunks([np.zeros((2, 3), int)]) == []


def test_parts_that_share_atoms_are_one_component():
    a, b, c, d = (np.array([x]) for x in ([1, 2], [3, 0], [5, 0], [2, 5]))
    assert _components([a, b, c, d]) == [[b], [a, c, d]]


def test_a_large_abstract_model_with_scanned_layers_is_coupled():
    layers, width, hidden = 40, 512, 2048

    def fn(p, x):
        def layer(h, w):
            return h + jax.nn.relu(h @ w["up"]) @ w["down"], None

        h, _ = jax.lax.scan(layer, p["embed"][x], p["layers"])
        return h @ p["head"]

    def shape(*sizes):
        return jax.ShapeDtypeStruct(sizes, jnp.bfloat16)

    params = {
        "embed": shape(1000, width),
        "head": shape(width, 1000),
        "layers": {"up": shape(layers, width, hidden), "down": shape(layers, hidden, width)},
    }
    coupling = pp.couple(fn, params, jax.ShapeDtypeStruct((1, 4), jnp.int32))
    assert [len(f) for f in coupling.families] == [layers * hidden, width]
    assert [len(g) for g in coupling.groups] == [layers, 1] or [
        len(g) for g in coupling.groups
    ] == [1, layers]
    everything = np.concatenate([np.concatenate(g) for g in coupling.groups])
    assert np.array_equal(np.sort(everything), 1 + np.arange(layers * hidden + width))


@pytest.fixture
def of_parameters():
    shapes = {"tokens": (3, 8), "scale": (8,), "q": (8, 4), "q_bias": (4,), "k": (5, 4)}
    shapes |= {"up": (8, 6), "low": (4, 6)}
    return {name: jnp.ones(shape) for name, shape in shapes.items()}


def test_queries_of_learned_tokens_are_activations(of_parameters):
    def fn(p, x):
        tokens = p["tokens"] * p["scale"][None]
        scores = (tokens @ p["q"] + p["q_bias"][None]) @ (x @ p["k"]).T
        return scores.sum(1)

    found = pp.couple(fn, of_parameters, jnp.ones((2, 5)))
    roles = {name: found.leaves[name].roles for name in ("scale", "q", "q_bias", "k")}
    assert roles == {
        "scale": ("companion",),
        "q": ("sink", "source"),
        "q_bias": ("companion",),
        "k": ("sink", "source"),
    }


def test_factors_that_are_added_to_a_weight_are_weights(of_parameters):
    def fn(p, x):
        weight = p["up"] + 0.5 * (p["q"] @ p["low"])
        return jax.nn.relu(x @ weight) @ jnp.ones((6, 2))

    found = pp.couple(fn, of_parameters, jnp.ones((2, 8)))
    assert found.leaves["up"].roles == ("sink", "source")
