"""The loop of a study, with its files: stopped at any time, it goes on where it was."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import purepruning as pp
from purepruning.arguments import instance, one_of, whole_number
from purepruning.saving.files import write_whole
from purepruning.saving.states import load_state, save_state
from purepruning.versions import __version__
from purepruning_interop.study.criteria import CRITERIA, GRANULARITY, Method, methods_of
from purepruning_interop.study.networks import Networks, Outcomes, networks_of
from purepruning_interop.study.statistics import check_needs
from purepruning_interop.tasks import Task

SPARSITIES = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)

SETTINGS, RESULTS, TRAINED = "study.json", "results.jsonl", "networks"


@dataclasses.dataclass(frozen=True)
class Study:
    """What :func:`run_study` found.

    Attributes:
        task: its name.
        metric: what the scores are.
        methods: what was compared.
        sparsities: of the layers that are pruned.
        seeds: of the networks.
        epochs: of fine-tuning.
        scope: ``"layer"`` or ``"global"``.
        layers: names of all layers.
        shapes: of their weights.
        sizes: weights of each, ``(layers,)``.
        pruned_layers: which of them are pruned, ``(layers,)``.
        dense: scores of the networks before, ``(seeds,)``.
        outcomes: by ``str(method)``.
        about: sentences about the task, by title.
    """

    task: str
    metric: str
    methods: tuple[Method, ...]
    sparsities: tuple[float, ...]
    seeds: tuple[int, ...]
    epochs: int
    scope: str
    layers: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    sizes: np.ndarray
    pruned_layers: np.ndarray
    dense: np.ndarray
    outcomes: dict[str, Outcomes]
    about: dict[str, str]


def run_study(
    task: Task,
    pruners: Iterable[str] | None = None,
    *,
    sparsities: Sequence[float] = SPARSITIES,
    seeds: int | Sequence[int] = 10,
    epochs: int | None = None,
    scope: str = "layer",
    folder: str | os.PathLike[str] | None = None,
    at_once: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Study:
    """Returns what becomes of networks of several seeds, by every criterion at every sparsity.

    One network is trained for each seed; each is pruned by every method to every sparsity, scored,
    fine-tuned and scored again. So networks of one seed differ in what was pruned, and in nothing
    else; random pruning is always among the methods, and the others are compared with it in pairs.

    With a ``folder``, what is found is written there as it comes: ``study.json``, which says what
    was asked for; ``results.jsonl``, a line for every network and for every method on it; and the
    trained networks. A run that was stopped, or killed, goes on with what is missing if it is
    called again; so it does with more seeds or more pruners.

    Args:
        task: what is trained and judged.
        pruners: names of :data:`purepruning_interop.study.CRITERIA`, or ``"name:units"``; all of
            them unless given.
        sparsities: in place of those in the task's rules.
        seeds: how many, from 0 on, or which; at least two.
        epochs: of fine-tuning; the task's unless given.
        scope: ``"layer"`` or ``"global"``, as of :func:`purepruning.resolve`.
        folder: where files are written; none are unless given.
        at_once: how many seeds of a traced task are one call; unless given, one on a CPU, whose
            cache holds no more, and all on an accelerator. All sparsities are always one call.
        progress: ``(done, total, what is next)``, called after each method of each block of seeds.

    Raises:
        ValueError, TypeError: an argument is wrong, or the folder holds another study.
        OSError: the folder cannot be written.
    """
    instance(task, Task, "run_study: task", "a purepruning_interop.tasks.Task")
    one_of("run_study: scope", scope, ("layer", "global"))
    wanted = _Wanted(
        task,
        methods_of(pruners),
        tuple(float(s) for s in sparsities),
        _seeds(seeds),
        whole_number(task.tuning_epochs if epochs is None else epochs, "run_study: epochs", 0),
        scope,
    )
    if at_once is None:
        at_once = 1 if jax.default_backend() == "cpu" else len(wanted.seeds)
    at_once = whole_number(at_once, "run_study: at_once", 1)
    kinds: set[str] = {method.units for method in wanted.methods}
    configs = {units: wanted.config(units) for units in kinds}
    for needs in {CRITERIA[method.criterion].needs for method in wanted.methods}:
        if isinstance(needs, tuple):
            check_needs(task, needs)
    files = _Files(None if folder is None else Path(folder))
    rows = files.begin(wanted.settings(configs))
    networks = networks_of(task, wanted.epochs)
    report = progress or (lambda done, total, what: None)
    for row in _missing(wanted, configs, networks, files, rows, at_once, report):
        files.add(row)
        rows[row["seed"], row["method"]] = row
    return wanted.study(configs, rows)


def _seeds(seeds: Any) -> tuple[int, ...]:
    if isinstance(seeds, int | np.integer):
        seeds = range(whole_number(seeds, "run_study: seeds", 0))
    found = tuple(whole_number(s, "run_study: seeds", 0) for s in seeds)
    if len(set(found)) != len(found) or len(found) < 2:
        raise ValueError(
            f"run_study: seeds must be at least two different ones, got {list(found)}; of one "
            "network there is no spread: give more"
        )
    return found


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """What was asked for."""

    task: Task
    methods: tuple[Method, ...]
    sparsities: tuple[float, ...]
    seeds: tuple[int, ...]
    epochs: int
    scope: str

    def config(self, units: str) -> pp.Config:
        """Returns the rules resolved for units, with a count for each sparsity."""
        if not self.sparsities:
            raise ValueError("run_study: there are no sparsities; give some between 0 and 1")
        rules = [dict(rule) for rule in self.task.rules]
        granularity: Any = GRANULARITY[units]
        config = pp.resolve(rules, self.task.layers, granularity=granularity, scope=self.scope)  # type: ignore[arg-type]
        return config.with_sparsity(self.sparsities)

    def settings(self, configs: dict[str, pp.Config]) -> dict[str, Any]:
        """Returns what must be the same for results to be of one study."""
        return {
            "task": self.task.name,
            "metric": self.task.metric,
            "sparsities": list(self.sparsities),
            "epochs": self.epochs,
            "scope": self.scope,
            "layers": {x.name: list(x.shape) for x in self.task.layers},
            "pruned": sorted({x.name for config in configs.values() for x in config.layers}),
            "version": __version__,
        }

    def study(self, configs: dict[str, pp.Config], rows: dict[Any, dict[str, Any]]) -> Study:
        """Returns the study of rows, all of which are there."""
        task, named = self.task, {x.name for c in configs.values() for x in c.layers}

        def array(method: Method, key: str) -> np.ndarray:
            return np.array([rows[seed, str(method)][key] for seed in self.seeds])

        return Study(
            task.name,
            task.metric,
            self.methods,
            self.sparsities,
            self.seeds,
            self.epochs,
            self.scope,
            tuple(x.name for x in task.layers),
            tuple(x.shape for x in task.layers),
            np.array([int(np.prod(x.shape)) for x in task.layers]),
            np.array([x.name in named for x in task.layers]),
            np.array([rows[seed, None]["score"] for seed in self.seeds]),
            {
                str(m): Outcomes(array(m, "pruned"), array(m, "tuned"), array(m, "kept"))
                for m in self.methods
            },
            dict(task.about),
        )


def _missing(
    wanted: _Wanted,
    configs: dict[str, pp.Config],
    networks: Networks,
    files: _Files,
    rows: dict[Any, dict[str, Any]],
    at_once: int,
    report: Callable[[int, int, str], None],
) -> Iterator[dict[str, Any]]:
    """Gives the rows that are not there yet, block by block of seeds, method by method."""
    methods: list[Method | None] = [None, *wanted.methods]
    done, total = 0, len(wanted.seeds) * len(methods)
    for start in range(0, len(wanted.seeds), at_once):
        block = wanted.seeds[start : start + at_once]
        trained: dict[int, Any] = {}
        found: dict[Any, list[Any]] = {}  # statistics of the block
        for method in methods:
            name = None if method is None else str(method)
            seeds = [seed for seed in block if (seed, name) not in rows]
            report(done, total, f"seeds {block[0]} to {block[-1]}, {name or 'training'}")
            if seeds and not trained:
                trained = _networks(wanted.task, networks, files, block)
            if method is None:
                for seed in seeds:
                    score = float(networks.score([trained[seed]])[0])
                    yield {"seed": seed, "method": None, "score": score}
            elif seeds:
                yield from _pruned(wanted, configs, networks, method, trained, found, seeds, block)
            done += len(block)
    report(done, total, "done")


def _networks(
    task: Task, networks: Networks, files: _Files, block: Sequence[int]
) -> dict[int, Any]:
    """Returns trained networks by seed, from files or by training them."""
    found = {seed: files.load(seed, task) for seed in block}
    absent = [seed for seed, params in found.items() if params is None]
    if absent:
        for seed, params in zip(absent, networks.train(absent), strict=True):
            files.save(seed, params)
            found[seed] = params
    return found


def _pruned(
    wanted: _Wanted,
    configs: dict[str, pp.Config],
    networks: Networks,
    method: Method,
    trained: dict[int, Any],
    found: dict[Any, list[Any]],
    seeds: Sequence[int],
    block: Sequence[int],
) -> Iterator[dict[str, Any]]:
    """Gives the rows of a method on the networks of some seeds."""
    config, needs = configs[method.units], CRITERIA[method.criterion].needs
    if isinstance(needs, tuple) and (method.units, needs) not in found:
        of_block = [trained[seed] for seed in block]
        found[method.units, needs] = networks.statistics(of_block, config, needs)
    stats: list[Any] = [None] * len(seeds)
    if needs == "seed":
        stats = [np.int32(seed) if wanted.task.traced else seed for seed in seeds]
    elif needs is not None:
        stats = [found[method.units, needs][block.index(seed)] for seed in seeds]
    result = networks.outcomes(method, [trained[s] for s in seeds], stats, seeds, config)
    for i, seed in enumerate(seeds):
        arrays = {key: getattr(result, key)[i].tolist() for key in ("pruned", "tuned", "kept")}
        yield {"seed": seed, "method": str(method), **arrays}


class _Files:
    """The folder of a study; without one nothing is written, and nothing found."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def begin(self, settings: dict[str, Any]) -> dict[Any, dict[str, Any]]:
        """Returns the rows of the folder by seed and method; writes the settings if it is new."""
        if self.folder is None:
            return {}
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / SETTINGS
        if not file.exists():
            write_whole(file, json.dumps(settings, indent=2).encode())
        try:
            before = dict(json.loads(file.read_bytes()))
        except (ValueError, TypeError):
            raise ValueError(
                f"run_study: {str(file)!r} is damaged; choose another folder, or remove it if the "
                "study is the same"
            ) from None
        self._check(before, settings)
        return self._rows()

    def _check(self, before: dict[str, Any], settings: dict[str, Any]) -> None:
        differ = [key for key in settings if before.get(key) != settings[key]]
        if differ:
            key = differ[0]
            raise ValueError(
                f"run_study: {str(self.folder)!r} holds a study with {key} {before.get(key)}, got "
                f"{settings[key]}; choose another folder"
            )

    def _rows(self) -> dict[Any, dict[str, Any]]:
        """Returns what was found before; a line that a killed run left unfinished goes."""
        assert self.folder is not None
        file, rows = self.folder / RESULTS, []
        if not file.exists():
            return {}
        content = file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines()):
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ValueError(
                    f"run_study: line {number + 1} of {str(file)!r} is no JSON; remove the line"
                ) from error
        if whole != content:
            write_whole(file, whole)
        return {(row["seed"], row["method"]): row for row in rows}

    def add(self, row: dict[str, Any]) -> None:
        """Appends a row, and waits until it is on the disk."""
        if self.folder is None:
            return
        with (self.folder / RESULTS).open("ab") as file:
            file.write(json.dumps(row).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def save(self, seed: int, params: Any) -> None:
        """Writes a trained network."""
        if self.folder is None:
            return
        (self.folder / TRAINED).mkdir(exist_ok=True)
        save_state(self.folder / TRAINED / f"{seed}.safetensors", params)

    def load(self, seed: int, task: Task) -> Any:
        """Returns a trained network, or None."""
        if self.folder is None:
            return None
        file = self.folder / TRAINED / f"{seed}.safetensors"
        return load_state(file, task.init(seed)) if file.exists() else None
