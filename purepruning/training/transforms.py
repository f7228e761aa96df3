"""Masks in an Optax chain: pruned weights stay exactly zero, whatever the optimizer does.

And pruning in one: :func:`prune_on_schedule` makes the masks as training goes on.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from purepruning.arguments import adapter_of, function, instance, missing, shown
from purepruning.arrays import by_numpy, chosen, copied, is_array, is_concrete, jax_array
from purepruning.config.config import Config, Pruner, check_config
from purepruning.masks import (
    by_path,
    masks_of_pruner,
    named_masks,
    spread_mask,
    whole_mask,
    zero_pruned,
)
from purepruning.schedules import schedule as clock
from purepruning.schedules.schedule import Schedule, ScheduleState
from purepruning.trees import flatten
from purepruning.types import Masks, Params


class KeepPrunedState(NamedTuple):
    """State of :func:`keep_pruned`: arrays only.

    Attributes:
        masks: mask by parameter path; parameters that are not pruned have none.
        inner: state of the optimizer that is kept off pruned weights; ``()`` if there is none.
    """

    masks: dict[str, Any]
    inner: Any


def keep_pruned(
    masks: Masks, inner: optax.GradientTransformation | optax.MultiSteps | None = None, *others: Any
) -> optax.GradientTransformationExtraArgs:
    r"""Returns a transform after which pruned weights are exactly zero; it goes last in a chain.

    $$u_i \leftarrow u_i \text{ if } m_i \text{ else } -w_i$$

    ``optax.apply_updates`` then adds $-w_i$ to $w_i$, which is 0 in every float format; no momentum
    or weight decay gets past it. From the first update on that holds also for weights that were
    not zero before; infinite or NaN ones stay, so apply masks once to begin with
    (:func:`purepruning.apply_masks`). Nothing else has to be called: it works in
    a Flax ``TrainState`` or ``nnx.Optimizer``, inside and outside ``optax.MultiSteps`` and
    ``optax.inject_hyperparams``, under ``jit``, ``vmap`` and ``scan``.

    The masks are copied into the state, so that checkpoints hold them, donated buffers are no
    concern, and :func:`set_masks` can replace them between steps.

    There are two ways to use it::

        tx = optax.chain(optax.adamw(1e-3), keep_pruned(masks))
        tx = keep_pruned(masks, optax.adamw(1e-3))

    In the first, the optimizer sees dense gradients, and moments of pruned weights keep updating.
    In the second it sees zero gradients and parameters there, and its moments are set to zero after
    each step: global norms, factored moments and gradient accumulators have no part of pruned
    weights, and a weight that comes back starts anew. State belongs to a parameter if its path ends
    in that of the parameter and it has its shape; other state (Adafactor's rows and columns, the
    vector of ``optax.flatten``) is left alone.

    Behind this transform nothing may change updates. Optimizers that hold weights of their own,
    which are used in place of the parameters (``optax.contrib.schedule_free`` and its
    ``schedule_free_eval_params``), go inside, since what the chain's last transform does to updates
    does not reach their state; so do ``optax.flatten`` and ``optax.conditionally_transform``. Those
    that go back to weights they began with (``optax.lookahead``, ``optax.contrib.mechanize``) may
    be around it if masks were applied before. A state shows how a transform was put together:
    ``get_masks(tx.init(params), params)`` raises where pruned weights would not stay zero.

    Args:
        masks: tree of booleans with None where nothing is pruned, matched to parameters by path.
        inner: optimizer to keep off pruned weights.
        *others: nothing; what is given here was meant for the function of that name for torch.

    Raises:
        KeyError, ValueError, TypeError: by ``init``, as :func:`purepruning.apply_masks`.
        TypeError: at once, if ``masks`` is a model or ``inner`` no Optax transform.
        TypeError: by ``update``, if the state is none of this transform.
        ValueError: by ``update``, without ``params``, or with an update of another shape.
        KeyError: by ``update``, if params or updates lack a masked parameter.

    >>> import jax.numpy as jnp, optax
    >>> params = {"w": jnp.array([1.0, 2.0]), "b": jnp.array([3.0])}
    >>> masks = {"w": jnp.array([True, False]), "b": None}
    >>> tx = optax.chain(optax.sgd(0.5), keep_pruned(masks))
    >>> updates, state = tx.update({"w": jnp.ones(2), "b": jnp.ones(1)}, tx.init(params), params)
    >>> optax.apply_updates(params, updates)["w"].tolist()
    [0.5, 0.0]
    """
    _check_arguments(masks, inner, others)
    if isinstance(inner, optax.MultiSteps):
        inner = optax.GradientTransformationExtraArgs(inner.init, inner.update)
    elif inner is not None:
        inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> KeepPrunedState:
        leaves = flatten(params).leaves
        # optax.tree_utils.tree_map_params asks for a state of no parameters.
        keep = _masks_for(masks, params) if leaves else by_path(masks, masks)
        copies = {path: copied(jax_array(mask)) for path, mask in keep.items()}
        return KeepPrunedState(copies, () if inner is None else inner.init(params))

    def update(
        updates: Any, state: KeepPrunedState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, KeepPrunedState]:
        if params is None:
            raise ValueError(
                "keep_pruned needs the parameters: call update(updates, state, params)"
            )
        keep = _masks_in(state, params)
        _check_updates(updates, params, keep)
        if inner is None:
            return _to_zero(updates, params, keep), state
        try:
            updates, inner_state = inner.update(
                _zero_pruned(updates, keep),
                state.inner,
                _zero_pruned(params, keep),
                **extra_args,
            )
        except Exception as error:
            _check_inner(state.inner, inner, params, error)
            raise
        inner_state = zero_moments(inner_state, flatten(params).leaves, keep)
        return _to_zero(updates, params, keep), KeepPrunedState(state.masks, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _check_arguments(masks: Any, inner: Any, others: tuple[Any, ...]) -> None:
    """Raises for what belongs to the function of the same name for torch, or to none."""
    adapter = adapter_of(masks)
    if adapter == "torch" or type(inner).__module__.startswith("torch."):
        raise TypeError(
            "keep_pruned makes an Optax transform, and got a module or an optimizer of torch; use "
            "purepruning_interop.torch.keep_pruned(model, masks, optimizer)"
        )
    if adapter not in (None, "equinox"):  # whose modules may be masks
        raise TypeError(
            f"keep_pruned: masks must be a tree of booleans, got a model, {type(masks).__name__}; "
            "call keep_pruned(masks, optimizer), and give its update the parameters"
        )
    if others:
        raise TypeError(f"keep_pruned takes (masks, inner), got {2 + len(others)} arguments")
    known = optax.GradientTransformation | optax.MultiSteps | None
    if not isinstance(inner, known):
        raise TypeError(
            "keep_pruned: inner must be an Optax transform, such as optax.adam(1e-3), got "
            f"{type(inner).__name__}"
        )
    named_masks(masks)


def _masks_for(masks: Any, params: Any) -> dict[str, Any]:
    """Returns masks by path for the parameters that the transform is given to begin with."""
    try:
        return by_path(masks, params)
    except KeyError as error:
        if isinstance(params, jax.Array | np.ndarray):
            hint = (
                "here all parameters are one array; optax.flatten goes inside: "
                "keep_pruned(masks, optax.flatten(optimizer))"
            )
        elif _nodes(params, optax.MaskedNode):
            hint = (
                "optax.masked and optax.multi_transform hand on a part of the parameters; give the "
                "masks of these alone, or put it outside: keep_pruned(masks, optimizer)"
            )
        else:
            raise
        raise KeyError(f"{error.args[0]}; {hint}") from None


def _masks_in(state: Any, params: Any) -> dict[str, Any]:
    """Returns the masks in a state by path, each checked against its parameter."""
    returned = "what init or update of this transform returned"
    instance(state, KeepPrunedState, "keep_pruned: state", returned)
    instance(state.masks, Mapping, "keep_pruned: state.masks", "a dict by parameter path")
    try:
        return by_path(state.masks, params)
    except (KeyError, TypeError, ValueError) as error:
        message = f"keep_pruned: state is not of these params: {error.args[0]}"
        if any("int" in str(jnp.result_type(x)) for x in jax.tree.leaves(state.masks)):
            message += (
                ": an optimizer around that mixes states by arithmetic made numbers of them; put "
                "optax.contrib.sam inside, and give optax.lookahead reset_state=False"
            )
        raise type(error)(message) from None


def _check_inner(
    state: Any, inner: optax.GradientTransformation, params: Any, error: Exception
) -> None:
    """Raises if the optimizer inside failed since the state is none of its own."""
    fresh = jax.eval_shape(inner.init, params)
    kinds = [(jax.tree.structure(x), [*map(jnp.shape, jax.tree.leaves(x))]) for x in (state, fresh)]
    if kinds[0] != kinds[1]:
        raise TypeError(
            "keep_pruned: state.inner must be a state of the optimizer inside, got "
            f"{shown(state)}; begin with tx.init(params), or restore the state that this transform "
            "returned"
        ) from error


def _nodes(tree: Any, of: type | tuple[type, ...]) -> list[Any]:
    """Returns the outermost nodes of some types in a tree."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, of))
    return [leaf for leaf in leaves if isinstance(leaf, of)]


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
        old = _masks_in(state.kept, params)
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


