"""The flow of the README with default options, over every model that is at hand.

    python benchmarks/workflow.py                            the JAX models of the tests
    python benchmarks/workflow.py --source torch             the torch population
    python benchmarks/workflow.py resnet --case default twice   some models, some cases
    python benchmarks/workflow.py --list                     name the models and stop

Layers, couple, resolve, a pruner, shrink, in float32, as everybody writes it: rules with op types
only, the output layer left among those they select. It has to end in a smaller model that computes
what the masked one does, within 1e-4 of the largest output; where it does not, the table says
why. *Nothing to prune* is an error that is right where all that the rules select must stay, such as
a head that is the only linear layer. The cases are in :data:`CASES`.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import json
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [path for path in (str(HERE), str(HERE.parent)) if path not in sys.path]

#: Where models come from: modules with a table ``MODELS``, cheap to import.
SOURCES = {
    "sample": "tests.coupling.zoo",
    "equinox": "zoo.equinox_packages",
    "linen": "zoo.linen_packages",
    "haiku": "zoo.haiku_packages",
    "nnx": "zoo.nnx_packages",
    "keras": "zoo.keras_applications",
    "flax": "zoo.transformers_flax",
    "torch": "zoo.torch_models",
}
SMALLER, UNCHANGED, DIFFERS, REFUSED = "smaller", "unchanged", "differs", "refused"
NOTHING, ABSENT = "nothing to prune", "-"
TOLERANCE = 1e-4


def norms_in(table: Sequence[Any]) -> list[str]:
    """Returns the batch norms of a layer table, as op types."""
    return sorted({x.type for x in table if x.type.startswith("BatchNorm")})


def _types(*types: str) -> Callable[..., Any]:
    def rules(table: Sequence[Any]) -> Any:
        there = [t for t in types if t == "default" or any(x.has_type(t) for x in table)]
        return [{"sparsity": 0.5, "op_types": there}] if there else None

    return rules


def _partly(table: Sequence[Any]) -> Any:
    """Every third of the layers excluded, whatever it is coupled with."""
    some = [x.name for x in table if not x.type.startswith(("BatchNorm", "LayerNorm"))][::3]
    rules = [{"sparsity": 0.5, "op_types": ["default"]}]
    return [*rules, {"exclude": True, "op_names": some}] if len(table) > len(some) else None


def _whole(table: Sequence[Any]) -> Any:
    return [{"total_sparsity": 0.3, "op_types": ["default"]}]


def _norms(table: Sequence[Any]) -> Any:
    types = norms_in(table)
    return [{"sparsity": 0.5, "op_types": types}] if types else None


#: By name: rules for a layer table (None where it has no such layers), the pruner, options of
#: ``resolve``, and how many rounds.
CASES: dict[str, tuple[Callable[..., Any], str, dict[str, Any], int]] = {
    "default": (_types("default"), "l1_norm", {}, 1),
    "Linear": (_types("Linear"), "l1_norm", {}, 1),
    "Conv2d": (_types("Conv2d"), "l1_norm", {}, 1),
    "partly": (_partly, "l1_norm", {}, 1),
    "global": (_whole, "l1_norm", {"scope": "global"}, 1),
    "macs": (_whole, "l1_norm", {"scope": "global", "cost": "macs"}, 1),
    "slim": (_norms, "slim", {}, 1),
    "twice": (_types("default"), "l1_norm", {}, 2),
}


def run(model: Any, case: str) -> dict[str, Any]:
    """Returns the row of one case: what became of the model.

    Args:
        model: ``JaxModel`` or ``TorchModel``.
        case: a key of :data:`CASES`.
    """
    import purepruning as pp

    rules_of, pruner, options, rounds = CASES[case]
    row: dict[str, Any] = {"status": ABSENT}
    start = time.process_time()
    try:
        model.start()
        for _ in range(rounds):
            coupling = model.couple()
            table = pp.coupled_layers(coupling, model.layers())
            rules = rules_of(table)
            if rules is None:
                return row
            config = pp.resolve(rules, table, coupling=coupling, **options)
            masks = getattr(pp, pruner)(model.params, None, config)
            difference, before, after = model.shrink(masks, coupling)
            row["kept whole"] = [str(kept) for kept in config.kept_whole]
            row |= {"difference": difference, "params": [before, after]}
            row["status"] = SMALLER if after < before else UNCHANGED
            if not difference <= TOLERANCE:
                row["status"] = DIFFERS
                break
    except Exception as error:
        nothing = ("nothing that the rules select can be pruned", "nothing can be removed")
        row["status"] = NOTHING if any(x in str(error) for x in nothing) else REFUSED
        row["message"] = f"{type(error).__name__}: {error}"
        row["trace"] = traceback.format_exc()[-3000:]
    finally:
        row["seconds"] = round(time.process_time() - start, 2)
    return row


class JaxModel:
    """A model of the JAX populations in the hands of the flow."""

    def __init__(self, entry: Any) -> None:
        self.entry, self.name = entry, entry.name

    def start(self) -> None:
        """Builds the model anew."""
        import jax

        self.fn, self.params, self.inputs = self.entry.build(jax.random.key(0))
        self.rows: tuple[Any, ...] | None = None

    def layers(self) -> tuple[Any, ...]:
        """Returns what the adapter says, where there is one; after a round the coupling's own."""
        layers = getattr(self.entry, "layers", None)
        if layers is None or self.rows is not None:
            return self.rows or ()
        return layers(self.params, self.inputs)

    def couple(self) -> Any:
        """Returns the coupling."""
        import purepruning as pp

        return pp.couple(self.fn, self.params, *self.inputs)

    def shrink(self, masks: Any, coupling: Any) -> tuple[float, int, int]:
        """Makes the model smaller; returns how far it is from the masked one, and sizes."""
        import jax
        import numpy as np

        import purepruning as pp

        small = pp.shrink(self.fn, self.params, masks, coupling, *self.inputs)
        masked = pp.apply_masks(self.params, masks)
        expected = jax.tree.leaves(jax.jit(self.fn)(masked, *self.inputs))
        got = jax.tree.leaves(jax.jit(small.fn)(small.params, *self.inputs))
        self.fn, self.params, self.rows = small.fn, small.params, ()
        return distance(map(np.asarray, expected), map(np.asarray, got)), *small.report.params


