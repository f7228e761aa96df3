"""A model shrunk as the command line says: its table and its files."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

import purepruning as pp
from purepruning.arguments import fraction, missing
from purepruning.masks import to_numpy
from purepruning.saving.tensors import of_array, write_tensors
from purepruning.trees import flatten
from purepruning_interop.checkpoints import Aside
from purepruning_interop.cli import output
from purepruning_interop.cli.models import Given
from purepruning_interop.cli.rules import read_rules

PRUNERS: dict[str, Any] = {
    "l1_norm": pp.l1_norm,
    "l2_norm": pp.l2_norm,
    "fpgm": pp.fpgm,
    "random": pp.random_pruning,
}


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What the command line says; see ``purepruning shrink --help``."""

    rules: Path | None = None
    sparsity: float | None = None
    budget: str | None = None
    pruner: str = "l1_norm"
    round_to: int = 1
    seed: int = 0

    def check(self) -> None:
        """Raises for options that do not go together, before a model is made."""
        if self.pruner not in PRUNERS:
            raise ValueError(
                missing(f"--pruner: there is no {self.pruner!r}", self.pruner, PRUNERS)
            )
        if self.sparsity is not None and self.budget is not None:
            raise ValueError("--sparsity and --budget both say how much; give one")
        if self.sparsity is not None and self.rules is not None:
            raise ValueError("--rules and --sparsity both say how much; give one")
        if self.sparsity is None and self.budget is None and self.rules is None:
            raise ValueError(
                "nothing says how much to remove; give --budget, --sparsity or --rules"
            )
        self.goal()

    def goal(self) -> tuple[str, float] | None:
        """Returns the cost and the share of it that may be left, by ``--budget``."""
        if self.budget is None:
            return None
        cost, equals, share = self.budget.partition("=")
        number = re.fullmatch(r"\d*\.?\d+", share)
        if not equals or cost not in ("macs", "params") or not number or not 0 < float(share) <= 1:
            raise ValueError(
                f"--budget must be macs=SHARE or params=SHARE, a share in (0, 1], got "
                f"{self.budget!r}; write macs=0.5"
            )
        return cost, fraction(float(share), "--budget")


@dataclasses.dataclass(frozen=True)
class Small:
    """A model and what became of it.

    Attributes:
        given: the model.
        layers: its layer table.
        config: the resolved rules.
        rules: as they were resolved.
        shrunk: what the adapter's ``shrink`` returned.
        pruner: its name.
        goal: cost and share of the budget, or None.
    """

    given: Given
    layers: tuple[pp.Layer, ...]
    config: pp.Config
    rules: list[dict[str, Any]]
    shrunk: Any
    pruner: str
    goal: tuple[str, float] | None

    def arrays(self) -> dict[str, Any]:
        """Returns what a file of the small model holds, by name."""
        small = self.shrunk
        tree = small.params if small.model is None else self.given.edge.arrays(small.model)
        leaves = flatten(tree).leaves
        return {name: to_numpy(x) for name, x in leaves.items() if hasattr(x, "shape")}

    def sizes(self) -> list[tuple[pp.Layer, tuple[int, ...]]]:
        """Returns the layers, each with the shape of its weight now."""
        small = flatten(self.shrunk.params).leaves
        return [(x, tuple(small[x.weight].shape)) for x in self.layers if x.weight in small]

    def report(self) -> dict[str, Any]:
        """Returns what was done, as JSON knows it."""
        r = self.shrunk.report
        return {
            "purepruning": pp.__version__,
            "source": self.given.source,
            "framework": self.given.name,
            "inputs": [list(x.shape) for x in self.given.inputs],
            "pruner": self.pruner,
            "rules": self.rules,
            "budget": None if self.goal is None else dict([self.goal]),
            "params": list(r.params),
            "macs": [int(m) for m in r.macs],
            "units_removed": len(r.plan.removed),
            "kind": r.kind,
            "reason": r.reason,
            "deviation": None if r.deviation is None else float(r.deviation),
            "fixed": list(r.fixed),
            "kept_whole": [
                {"layers": list(k.layers), "units": k.units, "reason": k.reason}
                for k in self.config.kept_whole
            ],
            "layers": [
                {"name": x.name, "type": x.type, "before": list(x.shape), "after": list(now)}
                for x, now in self.sizes()
            ],
            "rebuild": self.rebuild(),
        }

    def rebuild(self) -> str:
        """Returns how the small model is made again from the files."""
        name = self.given.name
        module, _, function = self.given.source.partition(":")
        first = "module, variables" if name == "linen" else "model"
        rest = ", *x" if self.given.inputs else ""
        return (
            f"from {module} import {function}; {first}{rest} = {function}(); "
            f"purepruning_interop.{name}.rebuild({first}, purepruning.load_plan("
            f"'plan.safetensors'){rest})"
        )


