"""The loop around a search: the one place here with files and a clock."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from purepruning.arguments import flag, function, instance, shown, whole_number
from purepruning.saving.states import load_state, save_state
from purepruning.search.problem import Problem, check_problem
from purepruning.search.shape import Search

TRIALS, STATE = "trials.jsonl", "state.safetensors"


class Trial(NamedTuple):
    """What an evaluation is given: plain numbers, which go to any worker.

    Attributes:
        number: number of the trial, from 0; no two have the same.
        stage: how much is to be spent on it, from 0.
        counts: the plan, by group name.
        payload: that of the plan that was accepted last, or what the run began with.
    """

    number: int
    stage: int
    counts: dict[str, int]
    payload: Any = None


class Result(NamedTuple):
    """What :func:`run_search` returns.

    Attributes:
        state: the last state.
        best: the counts of the plan that was found.
        history: one row for each trial, as in the file.
        payload: that of the plan that was accepted last.
    """

    state: Any
    best: dict[str, int]
    history: list[dict[str, Any]]
    payload: Any


class Future(Protocol):
    """What an executor's ``submit`` returns."""

    def result(self) -> Any:
        """Returns what the call returned, or raises what it raised."""


class _Answer(NamedTuple):
    score: float
    payload: Any
    seconds: float
    error: str | None


def run_search(
    search: Search,
    state: Any,
    evaluate: Callable[[Trial], Any],
    *,
    problem: Problem | None = None,
    folder: str | os.PathLike[str] | None = None,
    payload: Any = None,
    submit: Callable[..., Future] | None = None,
    max_batches: int | None = None,
    progress: bool = False,
) -> Result:
    """Returns what a search finds with an evaluator of yours: proposes, evaluates, accepts.

    A batch of plans is evaluated to its end before the next is proposed, and results are read in
    order, so that the history is a function of key, problem and evaluator, whatever runs them.

    Where there is a ``folder``, a line is written to ``trials.jsonl`` for each trial (``trial``,
    ``stage``, ``counts``, ``resource``, ``score``, ``seconds``, ``error``; a NaN is null), and then
    the state, with the payload that was accepted, to ``state.safetensors``. A run that is killed
    goes on from there when it is called again with the same arguments, and has the same history,
    seconds apart.

    Args:
        search: the search.
        state: what its ``init`` returned, or an earlier run.
        evaluate: ``(trial) -> score`` or ``-> (score, payload)``, larger scores being better unless
            the search minimises. One that raises has failed, and scores NaN. A payload is whatever
            the caller needs of the plan later, such as fine-tuned parameters; only that of the
            accepted plan is kept, and is ``trial.payload`` from then on.
        problem: for the resources in the history.
        folder: where to write, and to go on from.
        payload: the one to begin with. To be written, it must be a tree of arrays.
        submit: of an executor: ``submit(function, *arguments)`` returns something with
            ``result()``. Nothing else is asked of it, so that threads, processes, loky, Dask, MPI
            and submitit will do.
        max_batches: stop after so many batches in this call, done or not.
        progress: whether to show a line of progress, which needs rich.

    Raises:
        RuntimeError: all evaluations of a batch failed; the message has the first error. The run
            can be called again, and then tries that batch again.
        ValueError, TypeError: an evaluation returned something else than a score; an argument is
            not what it must be; the folder holds another run.

    >>> import jax
    >>> import purepruning as pp
    >>> table = [pp.Layer(n, "Linear", n, (10, 20), (1,), (0,)) for n in "ab"]
    >>> config = pp.resolve([{"op_types": ["Linear"]}], table, granularity="output_channel")
    >>> of = pp.search.problem(config, {"weights": 0.5})
    >>> search = pp.search.netadapt(of, step=0.1, decay=1.0)
    >>> score = lambda trial: -(trial.counts["a"] ** 2) - 2 * trial.counts["b"] ** 2
    >>> run_search(search, search.init(jax.random.key(0)), score, problem=of).best
    {'a': 12, 'b': 8}
    """
    instance(search, Search, "run_search: search", "a search")
    function(evaluate, "run_search: evaluate", "a function of a trial")
    if problem is not None:
        check_problem("run_search", problem)
    if submit is not None:
        function(submit, "run_search: submit", "the submit of an executor")
    if max_batches is not None:
        whole_number(max_batches, "run_search: max_batches", 0)
    flag(progress, "run_search: progress")
    files = None if folder is None else Files("run_search", folder)
    history: list[dict[str, Any]] = []
    if files is not None:
        state, payload, history = files.resume(state, payload)
    batches = 0
    with _progress(progress) as show:
        while not bool(search.done(state)) and batches != max_batches:
            state, plans = search.propose(state)
            trials = _trials(state, plans, payload, len(history))
            answers = _evaluate(evaluate, list(trials.values()), submit)
            scores = np.full(len(state.common.feasible), np.nan, np.float32)
            for i, answer in zip(trials, answers, strict=True):
                scores[i] = answer.score
            rows = [_row(t, a, problem) for t, a in zip(trials.values(), answers, strict=True)]
            state = search.accept(state, scores)
            history += rows
            if files is not None:
                files.append(rows)
            if bool(state.common.failed):
                errors = [a.error for a in answers if a.error is not None]
                raise RuntimeError(
                    f"run_search: all {len(rows)} evaluations of the batch from trial "
                    f"{rows[0]['trial']} on failed, {errors[0] if errors else 'with NaN'}; mend "
                    "the evaluator and call run_search again"
                )
            taken = int(state.common.taken)
            accepted = dict(zip(trials, answers, strict=True)).get(taken)
            if accepted is not None and accepted.payload is not None:
                payload = accepted.payload
            if files is not None:
                files.save(state, payload, len(history))
            batches += 1
            show(len(history), float(state.common.best_score))
    best = {name: int(count) for name, count in search.best(state).items()}
    return Result(state, best, history, payload)


