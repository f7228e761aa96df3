"""Rows about checkpoints on disk: pruned file by file, beside loading all of them."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from measure import MIB, at_most, report

import purepruning as pp
from purepruning.saving.tensors import write_tensors

WIDTH, INNER, KEYS, WORDS = 3072, 8192, 1024, 128_256
SHARD = 12  # layers in a file


def stream(size: tuple[int, int, int], run: Callable[..., Any]) -> dict[str, Any]:
    """Prunes the matrices of a Llama in bfloat16, all ranked together: many, and a few."""
    large, small, divisor = size
    found = run(_streamed, large, divisor)
    few = run(_streamed, small, divisor)
    whole = run(_in_memory, small, divisor)
    assert few["pruned"] == whole["pruned"]
    limit = 1.5 * found["largest_mib"] + 64
    return {
        "title": f"half of a checkpoint of {found['gib']:.1f} GiB, bfloat16, in one pool",
        "ours": {
            f"{found['gib']:.1f} GiB": _cost(found),
            f"{few['gib']:.1f} GiB": _cost(few),
        },
        "instead": {f"{few['gib']:.1f} GiB, loaded whole": _cost(whole)},
        "checks": [
            at_most("anonymous MiB above the import", found["peak_mib"], limit),
            report("wall seconds", found["wall_s"]),
            report("small one, wall time / loaded whole", few["wall_s"] / whole["wall_s"]),
            report("small one, memory / loaded whole", few["peak_mib"] / whole["peak_mib"]),
        ],
    }


def _cost(found: dict[str, Any]) -> dict[str, Any]:
    time = {"cpu_s": found["cpu_s"], "wall_s": found["wall_s"]}
    return {"time": time, "memory": {"peak_extra_mib": found["peak_mib"]}}


def _shapes(n_layers: int, divisor: int) -> dict[str, tuple[int, int]]:
    width, inner, keys, words = (n // divisor for n in (WIDTH, INNER, KEYS, WORDS))
    shapes = {"model.embed_tokens.weight": (words, width)}
    parts = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    for i in range(n_layers):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in parts.items()}
    return shapes


def _write(folder: Path, shapes: dict[str, tuple[int, int]]) -> None:
    """Writes random bfloat16 numbers, made as bits: normal enough, and quick."""
    names = list(shapes)
    rng = np.random.default_rng(0)

    def pieces(n: int) -> Iterator[Any]:
        while n:
            some = min(n, 2**22)
            x = rng.standard_normal(some, np.float32)
            yield (x.view(np.uint32) >> 16).astype(np.uint16).data
            n -= some

    step = 7 * SHARD
    for k, start in enumerate(range(0, len(names), step)):
        part = {n: shapes[n] for n in names[start : start + step]}
        tensors = {n: ("BF16", s, 2 * s[0] * s[1], pieces(s[0] * s[1])) for n, s in part.items()}
        write_tensors(folder / f"model-{k:05d}.safetensors", tensors, {})


def _config(shapes: dict[str, tuple[int, int]]) -> pp.Config:
    layers = [pp.Layer(n, "Linear", n, s, out_axes=(0,), in_axes=(1,)) for n, s in shapes.items()]
    return pp.resolve(0.5, layers, scope="global")


def _streamed(n_layers: int, divisor: int) -> dict[str, Any]:
    shapes = _shapes(n_layers, divisor)
    with tempfile.TemporaryDirectory() as name:
        source, out = Path(name, "source"), Path(name, "out")
        source.mkdir()
        _write(source, shapes)
        config = _config(shapes)
        return _measured(
            lambda: sum(pp.prune_files(pp.level, source, out, config).pruned.values()), shapes
        )


def _in_memory(n_layers: int, divisor: int) -> dict[str, Any]:
    import jax.numpy as jnp

    from purepruning.saving.tensors import read_shards

    shapes = _shapes(n_layers, divisor)
    with tempfile.TemporaryDirectory() as name:
        source, out = Path(name, "source"), Path(name, "out")
        source.mkdir()
        out.mkdir()
        _write(source, shapes)
        config = _config(shapes)

        def call() -> int:
            tensors = {n: t for shard in read_shards(source) for n, t in shard.tensors.items()}
            params = {n: jnp.asarray(np.array(t.array())) for n, t in tensors.items()}
            masks = pp.level(params, None, config)
            pruned = pp.apply_masks(params, masks)
            pp.save_masks(out / "masks.safetensors", masks, params)
            write_tensors(
                out / "model.safetensors",
                {
                    n: ("BF16", x.shape, x.nbytes, iter([np.asarray(x).view(np.uint8).data]))
                    for n, x in pruned.items()
                },
                {},
            )
            return sum(int(m.size) - int(np.count_nonzero(m)) for m in masks.values())

        return _measured(call, shapes)


def _measured(call: Callable[[], int], shapes: dict[str, tuple[int, int]]) -> dict[str, Any]:
    """Returns seconds, and the peak of anonymous pages above what there was, sampled."""
    start, peak, done = _anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, _anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    wall, cpu = time.perf_counter(), time.process_time()
    pruned = call()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    done.set()
    watcher.join()
    sizes = [2 * a * b for a, b in shapes.values()]
    return {
        "wall_s": wall,
        "cpu_s": cpu,
        "peak_mib": max(peak - start, 1) / MIB,
        "largest_mib": max(sizes) / MIB,
        "gib": sum(sizes) / 2**30,
        "pruned": pruned,
    }


def _anonymous() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise OSError("this system does not say how much memory is anonymous")
