"""Kinds of arguments, and for each what is wrong for it.

A kind judges every value of one catalogue (:func:`junk`), and adds wrong values of its own, made
from a good one: a tree with one bad leaf, a state of another run.
"""

from __future__ import annotations

import dataclasses
import fractions
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

import purepruning as pp

#: Whether a value must be refused, may be (clearly) refused or accepted, or is a good one.
Fate = Literal["refuse", "either", "good"]


class Wrong(NamedTuple):
    """A value to call with, under a label."""

    label: str
    value: Any
    fate: Fate


@dataclasses.dataclass(frozen=True)
class Kind:
    """What values an argument takes.

    Attributes:
        words: what an error may call it, beside the argument's own name.
        judge: what is to become of a value of the catalogue.
        more: further wrong values, made from a good one.
    """

    words: tuple[str, ...]
    judge: Callable[[Any], Fate]
    more: Callable[[Any], Iterable[Wrong]] = lambda good: ()

    def wrong(self, good: Any) -> Iterator[Wrong]:
        """Returns all wrong values."""
        for label, value in junk().items():
            fate = self.judge(value)
            if fate != "good":
                yield Wrong(label, value, fate)
        yield from self.more(good)


class _Stranger:
    """An object of no meaning."""


class _Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(x)


_LAYER = pp.Layer("stranger", "Linear", "stranger.w", (2, 2), (1,), (0,))


def junk() -> dict[str, Any]:
    """Returns values of all sorts by label, made anew."""
    return {
        "None": None,
        "False": False,
        "True": True,
        "0": 0,
        "1": 1,
        "-1": -1,
        "2**31": 2**31,
        "2**63": 2**63,
        "10**400": 10**400,
        "0.5": 0.5,
        "2.0": 2.0,
        "-0.5": -0.5,
        "nan": math.nan,
        "inf": math.inf,
        "1j": 1j,
        "text": "text",
        "empty text": "",
        "bytes": b"bytes",
        "[]": [],
        "[1]": [1],
        "[None]": [None],
        "()": (),
        "{}": {},
        "{'text': 1}": {"text": 1},
        "{1: 2}": {1: 2},
        "set": {1, 2},
        "object": _Stranger(),
        "class": _Stranger,
        "function": _returns_none,
        "module": math,
        "generator": (x for x in (1, 2)),
        "range": range(3),
        "fraction": fractions.Fraction(1, 2),
        "path": Path("nowhere"),
        "exception": ValueError("text"),
        "numpy int": np.int64(1),
        "numpy float": np.float32(0.5),
        "numpy bool": np.bool_(True),
        "numpy 0-d": np.asarray(0.5),
        "numpy array": np.ones((2, 3), np.float32),
        "numpy objects": np.asarray([None, "text"], object),
        "numpy strings": np.asarray(["text"]),
        "numpy empty": np.zeros((0,), np.float32),
        "jax scalar": jnp.float32(0.5),
        "jax int": jnp.int32(1),
        "jax array": jnp.ones((2, 3)),
        "jax key": jax.random.key(0),
        "shape": jax.ShapeDtypeStruct((2, 3), "float32"),
        "torch scalar": torch.tensor(0.5),
        "torch int": torch.tensor(1),
        "torch array": torch.ones(2, 3),
        "torch module": torch.nn.Linear(2, 2),
        "nnx module": nnx.Linear(2, 2, rngs=nnx.Rngs(0)),
        "linen module": _Linen(),
        "layer": _LAYER,
        "config": pp.resolve([{"sparsity": 0.5, "op_types": ["Linear"]}], [_LAYER]),
        "schedule": pp.one_shot(),
        "pruner": pp.level,
    }


def _returns_none(*args: Any, **kwargs: Any) -> None:
    return None


# Numbers and words.


def _number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


def _scalar(x: Any) -> bool:
    """Whether ``x`` is a scalar array of numbers."""
    if isinstance(x, np.bool_ | str):
        return False
    try:
        known = tuple(x.shape) == () and ("int" in str(x.dtype) or "float" in str(x.dtype))
    except Exception:
        return False
    return bool(known)


def integer(low: int, high: float = 2**31 - 2, *, optional: bool = False) -> Kind:
    """An integer in a range."""

    def judge(x: Any) -> Fate:
        if x is None:
            return "either" if optional else "refuse"
        if isinstance(x, int) and not isinstance(x, bool):
            return "either" if low <= x <= high else "refuse"
        fits = _scalar(x) and "int" in str(x.dtype) and low <= int(x) <= high
        return "either" if fits else "refuse"

    return Kind((), judge)


