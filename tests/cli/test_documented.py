"""Every command of the page about the command line, in its order."""

import json
import re
import shlex

import jax
import numpy as np
import pytest

from tests.cli.calls import ROOT, call, save, save_sharded

PAGE = (ROOT / "docs" / "how_to" / "command_line.md").read_text()
pytestmark = pytest.mark.usefixtures("unoptimized", "standard_promotion")


def test_the_commands_of_the_page_do_what_they_say(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    save(tmp_path / "model.safetensors")
    save_sharded(tmp_path / "llama", {**_linear("lm_head"), **_linear("fc")})
    (tmp_path / "rules.json").write_text(json.dumps([{"sparsity": 0.5, "op_types": ["Linear"]}]))
    step = {"use": "level", "rules": [{"sparsity": 0.5, "op_names": ["w"]}]}
    (tmp_path / "recipe.json").write_text(json.dumps({"purepruning": 1, "steps": [step]}))
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(code, {})
    lines = "".join(re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)).splitlines()
    assert len(lines) == 9
    with jax.numpy_rank_promotion("allow"):
        for line in lines:
            name, *arguments = shlex.split(line.replace("tasks:task", "tests.runs.tasks:small"))
            assert name == "purepruning"
            found = call(capsys, *arguments)
            assert (found.status, found.err) == (0, ""), line


def _linear(name):
    return {f"{name}.weight": np.arange(32, dtype=np.float32).reshape(4, 8)}