class TorchModel:
    """A model of the torch population in the hands of the flow."""

    def __init__(self, model: Any) -> None:
        self.model, self.name = model, model.name

    def start(self) -> None:
        """Builds the module anew, with numbers that tell channels apart."""
        from tests.coupling.torch_patterns import fill

        module, self.inputs = self.model.build(2)
        fill(module.eval(), 0)
        self.module = module

    @property
    def params(self) -> dict[str, Any]:
        """The module's parameters."""
        return dict(self.module.named_parameters())

    def layers(self) -> tuple[Any, ...]:
        """Returns the layer table."""
        from purepruning_interop import torch as ppt

        return ppt.layers(self.module)

    def couple(self) -> Any:
        """Returns the coupling."""
        from purepruning_interop import torch as ppt

        return ppt.couple(self.module, *self.inputs)

    def shrink(self, masks: Any, coupling: Any) -> tuple[float, int, int]:
        """Makes the module smaller; returns how far it is from the masked one, and sizes."""
        import torch

        import purepruning as pp
        from purepruning_interop import torch as ppt

        small = ppt.shrink(self.module, masks, coupling, *self.inputs)
        state = self.params | dict(self.module.named_buffers())
        with torch.no_grad():
            masked = pp.apply_masks({k: state[k] for k in masks}, masks)
            expected = torch.func.functional_call(self.module, {**state, **masked}, self.inputs)
            got = small.model(*self.inputs)
        self.module = small.model
        return distance(_arrays(expected), _arrays(got)), *small.report.params


