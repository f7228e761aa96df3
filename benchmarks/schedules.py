"""Rows about schedules: many lottery tickets at once, and what scheduled pruning costs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
from data import convolution_layers, normal, residual_network, to_jax
from measure import MIB, at_least, at_most, in_turns, peak_extra, report
from training import LAYERS, step_timing

import purepruning as pp

BATCH = 60
NOISE = 1.1  # of CPU time, which others' use of the caches changes too


# Tickets.


def tickets(size: tuple[Any, ...], run: Callable[..., Any]) -> dict[str, Any]:
    widths, steps, numbers = size
    times = {n: run(tickets_timing, widths, steps, n) for n in numbers}
    memory = {n: run(_tickets_memory, widths, steps, n) for n in numbers}
    chosen = {n: t.pop("chosen") for n, t in times.items()}
    checks = []
    for n, t in times.items():
        ours = t[chosen[n]]["cpu_s"]
        loop, scan = t["a Python loop"]["cpu_s"], t["scans, one by one"]["cpu_s"]
        checks += [
            at_most(f"{n}: CPU time / the best sequential form", ours / min(loop, scan), NOISE),
            at_least(f"{n}: less CPU time than the Python loop", loop / ours, 1.5),
        ]
    few, more = numbers[0], numbers[-1]
    growth = memory[more]["peak_extra_mib"] / max(memory[few]["peak_extra_mib"], 1e-9)
    checks.append(at_most(f"memory, {more} / {few} tickets", growth, more / few * 1.1))
    shape = "-".join(map(str, widths))
    return {
        "title": f"a round of lottery tickets, MLP {shape}: {steps} steps, prune, rewind",
        "ours": {
            f"{n}, {chosen[n]}": {"time": t[chosen[n]], "memory": memory[n]}
            for n, t in times.items()
        },
        "instead": {
            f"{n}, {name}": {"time": time}
            for n, t in times.items()
            for name, time in t.items()
            if name != chosen[n]
        },
        "checks": checks,
    }


def tickets_timing(widths: tuple[int, ...], steps: int, n: int) -> dict[str, Any]:
    import jax

    a_round, step, prune, begin, batches = _lottery(widths, steps)
    states, runs = begin(n)
    apart = [jax.tree.map(lambda leaf, i=i: leaf[i], (states, runs)) for i in range(n)]
    traces = []

    def counted(state: Any, run: Any) -> Any:
        traces.append(None)
        return a_round(state, run, batches)

    by_scan, by_vmap, alone = _by_scan(counted), jax.jit(jax.vmap(counted)), jax.jit(a_round)

    def in_python() -> Any:
        results = []
        for state, run in apart:
            for batch in zip(*batches, strict=True):
                run = step(run, batch)
            results.append(prune(state, run))
        return jax.block_until_ready(results)

    def in_scans() -> Any:
        return jax.block_until_ready([alone(*ticket, batches) for ticket in apart])

    calls = {
        "scan by two": lambda: jax.block_until_ready(by_scan(states, runs)),
        "vmap": lambda: jax.block_until_ready(by_vmap(states, runs)),
        "a Python loop": in_python,
        "scans, one by one": in_scans,
    }
    results = {name: call() for name, call in calls.items()}
    _check_same_tickets(results, n)
    times = in_turns(calls, least=5, most=11)
    assert len(traces) == 2, "the scan and vmap are compiled once each"
    return times | {"chosen": "scan by two" if jax.default_backend() == "cpu" else "vmap"}


def _by_scan(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns ``lax.map`` of a function, with two tickets to a turn of its loop.

    With one, CPU time is 1.15 times that of one ticket after another; with four, 1.1.
    """
    import jax

    def turn(_: None, ticket: Any) -> tuple[None, Any]:
        return None, function(*ticket)

    return jax.jit(lambda *tickets: jax.lax.scan(turn, None, tickets, unroll=2)[1])


