"""Torch modules without some of their blocks."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch

from purepruning.arguments import instance, missing
from purepruning.pruners.depth import dropped_blocks, kept_blocks
from purepruning_interop.torch.program import check_whole


def drop_blocks(model: torch.nn.Module, dropped: Iterable[int], *, at: str) -> torch.nn.Module:
    """Returns the module without some blocks; those behind move up.

    The module of ``model``, which stays as it is, and all its tensors, which are shared: train or
    save only one of the two, or copy it. Blocks that add to a residual stream leave what the module
    computes if their output projections are zero. What ``transformers`` counts blocks by is
    corrected: ``layer_idx``, by which they find their cache, and the configuration's
    ``num_hidden_layers`` and ``layer_types``.

    Args:
        model: any module whose forward runs all blocks that it has.
        dropped: numbers of blocks from 0 on, as :func:`purepruning.short_gpt` and
            :func:`purepruning.sleb` return them.
        at: the name of the ``ModuleList`` or ``Sequential`` of blocks, such as ``"model.layers"``.

    Raises:
        KeyError: there is no such module.
        TypeError: it is no list, or a number is no integer.
        ValueError: a block that does not exist, or none would be left.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Tanh(), torch.nn.Linear(2, 2))
    >>> drop_blocks(torch.nn.Sequential(model), [0, 1], at="0")
    Sequential(
      (0): Sequential(
        (0): Linear(in_features=2, out_features=2, bias=True)
      )
    )
    """
    check_whole("drop_blocks(model, dropped, at=...)", model)
    instance(at, str, "drop_blocks: at", "the name of a list of blocks, such as 'model.layers'")
    names = dict(model.named_modules())
    if at not in names or not at:
        raise KeyError(missing(f"drop_blocks: at: the model has no module {at!r}", at, names))
    lists = (torch.nn.ModuleList, torch.nn.Sequential)
    instance(names[at], lists, f"drop_blocks: at {at!r}", "a ModuleList or Sequential of blocks")
    n = len(names[at])
    kept = kept_blocks("drop_blocks", n, dropped_blocks("drop_blocks", dropped))
    tensors = [*model.parameters(), *model.buffers()]
    new = copy.deepcopy(model, {id(x): x for x in tensors})
    owner, _, name = at.rpartition(".")
    blocks = new.get_submodule(at)
    some = [blocks[i] for i in kept]  # type: ignore[index]
    fresh = type(blocks)(some) if isinstance(blocks, torch.nn.ModuleList) else type(blocks)(*some)
    setattr(new.get_submodule(owner), name, fresh.train(blocks.training))
    for i, (old, block) in enumerate(zip(kept, some, strict=True)):
        for module in block.modules():
            if getattr(module, "layer_idx", None) == old:
                module.layer_idx = i
    _correct_configuration(new, n, kept)
    return new


def _correct_configuration(model: torch.nn.Module, n: int, kept: list[int]) -> None:
    """Writes the number of blocks into configurations of ``transformers`` that had the old one."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    for config in configs.values():
        if getattr(config, "num_hidden_layers", None) != n:
            continue
        types = getattr(config, "layer_types", None)
        config.num_hidden_layers = len(kept)
        if isinstance(types, list) and len(types) == n:
            config.layer_types = [types[i] for i in kept]
