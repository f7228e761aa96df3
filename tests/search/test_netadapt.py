"""NetAdapt: candidates, winners, the traces of NNI as far as definitions agree."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import purepruning as pp
from tests.messages import raises
from tests.search import nets

pytestmark = pytest.mark.usefixtures("unoptimized")


def finished(search, score, key=0):
    """Every batch of a search by an evaluator of plain plans: plans, feasible, scores."""
    state, batches = search.init(jax.random.key(key)), []
    while not search.done(state):
        state, plans = search.propose(state)
        rows = [{n: int(c[i]) for n, c in plans.items()} for i in range(len(state.common.feasible))]
        feasible = np.asarray(state.common.feasible)
        scores = [score(row) if ok else np.nan for row, ok in zip(rows, feasible, strict=True)]
        state = search.accept(state, scores)
        batches.append((rows, feasible.tolist(), scores, int(state.common.taken)))
    return state, batches


def test_the_first_iterations_of_nni():
    """What a row of each layer saves is NNI's 'related weights', and the scores are the same."""
    of = pp.search.problem(nets.coupled(), {"params": 0.7})
    rows = {"conv1": 8, "conv2": 16, "conv3": 16}
    zero = dict.fromkeys(rows, 0)
    dense = of.measure(zero)["params"]
    saved = {n: (dense - of.measure({**zero, n: 1})["params"]) * k for n, k in rows.items()}
    assert dense == 3832
    assert saved == {"conv1": 1368, "conv2": 3456, "conv3": 2464}
    # NNI rounds 383 / related down to 2, 1 and 2 rows, here the target is met: 3, 2 and 3.
    nni = {"conv1": (2, 0.98258723), "conv2": (1, 0.99922788), "conv3": (2, 0.99723659)}
    for name, (count, score) in nni.items():
        assert nets.nni_score({**zero, name: count}) == pytest.approx(score, abs=1e-6)
    search = pp.search.netadapt(of, step=0.1, decay=1.0)
    _, batches = finished(search, nets.nni_score)
    assert [row[n] for row, n in zip(batches[0][0], rows, strict=True)] == [3, 2, 3]
    assert of.names[batches[0][3]] == "conv2"


@pytest.mark.parametrize(
    ("budget", "step"),
    [
        (0.85, 0.05),
        pytest.param(0.7, 0.1, marks=pytest.mark.full),
        pytest.param(0.3, 0.1, marks=pytest.mark.full),
    ],
)
def test_every_iteration_prunes_and_the_budget_is_met(budget, step):
    """With a budget of 0.85 and steps of 0.05 NNI returns a model with nothing pruned."""
    of = pp.search.problem(nets.coupled(), {"params": budget})
    state, batches = finished(pp.search.netadapt(of, step=step, decay=1.0), nets.nni_score)
    now, left = dict.fromkeys(of.names, 0), 3832
    for rows, feasible, scores, taken in batches:
        target = max(left - step * 3832, of.budgets["params"])
        for name, row, ok in zip(of.names, rows, feasible, strict=True):
            if not ok:
                continue
            assert row[name] > now[name]
            assert all(row[n] == now[n] for n in now if n != name)
            # The fewest that meet the target.
            assert nets.params_of(row) <= target + 1e-3
            less = nets.params_of({**row, name: row[name] - 1})
            assert less > target or row[name] == now[name] + 1
        assert scores[taken] == np.nanmax(scores)
        now, left = rows[taken], nets.params_of(rows[taken])
    assert left <= of.budgets["params"]
    assert of.budgets["params"] - left < 16 * 9 + 16 * 9  # one unit of the largest
    best = pp.search.netadapt(of, step=step, decay=1.0).best(state)
    assert {n: int(x) for n, x in best.items()} == now