def _arrays(outputs: Any) -> Iterator[Any]:
    import torch

    for x in torch.utils._pytree.tree_leaves(outputs):
        if isinstance(x, torch.Tensor):
            yield x.detach().numpy()


def distance(expected: Any, got: Any) -> float:
    """Returns the largest difference of arrays, each in units of its largest expected number."""
    import numpy as np

    found = 0.0
    for a, b in zip(expected, got, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if a.size and not (np.isnan(a).all() and np.isnan(b).all()):
            a, b = a.astype(np.complex128), b.astype(np.complex128)
            unit = max(float(np.max(np.abs(a))), 1e-30)
            found = max(found, float(np.nan_to_num(np.max(np.abs(a - b)) / unit, nan=np.inf)))
    return found


def models(sources: Sequence[str], names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yields the models that the command line asks for, with their sources."""
    for source in sources:
        found = importlib.import_module(SOURCES[source])
        for entry in found.MODELS:
            if names and not any(part in entry.name for part in names):
                continue
            if source == "torch" and found.missing(entry.package):
                continue
            yield source, TorchModel(entry) if source == "torch" else JaxModel(entry)


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Returns counts by case and status, then a line for what did not end smaller, in Markdown."""
    cases = list(dict.fromkeys(case for row in rows.values() for case in row))
    statuses = (SMALLER, NOTHING, UNCHANGED, DIFFERS, REFUSED)
    lines = [f"| case | {' | '.join(statuses)} | largest difference |", "|---" * 7 + "|"]
    for case in cases:
        found = [row[case] for row in rows.values() if case in row]
        counts = collections.Counter(r["status"] for r in found)
        worst = max((r["difference"] for r in found if "difference" in r), default=0.0)
        cells = " | ".join(str(counts[s]) for s in statuses)
        lines.append(f"| {case} | {cells} | {worst:.0e} |")
    lines += ["", "| model | case | | why |", "|---|---|---|---|"]
    for name, row in rows.items():
        for case, r in row.items():
            if r["status"] in (SMALLER, ABSENT):
                continue
            why = r.get("message") or "; ".join(r.get("kept whole", ())[:3])
            why = f"{r['difference']:.0e}" if r["status"] == DIFFERS else why
            why = " ".join(why.split())[:300].replace("|", "\\|")
            lines.append(f"| {name} | {case} | {r['status']} | {why} |")
    return "\n".join(lines) + "\n"


class _TooLong(Exception):
    """A model took longer than it may."""


def _limited(seconds: int, call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    def stop(*_: Any) -> None:
        raise _TooLong(f"more than {seconds} seconds")

    signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        return call()
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="parts of names; all models without")
    parser.add_argument("--source", nargs="+", choices=SOURCES, default=["sample"])
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--list", action="store_true", help="name the models and stop")
    parser.add_argument("--limit", type=int, default=120, help="processor seconds for a case")
    parser.add_argument("--out", type=Path, default=HERE / "out" / "workflow.json")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    rows: dict[str, dict[str, Any]] = {}
    for source, model in models(arguments.source, arguments.names):
        if arguments.list:
            print(f"{source}\t{model.name}")
            continue
        row = rows.setdefault(f"{source} {model.name}", {})
        for case in arguments.case:
            row[case] = _limited(arguments.limit, lambda m=model, c=case: run(m, c))
            if row[case]["status"] == REFUSED and "needs" in row[case].get("message", ""):
                break
        told = (f"{case} {r['status']}" for case, r in row.items() if r["status"] != ABSENT)
        print(f"{model.name:34s}", ", ".join(told), flush=True)
        if source != "torch":
            import jax

            jax.clear_caches()
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n")
        arguments.out.with_suffix(".md").write_text(table(rows))
    if rows:
        print(table(rows))
    wrong = (DIFFERS, REFUSED)
    return int(any(r["status"] in wrong for row in rows.values() for r in row.values()))


if __name__ == "__main__":
    sys.exit(main())
