"""From modules to rows: what every adapter does once it knows which module owns which parameter.

An adapter describes each module as an :class:`Owner`; :func:`rows` turns the owners into the table.
The meaning of a weight's axes is written once per memory layout: :func:`in_out` for Flax and Haiku
kernels, :func:`out_in` for Equinox and torch weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from purepruning.layers import Layer, Window

Shape = tuple[int, ...]


#: Sizes of one copy of a weight, as the module's own attributes tell them; None where they do not.
Sizes = tuple[int | None, ...]


class Param(NamedTuple):
    """One parameter: its path and shape in the tree, and which axes of it stack whole modules."""

    path: str
    shape: Shape
    stack_axes: tuple[int, ...] = ()


class Weight(NamedTuple):
    """What a module class says of one of its weights; axes count within one, unstacked copy.

    ``output`` says where the batch axes and the output channels are in the module's output; where
    it is None, the rule of :class:`purepruning.Layer` holds. ``window`` is a convolution's.
    """

    param: str
    type: str
    sizes: Sizes
    out_axes: tuple[int, ...] = ()
    in_axes: tuple[int, ...] = ()
    batch_axes: tuple[int, ...] = ()
    groups: int = 1
    grouped: Literal["in", "out"] = "in"
    bias: str | None = None
    output: tuple[int, ...] | None = None
    window: Window | None = None


class Owner(NamedTuple):
    """One module: its dotted names, the parameters it holds itself, and what it says of them.

    ``others`` are parameters whose role is known to be no weight's (a bias that belongs to several
    weights); they get no row. ``joint`` stands between a module's name and a parameter's.
    """

    names: tuple[str, ...]
    class_name: str
    params: Mapping[str, Param]
    weights: tuple[Weight, ...] = ()
    others: tuple[str, ...] = ()
    joint: str = "."


def in_out(
    param: str,
    type: str,
    sizes: Sizes,
    *,
    bias: str | None = None,
    groups: int = 1,
    swapped: bool = False,
) -> Weight:
    """Returns a weight stored ``(*taps, in / groups, out)``, or ``(*taps, out, in)`` if swapped."""
    a, b = len(sizes) - 2, len(sizes) - 1
    out, in_ = (a, b) if swapped else (b, a)
    return Weight(param, type, sizes, (out,), (in_,), groups=groups, bias=bias)


def out_in(
    param: str, type: str, sizes: Sizes, *, bias: str | None = None, groups: int = 1
) -> Weight:
    """Returns a weight stored ``(out, in / groups, *taps)``."""
    return Weight(param, type, sizes, (0,), (1,), groups=groups, bias=bias)


def general(param: str, sizes: Sizes, *, batch: int, out: int, bias: str | None) -> Weight:
    """Returns a linear weight stored ``(*batch, *in, *out)``: one linear map per batch index."""
    rank = len(sizes)
    return Weight(
        param,
        "Linear",
        sizes,
        out_axes=tuple(range(rank - out, rank)),
        in_axes=tuple(range(batch, rank - out)),
        batch_axes=tuple(range(batch)),
        bias=bias,
        output=(*range(batch), *range(-out, 0)),
    )


def window(rank: int, strides: Any, padding: Any, dilation: Any) -> Window | None:
    """Returns how a convolution moves over its input, from what its module says.

    None where it pads with something else than zeros, or by what is computed in the call.
    """

    def each(value: Any) -> tuple[int, ...]:
        value = 1 if value is None else value
        some = (value,) * rank if isinstance(value, int) else tuple(value)
        return some * rank if len(some) == 1 else some

    if isinstance(padding, str):
        if padding not in ("SAME", "VALID"):
            return None
        return Window(each(strides), padding, each(dilation))
    if isinstance(padding, int) or all(isinstance(p, int) for p in padding):
        padding = tuple((p, p) for p in each(padding))
    pads = tuple((int(low), int(high)) for low, high in padding)
    return Window(each(strides), pads * rank if len(pads) == 1 else pads, each(dilation))


def per_channel(
    param: str,
    type: str,
    sizes: Sizes,
    *,
    bias: str | None = None,
    output: int | Sequence[int] | None = None,
) -> Weight:
    """Returns a weight that scales channels, all of whose axes are channels (norms, PReLU)."""
    if isinstance(output, int):
        output = (output,)
    out = tuple(range(len(sizes)))
    axes = None if output is None or len(output) != len(out) else tuple(output)
    return Weight(param, type, sizes, out_axes=out, bias=bias, output=axes)


def einsum(param: str, equation: str, sizes: Sizes, *, bias: str | None) -> Weight:
    """Returns the weight that is the second operand of an einsum.

    A letter of the weight that the output keeps is an output axis, or a batch axis if the input has
    it too; a letter the input has and the output has not is contracted. Flax stores the bias in the
    output's order; where that is not the weight's order no bias is named.
    """
    operands, result = equation.replace(" ", "").split("->")
    left, right = operands.split(",")
    dots = "." * max(len(sizes) - len(right.replace("...", "")), 0)
    letters = right.replace("...", dots)
    batch = [i for i, c in enumerate(letters) if c == "." or (c in left and c in result)]
    out = [i for i, c in enumerate(letters) if c in result and c not in left and c != "."]
    contracted = [i for i, c in enumerate(letters) if c in left and c not in result and c != "."]
    kept = [letters[i] for i in sorted(batch + out)]
    in_order = kept == [c for c in result.replace("...", dots) if c in letters]
    place = _places(result)
    seen = [place.get(letters[i]) for i in (*batch, *out)]
    return Weight(
        param,
        "Linear",
        sizes,
        tuple(out),
        tuple(contracted),
        tuple(batch),
        bias=bias if in_order else None,
        output=tuple(a for a in seen if a is not None) if None not in seen else (),
    )


def _places(letters: str) -> dict[str, int]:
    """Returns the axis of each letter of an einsum's output; negative, except before dots."""
    before, dots, after = letters.rpartition("...")
    from_end = {c: i - len(after) for i, c in enumerate(after)}
    return from_end | ({c: i for i, c in enumerate(before)} if dots else {})


