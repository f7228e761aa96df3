"""The PyTorch side of ``language_model.py``: the same GPT as an ``nn.Module``."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from _gpt import RATE, Settings, Text, contexts
from torch import Tensor, nn

import purepruning as pp
from purepruning.stats import blocks, inputs
from purepruning_interop import torch as interop

# A second thread costs such small operations more than it brings on busy cores.
torch.set_num_threads(1)


class Block(nn.Module):
    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, math.sqrt(d // heads)
        self.norm1, self.norm2 = nn.RMSNorm(d, eps=1e-6), nn.RMSNorm(d, eps=1e-6)
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d, bias=False), nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        t = x.shape[1]
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        scores = torch.einsum("nthd,nshd->nhts", q, k) / self.scale
        past = torch.ones(t, t, dtype=torch.bool, device=x.device).tril()
        weights = scores.masked_fill(~past, -1e9).softmax(-1)
        x = x + self.out(torch.einsum("nhts,nshd->nthd", weights, v).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    def __init__(self, letters: int, settings: Settings) -> None:
        super().__init__()
        d = settings.width
        self.letters = nn.Embedding(letters, d)
        self.places = nn.Parameter(0.02 * torch.randn(settings.context, d))
        self.blocks = nn.ModuleList(Block(d, settings.heads) for _ in range(settings.blocks))
        self.norm = nn.RMSNorm(d, eps=1e-6)
        for name, p in self.named_parameters():
            if name.endswith("weight") and p.ndim == 2:
                nn.init.normal_(p, 0, 0.02 if "letters" in name else p.shape[1] ** -0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def begin(self, letters: Tensor) -> Tensor:
        return self.letters(letters) + self.places[: letters.shape[1]]

    def forward(self, letters: Tensor) -> Tensor:
        x = self.begin(letters)
        for block in self.blocks:
            x = block(x)
        return self.norm(x) @ self.letters.weight.T


def tensors(rows: np.ndarray) -> tuple[Tensor, Tensor]:
    """Returns letters, and those that follow them."""
    whole = torch.from_numpy(rows).long()
    return whole[:, :-1], whole[:, 1:]


def loss(model: nn.Module, rows: np.ndarray) -> Tensor:
    """Returns the mean cross-entropy, in bits per character."""
    letters, following = tensors(rows)
    logits = model(letters)
    return nn.functional.cross_entropy(logits.flatten(0, 1), following.flatten()) / math.log(2)


class Side:
    """What ``language_model.py`` asks of a framework."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def trained(self, text: Text) -> GPT:
        settings = self.settings
        torch.manual_seed(0)
        model = GPT(text.letters, settings)
        adam = torch.optim.Adam(model.parameters(), lr=RATE)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(adam, settings.steps)
        for i in range(settings.steps):
            loss(model, contexts(text.train, settings.batch, settings, seed=i + 1)).backward()
            adam.step()
            adam.zero_grad()
            decay.step()
        return model.eval().requires_grad_(False)

    def parameters(self, model: nn.Module) -> int:
        return sum(p.numel() for p in model.parameters())

    @torch.no_grad()
    def bits(self, model: nn.Module, rows: np.ndarray) -> float:
        return float(loss(model, rows))

    def forward(self, model: nn.Module, rows: np.ndarray) -> Callable[[], Any]:
        """Returns what runs the model once."""
        letters = tensors(rows)[0]
        return torch.no_grad()(lambda: model(letters))

    # One shot, block by block.

    def begin(self, model: GPT, rows: np.ndarray) -> Tensor:
        return model.begin(tensors(rows)[0])

    def layers(self, model: GPT, i: int) -> list[pp.Layer]:
        return [x for x in interop.layers(model) if x.name.startswith(f"blocks.{i}.")]

    def seen(self, model: GPT, i: int, x: Tensor) -> inputs.InputStats:
        """Returns statistics of what the linear layers of one block are given."""
        table = [x for x in self.layers(model, i) if x.type == "Linear"]
        names = [row.name.rpartition(".")[2] for row in table]
        _, given = interop.capture(model.blocks[i], x, layers=names, of="inputs")
        stats = inputs.init(self.params(model), table, keep=["squares", "grams"])
        return inputs.update(stats, {f"blocks.{i}.{n}": v for n, v in given.items()}, table)

    def after(self, model: GPT, i: int, x: Tensor) -> Tensor:
        return model.blocks[i](x)

    def params(self, model: GPT) -> dict[str, Tensor]:
        return dict(model.named_parameters())

    def with_params(self, model: GPT, params: dict[str, Tensor]) -> GPT:
        new = copy.deepcopy(model)
        new.load_state_dict(params)
        return new

    # Whole heads, neurons and blocks.

    def couple(self, model: GPT, rows: np.ndarray) -> tuple[list[pp.Layer], pp.Coupling]:
        return list(interop.layers(model)), interop.couple(model, tensors(rows[:1])[0])

    def read(self, model: GPT, rows: np.ndarray, readers: Iterable[pp.Layer]) -> Any:
        """Returns statistics of what the readers of coupled units are given."""
        stats = inputs.init(self.params(model), readers, keep=["sums", "squares", "means"])
        _, given = interop.capture(model, tensors(rows)[0], layers=readers, of="inputs")
        return inputs.update(stats, given, readers)

    def shrunk(self, model: GPT, masks: Any, coupling: pp.Coupling, rows: np.ndarray) -> nn.Module:
        return interop.shrink(model, masks, coupling, tensors(rows[:2])[0]).model

    def turned(self, model: GPT, rows: np.ndarray) -> blocks.BlockStats:
        states = [self.begin(model, rows)]
        for block in model.blocks:
            states.append(block(states[-1]))
        return blocks.update(blocks.init(self.params(model), len(model.blocks)), states)

    def without(self, model: GPT, dropped: Iterable[int]) -> nn.Module:
        return interop.drop_blocks(model, dropped, at="blocks")
