"""Calls of the command in this process, and small checkpoints for them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import safetensors.numpy

from purepruning_interop.cli.app import run

ROOT = Path(__file__).parents[2]
#: The installed command.
SCRIPT = Path(sys.executable).with_name("purepruning")


class Called(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


def call(capsys, *arguments) -> Called:
    """Runs a command in this process."""
    capsys.readouterr()
    status = run([str(x) for x in arguments])
    found = Called(status, *capsys.readouterr())
    assert "Traceback" not in found.err
    return found


def failed(capsys, status, *arguments, says=()) -> str:
    """Runs a command that must fail; returns its one line."""
    found = call(capsys, *arguments)
    assert found.status == status, found
    assert found.out == ""
    assert found.err.startswith("purepruning: ")
    assert found.err.count("\n") == 1
    for words in (says,) if isinstance(says, str) else says:
        assert words in found.err
    return found.err


def start(*arguments, inside=(), **options) -> subprocess.Popen:
    """Starts the installed command in a process of its own, maybe inside of another command."""
    if not SCRIPT.exists():
        pytest.skip(f"there is no {SCRIPT}: the package is not installed for this Python")
    command = [*inside, SCRIPT, *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'interop'}", **options.pop("env", {})}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, env=env, text=True, **{"stdout": pipe, "stderr": pipe, **options}
    )


def finished(process, timeout=120) -> Called:
    out, err = process.communicate(timeout=timeout)
    return Called(process.returncode, out, err)


def tensors(scale=1, seed=0):
    """Returns a small network: a convolution with its norm, two linear layers, an embedding."""
    draw = np.random.default_rng(seed).normal
    shapes = {
        "conv.weight": (8 * scale, 4, 3, 3),
        "bn.weight": (8 * scale,),
        "bn.bias": (8 * scale,),
        "bn.running_mean": (8 * scale,),
        "blocks.0.fc.weight": (16, 8 * scale),
        "blocks.0.fc.bias": (16,),
        "blocks.1.fc.weight": (16, 8 * scale),
        "blocks.1.fc.bias": (16,),
        "embed_tokens.weight": (10, 8),
    }
    found = {name: draw(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return found | {"bn.num_batches_tracked": np.array(3)}


def save(path, content=None, **metadata):
    safetensors.numpy.save_file(tensors() if content is None else content, path, metadata or None)
    return path


def save_sharded(folder, content=None):
    """Writes a folder as Hugging Face's libraries do, in two shards."""
    folder.mkdir()
    content = tensors() if content is None else content
    names = list(content)
    weight_map = {}
    for i, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :])):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        save(folder / file, {name: content[name] for name in part}, format="pt")
        weight_map |= dict.fromkeys(part, file)
    total = sum(x.nbytes for x in content.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "tokenizer.json").write_text("{}")
    return folder