def _check_same_tickets(results: dict[str, Any], n: int) -> None:
    import jax

    expected = [state.masks for state, _ in results["scans, one by one"]]
    for name, result in results.items():
        for i in range(min(n, 16)):
            if isinstance(result, list):
                masks = result[i][0].masks
            else:
                masks = jax.tree.map(lambda leaf, i=i: leaf[i], result[0].masks)
            for path, mask in masks.items():
                assert int(mask.sum()) == int(expected[i][path].sum()), f"{name}: another count"
                # Other forms of a step round differently, and weights at the cut may change sides.
                differ = float((mask != expected[i][path]).mean())
                assert differ <= 1e-3, f"{name}: {differ} of the masks' bits differ"


def _tickets_memory(widths: tuple[int, ...], steps: int, n: int) -> dict[str, Any]:
    import jax

    a_round, _, _, begin, batches = _lottery(widths, steps)
    states, runs = begin(n)
    if jax.default_backend() == "cpu":
        many = _by_scan(lambda *ticket: a_round(*ticket, batches))
    else:
        many = jax.jit(jax.vmap(lambda *ticket: a_round(*ticket, batches)))
    compiled = many.lower(states, runs).compile()
    given = sum(leaf.nbytes for leaf in jax.tree.leaves((states, runs)))
    extra = peak_extra(lambda: jax.block_until_ready(compiled(states, runs)))
    temporary = compiled.memory_analysis().temp_size_in_bytes
    return {
        "peak_extra_mib": extra / MIB,
        "ratio": extra / given,
        "temporary_mib": temporary / MIB,
    }


def _lottery(widths: tuple[int, ...], steps: int) -> tuple[Any, ...]:
    """Returns a round of one ticket, its parts compiled, tickets to begin with, and batches."""
    import jax
    import jax.numpy as jnp
    import optax

    shapes = {f"layer{i}": shape for i, shape in enumerate(itertools.pairwise(widths))}
    layers = [
        pp.Layer(n, "Linear", n, shape, out_axes=(1,), in_axes=(0,)) for n, shape in shapes.items()
    ]
    config = pp.resolve([{"sparsity": 0.95, "op_types": ["Linear"]}], layers)
    lottery = pp.lottery(pp.level, config, rounds=14)
    whole = {name: jnp.ones(shape, bool) for name, shape in shapes.items()}
    optimizer = optax.chain(optax.sgd(0.05, momentum=0.9), pp.keep_pruned(whole))
    images, wanted = normal((steps, BATCH, widths[0]), 1), normal((steps, BATCH, widths[-1]), 2)
    batches = jnp.asarray(50 * images), jnp.asarray(50 * wanted)

    def loss(params: Any, x: Any, y: Any) -> Any:
        for name in shapes:
            x = x @ params[name]
            x = jax.nn.relu(x) if name != f"layer{len(shapes) - 1}" else x
        return jnp.mean((x - y) ** 2)

    def step(run: Any, batch: Any) -> Any:
        grads = jax.grad(loss)(run["params"], *batch)
        updates, opt_state = optimizer.update(grads, run["opt_state"], run["params"])
        return {"params": optax.apply_updates(run["params"], updates), "opt_state": opt_state}

    def prune(state: Any, run: Any) -> Any:
        state, run = lottery.step(state, run)
        return state, run | {"opt_state": pp.set_masks(run["opt_state"], state.masks)}

    def a_round(state: Any, run: Any, batches: Any) -> Any:
        run, _ = jax.lax.scan(lambda run, batch: (step(run, batch), None), run, batches)
        return prune(state, run)

    def begin(n: int) -> Any:
        def one(key: Any) -> Any:
            keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
            params = {
                name: jax.random.normal(keys[name], shape) * (2 / shape[0]) ** 0.5
                for name, shape in shapes.items()
            }
            run = {"params": params, "opt_state": optimizer.init(params)}
            return lottery.init(run), run

        keys = jax.random.split(jax.random.key(0), n)
        return jax.block_until_ready(jax.jit(jax.vmap(one))(keys))

    return a_round, jax.jit(step), jax.jit(prune), begin, batches


# Scheduled pruning.


