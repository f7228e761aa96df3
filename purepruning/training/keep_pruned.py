"""Masks in an Optax chain: pruned weights stay exactly zero, whatever the optimizer does."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from purepruning.arguments import adapter_of, instance, is_number, missing, shown
from purepruning.arrays import by_numpy, chosen, copied, is_array, jax_array
from purepruning.masks import by_path, named_masks, spread_mask, zero_pruned
from purepruning.training.masks_in_state import KeepPrunedState, nodes
from purepruning.trees import flatten
from purepruning.types import Masks


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
        keep = masks_in(state, params)
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
            _check_numbers(updates, error)
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
        elif nodes(params, optax.MaskedNode):
            hint = (
                "optax.masked and optax.multi_transform hand on a part of the parameters; give the "
                "masks of these alone, or put it outside: keep_pruned(masks, optimizer)"
            )
        else:
            raise
        raise KeyError(f"{error.args[0]}; {hint}") from None


def masks_in(state: Any, params: Any) -> dict[str, Any]:
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
        if isinstance(weights[path], jax.ShapeDtypeStruct):
            raise TypeError(
                f"keep_pruned: params: {path!r} must be an array of numbers, got "
                f"{shown(weights[path])}; give the parameters themselves"
            )
        if update.shape != shape:
            raise ValueError(
                f"keep_pruned: updates: {path!r} has shape {tuple(update.shape)}, its parameter "
                f"{tuple(shape)}; give updates in the parameters' shapes"
            )


def _check_numbers(updates: Any, error: Exception) -> None:
    """Raises if the optimizer inside failed since an update, masked or not, is no array."""
    for path, update in flatten(updates).leaves.items():
        if not (is_array(update) or is_number(update)) or isinstance(update, jax.ShapeDtypeStruct):
            raise TypeError(
                f"keep_pruned: updates: {path!r} must be an array of numbers, got {shown(update)}; "
                "give the gradients of the parameters"
            ) from error


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
