"""Couples, prunes and shrinks every model of a population of real PyTorch models.

    python benchmarks/population_torch.py                      # ours, float32
    python benchmarks/population_torch.py --x64                # in float64, with a tighter law
    python benchmarks/population_torch.py --torch-pruning      # Torch-Pruning on the same models
    python benchmarks/population_torch.py --export             # only: do they run and export?

Half of the units of every family go, chosen at random, and the smaller model must compute what the
masked one computes: ``max |masked - shrunk| <= 1e-5 max |masked|``, and 1e-10 in float64. Every
model runs in a process of its own, with a limit on its processor time. Results are kept as JSON,
model by model, and written as a table; ``--only 'tv/res*'`` measures some again.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUT = Path(__file__).resolve().parent / "out" / "population_torch.json"
TOLERANCE = {"ours": 1e-5, "ours_x64": 1e-10}
PACKAGES = ("torch", "torchvision", "timm", "pytorchcv", "transformers", "torch-pruning")


def main() -> int:
    arguments = _arguments()
    if arguments.child:
        _child(arguments.child, arguments.mode, arguments.out)
        return 0
    from zoo.torch_models import MODELS, missing

    results = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    results["versions"] = _versions()
    rows = results.setdefault("models", {})
    for model in MODELS:
        if arguments.only and not any(fnmatch(model.name, name) for name in arguments.only):
            continue
        if model.extra and not (arguments.extra or arguments.only):
            continue
        row = rows.setdefault(model.name, {"family": model.family, "extra": model.extra})
        if missing(model.package):
            row[arguments.mode] = {"status": f"{model.package} is not installed"}
        else:
            row[arguments.mode] = _in_a_process(model.name, arguments.mode, arguments.limit)
        print(f"{model.name:46}{_line(row[arguments.mode])}", flush=True)
        order = {m.name: i for i, m in enumerate(MODELS)}
        results["models"] = rows = dict(sorted(rows.items(), key=lambda item: order[item[0]]))
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text(table(results))
    print(summary(results))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--extra", action="store_true", help="also the models that came later")
    parser.add_argument("--limit", type=int, default=200, help="processor seconds for a model")
    parser.add_argument(
        "--out", type=Path, default=OUT, help="a .json; the table is put next to it"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--mode", default="ours", help=argparse.SUPPRESS)
    for mode in ("--x64", "--torch-pruning", "--export"):
        name = {"--x64": "ours_x64"}.get(mode, mode[2:].replace("-", "_"))
        parser.add_argument(mode, dest="mode", action="store_const", const=name)
    return parser.parse_args()


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


# --- a process for every model


def _in_a_process(name: str, mode: str, limit: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, __file__, "--child", name, "--mode", mode, "--out", str(out)]
        process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (limit, limit)),
        )
        try:
            _, stderr = process.communicate(timeout=4 * limit)
        except subprocess.TimeoutExpired:
            process.kill()
            _, stderr = process.communicate()
        result = json.loads(out.read_text()) if out.exists() else {"status": "no end"}
    if process.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        result["error"] = f"no end within {limit} seconds of processor time"
        if not result.get("status", "").startswith("no end"):
            result["status"] = "no end"
    elif process.returncode:
        result |= {"status": "error", "error": stderr.strip()[-400:]}
    return result


def _child(name: str, mode: str, out: Path) -> None:
    """Writes what is known about one model after every stage."""
    sys.path.insert(0, str(ROOT))
    warnings.simplefilter("ignore")
    import torch
    from zoo.torch_models import MODELS

    from tests.coupling.torch_patterns import cast, fill

    torch.set_num_threads(1)
    result: dict[str, Any] = {}

    def note(**more: Any) -> None:
        result.update(more)
        out.write_text(json.dumps(result, default=str))

    note(status="no end while building the model")
    (model,) = (m for m in MODELS if m.name == name)
    dtype = torch.float32 if mode in ("ours", "export") else torch.float64
    try:
        with _seconds(note, "model_s"):
            module, inputs = cast(*model.build(), dtype)
            settle(fill(module, seed=0), inputs)
        note(status="no end", parameters=sum(p.numel() for p in module.parameters()))
        measure = {"torch_pruning": _torch_pruning, "export": _export}.get(mode, _ours)
        measure(model, module, inputs, note)
        if mode.startswith("ours") and "difference" in result:
            single = mode == "ours" or computes_in_float32(module.to(dtype), inputs)
            exact = result["difference"] <= TOLERANCE["ours" if single else mode]  # not if NaN
            note(status="exact" if exact else "differs", float32_inside=single and mode != "ours")
    except Exception as error:
        if dtype == torch.float64 and "parameters" not in result:
            note(status="does not run in float64", error=f"{type(error).__name__}: {error}"[:300])
            return
        frames = traceback.extract_tb(error.__traceback__)
        where = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames[-4:]]
        note(status="error", error=f"{type(error).__name__}: {str(error)[:600]}", where=where)


class _seconds:
    """Notes the processor seconds a stage took, also if it failed."""

    def __init__(self, note: Callable[..., None], name: str):
        self.note, self.name = note, name

    def __enter__(self) -> None:
        self.start = time.process_time()

    def __exit__(self, *_: Any) -> None:
        self.note(**{self.name: round(time.process_time() - self.start, 3)})


def settle(model: Any, inputs: tuple[Any, ...], seed: int = 1) -> Any:
    """Gives batch norms about the statistics of what comes in, so that signals keep their size.

    Sums of four branches, twenty times over, saturate every softmax and sigmoid after them, and
    hide wrong channels behind those.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)

    def take(norm: Any, args: tuple[torch.Tensor, ...]) -> None:
        if norm.running_mean is None:
            return
        x = args[0].transpose(0, 1).flatten(1)
        mean, variance, size = x.mean(1), x.var(1, correction=0), norm.num_features
        shift, factor = torch.rand((2, size), generator=generator, dtype=torch.float64).to(x.dtype)
        norm.running_mean.copy_(mean + (shift - 0.5) * variance.sqrt())
        norm.running_var.copy_(variance * (0.5 + factor) + 0.1)

    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    hooks = [norm.register_forward_pre_hook(take) for norm in norms]
    with torch.no_grad():
        model(*inputs)
    for hook in hooks:
        hook.remove()
    return model


