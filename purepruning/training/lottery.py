"""Lottery tickets: train, prune, go back, in rounds."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from purepruning.arguments import (
    collection,
    function,
    instance,
    missing,
    strings,
    whole_number,
)
from purepruning.arrays import copied, is_concrete
from purepruning.config.config import Config, Pool, Pruner, check_config
from purepruning.granularity import NM
from purepruning.masks import (
    apply_masks,
    by_path,
    masks_of_pruner,
    merge_masks,
    named_masks,
    whole_mask,
)
from purepruning.schedules import schedule as clock
from purepruning.schedules.schedule import MOST_EVENTS, Schedule, ScheduleState
from purepruning.selection.prune import weights_of
from purepruning.training.masks_in_state import keeps, set_masks
from purepruning.trees import flatten


class LotteryState(NamedTuple):
    """Where the rounds are: a pytree of arrays.

    Attributes:
        schedule: the rounds; its step is the number of rounds pruned so far.
        masks: what they pruned: a tree like the parameters, masks of their shapes.
        start: the parts of the run that every round goes back to.
    """

    schedule: ScheduleState
    masks: Any
    start: dict[str, Any]


class Lottery(NamedTuple):
    """What :func:`lottery` returns: two pure functions.

    Attributes:
        init: ``(run) -> state``, where rounds begin.
        step: ``(state, run, stats=None) -> (state, run)``, at the end of a round's training.
    """

    init: Callable[[Mapping[str, Any]], LotteryState]
    step: Callable[..., tuple[LotteryState, dict[str, Any]]]


def lottery(
    pruner: Pruner,
    config: Config,
    *,
    rounds: int | None = None,
    rewind: Collection[str] | None = None,
) -> Lottery:
    r"""Returns iterative magnitude pruning, or that of any other pruner, in ``rounds`` rounds.

    Round i of n prunes to the sparsity

    $$s_i = 1 - (1 - P)^{i / n},$$

    which is $1 - (1 - P)^{1/n}$ of what is left, and then goes back. ``P`` is the config's
    sparsity. What is pruned stays pruned.

    A run is a dict of parts: ``"params"``, and whatever else its training carries along, such as
    ``"opt_state"`` (with Optax that holds the position in the learning-rate schedule), the state of
    a scheduler, a step counter. ``init(run)`` keeps the parts to go back to; called before
    training, that is rewinding to initialisation, and after k iterations, to iteration k.
    ``step(state, run)`` prunes the parameters of a trained run, and returns the run that the next
    round trains: its kept parts, with pruned weights at zero. Training has to keep them
    there (:func:`purepruning.keep_pruned`); parts that hold its state are given
    the masks of this round, whether they go back or not.

    =====================  ============================================
    ``rewind``             is
    =====================  ============================================
    all parts (None)       weight rewinding; NNI's ``reset_weight=True``
    ``["opt_state"]``      learning-rate rewinding: weights go on
    ``[]``                 fine-tuning: everything goes on
    =====================  ============================================

    Both run under ``jit``, ``vmap`` (many tickets at once) and in ``lax.scan`` (over rounds), and
    in torch, where parts may be ``state_dict``\ s. Train once more after the last round to see what
    the ticket is worth.

    Frankle and Carbin 2019, arXiv:1803.03635; rewinding: Frankle et al. 2020, arXiv:1912.05671;
    Renda et al. 2020, arXiv:2003.02389. NNI's lottery ticket pruner.

    Args:
        pruner: ``(params, stats, config) -> masks``.
        config: the resolved rules.
        rounds: how many; unless given, the rules' ``prune_iterations``.
        rewind: names of the parts that go back.

    Raises:
        ValueError, TypeError: neither argument nor rules say how many rounds; by ``step``, after
            the last one, where its number is known.
        KeyError: a run has no ``"params"``, or not the part that goes back; or the state of
            ``keep_pruned`` in it has no mask for what is pruned.

    >>> import jax.numpy as jnp
    >>> import purepruning as pp
    >>> params = {"w": jnp.array([[4.0, 3.0, 2.0, 1.0]])}
    >>> layer = pp.make_layer(params, "w", "Linear", out_axes=1, in_axes=0)
    >>> config = pp.resolve([{"sparsity": 0.75, "op_types": ["Linear"]}], [layer])
    >>> tickets = pp.lottery(pp.level, config, rounds=2)
    >>> run = {"params": params}
    >>> state = tickets.init(run)
    >>> for _ in range(2):
    ...     run = {"params": {"w": run["params"]["w"] * jnp.array([[0.1, 1.0, 1.0, 2.5]])}}
    ...     state, run = tickets.step(state, run)
    ...     print(run["params"]["w"].tolist())
    [[0.0, 3.0, 0.0, 1.0]]
    [[0.0, 3.0, 0.0, 0.0]]
    """
    check_config("lottery", config)
    if isinstance(config.granularity, NM):
        raise ValueError(f"lottery: the counts of {config.granularity} are fixed")
    if rounds is None:
        asked = {p.prune_iterations for p in config.pools} - {None}
        if not asked:
            raise ValueError("lottery: give rounds=..., or the rules 'prune_iterations'")
        rounds = asked.pop()
    n = whole_number(rounds, "lottery: rounds", 1, MOST_EVENTS)
    function(pruner, "lottery: pruner", "a function (params, stats, config) -> masks")
    parts = None if rewind is None else collection(rewind, "lottery: rewind", "a list of names")
    for name in parts or ():
        strings(name, "lottery: rewind: every name")
    schedule = Schedule(functools.partial(_rounds, n))

    def init(run: Mapping[str, Any]) -> LotteryState:
        _check_run(run, parts or ())
        names = sorted(run if parts is None else parts)
        tree = flatten(run["params"])
        leaves = tree.leaves
        weights_of("lottery", leaves, config)
        paths = {layer.weight for layer in config.layers}
        if config.bias == "follow":
            paths |= {layer.bias for layer in config.layers if layer.bias is not None}
        paths |= {path for path in config.companions if path in leaves}
        before = by_path(config.masks, leaves) if config.masks else {}
        masks = {}
        for path in sorted(paths):
            masks[path] = whole_mask(before.get(path), leaves[path])
        start = {name: jax.tree.map(copied, run[name]) for name in names}
        return LotteryState(schedule.init(config), tree.rebuild(masks), start)

    def step(
        state: LotteryState, run: Mapping[str, Any], stats: Any = None
    ) -> tuple[LotteryState, dict[str, Any]]:
        _check_state(state, config)
        done = state.schedule.step
        if is_concrete(done) and getattr(done, "ndim", 0) == 0 and int(done) >= n:
            raise ValueError(f"lottery: all {n} rounds are pruned")
        _check_run(run, state.start)
        at = config.with_counts(clock.counts(state.schedule)).with_masks(state.masks)
        tree = flatten(run["params"])
        leaves = tree.leaves
        weights = {layer.name: layer.weight for layer in config.layers}
        new = masks_of_pruner("lottery", pruner(run["params"], stats, at), leaves, weights)
        whole = {path: whole_mask(mask, leaves[path]) for path, mask in new.items()}
        masks = merge_masks(named_masks(state.masks), whole)
        parts = {
            name: jax.tree.map(copied, state.start.get(name, part)) for name, part in run.items()
        }
        parts["params"] = apply_masks(parts["params"], masks)
        parts |= {name: set_masks(part, masks) for name, part in parts.items() if keeps(part)}
        merged = tree.rebuild(masks)
        return LotteryState(clock.advance(state.schedule), merged, state.start), parts

    return Lottery(init, step)


def _check_run(run: Any, parts: Iterable[str]) -> None:
    """Raises for what is no run, or one that lacks parts or parameters."""
    instance(run, Mapping, "lottery: run", "a dict of parts, such as {'params': params}")
    for name in ("params", *parts):
        if name not in run:
            raise KeyError(missing(f"lottery: the run has no part {name!r}", name, run))


def _check_state(state: Any, config: Config) -> None:
    """Raises for what is no state of this lottery, as its ``init`` and ``step`` return them."""
    instance(state, LotteryState, "lottery: state", "what init of this lottery returned")
    clock.check_state("lottery", state.schedule)
    names = [pool.name for pool in config.pools]
    if state.schedule.counts.keys() != set(names):
        raise ValueError(
            f"lottery: state is of another run: it has the pools {sorted(state.schedule.counts)}, "
            f"the config {names}"
        )
    instance(state.start, Mapping, "lottery: state.start", "a dict of the parts that go back")


def _rounds(n: int, pool: Pool, final: float) -> np.ndarray:
    """Returns the number of every round from 0 on and its sparsity, ``(rounds, 2)``."""
    shares = 1 - (1 - final) ** (np.arange(1, n + 1) / n)
    shares[-1] = final
    return np.stack([np.arange(n, dtype=np.float64), shares], axis=1)
