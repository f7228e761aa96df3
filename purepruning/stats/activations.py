"""Statistics of activations: what each output channel of a layer does, summed over a data set."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from purepruning.arguments import instance, one_of, shown
from purepruning.arrays import (
    by_numpy,
    compiled,
    erfc,
    is_array,
    namespace,
    stop_gradient,
)
from purepruning.config.config import Config
from purepruning.layers import Layer, Layers
from purepruning.stats import chunked_sums
from purepruning.stats.accumulate import (
    CompensatedSum,
    WideCount,
    add,
    count,
    empty_total,
)
from purepruning.stats.checks import (
    captured,
    check_totals,
    match,
    refuse_non_finite,
    watched,
    weight_of,
)
from purepruning.stats.merging import merged
from purepruning.trees import flatten
from purepruning.types import Params

Activation = Literal["relu", "gelu", "relu6", "identity"] | Callable[[Any], Any]


_LIMIT = 2**31  # positions in one output, which are counted in int32


class ActivationStats(NamedTuple):
    """Totals over all outputs seen so far, by layer name.

    Arrays are ``(stacked, channels)``: a row for each of the layers stacked in a layer, one row
    otherwise; channels in the order of the layer's ``out_axes``. ``samples`` and ``positions`` are
    scalars. :func:`purepruning.stats.accumulate.value` makes a float of a total.

    Attributes:
        samples: examples seen, which lie along the first axis of an output that holds neither
            stacked layers nor channels.
        positions: values seen of every channel: examples times spatial or time positions.
        zeros: how many of them were exactly zero after the activation.
        sums, magnitudes, squares: their sum, sum of magnitudes and sum of squares.
    """

    samples: dict[str, WideCount]
    positions: dict[str, WideCount]
    zeros: dict[str, WideCount]
    sums: dict[str, CompensatedSum]
    magnitudes: dict[str, CompensatedSum]
    squares: dict[str, CompensatedSum]


def init(params: Params, layers: Config | Layers) -> ActivationStats:
    """Returns the statistics of nothing, in the framework and on the devices of ``params``.

    Args:
        params: the model's parameters; only looked at for where they are.
        layers: the layers to watch: rows of the layer table, or a config, which stands for the
            layers that it prunes.

    Raises:
        KeyError: a layer's weight is not in ``params``.
        ValueError: a layer's output channels are not seen in its output.
    """
    where = "activations.init"
    leaves, table = flatten(params).leaves, watched(where, layers)
    weights = {layer.name: weight_of(where, "params", layer, leaves) for layer in table}
    shapes = {layer.name: channels(where, layer) for layer in table}

    def single() -> dict[str, WideCount]:
        return {name: empty_total(WideCount, weight) for name, weight in weights.items()}

    def of_channels(kind: Any) -> dict[str, Any]:
        return {name: empty_total(kind, weight, shapes[name]) for name, weight in weights.items()}

    return ActivationStats(
        samples=single(),
        positions=single(),
        zeros=of_channels(WideCount),
        sums=of_channels(CompensatedSum),
        magnitudes=of_channels(CompensatedSum),
        squares=of_channels(CompensatedSum),
    )


def update(
    stats: ActivationStats,
    outputs: Mapping[str, Any],
    layers: Config | Layers,
    *,
    activation: Activation,
) -> ActivationStats:
    """Returns the statistics with one batch of outputs added.

    Runs under ``jit``, ``vmap`` and ``jax.lax.scan``. Sums do not drift, however many batches there
    are (:mod:`purepruning.stats.accumulate`). Nothing of the outputs is kept, and no gradient flows
    through.

    Args:
        stats: the statistics so far.
        outputs: the raw output of every watched layer, as an adapter's ``capture`` returns them; a
            list of outputs for a layer that is called several times. Others are ignored.
        layers: the layers to watch, as in :func:`init`.
        activation: what to apply to an output first: ``"relu"``, ``"relu6"``, ``"gelu"`` (the exact
            one), ``"identity"``, or any elementwise function of float32 arrays.

    Raises:
        KeyError: a layer has no output, or no statistics.
        TypeError: an output is no array of floats. float16 is refused too: numbers below 6e-8 are
            zeros there, and would be counted as such. bfloat16 has the range of float32.
        ValueError: an output has other channels than its layer, or, where values are known, a NaN
            or infinity; statistics have other channels. Under ``jit`` and ``vmap`` NaN goes into
            the totals, and into the scores made of them.

    >>> import jax.numpy as jnp
    >>> import purepruning as pp
    >>> params = {"fc.w": jnp.ones((4, 2))}
    >>> layer = pp.make_layer(params, "fc.w", "Linear", name="fc", out_axes=1, in_axes=0)
    >>> outputs = {"fc": jnp.array([[1.0, -1.0], [2.0, 0.5], [3.0, -2.0]])}
    >>> stats = update(init(params, [layer]), outputs, [layer], activation="relu")
    >>> stats.zeros["fc"].low.tolist(), stats.sums["fc"].high.tolist()
    ([[0, 2]], [[6.0, 0.5]])
    """
    where = "activations.update"
    table = watched(where, layers)
    instance(stats, ActivationStats, f"{where}: stats", "what activations.init returned")
    check_totals(where, stats)
    instance(outputs, Mapping, f"{where}: outputs", "a mapping by layer name, as capture returns")
    if not callable(activation):
        one_of(f"{where}: activation", activation, tuple(_ACTIVATIONS))
    sizes = {layer.name: channels(where, layer) for layer in table}
    for field, totals in stats._asdict().items():
        single = field in ("samples", "positions")
        match(where, totals, dict.fromkeys(sizes, ()) if single else sizes)
    batches = {layer.name: _outputs(where, layer, outputs, stats) for layer in table}
    refuse_non_finite(where, "the output", batches)
    new = _copy(stats)
    for layer in table:
        for x in batches[layer.name]:
            _add(where, new, layer, x, activation)
    return new


def merge(a: ActivationStats, b: ActivationStats) -> ActivationStats:
    """Returns the statistics of what both have seen.

    Exact for counts; associative and commutative for sums too, up to their 47 bits. Where each
    device or process has statistics of its own data, adding them leaf by leaf merges them all:
    ``jax.lax.psum(stats, axis)``, or ``torch.distributed.all_reduce`` of every tensor.

    Raises:
        ValueError: they are of different layers, or of different channels.
    """
    return merged("activations", ActivationStats, a, b)


def channels(where: str, layer: Layer) -> tuple[int, int]:
    """Returns how many layers are stacked in a layer, and how many output channels each has.

    Raises:
        ValueError: the channels are not seen in the layer's output.
    """
    if not layer.output_axes:
        raise ValueError(
            f"{where}: layer {layer.name!r} of type {layer.type!r} has no output axes: its output "
            "channels are not seen in what it returns"
        )
    return math.prod(layer.shape[a] for a in layer.stack_axes), layer.out_channels


def _outputs(
    where: str, layer: Layer, outputs: Mapping[str, Any], stats: ActivationStats
) -> list[Any]:
    """Returns the outputs of a layer, checked against what the table says of them."""
    arrays = captured(where, "output", layer, outputs, stats.samples[layer.name])
    where = f"{where}: the output of layer {layer.name!r}"
    for x in arrays:
        xp = namespace(x)
        if not xp.isdtype(x.dtype, "real floating") or x.dtype == xp.float16:
            raise TypeError(
                f"{where} is {x.dtype}; statistics are of float32 (or bfloat16, float64) numbers"
            )
        axes, wanted = layer.output_axes or (), _sizes(layer)
        fits = all(-x.ndim <= a < x.ndim for a in axes) and len({a % x.ndim for a in axes}) == len(
            axes
        )
        if not fits or tuple(x.shape[a] for a in axes) != wanted:
            raise ValueError(
                f"{where} has shape {tuple(x.shape)}, but by its layer table row axes {axes} are "
                f"of size {wanted}"
            )
        if math.prod(x.shape) >= _LIMIT * math.prod(wanted):
            raise ValueError(f"{where} has 2**31 positions or more; split the batch")
    return arrays


def _sizes(layer: Layer) -> tuple[int, ...]:
    """Returns the sizes of the output axes."""
    stack = tuple(layer.shape[a] for a in layer.stack_axes)
    if layer.grouped == "out":  # stored per group, but one axis of the output
        return (*stack, layer.out_channels)
    return (*stack, *(layer.shape[a] for a in layer.out_axes))


def _add(where: str, new: ActivationStats, layer: Layer, x: Any, activation: Activation) -> None:
    """Adds one output to the (fresh) dictionaries of ``new``."""
    xp, name = namespace(x), layer.name
    x = stop_gradient(x)
    named = activation if isinstance(activation, str) else "identity"
    if not isinstance(activation, str):
        y = activation(xp.astype(x, xp.float32))
        if not is_array(y) or tuple(y.shape) != tuple(x.shape):
            raise ValueError(
                f"{where}: activation must be elementwise, but of the output of layer {name!r}, of "
                f"shape {tuple(x.shape)}, it made {shown(y)}"
            )
        x = y
    axes = tuple(a % x.ndim for a in layer.output_axes or ())
    batch = compiled(x, _totals, "axes", "activation")(x, axes=axes, activation=named)
    rest = [n for a, n in enumerate(x.shape) if a not in axes]
    seen = (rest[0] if rest else 1, math.prod(rest))

    def added(old: list[Any], batch: tuple[Any, ...]) -> list[Any]:
        own = [namespace(t).reshape(t, channels(where, layer)) for t in batch]
        steps: list[tuple[Any, Any]] = [
            *((count, n) for n in (*seen, own[0])),
            *((add, x) for x in own[1:]),
        ]
        return [step(total, x) for total, (step, x) in zip(old, steps, strict=True)]

    fields: list[dict[str, Any]] = list(new)
    totals = by_numpy(added, [field[name] for field in fields], batch)
    for field, total in zip(fields, totals, strict=True):
        field[name] = total


def _copy(stats: ActivationStats) -> ActivationStats:
    return ActivationStats(*(dict(field) for field in stats))  # type: ignore[arg-type]


def _totals(x: Any, *, axes: tuple[int, ...], activation: str) -> tuple[Any, ...]:
    """Returns zeros, sum, sum of magnitudes and of squares, over all axes but ``axes``."""
    xp = namespace(x)

    def terms(x: Any) -> tuple[Any, ...]:
        y = _ACTIVATIONS[activation](xp.astype(x, xp.float32))
        return xp.astype(y == 0, xp.int32), y, xp.abs(y), y * y

    if len(axes) == x.ndim:
        x, axes = x[None], tuple(a + 1 for a in axes)
    if chunked_sums.pays_off(x):
        totals = chunked_sums.sums(x, axes, terms)
    else:
        rest = tuple(a for a in range(x.ndim) if a not in axes)
        totals = tuple(xp.sum(t, axis=rest, dtype=t.dtype) for t in terms(x))
    order = tuple(sorted(axes).index(a) for a in axes)
    return tuple(xp.permute_dims(t, order) for t in totals)


# Written with comparisons that NaN fails, so that it stays.
def _relu(x: Any) -> Any:
    return namespace(x).where(x <= 0, 0.0, x)


def _relu6(x: Any) -> Any:
    return namespace(x).where(x >= 6, 6.0, _relu(x))


def _gelu(x: Any) -> Any:
    # 1 + erf would be rounded to zero below -5.6, and counted as such.
    xp = namespace(x)
    return 0.5 * x * erfc(xp, x * -(0.5**0.5))


def _identity(x: Any) -> Any:
    return x


_ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "relu": _relu,
    "relu6": _relu6,
    "gelu": _gelu,
    "identity": _identity,
}
