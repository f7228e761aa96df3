"""The installed script: every command, completion in a shell, progress on a terminal."""

import json
import os
import pty
import shutil
import subprocess

import numpy as np
import pytest

from tests.cli import models_to_shrink as nets
from tests.cli.calls import ROOT, SCRIPT, finished, save, start
from tests.runs import tasks
from tests.study import tiny

RECIPE = {"use": "level", "rules": [{"sparsity": 0.5, "op_names": ["w"]}]}
STUDY = ("--seeds", "2", "--epochs", "0", "-o", "o")
COMMANDS = {
    "inspect": (["m.safetensors"], {"parameters", "layers", "largest"}),
    "prune": (["m.safetensors", "--sparsity", "0.5", "-o", "o"], {"weights_removed", "files"}),
    "shrink": (
        [f"{nets.__name__}:torch_net", "--budget", "macs=0.5", "-o", "o"],
        {"macs", "files"},
    ),
    "run": (["r.json", "--task", f"{tasks.__name__}:small", "-o", "o"], {"score", "history"}),
    "study": (
        [f"{tiny.__name__}:loop", "--pruners", "level", "--sparsities", "0.5", *STUDY],
        {"report", "comparisons"},
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_its_json(tmp_path, name):
    arguments, keys = COMMANDS[name]
    save(tmp_path / "m.safetensors")
    (tmp_path / "r.json").write_text(json.dumps({"purepruning": 1, "steps": [RECIPE]}))
    done = finished(start(name, *arguments, "--json", cwd=tmp_path))
    assert (done.status, done.err) == (0, "")
    assert done.json.keys() >= keys
    assert (tmp_path / "o").exists() == (name != "inspect")


def test_bad_input_is_one_line_of_the_script_too(tmp_path):
    done = finished(start("prune", "no.safetensors", "--sparsity", "0.5", "-o", "o", cwd=tmp_path))
    assert (done.status, done.out) == (1, "")
    assert done.err == (
        "purepruning: error: there is no 'no.safetensors'; name a file or a folder\n"
    )


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_a_shell_completes_commands_and_options():
    """As bash does: its function is asked what may follow."""
    if not SCRIPT.exists():
        pytest.skip("the package is not installed for this Python")
    script = (
        'eval "$(purepruning --show-completion bash)"\n'
        "ask() { COMP_WORDS=($1); COMP_CWORD=$2; COMPREPLY=(); "
        '_purepruning_completion purepruning; echo "${COMPREPLY[@]}"; }\n'
        "complete -p purepruning\n"
        'ask "purepruning s" 1\nask "purepruning prune --sp" 2\n'
    )
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'interop'}"}
    env |= {"PATH": f"{SCRIPT.parent}:{os.environ['PATH']}", "SHELL": "/bin/bash"}
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "complete -o default -F _purepruning_completion purepruning",
        "shrink study",
        "--sparsity",
    ]


def test_progress_is_shown_on_a_terminal_and_output_stays_clean(tmp_path):
    content = {f"{i}.fc.weight": np.ones((500, 1000), np.float32) for i in range(8)}
    source = save(tmp_path / "m.safetensors", content)
    ours, theirs = pty.openpty()
    options = ("--sparsity", "0.5", "-o", tmp_path / "o.safetensors", "--json")
    process = start("prune", source, *options, stderr=theirs, env={"TERM": "xterm"})
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
    os.close(ours)
    assert json.loads(process.stdout.read())["weights_removed"] == 8 * 250_000
    process.stdout.close()
    assert process.wait() == 0
    assert b"pruning" in shown
    assert b"100%" in shown
