"""The coupling in words and as a picture."""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import pytest
from matplotlib.figure import Figure

import purepruning as pp


@pytest.fixture(autouse=True)
def _biases_broadcast():
    with jax.numpy_rank_promotion("allow"):
        yield


def fn(params, x):
    h = jax.nn.relu(x @ params["stem"]["w"] + params["stem"]["b"])
    h = h + jnp.tanh(h @ params["up"]["w"]) @ params["down"]["w"]
    return jnp.sort(h @ params["gate"]["w"]) @ params["head"]["w"]


def params():
    shapes = {"stem": (3, 8), "up": (8, 6), "down": (6, 8), "gate": (8, 4), "head": (4, 2)}
    return {k: {"w": jnp.ones(s)} for k, s in shapes.items()} | {
        "stem": {"w": jnp.ones((3, 8)), "b": jnp.ones(8)}
    }


@pytest.fixture
def coupling():
    return pp.couple(fn, params(), jnp.ones((2, 3)))


def test_text(coupling):
    text = str(coupling).splitlines()
    assert text[0].startswith("14 units in 2 families; 168 parameters, ")
    assert text[2:6] == [
        "     8 x channel       down.w[1], stem.w[1]",
        "         read by gate.w[0], up.w[0]; 1 scales, biases, tables",
        "     6 x channel       up.w[1]",
        "         read by down.w[0]; 0 scales, biases, tables",
    ]
    assert "     4 of gate.w[1]: a sort" in text
    assert "     2 of head.w[1]: an output" in text


def test_unknown_operations_are_named():
    def odd(params, x):
        return jnp.linalg.qr(x @ params["w"])[0]

    found = pp.couple(odd, {"w": jnp.ones((3, 4))}, jnp.ones((5, 3)))
    (name,) = found.unknown
    assert f"no rule for {name}, met 1 times: what it reads cannot be pruned" in str(found)
    assert not found.n_units


def test_picture_names_layers_and_sizes_of_families(coupling):
    ax = pp.draw_coupling(coupling, ax=Figure().subplots())
    texts = sorted(t.get_text() for t in ax.texts)
    assert texts == ["6", "8", "down", "gate", "stem", "up"]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["channel", "layer"]
    ax.figure.canvas.draw()
    ax = pp.draw_coupling(coupling, ax=Figure().subplots(), labels=False)
    assert not ax.texts


def test_picture_in_a_new_figure(coupling):
    plt.close(pp.draw_coupling(coupling).figure)


def test_picture_of_nothing():
    empty = pp.couple(lambda p, x: p["w"] * x, {"w": jnp.ones(3)}, jnp.ones(3))
    plt.close(pp.draw_coupling(empty).figure)
