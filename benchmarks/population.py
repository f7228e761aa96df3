"""Structural pruning, judged on a population of real models.

    python benchmarks/population.py                        every model that can be built here
    python benchmarks/population.py --framework linen nnx  of these frameworks
    python benchmarks/population.py --source keras bert    of a source, with "bert" in the name
    python benchmarks/population.py --smoke                a handful of small ones
    python benchmarks/population.py --list

Every model is coupled, half of each of its unit groups is pruned at random, and the shrunk model
must compute what the masked one does: within 1e-5 of the largest output, or 1e-10 with ``--x64``.
The sources are the sample in ``tests/coupling/zoo.py`` and the packages in ``benchmarks/zoo/``; a
package that is not installed is named and skipped. Models run one after another in a process that
is replaced when one of them exceeds its time or takes the process down.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.metadata
import json
import multiprocessing
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [path for path in (str(HERE), str(HERE.parent)) if path not in sys.path]

#: Where models come from: modules with a table ``MODELS`` of entries, cheap to import.
SOURCES = {
    "sample": "tests.coupling.zoo",
    "transformers": "zoo.transformers_flax",
    "keras": "zoo.keras_applications",
    "equinox": "zoo.equinox_packages",
    "linen": "zoo.linen_packages",
    "haiku": "zoo.haiku_packages",
    "nnx": "zoo.nnx_packages",
}
SMOKE = (
    "linen_resnet_basic",
    "linen_llama",
    "nnx_vit",
    "equinox_resnet",
    "haiku_mobilenet",
    "plain_maxout",
)
EXACT, DIFFERS, NOTHING, ERROR = "EXACT", "differs", "nothing pruned", "error"
NO_REFERENCE = "no reference"  # the masked model is not finite, as where kernels are normed to 1
SKIPPED, TRACED = "skipped", "traced"


@dataclasses.dataclass(frozen=True)
class Options:
    """How to judge; ``trace_only`` builds, traces and runs the models, and prunes nothing."""

    x64: bool = False
    gradients: bool = False
    trace_only: bool = False
    norms: str = "original"
    sparsity: float = 0.5
    seed: int = 0


def judge(entry: Any, options: Options) -> dict[str, Any]:
    """Returns the row of one model."""
    row: dict[str, Any] = {"stage": "build"}
    try:
        for stage in _stages(entry, options, row):
            row["stage"] = stage
    except ModuleNotFoundError as error:
        if row["stage"] != "build":
            raise
        row |= {"status": SKIPPED, "message": f"needs {error.name}"}
    except Exception as error:
        row |= {
            "status": ERROR,
            "message": _message(error),
            "trace": traceback.format_exc()[-4000:],
        }
    else:
        del row["stage"]
    return row


def _stages(entry: Any, options: Options, row: dict[str, Any]) -> Iterator[str]:
    """Fills ``row``, and yields the name of what comes next."""
    import jax
    import numpy as np

    fn, params, inputs = entry.build(jax.random.key(options.seed))
    if options.x64:
        params, inputs = _double(params), _double(inputs)
    yield "trace"
    jaxpr = _timed(row, "trace_s", lambda: jax.make_jaxpr(fn)(params, *inputs))
    row["equations"] = len(jaxpr.jaxpr.eqns)
    yield "run"
    dense = _run(fn, params, inputs)
    row |= {"status": TRACED, "outputs": _describe(dense)}
    others = jax.tree.map(lambda x: jax.numpy.roll(x, 1, -1) if x.ndim else x, inputs)
    row["sensitivity"] = _distance(dense, _run(fn, params, others))  # 0: the input is not seen
    if options.trace_only:
        yield "gradients"
        grads = jax.tree.leaves(_gradients(fn, params, inputs))
        row["leaves without gradient"] = sum(not np.any(g) for g in grads)
        row["gradients are finite"] = all(bool(np.all(np.isfinite(g))) for g in grads)
        return

    import purepruning as pp

    yield "couple"
    coupling = _timed(row, "couple_s", lambda: pp.couple(fn, params, *inputs))
    chosen = coupling.lowest(
        np.random.default_rng(options.seed).random(coupling.n_units), options.sparsity
    )
    row |= {
        "families": len(coupling.families),
        "units": coupling.n_units,
        "pruned": len(chosen),
        "unknown": dict(coupling.unknown),
        "frozen": dict(Counter(axis.reason for axis in coupling.frozen).most_common(12)),
    }
    row["prunable"], row["whole"] = prunable(coupling)
    if not len(chosen):
        row["status"] = NOTHING
        return
    yield "masks"
    masks = coupling.masks(chosen, params)
    yield "shrink"
    small = _timed(
        row,
        "shrink_s",
        lambda: pp.shrink(fn, params, masks, coupling, *inputs, norms=options.norms),
    )
    row |= {
        "params": list(small.report.params),
        "macs": [float(x) for x in small.report.macs],
        "statistics": small.report.statistics,
    }
    yield "what is left"
    masked = pp.apply_masks(params, masks)
    row["other values"] = _other_values(params, masks, small.params)
    yield "run the masked model"
    expected = _run(fn, masked, inputs)
    yield "run the small model"
    got = _run(small.fn, small.params, inputs)
    if not all(np.all(np.isfinite(x)) for x in expected):
        row["status"] = NO_REFERENCE
        return
    row["error"] = _distance(expected, got)
    row["change"] = _distance(expected, dense)  # what pruning did, without which equality is easy
    tolerance = 1e-10 if options.x64 else 1e-5
    wrong = []
    if row["error"] > tolerance:
        wrong.append("outputs")
    if row["other values"]:
        wrong.append("other values in " + ", ".join(row["other values"][:3]))
    if options.gradients:
        yield "gradients"
        try:
            theirs = jax.tree.leaves(small.report.plan.apply(_gradients(fn, masked, inputs)))
        except ValueError as error:
            if "Reverse-mode differentiation" not in str(error):  # a loop of unknown length
                raise
            theirs = []
        ours = jax.tree.leaves(_gradients(small.fn, small.params, inputs)) if theirs else []
        # Some leaves, such as the biases of keys, have nothing but rounding: one scale for all.
        scale = max((float(np.max(np.abs(g))) for g in theirs), default=1.0)
        row["gradient error"] = _distance(theirs, ours, scale)
        if not row["gradient error"] <= 10 * tolerance:
            wrong.append(f"gradients by {row['gradient error']:.0e}")
    row |= {"status": DIFFERS, "message": "; ".join(wrong)} if wrong else {"status": EXACT}


def prunable(coupling: Any) -> tuple[float, dict[str, float]]:
    """Returns the share of kernel weights that lie in a unit, and of the others by their reason.

    A kernel is a parameter that a layer contracts with its input. A weight lies in a unit if any of
    its positions does; of the rest the reason is that of its output axis.
    """
    import numpy as np

    total, inside = 0, 0
    outside: Counter[str] = Counter()
    reasons = {(f.path, f.axis): f.reason for f in coupling.frozen}
    for path, leaf in coupling.leaves.items():
        if "sink" not in leaf.roles and leaf.roles.count("source") < 2:
            continue
        size, free = int(np.prod(leaf.shape)), 1.0
        for units in leaf.units:
            if units is not None:
                free *= 1 - (units > 0).any(-1).mean()
        total, inside = total + size, inside + round(size * (1 - free))
        sources = [a for a, role in enumerate(leaf.roles) if role == "source"]
        listed = [reasons[path, a] for a in sources if (path, a) in reasons]
        outside[listed[0] if listed else "one channel"] += round(size * free)
    return inside / max(total, 1), {r: n / max(total, 1) for r, n in outside.items() if n}


def _timed(row: dict[str, Any], name: str, call: Callable[[], Any]) -> Any:
    start = time.perf_counter()
    result = call()
    row[name] = round(time.perf_counter() - start, 4)
    return result


def _message(error: Exception) -> str:
    first = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {first[0][:300]}"


def _double(tree: Any) -> Any:
    import jax
    import jax.numpy as jnp

    def leaf(x):
        return x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(leaf, tree)


def _run(fn: Callable[..., Any], params: Any, inputs: tuple[Any, ...]) -> list[Any]:
    import jax
    import numpy as np

    return [np.asarray(x) for x in jax.tree.leaves(jax.jit(fn)(params, *inputs))]


def _distance(expected: list[Any], got: list[Any], scale: float | None = None) -> float:
    """The largest difference between arrays, in units of ``scale`` or their largest numbers."""
    import numpy as np

    if [x.shape for x in expected] != [x.shape for x in got]:
        return float("inf")
    found = 0.0
    for a, b in zip(expected, got, strict=True):
        if a.size:
            a, b = np.asarray(a, np.complex128), np.asarray(b, np.complex128)
            unit = max(float(np.max(np.abs(a))) if scale is None else scale, 1e-30)
            found = max(found, float(np.nan_to_num(np.max(np.abs(a - b)) / unit, nan=np.inf)))
    return found


def _describe(outputs: list[Any]) -> list[dict[str, Any]]:
    """Shapes and spreads; raises if an output says nothing."""
    import numpy as np

    found = []
    for x in outputs:
        x = np.asarray(x, np.float64)
        if not np.all(np.isfinite(x)):
            raise ValueError(f"an output of shape {x.shape} is not finite")
        if x.size > 1 and float(np.std(x)) <= 1e-6 * max(float(np.max(np.abs(x))), 1e-6):
            raise ValueError(f"an output of shape {x.shape} is constant")
        found.append({"shape": list(x.shape), "std": float(np.std(x))})
    return found


def _gradients(fn: Callable[..., Any], params: Any, inputs: tuple[Any, ...]) -> Any:
    """Gradients of a sum of waves of the outputs; zeros for what is no floating array."""
    import jax
    import jax.numpy as jnp

    leaves, tree = jax.tree.flatten(params)
    floating = [bool(jnp.issubdtype(x.dtype, jnp.floating)) for x in leaves]

    def loss(chosen):
        chosen = iter(chosen)
        filled = [next(chosen) if f else x for f, x in zip(floating, leaves, strict=True)]
        outputs = jax.tree.leaves(fn(jax.tree.unflatten(tree, filled), *inputs))
        real = (x for x in outputs if jnp.issubdtype(x.dtype, jnp.floating))
        waves = (jnp.sin(x + jnp.arange(x.size, dtype=x.dtype).reshape(x.shape)) for x in real)
        return sum(jnp.sum(wave) for wave in waves)

    grads = iter(jax.jit(jax.grad(loss))([x for f, x in zip(floating, leaves, strict=True) if f]))
    return jax.tree.unflatten(
        tree,
        [
            next(grads) if f else jnp.zeros(x.shape, jnp.int32)
            for f, x in zip(floating, leaves, strict=True)
        ],
    )


def _other_values(params: Any, masks: Any, small: Any) -> list[str]:
    """Paths whose smaller array holds other numbers than the mask keeps.

    Independent of how the arrays were cut: filled parameters hold distinct numbers.
    """
    import jax.numpy as jnp
    import numpy as np

    from purepruning.masks import by_path
    from purepruning.trees import flatten

    found = []
    before, after = flatten(params).leaves, flatten(small).leaves
    masks = by_path(masks, before)
    for path, x in before.items():
        if not jnp.issubdtype(x.dtype, jnp.floating):
            continue
        mask = np.broadcast_to(True if masks.get(path) is None else masks[path], x.shape)
        want = np.asarray(x, np.float64)[mask]
        have = np.ravel(np.asarray(after[path], np.float64))
        if want.shape != have.shape or not np.array_equal(np.sort(want), np.sort(have)):
            found.append(path)
    return found


# A process that judges, and is replaced when it takes too long or dies.


def _judge_all(connection: Any, options: Options) -> None:
    import jax

    jax.config.update("jax_enable_x64", options.x64)
    while (task := connection.recv()) is not None:
        source, name = task
        entry = next(entry for entry in _entries(source) if entry.name == name)
        connection.send(judge(entry, options))
        jax.clear_caches()


class Judge:
    """Judges models in a process of its own: ``judge(source, name)`` returns a row."""

    def __init__(self, options: Options, limit: float) -> None:
        self.options, self.limit = options, limit
        self._context = multiprocessing.get_context("spawn")
        self._process: Any = None

    def __call__(self, source: str, name: str) -> dict[str, Any]:
        """Returns the row of a model, or that it took too long or ended the process."""
        if self._process is None:
            self._connection, theirs = self._context.Pipe()
            self._process = self._context.Process(
                target=_judge_all, args=(theirs, self.options), daemon=True
            )
            self._process.start()
            theirs.close()
        self._connection.send((source, name))
        try:
            if self._connection.poll(self.limit):
                return self._connection.recv()
            message = f"more than {self.limit:.0f} seconds"
        except EOFError:
            message = "the process died"
        self.stop()
        return {"status": ERROR, "message": message}

    def stop(self) -> None:
        """Ends the process; the next call starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
            self._process = None