def get_masks(opt_state: Any, params: Params) -> Masks:
    """Returns the masks in :func:`keep_pruned`'s state, wherever it is, as a tree like ``params``.

    Of ``params`` only the structure matters. ``opt_state`` may be an ``nnx.Optimizer``, or
    ``nnx.state`` of one, in which states are plain mappings.

    Raises:
        ValueError: there is no such state, or another transform follows it in the chain.
        KeyError: a mask is for a parameter that is not in ``params``.

    >>> import jax.numpy as jnp, optax
    >>> params = {"w": jnp.ones(2), "b": jnp.ones(2)}
    >>> tx = optax.chain(optax.sgd(0.1), keep_pruned({"w": jnp.array([True, False])}))
    >>> get_masks(tx.init(params), params)
    {'b': None, 'w': Array([ True, False], dtype=bool)}
    """
    _check_order("get_masks", opt_state)
    states, tree = _states(opt_state) or _written_out(opt_state), flatten(params)
    if not states:
        raise ValueError(
            "get_masks: there is no state of keep_pruned in this opt_state; give it what the "
            "transform's init or update returned (optimizer.opt_state of an nnx.Optimizer)"
        )
    found = {path: mask for state in states for path, mask in flatten(state.masks).leaves.items()}
    for path in found:
        if path not in tree.leaves:
            message = f"get_masks: params have no {path!r}, which the state has a mask for"
            raise KeyError(missing(message, path, tree.leaves))
    return tree.rebuild(found)