def real(
    low: float, high: float, *, low_in: bool = True, high_in: bool = True, optional: bool = False
) -> Kind:
    """A number in a range."""

    def judge(x: Any) -> Fate:
        if x is None:
            return "either" if optional else "refuse"
        if isinstance(x, fractions.Fraction):
            return "either"
        if not (_number(x) or _scalar(x)):
            return "refuse"
        if isinstance(x, int) and abs(x) > 2**1000:
            return "refuse"
        above = low <= x if low_in else low < x
        below = x <= high if high_in else x < high
        return "either" if above and below else "refuse"

    return Kind((), judge)


def choice(*values: Any) -> Kind:
    """One of a few words."""

    def judge(x: Any) -> Fate:
        known = x is None or isinstance(x, str)
        return "good" if known and x in values else "refuse"

    return Kind((), judge)


def flag() -> Kind:
    """True or False."""
    return Kind((), lambda x: "good" if isinstance(x, bool) else _either(isinstance(x, np.bool_)))


def text(*, optional: bool = False) -> Kind:
    """Any string."""
    return Kind((), lambda x: _either(isinstance(x, str) or (optional and x is None)))


def none() -> Kind:
    """None and nothing else."""
    return Kind(("stats",), lambda x: "good" if x is None else "refuse")


def path(*suffixes: str) -> Kind:
    """A path of a file that is there to be read, or can be written."""

    def judge(x: Any) -> Fate:
        return "refuse" if not isinstance(x, str | os.PathLike) else "either"

    return Kind(("nowhere", "path", "file", "text", "directory"), judge)


def anything(*words: str) -> Kind:
    """Any value: it is accepted, or refused clearly."""
    return Kind(words, lambda x: "either")


def function(*bad: tuple[str, Any], words: tuple[str, ...] = (), called: bool = True) -> Kind:
    """A function; ``bad`` are functions that return what they should not."""

    def judge(x: Any) -> Fate:
        if not callable(x):
            return "refuse"
        if called:  # what another function says of its arguments is its own matter
            return "refuse" if x is _returns_none else "good"
        return "either"

    def more(good: Any) -> Iterator[Wrong]:
        for label, value in bad:
            yield Wrong(label, value, "refuse")

    return Kind(words, judge, more)


def random_key() -> Kind:
    """A random key, as :func:`purepruning.random_pruning` takes it."""

    def judge(x: Any) -> Fate:
        if isinstance(x, int) and not isinstance(x, bool):
            return _either(0 <= x < 2**32)
        dtype = str(getattr(x, "dtype", ""))
        return _either("int" in dtype or "key" in dtype)

    def more(good: Any) -> Iterator[Wrong]:
        yield Wrong("keys", jax.random.split(jax.random.key(0), 3), "refuse")
        yield Wrong("three words", np.arange(3), "refuse")
        yield Wrong("float words", np.ones(2, np.float32), "refuse")

    return Kind(("key", "seed"), judge, more)


def typed_key() -> Kind:
    """A typed JAX key."""

    def judge(x: Any) -> Fate:
        return _either("key<" in str(getattr(x, "dtype", "")))

    def more(good: Any) -> Iterator[Wrong]:
        yield Wrong("keys", jax.random.split(jax.random.key(0), 3), "refuse")
        yield Wrong("raw key", jax.random.PRNGKey(0), "refuse")

    return Kind(("key",), judge, more)


def _either(good: bool) -> Fate:
    return "either" if good else "refuse"


def is_numeric(x: Any) -> bool:
    """Whether ``x`` is an array or a scalar of numbers, in any framework."""
    kinds = ("int", "float", "bool", "complex")
    return any(kind in str(getattr(x, "dtype", "")) for kind in kinds)


# Trees of arrays.


def is_torch(tree: Any) -> bool:
    """Whether a tree is a flat dict of torch tensors."""
    return isinstance(tree, Mapping) and any(isinstance(x, torch.Tensor) for x in tree.values())


def replaced(tree: Any, path: str, leaf: Any) -> Any:
    """Returns the tree with another leaf at a dotted path; nested dicts, or a flat one."""
    if isinstance(tree, Mapping) and path in tree:
        return {**tree, path: leaf}
    key, _, rest = path.partition(".")
    return {**tree, key: replaced(tree[key], rest, leaf) if rest else leaf}


def without(tree: Any, path: str) -> Any:
    """Returns the tree without the leaf at a dotted path."""
    if isinstance(tree, Mapping) and path in tree:
        return {k: v for k, v in tree.items() if k != path}
    key, _, rest = path.partition(".")
    return {**tree, key: without(tree[key], rest)}


def leaf_at(tree: Any, path: str) -> Any:
    """Returns the leaf at a dotted path."""
    if isinstance(tree, Mapping) and path in tree:
        return tree[path]
    key, _, rest = path.partition(".")
    return leaf_at(tree[key], rest)


