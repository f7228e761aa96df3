"""Masks in the state of an Optax chain: where they lie, and reading and replacing them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from purepruning.arguments import missing
from purepruning.masks import by_path, whole_mask
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


def nodes(tree: Any, of: type | tuple[type, ...]) -> list[Any]:
    """Returns the outermost nodes of some types in a tree."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, of))
    return [leaf for leaf in leaves if isinstance(leaf, of)]


def get_masks(opt_state: Any, params: Params) -> Masks:
    """Returns the masks in :func:`keep_pruned`'s state, wherever it is, as a tree like ``params``.

    Of ``params`` only the structure matters. ``opt_state`` may be an ``nnx.Optimizer``, or
    ``nnx.state`` of one, in which states are plain mappings.

    Raises:
        ValueError: there is no such state, or another transform follows it in the chain.
        KeyError: a mask is for a parameter that is not in ``params``.

    >>> import jax.numpy as jnp, optax
    >>> from purepruning import keep_pruned
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
    >>> from purepruning import keep_pruned
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
    if last > 0 and any(nodes(part, _WITH_WEIGHTS) for part in parts[:last]):
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
