"""The adapter for Flax Linen: the layer table of a module, and the outputs of its layers."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import errors, struct
from flax import linen as nn
from flax.core import DenyList, meta
from flax.linen.recurrent import DenseParams

from purepruning.arguments import shown, wrong_model
from purepruning.arrays import is_array
from purepruning.layers import Layer, Window
from purepruning.trees import flatten
from purepruning_interop._marks import called
from purepruning_interop._table import (
    Owner,
    Param,
    Sizes,
    Weight,
    einsum,
    float_shapes,
    general,
    in_out,
    join,
    per_channel,
    ranked,
    rows,
    split_static,
    window,
)


def layers(
    model: nn.Module,
    variables: Mapping[str, Any],
    /,
    *inputs: Any,
    rngs: Any = None,
    method: Callable[..., Any] | str | None = None,
    mutable: Any = None,
    **kwargs: Any,
) -> tuple[Layer, ...]:
    """Returns the layer table of ``model``: one row per weight, in the order of the forward pass.

    The arguments are those of ``model.apply``. The forward pass is traced abstractly
    (``jax.eval_shape``), so nothing is computed and inputs may be ``jax.ShapeDtypeStruct``. What
    lies on the way is seen through: ``nn.scan`` and ``nn.vmap`` (on whichever axis they stack the
    parameters: it is in ``stack_axes``), ``nn.remat``, ``nn.jit``, ``nn.WeightNorm`` and
    ``nn.SpectralNorm``, modules that are shared or made in ``setup``, and subclasses.

    A parameter of two axes or more in a module of another class is a row without output and input
    axes, of the class's name as type, under its own dotted name with the module's as alias.
    What a known class holds besides its weight and bias, and what these inputs do not reach, are
    such rows with an empty type and no alias. Of fewer axes (not counting stack axes), and norms
    without a scale, are no rows. The weight of a module that is itself the root goes by the name
    of the parameter (``"kernel"``).

    Args:
        model: the Linen module.
        variables: what ``model.init`` returned, or only its ``"params"``. The paths of the table
            are those of what is passed: they begin with ``params.`` in the first case.
        *inputs: what a call of the model takes; arrays are only looked at for shape and dtype.
        rngs: as for ``model.apply``; keys for ``"params"`` and ``"dropout"`` are supplied.
        method: the method to trace, ``__call__`` by default.
        mutable: has no effect, and is here so that the arguments of an ``apply`` can be passed:
            while tracing, every collection but the parameters is mutable.
        **kwargs: further arguments of the call, such as ``train=False``; those that are no arrays
            are not traced.

    Raises:
        TypeError: ``model`` is no module instance, ``variables`` is no mapping, or the inputs do
            not fit the signature of the method.
        ValueError: a parameter the module asks for is missing from ``variables``, or has another
            shape there.

    >>> import jax
    >>> from flax import linen as nn
    >>> model = nn.Sequential([nn.Conv(8, (3, 3)), nn.BatchNorm(use_running_average=True)])
    >>> x = jax.ShapeDtypeStruct((1, 6, 6, 3), "float32")
    >>> params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    >>> for layer in layers(model, params, x):
    ...     print(layer.name, layer.type, layer.weight, layer.out_axes, layer.in_axes, layer.bias)
    layers_0 Conv2d layers_0.kernel (3,) (2,) layers_0.bias
    layers_1 BatchNorm2d layers_1.scale (0,) () layers_1.bias
    """
    del mutable
    check(
        "layers(model, variables, *inputs)", model, variables, inputs, {"method": method, **kwargs}
    )
    whole = isinstance(variables.get("params"), Mapping)
    prefix = "params" if whole else ""
    params = meta.unbox(variables["params"] if whole else variables)
    others = {name: c for name, c in variables.items() if name != "params"} if whole else {}

    boxed = jax.tree.unflatten(
        jax.tree.structure(params),
        [_Tracked.of(join(prefix, path), leaf) for path, leaf in _in_tree_order(params)],
    )
    arrays, put = split_static((inputs, kwargs))
    owners: dict[str, tuple[_Rank, Owner]] = {}

    def trace(boxed: Any, others: Any, arrays: Any) -> Any:
        inputs, kwargs = put(arrays)
        with nn.intercept_methods(_recorder(owners, prefix)):
            return model.apply(
                {**others, "params": boxed},
                *inputs,
                rngs=_rngs(rngs),
                method=method,
                mutable=DenyList("params"),
                **kwargs,
            )

    try:
        jax.eval_shape(trace, boxed, others, arrays)
    except MISFITS as error:
        raise misfit("layers(model, variables, *inputs)", model, error) from error
    return rows(
        [owner for _, owner in owners.values()],
        {join(prefix, path): shape for path, shape in float_shapes(flatten(params).leaves).items()},
    )


#: What Flax raises for variables of another model.
MISFITS = (
    errors.ScopeParamNotFoundError,
    errors.ScopeParamShapeError,
    errors.ScopeCollectionNotFound,
    errors.ApplyScopeInvalidVariablesTypeError,
    errors.ApplyScopeInvalidVariablesStructureError,
)


def misfit(where: str, model: nn.Module, error: Exception) -> ValueError:
    """Returns the error for variables that are not the model's."""
    return ValueError(
        f"{where}: the variables are not those of this {type(model).__name__} called with these "
        f"inputs: {error}"
    )


