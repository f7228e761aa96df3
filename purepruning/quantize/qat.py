"""Quantisation-aware training: weights by their range as it is, activations by an average range.

Jacob et al. 2017, arXiv:1712.05877; NNI's QAT_Quantizer. Inside of the loss::

    weights = qat.weights(params, state, config)
    logits, seen = linen.replace(model, weights, x, at=qat.activations(state, config))

and after the step ``state = qat.update(state, seen, config)``. A state is a pytree of a few
scalars, and whether ``quant_start_step`` is reached is computed from it: one compiled step, or one
``jax.lax.scan``, runs across it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from purepruning.arguments import flag, instance, shown
from purepruning.arrays import namespace, zeros
from purepruning.quantize import observers
from purepruning.quantize.config import QuantizationConfig, Target, check_quantization
from purepruning.quantize.fake import fake_quantize
from purepruning.quantize.integers import Levels, weight_levels
from purepruning.quantize.ranges import quantized_weight, range_levels, scale_of
from purepruning.quantize.targets import (
    AtSite,
    any_leaf,
    arrays_at,
    check_sites,
    each_weight,
    map_arrays,
)
from purepruning.types import Params


class State(NamedTuple):
    """Where training is.

    Attributes:
        step: how often the state was updated, int32.
        averages: a :class:`purepruning.quantize.observers.MovingAverage` by site.
    """

    step: Any
    averages: dict[str, Any]


def init(params: Params, config: QuantizationConfig) -> State:
    """Returns the state before the first step; ``params`` say for which framework and device."""
    check_quantization("qat.init", config)
    step = zeros(any_leaf("qat.init", params), (), "int32")
    return State(step, observers.init(params, config, "moving_average"))


def weights(params: Params, state: State, config: QuantizationConfig) -> Params:
    r"""Returns ``params`` with the weights of ``config`` fake-quantised by their own range.

    $$\hat W = \mathrm{fake\_quantize}(W, s(\min W, \max W), z(\min W, \max W))$$

    Before its ``quant_start_step`` (the first step is 1) a weight is as it is. Gradients go
    straight through, see :func:`purepruning.quantize.fake_quantize`.

    Raises:
        KeyError, TypeError, ValueError: ``params`` do not have the weights of ``config``.

    >>> import jax.numpy as jnp
    >>> import purepruning as pp
    >>> params = {"fc.w": jnp.array([[1.0, -2.0, 3.5], [0.0, 5.0, -1.0]])}
    >>> layer = pp.make_layer(params, "fc.w", "Linear", out_axes=0, in_axes=1)
    >>> config = pp.resolve_quantization([{"quant_types": ["weight"], "quant_bits": 3}], [layer])
    >>> weights(params, init(params, config), config)["fc.w"].tolist()
    [[1.0, -2.0, 4.0], [0.0, 5.0, -1.0]]
    """
    _check_state("qat.weights", state)

    def quantized(weight: Any, target: Target, step: Any) -> Any:
        return _from_start(step, target, quantized_weight(weight, target), weight)

    return each_weight("qat.weights", params, config, quantized, state.step)


def levels(params: Params, config: QuantizationConfig) -> dict[str, Levels]:
    """Returns by site how integers stand for quantised weights, for :mod:`integers`."""
    return weight_levels("qat.levels", params, config, range_levels)


def activations(
    state: State, config: QuantizationConfig, *, training: bool = True
) -> dict[str, AtSite]:
    """Returns functions for an adapter's ``replace``, which fake-quantise inputs and outputs.

    In training by the average range with this batch in it; they find the batch's range, for
    :func:`update`. In evaluation by the state's, and they find nothing; what was never observed is
    left as it is.
    Before its ``quant_start_step`` a value is left as it is, though observed.
    """
    _check_state("qat.activations", state)
    check_quantization("qat.activations", config)
    check_sites("qat.activations: state.averages", state.averages, config.activations, "qat.init")
    flag(training, "qat.activations: training")

    def at(target: Target) -> AtSite:
        average = state.averages[target.site]
        where = f"qat.activations: state.averages[{target.site!r}]"
        instance(average, observers.MovingAverage, where, "as qat.init makes it")

        def quantize(value: Any) -> tuple[Any, Any]:
            arrays, seen, now = arrays_at("qat.activations", target, value), None, average
            if training:
                seen = observers.range_of(arrays)
                now = observers.after(average, seen)
            scale = scale_of(target, *observers.bounds(now))

            def quantized(x: Any) -> Any:
                xp = namespace(x)
                y = fake_quantize(x, *scale, *target.range)
                return _from_start(state.step, target, xp.where(now.weight > 0, y, x), x)

            return map_arrays(quantized, value), seen

        return quantize

    return {target.site: at(target) for target in config.activations}


def update(state: State, seen: Mapping[str, Any], config: QuantizationConfig) -> State:
    """Returns the state after a step; ``seen`` is what ``replace`` found in it.

    In data-parallel training give what all replicas have seen, lows by ``pmin`` and highs by
    ``pmax`` (of torch ``all_reduce`` with ``MIN`` and ``MAX``): the state is then the same on all
    of them, and that of one process with the whole batch.

    Raises:
        KeyError: nothing was seen at a site.
    """
    _check_state("qat.update", state)
    return State(state.step + 1, observers.update(state.averages, seen, config))


def _from_start(step: Any, target: Target, quantized: Any, x: Any) -> Any:
    if target.start_step <= 1:
        return quantized
    return namespace(x).where(step + 1 >= target.start_step, quantized, x)


def _check_state(where: str, state: Any) -> None:
    instance(state, State, f"{where}: state", "what qat.init returned")
    if "int" not in str(getattr(state.step, "dtype", "")) or state.step.shape:
        raise TypeError(
            f"{where}: state.step must be a number of steps, as qat.init makes it, got "
            f"{shown(state.step)}"
        )
