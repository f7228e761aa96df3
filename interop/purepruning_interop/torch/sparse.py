"""Sparse training of a torch module: connections move behind the steps of its optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from purepruning.arrays import is_concrete
from purepruning.config.config import Config
from purepruning.masks import by_path, expand
from purepruning.random_bits import key_words
from purepruning.shards import refuse_sharded
from purepruning.training.sparse import (
    check_masks,
    check_rewired,
    checked_moves,
    entry,
    event_key,
    is_due,
    rewire,
)
from purepruning_interop.torch.program import check
from purepruning_interop.torch.training import KeepPruned, Masks, Model


def sparse_training(
    model: Model,
    config: Config,
    optimizer: torch.optim.Optimizer,
    *,
    masks: Masks,
    grow: str = "gradient",
    end_step: int,
    begin_step: int = 0,
    every: int = 100,
    drop_fraction: float = 0.3,
    decay: str = "cosine",
    key: Any = 0,
) -> SparseTraining:
    """Returns a handle; until it is removed, connections move as the optimizer takes its steps.

    What :func:`purepruning.sparse_training` does in an Optax chain, with the same masks for the
    same numbers: after each step pruned weights, and the optimizer's state of them, are zero, and
    where it is due connections go and others grow by the gradients of that step (RigL), or at
    random (SET). Gradients are those in ``.grad``, of the model called as it is, not by
    ``masked_call``, which has none where pruned. Nothing is written before the first step: begin
    with ``apply_(model, masks)``.

    Args:
        model: the module whose names the masks use, or a dict of tensors by name.
        config, masks, grow, end_step, begin_step, every, drop_fraction, decay, key: as for
            :func:`purepruning.sparse_training`.
        optimizer: it must hold the parameters of all layers of ``config``.

    Raises:
        KeyError, ValueError, TypeError: as :func:`purepruning.sparse_training`, and as
            :func:`keep_pruned`.
        ValueError: at a step at which connections grow by gradients, a layer has none.

    >>> import torch
    >>> import purepruning as pp
    >>> from purepruning_interop.torch import apply_, layers
    >>> model = torch.nn.Linear(4, 1, bias=False)
    >>> config = pp.resolve(0.5, layers(model))
    >>> masks = pp.random_pruning(dict(model.named_parameters()), 5, config)
    >>> apply_(model, masks)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> with sparse_training(model, config, optimizer, masks=masks, end_step=750) as connections:
    ...     model(torch.ones(1, 4)).sum().backward()
    ...     optimizer.step()
    >>> int(connections.masks["weight"].sum()), int((model.weight != 0).sum()) <= 2
    (2, True)
    """
    where = "sparse_training(model, config, optimizer)"
    if not isinstance(model, Mapping):
        check(where, model)
    elif not model or not all(isinstance(x, torch.Tensor) for x in model.values()):
        raise TypeError(f"{where}: model must be a module, or a dict of tensors by name")
    refuse_sharded(where, _named(model))
    check_rewired(where, config)
    tables = checked_moves(where, config, grow, begin_step, end_step, every, drop_fraction, decay)
    times = begin_step, end_step, every
    return SparseTraining(model, config, optimizer, masks, grow, times, tables, key)


class SparseTraining(KeepPruned):
    """What :func:`sparse_training` returns: a handle, and the connections there are.

    Attributes:
        masks: whole masks of the weights of all layers, by name.
        step: steps taken.
    """

    def __init__(
        self,
        model: Model,
        config: Config,
        optimizer: torch.optim.Optimizer,
        masks: Masks,
        grow: str,
        times: tuple[int, int, int],
        tables: dict[str, np.ndarray],
        key: Any,
    ) -> None:
        self._config, self._grow, self._times, self._tables = config, grow, times, tables
        words = key_words(key)
        if not all(map(is_concrete, words)):
            raise TypeError("sparse_training: key is traced by jit or vmap; give a seed")
        self._key = np.asarray([int(word) for word in words], np.int32)
        self.step = 0
        params = {name: x.detach() for name, x in _named(model).items()}
        check_masks("sparse_training", masks, params, config)
        whole = by_path(expand(masks, params), params)
        self.masks = {layer.weight: whole[layer.weight] for layer in config.layers}
        super().__init__(model, self.masks, optimizer, True)

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        super()._after_step(optimizer, args, kwargs)
        begin, end, every = self._times
        step, self.step = self.step, self.step + 1
        if self._grow == "none" or not is_due(step, begin, end, every):
            return
        at = (step - begin) // every
        moves = {name: entry(table, at) for name, table in self._tables.items()}
        grads = self._grads() if self._grow == "gradient" else None
        params = {name: x.detach() for name, x in _named(self._model).items()}
        key = event_key(self._key, np.int32(step))
        self.masks = dict(rewire(params, grads, self.masks, self._config, moves, key))
        self.set_masks(self.masks)
        super()._after_step(optimizer, args, kwargs)

    def _grads(self) -> dict[str, torch.Tensor]:
        grads = {n: x.grad for n, x in _named(self._model).items() if x.grad is not None}
        for layer in self._config.layers:
            if layer.weight not in grads:
                raise ValueError(
                    f"sparse_training: layer {layer.name!r} has no gradient at step "
                    f"{self.step - 1}, by which connections grow; call backward before "
                    "optimizer.step, and zero_grad behind it"
                )
        return grads


def _named(model: Model) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters() if isinstance(model, torch.nn.Module) else model)
