"""The adapter for Haiku: the layer table of a transformed function, and its layers' outputs."""

from __future__ import annotations

import dataclasses
import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import haiku as hk
import jax

from purepruning.arguments import adapter_of, missing, wrong_model
from purepruning.layers import Layer, Window
from purepruning.trees import flatten
from purepruning_interop._marks import called, mark
from purepruning_interop._table import (
    Owner,
    Param,
    Shape,
    Weight,
    float_shapes,
    in_out,
    join,
    ranked,
    rows,
    split_static,
    stacked,
    window,
)


def layers(
    model: Any, variables: Mapping[str, Any], /, *inputs: Any, rng: Any = None, **kwargs: Any
) -> tuple[Layer, ...]:
    """Returns the layer table of a Haiku function: one row per weight, in the order of ``init``.

    Haiku's parameters do not say which class made them, so ``model.init`` is traced
    abstractly (``jax.eval_shape``): nothing is computed, inputs may be ``jax.ShapeDtypeStruct``,
    and neither a key nor a state is needed. ``model`` may come from ``hk.transform``,
    ``hk.transform_with_state``, ``hk.without_apply_rng`` or ``hk.multi_transform``. A layer's name
    has a dot for every ``/`` and ``/~/`` of the module's (``"mlp.linear_0"``), the weight's path is
    as :func:`purepruning.leaf_paths` spells it (``"mlp/~/linear_0.w"``). Axes that ``hk.lift`` or
    ``hk.layer_stack`` added are ``stack_axes``.

    A parameter of two axes or more in a module of another class is a row without output and input
    axes, of the class's name as type, under its own dotted name with the module's as alias; one
    made outside any module has an empty type, and so has what a known class holds besides its
    weight and bias. Of fewer axes (not counting stack axes), and norms
    without a scale, are no rows.

    Args:
        model: the transformed function.
        variables: its parameters; some may be missing (as after ``hk.data_structures.partition``),
            and have no row then. Or ``{"params": params, "state": state}``, as :func:`couple` takes
            them: then the paths of the table begin with ``params.``.
        *inputs: what a call takes after params, state and key; arrays are only looked at for shape
            and dtype.
        rng: has no effect, and is here so that the arguments of :func:`couple` can be passed.
        **kwargs: further arguments of the call, such as ``is_training``; those that are no arrays
            are not traced.

    Raises:
        TypeError: ``model`` has no ``init``, or ``variables`` are no mapping of mappings.
        ValueError: ``params`` has parameters that the function does not make with these inputs, or
            of other shapes.

    >>> import haiku as hk, jax
    >>> model = hk.transform(lambda x: hk.nets.MLP([8, 4])(x))
    >>> x = jax.ShapeDtypeStruct((1, 2), "float32")
    >>> params = jax.eval_shape(model.init, jax.random.key(0), x)
    >>> [(layer.name, layer.weight, layer.out_axes) for layer in layers(model, params, x)]
    [('mlp.linear_0', 'mlp/~/linear_0.w', (1,)), ('mlp.linear_1', 'mlp/~/linear_1.w', (1,))]
    """
    del rng
    where = "layers(model, variables, *inputs)"
    check(where, model, variables)
    params, state = split(variables)
    arrays, put = split_static((inputs, kwargs))
    made: dict[str, _Made] = {}

    def trace(arrays: Any) -> Any:
        inputs, kwargs = put(arrays)
        with hk.intercept_methods(_recorder(made)):
            return model.init(jax.random.key(0), *inputs, **kwargs)

    result = jax.eval_shape(trace, arrays)
    initial = result[0] if isinstance(result, tuple) else result
    leaves = flatten(params).leaves
    _check(where, leaves, flatten(initial).leaves)

    modules = dict.fromkeys([m.module for m in made.values()] + list(params))
    names = dotted(m for m in modules if m in params)
    owners = [_owner(name, module, params[module], made) for module, name in names.items()]
    found = rows(owners, float_shapes(leaves))
    return found if state is None else tuple(_inside(layer, "params") for layer in found)


