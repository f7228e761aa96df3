"""Wanda and RIA: golden scores, and rows that lose equally many weights."""

import numpy as np
import pytest

import purepruning as pp
from purepruning import Layer
from purepruning.pruners import ria, wanda
from purepruning.pruners.calibrated import of_columns
from purepruning.selection import kth_host
from purepruning.stats import inputs
from tests import oracle
from tests.messages import raises
from tests.modes import MODES, as_jax, as_torch

pytestmark = pytest.mark.usefixtures("unoptimized")

#: The first layer of network G: its weight as (out, in), and its inputs.
WEIGHT = np.random.RandomState(1).standard_normal((6, 5)).T.astype(np.float32)
INPUTS = np.random.RandomState(10).standard_normal((8, 6)).astype(np.float32)
FC = Layer("fc", "Linear", "w", (5, 6), (0,), (1,))


@pytest.mark.parametrize("framework", [as_jax, as_torch])
@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (wanda, [4.40544038, 5.73059331, 4.28911124, 2.70093854, 2.27506985, 1.97060333]),
        (ria, [0.89221999, 1.11456403, 0.76971599, 0.82942246, 0.53904868, 0.59719706]),
    ],
)
def test_golden_scores(module, expected, framework):
    params = framework({"w": WEIGHT})
    stats = inputs.update(inputs.init(params, [FC]), framework({"fc": INPUTS}), [FC])
    scores = module._element(params["w"], of_columns(stats.squares, FC))
    np.testing.assert_allclose(np.asarray(scores)[0], expected, rtol=1e-5)


@pytest.mark.parametrize("mode", ["jax_eager", "jax_jit", "torch_eager"])
@pytest.mark.parametrize("rows", [7, 40])
@pytest.mark.parametrize("turned", [False, True])
def test_every_output_loses_equally_many(mode, rows, turned, monkeypatch):
    """Exactly as many as the count, of every row the lowest; what is left over, lowest first."""
    monkeypatch.setattr(kth_host, "CHUNK", 1)  # then 16 rows at a time
    rng = np.random.default_rng(0)
    weight = rng.integers(1, 9, (rows, 10)).astype(np.float32)  # many ties
    given = np.ascontiguousarray(weight.T) if turned else weight
    layer = Layer("fc", "Linear", "w", given.shape, (int(turned),), (int(not turned),))
    x = rng.integers(-3, 4, (20, 10)).astype(np.float32)
    stats = inputs.init({"w": given}, [layer])
    stats = inputs.update(stats, {"fc": x}, [layer])
    config = pp.resolve([{"op_types": ["Linear"]}], [layer])
    scores = np.float32(weight) * np.sqrt(np.float32((x * x).sum(0)))
    order = np.argsort(scores, axis=1, kind="stable")
    rank = np.argsort(order, axis=1, kind="stable")
    for count in (0, rows, 3 * rows, 3 * rows + 3, 10 * rows - 2):
        each, rest = divmod(count, rows)
        following = np.take_along_axis(scores, order, 1)[:, min(each, 9)]
        extra = oracle.lowest(following, rest)
        expected = rank >= each + extra[:, None]
        mask = MODES[mode](pp.wanda, {"w": given}, stats, config.with_counts({"fc": count}))["w"]
        np.testing.assert_array_equal(mask, expected.T if turned else expected)


def test_global_scope_ranks_all_weights_together():
    layers = [Layer(n, "Linear", n, (3, 4), (0,), (1,)) for n in ("a", "b")]
    params = {"a": np.full((3, 4), 1.0, np.float32), "b": np.full((3, 4), 2.0, np.float32)}
    stats = inputs.init(params, layers)
    stats = inputs.update(stats, {n: np.ones((2, 4), np.float32) for n in params}, layers)
    masks = pp.wanda(params, stats, pp.resolve(0.45, layers, scope="global"))
    assert [int(masks[n].sum()) for n in params] == [2, 12]


def test_statistics_without_norms_are_refused():
    params = as_jax({"w": WEIGHT})
    stats = inputs.init(params, [FC], keep=["sums"])
    with raises(ValueError, "wanda", "'squares'", "keep=['squares']"):
        pp.wanda(params, stats, pp.resolve(0.5, [FC]))


def test_outliers_protect_their_layer():
    """OWL by Wanda's scores: the layer with more outliers loses less, the total stays."""
    rng = np.random.default_rng(1)
    layers = [Layer(n, "Linear", n, (40, 50), (0,), (1,)) for n in ("a", "b")]
    weights = {n: rng.normal(size=(40, 50)).astype(np.float32) for n in ("a", "b")}
    x = {n: rng.normal(size=(60, 50)).astype(np.float32) for n in ("a", "b")}
    x["b"][:, :2] *= 30
    for framework in (as_jax, as_torch):
        params = framework(weights)
        stats = inputs.update(inputs.init(params, layers), framework(x), layers)
        config = pp.resolve([{}], layers)
        scores = pp.wanda_scores(params, stats, config)
        for n in ("a", "b"):
            expected = np.abs(weights[n]) * np.sqrt((x[n] ** 2).sum(0))
            np.testing.assert_allclose(np.asarray(scores[n]), expected, rtol=1e-5)
        owl = pp.search.owl(scores, config, sparsity=0.6)
        with raises(ValueError, "wanda_scores", "'a'", "NaN"):
            pp.wanda_scores(params | framework({"a": weights["a"] * np.nan}), stats, config)
        assert owl.counts == {"a": 1360, "b": 1040}  # 0.6 of 2000, more and less by 0.08
        assert int(np.asarray(pp.wanda(params, stats, owl)["b"]).sum()) == 960
