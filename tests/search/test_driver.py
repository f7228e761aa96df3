"""The loop around searches: histories, files, executors, failures, whole searches compiled."""

import concurrent.futures
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import purepruning as pp
from tests.messages import raises
from tests.search import nets

ROOT = Path(__file__).parent.parent.parent


@functools.cache
def small():
    of = pp.search.problem(nets.table_of((10, 10, 10)), {"weights": 0.5})
    return of, pp.search.netadapt(of, step=0.1, decay=1.0)


def loss(trial):
    return -sum((i + 1) * k**2 for i, k in enumerate(trial.counts.values()))


def rows(history):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history]


def test_the_history_has_every_trial():
    of, search = small()
    result = pp.search.run_search(search, search.init(jax.random.key(0)), loss, problem=of)
    assert [row["trial"] for row in result.history] == list(range(len(result.history)))
    assert len(result.history) == 15
    for row in result.history:
        assert row["resource"] == {"weights": 20 * (30 - sum(row["counts"].values()))}
        assert row["score"] == -sum((i + 1) * k**2 for i, k in enumerate(row["counts"].values()))
    assert of.measure(result.best)["weights"] == 300
    assert result.best == {"l0": 9, "l1": 3, "l2": 3}


class Shuffled:
    """Runs what is submitted last first, and only when a result is asked for."""

    def __init__(self):
        self.order, self.waiting = [], []

    def submit(self, f, *args):
        future = concurrent.futures.Future()
        self.waiting.append((future, f, args))
        asked = future.result

        def result():
            while self.waiting:
                one, g, given = self.waiting.pop()
                self.order.append(given[-1].number)
                one.set_result(g(*given))
            return asked()

        future.result = result
        return future


def slow_at_first(trial):
    time.sleep(0.02 if trial.number % 3 == 0 else 0)
    return loss(trial)


def test_the_history_does_not_depend_on_who_evaluates():
    of, search = small()
    state = search.init(jax.random.key(0))
    serial = pp.search.run_search(search, state, loss, problem=of)
    shuffled = Shuffled()
    other = pp.search.run_search(search, state, loss, problem=of, submit=shuffled.submit)
    assert shuffled.order[:3] == [2, 1, 0]
    assert rows(other.history) == rows(serial.history)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        other = pp.search.run_search(search, state, slow_at_first, problem=of, submit=pool.submit)
    assert rows(other.history) == rows(serial.history)


def test_the_accepted_payload_is_kept_and_handed_on():
    _of, search = small()
    seen = []

    def evaluate(trial):
        seen.append(None if trial.payload is None else trial.payload["plan"].tolist())
        plan = np.asarray(list(trial.counts.values()))
        # Every plan prunes one group further than the accepted one, whose payload it gets.
        before = np.zeros(3, int) if trial.payload is None else trial.payload["plan"]
        assert (plan != before).sum() == 1
        return loss(trial), {"plan": plan}

    result = pp.search.run_search(search, search.init(jax.random.key(0)), evaluate)
    assert result.payload["plan"].tolist() == list(result.best.values())
    assert seen[:3] == [None] * 3


class Late:
    """A score whose computation fails when it is asked for, as on an accelerator."""

    shape = ()

    def __float__(self):
        raise OverflowError("of the device")


def test_evaluations_that_fail_are_in_the_history_and_never_win():
    _of, search = small()

    def evaluate(trial):
        if trial.counts["l0"] > 3:
            raise OverflowError("l0 is too small")
        return float("nan") if trial.counts["l1"] > 3 else loss(trial)

    result = pp.search.run_search(search, search.init(jax.random.key(0)), evaluate)
    failed = [row for row in result.history if row["score"] is None]
    assert {row["error"] for row in failed} == {None, "OverflowError: l0 is too small"}
    assert result.best == {"l0": 3, "l1": 3, "l2": 9}
    for bad, words in (
        (lambda trial: float("nan"), ("all 3", "trial 0", "NaN")),
        (lambda trial: 1 / 0, ("all 3", "ZeroDivisionError")),
        (lambda trial: "good", ("TypeError", "'good'")),
        (lambda trial: [1.0], ("TypeError",)),
        (lambda trial: "1.5", ("TypeError", "'1.5'")),
        (lambda trial: [[1.0], [1.0, 2.0]], ("all 3", "ValueError")),
        (lambda trial: Late(), ("all 3", "OverflowError: of the device")),
    ):
        with raises(RuntimeError, *words):
            pp.search.run_search(search, search.init(jax.random.key(0)), bad)


