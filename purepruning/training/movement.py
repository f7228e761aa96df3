r"""Movement pruning: what matters is where training moves a weight, not where it is.

Every unit has a score that is trained together with the weights. The model sees the weights of the
highest scores; scores get the gradient as if all were seen, and rise where weights grow.

    scores = movement.init(params, config)
    configs = movement.schedule(config, steps, begin_step=1000, end_step=9000)
    for step, batch in enumerate(batches):    # any optimizers
        now = movement.at(configs, step)
        minimise loss(movement.apply(params, scores, now)) over params and scores
    masks = movement.masks(params, scores, config)

That is the hard form, which keeps exact counts. The soft form keeps the scores above a threshold,
and presses them down: call ``apply`` and ``masks`` with a ``threshold``, scaled by :func:`ramp`
while training, and add :func:`penalty` times a number to the loss.

Everything runs under ``jit``, ``vmap`` and ``jax.lax.scan``, and under ``torch.func``
(``functional_call(model, movement.apply(...), inputs)``).

Sanh et al. 2020, arXiv:2005.07683; in blocks, rows and columns: Lagunas et al. 2021,
arXiv:2109.04838. NNI's Movement pruner trains the scores with an Adam of its own, at 0.01; here the
caller chooses.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from purepruning.arguments import instance, missing, scalar, shown
from purepruning.arrays import (
    array_like,
    by_numpy,
    has_values,
    int32,
    iota,
    is_array,
    is_concrete,
    is_torch,
    namespace,
    stop_gradient,
)
from purepruning.config.config import Config
from purepruning.granularity import NM, Grid, any_of, fold, grid, spread
from purepruning.layers import Layer
from purepruning.masks import by_path, spread_mask, zero_pruned
from purepruning.selection.biases import with_biases
from purepruning.selection.criterion import Criterion, by_name
from purepruning.selection.keys import Piece
from purepruning.selection.prune import check_values, prune, weights_of
from purepruning.shards import zeros_as
from purepruning.training.movement_schedule import at as at
from purepruning.training.movement_schedule import ramp as ramp
from purepruning.training.movement_schedule import schedule as schedule
from purepruning.trees import flatten
from purepruning.types import Array, Masks, Params


def init(params: Params, config: Config) -> dict[str, Any]:
    """Returns scores of zero for every unit that ``config`` may prune, float32 by layer name.

    Where units are single weights (elements, N:M) scores have the weight's shape, else
    ``(stacked, units)``: a row for each of the layers stacked in a layer, one row otherwise.

    Raises:
        KeyError, TypeError, ValueError: as :func:`purepruning.prune` says of parameters.
    """
    weights = weights_of("movement.init", flatten(params).leaves, config, sharded=True)
    return {
        layer.name: zeros_as(weights[layer.weight], _shape(layer, config))
        for layer in config.layers
    }


def masks(
    params: Params, scores: Mapping[str, Any], config: Config, threshold: Any = None
) -> Masks:
    r"""Returns masks of the units with the highest scores.

    Without a threshold, all but as many as the counts of ``config`` say, for any scope and
    granularity: a pruner as any other, whose statistics are the scores. With one, in layer scope,

    $$\sigma(s_u) > \tau$$

    and the highest of each layer (the last of equals), unless its rule says ``allow_empty``; counts
    have no meaning then. Scores are compared with $\log(\tau / (1 - \tau))$ in float32, which under
    ``jit`` or for arrays is rounded as the framework does. NNI 2.10 keeps what is above the
    threshold, NNI 3.0 also what equals it.

    Args:
        params: the parameters; only their shapes matter.
        scores: as :func:`init` returns them, trained.
        config: the resolved rules.
        threshold: in [0, 1), and may be traced.

    Raises:
        KeyError, TypeError, ValueError: scores are missing, of another shape or framework, or no
            floats; they are NaN, where values are known (elsewhere NaN is kept); the threshold is
            no number in [0, 1), or comes with global scope or N:M. See also
            :func:`purepruning.prune`.

    >>> import jax.numpy as jnp
    >>> import purepruning as pp
    >>> params = {"fc.w": jnp.ones((3, 2))}
    >>> layer = pp.make_layer(params, "fc.w", "Linear", name="fc", out_axes=0, in_axes=1)
    >>> rules = [{"sparsity": 0.4, "op_types": ["Linear"]}]
    >>> config = pp.resolve(rules, [layer], granularity="output_channel")
    >>> scores = {"fc": jnp.array([[0.5, -1.0, -0.5]])}
    >>> masks(params, scores, config)["fc.w"].tolist()
    [[True], [False], [True]]
    >>> masks(params, scores, config, threshold=0.5)["fc.w"].tolist()
    [[True], [False], [False]]
    """
    where = "movement.masks"
    _check_scores(where, params, scores, config, sharded=threshold is None)
    return _masks(where, params, scores, config, threshold)


def apply(
    params: Params, scores: Mapping[str, Any], config: Config, threshold: Any = None
) -> Params:
    r"""Returns ``params`` as the model is to see them: zeros where pruned, scores attached.

    The value is that of ``apply_masks(params, masks(params, scores, config, threshold))``.
    Gradients with respect to the weights are those of kept weights; with respect to the scores they
    go straight through the mask, to pruned units too:

    $$W' = W \odot M(S), \qquad
      \frac{\partial L}{\partial s_u} := \sum_{i \in u} \frac{\partial L}{\partial W'_i} W_i$$

    A descent step thus raises the score of what moves away from zero. An infinite score gets none:
    it keeps a unit, or prunes it, for good.

    Args:
        params, scores, config, threshold: as in :func:`masks`.

    Raises:
        KeyError, TypeError, ValueError: as :func:`masks`; scores of a layer that is not pruned.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import purepruning as pp
    >>> params, scores = {"w": jnp.array([[2.0, -3.0]])}, {"w": jnp.array([[1.0, 0.0]])}
    >>> layer = pp.make_layer(params, "w", "Linear", out_axes=0, in_axes=1)
    >>> config = pp.resolve([{"sparsity": 0.5, "op_types": ["Linear"]}], [layer])
    >>> def loss(params, scores):
    ...     return jnp.sum(apply(params, scores, config)["w"] * jnp.array([[10.0, 100.0]]))
    >>> loss(params, scores).item()
    20.0
    >>> by_weight, by_score = jax.grad(loss, argnums=(0, 1))(params, scores)
    >>> by_weight["w"].tolist(), by_score["w"].tolist()
    ([[10.0, 0.0]], [[20.0, -300.0]])
    """
    where = "movement.apply"
    check_values(where, _check_scores(where, params, scores, config))
    for name in scores:
        names = [layer.name for layer in config.layers]
        if name not in names:
            message = f"{where}: scores name {name!r}, which the config does not prune"
            raise KeyError(missing(message, name, names))
    found = flatten(_masks(where, params, scores, config, threshold)).leaves
    tree = flatten(params)
    seen = {path: zero_pruned(tree.leaves[path], mask) for path, mask in found.items()}
    for layer in config.layers:
        weight = tree.leaves[layer.weight]
        score = array_like(weight, scores[layer.name])
        g = grid(layer, config.granularity) if _in_units(config) else None
        attached = functools.partial(_attached, g=g)
        seen[layer.weight] = by_numpy(attached, seen[layer.weight], weight, score)
    return tree.rebuild({**tree.leaves, **seen})


def _attached(seen: Any, weight: Any, score: Any, *, g: Grid | None) -> Any:
    """Returns what the model sees of a weight, with the derivative of its scores."""
    xp = namespace(weight)
    # Zero in value, one in derivative, spread over the weights of each unit. The product is of
    # float32, so that the sums that gradients are made of are.
    through = _through(score)
    if g is not None:
        through = spread(xp, through, g)
    through = through * xp.astype(stop_gradient(weight), xp.float32)
    return seen + xp.astype(through, weight.dtype)


def penalty(scores: Mapping[str, Any]) -> Array:
    r"""Returns the regulariser of the soft form, a float32 scalar in [0, 1].

    $$\frac{1}{L} \sum_l \operatorname{mean}_u \sigma(s_{l,u})$$

    To be added to the loss, times a number, and times :func:`ramp` in NNI; it presses scores below
    the threshold where the loss does not hold them up.

    Raises:
        ValueError: there are no scores.

    >>> import jax.numpy as jnp
    >>> penalty({"one": jnp.zeros((2, 3)), "two": jnp.array([[-jnp.inf, jnp.inf, jnp.inf]])}).item()
    0.583
    """
    instance(scores, Mapping, "movement.penalty: scores", "a dict of arrays by layer name")
    if not scores:
        raise ValueError("movement.penalty: there are no scores")
    if len({is_torch(score) for score in scores.values()}) > 1:
        raise TypeError("movement.penalty: scores are of two frameworks, JAX and torch")
    for name, score in scores.items():
        if not is_array(score) or not has_values(score):
            raise TypeError(
                f"movement.penalty: scores of layer {name!r} must be an array, got {shown(score)}"
            )
        xp = namespace(score)
        if not xp.isdtype(score.dtype, "real floating"):
            raise TypeError(
                f"movement.penalty: scores of layer {name!r} must be floating, got {score.dtype}"
            )
    return by_numpy(_mean, dict(scores))


def _mean(scores: dict[str, Any]) -> Any:
    """Returns the mean over layers of the mean of the sigmoids of their scores."""
    total: Any = 0.0
    for score in scores.values():
        xp = namespace(score)
        # 1 / (1 + exp(-s)), which does not overflow.
        total = total + xp.mean(0.5 + 0.5 * xp.tanh(0.5 * xp.astype(score, xp.float32)))
    return total / len(scores)


# What scores are, and the selection by them.
def _in_units(config: Config) -> bool:
    """Whether scores are ``(stacked, units)``, not of the weights' shapes."""
    return not (config.granularity == "element" or isinstance(config.granularity, NM))


def _shape(layer: Layer, config: Config) -> tuple[int, ...]:
    if not _in_units(config):
        return layer.shape
    g = grid(layer, config.granularity)
    return g.n_stacked, g.n_units


def _check_scores(
    where: str, params: Any, scores: Any, config: Config, *, sharded: bool = False
) -> dict[str, Any]:
    """Returns the weights that are pruned, by path."""
    weights = weights_of(where, flatten(params).leaves, config, sharded=sharded)
    instance(scores, Mapping, f"{where}: scores", "a dict by layer name, as movement.init returns")
    for layer in config.layers:
        if layer.name not in scores:
            message = f"{where}: scores have no layer {layer.name!r}"
            raise KeyError(missing(message, layer.name, scores))
        score, wanted = scores[layer.name], _shape(layer, config)
        what = f"{where}: scores of layer {layer.name!r}"
        if not is_array(score) or not has_values(score):
            raise TypeError(f"{what} must be an array, got {shown(score)}")
        if not namespace(score).isdtype(score.dtype, "real floating"):
            raise TypeError(f"{what} must be floating, got {score.dtype}")
        if tuple(score.shape) != wanted:
            raise ValueError(
                f"{what} have shape {tuple(score.shape)}, but the layer needs {wanted}; are they "
                "of another model, or of another granularity?"
            )
        weight = weights[layer.weight]
        if is_torch(score) != is_torch(weight):
            raise TypeError(
                f"{what} are {shown(score)}, but its weight is {shown(weight)}; make them by "
                "movement.init of the parameters"
            )
    return weights


def _checked_threshold(where: str, threshold: Any, config: Config, like: Any) -> Any:
    """Returns the threshold of scores for that of their sigmoids."""
    if isinstance(config.granularity, NM):
        raise ValueError(f"{where}: a threshold has no meaning for {config.granularity}")
    if config.scope != "layer":
        raise ValueError(
            f"{where}: a threshold compares no layers; resolve the config with scope='layer'"
        )
    scalar(threshold, f"{where}: threshold", zero=True, below=1, like=like)
    if is_torch(like) and not is_torch(threshold):
        threshold = float(threshold)
    if not hasattr(threshold, "dtype") or isinstance(threshold, np.generic | np.ndarray):
        t = float(threshold)
        return float(np.float32(math.log(t) - math.log1p(-t))) if t else -math.inf
    xp = namespace(threshold)
    t = xp.astype(threshold, xp.float32)
    return xp.log(t) - xp.log1p(-t)


def _masks(where: str, params: Any, scores: Any, config: Config, threshold: Any) -> Any:
    leaves = flatten(params).leaves
    constant = {
        layer.name: array_like(leaves[layer.weight], stop_gradient(scores[layer.name]))
        for layer in config.layers
    }
    if threshold is None:
        return prune(_MOVEMENT._replace(name=where), params, constant, config)
    like = next(iter(constant.values()), 0)
    cut = _checked_threshold(where, threshold, config, like)
    return _soft(where, params, constant, config, cut)


def _soft(where: str, params: Any, scores: Mapping[str, Any], config: Config, cut: Any) -> Any:
    if config.inverted:
        raise ValueError(f"{where}: a threshold has no meaning for inverted scores")
    if config.allocation is not None:
        raise ValueError(f"{where}: a threshold looks at every channel alone, not at coupled ones")
    tree = flatten(params)
    before = by_path(config.masks, tree.leaves) if config.masks else {}
    weights = {x.name: tree.leaves[x.weight] for x in config.layers if x.weight in before}

    def kept(scores: Any, weights: Any, before: Any, cut: Any) -> dict[str, Any]:
        found, nan = {}, []
        for pool in config.pools:
            for layer in pool.layers:
                g = grid(layer, config.granularity)
                xp = namespace(scores[layer.name])
                score = xp.astype(scores[layer.name], xp.float32)
                if not _in_units(config):
                    score = fold(xp, score, g, xp.sum)  # of one weight each: only the order changes
                if layer.weight in before:
                    whole = spread_mask(before[layer.weight], weights[layer.name])
                    score = xp.where(fold(xp, whole, g, any_of), score, -math.inf)
                keep = ~(score <= cut)  # what is NaN under jit stays to be seen
                if not pool.allow_empty:
                    keep = keep | _highest(xp, score)
                found[layer.weight] = spread(xp, keep, g)
                flag = xp.any(xp.isnan(score))
                if is_concrete(flag) and bool(flag):
                    nan.append(layer.name)
        if nan:
            raise ValueError(f"{where}: scores of layer {', '.join(map(repr, nan))} are NaN")
        return with_biases(found, tree, config)

    return tree.rebuild(by_numpy(kept, scores, weights, before, cut))


def _highest(xp: Any, score: Any) -> Any:
    """Returns which unit of each row ranks highest: of equal ones the last."""
    n = score.shape[1]
    place = n - 1 - xp.argmax(xp.flip(score, axis=1), axis=1, keepdims=True)
    return xp.reshape(iota(xp, n, score), (1, n)) == int32(xp, place, score)


def _through(score: Any) -> Any:
    """Returns zeros whose derivative by ``score`` is one; zero where it is infinite or NaN."""
    xp = namespace(score)
    score = xp.astype(score, xp.float32)
    score = xp.where(xp.isfinite(score), score, xp.zeros_like(score))
    return score - stop_gradient(score)


def _element(weight: Any, score: Any) -> Piece:
    return Piece((score,), _first, indexed=False)


def _first(arrays: tuple[Any, ...], index: Any, layer_stats: Any) -> Any:
    xp = namespace(arrays[0])
    return xp.astype(arrays[0], xp.float32)


def _unit(weight: Any, score: Any, g: Grid) -> Any:
    return namespace(score).astype(score, namespace(score).float32)


_MOVEMENT = Criterion(
    "movement",
    element=_element,
    channel=_unit,
    block=_unit,
    of=by_name,
    on_shards=True,
)
