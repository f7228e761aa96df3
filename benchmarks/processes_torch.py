"""A row about several processes of torch: two that have half of every weight, beside one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from measure import at_most, report

REPEATS = 5


def processes(size: tuple[int, int], run: Callable[..., Any]) -> dict[str, Any]:
    """Prunes layers in one pool, in two processes under gloo that have half of each, and in one."""
    found = {n: _started(n, *size) for n in (1, 2)}
    assert len({row["pruned"] for rows in found.values() for row in rows}) == 1
    n_layers, width = size
    sent = max(row["bytes"] for row in found[2])
    costs = {n: sum(row["cpu_s"] for row in rows) for n, rows in found.items()}
    walls = {n: max(row["wall_s"] for row in rows) for n, rows in found.items()}
    weights = n_layers * width * width

    def cost(n: int) -> dict[str, Any]:
        return {"time": {"cpu_s": costs[n], "wall_s": walls[n]}}

    return {
        "title": f"global masks of {weights / 1e6:.0f}M weights, torch, half of each on a process",
        "ours": {"two processes": cost(2)},
        "instead": {"one process": cost(1)},
        "checks": [
            # A sample, four numbers of each layer, and two digits of the key.
            at_most("bytes each process adds", sent, 4 * 4096 + (4 * 8 + 2 * 4 * 2048) * n_layers),
            report("bytes, weights gathered / counts", 4 * weights / max(sent, 1)),
            report("CPU time, two processes / one", costs[2] / costs[1]),
        ],
    }


def _started(n: int, n_layers: int, width: int) -> list[dict[str, Any]]:
    """Returns what each of n processes measured."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [str(n), f"{folder}/meet", str(n_layers), str(width)]
        running = [
            subprocess.Popen(
                [sys.executable, __file__, str(rank), *arguments],
                env=os.environ | {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(n)
        ]
        try:
            done = [process.communicate(timeout=600)[0] for process in running]
        finally:
            for process in running:
                process.kill()
                process.wait()
    return [json.loads(out.splitlines()[-1]) for out in done]


def _measured(rank: int, n: int, meet: str, n_layers: int, width: int) -> dict[str, Any]:
    import torch
    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    import purepruning as pp

    params = {}
    for layer in range(n_layers):
        noise = torch.randn(width, width, generator=torch.Generator().manual_seed(layer))
        params[f"w{layer}"] = noise * (1 + layer / 8)
    table = [pp.make_layer(params, name, "Linear", out_axes=0, in_axes=1) for name in params]
    config = pp.resolve(0.5, table, scope="global")
    sent = 0
    if n > 1:
        dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=n)
        mesh = init_device_mesh("cpu", (n,))
        params = {
            name: distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None)
            for name, x in params.items()
        }
        add = dist.all_reduce

        def counted(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            nonlocal sent
            sent += x.nbytes
            return add(x, *args, **kwargs)

        dist.all_reduce = counted
    masks = pp.level(params, None, config)
    once, times = sent, []
    for _ in range(REPEATS):
        begin, wall = time.process_time(), time.perf_counter()
        pp.level(params, None, config)
        times.append((time.process_time() - begin, time.perf_counter() - wall))
    cpu, wall = min(times)
    pruned = 1 - pp.density(masks, params)
    if n > 1:
        dist.destroy_process_group()
    return {"cpu_s": cpu, "wall_s": wall, "bytes": once, "pruned": pruned}


if __name__ == "__main__":
    number, n, meet, *size = sys.argv[1:]
    print(json.dumps(_measured(int(number), int(n), meet, *map(int, size))))
