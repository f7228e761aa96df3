"""What pruning costs on an accelerator, next to its own sort and top-k, in at most 15 minutes.

    python benchmarks/gpu.py           from a clean checkout; JAX and torch must see the GPU
    python benchmarks/gpu.py --smoke   tiny sizes, here, in seconds: does everything still run?

Sizes follow the memory of the device; without one they are those of a CPU, and the table says so.
Every part runs in a process of its own, and what one of them cannot do leaves the others alone. The
table is written after each part, so that nothing is lost where time ends: ``gpu.md`` and
``gpu.json`` beside this file, or in ``--out FOLDER``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "interop")]
# torch and the other processes need memory too.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import calibration
import measure
import numpy as np
import schedules
from data import normal
from measure import in_turns
from training import LAYERS, step_timing

import purepruning as pp
from purepruning.stats import inputs

MINUTES = 15.0
SPARSITY = 0.9
TICKETS_GOAL = 8.0
#: Bytes of memory that a part needs for each value that it ranks: itself, its order, copies.
BYTES_PER_VALUE = 32

Row = dict[str, Any]


# The parts: each yields rows. `tiny` says that only errors are looked for.


def select_in_jax(tiny: bool) -> Iterator[Row]:
    """Counting against sort and top-k, jitted; masks against those of the CPU."""
    import jax
    import jax.numpy as jnp

    (device, *_) = jax.devices()
    for n in _sizes(tiny, _jax_memory(device)):
        values, layer, config, expected = _ranked(n)
        kept = n - int(config.counts["fc"])
        x = jax.device_put(values, device)
        ours = jax.jit(lambda w, config=config: pp.level({"w": w}, None, config)["w"])
        sort = jax.jit(lambda w, kept=kept: jnp.abs(w) >= jnp.sort(jnp.abs(w))[-kept])
        top_k = jax.jit(lambda w, kept=kept: jnp.abs(w) >= jax.lax.top_k(jnp.abs(w), kept)[0][-1])
        calls = {
            name: lambda f=f, x=x: jax.block_until_ready(f(x))
            for name, f in {"counting": ours, "sort": sort, "top-k": top_k}.items()
        }
        yield from _compared("JAX, jitted", layer, calls, expected, tiny)


def select_in_torch(tiny: bool) -> Iterator[Row]:
    """The same in torch, eager."""
    import torch

    device = _torch_device()
    for n in _sizes(tiny, _torch_memory(device)):
        values, layer, config, expected = _ranked(n)
        kept, x = n - int(config.counts["fc"]), torch.from_numpy(values).to(device)
        several = {
            "counting": lambda x=x, config=config: pp.level({"w": x}, None, config)["w"],
            "sort": lambda x=x, kept=kept: x.abs() >= x.abs().sort().values[-kept],
            "top-k": lambda x=x, kept=kept: x.abs() >= x.abs().topk(kept).values[-1],
        }
        calls = {name: lambda f=f: _finished(f(), device) for name, f in several.items()}
        yield from _compared("torch", layer, calls, expected, tiny)


def tickets(tiny: bool) -> Iterator[Row]:
    """64 lottery tickets in one compiled call against one after another."""
    widths, steps, n = ((8, 6, 5, 3), 3, 2) if tiny else ((64, 300, 100, 10), 20, 64)
    times = schedules.tickets_timing(widths, steps, n)
    chosen = times.pop("chosen")
    for name, spent in times.items():
        if name not in ("vmap", "scan by two"):
            case = f"{n} tickets, {chosen}"
            row = _row("tickets, JAX", case, times[chosen]["wall_s"], name, spent["wall_s"])
            yield row | ({"goal": TICKETS_GOAL} if name == "a Python loop" else {})


def scheduled_step(tiny: bool) -> Iterator[Row]:
    """A training step with ``prune_on_schedule`` and nothing due against the dense step."""
    width, batches = (32, (4,)) if tiny else (2048, (32, 256))
    for batch in batches:
        times = step_timing(width, batch, "scheduled")
        case = f"{LAYERS} x Dense({width}), Adam, batch {batch}"
        ours, dense = times["scheduled"]["wall_s"], times["dense"]["wall_s"]
        yield _row("scheduled step, JAX", case, ours, "dense step", dense)


def sparse_gpt(tiny: bool) -> Iterator[Row]:
    """SparseGPT in both frameworks against the paper's code in torch, all on the device."""
    import jax
    import torch

    size, device = 64 if tiny else 4096 if _on_accelerator() else 1024, _torch_device()
    weight, x = normal((size, size)), normal((2 * size, size), 1)
    layer = pp.Layer("fc", "Linear", "w", (size, size), out_axes=(0,), in_axes=(1,))
    gram = torch.from_numpy(x).to(device)
    gram = gram.T @ gram
    places = {
        "JAX": lambda array: jax.device_put(array, jax.devices()[0]),
        "torch": lambda array: torch.from_numpy(array).to(device),
        "CPU": np.asarray,
    }
    for kind, granularity in (("50 %", "element"), ("2:4", pp.NM(keep=2, of=4))):
        config = pp.resolve(0.5, [layer], granularity=granularity)
        start = torch.from_numpy(weight).to(device)
        calls: dict[str, Callable[[], Any]] = {
            "the paper's": lambda start=start, kind=kind: _finished(
                calibration.reference(start, gram, kind == "2:4"), device
            )
        }
        for name, place in places.items():
            params = {"w": place(weight)}
            stats = inputs.update(
                inputs.init(params, [layer], keep=["grams"]), {"fc": place(x)}, [layer]
            )
            calls[name] = lambda p=params, s=stats, c=config: _both_finished(
                pp.sparse_gpt(p, s, c), device
            )
        expected = calls.pop("CPU")()[1]["w"]
        times = in_turns(calls, least=2, most=3, seconds=30)
        for name in ("JAX", "torch"):
            mask = _on_host(calls[name]()[1]["w"])
            row = _row(
                f"SparseGPT, {name}",
                f"{size} x {size}, {kind}",
                times[name]["wall_s"],
                "the paper's code, torch",
                times["the paper's"]["wall_s"],
            )
            # Products are rounded otherwise there, and weights at the cut may change sides.
            yield row | {"same_bits": float((mask == expected).mean())}


