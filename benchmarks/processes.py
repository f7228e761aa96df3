"""Rows about several processes: two that have half of every weight, beside one that has all."""

from __future__ import annotations

import json
import math
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from measure import at_most, report

REPEATS = 5


def processes(size: tuple[int, int], run: Callable[..., Any]) -> dict[str, Any]:
    """Prunes layers in one pool, by one device in each of two processes, and by two in one."""
    found = {n: _started(n, *size) for n in (1, 2)}
    assert len({row["kept"] for rows in found.values() for row in rows}) == 1
    n_layers, width = size
    counts = max(row["bytes"] for row in found[2])
    costs = {n: sum(row["cpu_s"] for row in rows) for n, rows in found.items()}
    walls = {n: max(row["wall_s"] for row in rows) for n, rows in found.items()}
    weights = n_layers * width * width

    def cost(n: int) -> dict[str, Any]:
        return {"time": {"cpu_s": costs[n], "wall_s": walls[n]}}

    return {
        "title": f"global masks of {weights / 1e6:.0f}M weights, JAX, half of each on a process",
        "ours": {"two processes": cost(2)},
        "instead": {"one process, two devices": cost(1)},
        "checks": [
            at_most("bytes sent in one pass over the weights", counts, 4 * (n_layers + 2)),
            report("bytes, weights gathered / one pass", 4 * weights / max(counts, 1)),
            report("CPU time, two processes / one", costs[2] / costs[1]),
        ],
    }


def _started(n: int, n_layers: int, width: int) -> list[dict[str, Any]]:
    """Returns what each of n processes measured."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    arguments = [str(n), port, str(n_layers), str(width)]
    running = [
        subprocess.Popen(
            [sys.executable, __file__, str(i), *arguments],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(n)
    ]
    try:
        done = [process.communicate(timeout=600)[0] for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    return [json.loads(out.splitlines()[-1]) for out in done]


def _measured(number: int, n: int, port: str, n_layers: int, width: int) -> dict[str, Any]:
    import jax
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    import purepruning as pp

    jax.config.update("jax_num_cpu_devices", 2 // n)
    if n > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{port}", n, number)
    layout = NamedSharding(jax.make_mesh((2,), ("data",)), PartitionSpec("data"))

    def part(index: tuple[slice, ...]) -> Any:
        start, stop, _ = index[0].indices(width)
        rows = np.random.default_rng(start).standard_normal((stop - start, width), np.float32)
        return rows * np.float32(1 + layer / 8)

    params = {}
    for layer in range(n_layers):
        params[f"w{layer}"] = jax.make_array_from_callback((width, width), layout, part)
    table = [pp.make_layer(params, name, "Linear", out_axes=1, in_axes=0) for name in params]
    config = pp.resolve(0.5, table, scope="global")
    compiled = jax.jit(lambda params: pp.level(params, None, config)).lower(params).compile()
    masks = jax.block_until_ready(compiled(params))
    times = []
    for _ in range(REPEATS):
        begin, wall = time.process_time(), time.perf_counter()
        jax.block_until_ready(compiled(params))
        times.append((time.process_time() - begin, time.perf_counter() - wall))
    cpu, wall = min(times)
    kept = pp.density(masks, params)
    return {"cpu_s": cpu, "wall_s": wall, "bytes": _largest(compiled.as_text()), "kept": kept}


def _largest(text: str) -> int:
    """Returns the bytes that the collectives of one pass send: of the largest loop body or none."""
    bodies, now = [0], 0
    for line in text.splitlines():
        if not line.startswith(" "):
            bodies.append(now)
            now = 0
        found = re.search(r"= (\S.*?) (?:all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(", line)
        for dims in re.findall(r"s32\[([\d,]*)\]|f32\[([\d,]*)\]", found[1]) if found else ():
            now += 4 * math.prod(int(k) for k in "".join(dims).split(",") if k)
    return max(*bodies, now)


if __name__ == "__main__":
    number, n, port, *size = sys.argv[1:]
    print(json.dumps(_measured(int(number), int(n), port, *map(int, size))))