def scan_search(
    search: Search, key: Any, evaluate: Callable[[dict[str, Any]], Any], batches: int
) -> tuple[Any, dict[str, Any]]:
    """Returns the state after so many batches, and their history, as one traceable loop.

    For an evaluator that is itself traceable, such as the accuracy of a jitted model under masks.
    Under ``jit`` the whole search is one compiled call; ``vmap`` or ``jax.lax.map`` over keys runs
    one for each. What is done stays as it is, so that ``batches`` may be too many.

    Args:
        search: the search.
        key: a typed key.
        evaluate: ``(counts) -> score``, of one plan; it is mapped over the plans of a batch.
        batches: how many times to propose, static.

    Returns:
        The state, and ``plans`` (batches, candidates, groups), ``scores`` (batches, candidates),
        NaN where there was no plan, and ``done`` (batches,): whether the search was done before.

    >>> import jax, jax.numpy as jnp
    >>> import purepruning as pp
    >>> table = [pp.Layer(n, "Linear", n, (10, 20), (1,), (0,)) for n in "ab"]
    >>> config = pp.resolve([{"sparsity": 0.5, "op_types": ["Linear"]}], table)
    >>> search = pp.search.annealing(config)
    >>> score = lambda counts: -jnp.square(counts["a"] - 60)
    >>> run = jax.jit(jax.vmap(lambda key: scan_search(search, key, score, 30)))
    >>> states, history = run(jax.random.split(jax.random.key(0), 4))
    >>> history["scores"].shape
    (4, 30, 1)
    """
    instance(search, Search, "scan_search: search", "a search")
    whole_number(batches, "scan_search: batches", 1)

    def step(state: Any, _: None) -> tuple[Any, dict[str, Any]]:
        done = search.done(state)
        state, plans = search.propose(state)
        several = next(iter(plans.values())).ndim == 1
        scores = jax.vmap(evaluate)(plans) if several else evaluate(plans)
        feasible = state.common.feasible
        floats = jnp.asarray(scores, jnp.float32).reshape(feasible.shape)
        row = {
            "plans": state.common.plans,
            "scores": jnp.where(feasible & ~done, floats, jnp.nan),
            "done": done,
        }
        return search.accept(state, scores), row

    state, history = jax.lax.scan(step, search.init(key), length=batches)
    return state, history


def _trials(state: Any, plans: Mapping[str, Any], payload: Any, first: int) -> dict[int, Trial]:
    """Returns the trials of a batch by index of their candidate."""
    counts = {name: np.atleast_1d(np.asarray(x)) for name, x in plans.items()}
    chosen = np.flatnonzero(np.asarray(state.common.feasible))
    stage = int(state.common.stage)
    return {
        int(i): Trial(first + n, stage, {k: int(c[i]) for k, c in counts.items()}, payload)
        for n, i in enumerate(chosen)
    }


