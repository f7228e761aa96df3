"""The layer table: what every weight of a model is called, and what its axes mean.

An adapter of ``purepruning_interop`` reads the table off a model; :func:`make_layer` writes a row
by hand for a plain pytree. Nothing later in the library looks at a model again.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterable
from typing import Any, Literal, TypeAlias

import numpy as np

from purepruning.arguments import (
    adapter_of,
    collection,
    instance,
    missing,
    one_of,
    ordered,
    shown,
    strings,
    whole_number,
)
from purepruning.trees import flatten
from purepruning.types import Params

#: Canonical op types: PyTorch's class names, which NNI-style rules are written in.
#: A normalisation whose spatial rank the model does not reveal is plain ``"BatchNorm"`` or
#: ``"InstanceNorm"``; a rule for any rank of it (``"BatchNorm2d"``) selects it.
OP_TYPES = (
    *(f"Conv{d}d" for d in (1, 2, 3)),
    *(f"ConvTranspose{d}d" for d in (1, 2, 3)),
    "Linear",
    "Bilinear",
    "PReLU",
    "Embedding",
    "EmbeddingBag",
    "MultiheadAttention",
    "RNN",
    "LSTM",
    "GRU",
    "BatchNorm",
    *(f"BatchNorm{d}d" for d in (1, 2, 3)),
    "InstanceNorm",
    *(f"InstanceNorm{d}d" for d in (1, 2, 3)),
    "LayerNorm",
    "GroupNorm",
    "RMSNorm",
)


#: What ``'default'`` in a rule's ``op_types`` stands for: kernels and embeddings, the packed
#: projections of attention and recurrent layers included, and PReLU as in NNI; no norms, no biases.
DEFAULT_OP_TYPES = (
    *(f"Conv{d}d" for d in (1, 2, 3)),
    *(f"ConvTranspose{d}d" for d in (1, 2, 3)),
    "Linear",
    "Bilinear",
    "PReLU",
    "Embedding",
    "EmbeddingBag",
    "MultiheadAttention",
    "RNN",
    "LSTM",
    "GRU",
)


@dataclasses.dataclass(frozen=True)
class Window:
    """How a convolution moves over its input, one entry for each spatial axis.

    Attributes:
        strides: steps between outputs.
        padding: zeros before and behind each axis, or ``"SAME"`` or ``"VALID"`` as JAX means them.
        dilation: distances between taps.
    """

    strides: tuple[int, ...]
    padding: str | tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]

    def pads(self, sizes: tuple[int, ...], taps: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
        """Returns the zeros before and behind each spatial axis of an input of these sizes."""
        if not isinstance(self.padding, str):
            return self.padding
        if self.padding == "VALID":
            return ((0, 0),) * len(sizes)
        found = []
        for n, k, stride, apart in zip(sizes, taps, self.strides, self.dilation, strict=True):
            total = max((-(-n // stride) - 1) * stride + (k - 1) * apart + 1 - n, 0)
            found.append((total // 2, total - total // 2))
        return tuple(found)


@dataclasses.dataclass(frozen=True)
class Layer:
    """One weight of a model: its names, its place in the parameters, and the meaning of its axes.

    A module that owns several weights (an LSTM) has one row per weight; the module's own name is
    then an alias of each, so that a rule naming the module selects them all.

    Attributes:
        name: dotted module name, ``"encoder.layers.0.conv"``.
        type: canonical op type (see :data:`OP_TYPES`), or the class name where there is none.
        weight: path of the weight in the parameters, as :func:`purepruning.leaf_paths` spells it.
        shape: shape of the weight.
        out_axes: axes that index output channels; several where the output is, say, heads x size.
        in_axes: axes that are contracted with the input.
        stack_axes: axes over which identical layers are stacked (``nn.scan``).
        groups: number of groups of a grouped or depthwise convolution.
        grouped: which side is stored per group, ``"in"`` (in/groups inputs per output) or
            ``"out"`` (out/groups outputs per input, as in ``torch.nn.ConvTranspose2d``).
        bias: path of the bias, or None; its elements are those of the stack axes and output
            channels in that order, in any shape.
        output_axes: axes of the layer's *output* that hold the stacked layers and then the output
            channels, one for each of ``stack_axes`` and ``out_axes``; empty where the channels are
            not seen in the output (the gates of an LSTM). Unless given, stacked layers lead and
            channels come last; a convolution whose kernel ends in its taps, as in PyTorch, has its
            channels before the spatial axes.
        class_name: the framework's own class name, which rules may also use.
        aliases: further names of the same layer (a shared module has several).
        window: of a convolution, how it moves over its input; None where that is not known, or no
            window with zeros around. No part of comparisons: masks do not depend on it.
    """

    name: str
    type: str
    weight: str
    shape: tuple[int, ...]
    out_axes: tuple[int, ...] = ()
    in_axes: tuple[int, ...] = ()
    stack_axes: tuple[int, ...] = ()
    groups: int = 1
    grouped: Literal["in", "out"] = "in"
    bias: str | None = None
    class_name: str = ""
    aliases: tuple[str, ...] = ()
    output_axes: tuple[int, ...] | None = None
    window: Window | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self) -> None:
        where = f"layer {shown(self.name)}"
        for field in ("name", "type", "weight", "class_name"):
            strings(getattr(self, field), f"{where}: {field}")
        strings(self.bias, f"{where}: bias", optional=True)
        if not isinstance(self.aliases, tuple | list) or not all(
            isinstance(alias, str) for alias in self.aliases
        ):
            raise TypeError(
                f"{where}: aliases must be a tuple of strings, got {shown(self.aliases)}"
            )
        object.__setattr__(self, "aliases", tuple(self.aliases))
        whole_number(self.groups, f"{where}: groups", 1)
        shape = _integers(self.shape, f"{where}: shape")
        if any(n < 0 for n in shape):
            raise ValueError(f"{where}: shape must have sizes of at least 0, got {shape}")
        object.__setattr__(self, "shape", shape)
        given = {
            field: _integers(getattr(self, field), f"{where}: {field}")
            for field in ("out_axes", "in_axes", "stack_axes")
        }
        stack, out = given["stack_axes"], given["out_axes"]
        for field, axes in given.items():
            if any(not -len(shape) <= a < len(shape) for a in axes):
                raise ValueError(f"{where}: {field}={axes} has no place in shape {shape}")
            axes = tuple(a % len(shape) for a in axes)
            object.__setattr__(self, field, tuple(sorted(axes)))
        used = self.out_axes + self.in_axes + self.stack_axes
        if len(set(used)) != len(used):
            raise ValueError(
                f"{where}: an axis has one meaning, but out_axes={self.out_axes}, "
                f"in_axes={self.in_axes} and stack_axes={self.stack_axes} overlap"
            )
        one_of(f"{where}: grouped", self.grouped, ("in", "out"))
        instance(self.window, (Window, type(None)), f"{where}: window", "a Window or None")
        whole = self.out_axes if self.grouped == "in" else self.in_axes
        size = self.shape[whole[0]] if whole else 0
        if self.groups > 1 and (not size or size % self.groups):
            raise ValueError(f"{where}: {self.groups} groups do not divide {size} channels")
        if self.output_axes is None:
            axes = _default_output_axes(self)
        elif len(axes := _integers(self.output_axes, f"{where}: output_axes")) == len(stack + out):
            # They follow their axes of the weight, which are sorted now.
            place = dict(zip((*stack, *out), axes, strict=True))
            place = {a % len(self.shape): position for a, position in place.items()}
            axes = tuple(place[a] for a in (*self.stack_axes, *self.out_axes))
        elif axes:
            raise ValueError(
                f"{where}: output_axes={axes} must have one axis for each of stack_axes={stack} "
                f"and out_axes={out}, or be empty"
            )
        if len(set(axes)) != len(axes):
            raise ValueError(f"{where}: output_axes={axes} names an axis twice")
        object.__setattr__(self, "output_axes", axes)

    @property
    def names(self) -> tuple[str, ...]:
        """The name and all aliases."""
        return (self.name, *self.aliases)

    @property
    def out_channels(self) -> int:
        """Number of output channels, of all groups together."""
        size = math.prod(self.shape[a] for a in self.out_axes)
        return size * (self.groups if self.grouped == "out" else 1)

    @property
    def in_channels(self) -> int:
        """Number of input channels, of all groups together."""
        size = math.prod(self.shape[a] for a in self.in_axes)
        return size * (self.groups if self.grouped == "in" else 1)

    @property
    def spatial_axes(self) -> tuple[int, ...]:
        """Axes that are neither output, input nor stack: a kernel's taps."""
        used = {*self.out_axes, *self.in_axes, *self.stack_axes}
        return tuple(a for a in range(len(self.shape)) if a not in used)

    def has_type(self, selector: str) -> bool:
        """Whether a rule's op type names this layer, by canonical type or class name."""
        if selector in (self.type, self.class_name):
            return True
        rankless = self.type in ("BatchNorm", "InstanceNorm")
        return rankless and selector in {f"{self.type}{d}d" for d in (1, 2, 3)}