def _inside(layer: Layer, prefix: str) -> Layer:
    bias = None if layer.bias is None else join(prefix, layer.bias)
    return dataclasses.replace(layer, weight=join(prefix, layer.weight), bias=bias)


def split(variables: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any] | None]:
    """Returns the parameters and the state in ``variables``; None where there is no state."""
    params, state = (variables.get(name) for name in ("params", "state"))
    if len(variables) != 2 or not (isinstance(params, Mapping) and isinstance(state, Mapping)):
        return variables, None
    # Modules of these names hold arrays themselves.
    if not all(isinstance(own, Mapping) for own in (*params.values(), *state.values())):
        return variables, None
    return params, state


def applied(where: str, model: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
    """Returns what the function does.

    Raises:
        ValueError: the parameters are those of another one.
    """
    try:
        return model.apply(params, *args, **kwargs)
    except ValueError as error:
        if "Unable to retrieve parameter" not in str(error):
            raise
        raise ValueError(f"{where}: variables are not those of this function: {error}") from error


def leading_arguments(where: str, transformed: Any, state: Any, rng: Any) -> tuple[Any, ...]:
    """Returns what ``apply`` takes between the parameters and the inputs."""
    takes = tuple(inspect.signature(transformed.apply).parameters)[1:3]
    found: tuple[Any, ...] = ()
    for name, value in {"state": state, "rng": rng}.items():
        if name in takes:
            if name == "state" and value is None:
                raise TypeError(
                    f"{where}: the function has a state; pass variables as "
                    '{"params": params, "state": state}'
                )
            found += (value,)
        elif value is not None:
            raise TypeError(
                f"{where}: apply of this function takes no {name}, but one was passed; leave it out"
            )
    return found


@jax.tree_util.register_pytree_node_class
class Tracked:
    """A parameter that knows the full name of its module, inside ``hk.lift`` and scans too."""

    def __init__(self, value: Any, module: str) -> None:
        self.value, self.module = value, module

    def tree_flatten(self) -> tuple[tuple[Any], str]:
        """Returns the array, and whose it is."""
        return (self.value,), self.module

    @classmethod
    def tree_unflatten(cls, module: str, children: Sequence[Any]) -> Tracked:
        """Returns the array with its owner again."""
        return cls(children[0], module)


def marker(
    sides: Mapping[str, tuple[str, ...]],
) -> tuple[Callable[..., Any], Callable[..., Any], dict[Any, str]]:
    """Returns a getter that learns which module has tracked parameters, and an interceptor.

    The interceptor marks what these modules read and return. Whose input a mark is of is known
    after the call only: every call's input has a key of its own, and the dictionary says, after the
    trace, which module each of them is of.
    """
    owners: dict[int, tuple[Any, str]] = {}  # the module is kept, so that its id stays its own
    of_calls: dict[Any, str] = {}
    inputs = any("input" in some for some in sides.values())

    def get(next_getter: Any, value: Any, context: hk.GetterContext) -> Any:
        if isinstance(value, Tracked):
            owners[id(context.module)] = context.module, value.module
            value = value.value
        return next_getter(value)

    def intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        key = object()
        result = called(key, ("input",) if inputs and (args or kwargs) else (), call, args, kwargs)
        if id(context.module) not in owners:
            return result
        name = owners[id(context.module)][1]
        of_calls[key] = name
        return mark((name, "output"), result) if "output" in sides[name] else result

    return get, intercept, of_calls


class _Made(NamedTuple):
    """What was seen when a parameter was made: by which module, in which shape, and its role."""

    module: str
    class_name: str
    shape: Shape
    weight: Weight | None
    is_other: bool


def _owner(name: str, module: str, params: Mapping[str, Any], made: Mapping[str, _Made]) -> Owner:
    """Returns what is known of one module, its parameters in the order in which they were made."""
    order = {path: i for i, path in enumerate(made)}
    paths = {key: f"{module}.{key}" for key in params}
    seen = {key: made[path] for key, path in paths.items() if path in made}
    seen = dict(sorted(seen.items(), key=lambda item: order[paths[item[0]]]))
    own = {}
    for key in dict.fromkeys([*seen, *params]):
        shape = tuple(params[key].shape)
        stack = stacked(shape, seen[key].shape) if key in seen else ()
        own[key] = Param(paths[key], shape, stack)
    return Owner(
        names=(name,),
        class_name=next((m.class_name for m in seen.values()), ""),
        params=own,
        weights=tuple(m.weight for m in seen.values() if m.weight),
        others=tuple(key for key, m in seen.items() if m.is_other),
    )


def _recorder(made: dict[str, _Made]) -> Callable[..., Any]:
    """Returns an interceptor that notes, by its path, every parameter a module makes."""

    def create(make: Any, shape: Any, dtype: Any, init: Any, context: hk.GetterContext) -> Any:
        # A module inside hk.lift or hk.layer_stack makes one copy, under a shorter name.
        name = (context.lifted_prefix_name or "") + context.module_name
        weight, is_other = _role(context.module, context.name, tuple(shape))
        made[f"{name}.{context.name}"] = _Made(
            name, type(context.module).__name__, tuple(shape), weight, is_other
        )
        return make(shape, dtype, init)

    depth = 0

    def intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        nonlocal depth
        if isinstance(context.module, hk.BatchNorm) and context.method_name == "__call__":
            _initialize(context.module, args[0] if args else kwargs["inputs"])
        depth += 1
        try:
            if depth > 1:
                return call(*args, **kwargs)
            with hk.custom_creator(create):
                return call(*args, **kwargs)
        finally:
            depth -= 1

    return intercept


def _initialize(norm: hk.BatchNorm, inputs: Any) -> None:
    """Makes the running statistics of a norm, which Haiku itself makes in training only."""
    channel = norm.channel_index % inputs.ndim
    averaged = norm.axis
    if averaged is None:
        averaged = [axis for axis in range(inputs.ndim) if axis != channel]
    shape = [1 if axis in averaged else n for axis, n in enumerate(inputs.shape)]
    for average in (norm.mean_ema, norm.var_ema):
        average.initialize(shape, inputs.dtype)


def check(where: str, model: Any, variables: Any) -> None:
    """Raises TypeError if these are no function of Haiku, or not what it takes."""
    transformed = callable(getattr(model, "init", None)) and hasattr(model, "apply")
    if adapter_of(model) not in ("haiku", None) or not transformed:
        raise wrong_model(where, model, "haiku", "what hk.transform returns")
    if type(variables) is tuple:
        raise TypeError(
            f"{where}: variables of a function with a state must be one mapping; pass "
            '{"params": params, "state": state}'
        )
    params = split(variables)[0] if isinstance(variables, Mapping) else variables
    if not isinstance(params, Mapping) or not all(isinstance(p, Mapping) for p in params.values()):
        raise TypeError(
            f"{where}: variables must be what model.init returns, a mapping of module names to "
            f"mappings; got {type(params).__name__}"
        )


def _check(where: str, given: Mapping[str, Any], initial: Mapping[str, Any]) -> None:
    for path, leaf in given.items():
        if path not in initial:
            raise ValueError(
                missing(f"{where}: the function makes no parameter {path!r}", path, initial)
            )
        if tuple(leaf.shape) != tuple(initial[path].shape):
            raise ValueError(
                f"{where}: parameter {path!r} has shape {tuple(leaf.shape)}, but with these inputs "
                f"the function makes it {tuple(initial[path].shape)}"
            )


def dotted(modules: Iterable[str]) -> dict[str, str]:
    """Returns the dotted name of each module; those that would collide keep their ``~``."""
    full = {m: m.replace("/", ".") for m in modules}
    short = {m: "" if m == "~" else m.replace("/~/", "/").replace("/", ".") for m in full}
    count = Counter(short.values())
    return {m: short[m] if count[short[m]] == 1 else full[m] for m in full}


def _role(module: hk.Module | None, param: str, shape: Shape) -> tuple[Weight | None, bool]:
    """Returns the weight that a module's parameter is, and whether it is known to be none."""
    rank = len(shape)
    match module, param:
        case hk.Linear(), "w":
            return in_out("w", "Linear", shape, bias="b"), False
        case hk.ConvND(), "w":
            type_, groups = f"Conv{rank - 2}d", module.feature_group_count
            weight = in_out("w", type_, shape, bias="b", groups=groups)
            weight = weight._replace(window=_window(module, module.kernel_dilation, rank - 2))
            return _channels(weight, module.channel_index, rank), False
        case hk.DepthwiseConv1D() | hk.DepthwiseConv2D() | hk.DepthwiseConv3D(), "w":
            type_, groups = f"Conv{rank - 2}d", shape[-1] // module.channel_multiplier
            weight = in_out("w", type_, shape, bias="b", groups=groups)
            weight = weight._replace(window=_window(module, module.rhs_dilation, rank - 2))
            return _channels(weight, module.channel_index, rank), False
        case hk.ConvNDTranspose(), "w":
            type_ = f"ConvTranspose{rank - 2}d"
            weight = in_out("w", type_, shape, bias="b", swapped=True)
            return _channels(weight, module.channel_index, rank), False
        case hk.Embed(), "embeddings":
            return in_out("embeddings", "Embedding", shape), False
        case hk.GRU(), "w_i":
            return in_out("w_i", "GRU", shape, bias="b"), False
        case hk.GRU(), "w_h":
            return in_out("w_h", "GRU", shape), False
        case hk.BatchNorm(), "scale":
            # The scale has the rank of the input, and size 1 on the axes that are averaged over.
            averaged = module.axis
            if averaged is None:
                averaged = [a for a in range(rank) if a != module.channel_index % rank]
            axes = [a for a in range(rank) if a not in averaged]
            return _norm(ranked("BatchNorm", rank), shape, axes)._replace(output=tuple(axes)), False
        case hk.LayerNorm() | hk.RMSNorm(), "scale":
            type_ = "RMSNorm" if isinstance(module, hk.RMSNorm) else "LayerNorm"
            if isinstance(module, hk.InstanceNorm):
                type_ = ranked("InstanceNorm", rank if rank > 1 else None)
            axes = [0]
            if rank > 1:  # the rank of the input, with size 1 on all other axes
                kept = module.param_axis
                axes = list(range(rank)[kept] if isinstance(kept, slice) else kept)
            return _norm(type_, shape, axes), False
        case hk.GroupNorm(), "scale":
            return _norm("GroupNorm", shape, [0])._replace(output=(module.channel_index,)), False
        case hk.BatchNorm() | hk.LayerNorm() | hk.GroupNorm(), "offset":
            return None, True
        case (hk.Bias() | hk.GRU(), "b"):
            return None, True
    return None, False


def _window(module: Any, dilation: Any, rank: int) -> Window | None:
    if getattr(module, "lhs_dilation", (1,) * rank) != (1,) * rank:
        return None
    return window(rank, module.stride, module.padding, dilation)


def _channels(weight: Weight, channel_index: int, rank: int) -> Weight:
    """Returns the weight of a convolution whose output has its channels there."""
    return weight._replace(output=(-1,) if channel_index == -1 else (1 - rank,))


def _norm(type: str, shape: Shape, axes: Iterable[int]) -> Weight:
    out = tuple(a % len(shape) for a in axes)
    return Weight("scale", type, shape, out_axes=out, bias="offset")