# Which models, and what is written.


def _entries(source: str) -> tuple[Any, ...]:
    return importlib.import_module(SOURCES[source]).MODELS


def chosen(arguments: argparse.Namespace) -> list[tuple[str, Any]]:
    """The models that the command line asks for, with their sources."""
    found = []
    for source in arguments.source or SOURCES:
        for entry in _entries(source):
            name, framework = entry.name, entry.framework
            if arguments.framework and framework not in arguments.framework:
                continue
            if arguments.family and entry.family not in arguments.family:
                continue
            if arguments.names and not any(part in name for part in arguments.names):
                continue
            if arguments.smoke and name not in SMOKE:
                continue
            found.append((source, entry))
    return found


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Counts by source and status, then a line for every model, in Markdown."""
    statuses = sorted({row["status"] for row in rows.values()})
    lines = [f"| source | models | {' | '.join(statuses)} |", "|---" * (2 + len(statuses)) + "|"]
    for source in dict.fromkeys(row["source"] for row in rows.values()):
        some = [row["status"] for row in rows.values() if row["source"] == source]
        counts = " | ".join(str(some.count(status)) for status in statuses)
        lines.append(f"| {source} | {len(some)} | {counts} |")
    lines += [
        "",
        "| model | family | status | error | units | prunable | parameters | multiply-adds "
        "| trace s | couple s | shrink s | |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        notes = [row.get("message", ""), *(f"no rule for {op}" for op in row.get("unknown", ()))]
        whole = sorted(row.get("whole", {}).items(), key=lambda item: -item[1])
        notes += [f"{share:.2f}: {reason}" for reason, share in whole[:2] if share >= 0.01]
        if row.get("stage"):
            notes.insert(0, f"in {row['stage']}:")
        cells = [
            name,
            row["family"],
            row["status"],
            f"{row['error']:.0e}" if "error" in row else "",
            f"{row['pruned']} of {row['units']}" if "units" in row else "",
            f"{row['prunable']:.2f}" if "prunable" in row else "",
            *(_ratio(row.get(key)) for key in ("params", "macs")),
            *(f"{row[key]:.2f}" if key in row else "" for key in TIMES),
            " ".join(note for note in notes if note).replace("|", "\\|"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


TIMES = ("trace_s", "couple_s", "shrink_s")


def _ratio(numbers: list[float] | None) -> str:
    return f"{numbers[1] / max(numbers[0], 1):.3f}" if numbers else ""


def _versions() -> dict[str, str]:
    names = {package for source in SOURCES for package in getattr(_module(source), "PACKAGES", ())}
    found = {}
    for name in sorted({"jax", "flax", "equinox", "dm-haiku", "numpy", *names}):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _module(source: str) -> Any:
    return importlib.import_module(SOURCES[source])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="parts of names; all models without")
    parser.add_argument("--source", nargs="+", choices=SOURCES)
    parser.add_argument("--framework", nargs="+")
    parser.add_argument("--family", nargs="+")
    parser.add_argument("--smoke", action="store_true", help="a handful of small models")
    parser.add_argument("--list", action="store_true", help="name the models and stop")
    parser.add_argument("--x64", action="store_true", help="double precision, and 1e-10")
    parser.add_argument("--gradients", action="store_true", help="compare gradients as well")
    parser.add_argument("--trace-only", action="store_true", help="look at the models, prune none")
    parser.add_argument("--norms", default="original", choices=("original", "kept"))
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=300, help="seconds for one model")
    parser.add_argument("--out", type=Path, default=HERE / "out" / "population.json")
    arguments = parser.parse_args()
    models = chosen(arguments)
    if arguments.list:
        print(*(f"{source}\t{e.framework}\t{e.family}\t{e.name}" for source, e in models), sep="\n")
        return 0

    options = Options(
        **{f.name: getattr(arguments, f.name) for f in dataclasses.fields(Options)},
    )
    judged = Judge(options, arguments.limit)
    rows: dict[str, dict[str, Any]] = {}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for source, entry in models:
        start = time.perf_counter()
        row = {"source": source, "framework": entry.framework, "family": entry.family}
        row |= judged(source, entry.name)
        row["seconds"] = round(time.perf_counter() - start, 2)
        rows[entry.name] = row
        told = (row["status"], f"{row['error']:.1e}" if "error" in row else "", row.get("message"))
        print(f"{entry.name:40s}", *(part for part in told if part), flush=True)
        result = {"options": dataclasses.asdict(options), "versions": _versions(), "models": rows}
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
        arguments.out.with_suffix(".md").write_text(table(rows))
    judged.stop()
    counts = Counter(row["status"] for row in rows.values())
    print(*(f"{n} {status}" for status, n in counts.most_common()), sep=", ")
    return int(bool(counts[DIFFERS] or counts[ERROR]))


if __name__ == "__main__":
    sys.exit(main())
