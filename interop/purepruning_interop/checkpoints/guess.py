"""The layer table of a checkpoint without its model: guessed from names and shapes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from purepruning.layers import Layer

_EMBEDDING = re.compile(
    r"(^|[._])(embed\w*|\w*embeddings?|wte|wpe|emb|lookup|relative_attention_bias)$"
    r"|(^|\.)shared$",
    re.IGNORECASE,
)
_TRANSPOSED = re.compile(r"transpose|deconv|upconv|convt\d?($|\.)", re.IGNORECASE)
_RECURRENT = re.compile(r"weight_(ih|hh|hr)(_l\d+)?(_reverse)?$")
_EXPERTS = re.compile(r"(^|\.)experts\.\w+$")
_CELLS = {4: "LSTM", 3: "GRU", 1: "RNN"}
_COLLECTIONS = ("params.", "model.params.")


class _Guess(NamedTuple):
    type: str
    out_axes: tuple[int, ...]
    in_axes: tuple[int, ...] = ()
    stack_axes: tuple[int, ...] = ()


class _Named(NamedTuple):
    """A tensor's name in parts: the module that owns it, and what it is called there."""

    path: str
    module: str
    leaf: str
    separator: str


def guess_layers(shapes: Mapping[str, tuple[int, ...]]) -> tuple[Layer, ...]:
    """Returns what the weights among named tensors seem to be, as a layer table.

    ``weight`` is read as PyTorch and Equinox lay it out, ``(out, in, *taps)``, and ``kernel`` as
    Flax and Keras do, ``(*taps, in, out)``. A matrix whose bias has the length of its second axis
    alone, and all others of the same last name, is ``(in, out)``, as in GPT-2. Vectors are norms:
    batch norms where there are statistics, else layer norms with a bias and RMS norms without. How
    many groups a convolution has is not in a checkpoint: it is read as one group.

    Args:
        shapes: shape by name; floating-point tensors only.

    >>> found = guess_layers({"fc.weight": (10, 84), "fc.bias": (10,), "norm.scale": (84,)})
    >>> [(x.name, x.type, x.in_axes) for x in found]
    [('fc', 'Linear', (1,)), ('norm', 'RMSNorm', ())]
    """
    named = [_named(path) for path in shapes]
    turned = _input_first(named, shapes)
    table = []
    for name in named:
        guess = _guess(name, shapes, turned)
        if guess is None:
            continue
        bias = _bias(name, guess, shapes)
        prefix = next((p for p in _COLLECTIONS if name.module.startswith(p)), "")
        module = name.module or name.path
        aliases = (module.removeprefix(prefix),) if prefix else ()
        table.append(
            Layer(
                module if name.leaf in ("weight", "kernel", "scale", "embedding") else name.path,
                guess.type,
                name.path,
                tuple(shapes[name.path]),
                guess.out_axes,
                guess.in_axes,
                guess.stack_axes,
                bias=bias,
                aliases=aliases,
            )
        )
    return tuple(table)


def _named(path: str) -> _Named:
    separator = "/" if "/" in path else "."
    module, _, leaf = path.rpartition(separator)
    return _Named(path, module, leaf, separator)


def _guess(name: _Named, shapes: Mapping[str, tuple[int, ...]], turned: set[str]) -> _Guess | None:
    shape = shapes[name.path]
    rank = len(shape)
    if name.leaf == "embedding" and rank == 2:
        return _Guess("Embedding", (1,), (0,))
    if name.leaf == "kernel":
        return _flax(name.module.replace("/", "."), rank)
    if _EXPERTS.search(name.path) and rank == 3:
        return _Guess("Linear", (1,), (2,), (0,))
    if (found := _RECURRENT.search(name.leaf)) and rank == 2:
        hidden = shapes.get(name.path.replace(f"weight_{found[1]}", "weight_hh"), shape)
        gates = hidden[0] // hidden[1] if hidden[1] else 0
        return _Guess(_CELLS.get(gates, "RNN"), (0,), (1,))
    if re.fullmatch(r"(in|[qkv])_proj_weight", name.leaf) and rank == 2:
        return _Guess("MultiheadAttention", (0,), (1,))
    if name.leaf in ("weight", "scale", "gamma") and rank == 1:
        return _norm(name, shapes)
    return _torch(name, rank, turned) if name.leaf == "weight" else None


def _torch(name: _Named, rank: int, turned: set[str]) -> _Guess | None:
    if rank == 2:
        if _EMBEDDING.search(name.module):
            return _Guess("Embedding", (1,), (0,))
        first = name.path in turned
        return _Guess("Linear", (int(first),), (1 - first,))
    if rank in (3, 4, 5):
        turn = bool(_TRANSPOSED.search(name.module))
        kind = "ConvTranspose" if turn else "Conv"
        return _Guess(f"{kind}{rank - 2}d", (int(turn),), (1 - turn,))
    return None


def _flax(module: str, rank: int) -> _Guess | None:
    last = module.rpartition(".")[2]
    if rank == 2:
        return _Guess("Linear", (1,), (0,))
    if rank == 3 and last in ("query", "key", "value"):
        return _Guess("Linear", (1, 2), (0,))
    if rank == 3 and last == "out":
        return _Guess("Linear", (2,), (0, 1))
    if rank in (3, 4, 5):
        turn = bool(_TRANSPOSED.search(module))
        kind = "ConvTranspose" if turn else "Conv"
        return _Guess(f"{kind}{rank - 2}d", (rank - 1,), (rank - 2,))
    return None


def _norm(name: _Named, shapes: Mapping[str, tuple[int, ...]]) -> _Guess:
    def beside(leaf: str, module: str = name.module) -> bool:
        return f"{module}{name.separator}{leaf}" in shapes

    statistics = name.module.replace("params", "batch_stats", 1)
    if beside("running_mean") or beside("moving_mean") or beside("mean", statistics):
        return _Guess("BatchNorm", (0,))
    if shapes[name.path] == (1,):
        return _Guess("PReLU", (0,))
    bias: Literal["bias", "beta"] = "beta" if name.leaf == "gamma" else "bias"
    return _Guess("LayerNorm" if beside(bias) else "RMSNorm", (0,))


def _bias(name: _Named, guess: _Guess, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    leaf = {"gamma": "beta", "weight": "bias", "kernel": "bias", "scale": "bias"}.get(
        name.leaf, name.leaf.replace("weight", "bias")
    )
    path = f"{name.module}{name.separator}{leaf}" if name.module else leaf
    if path == name.path or path not in shapes:
        return None
    shape = shapes[name.path]
    wanted = tuple(shape[a] for a in (*guess.stack_axes, *guess.out_axes))
    return path if tuple(shapes[path]) == wanted else None


def _input_first(named: list[_Named], shapes: Mapping[str, tuple[int, ...]]) -> set[str]:
    """Returns the matrices that are ``(in, out)`` although they are called ``weight``."""
    votes: Counter[Any] = Counter()
    square = []
    for name in named:
        shape, bias = shapes[name.path], shapes.get(f"{name.module}{name.separator}bias")
        if name.leaf != "weight" or len(shape) != 2 or bias is None or len(bias) != 1:
            continue
        last = name.module.rpartition(name.separator)[2]
        square.append((name.path, last))
        if shape[0] != shape[1] and bias[0] in shape:
            votes[last] += 1 if bias[0] == shape[1] else -1
    return {path for path, last in square if votes[last] > 0}
