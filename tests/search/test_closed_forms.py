"""Allocations by formula, against published sizes and a brute-force count."""

import csv
from pathlib import Path

import numpy as np
import pytest

import purepruning as pp
from tests.messages import raises

GOLDEN = Path(__file__).parent.parent / "golden"


def resnet50():
    """The 54 kernels of ResNet-50, with its blocks' names."""
    shapes = {"conv1": (7, 7, 3, 64)}
    inputs = 64
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), 1):
        for i in range(blocks):
            name = f"layer{stage}.{i}"
            shapes[f"{name}.conv1"] = (1, 1, inputs, width)
            shapes[f"{name}.conv2"] = (3, 3, width, width)
            shapes[f"{name}.conv3"] = (1, 1, width, 4 * width)
            if i == 0:
                shapes[f"{name}.downsample"] = (1, 1, inputs, 4 * width)
            inputs = 4 * width
    shapes["fc"] = (1, 1, 2048, 1000)
    table = [pp.Layer(n, "Conv2d", n, s, (3,), (2,)) for n, s in shapes.items()]
    return shapes, pp.resolve([{"op_types": ["Conv2d"]}], table)


def megabytes(shapes, config):
    """As RigL counts: four bytes of a weight, and a bit of mask where a layer is sparse."""
    size = 4 * (26_560 + 1_000)
    for name, shape in shapes.items():
        n, gone = int(np.prod(shape)), int(config.counts[name])
        size += 4 * (n - gone) + (n / 8 if gone else 0)
    return size / 1e6


@pytest.mark.parametrize(
    ("sparsity", "published", "dense"),
    [
        (0.8, 23.683, ()),
        (0.9, 13.499, ()),
        (0.95, 8.399, ()),
        (0.965, 6.904, ("conv1",)),
        (0.99, 4.354, ("conv1",)),
    ],
)
def test_the_sizes_that_rigl_published(sparsity, published, dense):
    shapes, config = resnet50()
    # The fully connected kernel has two dimensions there.
    shapes["fc"] = (2048, 1000)
    table = [
        pp.Layer(n, "Conv2d" if len(s) == 4 else "Linear", n, s, (len(s) - 1,), (len(s) - 2,))
        for n, s in shapes.items()
    ]
    config = pp.resolve([{"op_types": ["Conv2d", "Linear"]}], table)
    found = pp.search.erk(config, sparsity=sparsity, dense=dense)
    assert megabytes(shapes, found) == pytest.approx(published, abs=1.1e-3)
    if sparsity == 0.8:
        whole = {n for n, k in found.counts.items() if k == 0}
        assert whole == {
            *(f"layer1.{i}.conv{j}" for i in range(3) for j in (1, 3)),
            "layer1.0.downsample",
            "layer2.0.conv1",
        }
        kept = 1 - found.counts["layer4.1.conv2"] / 512**2 / 9
        assert 1 - kept == pytest.approx(0.956534, abs=1e-5)
    if sparsity == 0.9:
        assert [n for n, k in found.counts.items() if k == 0] == ["layer1.0.conv1"]


@pytest.mark.parametrize(("sparsity", "published"), [(0.9, 13.532), (0.95, 8.433), (0.965, 6.904)])
def test_uniform_sizes_with_a_dense_first_layer(sparsity, published):
    shapes, config = resnet50()
    counts = {**pp.search.uniform(config, sparsity=sparsity).counts, "conv1": 0}
    assert megabytes(shapes, config.with_counts(counts)) == pytest.approx(published, abs=1e-3)


PUBLISHED = {  # README of STR: overall sparsity, parameters and multiply-adds in millions
    "87.70": (3.136, 401.6),
    "90.23": (2.492, 342.6),
    "95.02": (1.269, 158.6),
    "95.15": (1.238, 162.2),
    "96.53": (0.884, 117.1),
    "98.05": (0.498, 72.8),
    "98.98": (0.260, 47.3),
}