def set_masks(opt_state: Any, masks: Masks) -> Any:
    """Returns ``opt_state`` with other masks in :func:`keep_pruned`'s state, wherever it is.

    Pure, and traceable. The state keeps its shapes, so that nothing is compiled again; a weight
    that comes back is trained from zero. A parameter that ``masks`` leave out is kept whole. With
    ``nnx.Optimizer``: ``optimizer.opt_state = nnx.data(set_masks(optimizer.opt_state, masks))``.

    Raises:
        KeyError: a mask is for a parameter that has none in the state; begin with
            ``keep_pruned(expand(masks, params))`` to be free later.
        ValueError: there is no such state, or another transform follows it in the chain; or a mask
            does not broadcast to the one it replaces.
        TypeError: a mask is not boolean.

    >>> import jax.numpy as jnp, optax
    >>> tx = optax.chain(optax.sgd(0.1), keep_pruned({"w": jnp.array([True, True])}))
    >>> state = set_masks(tx.init({"w": jnp.ones(2)}), {"w": jnp.array([True, False])})
    >>> state[-1].masks
    {'w': Array([ True, False], dtype=bool)}
    """
    _check_order("set_masks", opt_state)
    states = _states(opt_state)
    if not states:
        raise ValueError("set_masks: there is no state of keep_pruned in this opt_state")
    places = {path: old for state in states for path, old in flatten(state.masks).leaves.items()}
    new = flatten(masks).leaves
    for path in new:
        if path not in places:
            message = f"set_masks: the state has no mask for {path!r}"
            raise KeyError(missing(message, path, places))
    try:
        new = by_path(new, places)
    except ValueError as error:
        raise ValueError(f"set_masks: a mask must fit the one it replaces: {error}") from None

    def replace(node: Any) -> Any:
        if not _is_ours(node):
            return node
        # Flattened, since Flax NNX wraps every array of the state.
        old = flatten(node.masks)
        values = {path: whole_mask(new.get(path), mask) for path, mask in old.leaves.items()}
        return KeepPrunedState(old.rebuild(values), _map_states(replace, node.inner))

    return _map_states(replace, opt_state)


def keeps(tree: Any) -> bool:
    """Whether there is a state of :func:`keep_pruned` in ``tree``."""
    return bool(_states(tree))


def _check_order(where: str, node: Any) -> None:
    """Raises where a state shows that what :func:`keep_pruned` does to updates is not the last."""
    parts = _of_chain(node)
    last = max((i for i, part in enumerate(parts) if keeps(part)), default=-1)
    if 0 <= last < len(parts) - 1:
        raise ValueError(
            f"{where}: in a chain of this opt_state another transform follows keep_pruned or "
            "prune_on_schedule, and moves pruned weights again; put it last: "
            "optax.chain(optimizer, keep_pruned(masks))"
        )
    if last > 0 and any(_nodes(part, _WITH_WEIGHTS) for part in parts[:last]):
        raise ValueError(
            f"{where}: an optimizer in a chain of this opt_state (optax.contrib.schedule_free) "
            "holds weights of its own, which are not pruned with the parameters; put it inside: "
            "keep_pruned(masks, optimizer)"
        )
    if isinstance(node, optax.ConditionallyTransformState) and keeps(node):
        raise ValueError(
            f"{where}: optax.conditionally_transform leaves keep_pruned out at some steps, and "
            "pruned weights move; put it inside: keep_pruned(masks, optimizer)"
        )
    children = node.values() if isinstance(node, Mapping) else node
    for child in children if isinstance(node, tuple | list | Mapping) else ():
        _check_order(where, child)