def scheduled_step(shape: tuple[int, tuple[int, ...]], run: Callable[..., Any]) -> dict[str, Any]:
    width, batches = shape
    times = {batch: run(step_timing, width, batch, "scheduled") for batch in batches}
    return {
        "title": f"scheduled training step, nothing due, {LAYERS} x Dense({width}), Adam",
        "ours": {f"batch {b}": {"time": t["scheduled"]} for b, t in times.items()},
        "instead": {f"dense, batch {b}": {"time": t["dense"]} for b, t in times.items()},
        "checks": [
            at_most(
                f"batch {b}: CPU time / dense step",
                t["scheduled"]["cpu_s"] / t["dense"]["cpu_s"],
                1.05,
            )
            for b, t in times.items()
        ],
    }


def event(blocks: tuple[tuple[int, ...], int], run: Callable[..., Any]) -> dict[str, Any]:
    times = run(_event_timing, blocks)
    layers, weights = times.pop("layers"), times.pop("weights")
    ours = times.pop("event")
    return {
        "title": f"a pruning event, {weights / 1e6:.3g}M weights in {layers} layers, jitted",
        "ours": {"level, what is pruned stays pruned": {"time": ours}},
        "instead": {name: {"time": time} for name, time in times.items()},
        "checks": [
            at_least("less CPU time than argsort", times["argsort"]["cpu_s"] / ours["cpu_s"], 10),
            report("less CPU time than sort", times["sort"]["cpu_s"] / ours["cpu_s"]),
        ],
    }


def _event_timing(blocks: tuple[tuple[int, ...], int]) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    kernels = residual_network(*blocks)
    layers, params = convolution_layers(kernels), to_jax(kernels)
    config = pp.resolve([{"sparsity": 0.8, "op_types": ["Conv2d"]}], layers)
    # The fifth of ten events: what the fourth pruned is zero by now.
    table = pp.agp(end_step=9).init(config).counts
    before, counts = ({name: row[events] for name, row in table.items()} for events in (4, 5))
    old = pp.level(params, None, config.with_counts(before))
    params = jax.block_until_ready(pp.apply_masks(params, old))

    @jax.jit
    def ours(params: Any, counts: Any, old: Any) -> Any:
        return pp.level(params, None, config.with_counts(counts).with_masks(old))

    # As jaxpruner does it, layer by layer (google-research/jaxpruner): the whole layer is sorted,
    # and the k-th of all scores is the threshold; of equal ones those that come first are kept.
    def by_argsort(weight: Any, count: Any) -> Any:
        scores = jnp.abs(weight).reshape(-1)
        last = jnp.argsort(-scores)[scores.size - count - 1]
        first = (jnp.arange(scores.size) <= last) | (scores != scores[last])
        return ((scores >= scores[last]) & first).reshape(weight.shape)

    # The same without their order, which keeps all weights that are equal at the cut.
    def by_sort(weight: Any, count: Any) -> Any:
        scores = jnp.abs(weight)
        return scores >= jnp.sort(scores.reshape(-1))[count]

    def of_all(function: Callable[..., Any]) -> Callable[..., Any]:
        def masks(params: Any, counts: Any) -> Any:
            return {x.weight: function(params[x.weight], counts[x.name]) for x in layers}

        return jax.jit(masks)

    argsort, sort = of_all(by_argsort), of_all(by_sort)
    calls = {
        "event": lambda: jax.block_until_ready(ours(params, counts, old)),
        "argsort": lambda: jax.block_until_ready(argsort(params, counts)),
        "sort": lambda: jax.block_until_ready(sort(params, counts)),
    }
    found = {name: call() for name, call in calls.items()}
    for layer in layers:
        path, size = layer.weight, np.abs(np.asarray(params[layer.weight]), dtype=np.float64)
        kept = {name: np.asarray(masks[path]) for name, masks in found.items()}
        assert (~kept["event"]).sum() == counts[layer.name], f"{path}: another count"
        # Equal weights may be told apart either way.
        assert kept["argsort"].sum() == kept["event"].sum()
        np.testing.assert_allclose(size[kept["argsort"]].sum(), size[kept["event"]].sum())
        assert (kept["sort"] >= kept["argsort"]).all()
    times = in_turns(calls, least=3, most=7)
    total = sum(kernel.size for kernel in kernels.values())
    return times | {"layers": len(layers), "weights": total}
