"""Statistics that follow the weights, in a few lines of NumPy each, for the laws of pruners.

A channel's statistics depend on its own weights alone, in one way everywhere: so its mask must move
with it, scale with it, and stay where it is already zero.
"""

import numpy as np

from purepruning import NM
from purepruning.matrices import form
from purepruning.stats import activations, gradients, inputs
from purepruning.stats.accumulate import CompensatedSum, WideCount
from tests import oracle

POSITIONS = 2001  # so many that hardly any two channels have equally many zeros


def as_total(kind, x):
    """Numbers as a ``WideCount`` or ``CompensatedSum``."""
    x = np.asarray(x)
    if kind is WideCount:
        return WideCount((x >> 20).astype(np.int32), (x & (2**20 - 1)).astype(np.int32))
    return CompensatedSum(x.astype(np.float32), np.zeros_like(x, np.float32))


def nothing(params, layers, granularity):
    return None


def seed(number):
    """A random key in the place of statistics."""
    return lambda params, layers, granularity: np.uint32(number)


def active(params, layers, granularity=None):
    """Activation statistics of outputs ``relu(weight * input)``, over small integers as inputs."""
    fields = {field: {} for field in activations.ActivationStats._fields}
    for layer in layers:
        ids = oracle.members(layer) * layer.out_channels
        ids = ids + oracle.unit_ids(layer, "output_channel")
        order = np.argsort(ids.reshape(-1), kind="stable")
        rows = np.float64(params[layer.weight]).reshape(-1)[order]
        rows = rows.reshape(-1, layer.out_channels, rows.size // (ids.max() + 1))
        x = np.random.default_rng(rows.shape[-1]).integers(-3, 4, (rows.shape[-1], POSITIONS))
        y = np.maximum(rows @ x, 0)
        for field, kind, total in (
            ("samples", WideCount, POSITIONS),
            ("positions", WideCount, POSITIONS),
            ("zeros", WideCount, np.sum(y == 0, -1)),
            ("sums", CompensatedSum, np.sum(y, -1)),
            ("magnitudes", CompensatedSum, np.sum(np.abs(y), -1)),
            ("squares", CompensatedSum, np.sum(y * y, -1)),
        ):
            fields[field][layer.name] = as_total(kind, total)
    return activations.ActivationStats(**fields)


def magnitudes(params, layers, granularity=None):
    """The magnitude of every weight, as scores by layer."""
    return {layer.name: np.abs(params[layer.weight]) for layer in layers}


def slopes(params, layers, granularity, keep=gradients.KEPT):
    """Gradient statistics of one step, with gradients of 1 or -1 by position."""
    single = granularity == "element" or isinstance(granularity, NM)
    kept = {kind: {} for kind in gradients.KEPT}
    for layer in layers:
        term = np.float64(params[layer.weight])
        term = term * np.where(np.arange(term.size) % 3 == 0, -1, 1).reshape(term.shape)

        def unit(x, layer=layer):
            return x if single else oracle.unit_sums(x, layer, granularity)

        kept["squares"][layer.name] = unit(term**2)
        kept["grouped"][layer.name] = unit(term) ** 2
        kept["signed"][layer.name] = unit(term)
    totals = (
        {name: as_total(CompensatedSum, x) for name, x in kept[kind].items()}
        if kind in keep
        else {}
        for kind in gradients.KEPT
    )
    return gradients.GradientStats(as_total(WideCount, 1), *totals)


def slopes_of_elements(params, layers, granularity):
    """The same of single weights, whatever is pruned."""
    return slopes(params, layers, "element", ["squares"])


def movement(params, layers, granularity):
    """Movement scores, by layer: sums of magnitudes, which are zero where weights are."""
    single = granularity == "element" or isinstance(granularity, NM)
    scores = {}
    for layer in layers:
        x = np.abs(np.float64(params[layer.weight]))
        x = x if single else oracle.unit_sums(x, layer, granularity)
        scores[layer.name] = x.astype(np.float32)
    return scores


def fed(params, layers, granularity=None, keep=("squares", "grams")):
    """Statistics of inputs that are small integers, a few more than there are columns."""
    fields = {field: {} for field in inputs.InputStats._fields}
    for layer in layers:
        f = form("test", layer)
        rng = np.random.default_rng(f.columns)
        # The same for all members, so that channels may change places between groups.
        x = rng.integers(-3, 4, (1, f.columns + 5, f.columns)).astype(np.float64)
        x = np.broadcast_to(x, (f.members, *x.shape[1:]))
        fields["positions"][layer.name] = as_total(WideCount, f.columns + 5)
        for kind, total in (
            ("squares", (x * x).sum(1)),
            ("sums", x.sum(1)),
            ("means", x.mean(1) ** 2),
            ("grams", x.transpose(0, 2, 1) @ x),
        ):
            if kind in keep:
                fields[kind][layer.name] = as_total(CompensatedSum, total)
    return inputs.InputStats(**fields)


def norms(params, layers, granularity=None):
    """The same, of which norms alone are kept."""
    return fed(params, layers, keep=("squares",))
