"""Masks: which weights stay. Plain trees of booleans, and a handful of functions of them.

A mask is True where a weight is kept and broadcasts to its parameter; a parameter without one
(``None``, or no entry in a dict of torch tensors) is not pruned. Masks and parameters are matched
by path (:func:`purepruning.leaf_paths`), so a nested tree, a Flax NNX state and a flat dict of
paths mean the same.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from purepruning.arguments import adapter_of, missing, one_of, shown
from purepruning.arrays import (
    as_known,
    by_numpy,
    chosen,
    compiled,
    is_array,
    is_concrete,
    is_on_this_process,
    is_torch,
    laid_out_by,
    namespace,
)
from purepruning.shards import box_of, is_sharded, laid_out, local, local_as, of_shard, reduced
from purepruning.trees import flatten
from purepruning.types import Masks, Params


def apply_masks(params: Params, masks: Masks) -> Params:
    r"""Returns ``params`` with every pruned weight set to zero.

    $$w_i \leftarrow w_i \text{ if } m_i \text{ else } 0$$

    Chosen, not multiplied: a pruned NaN or infinity becomes 0 in every framework, and the gradient
    of a pruned weight is exactly 0. Parameters without a mask come back as they are.

    Raises:
        KeyError: a mask names no parameter.
        ValueError: a mask does not broadcast to its parameter, or lies on another torch device.
        TypeError: a mask is not boolean, or of the other framework than its parameter; or
            ``params`` is a module.

    >>> import jax.numpy as jnp
    >>> params = {"w": jnp.array([[1.0, 2.0], [jnp.nan, 4.0]]), "b": jnp.array([5.0, 6.0])}
    >>> masks = {"w": jnp.array([[True], [False]]), "b": None}
    >>> apply_masks(params, masks)["w"].tolist()
    [[1.0, 2.0], [0.0, 0.0]]
    """
    if not isinstance(params, Mapping) and adapter_of(params) == "torch":
        raise TypeError(
            f"apply_masks: params must be a dict of tensors, got the module {type(params).__name__}"
            "; use purepruning_interop.torch.apply_(model, masks)"
        )
    tree = flatten(params)
    masked = {p: zero_pruned(tree.leaves[p], m) for p, m in by_path(masks, tree.leaves).items()}
    return tree.rebuild({**tree.leaves, **masked})


def merge_masks(*masks: Masks, how: Literal["and", "or"] = "and") -> Masks:
    """Returns one mask tree of several: ``"and"`` keeps what all keep, ``"or"`` what any keeps.

    A parameter without a mask is kept whole: with ``"and"`` the other masks decide, with ``"or"``
    the result has no mask either. The result is a tree as the first one is; flat dicts may name
    different parameters. Masks of one parameter may have different shapes, and are broadcast.

    Raises:
        KeyError: a mask's path has no place in the first tree.
        ValueError: two masks of one parameter do not broadcast; no masks; an unknown ``how``.
        TypeError: a mask is not boolean, or the masks are of different frameworks.

    >>> import jax.numpy as jnp
    >>> one = {"w": jnp.array([[True], [False]]), "b": None}
    >>> two = {"w": jnp.array([[True, False]]), "b": jnp.array([False, True])}
    >>> both = merge_masks(one, two)
    >>> both["w"].astype(int).tolist(), both["b"].astype(int).tolist()
    ([[1, 0], [0, 0]], [0, 1])
    >>> merge_masks(one, two, how="or")["b"] is None
    True
    """
    one_of("merge_masks: how", how, ("and", "or"))
    if not masks:
        raise ValueError("merge_masks needs at least one tree of masks")
    named = [named_masks(tree) for tree in masks]
    rebuild, places = _places(masks)
    merged = {}
    for path in places:
        group = [leaves[path] for leaves in named if path in leaves]
        if not group or (how == "or" and len(group) < len(named)):
            continue
        merged[path] = _merge(path, group, operator.and_ if how == "and" else operator.or_)
    return rebuild(merged)


def invert(masks: Masks) -> Masks:
    """Returns masks that keep what ``masks`` prune, and prune what they keep.

    A parameter without a mask still has none.

    Raises:
        TypeError: a mask is not boolean.

    >>> import jax.numpy as jnp
    >>> invert({"w": jnp.array([True, False]), "b": None})
    {'b': None, 'w': Array([False,  True], dtype=bool)}
    """
    rebuild, _ = _places((masks,))
    leaves = named_masks(masks)
    for path, mask in leaves.items():
        _check_bool(path, mask)
    return rebuild({path: by_numpy(operator.invert, mask) for path, mask in leaves.items()})


def expand(masks: Masks, params: Params) -> Masks:
    """Returns a boolean of the full shape for every leaf of ``params``: True where not pruned.

    There is no None among the result's leaves, so that it can be mapped over together with
    ``params`` (``jax.tree.map``, ``vmap``, ``lax.scan``). A leaf that is no array has shape ``()``.

    Raises:
        KeyError, ValueError, TypeError: as :func:`apply_masks`.

    >>> import jax.numpy as jnp
    >>> params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
    >>> full = expand({"w": jnp.array([[True], [False]]), "b": None}, params)
    >>> full["w"].astype(int).tolist(), full["b"].astype(int).tolist()
    ([[1, 1], [0, 0]], [1, 1])
    """
    tree = flatten(params)
    keep = by_path(masks, tree.leaves)

    return tree.rebuild(
        {path: whole_mask(keep.get(path), leaf) for path, leaf in tree.leaves.items()}
    )


def density(masks: Masks, params: Params) -> Any:
    r"""Returns the fraction of weights kept, of the parameters that have a mask.

    $$\sum_l \mathrm{kept}_l \,/\, \sum_l \mathrm{size}_l$$

    A float, the quotient of two exact counts, where the masks are known; under ``jit`` and ``vmap``
    a float32 scalar array, whose counts are exact up to 2**31 weights in all. 1 if nothing has a
    mask. Of ``params`` only the shapes matter.

    Raises:
        KeyError, ValueError, TypeError: as :func:`apply_masks`.

    >>> import jax.numpy as jnp
    >>> masks = {"w": jnp.array([[True], [False], [False], [False]]), "b": None}
    >>> density(masks, {"w": jnp.ones((4, 6)), "b": jnp.ones(6)})
    0.25
    """
    leaves = flatten(params).leaves
    keep = by_path(masks, leaves)
    shapes = {path: _shape(leaves[path]) for path in keep}
    total = sum(map(math.prod, shapes.values()))
    if not total:
        return 1.0
    if all(map(is_concrete, keep.values())):
        return sum(count_kept(mask, shapes[path]) for path, mask in keep.items()) / total
    return _traced_density(keep, shapes, total)


# For the other modules: masks by path, and one mask.
def by_path(masks: Any, params: Any) -> dict[str, Any]:
    """Returns the masks by path, each checked against its parameter; no array is touched.

    Raises:
        KeyError, ValueError, TypeError: as :func:`apply_masks`.
    """
    leaves = flatten(params).leaves
    named = named_masks(masks)
    for path, mask in named.items():
        if path not in leaves:
            message = missing(f"masks: no parameter is called {path!r}", path, leaves)
            raise KeyError(
                f"{message}. Give all arrays that the masks name, statistics too, such as a state "
                "dict or all variables; or leave that mask out"
            )
        if not is_array(leaves[path]):
            raise TypeError(f"masks: the parameter {path!r} is no array, but {shown(leaves[path])}")
        _check(path, mask, leaves[path])
    return named


def zero_pruned(x: Any, mask: Any) -> Any:
    """Returns one array with zeros where its mask is False."""
    if isinstance(x, jax.ShapeDtypeStruct):
        raise TypeError("params: a parameter that has a mask has no values, only a shape")
    if is_sharded(x):
        mask = mask if is_sharded(mask) else laid_out(mask, x)
        return namespace(x).where(mask, x, namespace(x).zeros_like(x))
    return by_numpy(lambda x, mask: chosen(spread_mask(mask, x), x, 0), x, mask)


def whole_mask(mask: Any, x: Any) -> Any:
    """Returns a new mask of the shape of ``x`` from one that broadcasts to it; True for None."""
    if mask is not None and is_sharded(x):
        return of_shard(by_numpy(_whole, local_as(x, mask), local(x)), x)
    return by_numpy(_whole, mask, x)


def _whole(mask: Any, x: Any) -> Any:
    xp = namespace(x)
    if mask is not None:
        return xp.astype(spread_mask(mask, x), xp.bool, copy=True)
    return xp.ones_like(x, dtype=xp.bool) if is_array(x) else xp.ones((), dtype=xp.bool)


def spread_mask(mask: Any, x: Any) -> Any:
    """Returns a mask broadcast to the shape of ``x``, and laid out over devices as ``x`` is."""
    if _shape(mask) != _shape(x):
        mask = namespace(x).broadcast_to(mask, _shape(x))
    if not isinstance(x, jax.Array):
        return mask
    # On a mesh of explicit axes, operands must agree in layout; elsewhere all specs are empty.
    return laid_out_by(mask, jax.typeof(x).sharding.spec, x)


def count_kept(mask: Any, shape: tuple[int, ...]) -> int:
    """Returns how many weights of a parameter of ``shape`` its mask keeps."""
    if is_sharded(mask):
        box = box_of(mask)
        mine = to_numpy(local(mask))
        (kept,) = reduced([box], [np.asarray([np.count_nonzero(mine) * box.first], np.int64)])
        return int(kept[0]) * (math.prod(shape) // max(math.prod(mask.shape), 1))
    if is_concrete(mask) and not is_on_this_process(mask):
        # Each process counts its part: only the sums of rows are gathered.
        kept = to_numpy(compiled(mask, _kept_of_rows)(mask)).sum(dtype=np.int64)
    else:
        kept = np.count_nonzero(to_numpy(mask))
    size = math.prod(mask.shape)
    return int(kept) * (math.prod(shape) // size) if size else 0


def _kept_of_rows(mask: Any) -> Any:
    return jnp.sum(mask, axis=tuple(range(1, mask.ndim)), dtype=jnp.int32)


def to_numpy(mask: Any) -> np.ndarray:
    """Returns a mask as a NumPy array; one that lies over several processes is gathered by all.

    Raises:
        TypeError: under ``jit`` or ``vmap``, where its values are not known.
        ValueError: it lies over processes.
    """
    if is_sharded(mask):
        raise ValueError(
            "these masks lie over processes (DTensors), and are needed whole; give "
            "{name: mask.full_tensor() for name, mask in masks.items()}, which every process has "
            "to make, or save them by torch.distributed.checkpoint"
        )
    if not is_concrete(mask):
        raise TypeError(
            "the values of these masks are not known under jit or vmap; call this outside of it"
        )
    return mask.detach().cpu().numpy() if is_torch(mask) else as_known(mask)


def named_masks(masks: Any) -> dict[str, Any]:
    """Returns the masks of a tree by parameter path, without its None.

    Raises:
        TypeError: it is no tree, or a mask is not boolean.
    """
    if isinstance(masks, Mapping) and any(map(is_torch, masks.values())):
        masks = {name: mask for name, mask in masks.items() if mask is not None}
    try:
        leaves = flatten(masks).leaves
    except (TypeError, ValueError) as error:
        raise type(error)(f"masks: {error.args[0]}") from None
    if "" in leaves and not is_array(leaves[""]):
        raise TypeError(
            f"masks must be a tree of booleans by parameter, as pruners return it, got "
            f"{shown(masks)}"
        )
    for path, mask in leaves.items():
        _check_bool(path, mask)
    return leaves


def masks_of_pruner(
    where: str, masks: Any, params: Any, weights: Mapping[str, str]
) -> dict[str, Any]:
    """Returns the masks that a pruner returned, by path; ``where`` names who called it.

    Raises:
        KeyError, ValueError, TypeError: they are no masks of these parameters, or there is none for
            one of ``weights``, the path of each layer's weight by its name.
    """
    try:
        found = by_path(masks, params)
        for name, path in weights.items():
            if path not in found:
                raise KeyError(f"there is no mask of layer {name!r}")
        return found
    except (KeyError, ValueError, TypeError) as error:
        why = error.args[0] if error.args else error
        raise type(error)(
            f"{where}: the pruner must return masks of params, for every layer of the config: {why}"
        ) from None


def check_mask(path: str, mask: Any, shape: tuple[int, ...]) -> None:
    """Raises unless a mask is boolean and broadcasts to its parameter's shape."""
    _check_bool(path, mask)
    if not _broadcasts(_shape(mask), shape):
        raise ValueError(
            f"masks: {path!r} must broadcast to the parameter's shape {shape}, got {_shape(mask)}"
        )


