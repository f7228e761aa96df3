"""The adapter for Equinox: the layer table of a model, and the outputs of its layers."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax

from purepruning.arguments import wrong_model
from purepruning.layers import Layer
from purepruning.trees import flatten
from purepruning_interop._marks import KEY, marking_class
from purepruning_interop._table import (
    Owner,
    Param,
    Shape,
    Weight,
    children,
    float_shapes,
    infer_stacks,
    is_array,
    join,
    out_in,
    per_channel,
    rows,
    window,
)


def layers(model: Any, /, *inputs: Any, **kwargs: Any) -> tuple[Layer, ...]:
    """Returns the layer table of ``model``: one row per weight, in the order of the modules.

    The paths are those of ``eqx.filter(model, eqx.is_inexact_array)`` and of its gradients; the
    model may have been filtered like that, or be abstract (``eqx.filter_eval_shape``), or be any
    pytree of modules. Axes by which a parameter has more than its module's own attributes tell are
    ``stack_axes``: the module was made under ``eqx.filter_vmap``. ``eqx.nn.Shared`` ties weights:
    one row, with the other owner's name as alias (which a filtered model no longer knows). An array
    that merely stands in two places of a pytree is two parameters.

    Bias paths are of shape (out, 1, 1) for a convolution. The bias of an LSTM or GRU cell goes
    with ``weight_ih``. A batch norm does not know the rank of its input: its type is plain
    ``"BatchNorm"``. A floating-point array of two axes or more in a module of another class is a
    row without output and input axes, of the class's name as type, under its own dotted name with
    the module's as alias; there an axis added by ``filter_vmap`` cannot be told from the others.
    What a known class holds besides its weight and bias is such a row with an empty type and no
    alias. Of fewer axes, norms without a weight, and what belongs to an ``eqx.nn.State`` are no
    rows. The weight of a module that is itself the root goes by the name of the parameter
    (``"weight"``).

    Args:
        model: a module, or a pytree of modules.
        *inputs, **kwargs: have no effect, for nothing is called; they are here so that the
            arguments of :func:`couple` can be passed.

    Raises:
        TypeError: ``model`` contains no ``eqx.Module``.
        ValueError: a parameter has fewer axes than its module describes.

    >>> import equinox as eqx, jax
    >>> model = eqx.nn.MLP(2, 4, width_size=8, depth=1, key=jax.random.key(0))
    >>> [(layer.name, layer.weight, layer.out_axes, layer.in_axes) for layer in layers(model)]
    [('layers.0', 'layers.0.weight', (0,), (1,)), ('layers.1', 'layers.1.weight', (0,), (1,))]
    """
    found = list(walk(model, ""))
    modules = [entry for entry in found if isinstance(entry[1], eqx.Module)]
    check("layers(model)", model)
    tied: dict[str, str] = {}
    for name, module, _ in modules:
        if isinstance(module, eqx.nn.Shared):
            inside = join(name, "pytree")
            tied |= {join(inside, k): join(inside, v) for k, v in _ties(module).items()}

    leaves = dict(flatten(model).leaves)
    owners: list[Owner] = []
    floats: dict[str, Shape] = {}
    for name, module, own in found:
        params = {}
        for key in own:
            path = join(name, key)
            path = tied.get(path, path)
            if is_array(leaves[path]):
                params[key] = Param(path, tuple(leaves[path].shape))
        floats |= float_shapes({p.path: leaves[p.path] for p in params.values()})
        weights, others = _weights(module)
        class_name = type(module).__name__ if isinstance(module, eqx.Module) else ""
        owners.append(Owner((name,), class_name, infer_stacks(params, weights), weights, others))
    return rows(owners, floats)


def check(where: str, model: Any) -> None:
    """Raises TypeError for what is no model of this framework."""
    if isinstance(model, type) or not any(isinstance(m, eqx.Module) for _, m, _ in walk(model, "")):
        raise wrong_model(where, model, "equinox", "an equinox.Module or a pytree of them")


@functools.cache
def marking(cls: Any) -> Any:
    """Returns a class of modules that mark their calls."""
    # A static field: it stays with the module through every transformation of pytrees.
    field = eqx.field(static=True, default=("", ()))
    return marking_class(cls, {"__annotations__": {KEY: tuple}, KEY: field})


def walk(node: Any, name: str) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Yields every module, and the root, with its name and the leaves that it holds itself.

    What lists, dicts and other containers hold belongs to the module around them.
    """
    own: dict[str, Any] = {}
    below: list[tuple[str, Any]] = []

    def look(node: Any, key: str) -> None:
        for part, child in children(node):
            path = join(key, part)
            if isinstance(child, eqx.nn.StateIndex):
                continue  # initial values of a state, not parameters
            elif isinstance(child, eqx.Module):
                below.append((path, child))
            elif jax.tree_util.all_leaves([child]):
                own[path] = child
            else:
                look(child, path)

    look(node, "")
    yield name, node, own
    for key, child in below:
        yield from walk(child, join(name, key))