def ranked(norm: str, input_ndim: int | None) -> str:
    """Returns ``"BatchNorm2d"`` for a batch of images; the plain name where the rank says nothing.

    ``input_ndim`` counts batch and channel axes. (n, channels) is 1d for a batch norm only.
    """
    ranks = {3: "1d", 4: "2d", 5: "3d"} | ({2: "1d"} if norm == "BatchNorm" else {})
    return norm + ranks.get(input_ndim or 0, "")


def stacked(shape: Shape, sizes: Sizes) -> tuple[int, ...]:
    """Returns the axes of ``shape`` that one copy of the module does not have.

    Leading axes, unless only other ones leave the sizes that the module states.
    """
    extra = len(shape) - len(sizes)
    for axes in itertools.combinations(range(len(shape)), max(extra, 0)):
        rest = [n for a, n in enumerate(shape) if a not in axes]
        if all(s is None or s == n for n, s in zip(rest, sizes, strict=False)):
            return axes
    return tuple(range(max(extra, 0)))


def infer_stacks(params: Mapping[str, Param], weights: Sequence[Weight]) -> dict[str, Param]:
    """Returns ``params`` with the stack axes that the weights' stated sizes imply."""
    sizes = {w.param: w.sizes for w in weights}
    return {
        name: p._replace(stack_axes=stacked(p.shape, sizes[name])) if name in sizes else p
        for name, p in params.items()
    }


def rows(owners: Sequence[Owner], floats: Mapping[str, Shape]) -> tuple[Layer, ...]:
    """Returns the layer table: one row per weight path, in the order of the owners.

    Args:
        owners: every module that holds parameters.
        floats: path and shape of every floating-point leaf. Those with two axes or more that no
            owner knows the role of become rows without axes. Their type and class name are the
            owner's class; empty where that class is known for another weight, or no owner was seen.
    """
    table: dict[str, Layer] = {}
    claimed: set[str] = set()
    for owner in owners:
        present = [w for w in owner.weights if w.param in owner.params]
        for weight in present:
            path = owner.params[weight.param].path
            names = _names(owner, weight.param, several=len(present) > 1)
            if path in table:  # a tied weight: one row, further names
                table[path] = _alias(table[path], names)
            else:
                table[path] = _row(owner, weight, names)
        used = {*owner.others, *(n for w in present for n in (w.param, w.bias) if n)}
        claimed |= {p.path for name, p in owner.params.items() if name in used}

    for owner in owners:
        known = {w.param for w in owner.weights}
        for name, param in owner.params.items():
            rank = len(param.shape) - len(param.stack_axes)
            names = _names(owner, name, several=True)
            if param.path in table:
                if name not in known:
                    table[param.path] = _alias(table[param.path], names)
            elif param.path in floats and param.path not in claimed and rank >= 2:
                # What a known class holds besides its weight must not be selected as that weight.
                table[param.path] = Layer(
                    name=names[0],
                    type="" if known else owner.class_name,
                    weight=param.path,
                    shape=param.shape,
                    stack_axes=param.stack_axes,
                    class_name="" if known else owner.class_name,
                    aliases=tuple(n for n in names[1:] if not known & set(owner.params)),
                )
            claimed.add(param.path)

    # The weights of a module come before what else it holds.
    order = {id(o): dict.fromkeys([*(w.param for w in o.weights), *o.params]) for o in owners}
    held = [o.params[name].path for o in owners for name in order[id(o)] if name in o.params]
    seen = [path for path in held if path in table]
    unseen = [path for path in floats if path not in claimed and len(floats[path]) >= 2]
    for path in unseen:
        table[path] = Layer(path, "", path, floats[path])
    return tuple(table[path] for path in dict.fromkeys(seen + unseen))


