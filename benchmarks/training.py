"""Rows about what a user waits for: the masked training step, and the first call."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal

from data import (
    convolution_layers,
    different_convolutions,
    linear_layers,
    nbytes,
    normal,
    residual_network,
    to_jax,
)
from measure import at_most, in_turns, one_torch_thread, report

import purepruning as pp

LAYERS = 6


def train_step(shape: tuple[int, tuple[int, ...]], run: Callable[..., Any]) -> dict[str, Any]:
    width, batches = shape
    times = {batch: run(step_timing, width, batch, "masked") for batch in batches}
    return {
        "title": f"training step with masks kept, {LAYERS} x Dense({width}), Adam",
        "ours": {f"batch {b}": {"time": t["masked"]} for b, t in times.items()},
        "instead": {f"dense, batch {b}": {"time": t["dense"]} for b, t in times.items()},
        "checks": [
            at_most(
                f"batch {b}: CPU time / dense step",
                t["masked"]["cpu_s"] / t["dense"]["cpu_s"],
                1.05,
            )
            for b, t in times.items()
        ],
    }


def step_timing(width: int, batch: int, how: Literal["masked", "scheduled"]) -> dict[str, Any]:
    """Returns the times of a dense step, and of one with masks or a schedule with nothing due."""
    import jax
    import jax.numpy as jnp
    import optax

    kernels = {f"dense{i}.weight": normal((width, width), i) for i in range(LAYERS)}
    config = pp.resolve([{"sparsity": 0.9, "op_types": ["Linear"]}], linear_layers(kernels))
    start, loss = to_jax(kernels), _regression(width, batch)
    masks = pp.level(start, None, config)
    never = pp.agp(begin_step=10**6, end_step=2 * 10**6, frequency=10**5)
    last = {
        "masked": pp.keep_pruned(masks),
        "scheduled": pp.prune_on_schedule(pp.level, never, config, masks=masks),
    }
    steps = {
        "dense": _stepper(loss, optax.adam(1e-4), jax.tree.map(jnp.copy, start)),
        how: _stepper(
            loss,
            optax.chain(optax.adam(1e-4), last[how]),
            {name: jnp.where(masks[name], w, 0.0) for name, w in start.items()},
        ),
    }
    times = in_turns(steps, least=5, most=60)
    after = steps[how]()
    for name, mask in masks.items():
        assert not jnp.any(jnp.where(mask, 0.0, after[name])), f"{name}: pruned weights came back"
        assert jnp.any(after[name] != start[name]), f"{name} was not trained"
    return times


def torch_step(shape: tuple[int, tuple[int, ...]], run: Callable[..., Any]) -> dict[str, Any]:
    width, batches = shape
    times = {batch: run(_torch_step_timing, width, batch) for batch in batches}
    instead = ("dense", "torch.nn.utils.prune")
    return {
        "title": f"training step with masks kept, torch, {LAYERS} x Linear({width}), Adam",
        "ours": {f"batch {b}": {"time": t["masked"]} for b, t in times.items()},
        "instead": {f"{n}, batch {b}": {"time": t[n]} for b, t in times.items() for n in instead},
        "checks": [
            check
            for b, t in times.items()
            for check in (
                at_most(
                    f"batch {b}: CPU time / dense step",
                    t["masked"]["cpu_s"] / t["dense"]["cpu_s"],
                    1.05,
                ),
                report(
                    f"batch {b}: torch.nn.utils.prune / dense step",
                    t["torch.nn.utils.prune"]["cpu_s"] / t["dense"]["cpu_s"],
                ),
            )
        ],
    }


def _torch_step_timing(width: int, batch: int) -> dict[str, Any]:
    import torch
    from torch.nn.utils import prune

    from purepruning_interop.torch import apply_, keep_pruned

    one_torch_thread()
    x = torch.from_numpy(normal((batch, width), 97))
    masks = {f"{i}.weight": torch.from_numpy(normal((width, width), i) > 0) for i in range(LAYERS)}

    def stepper(how: str) -> Callable[[], Any]:
        model = torch.nn.Sequential(
            *(torch.nn.Linear(width, width, bias=False) for _ in range(LAYERS))
        )
        if how == "torch.nn.utils.prune":
            for i in range(LAYERS):
                prune.custom_from_mask(model[i], "weight", masks[f"{i}.weight"])
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
        if how == "masked":
            apply_(model, masks)
            keep_pruned(model, masks, optimizer)

        def step() -> Any:
            optimizer.zero_grad()
            h = x
            for layer in model:
                h = torch.relu(layer(h))
            h.square().mean().backward()
            optimizer.step()
            return model

        return step

    steps = {how: stepper(how) for how in ("dense", "masked", "torch.nn.utils.prune")}
    times = in_turns(steps, least=5, most=60)
    for i, layer in enumerate(steps["masked"]()):
        zero = layer.weight == 0
        assert torch.equal(zero, ~masks[f"{i}.weight"]), f"layer {i}: pruned weights came back"
    return times


def admm_step(shape: tuple[int, tuple[int, ...]], run: Callable[..., Any]) -> dict[str, Any]:
    width, batches = shape
    times = {batch: run(_admm_timing, width, batch) for batch in batches}
    steps = {f"with penalty, batch {b}": {"time": t["penalty"]} for b, t in times.items()}
    last = times[batches[-1]]
    projection = {"admm.step": {"time": last["projection"]}}
    return {
        "title": f"training step with ADMM's penalty, {LAYERS} x Dense({width}), Adam",
        "ours": steps | projection,
        "instead": {f"dense, batch {b}": {"time": t["dense"]} for b, t in times.items()},
        "checks": [
            report(f"batch {b}: CPU time / dense step", t["penalty"]["cpu_s"] / t["dense"]["cpu_s"])
            for b, t in times.items()
        ]
        + [
            report(
                f"admm.step / dense step, batch {batches[-1]}",
                last["projection"]["cpu_s"] / last["dense"]["cpu_s"],
            )
        ],
    }


def _admm_timing(width: int, batch: int) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    import optax

    kernels = {f"dense{i}.weight": normal((width, width), i) for i in range(LAYERS)}
    config = pp.resolve([{"sparsity": 0.9, "op_types": ["Linear"]}], linear_layers(kernels))
    start, loss = to_jax(kernels), _regression(width, batch)
    project = jax.jit(lambda params, state: pp.admm.step(params, state, config, pruner=pp.level))
    state, _ = project(start, pp.admm.init(start, config))

    def with_penalty(params: Any, state: Any) -> Any:
        return loss(params) + pp.admm.penalty(params, state, config)

    grads = jax.grad(with_penalty)(start, state), jax.grad(loss)(start)
    for name, w in start.items():
        pull = 1e-4 * (w - state.z[name] + state.u[name])
        close = jnp.abs(grads[0][name] - grads[1][name] - pull).max()
        assert close <= 1e-5 * jnp.abs(grads[0][name]).max(), f"{name}: another gradient"
        assert int((state.z[name] != 0).sum()) == w.size - pp.count_of(0.9, w.size)
    optimizer = optax.adam(1e-4)
    calls = {
        "dense": _stepper(loss, optimizer, jax.tree.map(jnp.copy, start)),
        "penalty": _stepper(with_penalty, optimizer, jax.tree.map(jnp.copy, start), state),
        "projection": lambda: jax.block_until_ready(project(start, state)),
    }
    return in_turns(calls, least=5, most=60)


def _regression(width: int, batch: int) -> Callable[[Any], Any]:
    """Returns the loss of a deep network of square layers."""
    import jax
    import jax.numpy as jnp

    x, y = jnp.asarray(normal((batch, width), 97)), jnp.asarray(normal((batch, width), 98))

    def loss(params: Any) -> Any:
        h = x
        for name in sorted(params):
            h = jax.nn.relu(h @ params[name].T)
        return jnp.mean((h - y) ** 2)

    return loss


def _stepper(
    loss: Callable[..., Any], optimizer: Any, params: Any, *constants: Any
) -> Callable[[], Any]:
    """Returns a function that takes the next training step, and returns the parameters."""
    import jax
    import optax

    state = [params, optimizer.init(params)]

    def step(params: Any, opt_state: Any, *constants: Any) -> Any:
        grads = jax.grad(loss)(params, *constants)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    jitted = jax.jit(step, donate_argnums=(0, 1))

    def run() -> Any:
        state[:] = jax.block_until_ready(jitted(*state, *constants))
        return state[0]

    return run


def first_call(blocks: tuple[tuple[int, ...], int], run: Callable[..., Any]) -> dict[str, Any]:
    calls = {name: run(_first_call, name, blocks) for name in _FIRST_CALLS}
    layers, weights = (calls["level, scope layer"][key] for key in ("layers", "weights"))
    return {
        "title": f"first call: {layers} layers of {weights / 1e6:.3g}M weights",
        "ours": {name: {"time": call} for name, call in calls.items()},
        "instead": {},
        "checks": [at_most(f"{n}: wall seconds", c["wall_s"], 5) for n, c in calls.items()]
        + [report(f"{n}: second call, ms", c["second_wall_s"] * 1000) for n, c in calls.items()],
    }


_FIRST_CALLS = {
    "level, scope layer": (pp.level, "layer", "element"),
    "level, scope global": (pp.level, "global", "element"),
    "l1_norm, scope layer": (pp.l1_norm, "layer", "output_channel"),
    "l1_norm, scope global": (pp.l1_norm, "global", "output_channel"),
}


def _first_call(name: str, blocks: tuple[tuple[int, ...], int]) -> dict[str, Any]:
    import jax

    pruner, scope, granularity = _FIRST_CALLS[name]
    kernels = residual_network(*blocks)
    params = to_jax(kernels)
    rules = [{"sparsity": 0.5, "op_types": ["Conv2d"]}]
    layers = convolution_layers(kernels)
    walls, cpus = [], []
    for _ in range(2):
        wall, cpu = time.perf_counter(), time.process_time()
        config = pp.resolve(rules, layers, scope=scope, granularity=granularity)
        masks = jax.block_until_ready(pruner(params, None, config))
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    total = sum(kernel.size for kernel in kernels.values())
    pruned = sum(kernels[n].size // m.size * int((~m).sum()) for n, m in masks.items())
    # A layer of an odd number of channels loses one channel less.
    assert 0 <= 0.5 * total - pruned <= (total * 0.01), f"{pruned} of {total} weights are pruned"
    return {
        "wall_s": walls[0],
        "cpu_s": cpus[0],
        "second_wall_s": walls[1],
        "rounds": 1,
        "layers": len(kernels),
        "weights": nbytes(kernels) // 4,
    }


def first_update(size: int, run: Callable[..., Any]) -> dict[str, Any]:
    names = ("Adam", "level", "l1_norm")
    calls = {name: run(_first_update, name, size) for name in names}
    adam = calls.pop("Adam")
    weights = adam["weights"]
    return {
        "title": f"first jitted update, with compilation, of {size} convolutions of {size} shapes, "
        f"{weights / 1e6:.3g}M weights: Adam and prune_on_schedule",
        "ours": {name: {"time": call} for name, call in calls.items()},
        "instead": {"Adam alone": {"time": adam}},
        "checks": [
            at_most(f"{n}: CPU time / Adam alone", c["cpu_s"] / adam["cpu_s"], 2)
            for n, c in calls.items()
        ]
        + [report(f"{n}: an update that prunes, ms", c["next_s"] * 1000) for n, c in calls.items()],
    }


def _first_update(name: str, size: int) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    import optax

    kernels = different_convolutions(size)
    params, layers = to_jax(kernels), convolution_layers(kernels)
    grads = jax.block_until_ready(jax.tree.map(lambda w: 0.01 * w, params))
    optimizer: Any = optax.adam(1e-3)
    if name != "Adam":
        granularity = "element" if name == "level" else "output_channel"
        rules = [{"op_types": ["Conv2d"], "sparsity": 0.8}]
        config = pp.resolve(rules, layers, granularity=granularity)
        schedule = pp.agp(end_step=10)
        prune = pp.prune_on_schedule(getattr(pp, name), schedule, config)
        optimizer = optax.chain(optimizer, prune)
    state = jax.block_until_ready(optimizer.init(params))

    @jax.jit
    def update(grads: Any, state: Any, params: Any) -> Any:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    walls, cpus = [], []
    for _ in range(5):
        wall, cpu = time.perf_counter(), time.process_time()
        params, state = jax.block_until_ready(update(grads, state, params))
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    if name != "Adam":
        # At the fifth of eleven events.
        for path, mask in pp.get_masks(state, params).items():
            assert not jnp.any(jnp.where(mask, 0, params[path])), f"{path}: not pruned"
            assert 0.5 < float(jnp.mean(~mask)) < 0.8, f"{path}: another count"
    weights = sum(w.size for w in kernels.values())
    return {"wall_s": walls[0], "cpu_s": cpus[0], "next_s": min(cpus[1:]), "weights": weights}