def _ties(shared: Any) -> dict[str, str]:
    """Returns which paths of a shared pytree were taken out, and which path stands in for each.

    Only where the very array stands in; one computed from it (a transpose) is no tie of rows.
    """
    ties: dict[str, str] = {}
    if not (callable(shared.where) and callable(shared.get)):  # filtered out with what is no array
        return ties
    arrays, rest = eqx.partition(shared, is_array)

    def trace(arrays: Any) -> None:
        full = eqx.combine(arrays, rest)
        kept = {id(leaf): path for path, leaf in flatten(full.pytree).leaves.items()}
        for path, leaf in flatten(full()).leaves.items():
            if id(leaf) in kept and kept[id(leaf)] != path:
                ties[path] = kept[id(leaf)]

    jax.eval_shape(trace, arrays)
    return ties


def _weights(module: Any) -> tuple[tuple[Weight, ...], tuple[str, ...]]:
    """Returns the weights a module's class defines, and its parameters that are no weight's."""
    match module:
        case eqx.nn.Linear():
            out, in_ = (
                1 if n == "scalar" else n for n in (module.out_features, module.in_features)
            )
            weight = out_in("weight", "Linear", (out, in_), bias="bias")
        case eqx.nn.Conv():
            weight = _conv(module, "Conv")
        case eqx.nn.ConvTranspose():  # stored like a convolution, groups too
            weight = _conv(module, "ConvTranspose")
        case eqx.nn.Embedding():
            sizes = (module.num_embeddings, module.embedding_size)
            weight = Weight("weight", "Embedding", sizes, out_axes=(1,), in_axes=(0,))
        case eqx.nn.LayerNorm():
            weight = per_channel("weight", "LayerNorm", module.shape, bias="bias")
        case eqx.nn.RMSNorm():
            weight = per_channel("weight", "RMSNorm", module.shape, bias="bias")
        case eqx.nn.GroupNorm():
            weight = per_channel("weight", "GroupNorm", (module.channels,), bias="bias", output=1)
        case eqx.nn.BatchNorm():
            # Called on one example of any rank: in a batch of them, channels follow the batch axis.
            weight = per_channel("weight", "BatchNorm", (module.input_size,), bias="bias", output=1)
        case eqx.nn.PReLU():
            weight = per_channel("negative_slope", "PReLU", module.negative_slope.shape)
        case eqx.nn.LSTMCell():
            return _cell(module, "LSTM", 4), ("bias",)
        case eqx.nn.GRUCell():
            return _cell(module, "GRU", 3), ("bias", "bias_n")
        case _:
            return (), ()
    return (weight,), ("bias",)


def _conv(module: Any, kind: str) -> Weight:
    groups = module.groups
    sizes = (module.out_channels, module.in_channels // groups, *module.kernel_size)
    type_ = f"{kind}{module.num_spatial_dims}d"
    weight = out_in("weight", type_, sizes, bias="bias", groups=groups)
    if kind != "Conv" or getattr(module, "padding_mode", "ZEROS").upper() != "ZEROS":
        return weight
    rank = module.num_spatial_dims
    moves = window(rank, module.stride, module.padding, module.dilation)
    return weight._replace(window=moves)


def _cell(module: Any, type_: str, gates: int) -> tuple[Weight, ...]:
    out = gates * module.hidden_size
    return (
        out_in("weight_ih", type_, (out, module.input_size), bias="bias"),
        out_in("weight_hh", type_, (out, module.hidden_size)),
    )
