"""Checkpoints without their models: read, guessed at, pruned, and written whole or not at all."""

from purepruning_interop.checkpoints.guess import guess_layers
from purepruning_interop.checkpoints.patterns import Pattern, pattern_of
from purepruning_interop.checkpoints.read import Checkpoint, read_checkpoint
from purepruning_interop.checkpoints.two_four import two_four_config, two_four_tensors
from purepruning_interop.checkpoints.write import Aside, Entry, NotWritten, entry_of, write_tensors

__all__ = [
    # What a file holds.
    "read_checkpoint",
    "Checkpoint",
    # What its tensors may be, and what is zero in them.
    "guess_layers",
    "pattern_of",
    "Pattern",
    # Writing.
    "Aside",
    "NotWritten",
    "write_tensors",
    "entry_of",
    "Entry",
    # 2:4 in the layout of compressed-tensors.
    "two_four_tensors",
    "two_four_config",
]
