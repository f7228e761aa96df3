"""Rows about searches: what they cost beside evaluations, and exact allocation."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
from measure import at_least, at_most, in_turns

import purepruning as pp


def _chain(layers: int, width: int) -> pp.search.Problem:
    """A coupled chain of dense layers at half of its multiply-adds."""
    import jax
    import jax.numpy as jnp

    names = [f"l{i:02d}" for i in range(layers)]
    params = {name: jax.ShapeDtypeStruct((width, width), jnp.float32) for name in names}
    params["out"] = jax.ShapeDtypeStruct((width, 10), jnp.float32)

    def fn(params: Any, x: Any) -> Any:
        for name in names:
            x = jax.nn.relu(x @ params[name])
        return x @ params["out"]

    coupling = pp.couple(fn, params, jax.ShapeDtypeStruct((1, width), jnp.float32))
    table = [pp.Layer(n, "Linear", n, (width, width), (1,), (0,)) for n in names]
    config = pp.resolve([{"op_types": ["Linear"]}], table, coupling=coupling)
    return pp.search.problem(config, {"macs": 0.5})


def overhead(size: tuple[int, int, int], run: Callable[..., Any]) -> dict[str, Any]:
    """Propose and accept alone, in one compiled call, per trial."""
    layers, width, batches = size
    times = run(_overhead_timing, layers, width, batches)
    limits = {name: 40.0 if name == "amc" else 1.0 for name in times}
    return {
        "title": f"a search without evaluations, {layers} coupled layers of {width}, per trial",
        "ours": {name: {"time": time} for name, time in times.items()},
        "instead": {},
        "checks": [
            at_most(f"{name}: CPU ms a trial", 1e3 * time["cpu_s"], limits[name])
            for name, time in times.items()
        ],
    }


def _overhead_timing(layers: int, width: int, batches: int) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    of = _chain(layers, width)
    searches = {
        "netadapt": pp.search.netadapt(of, step=0.5 / batches, decay=1.0),
        "annealing": pp.search.annealing(of, cool_down_rate=0.999, max_proposals=batches),
        "evolution": pp.search.evolution(of, generations=batches),
        "sensitivity": pp.search.sensitivity(of),
        "amc": pp.search.amc(of, episodes=batches, hyper={"warmup": 0}),
    }

    def score(counts: Any) -> Any:
        return -jnp.sum(jnp.square(jnp.stack(list(counts.values())).astype(jnp.float32)))

    calls, trials = {}, {}
    for name, search in searches.items():
        whole = jax.jit(lambda k, s=search: pp.search.scan_search(s, k, score, batches))
        state, _ = whole(jax.random.key(0))
        trials[name] = max(int(state.common.evaluated), 1)
        left = of.measure({n: int(c) for n, c in search.best(state).items()})["macs"]
        assert name == "sensitivity" or left <= of.budgets["macs"], name
        calls[name] = lambda f=whole: jax.block_until_ready(f(jax.random.key(0)))
    times = in_turns(calls, seconds=30.0)
    for name, time in times.items():
        for key in [k for k in time if k.endswith("_s")]:
            time[key] = time[key] / trials[name]
    return times


def knapsack(size: tuple[int, int, int], run: Callable[..., Any]) -> dict[str, Any]:
    """Dynamic programming against SciPy's milp."""
    groups, options, buckets = size
    times = run(_knapsack_timing, groups, options, buckets)
    ours, milp = times["knapsack"], times["scipy milp"]
    return {
        "title": f"exact allocation, {groups} groups of {options} options, {buckets} buckets",
        "ours": {"knapsack": {"time": ours}},
        "instead": {"scipy milp": {"time": milp}},
        "checks": [
            at_most("CPU s", ours["cpu_s"], 0.1),
            at_least("less CPU time than milp", milp["cpu_s"] / ours["cpu_s"], 1.0),
        ],
    }