# Files.


def test_a_run_goes_on_from_its_folder(tmp_path):
    of, search = small()

    def evaluate(trial):
        return loss(trial), {"number": np.asarray(trial.number)}

    whole = pp.search.run_search(search, search.init(jax.random.key(0)), evaluate, problem=of)
    state = search.init(jax.random.key(0))
    part = pp.search.run_search(search, state, evaluate, problem=of, folder=tmp_path, max_batches=2)
    assert len(part.history) == 6
    # A batch was written, and then the process died before its state was.
    with (tmp_path / "trials.jsonl").open("a") as file:
        file.write('{"trial": 6, "stage": 0}\n{"tri')
    rest = pp.search.run_search(search, state, evaluate, problem=of, folder=tmp_path)
    assert rows(rest.history) == rows(whole.history)
    assert rest.best == whole.best
    assert int(rest.payload["number"]) == int(whole.payload["number"])
    lines = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    assert rows(lines) == rows(whole.history)
    again = pp.search.run_search(search, state, evaluate, problem=of, folder=tmp_path)
    assert rows(again.history) == rows(whole.history)


def test_a_nan_is_null_in_the_file(tmp_path):
    _of, search = small()

    def evaluate(trial):
        return float("nan") if trial.number == 1 else loss(trial)

    pp.search.run_search(
        search, search.init(jax.random.key(0)), evaluate, folder=tmp_path, max_batches=1
    )
    text = (tmp_path / "trials.jsonl").read_text()
    assert [json.loads(line)["score"] for line in text.splitlines()][1] is None
    assert "NaN" not in text


KILLED = """
import sys, time
import jax
import purepruning as pp
from tests.search.test_driver import loss, small
of, search = small()
def evaluate(trial):
    time.sleep(0.2)
    return loss(trial)
state = search.init(jax.random.key(0))
pp.search.run_search(search, state, evaluate, problem=of, folder=sys.argv[1])
"""


@pytest.mark.full
def test_a_killed_run_has_the_same_rest(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "interop")])}
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], env=environment
    ) as process:
        state = tmp_path / "state.safetensors"
        deadline = time.monotonic() + 120
        while not state.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    of, search = small()
    start = search.init(jax.random.key(0))
    rest = pp.search.run_search(search, start, loss, problem=of, folder=tmp_path)
    whole = pp.search.run_search(search, start, loss, problem=of)
    assert rows(rest.history) == rows(whole.history)
    assert rest.history[0]["seconds"] >= 0.2  # of the first process


# Whole searches, compiled.


def test_a_search_in_one_compiled_call_is_the_host_loop():
    of, search = small()

    def score(counts):
        numbers = jnp.stack([counts[n] for n in of.names]).astype(jnp.float32)
        return -jnp.sum(jnp.arange(1.0, 4) * numbers**2)

    state, history = jax.jit(lambda key: pp.search.scan_search(search, key, score, 8))(
        jax.random.key(0)
    )
    host = pp.search.run_search(search, search.init(jax.random.key(0)), loss)
    assert {n: int(x) for n, x in search.best(state).items()} == host.best
    scores = np.asarray(history["scores"])
    assert scores[:5].reshape(-1).tolist() == [row["score"] for row in host.history]
    assert history["done"].tolist() == [False] * 5 + [True] * 3
    assert np.isnan(scores[5:]).all()


def test_a_line_of_progress_has_the_trials_and_the_best_score(capsys):
    _of, search = small()
    pp.search.run_search(search, search.init(jax.random.key(0)), loss, progress=True)
    # l0, l1 and l2 lose 9, 3 and 3: 81 + 2 * 9 + 3 * 9.
    assert "15 trials, best score -126" in capsys.readouterr().out
    pp.search.run_search(search, search.init(jax.random.key(0)), loss)
    assert capsys.readouterr().out == ""


def test_mistakes_in_calls(tmp_path):
    _of, search = small()
    state = search.init(jax.random.key(0))
    with raises(TypeError, "search", "netadapt"):
        pp.search.run_search(pp.search.netadapt, state, loss)
    with raises(TypeError, "evaluate"):
        pp.search.run_search(search, state, 5)
    with raises(TypeError, "submit"):
        pp.search.run_search(search, state, loss, submit=threading)
    (tmp_path / "file").write_text("")
    with raises(ValueError, "folder"):
        pp.search.run_search(search, state, loss, folder=tmp_path / "file")