def computes_in_float32(model: Any, inputs: tuple[Any, ...]) -> bool:
    """Returns whether a model of float64 rounds to float32 on the way, as some norms do."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    found = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            result = func(*args, **(kwargs or {}))
            if str(func).startswith("aten._to_copy") and args[0].dtype == torch.float64:
                found.append(result.dtype == torch.float32)
            return result

    with torch.no_grad(), Watch():
        model(*inputs)
    return any(found)


# --- what is measured


def _export(_: Any, module: Any, inputs: tuple[Any, ...], note: Callable[..., None]) -> None:
    import torch

    with torch.no_grad():
        before = _floats(module(*inputs))
        with _seconds(note, "export_s"):
            program = torch.export.export(module, inputs, strict=False)
        after = _floats(program.module()(*inputs))
    finite = all(bool(x.isfinite().all()) for x in before)
    note(
        status="runs and exports" if finite else "not finite",
        nodes=len(program.graph.nodes),
        size=max(float(x.abs().max()) for x in before),
        difference_of_export=_distance(before, after),
    )


def _ours(model: Any, module: Any, inputs: tuple[Any, ...], note: Callable[..., None]) -> None:
    """Notes status, sizes and seconds of coupling half of every family and shrinking the model."""
    import numpy as np
    import torch
    from population import prunable

    from purepruning_interop import torch as ppt

    parameters = dict(module.named_parameters()) | dict(module.named_buffers())
    with _seconds(note, "couple_s"):
        coupling = ppt.couple(module, *inputs)
    # Half of every group: of units that must go evenly, equally many of each part.
    units = coupling.lowest(np.random.default_rng(0).random(coupling.n_units), 0.5)
    reasons = Counter(axis.reason for axis in coupling.frozen)
    share, whole = prunable(coupling)
    note(
        prunable=share,
        whole=whole,
        families=len(coupling.families),
        units=coupling.n_units,
        unknown=dict(coupling.unknown),
        stays=dict(reasons.most_common(5)),
    )
    if not len(units):
        note(status="nothing pruned")
        return
    with _seconds(note, "masks_s"):
        masks = coupling.masks(units, parameters)
    with _seconds(note, "shrink_s"):
        shrunk = ppt.shrink(module, masks, coupling, *inputs, norms="original")
    small = shrunk.model
    masked = copy.deepcopy(module)
    with torch.no_grad():
        for name, tensor in (*masked.named_parameters(), *masked.named_buffers()):
            if masks.get(name) is not None:
                tensor.copy_(torch.where(masks[name], tensor, torch.zeros_like(tensor)))
        plain, expected, got = (_floats(m(*inputs)) for m in (module, masked, small))
    note(
        difference=_distance(expected, got),
        change_by_pruning=_distance(plain, expected),
        own_class=type(small) is type(module),
        result=type(small).__name__,
        reason=shrunk.report.reason,
        replaced=len(shrunk.report.replaced),
    )
    _sizes(module, small, inputs, note)
    _latency(model, module.float(), small.float(), note)


def _torch_pruning(
    model: Any, module: Any, inputs: tuple[Any, ...], note: Callable[..., None]
) -> None:
    from zoo.torch_pruning import judge

    note(status="no end while building")
    pruned, original = judge(module, inputs, note)
    if pruned is not None:
        _sizes(original, pruned, inputs, note)
        _latency(model, original.float(), pruned.float(), note)


def _sizes(before: Any, after: Any, inputs: tuple[Any, ...], note: Callable[..., None]) -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    def macs(module: Any) -> int:
        module.requires_grad_(False)  # the counter hooks gradients, which no_grad refuses
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module(*inputs)
        return counter.get_total_flops() // 2

    note(
        parameters_after=sum(p.numel() for p in after.parameters()),
        macs=macs(before),
        macs_after=macs(after),
    )


def _latency(
    model: Any, before: Any, after: Any, note: Callable[..., None], batch: int = 8
) -> None:
    """Notes the least milliseconds of a forward pass of both, in turns, on one thread."""
    import torch

    _, inputs = model.build(batch)
    best = {"ms": float("inf"), "ms_after": float("inf")}
    end = time.perf_counter() + 6
    try:
        with torch.no_grad():
            for turn in range(30):
                for name, module in (("ms", before), ("ms_after", after)):
                    start = time.perf_counter()
                    module(*inputs)
                    if turn:
                        best[name] = min(best[name], 1000 * (time.perf_counter() - start))
                if turn >= 3 and time.perf_counter() > end:
                    break
    except Exception as error:  # a graph is of one batch size
        note(no_latency=f"{type(error).__name__}: {str(error)[:200]}")
    else:
        note(batch=batch, **{name: round(value, 3) for name, value in best.items()})


def _floats(outputs: Any) -> list[Any]:
    import torch
    from torch.utils import _pytree as pytree

    leaves = pytree.tree_leaves(outputs)
    return [x for x in leaves if isinstance(x, torch.Tensor) and x.is_floating_point()]


def _distance(expected: list[Any], got: list[Any]) -> float:
    """Returns the largest difference of any output, relative to the largest value in it."""
    import torch

    shapes = [x.shape for x in expected], [x.shape for x in got]
    if shapes[0] != shapes[1]:
        raise ValueError(f"the outputs have other shapes: {shapes[0]}, now {shapes[1]}")
    scales = (a.abs().max().clamp(min=1e-30) for a in expected)
    pairs = zip(expected, got, scales, strict=True)
    return float(torch.stack([(a - b).abs().max() / scale for a, b, scale in pairs]).max())


# --- reports


def _line(row: dict[str, Any]) -> str:
    shown = {
        k: v for k, v in row.items() if k not in ("status", "where", "stays") and v is not None
    }
    short = {k: f"{v:.3g}" if isinstance(v, float) else v for k, v in shown.items()}
    return f"{row['status']:24}" + " ".join(f"{k}={v}" for k, v in short.items())


def table(results: dict[str, Any]) -> str:
    """Returns a markdown table with a line for every model."""
    lines = [", ".join(f"{k} {v}" for k, v in results["versions"].items()), ""]
    lines += [
        "| model | ours | float64 | parameters | MACs | own class | couple + shrink s "
        "| Torch-Pruning | parameters | MACs | build + prune s | faster, batch 8: ours / TP |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in results["models"].items():
        ours, x64, other = (row.get(m, {}) for m in ("ours", "ours_x64", "torch_pruning"))
        own = {True: "yes", False: "no"}.get(ours.get("own_class"), "-")
        cells = [
            f"{name} ({row['family']})",
            ours.get("status", "-"),
            x64.get("status", "-"),
            _ratio(ours, "parameters"),
            _ratio(ours, "macs"),
            own,
            _sum(ours, "couple_s", "masks_s", "shrink_s"),
            other.get("status", "-"),
            _ratio(other, "parameters"),
            _ratio(other, "macs"),
            _sum(other, "build_s", "prune_s"),
            f"{_speed(ours)} / {_speed(other)}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", summary(results), ""])


def summary(results: dict[str, Any]) -> str:
    """Returns how many models have which status, for every mode that was run."""
    lines = []
    for mode in ("export", "ours", "ours_x64", "torch_pruning"):
        for extra in (False, True):
            statuses = Counter(
                row[mode]["status"]
                for row in results["models"].values()
                if mode in row and row["extra"] == extra
            )
            if statuses:
                counts = ", ".join(f"{count} {status}" for status, count in statuses.most_common())
                which = "extra models" if extra else "models"
                lines.append(f"{mode}, {sum(statuses.values())} {which}: {counts}")
    return "\n".join(lines)


def _ratio(row: dict[str, Any], key: str) -> str:
    before, after = row.get(key), row.get(f"{key}_after")
    return f"{after / before:.3f}" if before and after is not None else "-"


def _sum(row: dict[str, Any], *keys: str) -> str:
    values = [row[key] for key in keys if key in row]
    return f"{sum(values):.2f}" if len(values) == len(keys) else "-"


def _speed(row: dict[str, Any]) -> str:
    return f"{row['ms'] / row['ms_after']:.2f}" if row.get("ms_after") else "-"


if __name__ == "__main__":
    sys.exit(main())
