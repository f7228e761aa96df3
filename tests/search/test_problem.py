"""Problems: options, resources measured on whole units, budgets, and plans that meet them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import purepruning as pp
from purepruning.search.problem import fit
from tests.messages import raises
from tests.search import nets


def test_a_resource_is_that_of_the_shrunk_model():
    config = nets.coupled()
    of = pp.search.problem(config, {"macs": 0.5})
    coupling = config.allocation.coupling
    rng = np.random.default_rng(0)
    for _ in range(20):
        plan = {
            n: int(rng.integers(0, x[-1] + 1)) for n, x in zip(of.names, of.options, strict=False)
        }
        gone = [
            s.units[0, : plan[n]] for n, s in zip(of.names, config.allocation.sets, strict=False)
        ]
        params, macs = coupling.cost(np.concatenate(gone))
        assert params == nets.params_of(plan)
        assert of.measure(plan) == {"params": params, "macs": macs, "bytes": 4 * params}


def test_within_is_exact_beyond_32_bits():
    """Layers of 2**33 multiply-adds, where float32 cannot tell one from the next."""
    n = 4096
    table = [pp.Layer("a", "Linear", "a", (n, 2**19), (0,), (1,))]
    config = pp.resolve([{"op_types": ["Linear"]}], table, granularity="output_channel")
    for left in (2**30, 2**30 + 1, 2**30 - 1):
        of = pp.search.problem(config, {"weights": left})
        fits = [bool(of.within(jnp.array([level]))) for level in (2046, 2047)]
        kept = [2**19 * (n - int(of.options[0][level])) for level in (2046, 2047)]
        assert fits == [k <= left for k in kept]
    assert of.measure({"a": 0}) == {"weights": 2**31}


def test_tables_of_your_own_are_looked_up_by_what_is_kept():
    milliseconds = {"l0": np.arange(11.0) ** 2, ("l0", "l1"): np.outer(np.arange(11), np.arange(6))}
    of = pp.search.problem(nets.table_of((10, 5)), {"ms": 0.5}, tables={"ms": milliseconds})
    assert of.dense()["ms"] == pytest.approx(150, rel=1e-9)
    assert of.measure({"l0": 4, "l1": 2})["ms"] == pytest.approx(36 + 18, rel=1e-9)
    # Entries are rounded up, so that the budget is one of the true costs.
    assert of.measure({"l0": 4, "l1": 2})["ms"] >= 54


@pytest.mark.parametrize("round_to", [1, 4])
def test_fitted_plans_meet_every_budget_and_no_group_could_give_less(round_to):
    of = pp.search.problem(
        nets.coupled(round_to=round_to), {"macs": 0.45, "params": 0.5}, caps={"conv2": 0.8}
    )
    shares = np.random.default_rng(1).uniform(0, 1, (16, 3)).astype(np.float32)
    levels = np.asarray(jax.jit(jax.vmap(lambda s: fit(of, s)))(shares))
    for row in levels:
        plan = {n: int(x[i]) for n, x, i in zip(of.names, of.options, row, strict=False)}
        left = of.measure(plan)
        assert all(left[name] <= of.budgets[name] for name in of.budgets)
        assert plan["conv2"] <= 12
        assert all((16 - plan[n]) % round_to == 0 for n in ("conv2", "conv3"))
        for g in range(3):
            if row[g]:
                less = of.measure({**plan, of.names[g]: int(of.options[g][row[g] - 1])})
                assert any(less[name] > of.budgets[name] for name in of.budgets)
    assert len(np.unique(levels, axis=0)) > (4 if round_to == 1 else 1)


def test_options_are_thinned_and_capped():
    table = [pp.Layer("a", "Linear", "a", (100, 100), (0,), (1,))]
    config = pp.resolve([{"op_types": ["Linear"]}], table)
    of = pp.search.problem(config, {"weights": 0.5}, caps=0.8, options=5)
    assert of.options[0].tolist() == [0, 2000, 4000, 6000, 8000]
    assert of.levels({"a": 4000}).tolist() == [2]


def test_mistakes_in_problems():
    config = nets.table_of()
    with raises(KeyError, "budget", "'mac'", "'weights'"):
        pp.search.problem(config, {"mac": 0.5})
    with raises(ValueError, "weights", "40", "20", "raise the budget, or caps"):
        pp.search.problem(config, {"weights": 20})
    with raises(ValueError, "weights", "-1"):
        pp.search.problem(config, {"weights": -1})
    with raises(ValueError, "weights", "(0, 1]", "at least 2", "1.5"):
        pp.search.problem(config, {"weights": 1.5})
    with raises(KeyError, "caps", "'l3'", "'l0'"):
        pp.search.problem(config, {"weights": 0.5}, caps={"l3": 0.5})
    with raises(ValueError, "'ms'", "(11,)", "(3,)"):
        pp.search.problem(config, {"ms": 0.5}, tables={"ms": {"l0": [1, 2, 3]}})
    with raises(ValueError, "scope='layer'"):
        layers = config.layers
        pp.search.problem(pp.resolve([{"op_types": ["Linear"]}], layers, scope="global"), {"x": 1})
    of = pp.search.problem(config, {"weights": 0.5})
    with raises(KeyError, "'l1'"):
        of.measure({"l0": 1})
    with raises(ValueError, "'l0'", "options", "10"):
        of.measure({"l0": 10, "l1": 0})
    with raises(ValueError, "'g'", "2", "3"):
        pp.search.choices({"x": {"g": [1, 0]}, "y": {"g": [2, 1, 0]}}, {"x": 1})


@pytest.mark.parametrize("search", ["annealing", "netadapt", "sensitivity_pruning"])
def test_where_more_pruning_costs_more_no_search_ends_over_budget(search):
    """Nine channels are slower than twelve, and one has to be left: 9 + 9 of 16 + 16."""
    jagged = np.where(np.arange(17) == 1, 9.0, np.arange(17.0))
    config = nets.table_of((16, 16))
    tables = {"ms": {"l0": jagged, "l1": jagged}}
    of = pp.search.problem(config, {"ms": 12}, tables=tables, caps=15 / 16)
    assert of.measure({"l0": 14, "l1": 14})["ms"] <= 12
    with raises(ValueError, search, "'ms': 18", "'ms': 12.0", "caps"):
        getattr(pp.search, search)(of)
