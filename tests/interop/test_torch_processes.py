"""Torch parameters that lie over processes: the same masks as in one, and no weight is sent.

All checks run in one start of two processes, or of four, since importing torch takes longer than
any of them. What they check is in ``torch_in_processes``.
"""

import json
import os
import pathlib
import subprocess
import sys
import warnings

import pytest
import torch
from torch.distributed import checkpoint

from tests.interop import torch_in_processes as processes

ROOT = pathlib.Path(__file__).parents[2]


def reports(n, folder):
    """Returns what each of n processes says of every check."""
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "interop")]),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-m", processes.__name__]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(n), str(folder / "meet"), str(folder)],
            env=env,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(n)
    ]
    found = []
    try:
        for process in started:
            out, error = process.communicate(timeout=300)
            assert process.returncode == 0, error
            found.append(json.loads(out.splitlines()[-1]))
    finally:
        for process in started:
            process.kill()
    return found


# One test, and not one for each check, so that the tests' own processes do not start them twice.
@pytest.mark.parametrize("n", [2, pytest.param(4, marks=pytest.mark.full)])
def test_in_processes(n, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of checkpoints without a process group
        expected = processes.trained(processes.net())
        checkpoint.save({"masks": expected}, checkpoint_id=tmp_path / "by_one", no_dist=True)
        for report in reports(n, tmp_path):
            failed = [error for error in report.values() if error]
            assert not failed, "\n".join(failed)
            assert len(report) == len(processes.CHECKS)
        read = {
            "model": processes.net().state_dict(),
            "masks": {name: torch.zeros_like(mask) for name, mask in expected.items()},
        }
        checkpoint.load(read, checkpoint_id=tmp_path / "by_all", no_dist=True)
    for name, mask in expected.items():
        assert torch.equal(read["masks"][name], mask), name
        assert not read["model"][name][~mask].any(), name
