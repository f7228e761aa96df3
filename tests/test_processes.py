"""Weights that lie over several processes: the same masks, and nothing is gathered.

Two processes of two devices each are started once for all checks (tests/processes.py), and four of
one with ``--full``; what two have written, one and four go on with.
"""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import purepruning as pp
from tests import processes
from tests.covering import covered

ROOT = pathlib.Path(__file__).parent.parent
SECONDS = 300  # a machine that others share may take so long
SOME = (
    "selection-layer-Explicit",
    "selection-global-Auto",
    "units-Explicit",
    "statistics-Auto",
    "counted-Explicit",
    "optimizer-Auto",
    "lottery-Explicit",
    "training-Auto",
    "refused-Auto",
    "shrunk-Explicit",
)
FIRST = [name for name in processes.CHECKS if not name.startswith("resumed")]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def started(n, folder, names):
    """Returns what every one of n processes found, by check."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "FOLDER": str(folder),
        "OMP_NUM_THREADS": "1",
        # What other tests compile is for one process.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }
    port = str(free_port())
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.processes", str(i), str(n), port, *names],
            env=environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(n)
    ]
    try:
        done = [process.communicate(timeout=SECONDS) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    for process, (_, errors) in zip(running, done, strict=True):
        assert process.returncode == 0, errors[-4000:]
    return [json.loads(out.splitlines()[-1]) for out, _ in done]


def asked(request, test):
    """Returns the checks that are run of those that a test may make."""
    return [
        item.callspec.params["name"] for item in request.session.items if item.originalname == test
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def two(request, folder):
    names = asked(request, "test_two_processes")
    return started(2, folder, list(dict.fromkeys([*names, "training-Auto"])))


@pytest.fixture(scope="module")
def four(request, tmp_path_factory):
    return started(4, tmp_path_factory.mktemp("four"), asked(request, "test_four_processes"))


@pytest.mark.parametrize(
    "name", covered([(x,) for x in FIRST], [(x,) for x in SOME], dict.fromkeys(FIRST))
)
def test_two_processes(two, name):
    for outcomes in two:
        assert outcomes[name] == "passed", outcomes[name]


def test_one_process_goes_on_with_what_two_have_written(two, folder):
    params = jax.tree.map(jax.device_put, processes.few())
    fresh = {"params": params, "state": processes.TX.init(params)}
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(folder / "middle", fresh)
    pp.check_resumed(restored["state"], fresh["state"])
    params, state = processes.steps(restored["params"], restored["state"], processes.TX.update, 3)
    want, kept = processes.unbroken()
    for name, x in want.items():
        np.testing.assert_array_equal(params[name], x)
    for name, mask in kept.kept.masks.items():
        np.testing.assert_array_equal(state.kept.masks[name], mask)


@pytest.mark.full
@pytest.mark.parametrize("name", FIRST)
def test_four_processes(four, name):
    for outcomes in four:
        assert outcomes[name] == "passed", outcomes[name]


@pytest.mark.full
def test_four_processes_go_on_with_what_two_have_written(two, folder):
    for outcomes in started(4, folder, ["resumed-Auto", "resumed-Explicit"]):
        assert set(outcomes.values()) == {"passed"}, outcomes
