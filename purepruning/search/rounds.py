"""Pruning in rounds, each of what the one before has left: by a schedule, and AutoCompress."""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from purepruning.arguments import fraction, function, instance, one_of, scalar, whole_number
from purepruning.coupling.coupling import Coupling, check_coupling
from purepruning.masks import to_numpy
from purepruning.search.annealing import annealing
from purepruning.search.driver import Files, Trial, run_search
from purepruning.search.problem import Problem, check_problem
from purepruning.search.shape import OptimizeMode
from purepruning.trees import flatten
from purepruning.types import Params

Kind = Literal["linear", "agp", "lottery"]


class Rounds(NamedTuple):
    """What :func:`run_rounds` returns.

    Attributes:
        state: after the last round.
        best: the state of the best score, or the last one where nothing is evaluated.
        history: a row for each round: ``round``, ``sparsity``, ``score``, ``seconds``.
    """

    state: Any
    best: Any
    history: list[dict[str, Any]]


class Compressed(NamedTuple):
    """What :func:`auto_compress` returns.

    Attributes:
        model: after the last round.
        history: a row for each round: ``round``, ``budget``, ``counts``, ``left``, ``evaluations``,
            ``score``, ``purified``.
    """

    model: Any
    history: list[dict[str, Any]]


def totals(kind: Kind, sparsity: float, rounds: int) -> tuple[float, ...]:
    r"""Returns the sparsity after each round: how NNI's task generators go to the last one, P.

    Round i of n ends at $P\, i / n$ (``"linear"``), $P\,(1 - (1 - i/n)^3)$ (``"agp"``), or
    $1 - (1 - P)^{i/n}$ (``"lottery"``).

    Raises:
        ValueError, TypeError: an argument is out of range.

    >>> [round(s, 4) for s in totals("agp", 0.5, 5)]
    [0.244, 0.392, 0.468, 0.496, 0.5]
    >>> [round(s, 4) for s in totals("lottery", 0.8, 5)]
    [0.2752, 0.4747, 0.6193, 0.7241, 0.8]
    """
    one_of("totals: kind", kind, ("linear", "agp", "lottery"))
    last = fraction(sparsity, "totals: sparsity")
    n = whole_number(rounds, "totals: rounds", 1)
    shares = [i / n for i in range(1, n)]
    by_kind: dict[str, Callable[[float], float]] = {
        "linear": lambda x: last * x,
        "agp": lambda x: last * (1 - (1 - x) ** 3),
        "lottery": lambda x: 1 - (1 - last) ** x,
    }
    return (*map(by_kind[kind], shares), last)


def run_rounds(
    sparsities: Any,
    state: Any,
    prune: Callable[[Any, float], Any],
    *,
    tune: Callable[[Any], Any] | None = None,
    evaluate: Callable[[Any], float] | None = None,
    reset: Callable[[Any, Any], Any] | None = None,
    optimize_mode: OptimizeMode = "maximize",
    folder: str | os.PathLike[str] | None = None,
    max_rounds: int | None = None,
) -> Rounds:
    """Returns what pruning in rounds makes of a state: NNI's ``PruningScheduler``.

    Every round prunes to its sparsity, with or without shrinking, fine-tunes and evaluates; the
    state of the best score is kept. What a state is is the caller's: a dict of parameters and
    masks; of a model that is shrunk between rounds, its smaller arrays. ``prune`` may be any pruner
    at the round's sparsity, or a search such as :func:`annealing`, run for this round.

    With ``reset``, which is given the state before the first round and the pruned one, rounds are
    lottery tickets: the state is tuned, pruned, and then goes back (NNI's ``reset_weight=True``).

    Args:
        sparsities: of the rounds, ascending, such as :func:`totals` returns; of the model that the
            first round began with.
        state: where the first round begins.
        prune: ``(state, sparsity) -> state``.
        tune: ``(state) -> state``.
        evaluate: ``(state) -> score``; unless given, the last state is the best.
        reset: ``(start, state) -> state``.
        optimize_mode: whether a score is better if it is larger or smaller.
        folder: where to write ``trials.jsonl`` and ``state.safetensors`` after every round, and to
            go on from; states must then be trees of arrays, and dicts where arrays become smaller.
        max_rounds: stop after so many rounds in this call.

    Raises:
        ValueError, TypeError: an argument is out of range, or the folder holds another run.

    >>> import jax.numpy as jnp
    >>> import purepruning as pp
    >>> params = {"w": jnp.arange(1.0, 11).reshape(2, 5)}
    >>> layers = [pp.make_layer(params, "w", "Linear", name="w", out_axes=0, in_axes=1)]
    >>> config = pp.resolve([{"op_types": ["Linear"]}], layers)
    >>> def prune(params, sparsity):
    ...     masks = pp.level(params, None, config.with_sparsity(sparsity))
    ...     return pp.apply_masks(params, masks)
    >>> result = run_rounds(totals("linear", 0.8, 4), params, prune)
    >>> result.best["w"].tolist()
    [[0.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 9.0, 10.0]]
    """
    some = tuple(fraction(s, "run_rounds: sparsities") for s in sparsities)
    if not some or list(some) != sorted(some):
        raise ValueError(f"run_rounds: sparsities must ascend, got {list(some)}")
    for name, given in (("prune", prune), ("tune", tune), ("evaluate", evaluate), ("reset", reset)):
        if given is not None or name == "prune":
            function(given, f"run_rounds: {name}", "a function of a state")
    one_of("run_rounds: optimize_mode", optimize_mode, ("maximize", "minimize"))
    sign = 1.0 if optimize_mode == "maximize" else -1.0
    files = None if folder is None else Files("run_rounds", folder)
    start, best = state, state
    history: list[dict[str, Any]] = []
    if files is not None:
        state, best, history = files.resume(state, best)
        done = tuple(row["sparsity"] for row in history)
        if done != some[: len(done)]:
            raise ValueError(
                f"run_rounds: folder {str(folder)!r} is of another run: its rounds had sparsities "
                f"{list(done)}, and this one's begin with {list(some[: len(done)])}; name another "
                "folder"
            )
    rounds = 0
    while len(history) < len(some) and rounds != max_rounds:
        began, sparsity = time.perf_counter(), some[len(history)]
        if reset is None:
            state = prune(state, sparsity)
            state = state if tune is None else tune(state)
        else:
            state = prune(state if tune is None else tune(state), sparsity)
            state = reset(start, state)
        score = math.nan if evaluate is None else float(evaluate(state))
        known = [row["score"] for row in history if row["score"] is not None]
        first = evaluate is None or not known
        if first or sign * score > max(sign * s for s in known):
            best = state
        row = {
            "round": len(history),
            "sparsity": sparsity,
            "score": score if math.isfinite(score) else None,
            "seconds": time.perf_counter() - began,
        }
        history.append(row)
        if files is not None:
            files.append([row])
            files.save(state, best, len(history))
        rounds += 1
    return Rounds(state, best, history)


