"""Curves of single groups, and NNI's pruner, against the traces of the real one."""

import jax
import matplotlib as mpl
import numpy as np
import pytest

import purepruning as pp
from tests.search import nets

pytestmark = pytest.mark.usefixtures("unoptimized")

mpl.use("agg")

CURVES = {
    "conv1": [1.0, 0.99648920, 0.98258723, 0.95553706, 0.91416558],
    "conv2": [0.99922788, 0.99192768, 0.98520121, 0.96504587, 0.93567122],
    "conv3": [0.99932385, 0.99370853, 0.98869765, 0.97405290, 0.95304083, 0.94004415],
}


def score(trial):
    return nets.nni_score(trial.counts)


def test_the_curves_of_nni_and_where_it_gives_up():
    of = pp.search.problem(nets.coupled(), {"params": 0.7})
    search = pp.search.sensitivity(of, threshold=0.05)
    run = pp.search.run_search(search, search.init(jax.random.key(0)), score)
    curves = pp.search.curves(of, run.state)
    for name, row in zip(curves.names, curves.scores, strict=True):
        known = row[~np.isnan(row)]
        np.testing.assert_allclose(known, CURVES[name], atol=1e-6)
    # A tenth of eight channels is none, so that it is not evaluated.
    assert len(run.history) == 1 + 5 + 5 + 6 - 1
    table = curves.to_csv().splitlines()
    assert table[0] == "layername,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9"
    assert [len(line.split(",")) - 1 for line in table[1:]] == [5, 5, 6]
    assert "conv3" in str(curves)
    assert len(curves.draw().lines) == 3


def test_curves_are_errors_of_the_knapsack():
    of = pp.search.problem(nets.coupled(), {"params": 0.6})
    search = pp.search.sensitivity(of)
    run = pp.search.run_search(search, search.init(jax.random.key(0)), score)
    errors = pp.search.curves(of, run.state).errors(of)
    assert errors["conv2"][8] == pytest.approx(1 - CURVES["conv2"][4], abs=1e-6)
    assert errors["conv1"][0] == 0
    assert all((np.diff(row) >= 0).all() and np.isfinite(row).all() for row in errors.values())
    found = pp.search.allocate(of, errors)
    assert found.left["params"] <= of.budgets["params"]
    # Better than equal fractions.
    even = pp.search.fitted(of, dict.fromkeys(of.names, 1.0))
    assert nets.nni_score(found.plan) > nets.nni_score(even)


def decided(budget, threshold):
    of = pp.search.problem(nets.coupled(), {"params": budget})
    search = pp.search.sensitivity_pruning(of, threshold=threshold)
    run = pp.search.run_search(search, search.init(jax.random.key(0)), score, problem=of)
    assert of.measure(run.best)["params"] <= of.budgets["params"]
    plans = [row for row in run.history if row["stage"] == 1]
    assert plans[-1]["counts"] == run.best
    return run, plans


def test_the_trace_of_nni():
    run, plans = decided(0.7, 0.05)
    expected = 0.26778720, 0.26778720, 0.31912635
    np.testing.assert_allclose(np.asarray(run.state.pruned), expected, atol=1e-6)
    assert run.best == {"conv1": 2, "conv2": 4, "conv3": 5}
    # After the second iteration 0.1789, 0.1789 and 0.2125 of 8, 16 and 16 are gone.
    assert plans[1]["counts"] == {"conv1": 1, "conv2": 2, "conv3": 3}
    scores = [row["score"] for row in plans]
    np.testing.assert_allclose(scores, [0.99855, 0.98676, 0.94997], atol=1e-5)
    # NNI makes 52 evaluations: it measures the present plan again in each of three iterations, and
    # plans that prune no channel more.
    assert len(run.history) < 52 - 3


def test_the_second_trace_of_nni():
    """A threshold that other ratios fail at: 0.4 0.4 0.4, then 0.4 0.3 0.4, then 0.3 0.2 0.3."""
    run, plans = decided(0.7, 0.02)
    expected = 0.31930251, 0.25777576, 0.31930251
    np.testing.assert_allclose(np.asarray(run.state.pruned), expected, atol=1e-6)
    # After two iterations 0.2085, 0.1814 and 0.2085 are gone: r (1 - 0.1) 367.2 / 1218.24 + 0.1.
    assert [row["counts"] for row in plans] == [
        {"conv1": 0, "conv2": 1, "conv3": 1},
        {"conv1": 1, "conv2": 2, "conv3": 3},
        {"conv1": 2, "conv2": 4, "conv3": 5},
    ]
    assert len(run.history) < 38 - 3


def test_it_stops_by_what_is_left_not_by_nominal_shares():
    """NNI goes on to a nominal 0.3, of a model that already has less than three quarters."""
    _run, plans = decided(0.75, 0.02)
    assert len(plans) == 2
