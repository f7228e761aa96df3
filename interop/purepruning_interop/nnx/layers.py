"""The adapter for Flax NNX: the layer table of a model, and the outputs of its layers."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from flax import nnx

from purepruning.arguments import wrong_model
from purepruning.layers import Layer, Window
from purepruning.trees import flatten
from purepruning_interop._marks import marking_class
from purepruning_interop._table import (
    Owner,
    Param,
    Weight,
    children,
    einsum,
    float_shapes,
    general,
    in_out,
    infer_stacks,
    join,
    per_channel,
    rows,
    window,
)


# What every tree of the model's parameters calls a weight does not depend on how the tree was
# made, because purepruning.arrays drops the `value` that NNX puts under a variable.
def layers(model: nnx.Module, /, *inputs: Any, **kwargs: Any) -> tuple[Layer, ...]:
    """Returns the layer table of ``model``: one row per weight, in the order of ``nnx.state``.

    The paths are those of ``nnx.state(model, nnx.Param)``, and the same in gradients
    (``nnx.grad``), in ``nnx.to_pure_dict`` and in what an ``nnx.Optimizer`` hands to its
    transformation. A module reached in several ways, or a variable that several modules hold, is
    one row; the further names are aliases. Axes by which a parameter has more than its module's
    own attributes tell are ``stack_axes``: the module was made under ``nnx.vmap``. The model may
    be abstract (``nnx.eval_shape``).

    A batch or instance norm does not know the rank of its input: its type is plain
    ``"BatchNorm"``. The two factors of ``nnx.LoRA`` have axes, and type ``"LoRA"``. An
    ``nnx.Param`` of two axes or more in a module of another class is a row without output and
    input axes, of the class's name as type, under its own dotted name with the module's as alias;
    there an axis added by ``nnx.vmap`` cannot be told from the others. What a known class holds
    besides its weight and bias is such a row with an empty type and no alias. Of fewer axes, and
    norms without a scale, are no rows. The weight of a module that is itself the root goes by the
    name of the parameter (``"kernel"``).

    Args:
        model: the module.
        *inputs, **kwargs: have no effect, for nothing is called; they are here so that the
            arguments of :func:`couple` can be passed.

    Raises:
        TypeError: ``model`` is no ``nnx.Module``.
        ValueError: a parameter has fewer axes than its module describes.

    >>> from flax import nnx
    >>> model = nnx.Sequential(nnx.Conv(3, 8, (3, 3), rngs=nnx.Rngs(0)), nnx.relu)
    >>> (layer,) = layers(model)
    >>> layer.name, layer.type, layer.weight, layer.out_axes, layer.in_axes
    ('layers.0', 'Conv2d', 'layers.0.kernel', (3,), (2,))
    """
    check("layers(model)", model)
    leaves = flatten(nnx.state(model)).leaves
    paths: dict[int, str] = {}  # variable -> the one path it has in the state
    names: dict[int, list[str]] = defaultdict(list)
    modules: dict[int, tuple[nnx.Module, dict[str, nnx.Variable[Any]]]] = {}
    for name, module, own in walk(model, "", ()):
        modules.setdefault(id(module), (module, own))
        names[id(module)].append(name)
        for key, variable in own.items():
            if (path := join(name, key)) in leaves:
                paths.setdefault(id(variable), path)

    owners = []
    trained: set[str] = set()
    for ident, (module, own) in modules.items():
        params = {
            name: Param(paths[id(v)], tuple(leaves[paths[id(v)]].shape))
            for name, v in own.items()
            if id(v) in paths and hasattr(leaves[paths[id(v)]], "shape")
        }
        trained |= {p.path for name, p in params.items() if isinstance(own[name], nnx.Param)}
        weights, others = _weights(module)
        owners.append(
            Owner(
                tuple(names[ident]),
                type(module).__name__,
                infer_stacks(params, weights),
                weights,
                others,
            )
        )
    floats = float_shapes(leaves)
    return rows(owners, {path: shape for path, shape in floats.items() if path in trained})


def check(where: str, model: Any) -> None:
    """Raises TypeError for what is no model of this framework."""
    if not isinstance(model, nnx.Module):
        remedy = "merge a graphdef and a state with nnx.merge"
        raise wrong_model(where, model, "nnx", "a flax.nnx.Module instance", remedy)


@functools.cache
def marking(cls: Any, pytree: bool) -> Any:
    """Returns a subclass of modules that mark their calls; ``pytree``: whether ``cls`` is one."""
    return marking_class(cls, pytree=pytree)


def walk(
    node: Any, name: str, above: tuple[int, ...]
) -> Iterator[tuple[str, nnx.Module, dict[str, nnx.Variable[Any]]]]:
    """Yields every path to every module, with the variables that the module holds itself.

    Lists and dicts, NNX's own too, are no modules: what they hold belongs to the module around.
    """
    own: dict[str, nnx.Variable[Any]] = {}
    below: list[tuple[str, Any]] = []

    def look(node: Any, key: str, inside: tuple[int, ...]) -> None:
        for part, child in _children(node):
            path = join(key, part)
            if isinstance(child, nnx.Variable):
                own[path] = child
            elif isinstance(child, nnx.Module) and not isinstance(child, nnx.List | nnx.Dict):
                below.append((path, child))
            elif id(child) not in inside:
                look(child, path, (*inside, id(child)))

    look(node, "", (*above, id(node)))
    yield name, node, own
    for key, child in below:
        if id(child) not in above and child is not node:
            yield from walk(child, join(name, key), (*above, id(node)))


def _children(node: Any) -> Iterator[tuple[str, Any]]:
    found = list(children(node))
    if not found and isinstance(node, nnx.Module):  # a module class that is no pytree
        found = [(k, v) for k, v in sorted(vars(node).items()) if not k.startswith("_pytree__")]
    return iter(found)


def _weights(module: nnx.Module) -> tuple[tuple[Weight, ...], tuple[str, ...]]:
    """Returns the weights a module's class defines, and its parameters that are no weight's."""
    match module:
        case nnx.LinearGeneral():
            sizes = (*module.batch_axis.values(), *module.in_features, *module.out_features)
            batch, out = len(module.batch_axis), len(module.out_features)
            weight = general("kernel", sizes, batch=batch, out=out, bias="bias")
        case nnx.Linear():
            sizes = (module.in_features, module.out_features)
            weight = in_out("kernel", "Linear", sizes, bias="bias")
        case nnx.Einsum():
            weight = einsum("kernel", module.einsum_str, tuple(module.kernel_shape), bias="bias")
        case nnx.Conv():
            type_, groups = f"Conv{len(module.kernel_shape) - 2}d", module.feature_group_count
            weight = in_out("kernel", type_, module.kernel_shape, bias="bias", groups=groups)
            weight = weight._replace(window=_window(module))
        case nnx.ConvTranspose():
            type_, swapped = (
                f"ConvTranspose{len(module.kernel_shape) - 2}d",
                module.transpose_kernel,
            )
            weight = in_out("kernel", type_, module.kernel_shape, bias="bias", swapped=swapped)
        case nnx.Embed():
            weight = in_out("embedding", "Embedding", (module.num_embeddings, module.features))
        case nnx.BatchNorm():
            weight = per_channel(
                "scale", "BatchNorm", (module.num_features,), bias="bias", output=module.axis
            )
        case nnx.InstanceNorm():
            weight = per_channel(
                "scale",
                "InstanceNorm",
                (module.num_features,),
                bias="bias",
                output=module.feature_axes,
            )
        case nnx.LayerNorm():
            weight = per_channel(
                "scale",
                "LayerNorm",
                (module.num_features,),
                bias="bias",
                output=module.feature_axes,
            )
        case nnx.GroupNorm():
            sizes = (module.num_groups * module.group_size,)
            weight = per_channel("scale", "GroupNorm", sizes, bias="bias")
        case nnx.RMSNorm():
            weight = per_channel(
                "scale", "RMSNorm", (module.num_features,), output=module.feature_axes
            )
        case nnx.LoRA():
            down = in_out("lora_a", "LoRA", (module.in_features, None))._replace(output=())
            up = in_out("lora_b", "LoRA", (None, module.out_features))
            return (down, up), ()
        case nnx.PReLU():
            weight = per_channel("negative_slope", "PReLU", ())
        case _:
            return (), ()
    return (weight,), ("bias",)


def _window(module: nnx.Conv) -> Window | None:
    rank = len(module.kernel_shape) - 2
    if module.input_dilation not in (None, 1, (1,) * rank):
        return None
    return window(rank, module.strides, module.padding, module.kernel_dilation)