def auto_compress(
    model: Any,
    budget: Mapping[str, float],
    *,
    problem: Callable[[Any, dict[str, Any]], Problem],
    evaluate: Callable[[Any, dict[str, int]], float],
    compress: Callable[[Any, dict[str, int]], Any],
    key: Any,
    rounds: int = 3,
    purify: Callable[[Any], Any] | None = None,
    loss_allowed: float = 0.0,
    optimize_mode: OptimizeMode = "maximize",
    submit: Callable[..., Any] | None = None,
    **options: Any,
) -> Compressed:
    r"""Returns AutoCompress: in rounds, annealing says what goes, ADMM prepares it, and it goes.

    Round i of n leaves of each resource R, measured on the model that was given,

    $$R\, (B / R)^{i/n},$$

    so that every round takes the same part of what is left. A round anneals over plans of the
    present model, compresses it by the best, and the next round sees the smaller model. What a
    model is is the caller's, and so it may be JAX's or torch's: with a function and parameters, a
    round couples it again, ``compress`` trains with :func:`purepruning.admm.penalty`, prunes and
    calls :func:`purepruning.shrink`.

    Purification removes further what pruning made useless: ``purify`` returns a smaller model, for
    instance without :func:`useless_units`, or None; it is kept if it scores no worse than
    ``loss_allowed`` below the model.

    Liu et al. 2020, arXiv:1907.03141; NNI's AutoCompress has no purification.

    Args:
        model: the first model.
        budget: by resource, what may be left at last: as in :func:`problem`.
        problem: ``(model, budget) -> Problem`` of the present model, such as
            ``pp.search.problem(config_of(model), budget)``.
        evaluate: ``(model, counts) -> score`` of the model pruned by a plan, nothing trained; all
            counts are 0 for the model as it is.
        compress: ``(model, counts) -> model``: smaller, and trained as the caller likes.
        key: a typed key.
        rounds: n.
        purify: ``(model) -> model`` or None.
        loss_allowed: how much of the score purification may cost.
        optimize_mode: whether a score is better if it is larger or smaller.
        submit: of an executor, as in :func:`run_search`; ``evaluate`` and models must then pickle.
        **options: of :func:`annealing`.

    Raises:
        ValueError, TypeError: an argument is out of range; a budget cannot be met.
    """
    n = whole_number(rounds, "auto_compress: rounds", 1)
    for name, given in (("problem", problem), ("evaluate", evaluate), ("compress", compress)):
        function(given, f"auto_compress: {name}", "a function of a model")
    allowed = scalar(loss_allowed, "auto_compress: loss_allowed", zero=True)
    instance(budget, Mapping, "auto_compress: budget", "a mapping such as {'macs': 0.5}")
    one_of("auto_compress: optimize_mode", optimize_mode, ("maximize", "minimize"))
    sign = 1.0 if optimize_mode == "maximize" else -1.0
    ones = dict.fromkeys(budget, 1.0)
    whole = check_problem("auto_compress", problem(model, dict(ones)))
    history: list[dict[str, Any]] = []
    for i, aim in enumerate(budgets_of_rounds(whole.dense(), budget, n), 1):
        of = check_problem("auto_compress", problem(model, aim))
        search = annealing(of, optimize_mode=optimize_mode, **options)
        state = search.init(jax.random.fold_in(key, i))
        found = run_search(
            search, state, functools.partial(_score, evaluate, model), problem=of, submit=submit
        )
        model = compress(model, found.best)
        score = _unpruned(evaluate, problem, model, ones)
        purified = False
        if purify is not None:
            smaller = purify(model)
            if smaller is not None:
                after = _unpruned(evaluate, problem, smaller, ones)
                purified = sign * after >= sign * score - allowed
                model, score = (smaller, after) if purified else (model, score)
        history.append(
            {
                "round": i,
                "budget": aim,
                "counts": found.best,
                "left": problem(model, dict(ones)).dense(),
                "evaluations": len(found.history),
                "score": score,
                "purified": purified,
            }
        )
    return Compressed(model, history)


