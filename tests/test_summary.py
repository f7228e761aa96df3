"""Summaries; all counts are worked out by hand."""

import csv
import io
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
import torch

import purepruning as pp
from purepruning.summary import summarize

T, F = True, False

# A dense layer (in, out), a grouped transposed convolution whose 2 x 3 outputs are stored per group
# (torch's layout), two stacked layers, and an embedding without known axes.
LAYERS = (
    pp.Layer("dense", "Linear", "dense.w", (3, 4), (1,), (0,), bias="dense.b"),
    pp.Layer("up", "ConvTranspose1d", "up.w", (4, 3, 2), (1,), (0,), groups=2, grouped="out"),
    pp.Layer("stack", "Linear", "stack.w", (2, 2, 3), (2,), (1,), stack_axes=(0,)),
    pp.Layer("free[red]", "Custom", "free", (5,)),
)
UP = np.ones((4, 3, 2), bool)
UP[:2, 1, :] = False  # channel 1 of group 0: 4 weights
UP[2, 0, :] = False  # channel 0 of group 1 keeps its other input: 2 weights
STACK = np.ones((2, 2, 3), bool)
STACK[1, :, 2] = False  # channel 2 of the second layer: 2 weights
MASKS = {"dense.w": [[T, F, F, T]], "dense.b": [T, F, F, T], "up.w": UP, "stack.w": STACK}
SHAPES = {"dense.w": (3, 4), "dense.b": (4,), "up.w": (4, 3, 2), "stack.w": (2, 2, 3), "free": (5,)}

# name: channels kept, channels, weights kept, weights, density
EXPECTED = {
    "dense": (2, 4, 6, 12, 0.5),
    "up": (5, 6, 18, 24, 0.75),
    "stack": (5, 6, 10, 12, 10 / 12),
    "free[red]": (None, None, 5, 5, 1.0),
}


@pytest.fixture(params=["jax", "torch"])
def summary(request):
    if request.param == "jax":
        params = {path: jnp.zeros(shape) for path, shape in SHAPES.items()}
        masks = {path: jnp.asarray(mask) for path, mask in MASKS.items()} | {"free": None}
    else:
        params = {path: torch.zeros(shape) for path, shape in SHAPES.items()}
        masks = {path: torch.as_tensor(mask) for path, mask in MASKS.items()}
    return summarize(params, masks, LAYERS)


def test_layers(summary):
    got = {
        row.name: (row.channels_kept, row.channels, row.weights_kept, row.weights, row.density)
        for row in summary.layers
    }
    assert got == EXPECTED
    assert [row.masked for row in summary.layers] == [T, T, T, F]
    assert [(row.type, row.weight, row.shape) for row in summary.layers] == [
        (layer.type, layer.weight, layer.shape) for layer in LAYERS
    ]


def test_sums_count_biases_and_unmasked_parameters(summary):
    # Without the bias, 12 + 24 + 12 = 48, of which 6 + 18 + 10 = 34 stay.
    assert (summary.layers_kept, summary.layers_masked) == (34, 48)
    assert summary.layers_density == 34 / 48
    # Masked: 12 + 4 + 24 + 12 = 52, of which 6 + 2 + 18 + 10 = 36 stay; 5 more have no mask.
    assert (summary.masked_kept, summary.masked) == (36, 52)
    assert (summary.kept, summary.total) == (41, 57)
    assert summary.masked_density == 36 / 52
    assert summary.density == 41 / 57
    assert summary.compression == 57 / 41


@pytest.mark.parametrize(
    ("granularity", "density"), [("element", 0.2), (pp.NM(2, 4), 0.5), ("output_channel", 0.25)]
)
def test_the_density_is_what_was_asked_for(granularity, density):
    params = {"w": jnp.arange(160.0).reshape(40, 4), "b": jnp.ones(4)}
    layer = pp.make_layer(params, "w", "Linear", out_axes=1, in_axes=0, bias="b")
    rule = {"op_types": ["Linear"]} | (
        {} if isinstance(granularity, pp.NM) else {"sparsity": 1 - density}
    )
    config = pp.resolve([rule], [layer], granularity=granularity)
    pruner = pp.l1_norm if granularity == "output_channel" else pp.level
    summary = summarize(params, pruner(params, None, config), [layer])
    assert summary.layers_density == density


