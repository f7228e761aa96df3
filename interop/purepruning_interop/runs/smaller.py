"""The stage that writes the smaller model."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.numpy

import purepruning as pp
from purepruning.masks import to_numpy
from purepruning.saving.files import write_whole
from purepruning.trees import flatten
from purepruning_interop.runs.work import Stage, State, Work

WEIGHTS, PLAN, REPORT = "small.safetensors", "small.plan.safetensors", "small.json"


def smaller(work: Work) -> Stage:
    """Returns the stage that shrinks: parameters stay whole in the state, and files are small.

    Raises:
        ValueError: the task has no model, or it cannot be traced.
    """
    coupling = work.coupling()
    made: dict[int, Any] = {}

    def shrunk(state: State) -> Any:
        # Once for the stage and the files.
        if id(state.params) not in made:
            made.clear()
            made[id(state.params)] = _shrunk(work, state, coupling)
        return made[id(state.params)]

    def do(state: State) -> State:
        shrunk(state)
        return state

    def write(state: State, folder: Path) -> dict[str, str]:
        return _write(shrunk(state), folder)

    return work.stage("shrink", do, write=write)


def _shrunk(work: Work, state: State, coupling: pp.Coupling) -> Any:
    task, masks = work.task, state.masks
    if masks is None:
        raise ValueError("nothing is pruned; put a step that prunes before this one")
    if task.traced:
        assert task.apply is not None  # it was checked
        return pp.shrink(task.apply, state.params, masks, coupling, *task.inputs)
    from purepruning_interop.torch import shrink

    model = copy.deepcopy(task.model)
    model.load_state_dict(state.params, strict=False)
    return shrink(model, masks, coupling, *task.inputs)


def _write(small: Any, folder: Path) -> dict[str, str]:
    report = small.report
    tree = small.params if small.model is None else small.model.state_dict()
    leaves: Mapping[str, Any] = flatten(tree).leaves
    arrays = {name: to_numpy(x) for name, x in leaves.items() if hasattr(x, "shape")}
    said = {
        "params": list(report.params),
        "macs": [int(m) for m in report.macs],
        "kind": report.kind,
        "reason": report.reason,
        "layers": {name: list(x.shape) for name, x in arrays.items()},
    }
    write_whole(folder / WEIGHTS, safetensors.numpy.save(arrays))
    pp.save_plan(folder / PLAN, report.plan)
    write_whole(folder / REPORT, (json.dumps(said, indent=2) + "\n").encode())
    kinds = {"small": WEIGHTS, "plan": PLAN, "sizes": REPORT}
    return {kind: str(folder / name) for kind, name in kinds.items()}
