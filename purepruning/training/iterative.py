"""Pruning in rounds before any training: scores are taken anew with what is pruned at zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from purepruning.arguments import flag, function, one_of, whole_number
from purepruning.arrays import int32, is_concrete, is_torch, namespace, zeros
from purepruning.config.config import Config, Pruner, check_config, single_count
from purepruning.granularity import NM
from purepruning.masks import apply_masks, by_path, whole_mask
from purepruning.trees import flatten
from purepruning.types import Masks, Params, Stats


class IterativeState(NamedTuple):
    """Where the rounds are: a pytree of arrays.

    Attributes:
        round: rounds done, int32.
        masks: whole masks of the layers' weights, by path.
    """

    round: Any
    masks: dict[str, Any]


class Iterative(NamedTuple):
    """What :func:`iterative` returns: pure functions, all traceable.

    Attributes:
        init: ``(params) -> state``, of nothing pruned.
        masked: ``(state, params) -> params`` with what is pruned at zero: where to take gradients.
        step: ``(state, params, stats) -> state`` after one more round.
        masks: ``(state, params) -> masks``, a tree like the parameters.
        counts: by pool, how many units are pruned after each round.
    """

    init: Callable[[Params], IterativeState]
    masked: Callable[[IterativeState, Params], Params]
    step: Callable[[IterativeState, Params, Stats], IterativeState]
    masks: Callable[[IterativeState, Params], Masks]
    counts: dict[str, np.ndarray]


def iterative(
    pruner: Pruner,
    config: Config,
    *,
    rounds: int = 100,
    curve: str = "exponential",
    regrow: bool = False,
) -> Iterative:
    r"""Returns pruning in rounds, each at a density between 1 and that of ``config``.

    After round t of T every pool has the largest count that leaves at least

    $$d^{t/T} \quad \text{(or } 1 - (1 - d)\, t/T \text{ where linear)}$$

    of it, with d the density that its count leaves; after the last exactly its count. The caller
    takes gradients at ``masked(state, params)``:

    - ``iterative(pp.synflow, config)``: SynFlow, with :func:`purepruning.synaptic_flow` there;
    - ``iterative(pp.snip, config)``: iterative SNIP, with gradients of one batch each; what is
      pruned stays pruned;
    - ``iterative(pp.snip, config, regrow=True)``: FORCE, where statistics are of these gradients
      and the *dense* weights (``gradients.update(stats, params, grads, config)``), so that what was
      pruned may come back.

    Only weights are pruned, not biases. ``jax.lax.fori_loop`` over ``step`` is one compiled loop.

    Tanaka et al. 2020, arXiv:2006.05467; de Jorge et al. 2021, arXiv:2006.09081 (FORCE).

    Args:
        pruner: ``(params, stats, config) -> masks``.
        config: the resolved rules, with known counts; in layer or global scope.
        rounds: T: 100 for SynFlow, 60 to 300 for FORCE.
        curve: ``"exponential"`` or ``"linear"``.
        regrow: whether what is pruned may come back in a later round.

    Raises:
        ValueError, TypeError: an option is wrong; the config is coupled, of N:M, or without counts.

    >>> import jax.numpy as jnp
    >>> import purepruning as pp
    >>> params = {"w": jnp.arange(1.0, 9.0)[None]}
    >>> layer = pp.make_layer(params, "w", "Linear", out_axes=1, in_axes=0)
    >>> rounds = iterative(pp.level, pp.resolve(0.75, [layer]), rounds=2)
    >>> state = rounds.init(params)
    >>> for _ in range(2):
    ...     state = rounds.step(state, params, None)
    ...     print(rounds.masks(state, params)["w"].astype(int).tolist())
    [[0, 0, 0, 0, 1, 1, 1, 1]]
    [[0, 0, 0, 0, 0, 0, 1, 1]]
    """
    function(pruner, "iterative: pruner", "a function (params, stats, config) -> masks")
    check_config("iterative", config)
    whole_number(rounds, "iterative: rounds", 1, 2**20)
    one_of("iterative: curve", curve, ("exponential", "linear"))
    flag(regrow, "iterative: regrow")
    if isinstance(config.granularity, NM) or config.allocation is not None:
        raise ValueError(
            "iterative needs counts that can be lower than the last: resolve without N:M and "
            "without a coupling"
        )
    if config.masks:
        raise ValueError("iterative begins with nothing pruned; give the config without masks")
    tables = _tables(config, rounds, curve)

    def init(params: Params) -> IterativeState:
        leaves = flatten(params).leaves
        masks = {x.weight: whole_mask(None, leaves[x.weight]) for x in config.layers}
        return IterativeState(zeros(next(iter(leaves.values())), (), "int32"), masks)

    def masked(state: IterativeState, params: Params) -> Params:
        return apply_masks(params, state.masks)

    def step(state: IterativeState, params: Params, stats: Stats) -> IterativeState:
        counts = {name: _entry(table, state.round) for name, table in tables.items()}
        now = config.with_counts(counts)
        now = now if regrow else now.with_masks(state.masks)
        found = by_path(pruner(params, stats, now), params)
        leaves = flatten(params).leaves
        masks = {path: whole_mask(found[path], leaves[path]) for path in state.masks}
        return IterativeState(state.round + 1, masks)

    def masks_of(state: IterativeState, params: Params) -> Masks:
        return flatten(params).rebuild(state.masks)

    return Iterative(init, masked, step, masks_of, tables)


def _tables(config: Config, rounds: int, curve: str) -> dict[str, np.ndarray]:
    """Returns the counts of every pool after each round, made on the host in float64."""
    done = np.arange(1, rounds + 1) / rounds
    tables = {}
    for pool in config.pools:
        last = single_count("iterative", pool, config.counts[pool.name])
        left = 1 - last / pool.size
        sparsity = 1 - left**done if curve == "exponential" else (1 - left) * done
        table = np.minimum(pool.counts_of(sparsity), last)
        table[-1] = last
        tables[pool.name] = table.astype(np.int32)
    return tables


def _entry(table: np.ndarray, at: Any) -> Any:
    """Returns one entry of a table; the last where there are no more."""
    if is_concrete(at):
        return int(table[min(int(at), len(table) - 1)])
    xp = namespace(at)
    values = int32(xp, table, at)
    at = xp.clip(at, max=len(table) - 1)
    return xp.take(values, xp.reshape(at, (1,)))[0] if is_torch(at) else values[at]
