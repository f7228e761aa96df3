"""Observers: the ranges of activations, as running statistics with init, update and merge.

- ``"min_max"``: the smallest and largest number ever seen.
- ``"moving_average"``: of the smallest and largest numbers of batches; the first is taken as it is.
- ``"histogram"``: counts on a fixed grid of 4,096 bins, of relative width 1/32 on either side of
  zero, so that outliers can be left out.

:func:`watch` makes functions for an adapter's ``replace``, which change nothing and find what
:func:`update` takes. States are dictionaries by site; :func:`merge` is associative and commutative,
so that data-parallel states merge leaf by leaf: averages and histograms by ``psum``, minima and
maxima by ``pmin`` and ``pmax``. Do that once, at the end; what :func:`update` takes may be merged
in every step, see :func:`purepruning.quantize.qat.update`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

from purepruning.arguments import fraction, instance, one_of, shown
from purepruning.arrays import (
    bits_float,
    counted,
    float_bits,
    iota,
    is_array,
    namespace,
    stop_gradient,
    zeros,
)
from purepruning.quantize.config import QuantizationConfig, Target, check_quantization
from purepruning.quantize.targets import AtSite, any_leaf, arrays_at, check_sites
from purepruning.stats import accumulate
from purepruning.types import Params

Kind = Literal["min_max", "moving_average", "histogram"]

#: What stays of the old average when a batch is seen, as in all of NNI's versions.
DECAY = 0.99


class Range(NamedTuple):
    """The smallest and the largest number seen, float32; ``inf`` and ``-inf`` before the first."""

    low: Any
    high: Any


class MovingAverage(NamedTuple):
    """Averages of the smallest and largest numbers of batches, times ``weight``.

    The weight is 0 before the first batch, then 1, and of merged states the sum of theirs: their
    average is that of all replicas.
    """

    low: Any
    high: Any
    weight: Any


class Histogram(NamedTuple):
    """How many numbers lay in each bin."""

    counts: accumulate.WideCount


Observer: TypeAlias = Range | MovingAverage | Histogram

#: Observers by site.
Observers: TypeAlias = dict[str, Any]


def init(params: Params, config: QuantizationConfig, kind: Kind = "min_max") -> Observers:
    """Returns observers that have seen nothing, for every input and output of ``config``.

    ``params`` say which framework, and which device, they are for.
    """
    check_quantization("observers.init", config)
    one_of("observers.init: kind", kind, ("min_max", "moving_average", "histogram"))
    like = any_leaf("observers.init", params)

    def new() -> Observer:
        zero = zeros(like, (), "float32")
        if kind == "min_max":
            return Range(zero + float("inf"), zero - float("inf"))
        if kind == "moving_average":
            return MovingAverage(zero, zeros(like, (), "float32"), zeros(like, (), "float32"))
        return Histogram(accumulate.empty_total(accumulate.WideCount, like, (_BINS,)))

    return {target.site: new() for target in config.activations}


def watch(state: Observers, config: QuantizationConfig) -> dict[str, AtSite]:
    """Returns functions for ``replace`` that leave values as they are and find what is observed."""
    check_quantization("observers.watch", config)
    _check_state("observers.watch: state", state)
    check_sites("observers.watch: state", state, config.activations, "observers.init")

    def at(target: Target) -> AtSite:
        summary = bin_counts if isinstance(state[target.site], Histogram) else range_of

        def look(value: Any) -> tuple[Any, Any]:
            return value, summary(arrays_at("observers.watch", target, value))

        return look

    return {target.site: at(target) for target in config.activations}


def update(state: Observers, seen: Mapping[str, Any], config: QuantizationConfig) -> Observers:
    """Returns the observers after a batch; ``seen`` is what ``replace`` found.

    Of a layer that is called several times, all calls are one batch. Observers of sites that are
    not in ``config`` stay as they are.

    Raises:
        KeyError: there is no observer of a site, or nothing was seen there.
    """
    check_quantization("observers.update", config)
    _check_state("observers.update: state", state)
    check_sites("observers.update: state", state, config.activations, "observers.init")
    check_sites("observers.update: seen", seen, config.activations, "replace")
    sites = [target.site for target in config.activations]
    for site in sites:
        _check_seen(f"observers.update: seen[{site!r}]", seen[site], state[site])
    return {**state, **{site: after(state[site], seen[site]) for site in sites}}


def after(observer: Observer, seen: Any) -> Any:
    """Returns an observer after it has seen what was found at its site, of one or several calls."""
    if isinstance(observer, Histogram):
        calls = seen if isinstance(seen, list) else [seen]
        counts = observer.counts
        for call in calls:
            found = namespace(call).reshape(call, (-1, _BINS))
            counts = accumulate.count(counts, _int32_sum(found))
        return Histogram(counts)
    batch = whole_range(seen)
    if isinstance(observer, Range):
        return _covering([observer, batch])
    xp = namespace(batch.low)
    weight = observer.weight
    fresh = weight == 0
    new = xp.where(fresh, 1.0, weight)

    def averaged(old: Any, x: Any) -> Any:
        return xp.where(fresh, x, DECAY * old + (1 - DECAY) * x * weight)

    return MovingAverage(
        averaged(observer.low, batch.low), averaged(observer.high, batch.high), new
    )


def merge(a: Observers, b: Observers) -> Observers:
    """Returns the observers of what both have seen.

    Associative and commutative: exact for minima, maxima and counts; averages are averaged, each by
    the number of replicas that it stands for.

    Raises:
        ValueError: they are of different sites or kinds.
    """
    for state in (a, b):
        _check_state("observers.merge: state", state)
    if {site: type(x) for site, x in a.items()} != {site: type(x) for site, x in b.items()}:
        raise ValueError(
            "observers.merge: the states are of different sites or kinds; make both by "
            "observers.init with one config and kind"
        )
    return {site: merge_one(a[site], b[site]) for site in a}


def merge_one(a: Any, b: Any) -> Any:
    """Returns the observer of what two of one kind have seen."""
    if isinstance(a, Histogram):
        return Histogram(accumulate.merge_counts(a.counts, b.counts))
    if isinstance(a, MovingAverage):
        return MovingAverage(*(x + y for x, y in zip(a, b, strict=True)))
    return _covering([a, b])


def ranges(state: Observers, *, coverage: float = 1.0) -> dict[str, Range]:
    """Returns the range of every site, zero included; zeros where nothing was seen.

    Args:
        state: the observers.
        coverage: the fraction of numbers that has to lie inside, of histograms; half of what is
            left out lies on either side. Bounds are those of bins, so up to 1/32 too wide.

    Raises:
        ValueError: ``coverage`` is not in [0, 1], or is given for other observers.

    >>> import jax.numpy as jnp
    >>> observer = Range(jnp.float32(-1.0), jnp.float32(3.0))
    >>> ranges({"fc:input": observer})["fc:input"]
    Range(low=Array(-1., dtype=float32), high=Array(3., dtype=float32))
    """
    coverage = fraction(coverage, "observers.ranges: coverage")
    _check_state("observers.ranges: state", state)
    if coverage < 1 and not all(isinstance(x, Histogram) for x in state.values()):
        raise ValueError(
            "observers.ranges: coverage has a meaning for histograms only; make the observers by "
            "observers.init(..., kind='histogram')"
        )
    return {site: bounds(observer, coverage) for site, observer in state.items()}


def bounds(observer: Observer, coverage: float = 1.0) -> Range:
    """Returns the range of one observer; zeros where nothing was seen."""
    if isinstance(observer, Histogram):
        return _covered(accumulate.value(observer.counts), coverage)
    xp = namespace(observer.low)
    if isinstance(observer, Range):
        seen = observer.low <= observer.high
        low, high = observer.low, observer.high
    else:
        seen = observer.weight > 0
        divisor = xp.where(seen, observer.weight, 1.0)
        low, high = observer.low / divisor, observer.high / divisor
    # NaN is not hidden: it is neither seen nor unseen.
    hidden = ~seen & (observer.low == observer.low)
    return Range(
        xp.where(hidden, 0.0, xp.clip(low, None, 0.0)),
        xp.where(hidden, 0.0, xp.clip(high, 0.0, None)),
    )


def range_of(arrays: list[Any]) -> Range:
    """Returns the smallest and largest number of arrays, float32, without gradients."""
    xp = namespace(arrays[0])
    found = [stop_gradient(xp.astype(x, xp.float32)) for x in arrays]
    return _covering([Range(xp.min(x), xp.max(x)) for x in found])


def whole_range(seen: Any) -> Range:
    """Returns the range over several calls, and over the steps of loops."""
    calls = [seen] if isinstance(seen, Range) else list(seen)
    xp = namespace(calls[0].low)
    return _covering([Range(xp.min(call.low), xp.max(call.high)) for call in calls])


def _check_state(where: str, state: Any) -> None:
    instance(state, Mapping, where, "what observers.init returned, observers by site")
    for site, observer in state.items():
        kinds = (Range, MovingAverage, Histogram)
        instance(observer, kinds, f"{where}[{site!r}]", "an observer as observers.init makes them")


def _check_seen(where: str, seen: Any, observer: Observer) -> None:
    for call in seen if isinstance(seen, list) else [seen]:
        right = is_array(call) if isinstance(observer, Histogram) else isinstance(call, Range)
        if not right:
            raise TypeError(
                f"{where} must be what the function at this site found, got {shown(call)}; give "
                "what replace returned with at=watch(state, config)"
            )


def _covering(ranges: list[Range]) -> Range:
    """Returns the smallest range that contains all of these."""
    xp = namespace(ranges[0].low)
    lows, highs = zip(*ranges, strict=True)
    return Range(functools.reduce(xp.minimum, lows), functools.reduce(xp.maximum, highs))


# Bins of magnitudes: 0 below 2**-32, then 32 for each power of two up to 2**32; as many for
# negative numbers, in the order of the numbers. The bits of a float above its 18th are its bin.

_MAGNITUDES = 2048
_BINS = 2 * _MAGNITUDES
_SHIFT = 18
_FIRST = (127 - 32) * 32 - 1


def bin_counts(arrays: list[Any]) -> Any:
    """Returns how many numbers of the arrays lie in each bin, int32."""
    xp = namespace(arrays[0])

    def count(x: Any) -> Any:
        x = xp.reshape(stop_gradient(xp.astype(x, xp.float32)), (-1,))
        magnitude = xp.clip((float_bits(xp, xp.abs(x)) >> _SHIFT) - _FIRST, 0, _MAGNITUDES - 1)
        return counted(
            xp, xp.where(x < 0, _MAGNITUDES - 1 - magnitude, _MAGNITUDES + magnitude), _BINS
        )

    return functools.reduce(lambda a, b: a + b, map(count, arrays))


def _int32_sum(x: Any) -> Any:
    xp = namespace(x)
    return xp.sum(x, axis=0, dtype=xp.int32)


def _covered(counts: Any, coverage: float) -> Range:
    xp = namespace(counts)
    outside = (1 - coverage) / 2 * xp.sum(counts)
    below = xp.cumulative_sum(counts, axis=0)  # with the bin itself
    above = xp.sum(counts) - below + counts
    place = iota(xp, _BINS, counts)
    first = xp.min(xp.where((below > outside) & (counts > 0), place, _MAGNITUDES))
    last = xp.max(xp.where((above > outside) & (counts > 0), place, _MAGNITUDES - 1))
    # The outer edge of a bin is the inner one of the next.
    low = -_edge(xp, xp.clip(_MAGNITUDES - first, 0, None))
    return Range(low, _edge(xp, xp.clip(last - (_MAGNITUDES - 1), 0, None)))


def _edge(xp: Any, magnitude: Any) -> Any:
    """Returns the smallest magnitude of a bin; 0 of the first."""
    edge = bits_float(xp, xp.astype((magnitude + _FIRST) << _SHIFT, xp.int32))
    return xp.where(magnitude == 0, 0.0, edge)
