"""The script for accelerators runs from a checkout as it is, here at tiny sizes."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.py"


def test_the_script_for_accelerators(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, str(SCRIPT), "--smoke", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "gpu.json").read_text())
    rows = result["rows"]
    assert {row["part"] for row in rows} == {
        "selection, JAX, jitted",
        "selection, torch",
        "tickets, JAX",
        "scheduled step, JAX",
        "SparseGPT, JAX",
        "SparseGPT, torch",
        "semi-structured, torch",
    }
    assert all(row["masks_equal_cpu"] for row in rows if row["part"].startswith("selection"))
    assert {row["next_to"] for row in rows if "selection" in row["part"]} == {"sort", "top-k"}
    assert all(row["same_bits"] > 0.99 for row in rows if "SparseGPT" in row["part"])
    assert [row["goal"] for row in rows if "goal" in row] == [8]
    table = (tmp_path / "gpu.md").read_text()
    assert table.count("\n| ") == len(rows) + 1
    if not result["machine"]["accelerator"]:
        assert "No accelerator was found" in table
