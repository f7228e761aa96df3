"""The blocks of a torch module one after the other, with what each of them is given."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch

from purepruning.arguments import collection, instance, missing, shown
from purepruning_interop.torch.program import check_whole


class Turn(NamedTuple):
    """A block, and how it is called.

    Attributes:
        name: the block's name in the model.
        block: the module itself.
        calls: positional and keyword arguments of its call, for every batch.
    """

    name: str
    block: torch.nn.Module
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]


def blocks_in_turn(
    model: torch.nn.Module, batches: Iterable[Any], *, at: str, **kwargs: Any
) -> Iterator[Turn]:
    """Yields the blocks of a model, the first one first, each with what it is given.

    What is done to a block before the next one is asked for counts: block i + 1 is given what block
    i has become makes of the data, as one-shot methods for large models need it. Beside the model
    there are only the hidden states of the batches, before and behind one block; nothing runs
    behind the last block, and nothing is recorded for gradients.

    Args:
        model: a module that calls all its blocks in order, each with the hidden states first, of
            which it returns new ones (alone, or first in a tuple).
        batches: the inputs of the model, one tensor each, such as tokens.
        at: the name of the ``ModuleList`` or ``Sequential`` of blocks, such as ``"model.layers"``.
        **kwargs: what every call of the model takes besides, such as ``use_cache=False``.

    Raises:
        KeyError: there is no such module.
        TypeError: it is no list of blocks, or a batch is no tensor.
        ValueError: there are no batches; or the model calls its blocks otherwise.

    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1))
    >>> model = torch.nn.Sequential(net)
    >>> for turn in blocks_in_turn(model, [torch.ones(1, 1)], at="0"):
    ...     ((given,), _), = turn.calls
    ...     _ = turn.block.weight.data.fill_(3.0)
    ...     print(turn.name, given.tolist())
    0.0 [[1.0]]
    0.1 [[3.0]]
    """
    where = "blocks_in_turn"
    check_whole(f"{where}(model, batches, at=...)", model)
    instance(at, str, f"{where}: at", "the name of a list of blocks, such as 'model.layers'")
    names = dict(model.named_modules())
    if at not in names or not at:
        raise KeyError(missing(f"{where}: at: the model has no module {at!r}", at, names))
    lists = (torch.nn.ModuleList, torch.nn.Sequential)
    instance(names[at], lists, f"{where}: at {at!r}", "a ModuleList or Sequential of blocks")
    blocks: list[torch.nn.Module] = list(names[at].children())
    expected = "batches of inputs, such as a list of token tensors"
    some = [batches] if isinstance(batches, torch.Tensor) else batches
    each = [
        _calls(model, blocks, x, kwargs) for x in collection(some, f"{where}: batches", expected)
    ]
    if not each or not blocks:
        raise ValueError(f"{where}: there are no {'blocks' if each else 'batches'}; give some")
    return _turns(at, blocks, each)


def _turns(at: str, blocks: list[torch.nn.Module], each: list[list[Any]]) -> Iterator[Turn]:
    hidden = [calls[0][0][0] for calls in each]
    for i, block in enumerate(blocks):
        rest = [(calls[i][0][1:], calls[i][1]) for calls in each]
        calls = [((x, *args), named) for x, (args, named) in zip(hidden, rest, strict=True)]
        yield Turn(f"{at}.{i}", block, calls)
        if i + 1 < len(blocks):
            with torch.no_grad():
                for b, (args, named) in enumerate(calls):
                    hidden[b] = _first(block(*args, **named))


def _first(output: Any) -> torch.Tensor:
    found = output[0] if isinstance(output, tuple) else output
    if not isinstance(found, torch.Tensor):
        raise ValueError(
            "blocks_in_turn: a block must return hidden states, alone or first in a tuple, got "
            f"{shown(found)}; make a module around it that does"
        )
    return found


class _Stop(Exception):
    """Raised where the last block is called, behind which nothing is of interest."""


def _calls(
    model: torch.nn.Module, blocks: list[torch.nn.Module], batch: Any, kwargs: dict[str, Any]
) -> list[Any]:
    """Returns the arguments of every block; hidden states of the first one alone."""
    instance(batch, torch.Tensor, "blocks_in_turn: batches", "tensors")
    found: list[Any] = []

    def seen(i: int) -> Any:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            if i != len(found) or not args or not isinstance(args[0], torch.Tensor):
                raise ValueError(
                    f"blocks_in_turn: block {i} must be called once, after those before it, with "
                    "the hidden states as its first argument; make a module around the model that "
                    "calls its blocks so"
                )
            found.append(((args[0] if i == 0 else None, *args[1:]), named))
            if i + 1 == len(blocks):
                raise _Stop

        return hook

    with contextlib.ExitStack() as stack:
        for i, block in enumerate(blocks):
            stack.enter_context(block.register_forward_pre_hook(seen(i), with_kwargs=True))
        stack.enter_context(torch.no_grad())
        with contextlib.suppress(_Stop):
            model(batch, **kwargs)
    if len(found) != len(blocks):
        raise ValueError(
            f"blocks_in_turn: the model calls {len(found)} of its {len(blocks)} blocks; name the "
            "list of blocks that it runs"
        )
    return found
