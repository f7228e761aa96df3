"""The ResNet of ``search.py`` as an ``nn.Module``: the same searches, and another evaluator."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from _search import RATE, ROLES, STEM, TUNING, Twin
from structured_torch import ResNet
from torch import nn

import purepruning as pp
from purepruning_interop import torch as interop


def make(data: Any, training: Any, tuning: Any, seed: int) -> Twin:
    """Returns the trained network; ``training`` and ``tuning`` are images by step."""
    torch.manual_seed(seed)
    model = ResNet(STEM)
    images, labels = torch.tensor(data.train_images), torch.tensor(data.train_labels)
    test, digits = torch.tensor(data.test_images), torch.tensor(data.test_labels)
    model.eval()
    coupling = interop.couple(model, images[:1])

    def fit(model: nn.Module, masks: Any, steps: Any, rate: float) -> None:
        optimizer = torch.optim.Adam(model.parameters(), rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(steps))
        model.train()
        with interop.keep_pruned(model, masks, optimizer):
            for batch in torch.tensor(np.asarray(steps)):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
                optimizer.step()
                schedule.step()
        model.eval()

    fit(model, {}, training, RATE)
    params = dict(model.named_parameters())

    def of(removed: Any) -> Any:
        return coupling.masks(np.flatnonzero(np.asarray(removed)), dict(model.state_dict()))

    def logits(removed: Any, inputs: torch.Tensor) -> torch.Tensor:
        masks = {name: mask for name, mask in of(removed).items() if name in params}
        with torch.no_grad():
            return torch.func.functional_call(model, pp.apply_masks(params, masks), (inputs,))

    def evaluate(removed: Any) -> float:
        found = logits(removed, images[:128])
        return -nn.functional.cross_entropy(found, labels[:128]).item()

    def accuracies(removed: Any) -> tuple[float, float]:
        tuned = copy.deepcopy(model)
        masks = {name: mask for name, mask in of(removed).items() if name in params}
        interop.apply_(tuned, masks)
        fit(tuned, masks, tuning, TUNING)
        with torch.no_grad():
            after = tuned(test)
        before = logits(removed, test)
        return tuple(float((x.argmax(-1) == digits).float().mean()) for x in (before, after))

    squares = {name: w.detach().square() for name, w in params.items()}
    scores = pp.unit_scores(squares, coupling, reduce="mean", normalize="mean", roles=ROLES)
    return Twin(params, coupling, interop.layers(model), scores, evaluate, accuracies, None, None)
