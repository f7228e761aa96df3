"""The smaller model: cut parameters, and a function that computes with them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from purepruning.arguments import flag, is_number, missing, one_of, shown
from purepruning.arrays import is_array as is_numbers
from purepruning.arrays import is_numpy, is_spread, layout_of, spread_over
from purepruning.coupling.coupling import Coupling, check_coupling
from purepruning.coupling.plan import Cut, Plan, cut_array, plan_of, units_of_plan
from purepruning.coupling.removal import Removal
from purepruning.coupling.shrink_report import (
    Norms,
    ShrinkReport,
    Shrunk,
    check_plan,
    check_same,
)
from purepruning.coupling.unit_masks import Chosen, Conflicts
from purepruning.jaxpr.call import Call, check_function, is_array, trace_call
from purepruning.jaxpr.couple import Analysis, State, analyse, check_outputs
from purepruning.jaxpr.emit import EMIT
from purepruning.jaxpr.interpret import Run
from purepruning.jaxpr.program import holds_tracers
from purepruning.masks import by_path, merge_masks, to_numpy, zero_pruned
from purepruning.trees import flatten
from purepruning.types import Masks, Params


def shrink(
    fn: Callable[..., Any],
    params: Params,
    masks: Masks,
    coupling: Coupling,
    /,
    *inputs: Any,
    norms: Norms = "original",
    conflicts: Conflicts = "keep",
    donate: bool = False,
    **kwargs: Any,
) -> Shrunk:
    """Returns a smaller model that computes what the masked one does.

    A unit is removed where the masks prune its channels in the layers that make them; scales,
    biases and the layers that read them follow. Weights that are masked one by one stay, as zeros.
    The result equals ``fn(apply_masks(params, report.masks), *inputs, **kwargs)``.

    Args:
        fn: the function that was coupled, ``fn(params, *inputs, **kwargs)``.
        params: its parameters.
        masks: masks of any pruner, or of :meth:`Coupling.masks`.
        coupling: what :func:`couple` returned for ``fn`` and ``params``.
        *inputs, **kwargs: arrays or shapes, as for :func:`couple`. Keywords ``norms``,
            ``conflicts`` and ``donate`` of the function's own cannot be given; wrap it.
        norms: what a mean over an axis that shrinks divides by: ``"original"`` keeps the number
            of positions there were, and adds to sums what removed positions would: the masked model
            exactly. ``"kept"`` averages over what is kept, as a natively smaller layer does.
        conflicts: what to do where the layers that make a unit disagree: ``"keep"`` keeps the
            unit, with what is masked of it as zeros, ``"remove"`` removes it everywhere,
            ``"refuse"`` raises. The report lists it.
        donate: whether the arrays of ``params`` that are cut may be deleted, each as soon as its
            smaller copy is there, so that both models never lie in memory together.

    Raises:
        ValueError: masks that disagree, so that no unit can be removed or with
            ``conflicts="refuse"``; uneven groups; an axis that would be emptied; another
            ``fn`` or other parameters than were coupled; an unknown option.
        KeyError: a mask names no parameter.

    >>> import jax, jax.numpy as jnp
    >>> from purepruning.jaxpr.couple import couple
    >>> def mlp(params, x):
    ...     return jax.nn.relu(x @ params["one"]) @ params["two"]
    >>> params = {"one": jnp.ones((3, 8)), "two": jnp.ones((8, 2))}
    >>> coupling = couple(mlp, params, jnp.ones((1, 3)))
    >>> masks = coupling.masks([1, 2, 3, 4], params)
    >>> small = shrink(mlp, params, masks, coupling, jnp.ones((1, 3)))
    >>> jax.tree.map(jnp.shape, small.params), small.fn(small.params, jnp.ones((1, 3))).tolist()
    ({'one': (3, 4), 'two': (4, 2)}, [[12.0, 12.0]])
    """
    check_function(fn, "shrink")
    one_of("norms", norms, ("original", "kept"))
    flag(donate, "donate")
    check_coupling("shrink", coupling)
    tree = flatten(params)
    for path, leaf in tree.leaves.items():
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise TypeError(f"params: {path!r} is a shape; to be cut it must be an array")
    chosen = coupling.chosen(masks, params, conflicts=conflicts)
    plan = plan_of(coupling, chosen.removed)
    found = analyse(trace_call(fn, params, inputs, kwargs), coupling.outputs)
    check_same(coupling, found.coupling)
    complete = merge_masks(coupling.masks(np.flatnonzero(chosen.removed), params), masks)
    given = by_path(masks, tree.leaves)
    left, whole = Counter(map(id, tree.leaves.values())), _whole_axes(tree.leaves, plan)
    leaves = {}
    for path, leaf in tree.leaves.items():
        leaves[path] = _small(leaf, given.get(path), plan.cuts.get(path, ()))
        left[id(leaf)] -= 1
        if donate and isinstance(leaf, jax.Array) and leaves[path] is not leaf:
            jax.block_until_ready(leaves[path])
            if not left[id(leaf)]:  # one array may be several parameters
                leaf.delete()
    small = tree.rebuild(leaves)
    result = _shrunk(fn, small, plan, complete, found, norms, chosen)
    return dataclasses.replace(result, report=dataclasses.replace(result.report, whole=whole))


def _small(leaf: Any, mask: Any, cuts: Sequence[Cut]) -> Any:
    """Returns what stays of a parameter, with zeros where a mask has them; one copy at a time."""
    small = cut_array(leaf, cuts)
    if mask is None:
        return small
    # Axes that are cut must be there; along the others a mask may have one position for all.
    needed = {a for cut in cuts for a in (cut.axis, cut.by) if a is not None}
    host = to_numpy(mask)
    host = host.reshape((1,) * (len(leaf.shape) - host.ndim) + host.shape)
    shape = [n if a in needed else host.shape[a] for a, n in enumerate(leaf.shape)]
    kept = cut_array(np.broadcast_to(host, shape), cuts)
    if kept.all():
        return small
    return zero_pruned(small, spread_over(kept, small) if is_spread(small) else jnp.asarray(kept))


def _whole_axes(params: dict[str, Any], plan: Plan) -> tuple[str, ...]:
    """Returns which axes of parameters do not divide over their devices any more."""
    found = []
    for path, leaf in params.items():
        if path in plan.cuts and is_spread(leaf):
            shape, spec = plan.shape(path), leaf.sharding.spec
            for axis in layout_of(leaf.sharding, shape)[1]:
                found.append(f"{path} axis {axis} of {shape[axis]}, over {spec[axis]!r}")
    return tuple(found)


def rebuild(
    fn: Callable[..., Any],
    params: Params,
    plan: Plan,
    /,
    *inputs: Any,
    outputs: Any = True,
    norms: Norms = "original",
    **kwargs: Any,
) -> Shrunk:
    """Returns what :func:`shrink` returned, again, from the plan of its report.

    No masks are needed and no weights: ``params`` may be shapes, and then the result's are, which
    say what to read from a checkpoint of the small model.

    Args:
        fn: the whole function, ``fn(params, *inputs, **kwargs)``.
        params: its parameters, or their shapes.
        plan: of the report, maybe from a file (:func:`purepruning.load_plan`).
        *inputs, **kwargs: as for :func:`shrink`.
        outputs: as it was for :func:`couple`; matters only where a plan fits in several ways.
        norms: as it was for :func:`shrink`.

    Raises:
        ValueError: the plan is for other parameters, or for a function that couples others; an
            unknown option.
        TypeError: ``plan`` is no plan.

    >>> import jax, jax.numpy as jnp
    >>> from purepruning.coupling.plan import Cut, Plan
    >>> def mlp(params, x):
    ...     return jax.nn.relu(x @ params["one"]) @ params["two"]
    >>> params = {"one": jax.ShapeDtypeStruct((3, 8), "float32")}
    >>> params["two"] = jax.ShapeDtypeStruct((8, 2), "float32")
    >>> keep = np.array([0, 5])
    >>> cuts = {"one": (Cut(1, keep),), "two": (Cut(0, keep),)}
    >>> plan = Plan({"one": (3, 8), "two": (8, 2)}, cuts, ())
    >>> small = rebuild(mlp, params, plan, jnp.ones((1, 3)))
    >>> {name: x.shape for name, x in small.params.items()}
    {'one': (3, 2), 'two': (2, 2)}
    """
    check_function(fn, "rebuild")
    check_outputs(outputs)
    one_of("norms", norms, ("original", "kept"))
    check_plan(plan)
    found, removed = fitted(trace_call(fn, params, inputs, kwargs), plan, outputs)
    units = np.flatnonzero(removed)
    small, masks = plan.apply(params), found.coupling.masks(units, params)
    return _shrunk(fn, small, plan, masks, found, norms, Chosen(removed, (), ()))


def _shrunk(
    fn: Callable[..., Any],
    params: Any,
    plan: Plan,
    masks: Any,
    found: Analysis,
    norms: Norms,
    chosen: Chosen,
) -> Shrunk:
    function = ShrunkFunction(fn, plan, norms, found.coupling.outputs)
    before, after = found.coupling.cost(), found.coupling.cost(chosen.removed)
    report = ShrinkReport(
        plan,
        masks,
        (before[0], after[0]),
        (before[1], after[1]),
        norms,
        len(found.flow.statistics),
        chosen.restored,
        chosen.extended,
        reason="given as a function, not as a model",
    )
    return Shrunk(None, function, params, report)


def fitted(call: Call, plan: Plan, outputs: Any) -> tuple[Analysis, np.ndarray]:
    """Returns a call with its atoms, and the units of it that a plan removes.

    Outputs that must stay whole did so when the plan was made. Where the function returns others
    here (statistics, in training), those may shrink along: then nothing is held by its outputs.
    What is a layer's in another call (a state that only training reads) may be a mere table here.

    Raises:
        ValueError: the plan does not fit the call.
    """
    free = jax.tree.map(lambda x: x if isinstance(x, State) else False, outputs)
    for given in (outputs, free):
        try:
            found = analyse(call, given, tables=True)
            return found, units_of_plan(found.coupling, plan)
        except (TypeError, ValueError):
            continue  # other outputs, or held by them
    found = analyse(call, False, tables=True)
    return found, units_of_plan(found.coupling, plan)


class ShrunkFunction:
    """A function of parameters that a plan cut; traceable, for inputs of any shape.

    The original function is traced anew for every new shape of inputs, and its jaxpr runs with the
    smaller sizes. A pure function of its arguments; the instance only remembers traces. Outputs
    that depend on what is removed, such as updated statistics, are as small as that.
    """

    def __init__(
        self, fn: Callable[..., Any], plan: Plan, norms: Norms = "original", outputs: Any = True
    ) -> None:
        self.fn, self.plan, self.norms, self.outputs = fn, plan, norms, outputs
        self._traces: dict[Any, tuple[Analysis, Removal]] = {}

    def __call__(self, params: Any, /, *inputs: Any, **kwargs: Any) -> Any:
        """Returns ``fn`` of the smaller parameters."""
        tree = flatten(params)
        for path in self.plan.shapes:
            if path not in tree.leaves:
                raise ValueError(missing(f"params have no {path!r}", path, tree.leaves))
        full = {}
        for path, leaf in tree.leaves.items():
            if path in self.plan.shapes:
                _check_leaf(path, leaf, self.plan.shape(path))
            if not hasattr(leaf, "shape"):
                full[path] = leaf
                continue
            if path not in self.plan.shapes:
                raise ValueError(f"params have {path!r}, which the plan does not know")
            full[path] = jax.ShapeDtypeStruct(
                self.plan.shapes[path], leaf.dtype, weak_type=getattr(leaf, "weak_type", False)
            )
        arrays, treedef = jax.tree.flatten((inputs, kwargs))
        key: Any = (
            treedef,
            tuple(map(_kind, arrays)),
            tuple((path, _kind(x)) for path, x in full.items()),
        )
        try:
            remembered = self._traces.get(key)
        except TypeError:  # an argument that cannot be hashed
            key, remembered = None, None
        if remembered is None:
            remembered = self._trace(tree.rebuild(full), inputs, kwargs)
            # What a closure holds of an outer transformation must not outlive it.
            if key is not None and not holds_tracers(remembered[0].program):
                self._traces[key] = remembered
        analysis, removal = remembered
        weights = [tree.leaves[path] for path in analysis.paths.values()]
        given = [x for x in arrays if is_array(x)]
        found = Run(analysis.program, analysis.trace, removal, EMIT).results([*weights, *given])
        return jax.tree.unflatten(analysis.out_tree, found)

    def _trace(
        self, params: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Analysis, Removal]:
        call = trace_call(self.fn, params, inputs, kwargs)
        found, removed = fitted(call, self.plan, self.outputs)
        return found, Removal(found.flow, removed[found.numbers], self.norms)


def _check_leaf(path: str, leaf: Any, shape: tuple[int, ...]) -> None:
    """Raises unless a leaf can be what a plan cut to a shape."""
    if is_number(leaf) and not hasattr(leaf, "shape"):
        found: tuple[int, ...] = ()
    elif isinstance(leaf, jax.Array) or (is_numpy(leaf) and is_numbers(leaf)):
        found = tuple(leaf.shape)
    else:
        raise TypeError(
            f"params: {path!r} must be an array of numbers, got {shown(leaf)}; give the parameters "
            "that shrink returned"
        )
    if found != shape:
        raise ValueError(f"{path!r} has shape {found}, but the plan cuts it to {shape}")


def _kind(x: Any) -> Any:
    """What a trace depends on: an array's type, anything else itself (``1`` is not ``True``)."""
    if hasattr(x, "shape"):
        return tuple(x.shape), getattr(x, "dtype", None), getattr(x, "weak_type", False)
    return type(x), repr(x) if isinstance(x, float) else x
