"""Automated gradual pruning in PyTorch, an ordinary loop, and how far its masks are those of Flax.

    python examples/agp_torch.py

Runs ``agp_flax.py`` too: both begin with the same weights and see the same batches. Where training
rounds differently, weights close to a cut may fall on either side of it; pruned from the same
weights, all bits of the masks are the same. Writes ``agp_flax.safetensors`` and
``agp_torch.safetensors``.
"""

from __future__ import annotations

import agp_flax
import numpy as np
import torch
from _agp import MOMENTUM, RATE, RULES, SIZES, Numbers, Run, agreement, numbers, sequence
from rich.console import Console
from torch import nn

import purepruning as pp
from purepruning_interop import torch as interop

torch.set_num_threads(1)  # a second one costs such small operations more than it brings


class MLP(nn.Module):
    """LeNet-300-100 for images of 64 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden1 = nn.Linear(64, 300)
        self.hidden2 = nn.Linear(300, 100)
        self.classifier = nn.Linear(100, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns logits, ``(batch, 10)``."""
        return self.classifier(self.hidden2(self.hidden1(x).relu()).relu())


def train(given: Numbers) -> tuple[Run, nn.Module, dict[str, torch.Tensor]]:
    """Returns the run, the trained model and its masks."""
    model, run = MLP(), Run("PyTorch", [], [], [], [])
    with torch.no_grad():
        for name, weight in given.weights.items():
            layer = model.get_submodule(name)
            layer.weight.copy_(torch.from_numpy(weight.T))
            layer.bias.zero_()
    images, labels, test_images, test_labels = map(torch.from_numpy, given[1:5])
    params = dict(model.named_parameters())
    pruner, schedule, config = pp.from_nni("agp", RULES, interop.layers(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
    state, masks = schedule.init(config), {}
    with interop.keep_pruned(model, masks, optimizer) as keeper:
        for batches in given.batches:
            state, event = schedule.step(state)
            if event.due:
                masks = pruner(params, None, config.with_counts(event.counts).with_masks(masks))
                keeper.set_masks(masks)
            for batch in batches:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
                optimizer.step()
            with torch.no_grad():
                hits = model(test_images).argmax(-1) == test_labels
            run.asked.append({name: int(count) for name, count in event.counts.items()})
            run.masks.append(_matrices(masks))
            run.weights.append(_matrices(params))
            run.accuracies.append(float(hits.float().mean()))
    return run, model, masks


def prune_again(given: Numbers, run: Run) -> list[dict[str, np.ndarray]]:
    """Returns the masks that every event would have found here for the weights of ``run``."""
    model = MLP()
    pruner, _, config = pp.from_nni("agp", RULES, interop.layers(model))
    params, masks = dict(model.named_parameters()), {}
    again = []
    for before, counts, found in zip(
        [given.weights, *run.weights[:-1]], run.asked, run.masks, strict=True
    ):
        now = config.with_counts(counts).with_masks(masks)
        again.append(_matrices(pruner(params | _tensors(before), None, now)))
        masks = _tensors(found)
    return again


def _tensors(matrices: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": torch.tensor(matrices[name].T) for name in SIZES}


def _matrices(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: tensors[f"{name}.weight"].detach().numpy().T.copy() for name in SIZES}


def main() -> None:
    given, console = numbers(), Console()
    theirs, params, masks = agp_flax.train(given)
    pp.save_masks("agp_flax.safetensors", masks, params)
    ours, model, masks = train(given)
    pp.save_masks("agp_torch.safetensors", masks, dict(model.named_parameters()))
    for run in (theirs, ours):
        console.print(sequence(run), end="\n\n")
    again = prune_again(given, theirs)
    console.print(agreement(theirs, ours, again))
    console.print("Wrote agp_flax.safetensors and agp_torch.safetensors.")
    # Before the first event nothing was trained; and what differs later is training's rounding.
    assert all(np.array_equal(theirs.masks[0][name], ours.masks[0][name]) for name in SIZES)
    for found, here in zip(theirs.masks, again, strict=True):
        assert all(np.array_equal(found[name], here[name]) for name in SIZES)


if __name__ == "__main__":
    main()
