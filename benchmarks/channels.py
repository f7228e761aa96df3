"""Rows about the geometric median, the criterion that compares channels with each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from data import nbytes, normal, to_jax, to_torch
from measure import at_least, at_most, in_turns, memory_of, one_torch_thread

import purepruning as pp

SPARSITY = 0.5


def fpgm(shape: tuple[int, int], run: Callable[..., Any]) -> dict[str, Any]:
    times = run(_timing, shape)
    checks = [
        at_least(
            f"{name}: less CPU time than the loop in {loop}",
            times[f"loop, {loop}"]["cpu_s"] / times[name]["cpu_s"],
            10,
        )
        for name, loop in (("jax", "jax"), ("torch", "torch"))
    ]
    return {
        "title": f"geometric median of {shape[0]} filters of {shape[1]} weights",
        "ours": {name: {"time": times[name]} for name in ("jax", "torch")},
        "instead": {
            "a loop over filters, torch (as NNI)": {"time": times["loop, torch"]},
            "a loop over filters, JAX (each jitted)": {"time": times["loop, jax"]},
        },
        "checks": checks,
    }


def fpgm_memory(shape: tuple[int, int], run: Callable[..., Any]) -> dict[str, Any]:
    memory = {name: run(_memory, name, shape) for name in ("jax", "torch")}
    return {
        "title": f"geometric median of {shape[0]} filters of {shape[1]} weights, memory",
        "ours": {name: {"memory": memory[name]} for name in memory},
        "instead": {},
        "checks": [
            at_most(f"{n}: extra MiB", m["peak_extra_mib"], 1024) for n, m in memory.items()
        ],
    }


def _weights(shape: tuple[int, int]) -> tuple[dict[str, np.ndarray], pp.Config]:
    filters, size = shape
    weights = {"conv.weight": normal((filters, size // 9, 3, 3))}
    layer = pp.Layer("conv", "Conv2d", "conv.weight", (filters, size // 9, 3, 3), (0,), (1,))
    rules = [{"sparsity": SPARSITY, "op_types": ["Conv2d"]}]
    return weights, pp.resolve(rules, [layer], granularity="output_channel")


def _timing(shape: tuple[int, int]) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    import torch

    one_torch_thread()
    weights, config = _weights(shape)
    tensors, arrays = to_torch(weights), to_jax(weights)
    flat, flat_torch = arrays["conv.weight"].reshape(shape), tensors["conv.weight"].reshape(shape)
    distance = jax.jit(lambda w, i: jnp.linalg.norm(w - w[i], axis=1).sum())

    def loop_in_jax() -> Any:
        return jax.block_until_ready(jnp.stack([distance(flat, i) for i in range(shape[0])]))

    def loop_in_torch() -> Any:
        return torch.stack([torch.norm(flat_torch - row, p=2, dim=1).sum() for row in flat_torch])

    calls = {
        "jax": lambda: jax.block_until_ready(pp.fpgm(arrays, None, config)),
        "torch": lambda: pp.fpgm(tensors, None, config),
        "loop, jax": loop_in_jax,
        "loop, torch": loop_in_torch,
    }
    pruned = set(
        np.argsort(np.asarray(loop_in_torch()), kind="stable")[: config.counts["conv"]].tolist()
    )
    for name in ("jax", "torch"):
        mask = np.asarray(calls[name]()["conv.weight"]).reshape(-1)
        assert set(np.flatnonzero(~mask).tolist()) == pruned, f"{name} prunes other filters"
    return in_turns(calls, least=3, most=11)


def _memory(name: str, shape: tuple[int, int]) -> dict[str, Any]:
    weights, config = _weights(shape)
    size = nbytes(weights)
    if name == "jax":
        import jax

        arrays = to_jax(weights)
        del weights
        return memory_of(lambda: jax.block_until_ready(pp.fpgm(arrays, None, config)), size)
    tensors = to_torch(weights)
    return memory_of(lambda: pp.fpgm(tensors, None, config), size)