def _check(path: str, mask: Any, param: Any) -> None:
    check_mask(path, mask, _shape(param))
    if is_torch(mask) != is_torch(param):
        kinds = ["torch" if is_torch(x) else "JAX" for x in (mask, param)]
        raise TypeError(f"masks: {path!r} is a {kinds[0]} mask for a {kinds[1]} parameter")
    if is_sharded(mask) and is_torch(param) and not is_sharded(param):
        raise TypeError(
            f"masks: {path!r} lies over processes (a DTensor), and its parameter does not; give "
            "mask.full_tensor(), which every process has to make"
        )
    if is_torch(mask) and mask.device != param.device:
        raise ValueError(
            f"masks: {path!r} is on device {mask.device}, its parameter on {param.device}"
        )


def _check_bool(path: str, mask: Any) -> None:
    if not is_torch(mask) and (not is_array(mask) or isinstance(mask, jax.ShapeDtypeStruct)):
        raise TypeError(f"masks: {path!r} must be a boolean array, got {shown(mask)}")
    if not namespace(mask).isdtype(mask.dtype, "bool"):
        raise TypeError(f"masks: {path!r} must be boolean, got {mask.dtype}")


def _broadcasts(mask: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    tail = shape[len(shape) - len(mask) :]
    return len(mask) <= len(shape) and all(m in (1, n) for m, n in zip(mask, tail, strict=True))


def _shape(x: Any) -> tuple[int, ...]:
    return tuple(getattr(x, "shape", ()))


def _places(masks: tuple[Any, ...]) -> tuple[Any, Iterable[str]]:
    """Returns how to build a tree as the first one, and the paths it has a place for."""
    if all(map(_is_flat_dict, masks)):
        names = sorted({name for tree in masks for name in tree})
        # Torch's dicts name the pruned ones only; JAX's keep their None.
        fill = {} if any(map(is_torch, _values(masks))) else dict.fromkeys(names)
        return (lambda values: {**fill, **values}), names
    nothing = object()
    flatten(masks[0])  # says what is no tree
    tree = flatten(
        jax.tree.map(lambda x: nothing if x is None else x, masks[0], is_leaf=lambda x: x is None)
    )
    for other in masks[1:]:
        for path in named_masks(other):
            if path not in tree.leaves:
                message = f"merge_masks: the first tree has no place for {path!r}"
                raise KeyError(missing(message, path, tree.leaves))
    return tree.rebuild, tree.leaves


def _is_flat_dict(tree: Any) -> bool:
    if type(tree) is not dict:
        return False
    return all(type(k) is str and (x is None or is_array(x)) for k, x in tree.items())


def _values(masks: tuple[Any, ...]) -> list[Any]:
    return [x for tree in masks for x in tree.values()]


def _merge(path: str, group: list[Any], op: Any) -> Any:
    for mask in group:
        _check_bool(path, mask)
    if len({is_torch(mask) for mask in group}) > 1:
        raise TypeError(f"masks: {path!r} has both a torch and a JAX mask")
    shapes = [_shape(mask) for mask in group]
    try:
        shape = np.broadcast_shapes(*shapes)
    except ValueError:
        listed = " and ".join(map(str, shapes))
        raise ValueError(f"masks: the masks of {path!r} do not broadcast: {listed}") from None

    def merged(*group: Any, shape: tuple[int, ...] = shape) -> Any:
        xp = namespace(group[0])
        whole = [xp.broadcast_to(mask, shape) for mask in group]
        return xp.astype(functools.reduce(op, whole), xp.bool, copy=True)

    like = next((x for x in group if is_sharded(x) and _shape(x) == shape), None)
    if like is not None:
        merged_shards = functools.partial(merged, shape=tuple(local(like).shape))
        return of_shard(by_numpy(merged_shards, *(local_as(like, mask) for mask in group)), like)
    return by_numpy(merged, *group)


def _traced_density(keep: dict[str, Any], shapes: dict[str, tuple[int, ...]], total: int) -> Any:
    parts = []
    for path, mask in keep.items():
        if not (size := math.prod(shapes[path])):
            continue
        xp = namespace(mask)
        dtype = xp.int64 if is_torch(mask) else xp.int32
        rows = xp.reshape(mask, (mask.shape[0] if mask.ndim > 1 else 1, -1))
        rows = xp.sum(rows, axis=1, dtype=dtype)
        if dtype == xp.int32 and total >= 2**31:
            rows = xp.astype(rows, xp.float32)
        parts.append(xp.sum(rows, dtype=rows.dtype) * (size // math.prod(mask.shape)))
    return xp.astype(functools.reduce(operator.add, parts), xp.float32) / float(total)
