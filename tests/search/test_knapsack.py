"""Exact allocation against hand calculation, SciPy's milp, and all plans of small problems."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import purepruning as pp
from tests.messages import raises
from tests.search import nets

COSTS = [[8, 6, 4, 2], [16, 12, 8, 4], [10, 5, 3, 1]]
ERRORS = [[0, 1, 3, 9], [0, 2, 5, 14], [0, 4, 6, 20]]
# Of the two plans of budget 26 the rule takes option 0 in the last group.
GOLDEN = {
    34: (0, [0, 0, 0]),
    26: (5, [2, 1, 0]),
    20: (10, [1, 2, 1]),
    16: (14, [2, 2, 2]),
    12: (23, [2, 3, 2]),
    8: (43, [3, 3, 3]),
}


@pytest.mark.parametrize("budget", GOLDEN)
def test_the_golden_table(budget):
    best = pp.search.knapsack(ERRORS, COSTS, budget)
    error, choice = GOLDEN[budget]
    assert (float(best.error), best.choice.tolist()) == (error, choice)
    assert best.cost == sum(row[j] for row, j in zip(COSTS, choice, strict=True)) <= budget
    assert best.bound <= error + 1e-9


def test_budgets_at_once_traced_and_known():
    budgets = jnp.asarray(list(GOLDEN), jnp.int32)
    known = pp.search.knapsack(ERRORS, COSTS, np.asarray(budgets))
    traced = jax.jit(
        lambda b: pp.search.knapsack(np.asarray(ERRORS), np.asarray(COSTS), b, buckets=64)
    )(budgets)
    for best in (known, traced):
        assert best.error.tolist() == [e for e, _ in GOLDEN.values()]
        assert best.choice.tolist() == [c for _, c in GOLDEN.values()]
    np.testing.assert_allclose(known.bound, traced.bound, rtol=1e-5, atol=1e-5)


def test_nothing_within_the_budget():
    best = pp.search.knapsack(ERRORS, COSTS, 6)
    assert (best.choice.tolist(), float(best.error)) == ([-1, -1, -1], np.inf)
    one = jax.jit(lambda b: pp.search.knapsack(np.asarray(ERRORS), np.asarray(COSTS), b))
    for budget in (6, -1, -5.5, np.nan):
        best = one(jnp.float32(budget))
        assert (best.choice.tolist(), float(best.error)) == ([-1, -1, -1], np.inf)
        assert float(best.cost) == np.inf


def test_of_a_budget_of_nothing_what_costs_nothing_is_taken():
    errors, costs = np.asarray([[0.0, 1.0], [0.0, 2.0]]), np.asarray([[0.5, 0.0], [0.25, 0.0]])
    known = pp.search.knapsack(errors, costs, 0)
    traced = jax.jit(lambda b: pp.search.knapsack(errors, costs, b))(jnp.float32(0))
    for best in (known, traced):
        assert (best.choice.tolist(), float(best.error), float(best.cost)) == ([1, 1], 3, 0)


@pytest.mark.parametrize("seed", range(6))
def test_random_instances_against_milp(seed):
    rng = np.random.default_rng(seed)
    groups, options = rng.integers(3, 12), rng.integers(2, 9)
    costs = rng.integers(1, 200, (groups, options))
    errors = rng.exponential(size=(groups, options))
    least, most = costs.min(1).sum(), costs.max(1).sum()
    budget = int(least + rng.uniform(0.1, 0.8) * (most - least))
    best = pp.search.knapsack(errors, costs, budget)
    choice = pp.search.exact_choice(errors, [costs], [budget])
    exact = errors[np.arange(groups), choice].sum()
    assert best.error == pytest.approx(exact, rel=1e-9)
    assert best.cost <= budget
    assert best.bound <= exact + 1e-9
    # Real costs are rounded up to buckets: never over budget, nearly as good.
    real = pp.search.knapsack(errors, costs * 0.37, budget * 0.37)
    assert real.cost <= budget * 0.37
    assert exact - 1e-9 <= real.error <= 1.1 * exact + 1e-9


def test_several_resources_against_all_choices():
    rng = np.random.default_rng(3)
    errors = rng.exponential(size=(4, 4))
    costs = [rng.integers(1, 20, (4, 4)) for _ in range(2)]
    budgets = [30, 35]
    every = [
        (errors[range(4), c].sum(), c)
        for c in itertools.product(range(4), repeat=4)
        if all(t[range(4), c].sum() <= b for t, b in zip(costs, budgets, strict=True))
    ]
    choice = pp.search.exact_choice(errors, costs, budgets)
    assert errors[range(4), choice].sum() == pytest.approx(min(every)[0])
    with raises(ValueError, "budgets", "larger"):
        pp.search.exact_choice(errors, costs, [1, 1])


@pytest.mark.parametrize("budget", [{"macs": 0.5}, {"params": 0.3}, {"macs": 0.6, "params": 0.5}])
def test_coupled_plans_against_all_plans(budget):
    """Widths multiply, so that rounds of linear costs are no proof: within 5 % of the best here."""
    of = pp.search.problem(nets.coupled(round_to=2), budget)
    errors = {
        n: 1 - np.asarray([nets.curve(n)[c] for c in o])
        for n, o in zip(of.names, of.options, strict=True)
    }
    found = pp.search.allocate(of, errors)

    def error(plan):
        return sum(1 - nets.curve(n)[c] for n, c in plan.items())

    def fits(plan):
        left = of.measure(plan)
        return all(left[n] <= of.budgets[n] for n in of.budgets)

    best = min(error(plan) for plan in nets.every_plan(of) if fits(plan))
    assert fits(found.plan)
    assert found.left == of.measure(found.plan)
    assert found.error == pytest.approx(error(found.plan))
    assert best - 1e-9 <= found.error <= 1.05 * best


def test_costs_that_add_up_are_solved_exactly():
    rng = np.random.default_rng(5)
    costs = {f"g{i}": np.sort(rng.integers(1, 30, 5))[::-1] for i in range(6)}
    errors = {name: np.sort(rng.exponential(size=5)) for name in costs}
    of = pp.search.choices({"ms": costs}, {"ms": 0.5})
    found = pp.search.allocate(of, errors)
    exact = pp.search.knapsack(list(errors.values()), list(costs.values()), of.budgets["ms"])
    assert found.error == pytest.approx(float(exact.error))


def test_mistakes():
    with raises(ValueError, "errors", "costs", "(3, 4)", "(2, 4)"):
        pp.search.knapsack(ERRORS, COSTS[:2], 20)
    with raises(ValueError, "costs", "negative"):
        pp.search.knapsack([[0, 1]], [[1, -1]], 2)
    with raises(ValueError, "errors", "NaN"):
        pp.search.knapsack([[0, np.nan]], [[1, 1]], 2)
    of = pp.search.problem(nets.table_of(), {"weights": 0.5})
    with raises(KeyError, "'l1'"):
        pp.search.allocate(of, {"l0": np.zeros(10)})
    with raises(ValueError, "'l0'", "10", "(3,)"):
        pp.search.allocate(of, {"l0": np.zeros(3), "l1": np.zeros(10)})
