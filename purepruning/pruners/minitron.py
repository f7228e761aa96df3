"""Width by activation: units whose activations are small matter little to those who read them."""

from __future__ import annotations

from typing import Any

from purepruning.arrays import by_numpy, sqrt
from purepruning.config.config import Config
from purepruning.pruners.coupled import prune_units
from purepruning.pruners.read_units import Reader, readers_of
from purepruning.stats.accumulate import value
from purepruning.stats.inputs import InputStats
from purepruning.trees import flatten
from purepruning.types import Masks, Params


def minitron(params: Params, stats: InputStats, config: Config) -> Masks:
    r"""Returns masks that prune the coupled units of smallest activation.

    $$s_u = \sum_l \sqrt{\sum_{j \in u_l} \sum_b \Bigl(\frac{1}{T} \sum_t |x^l_{btj}|\Bigr)^2}$$

    over the layers l that ``stats`` are of, the columns $u_l$ at which l reads unit u, examples b
    and their positions t (``"means"`` of :mod:`purepruning.stats.inputs`, of
    :attr:`purepruning.Config.readers`). So a neuron scores by the input of the layer behind it, a
    head by the norm over its positions, in the input of the output projection, and a channel of
    the residual stream by what leaves the norms, in all the layers that are watched: several that
    read the same (queries, keys and values) count as often, so watch one of them.

    For configs with a coupling; as many units as the config says go of each set, or of the whole
    model in global scope.

    Muralidharan et al. 2024, arXiv:2407.14679, with the mean over positions and the norm over
    examples, which they find best.

    Raises:
        TypeError: ``stats`` are no input statistics, or of another framework.
        ValueError: the config has no coupling; the statistics are empty, hold no means, or are of
            no layer that reads some of the units. See also :func:`purepruning.prune` for the form
            of the masks, ties, NaN and errors.

    >>> import jax.numpy as jnp
    >>> import purepruning as pp
    >>> from purepruning.stats import inputs
    >>> params = {"up": jnp.ones((1, 3)), "down": jnp.ones((3, 1))}
    >>> coupling = pp.couple(lambda p, x: x @ p["up"] @ p["down"], params, jnp.ones((1, 1)))
    >>> layers = [pp.make_layer(params, n, "Linear", out_axes=1, in_axes=0) for n in params]
    >>> rules = [{"sparsity": 0.4, "op_names": ["up"]}]
    >>> config = pp.resolve(rules, layers, coupling=coupling)
    >>> stats = inputs.init(params, config.readers, keep=["means"])
    >>> stats = inputs.update(stats, {"down": jnp.array([[3.0, -1.0, 2.0]])}, config.readers)
    >>> minitron(params, stats, config)["up"].tolist()
    [[True, False, True]]
    """
    tree = flatten(params)
    readers = readers_of("minitron", tree, stats, config, ["means"])
    if not readers:
        return tree.rebuild({})
    n_units = config.allocation.coupling.n_units  # type: ignore[union-attr]

    def score(totals: list[Any]) -> Any:
        parts = [_score(r, total, n_units) for r, total in zip(readers, totals, strict=True)]
        return sum(parts[1:], parts[0])

    scores = by_numpy(score, [reader.totals["means"] for reader in readers])
    return prune_units(scores, params, config)


def _score(reader: Reader, total: Any, n_units: int) -> Any:
    return sqrt(reader.places.sums(value(total), n_units))
