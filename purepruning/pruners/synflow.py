"""SynFlow: how much flows through a weight from inputs of ones, without any data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from purepruning.arguments import flag, function
from purepruning.arrays import by_numpy, grad, is_array, namespace
from purepruning.config.config import Config, check_config
from purepruning.exact_sum import power_of_two_scale
from purepruning.pruners.of_gradients import totals_of
from purepruning.pruners.snip import element, unit
from purepruning.selection.criterion import Criterion, by_name
from purepruning.selection.prune import check_values, prune, weights_of
from purepruning.stats.gradients import GradientStats
from purepruning.trees import flatten
from purepruning.types import Masks, Params


def synflow(params: Params, stats: GradientStats, config: Config) -> Masks:
    r"""Returns masks that prune the weights through which least flows.

    $$s_i = \Bigl| w_i \frac{\partial R}{\partial w_i} \Bigr|, \qquad
      R = \mathbf 1^\top f(\mathbf 1; |w|)$$

    for the model $f$ with all parameters positive and inputs of ones. ``stats`` are those of
    :mod:`purepruning.stats.gradients` (``"signed"``), given :func:`synaptic_flow` as gradients.
    Without biases the scores of every layer, and of the inputs and outputs of every channel, have
    the same sum. So a layer loses more of its weights the more it has, but never all of them before
    others do, if it is done in many rounds: 100 in the paper, see :func:`purepruning.iterative`. In
    one, small layers vanish.

    Tanaka et al. 2020, arXiv:2006.05467.

    Raises:
        TypeError: ``stats`` are no gradient statistics, or of another framework.
        KeyError, ValueError: they are empty, not of the layers and units of ``config``, or were
            made without ``keep=["signed"]``. See also :func:`purepruning.prune` for the form of the
            masks, ties, NaN and errors.
    """
    return prune(_SYNFLOW, params, totals_of("synflow", params, stats, config, "signed"), config)


def synaptic_flow(
    outputs: Callable[[Params], Any], params: Params, config: Config, *, rescale: bool = False
) -> Params:
    r"""Returns $\partial R / \partial w$ at $|w|$ with the signs of $w$, as a tree like ``params``.

    Times the weights that gives the scores of :func:`synflow`. $R$ is the sum of ``outputs`` with
    the magnitudes of all floating parameters. Of a model with running statistics, ``outputs`` has
    to use their magnitudes, in evaluation.

    Args:
        outputs: the model on inputs of ones, ``lambda p: apply(p, jnp.ones((1, ...)))``.
        params: the parameters, pruned weights at zero.
        config: names the layers.
        rescale: divide every layer of the config by a power of two near the mean gain of its
            outputs, so that deep models stay within float32. Where every path from inputs to
            outputs goes through all of these layers, and there are no biases, that multiplies all
            scores by one factor, a power of two. Not for models with shortcuts.

    Raises:
        KeyError, ValueError: the parameters are not those of ``config``.

    >>> import jax.numpy as jnp
    >>> import purepruning as pp
    >>> params = {"a": jnp.array([[1.0, -2.0]]), "b": jnp.array([[3.0], [4.0]])}
    >>> layers = [pp.make_layer(params, n, "Linear", out_axes=1, in_axes=0) for n in params]
    >>> config, ones = pp.resolve(0.5, layers), jnp.ones((1, 1))
    >>> flow = synaptic_flow(lambda p: ones @ p["a"] @ p["b"], params, config)
    >>> [(flow[n] * params[n]).tolist() for n in params]
    [[[3.0, 8.0]], [[3.0], [8.0]]]
    """
    function(outputs, "synaptic_flow: outputs", "a function of the parameters")
    flag(rescale, "synaptic_flow: rescale")
    check_config("synaptic_flow", config)
    tree = flatten(params)
    weights = weights_of("synaptic_flow", tree.leaves, config)
    check_values("synaptic_flow", weights)
    floats = {path: x for path, x in tree.leaves.items() if _is_float(x)}
    sizes = by_numpy(_magnitudes, floats)
    factors = {}
    for layer in config.layers if rescale else ():
        xp = namespace(weights[layer.weight])
        total = xp.sum(sizes[layer.weight], dtype=xp.float32) / layer.out_channels
        factors[layer.weight] = power_of_two_scale(total, 1, 60)[0]
        sizes[layer.weight] = sizes[layer.weight] * xp.astype(
            factors[layer.weight], sizes[layer.weight].dtype
        )

    def total_of(sizes: dict[str, Any]) -> Any:
        out = outputs(tree.rebuild({**tree.leaves, **sizes}))
        return namespace(out).sum(out)

    slopes = grad(params)(total_of)(sizes)
    for path, factor in factors.items():  # so that slope times weight is the score
        slopes[path] = slopes[path] * namespace(factor).astype(factor, slopes[path].dtype)
    return tree.rebuild(by_numpy(_signed, floats, {path: slopes[path] for path in floats}))


def _magnitudes(weights: dict[str, Any]) -> dict[str, Any]:
    return {path: namespace(x).abs(x) for path, x in weights.items()}


def _signed(weights: dict[str, Any], slopes: dict[str, Any]) -> dict[str, Any]:
    """Returns the slopes of weights from those of their magnitudes."""
    return {p: namespace(x).where(x < 0, -slopes[p], slopes[p]) for p, x in weights.items()}


def _is_float(x: Any) -> bool:
    return is_array(x) and namespace(x).isdtype(x.dtype, "real floating")


_SYNFLOW = Criterion("synflow", element=element, channel=unit, block=unit, of=by_name)