def semi_structured(tiny: bool) -> Iterator[Row]:
    """A product by a 2:4 matrix in torch's layout against the dense one; only on a GPU."""
    import torch

    from purepruning_interop.torch import to_semi_structured

    device = _torch_device()
    size, rows = (64, 64) if tiny or device == "cpu" else (8192, 4096)
    weight = torch.from_numpy(normal((size, size))).to(device, torch.bfloat16)
    layer = pp.Layer("fc", "Linear", "w", (size, size), out_axes=(0,), in_axes=(1,))
    config = pp.resolve(0.5, [layer], granularity=pp.NM(keep=2, of=4))
    masks = pp.level({"w": weight}, None, config)
    sparse = to_semi_structured({"w": weight}, masks).params["w"]
    dense = torch.where(masks["w"], weight, 0)
    assert torch.equal(sparse.to_dense(), dense), "the layout holds other numbers"
    case = f"{rows} rows by {size} x {size}, 2:4, bfloat16"
    if device == "cpu":
        yield {"part": "semi-structured, torch", "case": case, "note": "its kernels need a GPU"}
        return
    x = torch.from_numpy(normal((rows, size), 1)).to(device, torch.bfloat16)
    product = torch.nn.functional.linear
    torch.testing.assert_close(product(x, sparse), product(x, dense), rtol=0.02, atol=0.02)
    calls = {
        "sparse": lambda: _finished(product(x, sparse), device),
        "dense": lambda: _finished(product(x, dense), device),
    }
    times = in_turns(calls, least=20, most=50, seconds=10)
    ours, theirs = times["sparse"]["wall_s"], times["dense"]["wall_s"]
    yield _row("semi-structured, torch", case, ours, "dense product", theirs)


#: In this order: what matters most comes first.
PARTS: dict[str, Callable[[bool], Iterator[Row]]] = {
    "select_in_jax": select_in_jax,
    "tickets": tickets,
    "select_in_torch": select_in_torch,
    "scheduled_step": scheduled_step,
    "sparse_gpt": sparse_gpt,
    "semi_structured": semi_structured,
}


# What the parts share.


def _row(part: str, case: str, ours: float, name: str, theirs: float) -> Row:
    return {"part": part, "case": case, "ours_s": ours, "next_to": name, "theirs_s": theirs}


def _sizes(tiny: bool, memory: int) -> list[int]:
    """Returns how many values are ranked: up to 10**9, as far as they fit."""
    if tiny:
        return [5_000]
    most = 10**9 if _on_accelerator() else 10**7
    return [n for n in (10**6, 10**7, 10**8, 10**9) if n <= most and n * BYTES_PER_VALUE <= memory]


