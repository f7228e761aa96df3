"""Runs: a recipe done to a task, stage by stage, in a folder from which it goes on when killed."""

from purepruning_interop.runs.folder import RunFolder
from purepruning_interop.runs.run import Outcome, run_recipe
from purepruning_interop.runs.stages import Settings, Stage, State, stages_of

__all__ = ["run_recipe", "Outcome", "Settings", "stages_of", "Stage", "State", "RunFolder"]
