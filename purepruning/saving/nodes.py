"""Dicts and lists of a state by name, so that a part of it can be read that nobody describes.

An optimizer of torch that has not taken a step has no state yet: what is read for it is built from
the file alone.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

#: Kinds of nodes, as files name them. What has no entry is a dict.
_KINDS = {list: "list", tuple: "tuple", type(None): "None"}


def node_kinds(tree: Any, name: str = "") -> dict[str, str]:
    """Returns which nodes of a tree are lists, tuples, None or dicts with nothing in them, by name.

    Names are those of :func:`jax.tree_util.keystr`. Nodes of other kinds are not entered.
    """
    if isinstance(tree, dict):
        children, found = list(tree.items()), {} if tree else {name: "dict"}
    elif type(tree) in _KINDS:
        children, found = list(enumerate(tree or ())), {name: _KINDS[type(tree)]}
    else:
        return {}
    for key, child in children:
        found |= node_kinds(child, f"{name}[{key!r}]")
    return found


def is_empty(node: Any) -> bool:
    """Whether a node of a tree is a dict with nothing in it."""
    return isinstance(node, dict) and not node


def rebuilt(name: str, leaves: Mapping[str, Any], kinds: Mapping[str, str]) -> Any:
    """Returns the node of that name, built from all leaves and what :func:`node_kinds` said.

    Raises:
        ValueError: there is a node in it that is neither dict, list nor tuple.
    """
    tree: dict[Any, Any] = {}
    for inner in (*kinds, *leaves):
        if inner.startswith(name):
            node = tree
            for key in _keys(inner, inner[len(name) :]):
                node = node.setdefault(key, {})

    def build(name: str, node: dict[Any, Any]) -> Any:
        if name in leaves:
            return leaves[name]
        children = {key: build(f"{name}[{key!r}]", child) for key, child in node.items()}
        kind = kinds.get(name, "dict")
        if kind == "None":
            return None
        if kind == "dict":
            return children
        return {"list": list, "tuple": tuple}[kind](children[i] for i in range(len(children)))

    return build(name, tree)


def _keys(name: str, rest: str) -> list[Any]:
    """Returns the keys in the end of a name."""
    found = []
    try:
        node = ast.parse(f"x{rest}", mode="eval").body
        while isinstance(node, ast.Subscript):
            found.append(ast.literal_eval(node.slice))
            node = node.value
    except (SyntaxError, MemoryError):
        node = ast.Constant(None)
    if not isinstance(node, ast.Name):
        raise ValueError(
            f"{name} lies in something that is neither dict, list nor tuple; give like as the run "
            "has it, not an empty dict"
        )
    return found[::-1]