def test_the_budgets_that_str_learnt():
    rows = list(csv.reader((GOLDEN / "str_layer_sparsities.csv").read_text().splitlines()))
    _head, rows = (rows[0], rows[1:]) if not rows[0][1].isdigit() else (None, rows)
    shapes, config = resnet50()
    assert len(rows) == len(shapes) == 54
    sizes = [int(np.prod(s)) for s in shapes.values()]
    assert [int(r[1]) for r in rows] == sizes
    found = {}
    for column in range(3, len(rows[0])):
        sparsities = {n: float(r[column]) / 100 for n, r in zip(shapes, rows, strict=True)}
        counts = config.with_sparsity(sparsities).counts
        kept = {n: k - counts[n] for n, k in zip(shapes, sizes, strict=True)}
        params = sum(kept.values())
        macs = sum(int(r[2]) * kept[n] / int(r[1]) for n, r in zip(shapes, rows, strict=True))
        found[f"{100 * (1 - params / sum(sizes)):.2f}"] = params / 1e6, macs / 1e6
    assert len(found) == 16
    for name, (params, macs) in PUBLISHED.items():
        key = min(found, key=lambda k: abs(float(k) - float(name)))
        assert found[key][0] == pytest.approx(params, abs=2e-3)
        assert found[key][1] == pytest.approx(macs, abs=0.15)


def test_lamp_against_a_brute_force_count():
    rng = np.random.default_rng(0)
    params = {
        n: (rng.normal(size=(3, k)) * s).astype(np.float32)
        for n, k, s in (("a", 4, 1.0), ("b", 9, 0.1), ("c", 2, 7.0))
    }
    table = [pp.make_layer(params, n, "Linear", name=n, out_axes=0, in_axes=1) for n in params]
    config = pp.resolve([{"op_types": ["Linear"]}], table)
    for sparsity in (0.2, 0.5, 0.9):
        found = pp.search.lamp(params, config, sparsity=sparsity).counts
        scores = []
        for name, w in params.items():
            flat = np.asarray(w, np.float64).reshape(-1) ** 2
            scores += [(v / flat[flat >= v].sum(), name) for v in flat]
        gone = [name for _, name in sorted(scores)[: int(45 * sparsity)]]
        assert found == {n: gone.count(n) for n in params}
        assert sum(found.values()) == pp.count_of(sparsity, 45)


def test_owl_spares_layers_with_outliers():
    table = [pp.Layer(n, "Linear", n, (10, 100), (1,), (0,)) for n in "abc"]
    config = pp.resolve([{"op_types": ["Linear"]}], table)
    scores = {
        n: np.where(np.arange(1000) < k, 100.0, 1.0) for n, k in (("a", 0), ("b", 10), ("c", 20))
    }
    found = pp.search.owl(scores, config, sparsity=0.7).counts
    # D of 0, 1, 2 percent becomes 0, 0.08, 0.16; its mean is 0.08.
    assert found == {"a": 780, "b": 700, "c": 620}


def test_progression_meets_the_total_at_any_slope():
    table = [
        pp.Layer(f"l{i}", "Linear", f"l{i}", (n, 10), (1,), (0,)) for i, n in enumerate((5, 50, 7))
    ]
    config = pp.resolve([{"op_types": ["Linear"]}], table)
    for slope in (-2.0, -0.3, 0.0, 0.1, 5.0):
        found = pp.search.progression(config, sparsity=0.6, slope=slope, order=["l0", "l1", "l2"])
        assert sum(found.counts.values()) == 372
        shares = [found.counts[f"l{i}"] / n for i, n in enumerate((50, 500, 70))]
        assert (np.diff(shares) * np.sign(slope) >= -0.02).all()


def test_uniform_plus_meets_the_total():
    _, config = resnet50()
    found = pp.search.uniform_plus(config, sparsity=0.9, first="conv1", last="fc").counts
    assert found["conv1"] == 0
    assert sum(found.values()) == pp.count_of(0.9, 25_502_912)
    assert found["fc"] <= 0.8 * 2_048_000
    with raises(ValueError, "uniform_plus", "fifth"):
        pp.search.uniform_plus(config, sparsity=0.99, first="conv1", last="fc")


def test_mistakes():
    _, config = resnet50()
    with raises(KeyError, "dense", "'conv'", "'conv1'"):
        pp.search.erk(config, sparsity=0.9, dense=["conv"])
    with raises(ValueError, "order", "every pool"):
        pp.search.progression(config, sparsity=0.9, slope=0.1, order=["conv1"])
    with raises(ValueError, "sparsity"):
        pp.search.uniform(config, sparsity=1.5)
