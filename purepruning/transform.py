"""Masks in an Optax chain: pruned weights stay exactly zero, whatever the optimizer does."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from purepruning.layers import missing
from purepruning.masks import by_path, spread_mask, zero_pruned
from purepruning.namespace import flatten


class KeepPrunedState(NamedTuple):
    """State of :func:`keep_pruned`: arrays only.

    Attributes:
        masks: mask by parameter path; parameters that are not pruned have none.
        inner: state of the optimizer that is kept off pruned weights; ``()`` if there is none.
    """

    masks: dict[str, Any]
    inner: Any


def keep_pruned(
    masks: Any, inner: optax.GradientTransformation | optax.MultiSteps | None = None
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

    In the first, the optimizer sees dense gradients, and its moments of pruned weights live on. In
    the second it sees zero gradients and parameters there, and its moments are set to zero after
    each step: global norms, factored moments and gradient accumulators have no part of pruned
    weights, and a weight that comes back starts anew. State that has not the parameter's shape
    (Adafactor's rows and columns) is left alone.

    Args:
        masks: tree of booleans with None where nothing is pruned, matched to parameters by path.
        inner: optimizer to keep off pruned weights.

    Raises:
        KeyError, ValueError, TypeError: by ``init``, as :func:`purepruning.apply_masks`.
        ValueError: by ``update``, without ``params``.
        KeyError: by ``update``, if params or updates lack a masked parameter.

    >>> import jax.numpy as jnp, optax
    >>> params = {"w": jnp.array([1.0, 2.0]), "b": jnp.array([3.0])}
    >>> masks = {"w": jnp.array([True, False]), "b": None}
    >>> tx = optax.chain(optax.sgd(0.5), keep_pruned(masks))
    >>> updates, state = tx.update({"w": jnp.ones(2), "b": jnp.ones(1)}, tx.init(params), params)
    >>> optax.apply_updates(params, updates)["w"].tolist()
    [0.5, 0.0]
    """
    if isinstance(inner, optax.MultiSteps):
        inner = optax.GradientTransformationExtraArgs(inner.init, inner.update)
    elif inner is not None:
        inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> KeepPrunedState:
        leaves = flatten(params).leaves
        # optax.tree_utils.tree_map_params asks for a state of no parameters.
        keep = by_path(masks, leaves) if leaves else by_path(masks, masks)
        copies = {path: jnp.array(mask, copy=True) for path, mask in keep.items()}
        return KeepPrunedState(copies, () if inner is None else inner.init(params))

    def update(
        updates: Any, state: KeepPrunedState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, KeepPrunedState]:
        if params is None:
            raise ValueError(
                "keep_pruned needs the parameters: call update(updates, state, params)"
            )
        keep = by_path(state.masks, params)
        _check_updates(updates, keep)
        inner_state = state.inner
        if inner is not None:
            leaves = flatten(params).leaves
            shapes = {path: leaves[path].shape for path in keep}
            updates, inner_state = inner.update(
                _zero_pruned(updates, keep, shapes),
                inner_state,
                _zero_pruned(params, keep, shapes),
                **extra_args,
            )
            inner_state = optax.tree_utils.tree_map_params(
                inner,
                lambda moments: _zero_pruned(moments, keep, shapes),
                inner_state,
                is_leaf=lambda _: True,  # whole trees of moments, to match them by path
            )
        return _to_zero(updates, params, keep), KeepPrunedState(state.masks, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def set_masks(opt_state: Any, masks: Any) -> Any:
    """Returns ``opt_state`` with other masks in :func:`keep_pruned`'s state, wherever it is.

    Pure, and traceable. The state keeps its shapes, so that nothing is compiled again; a weight
    that comes back is trained from zero. A parameter that ``masks`` leave out is kept whole. With
    ``nnx.Optimizer``: ``optimizer.opt_state = nnx.data(set_masks(optimizer.opt_state, masks))``.

    Raises:
        KeyError: a mask is for a parameter that has none in the state; begin with
            ``keep_pruned(expand(masks, params))`` to be free later.
        ValueError: there is no such state; or a mask does not broadcast to the one it replaces.
        TypeError: a mask is not boolean.

    >>> import jax.numpy as jnp, optax
    >>> tx = optax.chain(optax.sgd(0.1), keep_pruned({"w": jnp.array([True, True])}))
    >>> state = set_masks(tx.init({"w": jnp.ones(2)}), {"w": jnp.array([True, False])})
    >>> state[-1].masks
    {'w': Array([ True, False], dtype=bool)}
    """
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
        values = {
            path: jnp.array(jnp.broadcast_to(new.get(path, True), mask.shape), copy=True)
            for path, mask in old.leaves.items()
        }
        return KeepPrunedState(old.rebuild(values), _map_states(replace, node.inner))

    return _map_states(replace, opt_state)


def _states(opt_state: Any) -> list[KeepPrunedState]:
    found = [leaf for leaf in jax.tree.leaves(opt_state, is_leaf=_is_ours) if _is_ours(leaf)]
    return found + [deeper for state in found for deeper in _states(state.inner)]


def _map_states(function: Any, opt_state: Any) -> Any:
    return jax.tree.map(function, opt_state, is_leaf=_is_ours)


def _is_ours(node: Any) -> bool:
    return isinstance(node, KeepPrunedState)


def _check_updates(updates: Any, keep: dict[str, Any]) -> None:
    leaves = flatten(updates).leaves
    for path in keep:
        if path not in leaves:
            raise KeyError(missing(f"keep_pruned: there is no update for {path!r}", path, leaves))


def _zero_pruned(tree: Any, keep: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> Any:
    """Returns ``tree`` with zeros where pruned, in the leaves of their parameter's shape."""
    flat = flatten(tree)
    zeroed = {
        path: zero_pruned(leaf, keep[path])
        for path, leaf in flat.leaves.items()
        if path in keep and leaf.shape == shapes[path]
    }
    return flat.rebuild({**flat.leaves, **zeroed})


def _to_zero(updates: Any, params: Any, keep: dict[str, Any]) -> Any:
    tree, weights = flatten(updates), flatten(params).leaves
    closed = {path: _towards_zero(tree.leaves[path], weights[path], keep[path]) for path in keep}
    return tree.rebuild({**tree.leaves, **closed})


def _towards_zero(update: Any, weight: Any, mask: Any) -> Any:
    # In the dtype of their sum: a float32 weight rounded to a bfloat16 update would leave a rest.
    dtype = jnp.promote_types(update.dtype, weight.dtype)
    mask = spread_mask(mask, weight)
    return jnp.where(mask, update.astype(dtype), -weight.astype(dtype))
