"""What holds of every search: a new one is a row of the table."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import purepruning as pp
from tests.fast import jit_once
from tests.search import nets

pytestmark = pytest.mark.usefixtures("unoptimized")

OF = pp.search.problem(nets.table_of((6, 9)), {"weights": 0.6})
AGENT = {"hidden": 8, "memory": 32, "batch": 4, "warmup": 1}


class Row(NamedTuple):
    """A search, how many batches it may need, and whether every plan meets the budget."""

    make: object
    batches: int
    always_within: bool


ROWS = {
    "netadapt": Row(lambda **o: pp.search.netadapt(OF, step=0.15, decay=1.0, **o), 6, False),
    "annealing": Row(
        lambda **o: pp.search.annealing(OF, cool_down_rate=0.6, max_proposals=30, **o),
        30,
        True,
    ),
    "evolution": Row(
        lambda **o: pp.search.evolution(OF, generations=4, offspring=3, survivors=(2,), **o),
        8,
        True,
    ),
    "amc": Row(lambda **o: pp.search.amc(OF, episodes=6, hyper=AGENT, **o), 6, True),
    "sensitivity": Row(
        lambda **o: pp.search.sensitivity(OF, ratios=(0.3, 0.6, 0.9), **o), 4, False
    ),
    "sensitivity_pruning": Row(
        lambda **o: pp.search.sensitivity_pruning(OF, per_iteration=0.3, ratios=(0.3, 0.7), **o),
        30,
        False,
    ),
}
EVALUATORS = {
    "good": lambda trial: -float(sum((i + 1) * k**2 for i, k in enumerate(trial.counts.values()))),
    "constant": lambda trial: 0.5,
    "noisy": lambda trial: float(np.random.default_rng(trial.number).normal()),
    "increasing": lambda trial: float(trial.number) ** 3,
    "decreasing": lambda trial: -(float(trial.number) ** 3),
    "huge": lambda trial: (-1.0) ** trial.number * 3e38,
    "sometimes fails": lambda trial: (
        math.nan if trial.number % 3 == 1 else 1.0 / (trial.number % 5)
    ),
}


@functools.cache
def search_of(name):
    return ROWS[name].make()


def run(name, evaluate, key=0, **options):
    search = search_of(name)
    state = search.init(jax.random.key(key))
    return pp.search.run_search(search, state, evaluate, problem=OF, **options)


#: Those that compile fast.
QUICK = ("netadapt", "annealing", "sensitivity_pruning")


def few(*names):
    """The rows of these names, and the others with --full."""
    return [n if n in names else pytest.param(n, marks=pytest.mark.full) for n in ROWS]


def without_seconds(history):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history]


@pytest.mark.parametrize("evaluator", EVALUATORS)
@pytest.mark.parametrize("name", few(*QUICK))
def test_it_ends_within_its_budget_whatever_it_is_told(name, evaluator):
    row = ROWS[name]
    try:
        found = run(name, EVALUATORS[evaluator], max_batches=row.batches)
    except RuntimeError:  # of a batch that failed as a whole
        if evaluator == "sometimes fails":
            return
        raise
    assert bool(search_of(name).done(found.state))
    within = [r["resource"]["weights"] <= OF.budgets["weights"] for r in found.history]
    assert all(within) or not row.always_within
    if name != "sensitivity":
        assert OF.measure(found.best)["weights"] <= OF.budgets["weights"]


@pytest.mark.parametrize("name", few(*QUICK))
def test_what_is_saved_in_the_middle_goes_on_the_same(name, tmp_path):
    evaluate = EVALUATORS["good"]
    whole = run(name, evaluate, key=1)
    run(name, evaluate, key=1, folder=tmp_path, max_batches=2)
    rest = run(name, evaluate, key=2, folder=tmp_path)  # the key is that of the file
    assert without_seconds(rest.history) == without_seconds(whole.history)
    assert rest.best == whole.best
    assert jax.tree.structure(rest.state) == jax.tree.structure(whole.state)


@pytest.mark.parametrize("name", few("netadapt"))
def test_minimising_is_maximising_the_negative(name):
    evaluate = EVALUATORS["good"]
    search = ROWS[name].make(optimize_mode="minimize")
    state = search.init(jax.random.key(0))
    found = pp.search.run_search(search, state, lambda t: -evaluate(t), problem=OF, max_batches=3)
    same = run(name, evaluate, max_batches=3)
    assert [r["counts"] for r in found.history] == [r["counts"] for r in same.history]


@pytest.mark.parametrize("name", few("netadapt"))
def test_one_compiled_call_over_seeds_is_the_host_loop(name):
    search, batches = search_of(name), ROWS[name].batches

    def score(counts):
        x = jnp.stack([counts[n] for n in OF.names]).astype(jnp.float32)
        return -jnp.sum(jnp.asarray([1.0, 2.0]) * jnp.square(x))

    keys = jax.random.split(jax.random.key(5), 2)
    one = jit_once(jax.vmap(lambda key: pp.search.scan_search(search, key, score, batches)))
    states, history = one(keys)
    for i in range(2):
        host = pp.search.run_search(search, search.init(keys[i]), EVALUATORS["good"])
        scores = np.asarray(history["scores"][i]).reshape(-1)
        known = scores[~np.isnan(scores)].tolist()
        if name != "amc":  # the agent's last bits differ between programs, and then its plans
            assert known == [row["score"] for row in host.history]
            np.testing.assert_array_equal(states.common.best[i], host.state.common.best)
        assert len(known) == len(host.history)
        assert bool(jax.vmap(search.done)(states)[i])
