"""Rows about structure: reading the coupling off a model, and what a smaller model gains."""

from __future__ import annotations

import importlib
import importlib.util
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from measure import at_least, at_most, in_turns, one_torch_thread
from nets import linen_net, nnx_net, torch_net

import purepruning as pp


def couple(sizes: dict[str, Any], run: Callable[..., Any]) -> dict[str, Any]:
    """Seconds from a model to its units, and the same for the first call of a process."""
    ways = {"NNX": nnx_seconds, "Linen": linen_seconds, "torch": torch_seconds}
    ours = {
        (name, way): run(measure, name, size)
        for way, measure in ways.items()
        for name, size in sizes.items()
    }
    has_peer = importlib.util.find_spec("torch_pruning") is not None
    peer = {n: run(peer_seconds, n, size) for n, size in sizes.items()} if has_peer else {}
    checks = []
    for (name, way), mine in ours.items():
        if name not in peer:
            continue
        first = mine["first_cpu_s"] / peer[name]["first_cpu_s"]
        later = mine["time"]["cpu_s"] / peer[name]["time"]["cpu_s"]
        checks.append(at_most(f"{name}, {way} / Torch-Pruning", later, 1.0))
        checks.append(at_most(f"{name}, {way} / Torch-Pruning, first call", first, 1.0))
    return {
        "title": "from a model to its coupled channels",
        "ours": {f"{name}, {way}": x for (name, way), x in ours.items()},
        "instead": {f"{n}, Torch-Pruning": x for n, x in peer.items()},
        "checks": checks,
    }


def nnx_seconds(name: str, size: Any) -> dict[str, Any]:
    import jax

    from purepruning_interop import nnx as ppn

    net, given = nnx_net(name, size)
    fn, params = ppn.function(net)
    return _seconds(
        lambda: ppn.couple(net, given), lambda: jax.make_jaxpr(lambda *a: fn(*a))(params, given)
    )


def linen_seconds(name: str, size: Any) -> dict[str, Any]:
    import jax

    fn, variables, given = linen_net(name, size)
    return _seconds(
        lambda: pp.couple(fn, variables, given),
        lambda: jax.make_jaxpr(lambda *a: fn(*a))(variables, given),
    )


def torch_seconds(name: str, size: Any) -> dict[str, Any]:
    from purepruning_interop import torch as ppt

    _with_compiler()
    net, given = torch_net(name, size)
    return _seconds(lambda: ppt.couple(net, given))


def _with_compiler() -> None:
    """One thread, and torch's compiler imported, as it is once there is an optimizer."""
    importlib.import_module("torch._dynamo")
    one_torch_thread()


def _seconds(call: Callable[[], Any], part: Callable[[], Any] | None = None) -> dict[str, Any]:
    """Processor seconds of a call, and of what it calls first: the first time, and later."""
    found = {"call": [], "part": []}
    for _ in range(5):
        for name, timed in (("call", call), ("part", part)):
            start = time.process_time()
            if timed is not None:
                timed()
                found[name].append(time.process_time() - start)
    row = {
        "time": {"cpu_s": float(np.median(found["call"][1:]))},
        "first_cpu_s": found["call"][0],
    }
    return row | ({"trace_cpu_s": float(np.median(found["part"][1:]))} if part else {})


def peer_seconds(name: str, size: Any) -> dict[str, Any]:
    """Seconds of Torch-Pruning: its dependency graph, and the groups of all layers in it."""
    import torch_pruning as tp

    _with_compiler()
    warnings.simplefilter("ignore")  # parameters outside of layers
    net, given = torch_net(name, size)
    return _seconds(
        lambda: list(
            tp.DependencyGraph().build_dependency(net, example_inputs=given).get_all_groups()
        )
    )


def latency(size: tuple[Any, int, int], run: Callable[..., Any]) -> dict[str, Any]:
    """A ResNet with half of every channel, against the whole one."""
    found = run(_latency, *size)
    return {
        "title": f"forward pass of ResNet-50 with half the channels, batch {size[2]}, {size[1]} px",
        "ours": {"shrunk": {"time": found["shrunk"], "macs": found["macs"][1]}},
        "instead": {
            "dense": {"time": found["dense"], "macs": found["macs"][0]},
            "masked": {"time": found["masked"]},
        },
        "checks": [
            at_most("largest difference of masked and shrunk outputs", found["apart"], 1e-5),
            at_least("multiply-adds, dense / shrunk", found["macs"][0] / found["macs"][1], 2.5),
            at_least(
                "time, dense / shrunk", found["dense"]["wall_s"] / found["shrunk"]["wall_s"], 1.8
            ),
        ],
    }


def _latency(size: Any, pixels: int, batch: int) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    fn, shapes, _ = linen_net("resnet", size)
    rng = np.random.default_rng(0)

    def draw(path: Any, x: Any) -> Any:
        gain = np.sqrt(np.prod(x.shape[:-1])) if len(x.shape) > 1 else 1.0
        low = 0.5 if len(x.shape) == 1 else -1.7
        return jnp.asarray(rng.uniform(low, 1.5 if low > 0 else 1.7, x.shape) / gain, x.dtype)

    variables = jax.tree_util.tree_map_with_path(draw, shapes)
    x = jnp.asarray(rng.normal(size=(batch, pixels, pixels, 3)), jnp.float32)
    coupling = pp.couple(fn, variables, x)
    masks = coupling.masks(coupling.lowest(rng.random(coupling.n_units), 0.5), variables)
    small = pp.shrink(fn, variables, masks, coupling, x)
    masked = pp.apply_masks(variables, masks)
    dense, less = jax.jit(fn), jax.jit(small.fn)
    one, other = dense(masked, x), less(small.params, x)
    calls = {
        "dense": lambda: jax.block_until_ready(dense(variables, x)),
        "masked": lambda: jax.block_until_ready(dense(masked, x)),
        "shrunk": lambda: jax.block_until_ready(less(small.params, x)),
    }
    times = in_turns(calls, least=5, most=15, seconds=40)
    apart = float(jnp.abs(one - other).max() / jnp.abs(one).max())
    return {**times, "macs": small.report.macs, "apart": apart}