def test_counts_are_python_ints(summary):
    row = summary.layers[0]
    counts = (row.channels_kept, row.channels, row.weights_kept, row.weights)
    sums = (summary.masked_kept, summary.masked, summary.kept, summary.total)
    assert {type(n) for n in counts + sums} == {int}


def test_counts_beyond_int32():
    params = {"w": jax.ShapeDtypeStruct((2**22, 2**12), jnp.float32)}
    layer = pp.Layer("w", "Custom", "w", (2**22, 2**12))
    summary = summarize(params, {"w": jnp.arange(2**12)[None] > 0}, [layer])
    assert summary.layers[0].weights_kept == 2**34 - 2**22
    assert (summary.kept, summary.total) == (2**34 - 2**22, 2**34)


def test_text(summary):
    text = str(summary)
    assert text.splitlines()[0].split() == [
        "layer", "type", "shape", "channels", "weights", "density",
    ]  # fmt: skip
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines()[2:6]}
    assert rows == {
        "dense": ["Linear", "3x4", "2/4", "6/12", "50.0%"],
        "up": ["ConvTranspose1d", "4x3x2", "5/6", "18/24", "75.0%"],
        "stack": ["Linear", "2x2x3", "5/6", "10/12", "83.3%"],
        "free[red]": ["Custom", "5", "5/5", "dense"],
    }
    assert "pruned layers:     34 of 48 weights kept (70.8%)" in text
    assert "36 of 52 weights kept (69.2%)" in text
    assert "41 of 57 weights kept (71.9%), compression 1.39x" in text


def test_rich_shows_the_same(summary):
    console = rich.console.Console(width=120, file=io.StringIO(), color_system=None)
    console.print(summary)
    shown = console.file.getvalue()
    for cell in ("ConvTranspose1d", "4x3x2", "18/24", "75.0%", "free[red]", "compression 1.39x"):
        assert cell in shown


def test_json(summary):
    got = json.loads(summary.to_json())
    assert got["layers"][1] == {
        "name": "up",
        "type": "ConvTranspose1d",
        "weight": "up.w",
        "shape": [4, 3, 2],
        "masked": True,
        "channels_kept": 5,
        "channels": 6,
        "weights_kept": 18,
        "weights": 24,
        "density": 0.75,
    }
    assert (got["kept"], got["total"], got["compression"]) == (41, 57, 57 / 41)


def test_csv(summary):
    rows = list(csv.DictReader(io.StringIO(summary.to_csv())))
    assert [row["name"] for row in rows] == ["dense", "up", "stack", "free[red]"]
    assert rows[1]["shape"] == "4x3x2"
    assert rows[1]["weights_kept"] == "18"
    assert rows[3]["channels"] == ""
    assert [float(row["density"]) for row in rows] == [e[-1] for e in EXPECTED.values()]


def test_nothing_left_and_nothing_there():
    empty = summarize({"w": jnp.ones(3)}, {"w": jnp.zeros(3, bool)}, [])
    assert empty.compression == math.inf
    assert json.loads(empty.to_json())["compression"] is None
    none = summarize({}, {}, [])
    assert (none.density, none.masked_density) == (1, 1)
    assert "all parameters" in str(none)


def test_mistakes_raise():
    params = {"dense.w": jnp.ones((3, 4))}
    with pytest.raises(KeyError, match=r"layer 'dense': params have no 'dense.w'"):
        summarize({"w": jnp.ones(3)}, {}, LAYERS[:1])
    with pytest.raises(ValueError, match=r"layer 'dense'.*\(3, 5\).*\(3, 4\)"):
        summarize({"dense.w": jnp.ones((3, 5))}, {}, LAYERS[:1])
    with pytest.raises(KeyError, match=r"'dense.x'"):
        summarize(params, {"dense.x": jnp.ones(3, bool)}, LAYERS[:1])
    with pytest.raises(TypeError, match="not known under jit"):
        jax.jit(lambda m: summarize(params, {"dense.w": m}, LAYERS[:1]))(jnp.ones((3, 4), bool))
