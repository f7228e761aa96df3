"""Checkpoints without their models: read, guessed at, pruned, and written whole or not at all."""

from purepruning_interop.checkpoints.convert import as_safetensors
from purepruning_interop.checkpoints.guess import guess_layers
from purepruning_interop.checkpoints.patterns import Pattern, pattern_of
from purepruning_interop.checkpoints.read import Checkpoint, read_checkpoint
from purepruning_interop.checkpoints.two_four import pack_file, two_four_config, two_four_tensors
from purepruning_interop.checkpoints.write import Aside, NotWritten

__all__ = [
    # What a file holds.
    "read_checkpoint",
    "Checkpoint",
    "as_safetensors",
    # What its tensors may be, and what is zero in them.
    "guess_layers",
    "pattern_of",
    "Pattern",
    # Writing.
    "Aside",
    "NotWritten",
    # 2:4 in the layout of compressed-tensors.
    "pack_file",
    "two_four_tensors",
    "two_four_config",
]