#: States of optimizers whose own weights are used in place of the parameters.
_WITH_WEIGHTS = (optax.contrib.ScheduleFreeState,)


def _of_chain(node: Any) -> tuple[Any, ...]:
    """Returns the states of transforms in their order, of what looks like a chain's state."""
    if type(node) is tuple and all(isinstance(part, tuple) for part in node):
        return node
    if isinstance(node, OrderedDict):  # optax.named_chain
        return tuple(node.values())
    return ()


def _states(opt_state: Any) -> list[KeepPrunedState]:
    found = [leaf for leaf in jax.tree.leaves(opt_state, is_leaf=_is_ours) if _is_ours(leaf)]
    return found + [deeper for state in found for deeper in _states(state.inner)]


def _written_out(opt_state: Any) -> list[KeepPrunedState]:
    """Returns the states of an optimizer whose named tuples have become mappings by field."""
    if not isinstance(opt_state, Mapping):
        return []
    masks, found = opt_state.get("masks"), []
    if isinstance(masks, Mapping) and {*opt_state} <= {*KeepPrunedState._fields}:
        leaves = jax.tree.leaves(masks)
        if leaves and all(jnp.result_type(leaf) == jnp.bool_ for leaf in leaves):
            found.append(KeepPrunedState(dict(masks), opt_state.get("inner", ())))
    return found + [deeper for child in opt_state.values() for deeper in _written_out(child)]


def _map_states(function: Any, opt_state: Any) -> Any:
    return jax.tree.map(function, opt_state, is_leaf=_is_ours)


def _is_ours(node: Any) -> bool:
    return isinstance(node, KeepPrunedState)


def _check_updates(updates: Any, params: Any, keep: dict[str, Any]) -> None:
    """Raises unless every masked parameter has an update of its shape."""
    leaves, weights = flatten(updates).leaves, flatten(params).leaves
    for path in keep:
        if path not in leaves:
            message = missing(f"keep_pruned: there is no update for {path!r}", path, leaves)
            if isinstance(params, optax.LookaheadParams):
                message += (
                    "; put optax.lookahead around: lookahead(keep_pruned(masks, optimizer), ...)"
                )
            raise KeyError(message)
        update, shape = leaves[path], weights[path].shape
        if not is_array(update) or isinstance(update, jax.ShapeDtypeStruct):
            raise TypeError(
                f"keep_pruned: updates: {path!r} must be an array of numbers, got {shown(update)}"
            )
        if update.shape != shape:
            raise ValueError(
                f"keep_pruned: updates: {path!r} has shape {tuple(update.shape)}, its parameter "
                f"{tuple(shape)}; give updates in the parameters' shapes"
            )


def _zero_pruned(tree: Any, keep: dict[str, Any]) -> Any:
    """Returns ``tree`` with zeros where pruned."""
    flat = flatten(tree)
    zeroed = {path: zero_pruned(flat.leaves[path], mask) for path, mask in keep.items()}
    return flat.rebuild({**flat.leaves, **zeroed})


def zero_moments(state: Any, params: dict[str, Any], keep: dict[str, Any]) -> Any:
    """Returns an optimizer's state with zeros where pruned, in what it holds of a parameter."""
    flat, zeroed = flatten(state), {}
    for path, leaf in flat.leaves.items():
        name = _longest_end(path, params)
        # Integers count steps, also of a parameter that is a scalar.
        moments = jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
        if name in keep and moments and jnp.shape(leaf) == params[name].shape:
            zeroed[path] = zero_pruned(leaf, keep[name])
    return flat.rebuild({**flat.leaves, **zeroed})


def _longest_end(path: str, names: Collection[str]) -> str | None:
    """Returns the longest of ``names`` that ``path`` ends in, whole keys only."""
    keys = path.split(".")
    ends = (".".join(keys[i:]) for i in range(len(keys) + 1))
    return next((end for end in ends if end in names), None)


def _to_zero(updates: Any, params: Any, keep: dict[str, Any]) -> Any:
    tree, weights = flatten(updates), flatten(params).leaves
    closed = {
        path: by_numpy(_towards_zero, tree.leaves[path], weights[path], keep[path]) for path in keep
    }
    return tree.rebuild({**tree.leaves, **closed})


def _towards_zero(update: Any, weight: Any, mask: Any) -> Any:
    # In the dtype of their sum: a float32 weight rounded to a bfloat16 update would leave a rest.
    dtype = jnp.promote_types(update.dtype, weight.dtype)
    return chosen(spread_mask(mask, weight), update.astype(dtype), -weight.astype(dtype))