def bad_leaves(leaf: Any) -> dict[str, Any]:
    """Returns what may stand in the place of an array, and should not."""
    torch_leaf = isinstance(leaf, torch.Tensor)
    x = np.asarray(leaf.detach() if torch_leaf else leaf)

    def make(x: np.ndarray) -> Any:
        return torch.tensor(x) if torch_leaf else jnp.asarray(x)

    return {
        "none": None,
        "text": "text",
        "number": 1.5,
        "list": x.tolist(),
        "object": _Stranger(),
        "numpy objects": x.astype(object),
        "other framework": jnp.asarray(x) if torch_leaf else torch.tensor(x),
        "shape": make(np.ones((x.shape[0] + 1, *x.shape[1:]), x.dtype)),
        "rank": make(x[..., None]),
        "0-d": make(np.ones((), x.dtype)),
        "empty": make(np.zeros((0,), x.dtype)),
        "bool": make(x > 0),
        "int": make(x.astype(np.int32)),
        "float": make(x.astype(np.float32)),
        "complex": make(x.astype(np.complex64)),
        "nan": make(np.full(x.shape, np.nan, np.float32)),
        "abstract": jax.ShapeDtypeStruct(x.shape, x.dtype),
        "meta": torch.ones(x.shape, device="meta"),
    }


#: Bad leaves for a function that looks at shapes, and for one that looks at values.
NEVER = ("text", "number", "list", "object", "numpy objects", "other framework", "shape", "rank")
NEVER = (*NEVER, "0-d", "empty")
VALUES = (*NEVER, "none", "bool", "int", "complex", "nan", "abstract", "meta")


def arrays(
    path: str,
    *,
    refuse: tuple[str, ...] = VALUES,
    words: tuple[str, ...] = (),
    missing: Fate = "refuse",
    judge: Callable[[Any], Fate] = lambda x: "refuse",
) -> Kind:
    """A tree of arrays, of which the one at ``path`` is used."""

    def more(good: Any) -> Iterator[Wrong]:
        for label, leaf in bad_leaves(leaf_at(good, path)).items():
            fate: Fate = "refuse" if label in refuse else "either"
            # In a tree of JAX's a list is a node: there is nothing then at the path.
            fate = missing if label == "list" and not is_torch(good) else fate
            yield Wrong(f"{path}: {label}", replaced(good, path, leaf), fate)
        yield Wrong(f"{path}: missing", without(good, path), missing)
        yield Wrong("key that is no string", {**good, 5: leaf_at(good, path)}, "either")
        yield Wrong("in a tuple", (good,), missing)

    names = (path, path.rpartition(".")[0], "param", "tree", "tensor", "layer", "unit")
    return Kind((*names, *words), judge, more)


def params(path: str, *, uses: Literal["values", "shapes"] = "values") -> Kind:
    """Parameters, of which the one at ``path`` is pruned."""
    refuse = VALUES if uses == "values" else NEVER
    return arrays(path, refuse=refuse, words=("param", "tree", "tensor"))


def masks(
    path: str, *, missing: Fate = "either", empty: Fate = "either", stray: Fate = "refuse"
) -> Kind:
    """Masks, one of them at ``path``; a tree of none is good unless ``empty`` says otherwise."""
    never = tuple(label for label in NEVER if label != "0-d")
    refuse = (*never, "int", "float", "complex", "nan", "abstract", "meta")

    def judge(x: Any) -> Fate:
        nothing = (
            x is None
            or (isinstance(x, list | tuple | dict) and not x)
            or (isinstance(x, list) and x == [None])
        )
        return empty if isinstance(x, list | tuple | dict | None) and nothing else "refuse"

    kind = arrays(path, refuse=refuse, words=("mask",), missing=missing, judge=judge)

    def more(good: Any) -> Iterator[Wrong]:
        yield from kind.more(good)
        some = leaf_at(good, path)
        yield Wrong("unknown path", {**good, "stray": some}, stray)

    return dataclasses.replace(kind, more=more)


# Structures of the library.


