"""How a total sparsity is divided among layers by a formula: no evaluation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from purepruning.arguments import collection, fraction, instance, is_number, missing, scalar, shown
from purepruning.arrays import is_array
from purepruning.config.config import Config, check_config
from purepruning.counts import count_of, counts_of
from purepruning.granularity import NM
from purepruning.masks import to_numpy
from purepruning.search.problem import Problem, check_problem, fit
from purepruning.trees import flatten
from purepruning.types import Params

#: What uniform_plus leaves of the last layer, at least.
LEAST_OF_LAST = 0.2


def uniform(config: Config, *, sparsity: float) -> Config:
    """Returns the config in which every pool loses the same fraction of its units.

    Raises:
        ValueError, TypeError: as :meth:`purepruning.Config.with_sparsity`.

    >>> import purepruning as pp
    >>> table = [pp.Layer(n, "Linear", n, (10, 10), (1,), (0,)) for n in "ab"]
    >>> uniform(pp.resolve([{"op_types": ["Linear"]}], table), sparsity=0.7).counts
    {'a': 70, 'b': 70}
    """
    _checked("uniform", config, sparsity)
    return config.with_sparsity(sparsity)


def uniform_plus(config: Config, *, sparsity: float, first: str, last: str) -> Config:
    r"""Returns the config of a total sparsity, with the first layer dense and the last one spared.

    The first layer loses nothing, the last at most 80 %, and the others what is missing, in equal
    fractions. Of $N$ units in all $\lfloor S N \rfloor$ go.

    Gale et al. 2019, arXiv:1902.09574.

    Args:
        config: the resolved rules, of layer scope.
        sparsity: S, of all pools together.
        first, last: names of pools.

    Raises:
        ValueError: the other layers cannot lose so much.
        KeyError: there is no such pool.

    >>> import purepruning as pp
    >>> table = [pp.Layer(n, "Linear", n, (10, 10), (1,), (0,)) for n in "abc"]
    >>> config = pp.resolve([{"op_types": ["Linear"]}], table)
    >>> uniform_plus(config, sparsity=0.55, first="a", last="c").counts
    {'a': 0, 'b': 85, 'c': 80}
    """
    names, sizes = _checked("uniform_plus", config, sparsity)
    for argument, name in (("first", first), ("last", last)):
        if name not in names:
            message = f"uniform_plus: {argument}: no pool is called {name!r}"
            raise KeyError(missing(message, name, names))
    total = count_of(sparsity, int(sizes.sum()))
    most = np.asarray([pool.most for pool in config.pools])
    most[names.index(first)] = 0
    i = names.index(last)
    spared = math.ceil(round(LEAST_OF_LAST * sizes[i], 9))
    most[i] = min(most[i], sizes[i] - spared)
    if total > most.sum():
        raise ValueError(
            f"uniform_plus: {total} of {sizes.sum()} units are to go, but with the first layer "
            f"dense and a fifth of the last one kept only {most.sum()} can; ask for less"
        )
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        enough = np.minimum(middle * sizes, most).sum() >= total
        low, high = (low, middle) if enough else (middle, high)
    return _with(config, names, _whole(np.minimum(high * sizes, most), most, total))


def erk(
    config: Config, *, sparsity: float, power: float = 1.0, dense: Sequence[str] = ()
) -> Config:
    r"""Returns the config of the Erdős–Rényi kernel's densities: small layers stay denser.

    $$\text{density}_l = \min\Bigl(1,\ \epsilon \Bigl(\frac{\sum_d n_d}{\prod_d n_d}\Bigr)^p\Bigr)$$

    over all dimensions of a layer's weight, with $\epsilon$ such that the total is met. Where it
    exceeds 1, the layers of the largest raw density become dense, and $\epsilon$ is found again for
    the others. A layer loses $\lfloor s_l n_l \rfloor$ units.

    Evci et al. 2020, arXiv:1911.11134, and its code, whose published sizes this reproduces.

    Args:
        config: the resolved rules, of layer scope, one layer to a pool.
        sparsity: of all pools together, ``dense`` ones aside.
        power: p.
        dense: names of pools that lose nothing and play no part.

    Raises:
        KeyError: there is no pool of a name in ``dense``.
        ValueError, TypeError: an argument is out of range.

    >>> import purepruning as pp
    >>> sizes = {"a": (10, 10), "b": (100, 100)}
    >>> table = [pp.Layer(n, "Linear", n, shape, (1,), (0,)) for n, shape in sizes.items()]
    >>> config = pp.resolve([{"op_types": ["Linear"]}], table)
    >>> erk(config, sparsity=0.9).counts  # a has 20/100 for each of its weights, b 200/10000
    {'a': 8, 'b': 9081}
    """
    names, sizes = _checked("erk", config, sparsity)
    dense = collection(dense, "erk: dense", "names of pools")
    for name in dense:
        if name not in names:
            raise KeyError(missing(f"erk: dense: no pool is called {name!r}", name, names))
    exponent = scalar(power, "erk: power")
    shapes = [_shape_of("erk", pool) for pool in config.pools]
    raw = np.asarray([(sum(s) / math.prod(s)) ** exponent for s in shapes])
    free = np.asarray([name not in dense for name in names])
    whole = np.zeros(len(names), bool)  # made dense by the formula
    zeros = np.floor(sparsity * sizes + 1e-9)
    while True:
        mine = free & ~whole
        if not mine.any():
            epsilon = 0.0
            break
        left = (sizes - zeros)[mine].sum() - zeros[free & whole].sum()
        epsilon = left / (raw * sizes)[mine].sum()
        if epsilon * raw[mine].max() <= 1:
            break
        whole |= mine & (raw == raw[mine].max())
    densities = np.where(free & ~whole, epsilon * raw, 1.0)
    counts = counts_of(1.0 - densities, sizes)
    return _with(config, names, np.maximum(counts, 0))


def lamp(params: Params, config: Config, *, sparsity: float) -> Config:
    r"""Returns the config whose counts are LAMP's: those of least distortion of each layer.

    Within a layer the weights are sorted, and each is measured against what is not smaller,

    $$\text{score}(u) = \frac{w_u^2}{\sum_{v \ge u} w_v^2}.$$

    Of all layers together the lowest go. Only their numbers are LAMP's; within a layer it is
    magnitude, so that :func:`purepruning.level` prunes by these counts what LAMP would. The largest
    weight of each layer has score 1, so that none is emptied.

    Lee et al. 2021, arXiv:2010.07611.

    Args:
        params: the parameters.
        config: the resolved rules, of layer scope and single weights.
        sparsity: of all pools together.

    Raises:
        ValueError: the config prunes units of several weights; a weight is NaN.
        KeyError: a parameter is missing.

    >>> import numpy as np
    >>> import purepruning as pp
    >>> params = {"a": np.array([[1.0, 2.0, 3.0, 4.0]]), "b": np.array([[1.0, 9.0, 1.0, 9.0]])}
    >>> table = [pp.make_layer(params, n, "Linear", name=n, out_axes=0, in_axes=1) for n in "ab"]
    >>> lamp(params, pp.resolve([{"op_types": ["Linear"]}], table), sparsity=0.5).counts
    {'a': 2, 'b': 2}
    """
    names, _ = _checked("lamp", config, sparsity)
    if config.granularity != "element":
        raise ValueError(
            f"lamp ranks single weights, and the config prunes {config.granularity!r}; resolve the "
            "rules with granularity='element'"
        )
    leaves = flatten(params).leaves
    scores = []
    for pool in config.pools:
        path = pool.layers[0].weight
        if path not in leaves:
            raise KeyError(missing(f"lamp: params have no {path!r}", path, leaves))
        w = np.asarray(to_numpy(leaves[path]), np.float64).reshape(-1)
        if np.isnan(w).any():
            raise ValueError(f"lamp: {path!r} has NaN; prune finite weights")
        squares = np.sort(w**2)
        rest = np.cumsum(squares[::-1])[::-1]
        scores.append(np.where(squares > 0, squares / np.where(rest > 0, rest, 1), 0.0))
    owner = np.repeat(np.arange(len(scores)), [len(s) for s in scores])
    together = np.concatenate(scores)
    lowest = np.argsort(together, kind="stable")[: count_of(sparsity, len(together))]
    gone = np.bincount(owner[lowest], minlength=len(names))
    return _with(config, names, gone)


def owl(
    scores: Mapping[str, Any],
    config: Config,
    *,
    sparsity: float,
    outlier: float = 5.0,
    spread: float = 0.08,
) -> Config:
    r"""Returns the config in which layers with more outliers lose less.

    With $D_l$ the percentage of a layer's scores above ``outlier`` times their mean, brought to
    $[0, 2\lambda]$ over all layers,

    $$s_l = S - (D_l - \bar D).$$

    Pools lose $\lfloor s_l n_l \rfloor$ units. Where layers differ in size, the total is not S.

    Yin et al. 2023, arXiv:2310.05175, whose scores are Wanda's, and which gives all layers of a
    block one sparsity: average the scores of a block for that.

    Args:
        scores: by pool name, importances of any shape, such as $|w| \lVert x \rVert$.
        config: the resolved rules, of layer scope.
        sparsity: S.
        outlier: M.
        spread: $\lambda$.

    Raises:
        KeyError: a pool has no scores.
        ValueError, TypeError: scores that are no numbers; an argument is out of range.

    >>> import numpy as np
    >>> import purepruning as pp
    >>> table = [pp.Layer(n, "Linear", n, (10, 10), (1,), (0,)) for n in "ab"]
    >>> config = pp.resolve([{"op_types": ["Linear"]}], table)
    >>> flat, spiky = np.ones(100), np.where(np.arange(100) < 4, 50.0, 1.0)
    >>> owl({"a": flat, "b": spiky}, config, sparsity=0.7).counts
    {'a': 78, 'b': 62}
    """
    names, sizes = _checked("owl", config, sparsity)
    instance(scores, Mapping, "owl: scores", "arrays by pool name")
    outlier, spread = scalar(outlier, "owl: outlier"), scalar(spread, "owl: spread")
    shares = []
    for name in names:
        if name not in scores:
            raise KeyError(missing(f"owl: scores have none for pool {name!r}", name, scores))
        if not is_array(scores[name]):
            raise TypeError(f"owl: scores[{name!r}] must be an array")
        s = np.asarray(to_numpy(scores[name]), np.float64)
        if not np.isfinite(s).all():
            raise ValueError(f"owl: scores[{name!r}] must be finite")
        shares.append(100 * (s > outlier * s.mean()).mean())
    d = np.asarray(shares)
    width = np.ptp(d)
    d = (d - d.min()) / width * 2 * spread if width > 0 else np.full(len(d), spread)
    sparsities = np.clip(sparsity - (d - d.mean()), 0, 1)
    return _with(config, names, counts_of(sparsities, sizes))


def progression(config: Config, *, sparsity: float, slope: float, order: Sequence[str]) -> Config:
    r"""Returns the config whose sparsities grow from layer to layer, by the same step.

    $$s_l = S - \beta\,\frac{L - 1}{2} + \beta\, l$$

    for the l-th of L layers, all moved by the same amount so that of $N$ units in all
    $\lfloor S N \rfloor$ go, and none below 0 or above 1.

    arXiv:2502.14770, where a few slopes are tried.

    Args:
        config: the resolved rules, of layer scope.
        sparsity: S, of all pools together.
        slope: $\beta$.
        order: names of all pools, from the input on.

    Raises:
        ValueError, TypeError: ``order`` has not every pool once.

    >>> import purepruning as pp
    >>> table = [pp.Layer(n, "Linear", n, (10, 10), (1,), (0,)) for n in "abc"]
    >>> config = pp.resolve([{"op_types": ["Linear"]}], table)
    >>> progression(config, sparsity=0.5, slope=0.1, order=["a", "b", "c"]).counts
    {'a': 40, 'b': 50, 'c': 60}
    """
    names, sizes = _checked("progression", config, sparsity)
    order = collection(order, "progression: order", "names of pools")
    if sorted(map(str, order)) != sorted(names):
        raise ValueError(
            f"progression: order must name every pool once, {list(names)}, got {list(order)}"
        )
    rank = np.asarray([list(order).index(name) for name in names])
    if not is_number(slope) or not math.isfinite(float(slope)):
        raise TypeError(f"progression: slope must be a finite number, got {shown(slope)}")
    step = float(slope)
    base = sparsity + step * (rank - (len(names) - 1) / 2)
    most = np.asarray([pool.most for pool in config.pools])
    total = count_of(sparsity, int(sizes.sum()))
    if total > most.sum():
        raise ValueError(f"progression: {total} units are to go, and only {most.sum()} can")
    low, high = -2.0 - abs(step) * len(names), 2.0 + abs(step) * len(names)
    for _ in range(80):
        middle = 0.5 * (low + high)
        enough = np.clip((base + middle) * sizes, 0, most).sum() >= total - 1e-9
        low, high = (low, middle) if enough else (middle, high)
    return _with(config, names, _whole(np.clip((base + high) * sizes, 0, most), most, total))


def fitted(problem: Problem, shares: Mapping[str, float]) -> dict[str, int]:
    """Returns the plan that prunes in proportion to shares, as little as meets the budgets.

    How an allocation by formula becomes a plan of a problem: the shares are the fractions it takes
    of each group.

    Args:
        problem: groups and budgets, of monotone resources.
        shares: by group name, how much each is to lose relative to the others, at least 0.

    Raises:
        KeyError: a group is missing or unknown.
        ValueError: a share is negative or no number; more pruning may cost more.

    >>> import purepruning as pp
    >>> table = [pp.Layer(n, "Linear", n, (10, 20), (1,), (0,)) for n in "ab"]
    >>> config = pp.resolve([{"op_types": ["Linear"]}], table, granularity="output_channel")
    >>> fitted(pp.search.problem(config, {"weights": 0.5}), {"a": 1, "b": 3})
    {'a': 5, 'b': 15}
    """
    of = check_problem("fitted", problem)
    instance(shares, Mapping, "fitted: shares", "numbers by group name")
    if not of.monotone:
        raise ValueError("fitted: more pruning may cost more here; use a search instead")
    for name in shares:
        if name not in of.names:
            raise KeyError(missing(f"fitted: no group is called {name!r}", name, of.names))
    absent = [name for name in of.names if name not in shares]
    if absent:
        raise KeyError(f"fitted: shares have none for group {absent[0]!r}; give one for each")
    given = np.asarray([scalar(shares[name], "fitted: shares") for name in of.names], np.float32)
    if not (np.isfinite(given).all() and (given >= 0).all()):
        raise ValueError(f"fitted: shares must be at least 0, got {dict(shares)}")
    levels = np.asarray(fit(of, given))
    return {
        name: int(options[level])
        for name, options, level in zip(of.names, of.options, levels, strict=True)
    }


def _checked(where: str, config: Any, sparsity: Any) -> tuple[tuple[str, ...], np.ndarray]:
    """Returns the names of the pools and their sizes, int64."""
    check_config(where, config)
    fraction(sparsity, f"{where}: sparsity")
    if isinstance(config.granularity, NM) or config.scope != "layer":
        raise ValueError(
            f"{where} divides a sparsity among pools: resolve the rules with scope='layer', and "
            "not to N:M"
        )
    names = tuple(pool.name for pool in config.pools)
    return names, np.asarray([pool.size for pool in config.pools], np.int64)


def _shape_of(where: str, pool: Any) -> tuple[int, ...]:
    if len(pool.layers) != 1:
        raise ValueError(
            f"{where}: pool {pool.name!r} is of several coupled layers; resolve the rules without "
            "a coupling, and give the sparsities to search.fitted"
        )
    found: tuple[int, ...] = pool.layers[0].shape
    return found


def _whole(wanted: np.ndarray, most: np.ndarray, total: int) -> np.ndarray:
    """Returns whole counts near those wanted that sum to the total: the largest parts round up."""
    counts = np.minimum(np.floor(wanted + 1e-9), most).astype(np.int64)
    parts = np.where(counts < most, wanted - counts, -np.inf)
    up = np.argsort(-parts, kind="stable")[: max(total - int(counts.sum()), 0)]
    counts[up] += 1
    over = int(counts.sum()) - total
    if over > 0:  # of what was rounded together
        counts[np.argsort(parts, kind="stable")[:over]] -= 1
    return counts


def _with(config: Config, names: tuple[str, ...], counts: np.ndarray) -> Config:
    """Returns the config with counts, at most what each pool can lose and is allowed to."""
    found = {
        name: int(pool.allow(min(int(count), pool.most)))
        for name, pool, count in zip(names, config.pools, counts, strict=True)
    }
    return dataclasses.replace(config, counts=config.with_counts(found).counts)
