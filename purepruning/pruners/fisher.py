"""Pruning by the diagonal of the Fisher matrix: what the loss would feel to second order."""

from __future__ import annotations

from typing import Any

from purepruning.arguments import scalar
from purepruning.arrays import namespace
from purepruning.config.config import Config
from purepruning.pruners.of_gradients import totals_of
from purepruning.selection.criterion import Criterion, by_name, summed
from purepruning.selection.prune import prune
from purepruning.stats.accumulate import CompensatedSum, value
from purepruning.stats.gradients import GradientStats
from purepruning.types import Masks, Params


def fisher(params: Params, stats: GradientStats, config: Config, *, damping: Any = 0.0) -> Masks:
    r"""Returns masks that prune the units whose removal raises the loss least, to second order.

    $$s_u = \frac 12 \sum_{i \in u} w_i^2 \Bigl( \lambda + \frac 1N \sum_{t=1}^N g_{t,i}^2 \Bigr)$$

    with the diagonal of the empirical Fisher matrix in the place of the Hessian's (optimal brain
    damage, at a minimum). ``stats`` are those of :mod:`purepruning.stats.gradients` (``"squares"``
    of single weights), one update for each example or small batch: gradients of their mean give
    another matrix. Without damping $\lambda$ the order within a layer is that of
    :func:`purepruning.taylor_fo`; scores of weights that have not been fed are then all zero, and
    with it go by magnitude. For configs of any granularity.

    LeCun et al. 1989, "Optimal Brain Damage"; Theis et al. 2018, arXiv:1801.05787.

    Raises:
        TypeError: ``stats`` are no gradient statistics, or of another framework; so is ``damping``.
        ValueError: ``damping`` is negative, or has axes.
        KeyError, ValueError: they are empty, or not of single weights of the layers of ``config``.
            See also :func:`purepruning.prune` for the form of the masks, ties, NaN and errors.

    >>> import jax.numpy as jnp
    >>> import purepruning as pp
    >>> from purepruning.stats import gradients
    >>> params, grads = {"fc": jnp.array([[1.0, -2.0]])}, {"fc": jnp.array([[-3.0, 1.0]])}
    >>> layer = pp.make_layer(params, "fc", "Linear", out_axes=1, in_axes=0)
    >>> config = pp.resolve(0.5, [layer])
    >>> stats = gradients.update(gradients.init(params, config), params, grads, config)
    >>> fisher(params, stats, config)["fc"].tolist(), fisher(
    ...     params, stats, config, damping=9.0
    ... )["fc"].tolist()
    ([[True, False]], [[False, True]])
    """
    totals = totals_of("fisher", params, stats, config, "squares")
    like = next((total.high for total in totals.values()), None)
    damping = scalar(damping, "fisher: damping", zero=True, like=like)
    for layer in config.layers:
        if tuple(totals[layer.name].high.shape) != layer.shape:
            raise ValueError(
                f"fisher: the statistics of layer {layer.name!r} are of other units than single "
                "weights; make them with a config without granularity"
            )
    given = {name: (total, value(stats.steps), damping) for name, total in totals.items()}
    return prune(_FISHER, params, given, config)


def _element(weight: Any, layer_stats: tuple[CompensatedSum, Any, Any]) -> Any:
    xp = namespace(weight)
    total, steps, damping = layer_stats
    weight = xp.astype(weight, xp.float32)
    return 0.5 * (value(total) / steps + weight * weight * damping)


_unit = summed(_element)


_FISHER = Criterion(
    "fisher", element=_element, channel=_unit, block=_unit, of=by_name, on_shards=True
)
