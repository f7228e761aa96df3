"""Runs: a recipe done to a task, stage by stage, in a folder from which it goes on when killed."""

from purepruning_interop.runs.folder import RunFolder
from purepruning_interop.runs.page import report_of
from purepruning_interop.runs.run import By, Outcome, run_recipe
from purepruning_interop.runs.stages import stages_of
from purepruning_interop.runs.work import Settings, Stage, State

__all__ = [
    # Doing one.
    "run_recipe",
    "Settings",
    "Outcome",
    "By",
    "report_of",
    # What it is made of.
    "stages_of",
    "Stage",
    "State",
    "RunFolder",
]