def budgets_of_rounds(
    dense: Mapping[str, float], budget: Mapping[str, float], rounds: int
) -> list[dict[str, int]]:
    """Returns what each round of AutoCompress may leave of every resource.

    Args:
        dense: what there is of it.
        budget: what may be left at last, a fraction or a number.
        rounds: how many there are.

    >>> budgets_of_rounds({"params": 1000}, {"params": 0.125}, 3)
    [{'params': 500}, {'params': 250}, {'params': 125}]
    """
    shares = {k: b if b <= 1 else b / dense[k] for k, b in budget.items()}
    return [
        {k: max(math.floor(dense[k] * s ** (i / rounds) + 1e-9), 2) for k, s in shares.items()}
        for i in range(1, rounds + 1)
    ]


def _score(evaluate: Callable[[Any, dict[str, int]], float], model: Any, trial: Trial) -> float:
    """Returns a trial's score for the present model; a module's function, so that it pickles."""
    return evaluate(model, trial.counts)


def _unpruned(
    evaluate: Callable[[Any, dict[str, int]], float],
    problem: Callable[[Any, dict[str, Any]], Problem],
    model: Any,
    budget: dict[str, float],
) -> float:
    """Returns the score of a model as it is, whose groups may be called otherwise than before."""
    names = problem(model, dict(budget)).names
    return float(evaluate(model, dict.fromkeys(names, 0)))


def useless_units(coupling: Coupling, params: Params, *, tolerance: float = 0.0) -> np.ndarray:
    """Returns the units that nothing reads: those of which all weights that read them are zero.

    Removing them changes no output. They are left where pruning has emptied what reads them, such
    as the filters behind; AutoCompress calls their removal purification.

    Args:
        coupling: of the model.
        params: its parameters, pruned weights at zero.
        tolerance: weights of at most this magnitude count as zero.

    Raises:
        KeyError, TypeError: a parameter is missing, or no array.

    >>> import jax.numpy as jnp
    >>> import purepruning as pp
    >>> params = {"a": jnp.ones((2, 3)), "b": jnp.array([[1.0], [0.0], [2.0]])}
    >>> fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
    >>> coupling = pp.couple(fn, params, jnp.ones((1, 2)))
    >>> coupling.masks(useless_units(coupling, params), params)["b"].tolist()
    [[True], [False], [True]]
    """
    check_coupling("useless_units", coupling)
    least = scalar(tolerance, "useless_units: tolerance", zero=True)
    leaves = flatten(params).leaves
    read = np.zeros(coupling.n_units + 1, bool)
    sinks = np.zeros(coupling.n_units + 1, bool)
    for path, leaf in coupling.leaves.items():
        for axis, (units, role) in enumerate(zip(leaf.units, leaf.roles, strict=True)):
            if units is None or role != "sink":
                continue
            if path not in leaves:
                raise KeyError(f"useless_units: params have no {path!r}")
            w = np.abs(np.asarray(to_numpy(leaves[path]), np.float64))
            others = tuple(a for a in range(w.ndim) if a != axis)
            used = w.max(axis=others, initial=0.0) > least
            rows = units if units.ndim == 2 else units.reshape(-1, *units.shape[-1:])
            sinks[rows] = True
            flags = used if units.ndim == 2 else np.tile(used, units.shape[0])
            read[rows[flags]] = True
    useless = np.flatnonzero(sinks & ~read)
    useless = useless[useless > 0]
    # Of units that must go in equal numbers from several parts, as many as all parts have.
    found = []
    for chunks in coupling.groups:
        mine = [chunk[np.isin(chunk, useless)] for chunk in chunks]
        k = min(min(map(len, mine)), len(chunks[0]) - 1)
        found += [part[:k] for part in mine]
    return np.sort(np.concatenate(found)) if found else np.zeros(0, np.int64)
