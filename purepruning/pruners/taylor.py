"""Pruning by Taylor expansion: what the loss would not notice matters little."""

from __future__ import annotations

from typing import Any

from purepruning.arguments import flag, instance
from purepruning.arrays import namespace
from purepruning.config.config import Config, check_config
from purepruning.exact_sum import exact_sum
from purepruning.granularity import Grid, fold
from purepruning.layers import Layer
from purepruning.selection.criterion import Criterion
from purepruning.selection.keys import Piece
from purepruning.selection.prune import prune
from purepruning.stats import gradients
from purepruning.stats.accumulate import CompensatedSum, value
from purepruning.stats.checks import check_totals, match, placed, refuse_empty
from purepruning.trees import flatten
from purepruning.types import Masks, Params


def taylor_fo(
    params: Params, stats: gradients.GradientStats, config: Config, *, grouped: bool = False
) -> Masks:
    r"""Returns masks that prune the units whose removal changes the loss least, to first order.

    $$s_u = \sum_t \sum_{i \in u} (g_{t,i} w_{t,i})^2$$

    over steps t, with gradients $g$; with ``grouped=True`` the unit counts as a whole,

    $$s_u = \sum_t \Bigl(\sum_{i \in u} g_{t,i} w_{t,i}\Bigr)^2.$$

    The second is eq. 8 of the paper for a unit seen as one gate; the first lets no weights of a
    unit cancel. For configs of any granularity: element and N:M, output and input channels, and
    blocks, where a smaller block at the edge counts for what it is. ``stats`` are those of
    :mod:`purepruning.stats.gradients`, made with a config of the same granularity; those of
    elements serve every granularity, except that ``grouped`` needs its own
    (``keep=["grouped"]``). ``config`` with ``scope="global"`` compares units of all layers.

    Molchanov et al. 2019, arXiv:1906.10771; NNI's TaylorFOWeight pruner, which has the first form.
    NNI takes weights before the optimizer step from 2.0 on, and after it before; NNI 3.0 divides by
    the number of steps, which changes no rank.

    Raises:
        TypeError: ``stats`` are no gradient statistics, or of another framework.
        KeyError, ValueError: they are empty, not of the layers and units of ``config``, or do not
            hold what is asked for. See also :func:`purepruning.prune` for the form of the masks,
            ties, NaN and errors.

    >>> import jax.numpy as jnp
    >>> import purepruning as pp
    >>> from purepruning.stats import gradients
    >>> params = {"fc": jnp.array([[1.0, -2.0], [3.0, 2.0]])}
    >>> grads = {"fc": jnp.array([[1.0, 1.0], [1.0, 1.0]])}
    >>> layer = pp.make_layer(params, "fc", "Linear", out_axes=1, in_axes=0)
    >>> rules = [{"sparsity": 0.5, "op_types": ["Linear"]}]
    >>> config = pp.resolve(rules, [layer], granularity="output_channel")
    >>> stats = gradients.init(params, config, keep=["squares", "grouped"])
    >>> stats = gradients.update(stats, params, grads, config)
    >>> taylor_fo(params, stats, config)["fc"].tolist()
    [[True, False]]
    """
    return prune(_TAYLOR, params, _checked(params, stats, config, grouped), config)


def _checked(params: Any, stats: Any, config: Config, grouped: bool) -> dict[str, CompensatedSum]:
    """Returns the total that scores are made of, of the layers that are pruned."""
    check_config("taylor_fo", config)
    expected = "the statistics of stats.gradients"
    instance(stats, gradients.GradientStats, "taylor_fo: stats", expected)
    check_totals("taylor_fo", stats)
    flag(grouped, "taylor_fo: grouped")
    kind = "grouped" if grouped else "squares"
    totals = getattr(stats, kind)
    if config.layers and not totals:
        if not any(stats[1:]):
            raise ValueError("taylor_fo: the statistics were made for no layers")
        raise ValueError(
            f"taylor_fo: the statistics do not hold {kind!r}; make them with "
            f"gradients.init(..., keep=[{kind!r}])"
        )
    shapes = {}
    for layer in config.layers:
        shapes[layer.name] = gradients.shape(layer, config.granularity)
        of_elements = tuple(getattr(getattr(totals.get(layer.name), "high", None), "shape", ()))
        if not grouped and of_elements == layer.shape:
            shapes[layer.name] = layer.shape
    match("taylor_fo", totals, shapes)
    refuse_empty("taylor_fo", {layer.name: stats.steps for layer in config.layers})
    leaves = flatten(params).leaves
    return {
        layer.name: placed("taylor_fo", layer.name, totals[layer.name], leaves.get(layer.weight))
        for layer in config.layers
    }


def _of(totals: dict[str, CompensatedSum], layer: Layer) -> CompensatedSum:
    return totals[layer.name]


def _element(weight: Any, layer_stats: CompensatedSum) -> Piece:
    return Piece(tuple(layer_stats), _total, indexed=False)


def _total(arrays: tuple[Any, ...], index: Any, layer_stats: tuple[()]) -> Any:
    return value(CompensatedSum(*arrays))


def _unit(weight: Any, layer_stats: CompensatedSum, g: Grid) -> Any:
    total = value(layer_stats)
    if tuple(total.shape) == tuple(weight.shape):
        return fold(namespace(total), total, g, exact_sum)
    return total


_TAYLOR = Criterion("taylor_fo", element=_element, channel=_unit, block=_unit, of=_of)
