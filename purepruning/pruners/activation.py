"""Pruning by activations: channels that are mostly silent matter little."""

from __future__ import annotations

from typing import Any

from purepruning.arguments import instance
from purepruning.config.config import Config, check_config
from purepruning.granularity import Grid
from purepruning.selection.criterion import Criterion, by_name
from purepruning.selection.prune import prune
from purepruning.stats.accumulate import CompensatedSum, WideCount, value
from purepruning.stats.activations import ActivationStats, channels
from purepruning.stats.checks import check_totals, match, placed, refuse_empty
from purepruning.trees import flatten
from purepruning.types import Masks, Params


def apoz_rank(params: Params, stats: ActivationStats, config: Config) -> Masks:
    r"""Returns masks that prune the channels whose activation is zero most often.

    $$s_c = 1 - \mathrm{APoZ}_c = 1 - \frac{1}{N M} \sum_{n, m} [a_c(n, m) = 0]$$

    over N examples of M positions each (average percentage of zeros). For configs of output
    channels. Counts are exact, so masks are the same in every framework. Ties are common: dead
    channels all score 0. Zeros are of the activation that was given to
    :func:`purepruning.stats.activations.update`; a GELU is zero at zero only, so use another.

    Hu et al. 2016, arXiv:1607.03250; NNI's ActivationAPoZRank pruner. NNI 2.10 looks at the first
    ``training_steps`` *examples*, though its documentation says batches, trains the model
    meanwhile, and counts as zeros of a GELU what float32 rounding makes zero.

    Raises:
        TypeError: ``stats`` are no activation statistics, or of another framework.
        KeyError, ValueError: they are empty, or not of the layers of ``config``. Under ``jit`` and
            ``vmap`` empty ones score NaN, which ranks above all else. See also
            :func:`purepruning.prune` for the form of the masks, ties, NaN and errors.

    >>> import jax.numpy as jnp
    >>> import purepruning as pp
    >>> from purepruning.stats import activations
    >>> params = {"fc.w": jnp.ones((4, 2))}
    >>> layer = pp.make_layer(params, "fc.w", "Linear", name="fc", out_axes=1, in_axes=0)
    >>> rules = [{"sparsity": 0.5, "op_types": ["Linear"]}]
    >>> config = pp.resolve(rules, [layer], granularity="output_channel")
    >>> outputs = {"fc": jnp.array([[1.0, -1.0], [2.0, 5.0]])}
    >>> stats = activations.init(params, config)
    >>> stats = activations.update(stats, outputs, config, activation="relu")
    >>> apoz_rank(params, stats, config)["fc.w"].tolist()
    [[True, False]]
    """
    return prune(_APOZ, params, _checked("apoz_rank", params, stats, config), config)


def mean_activation_rank(params: Params, stats: ActivationStats, config: Config) -> Masks:
    r"""Returns masks that prune the channels of smallest mean activation.

    $$s_c = \frac{1}{N M} \sum_{n, m} a_c(n, m)$$

    The mean is signed: of the activation itself, not of its magnitude. Otherwise as
    :func:`apoz_rank`.

    Molchanov et al. 2016, arXiv:1611.06440 (its "mean activation"); NNI's ActivationMeanRank
    pruner, with the same differences.
    """
    return prune(_MEAN, params, _checked("mean_activation_rank", params, stats, config), config)


def _checked(pruner: str, params: Any, stats: Any, config: Config) -> Any:
    """Returns what scores are made of: positions, zeros and sums of the layers that are pruned."""
    check_config(pruner, config)
    if config.granularity == "input_channel":
        raise ValueError(
            f"{pruner} ranks output channels, but the config has granularity='input_channel'; give "
            "resolve granularity='output_channel'"
        )
    if config.granularity != "output_channel":
        return None  # prune says what is wrong
    instance(stats, ActivationStats, f"{pruner}: stats", "the statistics of stats.activations")
    check_totals(pruner, stats)
    sizes = {layer.name: channels(pruner, layer) for layer in config.layers}
    for totals in (stats.zeros, stats.sums):
        match(pruner, totals, sizes)
    match(pruner, stats.positions, dict.fromkeys(sizes, ()))
    names = {layer.name: layer.weight for layer in config.layers}
    refuse_empty(pruner, {name: stats.positions[name] for name in names})
    leaves = flatten(params).leaves
    return {
        name: tuple(
            placed(pruner, name, total[name], leaves.get(path))
            for total in (stats.positions, stats.zeros, stats.sums)
        )
        for name, path in names.items()
    }


def _apoz(weight: Any, layer_stats: tuple[WideCount, WideCount, CompensatedSum], g: Grid) -> Any:
    positions, zeros, _ = layer_stats
    others = WideCount(positions.high - zeros.high, positions.low - zeros.low)
    return value(others) / value(positions)


def _mean(weight: Any, layer_stats: tuple[WideCount, WideCount, CompensatedSum], g: Grid) -> Any:
    positions, _, sums = layer_stats
    return value(sums) / value(positions)


_APOZ = Criterion("apoz_rank", channel=_apoz, of=by_name, on_shards=True)


_MEAN = Criterion("mean_activation_rank", channel=_mean, of=by_name, on_shards=True)
