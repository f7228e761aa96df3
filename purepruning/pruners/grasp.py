"""GraSP: what keeps the gradient flowing, before any training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from purepruning.arguments import function
from purepruning.arrays import along, grad
from purepruning.config.config import Config
from purepruning.pruners.of_gradients import of_elements, of_units, totals_of
from purepruning.selection.criterion import Criterion, by_name
from purepruning.selection.prune import prune
from purepruning.stats.gradients import GradientStats
from purepruning.types import Masks, Params


def grasp(params: Params, stats: GradientStats, config: Config) -> Masks:
    r"""Returns masks that prune what takes least from the gradient flow, or adds to it if removed.

    Without weight i the squared norm of the gradient changes, to first order, by $2 S_i$,

    $$S_i = -w_i (H g)_i;$$

    the weights of largest $S$ go, so that the score of a unit is $\sum_{i \in u} w_i (H g)_i$.
    ``stats`` are those of :mod:`purepruning.stats.gradients` (``"signed"``), given $H g$ of
    :func:`hessian_gradient` as gradients. The paper divides logits by 200 in the loss, takes ten
    examples of each class, and ranks all weights together (``scope="global"``).

    Wang et al. 2020, arXiv:2002.07376. Its code keeps the weight at the threshold.

    Raises:
        TypeError: ``stats`` are no gradient statistics, or of another framework.
        KeyError, ValueError: they are empty, not of the layers and units of ``config``, or were
            made without ``keep=["signed"]``. See also :func:`purepruning.prune` for the form of the
            masks, ties, NaN and errors.

    >>> import jax.numpy as jnp
    >>> import purepruning as pp
    >>> from purepruning.stats import gradients
    >>> params = {"fc": jnp.array([[1.0, -2.0]])}
    >>> layer = pp.make_layer(params, "fc", "Linear", out_axes=1, in_axes=0)
    >>> config = pp.resolve(0.5, [layer], scope="global")
    >>> flow = hessian_gradient(lambda p: jnp.sum(p["fc"] ** 2), params)
    >>> stats = gradients.init(params, config, keep=["signed"])
    >>> stats = gradients.update(stats, params, flow, config)
    >>> flow["fc"].tolist(), grasp(params, stats, config)["fc"].tolist()
    ([[4.0, -8.0]], [[False, True]])
    """
    return prune(_GRASP, params, totals_of("grasp", params, stats, config, "signed"), config)


def hessian_gradient(loss: Callable[[Params], Any], params: Params) -> Params:
    r"""Returns $H g$, the Hessian of a loss times its gradient, as a tree like ``params``.

    One derivative of the gradient along itself (in JAX, ``jvp`` of ``grad``); $H$ is never formed.
    Runs under ``jit`` and ``vmap``. A loss over several batches is their sum.

    Args:
        loss: from parameters to a scalar.
        params: tree of floating arrays, or a dict of tensors.
    """
    function(loss, "hessian_gradient: loss", "a function of the parameters")
    slope = grad(params)(loss)
    return along(slope, params, slope(params))


_GRASP = Criterion("grasp", element=of_elements, channel=of_units, block=of_units, of=by_name)
