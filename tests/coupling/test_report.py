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


def texts(ax):
    """Returns what is written beside each layer, from top to bottom."""
    rows = {}
    for text in ax.texts:
        rows.setdefault(text.xy[1], []).append(text.get_text())
    return [rows[y] for y in sorted(rows)]


def dots(ax, face):
    """Returns lane and nearest row of the dots that are filled, or open."""
    found = {
        (line.get_xdata()[0], round(line.get_ydata()[0]))
        for line in ax.lines
        if line.get_marker() == "o" and (line.get_markerfacecolor() != line.get_color()) == face
    }
    return sorted(found)


def test_picture_has_a_row_for_each_layer_in_the_order_of_the_program(coupling):
    ax = pp.draw_coupling(coupling, ax=Figure().subplots())
    assert texts(ax) == [
        ["stem", "3 × 8", "8 channels"],
        ["up", "8 × 6", "6 channels"],
        ["down", "6 × 8", "8 channels"],
        ["gate", "8 × 4", ""],
        ["head", "4 × 2", ""],
    ]
    # The stream between stem and gate to the left of what lies inside.
    assert dots(ax, face=False) == [(0, 0), (0, 2), (1, 1)]
    assert dots(ax, face=True) == [(0, 1), (0, 3), (1, 2)]
    bottom, top = ax.get_ylim()
    assert bottom > top


def test_picture_shows_what_is_pruned(coupling):
    stream = next(f for f in coupling.families if len(f) == 8)
    ax = pp.draw_coupling(coupling, stream.units[:6], ax=Figure().subplots())
    assert texts(ax)[:3] == [
        ["stem", "3 × 8→2", "2 of 8 channels"],
        ["up", "8→2 × 6", "6 channels"],
        ["down", "6 × 8→2", "2 of 8 channels"],
    ]
    band, core = [x for x in ax.lines if set(x.get_xdata()) == {0} and x.get_marker() == "None"]
    assert core.get_linewidth() == pytest.approx(band.get_linewidth() / 4)
    with pytest.raises(ValueError, match="unit numbers from 1 to 14, got 15"):
        pp.draw_coupling(coupling, [15])


def test_picture_without_labels(coupling):
    ax = pp.draw_coupling(coupling, ax=Figure().subplots(), labels=False)
    assert not ax.texts


def test_lines_of_families_that_do_not_meet_share_a_lane():
    def deep(params, x):
        for w in params["layers"]:
            x = jnp.tanh(x @ w["w"])
        return x

    shapes = [(3, 8), *[(8, 8)] * 100, (8, 2)]
    params = {"layers": [{"w": jnp.ones(shape)} for shape in shapes]}
    coupling = pp.couple(deep, params, jnp.ones((2, 3)))
    assert len(coupling.families) == 101
    ax = pp.draw_coupling(coupling)
    assert {lane for lane, _ in dots(ax, face=False)} == {0, 1}
    ax.figure.canvas.draw()
    assert max(t.get_window_extent().x1 for t in ax.texts) <= ax.figure.bbox.x1
    plt.close(ax.figure)


def test_picture_in_a_new_figure(coupling):
    plt.close(pp.draw_coupling(coupling).figure)


def test_picture_of_nothing():
    empty = pp.couple(lambda p, x: p["w"] * x, {"w": jnp.ones(3)}, jnp.ones(3))
    plt.close(pp.draw_coupling(empty).figure)
