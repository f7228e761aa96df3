"""Native modules with smaller arrays: whether one computes what the shrunk function does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from purepruning.arrays import is_concrete
from purepruning.coupling.plan import Plan
from purepruning.coupling.shrink_report import Shrunk
from purepruning_interop._table import is_array, split_static

#: How far the outputs of a native module and of the function may be apart, relative to the largest.
TOLERANCE = 1e-5


def with_model(
    small: Shrunk,
    model: Any,
    function: Callable[[Any], tuple[Callable[..., Any], Any]],
    inputs: Sequence[Any],
    kwargs: Mapping[str, Any],
    trained: Iterable[str],
) -> Shrunk:
    """Returns the shrunk function with the model that computes the same, if this one does.

    Args:
        small: the function and its parameters.
        model: a model of the original's class with these parameters.
        function: returns a model as a function, and its parameters.
        inputs, kwargs: what it is called with.
        trained: paths of the parameters, without statistics, for the report.
    """
    native, own = function(model)
    if not all(map(is_concrete, jax.tree.leaves((own, small.params, inputs, kwargs)))):
        raise TypeError(
            "shrink and rebuild run the smaller model, and jit or vmap traces its parameters or "
            "inputs; call them outside"
        )
    structure = jax.tree.structure(own)  # attributes of the model may be part of it

    def run(params: Any, *inputs: Any, **kwargs: Any) -> Any:
        return native(jax.tree.unflatten(structure, jax.tree.leaves(params)), *inputs, **kwargs)

    deviation, reason = _compare(run, small.fn, small.params, inputs, kwargs)
    report = dataclasses.replace(
        small.report,
        params=small.report.plan.sizes(trained),
        kind="function" if reason else "module",
        reason=reason,
        deviation=None if reason else deviation,
    )
    return Shrunk(None if reason else model, small.fn, small.params, report)


def as_function(small: Shrunk, reason: str, trained: Iterable[str]) -> Shrunk:
    """Returns the shrunk function with the reason why there is no model."""
    params = small.report.plan.sizes(trained)
    report = dataclasses.replace(small.report, params=params, reason=reason)
    return dataclasses.replace(small, report=report)


def _compare(
    native: Callable[..., Any],
    fn: Callable[..., Any],
    params: Any,
    inputs: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> tuple[float, str]:
    """Returns how far two functions are apart, and why they are not the same, or ``""``.

    Both run on random numbers instead of the parameters: a layer that is still zero hides what is
    before it.
    """
    arrays, put = split_static((tuple(inputs), dict(kwargs)))
    given = [_drawn(x) if isinstance(x, jax.ShapeDtypeStruct) else x for x in arrays]

    def run(function: Callable[..., Any]) -> list[Any]:
        def call(params: Any, arrays: Sequence[Any]) -> Any:
            inputs, kwargs = put(arrays)
            leaves = jax.tree.leaves(function(params, *inputs, **kwargs))
            return [x for x in leaves if is_array(x) and not _is_key(x)]

        return jax.jit(call)(_drawn(params), given)

    try:
        found = run(native)
    except Exception as error:  # the module's own checks may raise anything
        line = f"its forward does not run: {type(error).__name__}: {error}".splitlines()[0]
        return np.inf, line
    worst = 0.0
    for one, other in zip(run(fn), found, strict=True):
        if one.shape != other.shape:
            return np.inf, f"its output has shape {other.shape}, not {one.shape}"
        dtype = np.complex128 if np.iscomplexobj(one) else np.float64
        one, other = np.asarray(one, dtype), np.asarray(other, dtype)
        scale = max(float(np.abs(one).max(initial=0.0)), 1e-30)
        apart = float(np.abs(one - other).max(initial=0.0)) / scale
        if not apart <= TOLERANCE:
            return apart, f"its output differs by {apart:.1e} of the largest number"
        worst = max(worst, apart)
    return worst, ""


def _is_key(x: Any) -> bool:
    return bool(jnp.issubdtype(x.dtype, jax.dtypes.extended))


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
