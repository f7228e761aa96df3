"""Trees of parameters: leaves by dotted path, and the way back to a tree."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from purepruning.arguments import adapter_of
from purepruning.arrays import is_torch

#: Models that are no trees of arrays, by adapter: how their parameters are had.
_PARAMETERS = {
    "torch": "dict(model.named_parameters()), or use apply_, keep_pruned and masked_call of "
    "purepruning_interop.torch, which take the module",
    "nnx": "nnx.state(model, nnx.Param)",
    "linen": "what model.init returned, such as its ['params']",
    "keras": "purepruning_interop.keras.params(model)",
    "haiku": "the parameters that its init returned",
}


class Flat(NamedTuple):
    """A tree taken apart: ``leaves`` by path, in an order that no dict order changes."""

    leaves: dict[str, Any]
    rebuild: Callable[[Mapping[str, Any]], Any]


def flatten(tree: Any) -> Flat:
    """Returns the leaves of ``tree`` by dotted path, and the way back to a tree.

    A leaf's path joins its keys with dots: ``"Dense_0.kernel"``, ``"layers.0.weight"``. The
    ``value`` in a variable of Flax NNX is no part of it, so that a state, its gradients and an
    optimizer's copy of it have the same paths. ``rebuild(values)`` gives the same
    tree with ``None`` at every path that ``values`` does not name; for a flat dict of torch
    tensors, which cannot hold ``None`` under ``torch.func.vmap``, it gives a dict of the named ones
    only.

    Raises:
        TypeError: ``tree`` is a model of torch, Flax, Keras or Haiku, not its parameters; keys of a
            dict cannot be sorted, or names of tensors are no strings.
        ValueError: two leaves have the same path, or torch tensors are not in one flat dict.

    >>> flatten({"b": {"w": 1.0}, "a": [2.0, 3.0]}).leaves
    {'a.0': 2.0, 'a.1': 3.0, 'b.w': 1.0}
    """
    if isinstance(tree, Mapping) and tree and all(map(is_torch, tree.values())):
        if not all(isinstance(name, str) for name in tree):
            raise TypeError("torch parameters must be a dict by name, and a name is no string")
        leaves = {name: tree[name] for name in sorted(tree)}
        return Flat(leaves, lambda values: {n: values[n] for n in leaves if n in values})
    # Not of dicts: torch.compile cannot follow what tells models.
    adapter = None if isinstance(tree, Mapping) else adapter_of(tree)
    if adapter in _PARAMETERS:
        raise TypeError(
            f"expected a tree of arrays, got a model, {type(tree).__name__}; give "
            f"{_PARAMETERS[adapter]}"
        )
    try:
        treedef = jax.tree_util.tree_structure(tree)
    except (TypeError, ValueError):  # of keys that have no order among each other
        raise TypeError(
            "a dict in the tree of parameters has keys that cannot be sorted; give it keys that "
            "are all strings"
        ) from None
    leaves = {}
    # Flax's boxes are nodes with a value in them; the path ends at the box.
    for keys, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_box):
        path = jax.tree_util.keystr(keys, simple=True, separator=".")
        for leaf in jax.tree_util.tree_leaves(node) if _is_box(node) else [node]:
            if path in leaves:
                raise ValueError(f"two leaves of the tree have the path {path!r}")
            leaves[path] = leaf
    if any(map(is_torch, leaves.values())):
        odd = next((path for path, leaf in leaves.items() if not is_torch(leaf)), None)
        entry = "" if odd is None else f"; the entry {odd!r} is no tensor"
        raise ValueError(f"torch parameters must be one flat dict of name -> tensor{entry}")

    def rebuild(values: Mapping[str, Any]) -> Any:
        return jax.tree_util.tree_unflatten(treedef, [values.get(path) for path in leaves])

    return Flat(leaves, rebuild)


def leaf_paths(tree: Any) -> tuple[str, ...]:
    """Returns the dotted path of every leaf of ``tree``, as layers and configs spell them.

    >>> leaf_paths({"dense": {"kernel": 1.0, "bias": 2.0}})
    ('dense.bias', 'dense.kernel')
    """
    return tuple(flatten(tree).leaves)


def _is_box(x: Any) -> bool:
    """Whether ``x`` is one of Flax's boxes around an array: an NNX variable, Linen's metadata."""
    nnx, meta = sys.modules.get("flax.nnx"), sys.modules.get("flax.core.meta")
    if nnx is not None and isinstance(x, nnx.Variable):
        return True
    return meta is not None and isinstance(x, meta.AxisMetadata)
