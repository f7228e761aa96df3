"""Pruning in an Optax chain: masks are made as training goes on."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from purepruning.arguments import function, instance, missing
from purepruning.arrays import by_numpy, copied, is_concrete, jax_array
from purepruning.config.config import Config, Pruner, check_config
from purepruning.masks import by_path, masks_of_pruner, named_masks, spread_mask, whole_mask
from purepruning.schedules import schedule as clock
from purepruning.schedules.schedule import Schedule, ScheduleState
from purepruning.training.keep_pruned import keep_pruned, masks_in
from purepruning.training.masks_in_state import KeepPrunedState
from purepruning.trees import flatten
from purepruning.types import Masks


class PruneOnScheduleState(NamedTuple):
    """State of :func:`prune_on_schedule`: arrays only.

    Attributes:
        schedule: where the schedule is.
        kept: the masks in force, and the state of the optimizer that is kept off pruned weights.
    """

    schedule: ScheduleState
    kept: KeepPrunedState


def prune_on_schedule(
    pruner: Pruner,
    schedule: Schedule | ScheduleState,
    config: Config,
    inner: optax.GradientTransformation | optax.MultiSteps | None = None,
    *,
    masks: Masks = None,
) -> optax.GradientTransformationExtraArgs:
    """Returns :func:`keep_pruned` with masks that the pruner makes anew when the schedule says so.

    At a step that is due, the pruner ranks the parameters as they are before the update; what is
    pruned stays pruned (:meth:`purepruning.Config.with_masks`), and pools that are not due keep
    their masks. Then, as at every step, pruned weights go to zero. Steps are calls of ``update``:
    within ``optax.MultiSteps``, real updates; so put it inside. There it is, as
    :func:`keep_pruned`, the last of a chain, or has the optimizer inside::

        tx = optax.chain(optax.adamw(1e-3), prune_on_schedule(pp.level, schedule, config))
        tx = prune_on_schedule(pp.level, schedule, config, optax.adamw(1e-3))

    The events are in the state, as arrays, so that it is compiled once, and checkpoints hold them.
    Under ``jit`` a step that is not due prunes nothing (``lax.cond``); under ``vmap`` too, as long
    as the schedule's counter has no batch axis: where states are mapped over, with
    :func:`purepruning.vmap_axes`.

    Statistics for the pruner are the extra argument ``stats`` of ``update``. A ``TrainState`` of
    Flax passes no extra arguments on; there, and where pruning is better kept out of the step, use
    the schedule's ``step``, the pruner and :func:`set_masks` directly. The result is the same.

    Args:
        pruner: ``(params, stats, config) -> masks``, traceable.
        schedule: what to prune when; or a state to begin with, as its ``init`` returned, maybe with
            counts that are traced.
        config: the resolved rules.
        inner: optimizer to keep off pruned weights.
        masks: what is pruned to begin with; name here, as :func:`purepruning.expand` does, other
            parameters that the pruner has masks for than those of the config's layers.

    Raises:
        ValueError, TypeError: by ``init``, as :meth:`purepruning.Schedule.init`; by ``update``, as
            the pruner, or without ``params``.
        KeyError: a parameter is missing, or the pruner has a mask for one that the state has none
            for.

    >>> import jax, jax.numpy as jnp, optax
    >>> import purepruning as pp
    >>> params = {"w": jnp.array([[4.0, 3.0, 2.0, 1.0]])}
    >>> layer = pp.make_layer(params, "w", "Linear", out_axes=1, in_axes=0)
    >>> config = pp.resolve([{"sparsity": 0.5, "op_types": ["Linear"]}], [layer])
    >>> tx = optax.chain(optax.sgd(0.5), prune_on_schedule(pp.level, pp.linear(end_step=2), config))
    >>> state = tx.init(params)
    >>> for _ in range(4):
    ...     updates, state = tx.update({"w": jnp.ones((1, 4))}, state, params)
    ...     params = optax.apply_updates(params, updates)
    ...     print(params["w"].tolist())
    [[3.5, 2.5, 1.5, 0.5]]
    [[3.0, 2.0, 1.0, 0.0]]
    [[2.5, 1.5, 0.0, 0.0]]
    [[2.0, 1.0, 0.0, 0.0]]
    """
    check_config("prune_on_schedule", config)
    if not isinstance(schedule, Schedule | ScheduleState):
        raise TypeError(
            "prune_on_schedule: schedule must be a Schedule, such as agp(...), or a state of one, "
            f"got {type(schedule).__name__}"
        )
    function(pruner, "prune_on_schedule: pruner", "a function (params, stats, config) -> masks")
    keeper = keep_pruned({}, inner)
    named_masks(masks)

    def init(params: Any) -> PruneOnScheduleState:
        state = schedule.init(config) if isinstance(schedule, Schedule) else schedule
        kept = keep_pruned(_places(config, params, masks), inner).init(params)
        return PruneOnScheduleState(jax.tree.map(lambda x: copied(jax_array(x)), state), kept)

    def update(
        updates: Any,
        state: PruneOnScheduleState,
        params: Any = None,
        *,
        stats: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, PruneOnScheduleState]:
        if params is None:
            raise ValueError(
                "prune_on_schedule needs the parameters: call update(updates, state, params)"
            )
        returned = "what init or update of this transform returned"
        instance(state, PruneOnScheduleState, "prune_on_schedule: state", returned)
        _check_clock(state.schedule, config)
        old = masks_in(state.kept, params)
        due = clock.due(state.schedule)

        def prune() -> dict[str, Any]:
            # Looked up here, in the branch: there may be many pools.
            now = config.with_counts(clock.counts(state.schedule)).with_masks(old)
            due_by_pool = clock.due_by_pool(state.schedule)
            return _replaced(old, pruner(params, stats, now), params, config, due_by_pool)

        if is_concrete(due):
            new = prune() if due else old
        else:
            new = jax.lax.cond(due, prune, lambda: old)
        updates, kept = keeper.update(
            updates, KeepPrunedState(new, state.kept.inner), params, **extra_args
        )
        return updates, PruneOnScheduleState(clock.advance(state.schedule), kept)

    return optax.GradientTransformationExtraArgs(init, update)


def _check_clock(state: Any, config: Config) -> None:
    """Raises for what is no state of a schedule for this config."""
    clock.check_state("prune_on_schedule", state)
    names = {pool.name for pool in config.pools}
    # Where counts are fixed, there are none in the state.
    if state.counts and state.counts.keys() != names:
        raise ValueError(
            f"prune_on_schedule: state is of another run: it has the pools {sorted(state.counts)}, "
            f"the config {sorted(names)}; begin with tx.init(params)"
        )


def _places(config: Config, params: Any, masks: Any) -> dict[str, Any]:
    """Returns whole masks for all that the config may prune, and those given."""
    leaves = flatten(params).leaves
    named = by_path(masks, leaves) if leaves else named_masks(masks)
    for path, mask in (by_path(config.masks, leaves) if leaves else config.masks).items():
        named[path] = named[path] & mask if path in named else mask
    shapes = {layer.weight: layer.shape for layer in config.layers}
    if config.bias == "follow":
        shapes |= {layer.bias: () for layer in config.layers if layer.bias is not None}
    coupled = config.companions
    shapes |= {path: coupled[path] for path in coupled if path in leaves or not leaves}
    for path in leaves and shapes:
        if path not in leaves:
            raise KeyError(missing(f"prune_on_schedule: params have no {path!r}", path, leaves))
    for layer in config.layers if leaves else ():
        shape = tuple(getattr(leaves[layer.weight], "shape", ()))
        if shape != layer.shape:
            raise ValueError(
                f"prune_on_schedule: {layer.weight!r} has shape {shape} in params, but "
                f"{layer.shape} in the layer table; make the table from this model"
            )
    whole = {
        path: whole_mask(named.get(path), leaves[path])
        if path in leaves
        else jnp.broadcast_to(named.get(path, True), shape)
        for path, shape in shapes.items()
    }
    return named | whole


def _replaced(
    old: dict[str, Any], new: Any, params: Any, config: Config, due_by_pool: dict[str, Any]
) -> dict[str, Any]:
    """Returns the masks in force with those of ``new``, where their pool is due."""
    mine: dict[str | None, Any] = {}
    for pool in config.pools if due_by_pool else ():
        for path in (path for layer in pool.layers for path in (layer.weight, layer.bias)):
            # A bias that layers share is due with each of them. What goes with units of several
            # pools is always: a pool that is not due prunes no more than before.
            due = due_by_pool[pool.name]
            mine[path] = mine[path] | due if path in mine else due
    masks = dict(old)
    if new is None:
        raise TypeError(
            "prune_on_schedule: the pruner must return masks of params, got None; end it in a "
            "return statement"
        )
    # Of some of the layers alone, as own pruners may return them.
    for path, mask in masks_of_pruner("prune_on_schedule", new, params, {}).items():
        if path not in old:
            message = f"prune_on_schedule: the pruner has a mask for {path!r}, the state has none"
            raise KeyError(
                f"{missing(message, path, old)}; name it in prune_on_schedule(masks=...)"
            )
        if due_by_pool and path not in mine and path not in config.companions:
            raise ValueError(
                f"prune_on_schedule: the mask of {path!r} belongs to no layer of the config, and "
                "with pools that are pruned at different steps it is not known when it is due"
            )
        masks[path] = by_numpy(_narrowed, old[path], mask, mine.get(path))
    return masks


def _narrowed(old: Any, mask: Any, due: Any) -> Any:
    """Returns a mask that prunes what ``mask`` does besides, if it is due."""
    # What was pruned before stays pruned, also where a count or a unit cannot say so.
    return old & (spread_mask(mask, old) if due is None else spread_mask(mask, old) | ~due)
