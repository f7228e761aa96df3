"""Pruning by Taylor expansion: what the loss would not notice matters little."""

from __future__ import annotations

from purepruning.arguments import flag
from purepruning.config.config import Config
from purepruning.pruners.of_gradients import of_elements, of_units, totals_of
from purepruning.selection.criterion import Criterion, by_name
from purepruning.selection.prune import prune
from purepruning.stats import gradients
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
    flag(grouped, "taylor_fo: grouped")
    kind: gradients.Kept = "grouped" if grouped else "squares"
    return prune(_TAYLOR, params, totals_of("taylor_fo", params, stats, config, kind), config)


_TAYLOR = Criterion(
    "taylor_fo", element=of_elements, channel=of_units, block=of_units, of=by_name, on_shards=True
)
