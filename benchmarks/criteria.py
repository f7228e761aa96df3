"""Rows about criteria that look at data: capturing statistics, and ranking by them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from data import convolution_layers, fingerprint, normal, residual_network, to_jax, to_torch
from measure import MIB, at_most, in_turns, one_torch_thread, peak_extra, report

import purepruning as pp
from purepruning.stats import activations, gradients
from purepruning.stats.accumulate import CompensatedSum, WideCount

LIMIT = 1.3  # times the plain forward pass


# Capture.


def capture(sizes: dict[str, Any], run: Callable[..., Any]) -> dict[str, Any]:
    times = {name: run(_capture_timing, name, size) for name, size in sizes.items()}
    ratios = {
        name: t["with statistics"]["cpu_s"] / t["plain"]["cpu_s"] for name, t in times.items()
    }
    return {
        "title": "forward pass with statistics of all layers' activations",
        "ours": {name: {"time": t["with statistics"]} for name, t in times.items()},
        "instead": {f"plain, {name}": {"time": t["plain"]} for name, t in times.items()},
        "checks": [
            at_most(f"{name}: CPU time / plain", ratio, LIMIT)
            if name.startswith("jax")
            else report(f"{name}: CPU time / plain", ratio)
            for name, ratio in ratios.items()
        ],
    }


def _capture_timing(name: str, size: tuple[int, ...]) -> dict[str, Any]:
    framework, _, kind = name.partition(", ")
    if framework == "jax":
        calls, state = _in_jax(kind, size)
    else:
        calls, state = _in_torch(kind, size)
    result = in_turns(calls, least=7, most=41)
    stats, outputs, layers = state()
    for layer in layers:
        zeros = np.asarray(outputs[layer.name]) <= 0
        axes = tuple(a % zeros.ndim for a in layer.output_axes)
        rest = tuple(a for a in range(zeros.ndim) if a not in axes)
        # Compiled with what follows it, an output may be rounded to the other side of zero.
        close = np.abs(np.asarray(stats.zeros[layer.name].low)[0] - zeros.sum(rest))
        assert close.max() <= 1 + 1e-4 * zeros.size, f"{layer.name}: other zeros"
    return result


def _in_jax(kind: str, size: tuple[int, ...]) -> tuple[dict[str, Any], Any]:
    import jax
    from flax import linen as nn

    from purepruning_interop import linen

    if kind == "convolutions":
        batch, side, *widths = size
        layers = [
            part
            for width in widths
            for part in (
                nn.Conv(width, (3, 3), use_bias=False),
                nn.BatchNorm(use_running_average=True),
                nn.relu,
            )
        ]
        x = normal((batch, side, side, widths[0]))
    else:
        batch, depth, width = size
        layers = [part for _ in range(depth) for part in (nn.Dense(width), nn.relu)]
        x = normal((batch, width))
    model, x = nn.Sequential(layers), jax.numpy.asarray(x)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    table = linen.layers(model, variables, x)
    table = [layer for layer in table if layer.type in ("Conv2d", "Linear")]
    start = activations.init(variables, table)

    @jax.jit
    def plain(variables: Any, x: Any) -> Any:
        return model.apply(variables, x)

    @jax.jit
    def watched(stats: Any, variables: Any, x: Any) -> Any:
        y, outputs = linen.capture(model, variables, x, layers=table)
        return y, activations.update(stats, outputs, table, activation="relu")

    calls = {
        "plain": lambda: jax.block_until_ready(plain(variables, x)),
        "with statistics": lambda: jax.block_until_ready(watched(start, variables, x)),
    }

    def state() -> Any:
        _, outputs = linen.capture(model, variables, x, layers=table)
        return watched(start, variables, x)[1], outputs, table

    return calls, state


def _in_torch(kind: str, size: tuple[int, ...]) -> tuple[dict[str, Any], Any]:
    import torch
    from torch import nn

    from purepruning_interop import torch as interop

    one_torch_thread()
    layers: list[nn.Module] = []
    if kind == "convolutions":
        batch, side, *widths = size
        inputs = widths[0]
        for width in widths:
            layers += [nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
            layers.append(nn.ReLU())
            inputs = width
        x = normal((batch, widths[0], side, side))
    else:
        batch, depth, width = size
        layers = [part for _ in range(depth) for part in (nn.Linear(width, width), nn.ReLU())]
        x = normal((batch, width))
    model, x = nn.Sequential(*layers).eval().requires_grad_(False), torch.from_numpy(x)
    params = dict(model.named_parameters())
    table = [x for x in interop.layers(model) if x.type in ("Conv2d", "Linear")]
    start = activations.init(params, table)

    def watched() -> Any:
        y, outputs = interop.capture(model, x, params=params, layers=table)
        return y, activations.update(start, outputs, table, activation="relu")

    def state() -> Any:
        return watched()[1], interop.capture(model, x, params=params, layers=table)[1], table

    return {"plain": lambda: model(x), "with statistics": watched}, state


# Memory of statistics.


def statistics_memory(size: tuple[int, ...], run: Callable[..., Any]) -> dict[str, Any]:
    ours, kept = run(_memory, "statistics", size), run(_memory, "kept", size)
    return {
        "title": f"statistics of {size[0]} batches of activations, memory",
        "ours": {"statistics": {"memory": ours}},
        "instead": {"keeping the activations": {"memory": kept}},
        "checks": [
            at_most("what stays / the activations", ours["stays_mib"] / kept["stays_mib"], 0.001),
            report("peak / peak", ours["peak_extra_mib"] / max(kept["peak_extra_mib"], 1e-9)),
        ],
    }


def _memory(way: str, size: tuple[int, ...]) -> dict[str, Any]:
    import jax
    from flax import linen as nn

    from purepruning_interop import linen

    batches, batch, side, *widths = size
    model = nn.Sequential([part for w in widths for part in (nn.Conv(w, (3, 3)), nn.relu)])
    x = jax.numpy.asarray(normal((batch, side, side, 3)))
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    table = linen.layers(model, params, x)

    @jax.jit
    def outputs_of(x: Any) -> Any:
        return linen.capture(model, params, x, layers=table)[1]

    @jax.jit
    def updated(stats: Any, x: Any) -> Any:
        outputs = linen.capture(model, params, x, layers=table)[1]
        return activations.update(stats, outputs, table, activation="relu")

    def statistics() -> Any:
        stats = activations.init(params, table)
        for _ in range(batches):
            stats = jax.block_until_ready(updated(stats, x))
        return stats

    def kept() -> Any:
        return [jax.block_until_ready(outputs_of(x)) for _ in range(batches)]

    call = {"statistics": statistics, "kept": kept}[way]
    # Compiled before, but with nothing of it left.
    stays = sum(leaf.nbytes for leaf in jax.tree.leaves(call()))
    return {"peak_extra_mib": peak_extra(call) / MIB, "stays_mib": stays / MIB}


# All criteria.


def criteria(blocks: tuple[tuple[int, ...], int], run: Callable[..., Any]) -> dict[str, Any]:
    found = {framework: run(_criteria_timing, framework, blocks) for framework in ("jax", "torch")}
    by_jax, by_torch = found["jax"], found["torch"]
    for name, masks in by_jax["masks"].items():
        # Distances of random filters are rounded, and near-ties then fall either way.
        same = masks == by_torch["masks"][name]
        assert same or (name == "fpgm" and masks[1] == by_torch["masks"][name][1]), name
    return {
        "title": f"every criterion on {by_jax['layers']} layers of {by_jax['weights'] / 1e6:.3g}M "
        "weights, half of the units",
        "ours": {
            f"{name}, {framework}": {"time": result["times"][name]}
            for name in by_jax["times"]
            for framework, result in found.items()
        },
        "instead": {},
        "checks": [],
    }


def _criteria_timing(framework: str, blocks: tuple[tuple[int, ...], int]) -> dict[str, Any]:
    import jax

    if framework == "torch":
        one_torch_thread()
    move = {"jax": to_jax, "torch": to_torch}[framework]
    kernels = residual_network(*blocks)
    layers = convolution_layers(kernels)
    norms = [
        pp.Layer(f"norm.{x.name}", "BatchNorm2d", f"norm.{x.name}", (x.out_channels,), (0,))
        for x in layers
    ]
    scales = {norm.weight: normal(norm.shape, i) for i, norm in enumerate(norms)}
    params = move(kernels | scales)
    active = activations.ActivationStats(*({} for _ in range(6)))
    for i, layer in enumerate(layers):
        rng, shape = np.random.default_rng(i), (1, layer.out_channels)
        seen = WideCount(np.int32(1), np.int32(0))
        zeros = WideCount(np.zeros(shape, np.int32), rng.integers(0, 2**20, shape, np.int32))
        sums = CompensatedSum(rng.random(shape, np.float32), np.zeros(shape, np.float32))
        fields = (seen, seen, zeros, sums, sums, sums)
        for field, total in zip(active, fields, strict=True):
            field[layer.name] = type(total)(*(move({"x": np.asarray(part)})["x"] for part in total))
    grads = move({name: normal(w.shape, 1000 + i) for i, (name, w) in enumerate(kernels.items())})

    def config(granularity: str, table: list[pp.Layer] = layers) -> pp.Config:
        rules = [{"sparsity": 0.5, "op_names": [layer.name for layer in table]}]
        return pp.resolve(rules, table, granularity=granularity)

    def slopes(granularity: str) -> Any:
        start = gradients.init(params, config(granularity))
        return gradients.update(start, params, grads, config(granularity))

    channel, element = "output_channel", "element"
    several = {
        "level": (pp.level, None, config(element)),
        "l1_norm": (pp.l1_norm, None, config(channel)),
        "l2_norm": (pp.l2_norm, None, config(channel)),
        "fpgm": (pp.fpgm, None, config(channel)),
        "random_pruning": (pp.random_pruning, 0, config(channel)),
        "slim": (pp.slim, None, config(channel, norms)),
        "apoz_rank": (pp.apoz_rank, active, config(channel)),
        "mean_activation_rank": (pp.mean_activation_rank, active, config(channel)),
        "taylor_fo": (pp.taylor_fo, slopes(channel), config(channel)),
        "taylor_fo, weights": (pp.taylor_fo, slopes(element), config(element)),
    }

    def call(pruner: Any, stats: Any, config: pp.Config) -> Callable[[], Any]:
        return lambda: jax.block_until_ready(pruner(params, stats, config))

    calls = {name: call(*arguments) for name, arguments in several.items()}
    start = gradients.init(params, config(channel))
    calls["gradients.update"] = lambda: jax.block_until_ready(
        gradients.update(start, params, grads, config(channel))
    )
    masks = {name: fingerprint(_named(calls[name]())) for name in several}
    return {
        "times": in_turns(calls, least=3, most=9, seconds=90),
        "masks": masks,
        "layers": len(layers),
        "weights": sum(kernel.size for kernel in kernels.values()),
    }


def _named(masks: dict[str, Any]) -> dict[str, Any]:
    return {name: mask for name, mask in masks.items() if mask is not None}