def _ranked(n: int) -> tuple[np.ndarray, pp.Layer, pp.Config, np.ndarray]:
    """Returns values, their layer, a config, and the mask that the CPU makes, by NumPy."""
    values = np.random.default_rng(n).standard_normal(n, np.float32)
    values[: n // 10] = np.round(values[: n // 10], 1)  # ties
    layer = pp.Layer("fc", "Linear", "w", (n,), out_axes=(0,))
    config = pp.resolve(SPARSITY, [layer])
    return values, layer, config, pp.level({"w": values}, None, config)["w"]


def _compared(
    framework: str,
    layer: pp.Layer,
    calls: dict[str, Callable[[], Any]],
    expected: np.ndarray,
    tiny: bool,
) -> Iterator[Row]:
    """Yields counting next to each alternative that the device has memory for."""
    (n,) = layer.shape
    case = f"{n:,} values, {SPARSITY:.0%}"
    equal = bool(np.array_equal(_on_host(calls["counting"]()), expected))
    for name in [name for name in calls if name != "counting"]:
        pair = {"counting": calls["counting"], name: calls[name]}
        try:
            times = in_turns(pair, least=2 if tiny else 3, most=2 if tiny else 15, seconds=10)
        except Exception as error:  # out of memory is of another class in each framework
            yield {
                "part": f"selection, {framework}",
                "case": case,
                "note": f"{name}: {error}"[:200],
            }
            continue
        ours, theirs = times["counting"]["wall_s"], times[name]["wall_s"]
        row = _row(f"selection, {framework}", case, ours, name, theirs)
        yield row | {"masks_equal_cpu": equal}


def _on_host(x: Any) -> np.ndarray:
    return x.cpu().numpy() if hasattr(x, "cpu") else np.asarray(x)


def _finished(x: Any, device: str) -> Any:
    import torch

    if device != "cpu":
        torch.cuda.synchronize()
    return x


def _both_finished(result: Any, device: str) -> Any:
    import jax

    return jax.block_until_ready(_finished(result, device))


def _torch_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _torch_memory(device: str) -> int:
    import torch

    return 10**9 if device == "cpu" else torch.cuda.mem_get_info()[0]


def _jax_memory(device: Any) -> int:
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit", 10**9) - stats.get("bytes_in_use", 0)


def _on_accelerator() -> bool:
    import jax

    return jax.default_backend() != "cpu" or _torch_device() != "cpu"


def _machine() -> dict[str, Any]:
    import jax
    import torch

    names = [str(device.device_kind) for device in jax.devices()]
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "jax_devices": names,
        "torch_device": cuda,
        "accelerator": _on_accelerator(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "torch": torch.__version__,
        "purepruning": pp.__version__,
    }


# Running them, and the table.


def main() -> int:
    options = _options()
    if options.part:  # in a process of its own
        import jax

        jax.config.update("jax_default_matmul_precision", "highest")
        with options.rows.open("a") as file:
            for row in PARTS[options.part](options.smoke):
                print(json.dumps(row), file=file, flush=True)
        return 0
    if options.smoke:
        measure.PAUSE = 0.0
    deadline = time.monotonic() + 60 * options.minutes
    result: dict[str, Any] = {"machine": _machine(), "smoke": options.smoke, "rows": []}
    for name in PARTS:
        result["rows"] += list(_here(name) if options.smoke else _apart(name, deadline))
        _write(result, options.out)
    print(_table(result))
    return int(any("failed" in row for row in result["rows"]))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--smoke", action="store_true", help="tiny sizes; the numbers mean nothing")
    add("--out", type=Path, help="the folder of gpu.md and gpu.json (this one)")
    add("--minutes", type=float, default=MINUTES, help="when to end at the latest (15)")
    add("--part", choices=PARTS, help=argparse.SUPPRESS)
    add("--rows", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out = options.out or (None if options.smoke else HERE)
    return options


def _here(name: str) -> Iterator[Row]:
    try:
        yield from PARTS[name](True)
    except Exception:
        yield {"part": name, "case": "", "failed": traceback.format_exc()}


def _apart(name: str, deadline: float) -> Iterator[Row]:
    """Yields the rows of a part that runs in another process, as far as it came in time."""
    left = deadline - time.monotonic()
    if left < 20:
        yield {"part": name, "case": "", "note": "no time was left"}
        return
    print(f"{name} ...", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder, "rows")
        rows.touch()
        command = [sys.executable, str(HERE / "gpu.py"), "--part", name, "--rows", str(rows)]
        reason = None
        try:
            done = subprocess.run(command, timeout=left, stderr=subprocess.PIPE, text=True)
            if done.returncode:
                reason = {"failed": done.stderr[-2000:]}
        except subprocess.TimeoutExpired:
            reason = {"note": "time ended"}
        yield from map(json.loads, rows.read_text().splitlines())
    if reason:
        yield {"part": name, "case": ""} | reason


def _write(result: dict[str, Any], folder: Path | None) -> None:
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
        (folder / "gpu.md").write_text(_table(result) + "\n")


def _table(result: dict[str, Any]) -> str:
    """Returns the rows as a table in Markdown, under a line that names the device."""
    machine = result["machine"]
    what = ", ".join(machine["jax_devices"][:1]) + f" (JAX), {machine['torch_device']} (torch)"
    if not machine["accelerator"]:
        what += ". **No accelerator was found: these are figures of a CPU, at its sizes**"
    if result["smoke"]:
        what += ". Tiny sizes: the numbers mean nothing"
    head = ["what", "case", "ours", "next to", "theirs", "ratio", "masks are the CPU's"]
    lines = [f"{what}.", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in result["rows"]:
        if "ours_s" not in row:
            note = row.get("note") or "failed: " + row["failed"].strip().splitlines()[-1]
            lines.append(f"| {row['part']} | {row['case']} | {note} | | | | |")
            continue
        ratio = f"{row['theirs_s'] / row['ours_s']:.2f}x"
        if "goal" in row:
            ratio += f" (goal {row['goal']:g}x)"
        same = {True: "yes", False: "**no**"}.get(row.get("masks_equal_cpu"), "")
        if "same_bits" in row:
            same = f"{100 * row['same_bits']:.2f} % of the bits"
        ours, theirs = (f"{1e3 * row[key]:.3g} ms" for key in ("ours_s", "theirs_s"))
        cells = (row["part"], row["case"], ours, row["next_to"], theirs, ratio, same)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
