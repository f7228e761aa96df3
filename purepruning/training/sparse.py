"""Sparse from the first step on: connections go and others grow, their number stays.

One update of masks (:func:`rewire`) serves all of it: what goes is small, and what grows is drawn
at random (SET) or has a large gradient (RigL). :func:`sparse_training` does it in an Optax chain,
``purepruning_interop.torch.sparse_training`` behind the steps of a torch optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from purepruning.arguments import (
    fraction,
    instance,
    is_finite,
    missing,
    one_of,
    scalar,
    shown,
    whole_number,
)
from purepruning.arrays import (
    by_numpy,
    has_values,
    int32,
    is_array,
    is_concrete,
    is_torch,
    namespace,
)
from purepruning.config.config import Config, check_config, single_count
from purepruning.counts import counts_of
from purepruning.layers import Layer
from purepruning.masks import by_path, expand, spread_mask
from purepruning.random_bits import key_words, noise, own_words
from purepruning.selection.criterion import Criterion, by_name
from purepruning.selection.keys import Piece
from purepruning.selection.prune import checked_counts, prune
from purepruning.training.keep_pruned import keep_pruned, zero_moments
from purepruning.training.masks_in_state import KeepPrunedState
from purepruning.trees import flatten
from purepruning.types import Masks, Params


def rewire(
    params: Params, grads: Any, masks: Masks, config: Config, moves: Mapping[str, Any], key: Any = 0
) -> Masks:
    r"""Returns masks in which of every layer some connections went and as many others grew.

    Of the connections there are, the ``moves`` of smallest $|w|$ go. Then as many grow where there
    is none: those of largest $|g|$ (RigL), or, without gradients, at random by the key (SET). What
    just went takes part, and may grow again. So every layer keeps exactly its number of weights,
    that of ``masks``, which must be what ``config`` leaves. Ties by position: lower ones are first
    to go and last to grow.

    Evci et al. 2020, arXiv:1911.11134 (RigL); Mocanu et al. 2018, arXiv:1707.04780 (SET).

    Args:
        params: the weights; what is pruned is not looked at.
        grads: the dense gradients, in the same tree; or None to draw at random.
        masks: the connections there are.
        config: the resolved rules, of layer scope and single weights.
        moves: by pool, how many connections change: an integer, maybe traced; 0 changes nothing.
        key: a random key, of which other layers draw other connections.

    Raises:
        KeyError, TypeError, ValueError: as :func:`purepruning.prune`; or the config is of another
            scope or granularity; or a pool has no number of moves.

    >>> import jax.numpy as jnp
    >>> import purepruning as pp
    >>> params = {"w": jnp.array([[5.0, 1.0, 0.0, 0.0]])}
    >>> layer = pp.make_layer(params, "w", "Linear", out_axes=1, in_axes=0)
    >>> config = pp.resolve(0.5, [layer])
    >>> masks = pp.level(params, None, config)
    >>> grads = {"w": jnp.array([[0.0, 1.0, 2.0, -3.0]])}
    >>> rewire(params, grads, masks, config, {"w": 1})["w"].tolist()
    [[True, False, False, True]]
    """
    check_rewired("rewire", config)
    instance(moves, Mapping, "rewire: moves", "a mapping from pool names to numbers")
    for pool in config.pools:
        if pool.name not in moves:
            message = f"rewire: moves have no {pool.name!r}, a pool of the config"
            raise KeyError(missing(message, pool.name, moves))
    known = checked_counts("rewire: config", config)
    counts = {name: count + moves[name] for name, count in known.items()}
    dropping = config.with_counts(counts).with_masks(masks)
    left = prune(_DROP, params, None, dropping)
    leaves, kept = flatten(params).leaves, by_path(left, params)
    slopes = None if grads is None else flatten(grads).leaves
    words = key_words(key)
    given: dict[str, Any] = {}
    for layer in config.layers:
        weight = leaves[layer.weight]
        whole = spread_mask(kept[layer.weight], weight)
        if slopes is None:
            given[layer.name] = (whole, None, own_words(words, layer.name))
            continue
        given[layer.name] = (whole, _slope("rewire", layer.weight, slopes, weight), None)
    return prune(_GROW, params, given, config)


def _slope(where: str, path: str, slopes: Mapping[str, Any], weight: Any) -> Any:
    """Returns the gradient of a weight, checked."""
    if path not in slopes:
        raise KeyError(missing(f"{where}: gradients have no {path!r}", path, slopes))
    slope = slopes[path]
    fits = is_array(slope) and has_values(slope) and is_torch(slope) == is_torch(weight)
    if not fits or tuple(slope.shape) != tuple(weight.shape):
        raise ValueError(
            f"{where}: gradients: {path!r} must be an array of shape {tuple(weight.shape)}, as the "
            f"weight is, got {shown(slope)}"
        )
    return slope


def check_rewired(where: str, config: Config) -> None:
    """Raises unless the config is one whose layers each keep their number of weights."""
    check_config(where, config)
    if config.scope != "layer" or config.granularity != "element" or config.inverted:
        raise ValueError(
            f"{where} moves single weights within their layer, but the config has "
            f"granularity={config.granularity!r} and scope={config.scope!r}; resolve without them "
            "(pp.search.erk divides a total sparsity among layers)"
        )
    if config.masks:
        raise ValueError(f"{where}: config has masks of its own; give them as masks alone")


def moves_of(
    config: Config, begin_step: int, end_step: int, every: int, drop_fraction: float, decay: str
) -> dict[str, np.ndarray]:
    """Returns by pool how many connections change at each event, made on the host in float64."""
    steps = np.arange(begin_step, end_step + 1, every)
    along = steps / max(end_step, 1)
    share = np.full(len(steps), float(drop_fraction))
    if decay == "cosine":
        share = 0.5 * drop_fraction * (1 + np.cos(math.pi * along))
    elif decay == "linear":
        share = drop_fraction * (1 - along)
    tables = {}
    for pool in config.pools:
        last = single_count("sparse_training", pool, config.counts[pool.name])
        active = pool.size - last
        most = max(min(active - 1, last), 0)
        tables[pool.name] = np.minimum(counts_of(share, active), most).astype(np.int32)
    return tables


class SparseTrainingState(NamedTuple):
    """State of :func:`sparse_training`: arrays only.

    Attributes:
        step: updates so far.
        kept: the connections there are, and the state of the optimizer that moves them.
    """

    step: Any
    kept: KeepPrunedState


def sparse_training(
    config: Config,
    inner: optax.GradientTransformation,
    *,
    masks: Masks,
    grow: str = "gradient",
    end_step: int,
    begin_step: int = 0,
    every: int = 100,
    drop_fraction: float = 0.3,
    decay: str = "cosine",
    key: Any = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Returns an optimizer that trains sparse weights and moves their connections as it goes.

    ``inner`` takes its step on the connections there are (:func:`purepruning.keep_pruned`). From
    ``begin_step`` to ``end_step``, ``every`` so many steps, :func:`rewire` then moves a fraction of
    them,

    $$f_t = \tfrac{\alpha}{2} \Bigl(1 + \cos \frac{\pi t}{t_{end}}\Bigr),$$

    those of largest gradient at this step (``grow="gradient"``: RigL) or at random (``"random"``:
    SET); ``"none"`` is static sparse training. Connections that grow begin at zero, and so do
    their moments. Give the loss the parameters as they are: pruned ones are zero, and their
    gradients, which RigL needs, are not. RigL's code takes no optimizer step where it moves
    connections; here each step is one.

    All is in the state and counts are a table, so that it is compiled once; under ``jit`` a step
    that moves nothing costs no more than :func:`purepruning.keep_pruned`. Masks are read and
    replaced by :func:`purepruning.get_masks` and :func:`purepruning.set_masks`.

    Evci et al. 2020, arXiv:1911.11134; Mocanu et al. 2018, arXiv:1707.04780.

    Args:
        config: the resolved rules: how many weights each layer has; of layer scope
            (``pp.search.erk`` divides a total among layers).
        inner: the optimizer, such as ``optax.sgd(0.1, momentum=0.9)``.
        masks: the connections to begin with, such as ``pp.random_pruning(params, key, config)``.
        grow: ``"gradient"``, ``"random"`` or ``"none"``.
        end_step: the last step at which connections move; three quarters of the steps in the paper.
        begin_step: the first one.
        every: 100 in the paper.
        drop_fraction: $\alpha$, 0.3 in the paper.
        decay: ``"cosine"``, ``"linear"`` or ``"constant"``.
        key: random key of what grows at random.

    Raises:
        ValueError, TypeError: an option is wrong, or the config is of another scope or granularity.
        KeyError, ValueError: by ``init``, if the masks are not of ``params`` and ``config``.

    >>> import jax.numpy as jnp, optax
    >>> import purepruning as pp
    >>> params = {"w": jnp.array([[5.0, 1.0, 0.0, 0.0]])}
    >>> layer = pp.make_layer(params, "w", "Linear", out_axes=1, in_axes=0)
    >>> config = pp.resolve(0.5, [layer])
    >>> masks = pp.level(params, None, config)
    >>> tx = sparse_training(config, optax.sgd(0.5), masks=masks, end_step=4, drop_fraction=0.5)
    >>> grads, state = {"w": jnp.array([[0.0, 1.0, 2.0, -3.0]])}, tx.init(params)
    >>> updates, state = tx.update(grads, state, params)
    >>> optax.apply_updates(params, updates)["w"].tolist()
    [[5.0, 0.0, 0.0, 0.0]]
    >>> pp.get_masks(state, params)["w"].tolist()
    [[True, False, False, True]]
    """
    where = "sparse_training"
    check_rewired(where, config)
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(
            f"{where}: inner must be an Optax transform, such as optax.adam(1e-3), got "
            f"{type(inner).__name__}"
        )
    tables = checked_moves(where, config, grow, begin_step, end_step, every, drop_fraction, decay)
    words = jnp.stack([jnp.asarray(word, jnp.int32) for word in key_words(key)])
    keeper, closer = keep_pruned({}, inner), keep_pruned({})

    def init(params: Any) -> SparseTrainingState:
        check_masks(where, masks, params, config)
        whole = by_path(expand(masks, params), params)
        whole = {layer.weight: whole[layer.weight] for layer in config.layers}
        kept = keep_pruned(whole, inner).init(params)
        return SparseTrainingState(jnp.zeros((), jnp.int32), kept)

    def update(
        updates: Any, state: SparseTrainingState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, SparseTrainingState]:
        if params is None:
            raise ValueError(f"{where} needs the parameters: call update(updates, state, params)")
        instance(state, SparseTrainingState, f"{where}: state", "what init or update returned")
        step, grads = state.step, updates
        moved, kept = keeper.update(updates, state.kept, params, **extra_args)
        due = is_due(step, begin_step, end_step, every)
        if grow == "none":
            return moved, SparseTrainingState(step + 1, kept)

        def rewired() -> dict[str, Any]:
            weights = optax.apply_updates(params, moved)
            now = {n: entry(table, (step - begin_step) // every) for n, table in tables.items()}
            slopes = grads if grow == "gradient" else None
            found = rewire(weights, slopes, kept.masks, config, now, event_key(words, step))
            named = by_path(found, params)
            return {path: spread_mask(named[path], mask) for path, mask in kept.masks.items()}

        if is_concrete(due):
            new = rewired() if bool(due) else kept.masks
        else:
            new = jax.lax.cond(due, rewired, lambda: kept.masks)
        # What went goes to zero, and so do its moments.
        moved, _ = closer.update(moved, KeepPrunedState(new, ()), params)
        inner_state = zero_moments(kept.inner, flatten(params).leaves, new)
        return moved, SparseTrainingState(step + 1, KeepPrunedState(new, inner_state))

    return optax.GradientTransformationExtraArgs(init, update)


def checked_moves(
    where: str,
    config: Config,
    grow: str,
    begin_step: int,
    end_step: int,
    every: int,
    drop_fraction: float,
    decay: str,
) -> dict[str, np.ndarray]:
    """Returns the table of moves, from options that are checked."""
    one_of(f"{where}: grow", grow, ("gradient", "random", "none"))
    one_of(f"{where}: decay", decay, ("cosine", "linear", "constant"))
    whole_number(begin_step, f"{where}: begin_step", 0, 2**31 - 1)
    whole_number(end_step, f"{where}: end_step", begin_step, 2**31 - 1)
    whole_number(every, f"{where}: every", 1, 2**31 - 1)
    return moves_of(
        config,
        begin_step,
        end_step,
        every,
        fraction(drop_fraction, f"{where}: drop_fraction"),
        decay,
    )


def check_masks(where: str, masks: Any, params: Any, config: Config) -> None:
    """Raises unless masks leave every layer as many weights as the config does, where known."""
    named = by_path(masks, params)
    for pool in config.pools:
        for layer in pool.layers:
            if layer.weight not in named:
                raise KeyError(f"{where}: masks have none of layer {layer.name!r}")
            _check_count(where, layer, named[layer.weight], int(config.counts[pool.name]))


def _check_count(where: str, layer: Layer, mask: Any, pruned: int) -> None:
    if not is_concrete(mask):
        return
    whole = np.broadcast_to(np.asarray(mask.cpu() if is_torch(mask) else mask), layer.shape)
    inside = tuple(a for a in range(whole.ndim) if a not in layer.stack_axes)
    found = np.unique(np.sum(~whole, axis=inside))
    if found.tolist() != [pruned]:
        raise ValueError(
            f"{where}: masks prune {found.tolist()} weights of layer {layer.name!r}, and the "
            f"config {pruned}; make them with it, as by pp.random_pruning(params, key, config)"
        )


def is_due(step: Any, begin_step: int, end_step: int, every: int) -> Any:
    """Returns whether connections move at a step."""
    return (step >= begin_step) & (step <= end_step) & ((step - begin_step) % every == 0)


def entry(table: np.ndarray, at: Any) -> Any:
    """Returns one entry of a table, the nearest there is."""
    if is_concrete(at):
        return int(table[min(max(int(at), 0), len(table) - 1)])
    return jnp.asarray(table)[jnp.clip(at, 0, len(table) - 1)]


def event_key(words: Any, step: Any) -> Any:
    """Returns the key of one event: other words at every step."""
    xp = namespace(words)
    return xp.stack([words[0] ^ int32(xp, step, words), words[1]])


def sr_ste(grads: Any, params: Params, masks: Masks, *, decay: Any = 2e-4) -> Any:
    r"""Returns the gradients of sparse-refined straight-through training of N:M weights.

    $$\tilde g_i = g_i + \lambda\, (1 - m_i)\, w_i,$$

    with the gradients $g$ of the loss at the *masked* weights, all of them: they go straight
    through the mask, and a pull to zero on what is pruned keeps it from coming and going::

        masks = pp.level(params, None, config)  # with NM(keep=2, of=4)
        grads = jax.grad(loss)(pp.apply_masks(params, masks))
        updates, state = tx.update(sr_ste(grads, params, masks), state, params)

    Zhou et al. 2021, arXiv:2102.04010.

    Args:
        grads: gradients at the masked weights, a tree like ``params``.
        params: the dense weights.
        masks: as a pruner returned them.
        decay: $\lambda$, 2e-4 in the paper.

    Raises:
        KeyError, ValueError, TypeError: as :func:`purepruning.apply_masks`.
        KeyError: a gradient is missing.
        ValueError: a masked weight or its gradient is NaN or infinite, where values are known.
            Under ``jit`` and ``vmap`` what comes of it is too.
        TypeError: ``decay`` is of another framework than the parameters.

    >>> import jax.numpy as jnp
    >>> params, masks = {"w": jnp.array([4.0, 1.0])}, {"w": jnp.array([True, False])}
    >>> sr_ste({"w": jnp.array([0.5, 0.5])}, params, masks, decay=0.25)["w"].tolist()
    [0.5, 0.75]
    """
    leaves, tree = flatten(params).leaves, flatten(grads)
    keep = by_path(masks, params)
    like = next((leaves[path] for path in keep), None)
    decay = scalar(decay, "sr_ste: decay", zero=True, like=like)
    new = dict(tree.leaves)
    for path, mask in keep.items():
        weight, xp = leaves[path], namespace(leaves[path])
        if not has_values(weight) or not xp.isdtype(weight.dtype, "real floating"):
            raise TypeError(f"sr_ste: params: {path!r} must be floating, got {shown(weight)}")
        slope = _slope("sr_ste", path, new, weight)
        if not (is_finite(weight) and is_finite(slope)):
            raise ValueError(
                f"sr_ste: {path!r} is NaN or infinite in params or gradients; leave this step out"
            )
        new[path] = by_numpy(_pulled, slope, weight, mask, decay)
    return tree.rebuild(new)


def _pulled(slope: Any, weight: Any, mask: Any, decay: Any) -> Any:
    """Returns gradients that pull pruned weights towards zero."""
    xp = namespace(weight)
    pull = xp.where(spread_mask(mask, weight), 0.0, weight)
    return slope + xp.astype(pull * decay, slope.dtype)


def _element(weight: Any, layer_stats: Any) -> Piece:
    return Piece((weight,), _magnitude, indexed=False)


def _magnitude(arrays: tuple[Any, ...], index: Any, layer_stats: Any) -> Any:
    xp = namespace(arrays[0])
    return xp.abs(xp.astype(arrays[0], xp.float32))


def _growing(weight: Any, layer_stats: Any) -> Piece:
    whole, slope, words = layer_stats
    if words is None:
        return Piece((whole, slope), _by_gradient, indexed=False)
    return Piece((whole,), _by_chance, words)


def _by_gradient(arrays: tuple[Any, ...], index: Any, layer_stats: Any) -> Any:
    xp = namespace(arrays[0])
    return xp.where(arrays[0], math.inf, xp.abs(xp.astype(arrays[1], xp.float32)))


def _by_chance(arrays: tuple[Any, ...], index: Any, layer_stats: Any) -> Any:
    return namespace(arrays[0]).where(arrays[0], math.inf, noise(index, layer_stats))


_DROP = Criterion("rewire", element=_element)


_GROW = Criterion("rewire", element=_growing, of=by_name)