def _row(owner: Owner, weight: Weight, names: tuple[str, ...]) -> Layer:
    param = owner.params[weight.param]
    copy = [a for a in range(len(param.shape)) if a not in param.stack_axes]
    if len(copy) != len(weight.sizes):
        raise ValueError(
            f"parameter {param.path!r} of {owner.class_name} has shape {param.shape}, but the "
            f"module describes a weight of {len(weight.sizes)} axes"
        )
    bias = owner.params.get(weight.bias) if weight.bias else None
    stack = len(param.stack_axes)  # the outputs of stacked copies are stacked on leading axes
    output = weight.output
    if output:
        output = (*range(stack), *(a + stack if a >= 0 else a for a in output))
    return Layer(
        name=names[0],
        type=weight.type,
        weight=param.path,
        shape=param.shape,
        out_axes=tuple(copy[a] for a in weight.out_axes),
        in_axes=tuple(copy[a] for a in weight.in_axes),
        stack_axes=param.stack_axes + tuple(copy[a] for a in weight.batch_axes),
        groups=weight.groups,
        grouped=weight.grouped,
        bias=bias.path if bias else None,
        class_name=owner.class_name,
        aliases=names[1:],
        output_axes=output,
        window=weight.window,
    )


def _names(owner: Owner, param: str, *, several: bool) -> tuple[str, ...]:
    """Returns a row's names: its modules', or, of several in a module, its own names first.

    The root module has no name; its weight goes by the parameter's.
    """
    modules, joint = owner.names, owner.joint
    own = tuple(f"{m}{joint}{param}" if m else param for m in modules if several or not m)
    return tuple(dict.fromkeys(own + tuple(m for m in modules if m)))


def _alias(layer: Layer, names: Iterable[str]) -> Layer:
    names = tuple(dict.fromkeys((*layer.aliases, *(n for n in names if n != layer.name))))
    return Layer(**{**vars(layer), "aliases": names})


def children(node: Any) -> Iterator[tuple[str, Any]]:
    """Yields the immediate children of a pytree node with their keys, as paths spell them."""
    entries, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    for keys, child in entries:
        if keys:
            yield jax.tree_util.keystr(keys, simple=True, separator="."), child


def join(*parts: str) -> str:
    """Returns the dotted path of the parts that are not empty."""
    return ".".join(p for p in parts if p)


def float_shapes(leaves: Mapping[str, Any]) -> dict[str, Shape]:
    """Returns path and shape of the floating-point (or complex) arrays among ``leaves``."""
    return {
        path: tuple(leaf.shape)
        for path, leaf in leaves.items()
        if is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact)
    }


def is_array(x: Any) -> bool:
    """Whether ``x`` is an array or describes one (``jax.ShapeDtypeStruct``)."""
    return isinstance(x, jax.Array | np.ndarray | jax.ShapeDtypeStruct)


def split_static(tree: Any) -> tuple[list[Any], Any]:
    """Returns the arrays of ``tree``, and the function that puts it back together from them.

    What is no array (``train=False``, a string) stays as it is, so that it is not traced.
    """
    leaves, treedef = jax.tree.flatten(tree)
    where = [i for i, leaf in enumerate(leaves) if is_array(leaf)]
    rest = [None if is_array(leaf) else leaf for leaf in leaves]  # put keeps no tracer alive

    def put(arrays: Sequence[Any]) -> Any:
        full = list(rest)
        for i, array in zip(where, arrays, strict=True):
            full[i] = array
        return jax.tree.unflatten(treedef, full)

    return [leaves[i] for i in where], put