@dataclasses.dataclass(frozen=True)
class Activation:
    """An activation function of a model, which has no weight: what quantizers name it by.

    Attributes:
        name: dotted module name in PyTorch; where activations are functions, the function's name
            and the place of its call among those of the same function, from 1: ``"relu2"``.
        type: canonical op type, PyTorch's class name: ``"ReLU6"``.
        class_name: the framework's own name, which rules may also use.
        aliases: further names of the same activation.
    """

    name: str
    type: str
    class_name: str = ""
    aliases: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The name and all aliases."""
        return (self.name, *self.aliases)

    def has_type(self, selector: str) -> bool:
        """Whether a rule's op type names this activation; case does not matter, as in ``"relu"``.

        >>> Activation("relu1", "ReLU").has_type("relu")
        True
        """
        return selector.lower() in (self.type.lower(), self.class_name.lower())


#: A layer table: rows, as an adapter returns them.
Layers: TypeAlias = Iterable[Layer]


def make_layer(
    params: Params,
    weight: str,
    type: str,
    *,
    name: str | None = None,
    out_axes: int | Iterable[int],
    in_axes: int | Iterable[int] = (),
    stack_axes: int | Iterable[int] = (),
    groups: int = 1,
    grouped: Literal["in", "out"] = "in",
    bias: str | None = None,
    output_axes: int | Iterable[int] | None = None,
    window: Window | None = None,
) -> Layer:
    """Returns one row of a layer table written by hand, its shape read from ``params``.

    Args:
        params: pytree of arrays, or flat dict of tensors.
        weight: path of the weight; :func:`purepruning.leaf_paths` lists them.
        type: canonical op type, see :data:`OP_TYPES`.
        name: layer name; the weight's path without its last part unless given.
        out_axes, in_axes, stack_axes, groups, grouped, bias, output_axes, window: see
            :class:`Layer`.

    Raises:
        KeyError: the weight or bias path is not in ``params``.
        ValueError: the axes do not fit the shape, or the bias does not fit the output channels.

    >>> import jax.numpy as jnp
    >>> params = {"hidden": {"w": jnp.ones((3, 8)), "b": jnp.ones(8)}}
    >>> layer = make_layer(params, "hidden.w", "Linear", out_axes=1, in_axes=0, bias="hidden.b")
    >>> layer.name, layer.out_channels
    ('hidden', 8)
    """
    leaves = flatten(params).leaves
    strings(weight, "make_layer: weight")
    strings(type, "make_layer: type")
    for what, path in (("weight", weight), ("bias", bias)):
        strings(path, f"make_layer: {what}", optional=True)
        if path is not None and path not in leaves:
            message = f"make_layer: {what}: no parameter at path {path!r}"
            raise KeyError(missing(message, path, leaves))
        if path is not None and not hasattr(leaves[path], "shape"):
            raise TypeError(
                f"make_layer: the parameter {path!r} is no array, but {shown(leaves[path])}"
            )
    layer = Layer(
        name=name if name is not None else weight.rpartition(".")[0] or weight,
        type=type,
        weight=weight,
        shape=tuple(leaves[weight].shape),
        out_axes=_as_tuple(out_axes),
        in_axes=_as_tuple(in_axes),
        stack_axes=_as_tuple(stack_axes),
        groups=groups,
        grouped=grouped,
        bias=bias,
        class_name=type,
        output_axes=None if output_axes is None else _as_tuple(output_axes),
        window=window,
    )
    if bias is not None:
        size = math.prod(layer.shape[a] for a in layer.stack_axes) * layer.out_channels
        if math.prod(leaves[bias].shape) != size:
            raise ValueError(
                f"layer {layer.name!r}: bias {bias!r} of shape {tuple(leaves[bias].shape)} "
                f"does not fit {layer.out_channels} output channels"
            )
    return layer


def checked_table(layers: Layers, where: str = "layers") -> tuple[Layer, ...]:
    """Returns the rows of a layer table; ``where`` names it in messages.

    Raises:
        TypeError: it is no table, or holds something else than rows.
        ValueError: two rows have the same name or weight, or a bias is another row's weight.
    """
    adapter = adapter_of(layers)
    if adapter is not None:
        raise TypeError(
            f"{where} must be a table of Layer rows, got a model, {type(layers).__name__}; make "
            f"the table by purepruning_interop.{adapter}.layers"
        )
    table: tuple[Layer, ...] = collection(layers, where, "a table of Layer rows")
    for layer in table:
        instance(layer, Layer, f"{where}: every row", "a Layer")
    for what in ("name", "weight"):
        seen: set[str] = set()
        for layer in table:
            value = getattr(layer, what)
            if value in seen:
                raise ValueError(f"{where}: two rows have the {what} {value!r}")
            seen.add(value)
    weights = {layer.weight for layer in table}
    for layer in table:
        if layer.bias in weights:
            raise ValueError(
                f"{where}: layer {layer.name!r}: its bias {layer.bias!r} is a layer's weight"
            )
    return table


def _default_output_axes(layer: Layer) -> tuple[int, ...]:
    if not layer.out_axes or layer.type in ("RNN", "LSTM", "GRU", "MultiheadAttention"):
        return ()
    taps = layer.spatial_axes if layer.type.startswith("Conv") else ()
    behind = len(taps) if taps and taps[-1] > max(layer.out_axes) else 0
    n = len(layer.out_axes)
    return (*range(len(layer.stack_axes)), *range(-n - behind, -behind))


def _as_tuple(axes: Any) -> Any:
    """Returns one axis as a tuple; anything else comes back, for :class:`Layer` to look at."""
    try:
        return axes if isinstance(axes, bool | np.bool_) else (operator.index(axes),)
    except TypeError:
        return axes


def _integers(values: Any, where: str) -> tuple[int, ...]:
    """Returns a tuple of integers; ``where`` names it in messages."""
    some = ordered(values, where, "a tuple of integers")
    for n in some:
        if not isinstance(n, int | np.integer) or isinstance(n, bool):
            raise TypeError(f"{where} must be a tuple of integers, got {shown(n)} in it")
    return tuple(map(int, some))