def _knapsack_timing(groups: int, options: int, buckets: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    errors = np.sort(rng.exponential(size=(groups, options)), axis=1)
    costs = np.sort(rng.integers(1, 80, (groups, options)), axis=1)[:, ::-1]
    budget = min(int(0.6 * costs[:, 0].sum()), buckets)
    best = pp.search.knapsack(errors, costs, budget, buckets=buckets)
    choice = pp.search.exact_choice(errors, [costs], [budget])
    exact = errors[np.arange(groups), choice].sum()
    assert abs(float(best.error) - exact) <= 1e-9 * exact
    return in_turns(
        {
            "knapsack": lambda: pp.search.knapsack(errors, costs, budget, buckets=buckets),
            "scipy milp": lambda: pp.search.exact_choice(errors, [costs], [budget]),
        },
        seconds=20.0,
    )


def compiled(size: tuple[tuple[int, ...], int, int], run: Callable[..., Any]) -> dict[str, Any]:
    """A whole annealing search, and NetAdapt's candidates, as one call and one by one."""
    widths, batch, trials = size
    times = run(_compiled_timing, widths, batch, trials)
    pairs = {
        "annealing": ("annealing, one call", "annealing, a loop"),
        "candidates": ("candidates, one call", "candidates, one by one"),
    }
    shape = "-".join(map(str, widths))
    return {
        "title": f"{trials} trials of annealing, and a batch of NetAdapt, MLP {shape}",
        "ours": {a: {"time": times[a]} for a, _ in pairs.values()},
        "instead": {b: {"time": times[b]} for _, b in pairs.values()},
        "checks": [
            at_least(f"{name}: less CPU time", times[b]["cpu_s"] / times[a]["cpu_s"], 1.0)
            for name, (a, b) in pairs.items()
        ],
    }


def _compiled_timing(widths: tuple[int, ...], batch: int, trials: int) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    rng = np.random.default_rng(0)
    names = [f"l{i}" for i in range(len(widths) - 1)]
    params = {
        n: jnp.asarray(rng.normal(size=s).astype(np.float32) / s[0] ** 0.5)
        for n, s in zip(names, itertools.pairwise(widths), strict=True)
    }
    x = jnp.asarray(rng.normal(size=(batch, widths[0])).astype(np.float32))

    def fn(params: Any, x: Any) -> Any:
        for name in names:
            x = jax.nn.relu(x @ params[name])
        return x

    wanted = fn(params, x)
    table = [pp.make_layer(params, n, "Linear", name=n, out_axes=1, in_axes=0) for n in names[:-1]]
    config = pp.resolve([{"op_types": ["Linear"]}], table, granularity="output_channel")
    of = pp.search.problem(config, {"weights": 0.5})

    @jax.jit
    def score(counts: Any) -> Any:
        masks = pp.l1_norm(params, None, config.with_counts(counts))
        return -jnp.mean(jnp.square(fn(pp.apply_masks(params, masks), x) - wanted))

    search = pp.search.annealing(of, cool_down_rate=0.999, max_proposals=trials)
    whole = jax.jit(lambda key: pp.search.scan_search(search, key, score, trials)[0])

    def loop() -> Any:
        state = search.init(jax.random.key(0))
        return pp.search.run_search(search, state, lambda t: float(score(t.counts))).state

    one, many = whole(jax.random.key(0)), loop()
    np.testing.assert_allclose(one.common.best_score, many.common.best_score, rtol=1e-3)
    adapt = pp.search.netadapt(of, step=0.05, decay=1.0)
    _, plans = adapt.propose(adapt.init(jax.random.key(0)))
    together = jax.jit(jax.vmap(score))
    rows = [{n: c[i] for n, c in plans.items()} for i in range(len(table))]
    np.testing.assert_allclose(together(plans), [score(row) for row in rows], rtol=1e-5)
    return in_turns(
        {
            "annealing, one call": lambda: jax.block_until_ready(whole(jax.random.key(0))),
            "annealing, a loop": loop,
            "candidates, one call": lambda: jax.block_until_ready(together(plans)),
            "candidates, one by one": lambda: [float(score(row)) for row in rows],
        },
        seconds=30.0,
    )
