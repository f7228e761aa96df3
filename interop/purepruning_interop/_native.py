"""Native modules with smaller arrays: whether one computes what the shrunk function does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from purepruning.coupling.plan import Plan
from purepruning.coupling.shrink_report import ShrinkReport

#: How far the outputs of a native module and of the function may be apart, relative to the largest.
TOLERANCE = 1e-5


class ShrunkModule(NamedTuple):
    """What ``shrink`` of a model returns.

    Attributes:
        model: a model of the same class with smaller arrays; None where none computes the same.
        fn: ``fn(params, *inputs)``, which always does.
        params: the smaller parameters and statistics.
        report: what was removed.
        reason: why there is no model; empty where there is one.
    """

    model: Any
    fn: Callable[..., Any]
    params: Any
    report: ShrinkReport
    reason: str


def disagreement(
    native: Callable[..., Any], fn: Callable[..., Any], params: Any, inputs: Sequence[Any]
) -> str:
    """Returns why ``native(params, *inputs)`` is not ``fn(params, *inputs)``, or ``""``.

    Both run on random numbers instead of the parameters: a layer that is still zero hides what is
    before it.
    """
    params = _drawn(params)
    given = jax.tree.map(lambda x: _drawn(x) if isinstance(x, jax.ShapeDtypeStruct) else x, inputs)
    try:
        found = jax.jit(native)(params, *given)
    except Exception as error:  # the module's own checks may raise anything
        return f"its forward does not run: {type(error).__name__}: {error}".splitlines()[0]
    expected = jax.jit(fn)(params, *given)
    pairs = zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True)
    for one, other in pairs:
        if one.shape != other.shape:
            return f"its output has shape {other.shape}, not {one.shape}"
        scale = float(jnp.abs(one).max(initial=1e-30))
        apart = float(jnp.abs(one - other).max(initial=0.0)) / scale
        if not apart <= TOLERANCE:
            return f"its output differs by {apart:.1e} of the largest number"
    return ""


def _drawn(tree: Any) -> Any:
    rng = np.random.default_rng(0)

    def leaf(x: Any) -> Any:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x if isinstance(x, jax.Array | np.ndarray) else jnp.zeros(x.shape, x.dtype)
        # Positive, for variances; of unit gain, so that nothing saturates.
        gain = np.prod(x.shape[:-1]) ** 0.5 if len(x.shape) > 1 else 1.0
        return jnp.asarray(rng.uniform(0.5, 1.5, x.shape) / gain, x.dtype)

    return jax.tree.map(leaf, tree)


class Change(NamedTuple):
    """How one module's arrays change.

    Attributes:
        plan: what stays of every parameter.
        prefix: path of the module, with a dot behind it unless it is the root.
    """

    plan: Plan
    prefix: str

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Returns the shape of one of the module's arrays once cut; None if there is none."""
        path = self.prefix + name
        return self.plan.shape(path) if path in self.plan.shapes else None

    def groups(self, name: str, groups: int, axis: int = 0) -> tuple[int, int]:
        """Returns how many groups an axis keeps positions of, and how many positions of each."""
        path = self.prefix + name
        size = self.plan.shapes[path][axis] // groups
        kept = next((c.positions for c in self.plan.cuts.get(path, ()) if c.axis == axis), None)
        if kept is None:
            return groups, size
        left = len(np.unique(kept // size))
        return left, len(kept) // left

    def conv_groups(self, name: str, groups: int, axes: tuple[int, int]) -> int:
        """Returns the groups of a convolution; ``axes`` are the kernel's outputs and inputs."""
        old, new = self.plan.shapes[self.prefix + name], self.shape(name)
        assert new is not None
        out, into = axes
        # A channel with a kernel of its own goes with its group; other groups go evenly.
        return new[out] * groups // old[out] if groups > 1 and old[into] == 1 else groups


def attributes(
    rules: Mapping[str, Callable[[Any, Change], dict[str, Any]]], module: Any, change: Change
) -> dict[str, Any]:
    """Returns the attributes of a module that its smaller arrays change, by its class."""
    for cls in type(module).__mro__:
        if cls.__name__ in rules:
            found = rules[cls.__name__](module, change)
            return {k: v for k, v in found.items() if hasattr(module, k) and v is not None}
    return {}
