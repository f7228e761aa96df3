"""Evolution: offspring within budgets, stages, elitism; on small problems the best plan."""

import jax
import numpy as np
import pytest

import purepruning as pp
from tests.messages import raises
from tests.search import nets

pytestmark = pytest.mark.usefixtures("unoptimized")


def test_it_finds_the_best_of_all_plans():
    of = pp.search.problem(nets.coupled(round_to=4), {"params": 0.5})
    within = [p for p in nets.every_plan(of) if nets.params_of(p) <= of.budgets["params"]]
    best = max(nets.nni_score(p) for p in within)
    search = pp.search.evolution(of, generations=15, offspring=6)
    run = pp.search.run_search(
        search, search.init(jax.random.key(0)), lambda t: nets.nni_score(t.counts), problem=of
    )
    assert nets.nni_score(run.best) == pytest.approx(best)
    assert all(row["resource"]["params"] <= of.budgets["params"] for row in run.history)


@pytest.mark.full
def test_stages_halve_and_the_parent_stays_unless_beaten():
    of = pp.search.problem(nets.coupled(), {"params": 0.5})
    search = pp.search.evolution(of, generations=4, offspring=8, survivors=(4, 1), fresh=True)
    state = search.init(jax.random.key(1))
    parent, score_of_parent = np.asarray(state.levels), -np.inf
    before, best_four = [], set()
    while not search.done(state):
        for stage, most in enumerate((8, 4, 2)):
            state, plans = search.propose(state)
            assert int(state.common.stage) == stage
            feasible = np.asarray(state.common.feasible)
            assert 1 <= feasible.sum() <= most
            rows = [{n: int(c[i]) for n, c in plans.items()} for i in range(9)]
            used = [tuple(r.values()) for r, ok in zip(rows, feasible, strict=True) if ok]
            assert len(set(used)) == len(used)
            assert feasible[-1] == (stage == 2)
            if stage == 1:  # the best four of the first stage
                assert set(np.flatnonzero(feasible)) == best_four
                assert rows == before
            scores = np.asarray([nets.nni_score(r) for r in rows])
            if stage == 0:
                order = np.argsort(np.where(feasible, -scores, np.inf), kind="stable")
                best_four, before = set(order[:4].tolist()), rows
            state = search.accept(state, np.where(feasible, scores, np.nan))
        assert float(state.score) >= score_of_parent
        if float(state.score) == pytest.approx(score_of_parent):
            np.testing.assert_array_equal(state.levels, parent)
        parent, score_of_parent = np.asarray(state.levels), float(state.score)


@pytest.mark.full
def test_depth_keeps_the_number_of_each_type_of_block():
    blocks = {f"attn{i}": [1, 0] for i in range(8)}, {f"mlp{i}": [1, 0] for i in range(8)}
    of = pp.search.choices({"attn": blocks[0], "mlp": blocks[1]}, {"attn": 6, "mlp": 5})
    search = pp.search.evolution(of, generations=30, offspring=8)
    rng = np.random.default_rng(0)
    worth = dict(zip(of.names, rng.uniform(size=16), strict=True))

    def score(trial):
        return -sum(worth[n] * c for n, c in trial.counts.items())

    run = pp.search.run_search(search, search.init(jax.random.key(0)), score, problem=of)
    for row in run.history:
        assert row["resource"] == {"attn": 6, "mlp": 5}
    for names, k in ((blocks[0], 2), (blocks[1], 3)):
        least = sorted(names, key=worth.get)[:k]
        assert {n for n in names if run.best[n]} == set(least)


@pytest.mark.full
def test_failures_do_not_stop_it():
    of = pp.search.problem(nets.coupled(round_to=2), {"params": 0.5})
    search = pp.search.evolution(of, generations=3, offspring=4, survivors=(2,))
    state, _ = search.propose(search.init(jax.random.key(0)))
    state = search.accept(state, np.full(5, np.nan))
    assert bool(state.common.failed)
    assert (int(state.stage), int(state.generation)) == (0, 1)
    with raises(ValueError, "survivors", "descend"):
        pp.search.evolution(of, survivors=(2, 4))
    with raises(ValueError, "start", "budgets"):
        pp.search.evolution(of, start=dict.fromkeys(of.names, 0))
