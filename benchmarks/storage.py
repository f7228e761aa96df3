"""Rows about pruned parameters that take less room: sparse files, and BCOO matrices."""

from __future__ import annotations

import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from data import normal
from measure import at_least, at_most, in_turns, report

import purepruning as pp

DENSITIES = {"50 %": 0.5, "80 %": 0.2, "90 %": 0.1, "95 %": 0.05}
DTYPES = ("float32", "bfloat16")
#: What compresses the dense file, and how it is called for one thread.
PROGRAMS = {"gzip": ["gzip", "-6", "-c"], "zstd": ["zstd", "-3", "-T1", "-q", "-c"]}
TIMES = 5  # the best of so many
SHOWN = ("bfloat16, 90 %", "bfloat16, 2:4")  # all others are in results.json


# Files.


def sparse_files(shape: tuple[int, int], run: Callable[..., Any]) -> dict[str, Any]:
    found = run(_sparse_files, shape)
    programs = [name for name in PROGRAMS if shutil.which(name)]
    checks = [
        report(f"{case}: bytes / dense", row["save_sparse"]["bytes"] / row["dense"]["bytes"])
        for case, row in found.items()
    ]
    for name in programs:
        for dtype in DTYPES:
            rows = [row for case, row in found.items() if case.startswith(dtype)]
            alone = [row["save_sparse"]["bytes"] / row[name]["bytes"] for row in rows]
            both = [row[name]["both"] / row[name]["bytes"] for row in rows]
            less = [row[name]["cpu_s"] / row["save_sparse"]["cpu_s"] for row in rows]
            checks += [
                report(f"{dtype}: bytes / {name}, least", min(alone)),
                report(f"{dtype}: bytes / {name}, most", max(alone)),
                at_most(f"{dtype}: by {name} as well / {name}, most", max(both), 1),
                at_least(f"{dtype}: less CPU time than {name}, least", min(less), 2),
            ]
    result = {
        "title": f"pruned {shape[0]} x {shape[1]} in a file, beside the dense file compressed",
        "ours": {
            f"{case}, {what}": {"time": {"cpu_s": found[case][what]["cpu_s"]}}
            for case in SHOWN
            for what in ("save_sparse", "load_sparse")
        },
        "instead": {
            f"{case}, {name}": {"time": {"cpu_s": found[case][name]["cpu_s"]}}
            for case in SHOWN
            for name in programs
        },
        "checks": checks,
        "cases": found,
    }
    absent = [name for name in PROGRAMS if name not in programs]
    return result | ({"skipped": f"no {' and no '.join(absent)} here"} if absent else {})


def _sparse_files(shape: tuple[int, int]) -> dict[str, Any]:
    return {
        f"{dtype}, {kind}": _one_file(dtype, kind, shape)
        for dtype in DTYPES
        for kind in (*DENSITIES, "2:4")
    }


def _one_file(dtype: str, kind: str, shape: tuple[int, int]) -> dict[str, Any]:
    import jax.numpy as jnp

    weight = {"w": normal(shape).astype(jnp.dtype(dtype))}
    layer = pp.Layer("w", "Linear", "w", shape, out_axes=(0,), in_axes=(1,))
    nm = pp.NM(keep=2, of=4) if kind == "2:4" else "element"
    config = pp.resolve(1 - DENSITIES.get(kind, 0.5), [layer], granularity=nm)
    masks = pp.level(weight, None, config)
    pruned = pp.apply_masks(weight, masks)
    with tempfile.TemporaryDirectory() as folder:
        sparse, dense = Path(folder, "sparse"), Path(folder, "dense")
        write = _best(lambda: pp.save_sparse(sparse, pruned, masks))
        read = _best(lambda: pp.load_sparse(sparse, weight))
        again = pp.load_sparse(sparse, weight)
        bits = f"u{pruned['w'].itemsize}"
        assert (again.params["w"].view(bits) == pruned["w"].view(bits)).all()
        assert (again.masks["w"] == masks["w"]).all()
        pp.save_sparse(dense, pruned, {})  # without masks: as it is
        found = {
            "dense": {"bytes": dense.stat().st_size},
            "save_sparse": {"bytes": sparse.stat().st_size, "cpu_s": write},
            "load_sparse": {"cpu_s": read},
        }
        for name, command in PROGRAMS.items():
            if shutil.which(name):
                both = _compressed([*command, str(sparse)])["bytes"]
                found[name] = _compressed([*command, str(dense)]) | {"both": both}
    return found


def _best(call: Callable[[], Any]) -> float:
    """Returns the least CPU seconds of several calls."""
    spent = []
    for _ in range(TIMES):
        start = time.process_time()
        call()
        spent.append(time.process_time() - start)
    return min(spent)


def _compressed(command: list[str]) -> dict[str, Any]:
    """Returns the bytes that a program writes, and its CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryFile() as out:
        subprocess.run(command, check=True, stdout=out)
        size = out.tell() or out.seek(0, 2)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"bytes": size, "cpu_s": max(spent, 1e-3)}


# Products.


def bcoo(size: tuple[int, int], run: Callable[..., Any]) -> dict[str, Any]:
    times = run(_bcoo, size)
    dense = times.pop("dense")
    return {
        "title": f"{size[1]} rows times a pruned {size[0]} x {size[0]} matrix, jitted, as BCOO",
        "ours": {name: {"time": t} for name, t in times.items()},
        "instead": {"dense": {"time": dense}},
        "checks": [
            report(f"{name}: CPU time / dense", t["cpu_s"] / dense["cpu_s"])
            for name, t in times.items()
        ],
    }


def _bcoo(size: tuple[int, int]) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    width, rows = size
    x, weight = jnp.asarray(normal((rows, width), 1)), jnp.asarray(normal((width, width)))
    layer = pp.Layer("w", "Linear", "w", (width, width), out_axes=(1,), in_axes=(0,))
    product = jax.jit(lambda x, w: x @ w)
    calls = {"dense": lambda: jax.block_until_ready(product(x, weight))}
    for sparsity in (0.5, 0.9, 0.95, 0.99):
        config = pp.resolve(sparsity, [layer])
        masks = pp.level({"w": weight}, None, config)
        matrix = pp.to_bcoo({"w": weight}, masks)["w"]
        expected = product(x, pp.apply_masks({"w": weight}, masks)["w"])
        np.testing.assert_allclose(product(x, matrix), expected, atol=1e-4)
        name = f"{100 * sparsity:g} % pruned"
        calls[name] = lambda m=matrix: jax.block_until_ready(product(x, m))
    return in_turns(calls, least=3, most=9)