def marker(
    wanted: frozenset[tuple[str, str]], seen: dict[str, None], renew: Callable[[], None]
) -> nn.module.Interceptor:
    """Returns an interceptor that marks what modules read and return, as ``wanted`` says.

    ``wanted`` holds pairs of a module's path and the side, ``"input"`` or ``"output"``.

    Of a class that ``nn.scan`` or another transform lifted, it is the module inside that is called
    (the one around the transform passes interceptors by): once per step of the loop.
    """

    def intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if context.method_name != "__call__" or module.scope is None:
            return call(*args, **kwargs)
        path = ".".join(module.scope.path)
        # What the call of DenseParams returns are its parameters.
        sides = [s for s in ("input", "output") if (path, s) in wanted]
        sides = [] if isinstance(module, DenseParams) else sides
        if "input" in sides:
            renew()
        result = called(path, sides, call, args, kwargs)
        renew()
        seen[path] = None
        return result

    return intercept


def check(
    where: str,
    model: Any,
    variables: Any,
    inputs: tuple[Any, ...] | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Raises where the arguments of a public function are not what it needs.

    ``kwargs`` are those of ``model.apply``; without ``inputs`` the call is not looked at.
    """
    if not isinstance(model, nn.Module):
        raise wrong_model(where, model, "linen", "a flax.linen.Module instance")
    if not isinstance(variables, Mapping):
        raise TypeError(
            f"{where}: variables must be what {type(model).__name__}.init returns or its "
            f"'params', a mapping; got {type(variables).__name__}"
        )
    if inputs is None:
        return
    given = dict(kwargs or {})
    method = given.pop("method", None)
    own = {k: v for k, v in given.items() if k not in _OF_APPLY}
    found = getattr(type(model), method) if isinstance(method, str) else method
    call: Any = getattr(found, "__func__", found) or type(model).__call__
    try:
        inspect.signature(call).bind(model, *inputs, **own)
    except TypeError as error:
        name = f"{type(model).__name__}.{call.__name__}"
        raise TypeError(f"{where}: the inputs do not fit {name}: {error}") from None


#: Keywords of ``apply`` that are not the model's.
_OF_APPLY = ("rngs", "mutable", "capture_intermediates")


def _rngs(rngs: Any) -> dict[str, Any]:
    if rngs is not None and not isinstance(rngs, Mapping):
        rngs = {"params": rngs}
    key = jax.random.key(0)
    return {"params": key, "dropout": key, **(rngs or {})}


def _in_tree_order(params: Any) -> list[tuple[str, Any]]:
    """Returns the leaves with their paths in the order of ``jax.tree.leaves``."""
    numbers = jax.tree.unflatten(jax.tree.structure(params), range(len(jax.tree.leaves(params))))
    paths = {number: path for path, number in flatten(numbers).leaves.items()}
    return [(paths[i], leaf) for i, leaf in enumerate(jax.tree.leaves(params))]


def _of_value(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda box, *others: function(box.value, *others)


class _Tracked(struct.PyTreeNode, meta.AxisMetadata[Any]):
    """A parameter that knows its path, and which of its axes a lifted transform has taken away.

    Linen calls ``remove_axis`` on boxed variables when ``nn.scan`` or ``nn.vmap`` slices them; by
    reading the box inside a module, the stack axes are known rather than guessed from shapes.

    A model that looks into ``variables``, as tied heads do, meets the box where its array would be,
    so that it does what the array does.
    """

    value: Any
    path: str = struct.field(pytree_node=False)
    shape: tuple[int, ...] = struct.field(pytree_node=False)
    axes: tuple[int, ...] = struct.field(pytree_node=False)
    removed: tuple[int, ...] = struct.field(pytree_node=False, default=())

    @classmethod
    def of(cls, path: str, leaf: Any) -> _Tracked:
        if not is_array(leaf):
            raise TypeError(
                f"layers(model, variables, *inputs): variables: {path!r} must be an array, got "
                f"{shown(leaf)}"
            )
        shape = tuple(leaf.shape)
        return cls(value=leaf, path=path, shape=shape, axes=tuple(range(len(shape))))

    def __jax_array__(self) -> Any:
        return self.value

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.value, name)

    __getitem__ = _of_value(operator.getitem)
    __matmul__ = _of_value(operator.matmul)
    __add__ = _of_value(operator.add)
    __sub__ = _of_value(operator.sub)
    __mul__ = _of_value(operator.mul)
    __truediv__ = _of_value(operator.truediv)
    __pow__ = _of_value(operator.pow)
    __neg__ = _of_value(operator.neg)
    __rmatmul__ = _of_value(lambda x, other: other @ x)
    __radd__ = _of_value(lambda x, other: other + x)
    __rsub__ = _of_value(lambda x, other: other - x)
    __rmul__ = _of_value(lambda x, other: other * x)

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> _Tracked:
        return self.replace(value=val)

    def remove_axis(self, index: int, params: dict[Any, Any]) -> _Tracked:
        del params
        axes = list(self.axes)
        axis = axes.pop(index)
        return self.replace(axes=tuple(axes), removed=(*self.removed, axis))

    def add_axis(self, index: int, params: dict[Any, Any]) -> _Tracked:
        del params
        axes = list(self.axes)
        axes.insert(index % (len(axes) + 1), self.removed[-1])
        return self.replace(axes=tuple(axes), removed=self.removed[:-1])


#: Known class?, how many axes taken away, ``__call__``?
_Rank = tuple[bool, int, bool]


def _recorder(owners: dict[str, tuple[_Rank, Owner]], prefix: str) -> nn.module.Interceptor:
    """Returns an interceptor that notes each module that holds parameters, by its path.

    Where several modules hold the same parameters (a class lifted by ``nn.scan`` wraps itself, a
    scope is shared), one of a known class counts, then the innermost; of its methods, ``__call__``.
    """

    def record(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if (
            isinstance(module, nn.WeightNorm | nn.SpectralNorm)
            and context.method_name == "__call__"
        ):
            # They hand variables to a function of their paths, which a box would lengthen.
            kwargs = {k: v for k, v in kwargs.items() if k != "update_stats"}
            result = module.layer_instance(*args, **kwargs)
        else:
            result = call(*args, **kwargs)
        if module.scope is None or context.method_name == "setup":
            return result
        own = module.variables.get("params", {})
        boxes = {name: box for name, box in own.items() if isinstance(box, _Tracked)}
        if not boxes:
            return result
        name, box = next(iter(boxes.items()))
        path = box.path[: -len(name)].removesuffix(".")
        called = context.method_name == "__call__"
        weights, others = _weights(module, args if called else (), kwargs if called else {}, boxes)
        rank = (bool(weights), len(box.removed), called)
        if path not in owners or owners[path][0] < rank:
            params = {n: Param(b.path, b.shape, b.removed) for n, b in boxes.items()}
            dotted = path.removeprefix(prefix).removeprefix(".")
            owners[path] = rank, Owner((dotted,), _class_name(module), params, weights, others)
        return result

    return record


def _class_name(module: nn.Module) -> str:
    """Returns the class the user wrote: of ``nn.Dense``, nn.remat makes a ``CheckpointDense``."""
    return next(c.__name__ for c in type(module).__mro__ if c.__module__ != "flax.linen.transforms")


def _weights(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    boxes: Mapping[str, _Tracked],
) -> tuple[tuple[Weight, ...], tuple[str, ...]]:
    """Returns the weights a module's class defines, and its parameters that are no weight's."""

    def sizes(name: str) -> Sizes:
        return tuple(boxes[name].shape[a] for a in boxes[name].axes) if name in boxes else ()

    kernel = sizes("kernel")
    others: tuple[str, ...] = ("bias",)
    match module:
        case nn.Dense() | DenseParams():
            weight = in_out("kernel", "Linear", kernel, bias="bias")
        case nn.DenseGeneral():
            weight = general(
                "kernel",
                kernel,
                batch=_count(module.batch_dims),
                out=_count(module.features),
                bias="bias",
            )
        case nn.Einsum():
            given = args[1] if len(args) > 1 else kwargs.get("einsum_str")
            if (equation := given or module.einsum_str) is None:
                return (), ()
            weight = einsum("kernel", equation, kernel, bias="bias")
        case nn.ConvLocal():
            # One filter per position: the taps and the input channels share an axis, and the bias
            # has the positions too, so it is not one of output channels.
            weight = in_out("kernel", "ConvLocal", kernel)
        case nn.Conv():
            groups = module.feature_group_count
            weight = in_out("kernel", f"Conv{len(kernel) - 2}d", kernel, bias="bias", groups=groups)
            weight = weight._replace(window=_window(module, len(kernel) - 2))
        case nn.ConvTranspose():
            type_, swapped = f"ConvTranspose{len(kernel) - 2}d", module.transpose_kernel
            weight = in_out("kernel", type_, kernel, bias="bias", swapped=swapped)
        case nn.Embed():
            weight = in_out("embedding", "Embedding", sizes("embedding"))
        case nn.BatchNorm() | nn.InstanceNorm():
            x = args[0] if args else kwargs.get("x")
            norm = "BatchNorm" if isinstance(module, nn.BatchNorm) else "InstanceNorm"
            weight = per_channel(
                "scale",
                ranked(norm, getattr(x, "ndim", None)),
                sizes("scale"),
                bias="bias",
                output=module.axis if isinstance(module, nn.BatchNorm) else module.feature_axes,
            )
        case nn.LayerNorm():
            weight = per_channel(
                "scale", "LayerNorm", sizes("scale"), bias="bias", output=module.feature_axes
            )
        case nn.GroupNorm():
            weight = per_channel("scale", "GroupNorm", sizes("scale"), bias="bias")
        case nn.RMSNorm():
            weight = per_channel("scale", "RMSNorm", sizes("scale"), output=module.feature_axes)
        case nn.PReLU():
            weight = per_channel("negative_slope", "PReLU", sizes("negative_slope"))
        case _:
            return (), ()
    return (weight,), others


def _window(module: nn.Conv, rank: int) -> Window | None:
    if module.input_dilation not in (None, 1, (1,) * rank):
        return None
    return window(rank, module.strides, module.padding, module.kernel_dilation)


def _count(axes: Any) -> int:
    return 1 if isinstance(axes, int) else len(axes)
