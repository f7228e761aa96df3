"""Runs: a recipe done to a task, stage by stage, in a folder from which it goes on when killed."""

from purepruning_interop.runs.folder import RunFolder
from purepruning_interop.runs.page import report_of
from purepruning_interop.runs.run import Outcome, run_recipe
from purepruning_interop.runs.stages import Settings, Stage, State, stages_of

__all__ = [
    # Doing one.
    "run_recipe",
    "Settings",
    "Outcome",
    "report_of",
    # What it is made of.
    "stages_of",
    "Stage",
    "State",
    "RunFolder",
]
