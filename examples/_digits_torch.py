"""The PyTorch side of ``digits.py``: the same network, rules, pruners and training.

Networks of all seeds and sparsities are one dict of stacked tensors: ``torch.func.vmap`` finds all
masks at once and computes the losses of all networks at once, one backward pass goes through them,
and one Adam, which works element by element, is as many as there are networks. Milliseconds per
epoch of one of 30 networks (one thread, torch 2.13):

    ================================================  ====
    ``vmap``, ``keep_pruned`` on the stacked tensors    17
    ``vmap`` of ``masked_call``                         25
    loop over modules, optimizers, ``keep_pruned``      26
    ================================================  ====
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

import purepruning as pp
from purepruning_interop import torch as interop

Params = dict[str, Tensor]

# A second thread costs such small operations more than it brings: 5 times the time, on busy cores.
torch.set_num_threads(1)


class CNN(nn.Module):
    """Two convolutions and two linear layers for images of 8 x 8 pixels; 36,000 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.hidden = nn.Linear(2 * 2 * 64, 64)
        self.classifier = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv1(images[:, None]).relu()
        x = self.conv2(x).relu()
        x = self.hidden(x.flatten(1)).relu()
        return self.classifier(x)


MODEL = CNN()  # its parameters are never used: they come as arguments


def layers(images: np.ndarray) -> tuple[pp.Layer, ...]:
    """Returns the layer table; unlike Flax, torch needs no input to know its shapes."""
    del images
    return interop.layers(MODEL)


def train(
    data: Any, seeds: np.ndarray, batches: np.ndarray, learning_rate: float
) -> tuple[Params, Tensor]:
    """Returns trained params, stacked over the seeds, and their test accuracies.

    ``batches (seeds, steps, batch)`` are the numbers of the images.
    """
    models = []
    for seed in seeds.tolist():
        torch.manual_seed(seed)
        models.append(CNN())
    params, _ = stack_module_state(models)
    params = _fit(params, {}, vmap(_loss), data, batches, learning_rate)
    return params, vmap(_accuracy, in_dims=(0, None, None))(params, *_test(data))


def prune(pruner: Callable[..., Any], params: Params, stats: Any, config: pp.Config) -> Params:
    """Returns masks stacked over seeds and sparsities, (seeds, sparsities, ...), in one call.

    ``params`` and ``stats`` are stacked over the seeds, the counts of ``config`` over sparsities.
    """
    stats = None if stats is None else torch.as_tensor(stats)
    counts = {name: torch.as_tensor(count) for name, count in config.counts.items()}

    # torch.func.vmap maps over dicts of tensors, not over a config that holds them.
    def one(params: Params, stats: Tensor | None, counts: dict[str, Tensor]) -> Params:
        return pruner(params, stats, config.with_counts(counts))

    over_sparsities = vmap(one, in_dims=(None, None, 0))
    over_seeds = vmap(over_sparsities, in_dims=(0, None if stats is None else 0, None))
    return over_seeds(params, stats, counts)


def fine_tune(
    data: Any, params: Params, masks: Params, batches: np.ndarray, learning_rate: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns accuracy after pruning, after fine-tuning, and density: each (seeds, sparsities)."""
    pruned = vmap(vmap(pp.apply_masks, in_dims=(None, 0)))(params, masks)
    loss = vmap(vmap(_loss, in_dims=(0, None, None)))
    tuned = _fit(pruned, masks, loss, data, batches, learning_rate)
    accuracy = vmap(vmap(_accuracy, in_dims=(0, None, None)), in_dims=(0, None, None))
    density = vmap(vmap(pp.density, in_dims=(0, None)))
    test = _test(data)
    return accuracy(pruned, *test), accuracy(tuned, *test), density(masks, params)


def _fit(
    params: Mapping[str, Tensor],
    masks: Params,
    loss: Callable[..., Tensor],
    data: Any,
    batches: np.ndarray,
    learning_rate: float,
) -> Params:
    """Returns ``params`` after training; ``loss`` gives one number per network."""
    params = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
    images, labels = torch.as_tensor(data.train_images), torch.as_tensor(data.train_labels)
    optimizer = torch.optim.Adam(params.values(), learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, batches.shape[1])
    with interop.keep_pruned(params, masks, optimizer):
        for batch in torch.as_tensor(batches).unbind(1):
            optimizer.zero_grad()
            loss(params, images[batch], labels[batch]).sum().backward()
            optimizer.step()
            schedule.step()
    return {name: p.detach() for name, p in params.items()}


def _loss(params: Params, images: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(functional_call(MODEL, params, (images,)), labels)


def _accuracy(params: Params, images: Tensor, labels: Tensor) -> Tensor:
    predicted = functional_call(MODEL, params, (images,)).argmax(dim=-1)
    return (predicted == labels).float().mean()


def _test(data: Any) -> tuple[Tensor, Tensor]:
    return torch.as_tensor(data.test_images), torch.as_tensor(data.test_labels)