def _fields(good: Any, names: Iterable[str], fate: Fate, nested: bool) -> Iterator[Wrong]:
    """Yields a NamedTuple or dataclass with one field that is wrong."""
    bad = {
        "None": None,
        "5": 5,
        "text": "text",
        "{}": {},
        "()": (),
        "numpy 0.5": np.asarray(0.5, np.float32),
        "numpy array": np.ones((2, 3), np.float32),
        "object": _Stranger(),
    }
    for name in names:
        for label, value in bad.items():
            field = getattr(good, name)
            scalar = getattr(field, "shape", None) == () and "float" in str(field.dtype)
            empty = isinstance(field, dict | tuple) and label in ("{}", "()")
            if empty or (scalar and label == "numpy 0.5"):
                yield Wrong(f".{name} = {label}", _with(good, name, value), "either")
            else:
                yield Wrong(f".{name} = {label}", _with(good, name, value), fate)
        inner = getattr(good, name)
        if isinstance(inner, dict) and inner and nested:
            key = next(iter(inner))
            for label, value in bad.items():
                yield Wrong(
                    f".{name}[{key!r}] = {label}",
                    _with(good, name, {**inner, key: value}),
                    fate,
                )


def _with(good: Any, name: str, value: Any) -> Any:
    if dataclasses.is_dataclass(good):
        return dataclasses.replace(good, **{name: value})  # type: ignore[type-var]
    return good._replace(**{name: value})


def structure(
    of: type | tuple[type, ...],
    *others: tuple[str, Any, Fate],
    words: tuple[str, ...] = (),
    fields: Iterable[str] | None = None,
    fate: Fate = "refuse",
    nested: bool = True,
) -> Kind:
    """An instance of a type of the library; ``others`` are of another run.

    ``fields`` are those that may be wrong, and ``nested`` says whether dicts in them are looked at.
    """

    def more(good: Any) -> Iterator[Wrong]:
        for label, value, its in others:
            yield Wrong(label, value, its)
        names = getattr(good, "_fields", ()) if fields is None else fields
        yield from _fields(good, names, fate, nested)

    return Kind(words, lambda x: "good" if isinstance(x, of) else "refuse", more)


def config(*others: tuple[str, Any, Fate], counts: bool = True, model: bool = True) -> Kind:
    """What ``resolve`` returned; whether its counts, and its layers, are looked at."""

    def more(good: Any) -> Iterator[Wrong]:
        for label, value, fate in others:
            yield Wrong(label, value, fate)
        fate: Fate = "refuse" if counts else "either"
        key = next(iter(good.counts), None)
        if key is None:
            return
        for label, count in {
            "None": None,
            "-1": -1,
            "10**12": 10**12,
            "1.5": 1.5,
            "1.0": 1.0,
            "True": True,
            "'5'": "5",
            "nan": math.nan,
            "object": _Stranger(),
            "numpy array": np.ones(2, np.int32),
            "numpy float": np.float32(1),
            "numpy objects": np.asarray([1, None], object),
            "jax array": jnp.ones(2, jnp.int32),
            "torch array": torch.ones(2, dtype=torch.int32),
            "list": [1],
        }.items():
            several = label in ("numpy array", "jax array", "torch array")
            wrong = dataclasses.replace(good, counts={**good.counts, key: count})
            yield Wrong(f"count {label}", wrong, "either" if several else fate)
        yield Wrong("counts {}", dataclasses.replace(good, counts={}), fate)
        yield Wrong("counts None", dataclasses.replace(good, counts=None), fate)
        yield Wrong("masks 5", dataclasses.replace(good, masks={"a.w": 5}), fate)

    def judge(x: Any) -> Fate:
        return "either" if isinstance(x, pp.Config) and not model else "refuse"

    return Kind(("config", "resolve", "count", "mask", "layer"), judge, more)


def layers(*others: tuple[str, Any, Fate], names: bool = False, config_too: bool = False) -> Kind:
    """Rows of a layer table; ``names`` says whether strings are good as well."""

    def judge(x: Any) -> Fate:
        if isinstance(x, pp.Config) and config_too:
            return "either"
        if isinstance(x, list | tuple | dict | set) and not x:
            return "either"
        if isinstance(x, np.ndarray) and not x.size:
            return "either"
        return "refuse"

    def more(good: Any) -> Iterator[Wrong]:
        rows = list(good) or [_LAYER]
        yield from (Wrong(*other) for other in others)
        yield Wrong("a row alone", rows[0], "refuse")
        yield Wrong("a row of another model", [*rows, _LAYER], "either")
        yield Wrong("with None", [*rows, None], "refuse")
        yield Wrong("with a name", [*rows, "a"], "either" if names else "refuse")
        yield Wrong("twice", [*rows, rows[0]], "either")
        yield Wrong(
            "by name",
            {getattr(row, "name", row): row for row in rows},
            "either" if names else "refuse",
        )
        yield Wrong("rows as dicts", [dataclasses.asdict(_LAYER)], "refuse")

    return Kind(("layer", "name", "config"), judge, more)


def of_type(*types: type, words: tuple[str, ...] = (), more: Iterable[Wrong] = ()) -> Kind:
    """An instance of some types."""
    return Kind(words, lambda x: _either(isinstance(x, types)), lambda good: more)