@pytest.mark.full
def test_the_reduction_is_halved_where_no_layer_can_spare_it():
    """NNI loops for ever there. Four of ten units at most, of three layers: 0.9 is too much."""
    of = pp.search.problem(nets.table_of((10, 10, 10)), {"weights": 0.7}, caps=0.4)
    state, batches = finished(pp.search.netadapt(of, step=0.25, decay=1.0), lambda row: 0.0)
    # 0.25 of 30 units is 7.5, more than four: halved to 3.75, so that four go.
    assert [row[n] for row, n in zip(batches[0][0], of.names, strict=True)] == [4, 4, 4]
    assert int(state.levels.sum()) == 9


@pytest.mark.full
def test_ratio_prefers_what_saves_more_for_its_loss():
    """Two rows of conv1 save 342 weights for 0.02, a row of conv2 216 for 0.015."""
    of = pp.search.problem(nets.coupled(), {"params": 0.9})
    losses = {"conv1": 0.02, "conv2": 0.015, "conv3": 0.025}

    def score(row):
        return 1 - sum(losses[n] for n, k in row.items() if k)

    for by, name in (("score", "conv2"), ("ratio", "conv1")):
        search = pp.search.netadapt(of, step=0.05, decay=1.0, by=by, initial_score=1.0)
        _, batches = finished(search, score)
        rows, _, _, taken = batches[0]
        assert [3832 - nets.params_of(row) for row in rows] == [342, 216, 308]
        assert of.names[taken] == name


@pytest.mark.full
def test_decay_makes_later_steps_smaller():
    of = pp.search.problem(nets.coupled(), {"params": 0.6})
    _, batches = finished(pp.search.netadapt(of, step=0.1, decay=0.8), nets.nni_score)
    left = [3832, *(nets.params_of(rows[taken]) for rows, _, _, taken in batches)]
    for i, (a, b) in enumerate(itertools.pairwise(left)):
        assert a - b >= 383.2 * 0.8**i - 1 or b <= of.budgets["params"]
    with raises(ValueError, "decay", "0.25", "0.4"):
        pp.search.netadapt(of, step=0.05, decay=0.8)


@pytest.mark.full
def test_two_budgets_are_both_met():
    of = pp.search.problem(nets.coupled(), {"params": 0.5, "macs": 0.6})
    state, _ = finished(pp.search.netadapt(of, step=0.1, decay=1.0), nets.nni_score)
    plan = dict(zip(of.names, np.asarray(state.common.best).tolist(), strict=True))
    left = of.measure(plan)
    assert left["params"] <= of.budgets["params"]
    assert left["macs"] <= of.budgets["macs"]


@pytest.mark.full
def test_latency_that_does_not_fall_with_every_channel():
    """Hardware works in steps of four: the largest count that meets the target is a multiple."""
    steps = 4.0 * np.ceil(np.arange(17) / 4)
    jagged = steps + np.where(np.arange(17) % 4 == 1, 3, 0)  # nine channels are slower than twelve
    of = pp.search.problem(
        nets.table_of((16, 16)), {"ms": 0.8}, tables={"ms": {"l0": jagged, "l1": jagged}}
    )
    search = pp.search.netadapt(of, step=0.1, decay=1.0)
    _, batches = finished(search, lambda row: -row["l0"])
    assert [row[n] for row, n in zip(batches[0][0], of.names, strict=True)] == [4, 4]


def test_nan_never_wins_and_all_nan_is_a_flag():
    of = pp.search.problem(nets.coupled(), {"params": 0.7})
    search = pp.search.netadapt(of, step=0.1, decay=1.0)
    state, _ = search.propose(search.init(jax.random.key(0)))
    one = search.accept(state, [np.nan, np.nan, -5.0])
    assert (int(one.common.taken), bool(one.common.failed)) == (2, False)
    none = search.accept(state, jnp.full(3, jnp.nan))
    assert (int(none.common.taken), bool(none.common.failed)) == (-1, True)
    np.testing.assert_array_equal(none.levels, state.levels)
    assert int(none.iteration) == 0
