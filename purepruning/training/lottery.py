"""Lottery tickets: train, prune, go back, in rounds."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax

from purepruning.arguments import missing, whole_number
from purepruning.arrays import copied, is_concrete
from purepruning.config.config import Config, Pool, Pruner, check_config
from purepruning.granularity import NM
from purepruning.masks import apply_masks, by_path, merge_masks, named_masks, whole_mask
from purepruning.schedules import schedule as clock
from purepruning.schedules.schedule import Schedule, ScheduleState
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
    round trains: its kept parts, with pruned weights at zero. What keeps them there is the
    training's own affair (:func:`purepruning.keep_pruned` with ``state.masks``).

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
        KeyError: a run has no ``"params"``, or not the part that goes back.

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
    n = whole_number(rounds, "lottery: rounds", 1)
    if isinstance(rewind, str):
        raise TypeError(f"lottery: rewind must be a list of names, got {rewind!r}")
    schedule = Schedule(functools.partial(_rounds, n))

    def init(run: Mapping[str, Any]) -> LotteryState:
        names = sorted(run if rewind is None else rewind)
        for name in ("params", *names):
            if name not in run:
                raise KeyError(missing(f"lottery: the run has no part {name!r}", name, run))
        tree = flatten(run["params"])
        leaves = tree.leaves
        paths = {layer.weight for layer in config.layers}
        if config.bias == "follow":
            paths |= {layer.bias for layer in config.layers if layer.bias is not None}
        for path in sorted(paths):
            if path not in leaves:
                raise KeyError(missing(f"lottery: params have no {path!r}", path, leaves))
        before = by_path(config.masks, leaves) if config.masks else {}
        masks = {}
        for path in sorted(paths):
            masks[path] = whole_mask(before.get(path), leaves[path])
        start = {name: jax.tree.map(copied, run[name]) for name in names}
        return LotteryState(schedule.init(config), tree.rebuild(masks), start)

    def step(
        state: LotteryState, run: Mapping[str, Any], stats: Any = None
    ) -> tuple[LotteryState, dict[str, Any]]:
        done = state.schedule.step
        if is_concrete(done) and getattr(done, "ndim", 0) == 0 and int(done) >= n:
            raise ValueError(f"lottery: all {n} rounds are pruned")
        for name in ("params", *state.start):
            if name not in run:
                raise KeyError(missing(f"lottery: the run has no part {name!r}", name, run))
        at = config.with_counts(clock.counts(state.schedule)).with_masks(state.masks)
        tree = flatten(run["params"])
        leaves = tree.leaves
        new = by_path(named_masks(pruner(run["params"], stats, at)), leaves)
        whole = {path: whole_mask(mask, leaves[path]) for path, mask in new.items()}
        masks = merge_masks(named_masks(state.masks), whole)
        parts = {
            name: jax.tree.map(copied, state.start.get(name, part)) for name, part in run.items()
        }
        parts["params"] = apply_masks(parts["params"], masks)
        merged = tree.rebuild(masks)
        return LotteryState(clock.advance(state.schedule), merged, state.start), parts

    return Lottery(init, step)


def _rounds(n: int, pool: Pool, final: float) -> list[tuple[int, float]]:
    return [(i - 1, 1 - (1 - final) ** (i / n)) for i in range(1, n)] + [(n - 1, final)]
