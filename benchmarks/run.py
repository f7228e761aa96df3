"""What pruning costs, next to what one would use instead.

    python benchmarks/run.py                    every row, about 20 minutes
    python benchmarks/run.py --only two-of-four one row; the others stay as they were
    python benchmarks/run.py --smoke            tiny sizes, seconds: does everything still run?

Each row checks that the results agree before it times them. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import calibration
import channels
import criteria
import decoders
import files
import measure
import memory
import processes
import processes_torch
import quantizers
import schedules
import searches
import selection
import storage
import structure
import training
from nets import DENSENET, RESNET

HERE = Path(__file__).resolve().parent
#: What the project's README shows: a check of a row, and how to say it.
HEADLINES = {
    ("global", "torch: less CPU time"): "{:.0f}x less than `torch.nn.utils.prune`",
    ("event", "less CPU time than argsort"): "{:.0f}x less than sorting, as jaxpruner does",
    ("train-step", "batch 256: CPU time / dense step"): "{:.2f}x the dense step",
    ("shrunk", "time, dense / shrunk"): "{:.1f}x less than the dense or the masked model",
}
START, END = "<!-- benchmarks:start -->", "<!-- benchmarks:end -->"


class Row(NamedTuple):
    """A comparison: ``measure(size, run)``, where ``run`` calls a function in a fresh process.

    With ``one_thread``, NumPy multiplies matrices in the calling thread alone there, as torch does
    (:func:`measure.one_torch_thread`).
    """

    measure: Callable[[Any, Callable[..., Any]], dict[str, Any]]
    size: Any
    smoke_size: Any
    one_thread: bool = False


ROWS = {
    "kth": Row(selection.kth, 100_000_000, 300_000),
    "global": Row(selection.global_masks, (12, 768, 20_000), (1, 64, 1000)),
    "layer": Row(selection.layer_masks, (12, 768, 20_000), (1, 64, 1000)),
    "first-shapes": Row(selection.first_shapes, 160, 4),
    "processes-torch": Row(processes_torch.processes, (8, 2048), (2, 64)),
    "two-of-four": Row(selection.two_of_four, (4096, 4096), (64, 256)),
    "train-step": Row(training.train_step, (2048, (32, 256)), (32, (4,))),
    "torch-step": Row(training.torch_step, (1024, (32, 256)), (16, (4,))),
    "qat-step": Row(quantizers.qat_step, (2048, 256), (32, 8)),
    "admm-step": Row(training.admm_step, (2048, (32, 256)), (32, (4,))),
    "first-call": Row(training.first_call, ((3, 9, 36, 3), 64), ((1, 1), 4)),
    "first-update": Row(training.first_update, 160, 12),
    "fpgm": Row(channels.fpgm, (512, 4608), (16, 90)),
    "fpgm-memory": Row(channels.fpgm_memory, (4096, 4608), (16, 90)),
    "capture": Row(
        criteria.capture,
        {
            "jax, convolutions": (32, 32, 64, 64, 64, 128, 128, 128),
            "jax, dense": (256, 6, 1024),
            "torch, convolutions": (32, 32, 64, 64, 64, 128, 128, 128),
            "torch, dense": (256, 6, 1024),
        },
        {
            "jax, convolutions": (2, 6, 4, 8),
            "jax, dense": (4, 2, 8),
            "torch, convolutions": (2, 6, 4, 8),
            "torch, dense": (4, 2, 8),
        },
    ),
    "statistics-memory": Row(
        criteria.statistics_memory, (16, 32, 32, 64, 64, 128), (2, 2, 6, 4, 8)
    ),
    "criteria": Row(criteria.criteria, ((3, 4, 6, 3), 64), ((1, 1), 4)),
    "sparse-gpt": Row(calibration.sparse_gpt, 4096, 48, one_thread=True),
    "gram": Row(calibration.gram, (8192, 4096), (64, 16), one_thread=True),
    "wanda": Row(calibration.wanda, (4096, 11008), (16, 32)),
    "rigl": Row(calibration.rigl, (2048, 4096), (16, 32)),
    "transposable": Row(calibration.transposable, (4096, 4096), (8, 16)),
    "tickets": Row(
        schedules.tickets, ((64, 300, 100, 10), 20, (16, 64, 256)), ((8, 6, 5, 3), 3, (2,))
    ),
    "scheduled-step": Row(schedules.scheduled_step, (2048, (32, 256)), (32, (4,))),
    "event": Row(schedules.event, ((3, 4, 6, 3), 64), ((1, 1), 4)),
    "couple": Row(
        structure.couple,
        {"resnet": (RESNET, 64), "densenet": (DENSENET, 32), "bert": (12, 768, 12)},
        {"resnet": (((1, 4),), 4), "densenet": ((2,), 4), "bert": (1, 8, 2)},
    ),
    "coupling-growth": Row(
        decoders.coupling_growth,
        (decoders.Decoder(8, 1024, 8, 4, 2816, 32000), 8, 128, decoders.SHAPES),
        (decoders.Decoder(2, 16, 2, 1, 16, 8), 2, 4, {}),
    ),
    "search-overhead": Row(searches.overhead, (15, 64, 40), (3, 8, 4)),
    "knapsack": Row(searches.knapsack, (224, 17, 10_000), (6, 4, 200)),
    "compiled-search": Row(searches.compiled, ((64, 300, 100, 10), 512, 200), ((8, 6, 5, 3), 4, 3)),
    "stream": Row(files.stream, (38, 4, 1), (2, 1, 64)),
    "sparse-files": Row(storage.sparse_files, (2048, 4096), (32, 64)),
    "bcoo": Row(storage.bcoo, (2048, 64), (32, 4)),
    "memory": Row(memory.memory, (8, 2048, 2048), (2, 16, 16)),
    "processes": Row(processes.processes, (8, 2048), (2, 64)),
    "shrunk": Row(structure.latency, ((RESNET, 64), 128, 8), ((((1, 4),), 4), 32, 2)),
}


def main() -> int:
    options = _options()
    if options.smoke:
        measure.PAUSE = 0.0
    out = options.out or (None if options.smoke else HERE / "results.json")
    rows = json.loads(out.read_text())["rows"] if options.only and out and out.exists() else {}
    for name in options.only or ROWS:
        rows[name] = _measured(name, options.smoke)
    result = {"machine": _machine(), "smoke": options.smoke}
    result["rows"] = {name: rows[name] for name in ROWS if name in rows}
    report = _report(result)
    print("\nevery row runs, and results agree" if options.smoke else f"\n{report}")
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n")
    if options.update_readme:
        _write_between_markers(HERE / "README.md", report)
        _write_between_markers(HERE.parent / "README.md", _headlines(result))
    missed = [n for n, row in rows.items() if not all(c.get("ok", True) for c in row["checks"])]
    if missed and not options.smoke:
        print(f"\nshort of what they must reach: {', '.join(missed)}", file=sys.stderr)
        return 1
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--smoke", action="store_true", help="tiny sizes; the numbers mean nothing")
    add("--only", action="append", choices=ROWS, metavar="NAME", help=", ".join(ROWS))
    add("--out", type=Path, help="where the numbers go (results.json beside this file)")
    add("--update-readme", action="store_true", help="write the figures into both README.md")
    return parser.parse_args()


def _measured(name: str, smoke: bool) -> dict[str, Any]:
    row = ROWS[name]
    print(f"{name} ...", end=" ", flush=True)
    start = time.perf_counter()
    if smoke:
        result = row.measure(row.smoke_size, measure.here)
    else:
        run = functools.partial(measure.fresh, one_thread=row.one_thread)
        result = row.measure(row.size, run)
    seconds = time.perf_counter() - start
    print(f"{seconds:.0f} s")
    for check in [] if smoke else result["checks"]:
        print(f"    {_check(check)}")
    return result | {"date": datetime.date.today().isoformat()}


def _machine() -> dict[str, Any]:
    packages = (
        "purepruning",
        "jax",
        "jaxlib",
        "numpy",
        "optax",
        "torch",
        "torchao",
        "torch-pruning",
    )
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "cpus": len(affinity(0)) if affinity else os.cpu_count(),
        "processor": _processor(),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# The table.


def _report(result: dict[str, Any]) -> str:
    """Returns a paragraph for each row, and what they were measured with."""
    lines = []
    for name, row in result["rows"].items():
        costs = f" {_costs(row['ours'])}." if row["ours"] else ""
        lines.append(f"- **{row['title']}** (`{name}`, {row['date']}).{costs}")
        if row["instead"]:
            lines.append(f"  Instead: {_costs(row['instead'])}.")
        if "skipped" in row:
            lines.append(f"  Not compared: {row['skipped']}.")
        if row["checks"]:
            lines.append(f"  Reached: {'; '.join(map(_check, row['checks']))}.")
        if "table" in row:
            head, *rest = (f"  | {' | '.join(cells)} |" for cells in row["table"])
            lines += ["", head, "  |" + "---|" * len(row["table"][0]), *rest, ""]
    machine = result["machine"]
    versions = machine["versions"].items()
    versions = ", ".join(f"{n} {v}" for n, v in versions if v and n != "purepruning")
    lines += [
        "",
        f"Medians of CPU seconds, and the peak of resident memory above the parameters; "
        f"{machine['cpus']} CPUs ({machine['processor']}), Python {machine['python']}, {versions}.",
    ]
    return "\n".join(lines)


def _headlines(result: dict[str, Any]) -> str:
    """Returns the table of a few rows, of one check each."""
    lines = ["| what | in CPU time |", "|---|---|"]
    for (name, check), text in HEADLINES.items():
        row = result["rows"].get(name, {"checks": []})
        for found in row["checks"]:
            if found["what"] == check:
                lines.append(f"| {row['title']} | {text.format(found['reached'])} |")
    return "\n".join(lines)


def _costs(costs: dict[str, Any]) -> str:
    return "; ".join(f"{name}: {_cost(cost)}" for name, cost in costs.items())


def _cost(cost: dict[str, Any]) -> str:
    parts = []
    if "time" in cost:
        parts.append(f"{_seconds(cost['time']['cpu_s'])} CPU")
    if "memory" in cost:
        parts.append(f"{cost['memory']['peak_extra_mib']:.0f} MiB")
    return ", ".join(parts)


def _seconds(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds >= 0.995 else f"{seconds * 1000:.3g} ms"


def _check(check: dict[str, Any]) -> str:
    text = f"{check['what']}: {check['reached']:.3g}"
    for bound in ("at least", "at most"):
        if bound in check:
            text += f" ({'' if check['ok'] else '**missed:** '}{bound} {check[bound]:g})"
    return text


def _write_between_markers(path: Path, table: str) -> None:
    text = path.read_text()
    if text.count(START) != 1 or text.count(END) != 1:
        raise SystemExit(f"{path.name} needs one {START} and one {END}")
    before, _, rest = text.partition(START)
    after = rest.partition(END)[2]
    path.write_text(f"{before}{START}\n{table}\n{END}{after}")


if __name__ == "__main__":
    sys.exit(main())