def _evaluate(
    evaluate: Callable[[Trial], Any], trials: list[Trial], submit: Callable[..., Future] | None
) -> list[_Answer]:
    if submit is None:
        return [_answer(evaluate, trial) for trial in trials]
    futures = [submit(_answer, evaluate, trial) for trial in trials]
    return [_awaited(future) for future in futures]


def _answer(evaluate: Callable[[Trial], Any], trial: Trial) -> _Answer:
    """Returns what an evaluation says, on whatever worker this runs."""
    start = time.perf_counter()
    number, payload, failure = math.nan, None, None
    try:
        found = evaluate(trial)
        pair = isinstance(found, tuple) and len(found) == 2
        score, payload = found if pair else (found, None)
        number = _number(score)  # what was dispatched to a device may fail only here
    except Exception as error:
        payload, failure = None, _named(error)
    return _Answer(number, payload, time.perf_counter() - start, failure)


def _number(score: Any) -> float:
    if not isinstance(score, bool | str | bytes) and np.shape(score) == ():
        with contextlib.suppress(TypeError):
            return float(score)
    raise TypeError(f"evaluate returned {shown(score)}")


def _awaited(future: Future) -> _Answer:
    """Returns the answer of a worker; one that died has failed."""
    try:
        found: _Answer = future.result()
    except Exception as error:
        return _Answer(math.nan, None, 0.0, _named(error))
    return found


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _row(trial: Trial, answer: _Answer, problem: Problem | None) -> dict[str, Any]:
    return {
        "trial": trial.number,
        "stage": trial.stage,
        "counts": trial.counts,
        "resource": None if problem is None else problem.measure(trial.counts),
        "score": answer.score if math.isfinite(answer.score) else None,
        "seconds": answer.seconds,
        "error": answer.error,
    }


class Files:
    """The files of a run: rows of trials, and the state after them."""

    def __init__(self, where: str, folder: str | os.PathLike[str]) -> None:
        path = Path(folder)
        if path.exists() and not path.is_dir():
            raise ValueError(f"{where}: folder {str(path)!r} is a file; name a folder")
        path.mkdir(parents=True, exist_ok=True)
        self.where, self.trials, self.state = where, path / TRIALS, path / STATE

    def resume(self, state: Any, payload: Any) -> tuple[Any, Any, list[dict[str, Any]]]:
        """Returns what the files hold, or what is given; rows after the state are removed."""
        if not self.state.exists():
            self.trials.unlink(missing_ok=True)
            return state, payload, []
        saved = self._load(state, payload)
        lines = self.trials.read_bytes().splitlines(keepends=True)[: saved["trials"]]
        if len(lines) < saved["trials"]:
            raise ValueError(
                f"{self.where}: {self.trials} has {len(lines)} rows, and the state was saved after "
                f"{saved['trials']}; name another folder"
            )
        with self.trials.open("wb") as file:
            file.writelines(lines)
        found = saved["payload"]
        empty = isinstance(found, dict) and not found
        return saved["state"], payload if empty else found, [json.loads(x) for x in lines]

    def _load(self, state: Any, payload: Any) -> Any:
        """Returns what was saved; of dicts the arrays may have been shrunk since the run began."""
        # An empty dict stands for whatever tree of arrays was saved there.
        like = {"state": state, "payload": {} if payload is None else payload, "trials": 0}
        try:
            return load_state(self.state, like)
        except ValueError as error:
            any_shapes = {k: {} if isinstance(x, dict) else x for k, x in like.items()}
            saved = load_state(self.state, any_shapes)
            for name, given in like.items():
                known: Any = jax.tree.structure(saved[name])
                if given and known != jax.tree.structure(given):
                    raise error from None
            return saved

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Writes rows, to the disk."""
        with self.trials.open("a", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def save(self, state: Any, payload: Any, trials: int) -> None:
        """Writes the state and the payload, whole."""
        payload = {} if payload is None else payload
        save_state(self.state, {"state": state, "payload": payload, "trials": trials})


@contextlib.contextmanager
def _progress(wanted: bool) -> Iterator[Callable[[int, float], None]]:
    """Gives a function that shows how far the search is."""
    if not wanted:
        yield lambda trials, score: None
        return
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns) as bar:
        task = bar.add_task("search", total=None)

        def show(trials: int, score: float) -> None:
            bar.update(task, description=f"{trials} trials, best score {score:.6g}")

        yield show
