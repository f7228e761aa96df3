"""Branches and modules that are used in training only are cut with the others."""

import sys

import pytest
import torch
from torch import nn

from purepruning_interop import torch as ppt
from tests.coupling.torch_patterns import fill
from tests.interop.torch_law import half, masked, state_of


class Auxiliary(nn.Module):
    """A head beside the last one while training, as Inception has it."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.wide = nn.Conv2d(8, 12, 3, padding=1)
        self.drop = nn.Dropout(0.0)
        self.head, self.aux = nn.Linear(12, 3), nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3))

    def forward(self, x):
        h = self.norm(self.stem(x)).relu()
        found = self.head(self.drop(self.wide(h).relu().mean((2, 3))))
        return (found, self.aux(h.mean((2, 3)))) if self.training else found


class Masked(nn.Module):
    """Tokens are replaced by a learnt one while training, as wav2vec does."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)
        self.token = nn.Parameter(torch.rand(8))

    def forward(self, x):
        h = self.a(x)
        if self.training:
            h = torch.where(torch.arange(x.shape[1])[:, None] == 1, self.token, h)
        return self.b(h)


class Dropped(Masked):
    """Whole branches are dropped while training, as timm does it: drawn in place."""

    def forward(self, x):
        h = self.a(x)
        if self.training:
            keep = x.new_empty((x.shape[0], 1, 1)).bernoulli_(1.0)
            h = h * keep + self.token
        return self.b(h)


class Averaged(Masked):
    """Running statistics over all batches, which divide by how many there were."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(8, momentum=None)

    def forward(self, x):
        h = self.norm(self.a(x).mT).mT
        return self.b(h + self.token if self.training else h)


CASES = {
    "an auxiliary head": (Auxiliary, (4, 3, 6, 6), {"aux.0.weight": (6, 4)}),
    "a masked token": (Masked, (2, 5, 4), {"token": (4,)}),
    "dropped branches": (Dropped, (2, 5, 4), {"token": (4,)}),
    "averaged statistics": (Averaged, (2, 5, 4), {"token": (4,)}),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_used_in_training_only_is_cut_as_well(name):
    make, size, shapes = CASES[name]
    model, x = fill(make(), 0).double(), torch.randn(size).double()
    coupling = ppt.couple(model, x)
    first = next(
        f for f in coupling.families if {"stem.weight", "a.weight"} & {m.path for m in f.axes}
    )
    masks = coupling.masks(first.units[::2].tolist(), state_of(model))
    found = ppt.shrink(model, masks, coupling, x)
    assert found.report.kind == "module"
    assert found.report.reason == ""
    state = found.model.state_dict()
    assert {key: tuple(state[key].shape) for key in shapes} == shapes
    reference = masked(model, masks)
    for training in (True, False):
        expected, got = (m.train(training)(x) for m in (reference, found.model))
        torch.testing.assert_close(got, expected)


def test_reading_both_modes_leaves_statistics_and_modes():
    model, x = fill(Auxiliary(), 0), torch.randn(4, 3, 6, 6)
    model.norm.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    coupling = ppt.couple(model, x)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training
    assert not model.norm.training
    units = half(coupling)
    assert coupling.cost(units)[1] < coupling.cost()[1]
    multiply_adds = 36 * (9 * 3 * 8 + 9 * 8 * 12) + 12 * 3  # of one example, in eval mode
    assert coupling.cost()[1] == 4 * multiply_adds


def test_a_graph_says_what_it_lacks_in_training(monkeypatch):
    monkeypatch.setattr(sys.modules[ppt.shrink.__module__], "cut_modules", lambda *_: 1 / 0)
    model, x = fill(Masked(), 0), torch.randn(2, 5, 4)
    coupling = ppt.couple(model, x)
    found = ppt.shrink(model, coupling.masks([1, 2], state_of(model)), coupling, x)
    assert found.report.kind == "graph"
    assert found.reason.endswith("the graph lacks what only training uses: token")


class AsksItsNumbers(Masked):
    """A branch by chance while training, which cannot be recorded."""

    def forward(self, x):
        h = self.a(x)
        if self.training and torch.rand(()).item() < 2:
            h = h + self.token
        return self.b(h)


@pytest.mark.parametrize("graph", [False, True])
def test_what_training_does_and_cannot_be_read_is_said(graph, monkeypatch):
    if graph:
        monkeypatch.setattr(sys.modules[ppt.shrink.__module__], "cut_modules", lambda *_: 1 / 0)
    model, x = fill(AsksItsNumbers(), 0), torch.randn(2, 5, 4)
    coupling = ppt.couple(model, x)
    kept = {f.path: f.reason for f in coupling.frozen}
    assert kept["token"] == "not used in eval mode, and training mode cannot be read"
    masks = coupling.masks([1, 2], state_of(model))
    found = ppt.shrink(model, masks, coupling, x)
    reason = found.report.reason
    assert reason in str(found.report)
    if graph:
        assert reason.endswith("that of eval mode, since training mode cannot be read")
        return
    assert found.report.kind == "module"
    assert reason.startswith("does not run in training mode: The size of tensor a (6) must match")
    with pytest.raises(RuntimeError, match="must match"):
        found.model.train()(x)


class OtherShape(Masked):
    """Gives another shape while training, by a number that no rule sees."""

    def forward(self, x):
        h = self.a(x)
        if self.training:
            torch.rand(()).item()
            return h
        return self.b(h)


def test_other_shapes_in_training_are_said():
    model, x = fill(OtherShape(), 0), torch.randn(2, 5, 4)
    coupling = ppt.couple(model, x)
    found = ppt.shrink(model, coupling.masks([1, 2], state_of(model)), coupling, x)
    assert found.report.reason == "gives other shapes in training mode"


def test_a_model_that_cannot_run_in_training_is_not_blamed():
    """A batch norm needs more than one value for each channel there."""

    class Single(Masked):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(8)

        def forward(self, x):
            h = self.norm(self.a(x))
            return self.b(h + self.token if self.training else h)

    model, x = fill(Single(), 0), torch.randn(1, 4)
    coupling = ppt.couple(model, x)
    found = ppt.shrink(model, coupling.masks([1, 2], state_of(model)), coupling, x)
    assert (found.report.kind, found.report.reason) == ("module", "")
