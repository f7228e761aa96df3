"""Masked/shrunk equivalence: outputs of the masked and the shrunk model, and gradients, agree."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import purepruning as pp
from purepruning.coupling.shrink_report import Shrunk
from purepruning.trees import flatten
from tests.fast import jit_once


class Found(NamedTuple):
    """How far the two models are apart, relative to the largest number of either."""

    outputs: float
    gradients: float
    coupling: pp.Coupling
    shrunk: Shrunk


def half(coupling: pp.Coupling, seed: int = 0) -> np.ndarray:
    """Half of every family of units, drawn at random."""
    return coupling.lowest(np.random.default_rng(seed).random(coupling.n_units), 0.5)


def compare(
    fn: Any, params: Any, *inputs: Any, pruned: Any = None, gradients: bool = True
) -> Found:
    """Couples, removes ``pruned`` (half of everything), and compares masked with shrunk."""
    coupling = pp.couple(fn, params, *inputs)
    masks = coupling.masks(half(coupling) if pruned is None else pruned, params)
    small = pp.shrink(fn, params, masks, coupling, *inputs)
    masked = pp.apply_masks(params, masks)

    def both(full: Any, less: Any) -> Any:
        out = (fn(full, *inputs), small.fn(less, *inputs))
        if not gradients:
            return out, None
        return out, (_gradient(fn, full, inputs), _gradient(small.fn, less, inputs))

    out, slopes = jit_once(both)(masked, small.params)
    apart = distance(*out)
    along = 0.0
    if gradients:
        along = distance(small.report.plan.apply(slopes[0]), slopes[1])
    return Found(apart, along, coupling, small)


def _gradient(fn: Any, params: Any, inputs: Any) -> Any:
    flat = flatten(params)
    floating = {p: x for p, x in flat.leaves.items() if jnp.issubdtype(x.dtype, jnp.floating)}

    def loss(leaves: Any) -> Any:
        found = jax.tree.leaves(fn(flat.rebuild({**flat.leaves, **leaves}), *inputs))
        return sum(jnp.sum(jnp.sin(y)) for y in found if jnp.issubdtype(y.dtype, jnp.floating))

    return jax.grad(loss)(floating)


def distance(one: Any, other: Any) -> float:
    """The largest difference of two trees, relative to the largest number in the first."""
    pairs = list(zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))
    arrays = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs]
    assert all(a.shape == b.shape for a, b in arrays)
    scale = max((np.abs(a).max(initial=0.0) for a, _ in arrays), default=0.0)
    apart = max((np.abs(a - b).max(initial=0.0) for a, b in arrays), default=0.0)
    return float(apart / scale) if scale else float(apart)
