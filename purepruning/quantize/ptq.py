"""Quantisation after training: weights by their range, activations by what observers have seen.

::

    state = observers.init(params, config, "histogram")
    for x in batches:
        _, seen = linen.replace(model, params, x, at=observers.watch(state, config))
        state = observers.update(state, seen, config)
    at = ptq.activations(observers.ranges(state, coverage=0.9999), config)
    logits, _ = linen.replace(model, ptq.weights(params, None, config), x, at=at)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from purepruning.arguments import instance
from purepruning.quantize.config import QuantizationConfig, Target, check_quantization
from purepruning.quantize.fake import fake_quantize
from purepruning.quantize.integers import Levels, weight_levels
from purepruning.quantize.observers import Range
from purepruning.quantize.ranges import quantized_weight, range_levels, scale_of
from purepruning.quantize.targets import (
    AtSite,
    check_sites,
    each_weight,
    map_arrays,
    refuse_start,
)
from purepruning.types import Params


def weights(params: Params, state: None, config: QuantizationConfig) -> Params:
    """Returns ``params`` with the weights of ``config`` fake-quantised by their own range.

    As :func:`purepruning.quantize.qat.weights`, from the first step on.
    """
    refuse_start("ptq.weights", config)
    return each_weight("ptq.weights", params, config, quantized_weight)


def levels(params: Params, config: QuantizationConfig) -> dict[str, Levels]:
    """Returns by site how integers stand for quantised weights, for :mod:`integers`."""
    return weight_levels("ptq.levels", params, config, range_levels)


def activation_levels(ranges: Mapping[str, Range], config: QuantizationConfig) -> dict[str, Levels]:
    """Returns by site how integers stand for inputs and outputs of these ranges."""
    _check("ptq.activation_levels", ranges, config)
    return {t.site: Levels(*scale_of(t, *ranges[t.site]), *t.range) for t in config.activations}


def activations(ranges: Mapping[str, Range], config: QuantizationConfig) -> dict[str, AtSite]:
    """Returns functions for ``replace`` that fake-quantise inputs and outputs by known ranges.

    They find nothing. ``ranges`` are those of :func:`purepruning.quantize.observers.ranges`.

    Raises:
        KeyError: there is no range of a site.
    """
    _check("ptq.activations", ranges, config)

    def at(target: Target) -> AtSite:
        scale = scale_of(target, *ranges[target.site])

        def quantize(value: Any) -> tuple[Any, None]:
            return map_arrays(lambda x: fake_quantize(x, *scale, *target.range), value), None

        return quantize

    return {target.site: at(target) for target in config.activations}


def _check(where: str, ranges: Any, config: Any) -> None:
    check_quantization(where, config)
    check_sites(f"{where}: ranges", ranges, config.activations, "observers.ranges")
    for site in (target.site for target in config.activations):
        wanted = "a Range, as observers.ranges returns"
        instance(ranges[site], Range, f"{where}: ranges[{site!r}]", wanted)