def shrink_model(given: Given, wanted: Wanted) -> Small:
    """Returns the model shrunk.

    Raises:
        ValueError, TypeError: rules or budget do not fit the model, or it cannot be traced.
    """
    goal = wanted.goal()
    with output.progress() as bar:
        task = bar.add_task("coupling", total=None)
        layers = given.adapter.layers(*given.first, *given.inputs)
        coupling = given.adapter.couple(*given.first, *given.inputs)
        rules = _rules(wanted, goal)
        options: dict[str, Any] = {"extra": "none"}
        if goal is not None:
            options = {"scope": "global", "cost": goal[0]}
        config = pp.resolve(rules, layers, coupling=coupling, round_to=wanted.round_to, **options)
        bar.update(task, description="pruning")
        params = given.edge.params(given.model)
        key = jax.random.key(wanted.seed) if wanted.pruner == "random" else None
        masks = PRUNERS[wanted.pruner](params, key, config)
        bar.update(task, description="shrinking")
        small = given.adapter.shrink(*given.first, masks, coupling, *given.inputs)
    return Small(given, layers, config, rules, small, wanted.pruner, goal)


def _rules(wanted: Wanted, goal: tuple[str, float] | None) -> list[dict[str, Any]]:
    if wanted.rules is None:
        rules: list[dict[str, Any]] = [{}] if goal else [{"sparsity": wanted.sparsity}]
    else:
        rules = read_rules(wanted.rules)
    if goal is None:
        return rules
    # A budget is the whole model's: what rules select counts, and how much of it does not.
    shares = ("sparsity", "sparsity_per_layer", "total_sparsity")
    return [
        rule
        if rule.get("exclude") is True
        else {**{k: v for k, v in rule.items() if k not in shares}, "sparsity": 1 - goal[1]}
        for rule in rules
    ]


def write(found: Small, out: Path, overwrite: bool) -> dict[str, str]:
    """Writes weights, plan, masks and report; returns the files by kind.

    Raises:
        NotWritten: the system would not take it; nothing is left.
    """
    files = {kind: f"{kind}.safetensors" for kind in ("weights", "plan", "masks")}
    with Aside(out, overwrite=overwrite) as aside:
        tensors = {name: of_array(x) for name, x in found.arrays().items()}
        write_tensors(aside.folder / files["weights"], tensors, {"format": _format(found)})
        pp.save_plan(aside.folder / files["plan"], found.shrunk.report.plan)
        pp.save_masks(aside.folder / files["masks"], found.shrunk.report.masks, _whole(found.given))
        aside.write("report.json", (json.dumps(found.report(), indent=2) + "\n").encode())
        aside.commit_folder()
    return {kind: str(out / name) for kind, name in {**files, "report": "report.json"}.items()}


def _format(found: Small) -> str:
    return "pt" if found.given.name == "torch" else "flax"


def _whole(given: Given) -> Any:
    """Returns what the complete masks are of: statistics too, where they are leaves beside."""
    if given.name == "torch":
        return given.edge.arrays(given.model)
    if given.name == "linen":
        return given.model.variables
    return given.adapter.function(*given.first)[1]


def show(found: Small, files: Mapping[str, str]) -> None:
    """Prints what became of the layers and of the whole, and the files."""
    out, report = output.console(), found.shrunk.report
    columns = (("layer", False), ("type", False), ("before", False), ("after", False))
    rows = []
    for layer, now in found.sizes():
        same = now == layer.shape
        cells = (layer.name, layer.type, output.times(layer.shape))
        rows.append((*cells, "same", None) if same else (*cells, output.times(now)))
    out.print(output.table(columns, rows))
    out.print()
    for name, (before, after) in (("parameters", report.params), ("multiply-adds", report.macs)):
        before, after = int(before), int(after)
        share = output.percent(after / max(before, 1))
        out.print(f"{name:14} {before:,} -> [bold]{after:,}[/] ({share})", soft_wrap=True)
    if found.goal is not None:
        cost, most = found.goal
        out.print(f"{'budget':14} {cost} at most {output.percent(most)}", soft_wrap=True)
    for kept in found.config.kept_whole:
        names = output.escaped(output.some(kept.layers))
        out.print(f"[dim]kept whole     {names}: {kept.reason}[/]", soft_wrap=True)
    kinds = {
        "module": "a module of the model's own class",
        "graph": "a graph module of the model's operations",
        "function": "a function of the smaller parameters",
    }
    out.print(f"{'result':14} {kinds[report.kind]}", soft_wrap=True)
    if report.reason:
        out.print(f"[dim]{'':14} {output.escaped(report.reason)}[/]", soft_wrap=True)
    for kind, path in files.items():
        out.print(f"{kind:14} {output.escaped(path)}", soft_wrap=True)
    if files:
        out.print(f"{'again':14} {output.escaped(found.rebuild())}", soft_wrap=True)
    else:
        out.print("Nothing was written (--dry-run).")
