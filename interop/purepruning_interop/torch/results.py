"""What a module returns, as a tree that torch can flatten."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree


def plain(found: Any) -> Any:
    """Returns the result of a module without what is no tensor, number or text.

    Objects that torch does not know, such as dataclasses, become dictionaries of their attributes.
    Caches of keys and values are state rather than results, and may shrink: they are None, and so
    is what has no attributes. What torch can flatten into tensors and numbers stays as it is.
    """
    leaves, spec = pytree.tree_flatten(found, is_leaf=_is_cache)
    made = [_plain(x) for x in leaves]
    if all(x is y for x, y in zip(leaves, made, strict=True)):
        return found
    return pytree.tree_unflatten(made, spec)


def _is_cache(x: Any) -> bool:
    return any("Cache" in cls.__name__ for cls in type(x).__mro__)


def _plain(x: Any) -> Any:
    if isinstance(x, (torch.Tensor, *_VALUES)):
        return x
    if _is_cache(x) or isinstance(x, (type, torch.nn.Module)) or not hasattr(x, "__dict__"):
        return None
    return {key: _values(value) for key, value in vars(x).items()}


def _values(x: Any) -> Any:
    """Returns an attribute of an object, of whose objects nothing is asked."""
    known = (torch.Tensor, *_VALUES)
    return pytree.tree_map(lambda y: y if isinstance(y, known) else None, x)


_VALUES = (
    *(int, float, complex, bool, str, bytes, type(None)),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
    *(torch.SymInt, torch.SymFloat, torch.SymBool),
)
