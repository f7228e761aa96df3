r"""ADMM pruning: weights that training itself pulls towards the nearest pruned ones.

Minimising a loss over weights W of which only so many may be nonzero is split in two: W is trained
freely, Z is pruned, and U counts up what keeps them apart.

    state = admm.init(params, config)
    for each round:
        for each batch:    # any optimizer
            minimise loss(params) + admm.penalty(params, state, config, rho)
        state, residuals = admm.step(params, state, config, rho, pruner=pp.level)
    masks = admm.masks(params, state, config, pruner=pp.level)

Everything runs under ``jit``, ``vmap`` and ``jax.lax.scan``, and under ``torch.func``.

Zhang et al. 2018, arXiv:1804.03294; Boyd et al. 2011, "Distributed optimization and statistical
learning via the alternating direction method of multipliers", whose scaled form this is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from purepruning.arguments import function, instance, is_finite, missing, scalar, shown
from purepruning.arrays import (
    by_numpy,
    compiled,
    has_values,
    is_array,
    is_torch,
    namespace,
    stop_gradient,
)
from purepruning.config.config import Config, Pruner
from purepruning.layers import Layer
from purepruning.masks import masks_of_pruner
from purepruning.selection.prune import check_values, weights_of
from purepruning.trees import flatten
from purepruning.types import Array, Masks, Params, Stats


class State(NamedTuple):
    """What ADMM remembers of each pruned weight, by its path: float32, or float64 if it is.

    Attributes:
        z: the nearest weights that are pruned, as of the last :func:`step`.
        u: the scaled dual variable, the running sum of W - Z.
    """

    z: dict[str, Any]
    u: dict[str, Any]


class Residuals(NamedTuple):
    r"""How far ADMM is from converging: scalars, of all layers together and by layer name.

    Attributes:
        primal: $\lVert W - Z \rVert$, how far the weights are from being pruned.
        dual: $\lVert \rho (Z - Z_{before}) \rVert$, how far what they are pulled towards has moved.
        layer_primal, layer_dual: the same of every layer.
    """

    primal: Any
    dual: Any
    layer_primal: dict[str, Any]
    layer_dual: dict[str, Any]


def init(params: Params, config: Config) -> State:
    """Returns the state to begin with: Z a copy of the weights, U zero.

    Until the first :func:`step`, :func:`penalty` holds the weights where they are, as in NNI.

    Raises:
        KeyError, TypeError, ValueError: a layer's weight is missing from ``params``, of another
            shape or no float; or, where values are known, NaN or infinite.
    """
    where = "admm.init"
    weights = _weights(where, params, config)
    _refuse_non_finite(where, config, weights)
    return by_numpy(_start, {path: stop_gradient(w) for path, w in weights.items()})


def _start(weights: dict[str, Any]) -> State:
    z = {path: _float(w, copy=True) for path, w in weights.items()}
    return State(z, {path: namespace(x).zeros_like(x) for path, x in z.items()})


def penalty(params: Params, state: State, config: Config, rho: Any = 1e-4) -> Array:
    r"""Returns what to add to the loss while training, a scalar.

    $$\sum_l \frac{\rho_l}{2} \lVert W_l - Z_l + U_l \rVert^2$$

    over the layers of ``config``, with gradient $\rho_l (W_l - Z_l + U_l)$; none flows into the
    state. NNI 2.10 takes the fourth root of the sum of squares instead, whose gradient at the start
    is NaN, and its version 1 subtracts the gradient from the weights, whatever the learning rate.

    Args:
        params: the parameters.
        state: what :func:`init` or :func:`step` returned.
        config: the resolved rules.
        rho: positive; one number (which may be traced) for all layers, or a mapping that gives one
            for each layer's name. The default is NNI's.

    Raises:
        KeyError: a layer's weight is missing from ``params`` or from the state, the state has one
            that ``config`` does not prune, or ``rho`` names other layers.
        TypeError: ``state`` is no :class:`State`, or of the other framework; ``rho`` is no number.
        ValueError: another shape; ``rho`` is not positive and finite.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import purepruning as pp
    >>> params = {"w": jnp.array([[3.0, -1.0]])}
    >>> layer = pp.make_layer(params, "w", "Linear", out_axes=0, in_axes=1)
    >>> config = pp.resolve([{"sparsity": 0.5, "op_types": ["Linear"]}], [layer])
    >>> state, _ = step(params, init(params, config), config, pruner=pp.level)
    >>> value, grad = jax.value_and_grad(penalty)(params, state, config, 0.5)
    >>> float(value), grad["w"].tolist()  # pulled towards [3, 0] by both W - Z and U
    (1.0, [[0.0, -1.0]])
    """
    where = "admm.penalty"
    weights = _weights(where, params, config)
    _check_state(where, state, config, weights)
    rhos = _rho_of(where, rho, config, next(iter(weights.values()), 0))

    def of_all(weights: dict[str, Any], state: State, rhos: dict[str, Any]) -> Any:
        total: Any = 0.0
        for layer in config.layers:
            w = weights[layer.weight]
            z, u = (stop_gradient(part[layer.weight]) for part in state)
            gap = _float(w) - z + u
            total = total + _like(rhos[layer.name], gap) * 0.5 * namespace(w).sum(gap * gap)
        return total

    return by_numpy(of_all, weights, State(*state), rhos)


def step(
    params: Params,
    state: State,
    config: Config,
    rho: Any = 1e-4,
    *,
    pruner: Pruner,
    stats: Stats = None,
) -> tuple[State, Residuals]:
    r"""Returns the state after a round of training, and the residuals.

    $$Z \leftarrow \Pi(W + U), \qquad U \leftarrow U + W - Z$$

    The projection $\Pi$ keeps what ``pruner`` keeps of W + U, and puts zeros elsewhere. It is the
    Euclidean one, the nearest weights with so many units, as ADMM asks for,

    - with :func:`purepruning.level` for single weights in either scope, and for N:M;
    - with :func:`purepruning.l2_norm` for channels and blocks in layer scope, unless blocks are cut
      off at an edge: those are ranked as if they were whole.

    Other pruners are heuristics (NNI has ``l1_norm`` for channels), and so is global scope for
    units of different sizes, where a unit's place in the ranking and its size are two things. Only
    weights are split; a bias that follows its channel is pruned by the masks, in the end.

    Where residuals fall, W, Z and what is pruned settle; the problem is not convex, so that they
    need not. When ``rho`` is changed between steps, divide ``state.u`` by the factor.

    Args:
        params: the parameters after training with :func:`penalty`.
        state: the state before.
        config: the resolved rules.
        rho: as in :func:`penalty`; here only the dual residual depends on it.
        pruner: ``(params, stats, config) -> masks``.
        stats: what the pruner takes besides weights.

    Raises:
        KeyError, TypeError, ValueError: as :func:`penalty`, and whatever the pruner raises; W + U
            of a layer is NaN or infinite, where values are known (elsewhere the residuals are
            then NaN or infinite); the masks are none for these parameters.
    """
    where = "admm.step"
    function(pruner, f"{where}: pruner", "a function (params, stats, config) -> masks")
    weights = _weights(where, params, config)
    _check_state(where, state, config, weights)
    rhos = _rho_of(where, rho, config, next(iter(weights.values()), 0))
    weights = {path: stop_gradient(w) for path, w in weights.items()}
    u = {path: stop_gradient(state.u[path]) for path in weights}
    targets = by_numpy(_targets, weights, u)
    _refuse_non_finite(where, config, targets)
    keep = _masks_of(where, params, targets, stats, config, pruner)

    def split(keep: Any, targets: Any, weights: Any, z: Any, rhos: Any) -> tuple[State, Residuals]:
        new = State({}, {})
        primal, dual = {}, {}
        for layer in config.layers:
            path = layer.weight
            v = targets[path]
            parts = compiled(v, _split)(keep[path], v, _float(weights[path]), z[path])
            new.z[path], new.u[path], apart, moved = parts
            primal[layer.name], dual[layer.name] = apart, _like(rhos[layer.name], moved) * moved
        return new, Residuals(_together(primal), _together(dual), primal, dual)

    z = {path: stop_gradient(state.z[path]) for path in weights}
    return by_numpy(split, keep, targets, weights, z, rhos)


def _targets(weights: dict[str, Any], u: dict[str, Any]) -> dict[str, Any]:
    return {path: _float(w) + u[path] for path, w in weights.items()}


def masks(
    params: Params, state: State, config: Config, *, pruner: Pruner, stats: Stats = None
) -> Masks:
    """Returns the masks of the trained weights, ``pruner(params, stats, config)``: the last step.

    As in the paper and in NNI. Where ADMM has converged they keep what is nonzero in ``state.z``;
    where it has not, they are better than that. ``state`` is only looked at for whether it is of
    this model.

    Raises:
        KeyError, TypeError, ValueError: as :func:`step`.
    """
    where = "admm.masks"
    function(pruner, f"{where}: pruner", "a function (params, stats, config) -> masks")
    weights = _weights(where, params, config)
    _check_state(where, state, config, weights)
    _refuse_non_finite(where, config, weights)
    found = pruner(params, stats, config)
    masks_of_pruner(where, found, params, {x.name: x.weight for x in config.layers})
    return found


def _weights(where: str, params: Any, config: Config) -> dict[str, Any]:
    """Returns the weights that are pruned, by path, checked."""
    weights = weights_of(where, flatten(params).leaves, config)
    check_values(where, weights)
    return weights


def _check_state(where: str, state: Any, config: Config, weights: Mapping[str, Any]) -> None:
    instance(state, State, f"{where}: state", "what admm.init or admm.step returned")
    for part, arrays in state._asdict().items():
        instance(arrays, Mapping, f"{where}: state.{part}", "a dict of arrays by parameter path")
        for path in arrays:
            if path not in weights:
                message = f"{where}: state.{part} has {path!r}, which the config does not prune"
                raise KeyError(missing(message, path, weights))
        for layer in config.layers:
            _check_part(f"{where}: layer {layer.name!r}", part, layer, arrays, weights)


def _check_part(
    where: str, part: str, layer: Layer, arrays: Mapping[str, Any], weights: Mapping[str, Any]
) -> None:
    if layer.weight not in arrays:
        message = f"{where}: state.{part} has no {layer.weight!r}"
        raise KeyError(missing(message, layer.weight, arrays))
    array, weight = arrays[layer.weight], weights[layer.weight]
    if not is_array(array) or not has_values(array):
        raise TypeError(f"{where}: state.{part} must be an array, got {shown(array)}")
    shape = tuple(array.shape)
    if shape != layer.shape:
        raise ValueError(
            f"{where}: state.{part} has shape {shape}, but the weight {layer.shape}; is it the "
            "state of another model?"
        )
    if is_torch(array) != is_torch(weight):
        kinds = ["torch" if is_torch(x) else "JAX" for x in (array, weight)]
        raise TypeError(f"{where}: state.{part} is of {kinds[0]}, but the weight of {kinds[1]}")


def _rho_of(where: str, rho: Any, config: Config, like: Any) -> dict[str, Any]:
    """Returns the checked rho of every layer."""
    names = [layer.name for layer in config.layers]
    if not isinstance(rho, Mapping):
        rho = dict.fromkeys(names, scalar(rho, f"{where}: rho", like=like))
        return rho
    for name in rho:
        if name not in names:
            raise KeyError(missing(f"{where}: rho names no layer {name!r}", name, names))
    for name in names:
        if name not in rho:
            raise KeyError(f"{where}: rho has no number for layer {name!r}")
    return {name: scalar(rho[name], f"{where}: rho of layer {name!r}", like=like) for name in names}


def _masks_of(
    where: str, params: Any, targets: Mapping[str, Any], stats: Any, config: Config, pruner: Pruner
) -> dict[str, Any]:
    """Returns the masks by path, checked."""
    tree = flatten(params)
    masks = pruner(tree.rebuild({**tree.leaves, **targets}), stats, config)
    return masks_of_pruner(where, masks, params, {x.name: x.weight for x in config.layers})


def _refuse_non_finite(where: str, config: Config, arrays: Mapping[str, Any]) -> None:
    """Raises if an array is NaN or infinite somewhere, where values are known."""
    bad = [layer.name for layer in config.layers if not is_finite(arrays[layer.weight])]
    if bad:
        raise ValueError(
            f"{where}: weights of layer {', '.join(map(repr, bad))} are NaN or infinite"
        )


def _split(keep: Any, v: Any, w: Any, z: Any) -> tuple[Any, Any, Any, Any]:
    """Returns new z and u, the norm of W - Z, and that of the change of Z."""
    xp = namespace(v)
    nothing = xp.zeros_like(v)
    # U + W - Z is what the projection took away from U + W.
    new_z, new_u = xp.where(keep, v, nothing), xp.where(keep, nothing, v)
    return new_z, new_u, _norm(w - new_z), _norm(new_z - z)


def _norm(x: Any) -> Any:
    xp = namespace(x)
    return xp.sqrt(xp.sum(x * x))


def _together(norms: Mapping[str, Any]) -> Any:
    """Returns the norm of everything, from those of its parts; 0.0 if there are none."""
    squares = [norm * norm for norm in norms.values()]
    return namespace(squares[0]).sqrt(sum(squares[1:], squares[0])) if squares else 0.0


def _float(x: Any, *, copy: bool = False) -> Any:
    """Returns ``x`` in float32, or float64 if it is."""
    xp = namespace(x)
    return xp.astype(x, xp.float64 if x.dtype == xp.float64 else xp.float32, copy=copy)


def _like(rho: Any, x: Any) -> Any:
    """Returns rho so that it can be multiplied with ``x``."""
    if not hasattr(rho, "dtype"):
        return float(rho)
    xp = namespace(x)
    if is_torch(x) and not is_torch(rho):
        return float(rho)
    return xp.astype(xp.asarray(rho), x.dtype)
