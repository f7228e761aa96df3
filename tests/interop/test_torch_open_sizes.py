"""Graphs at other sizes than those of the example: right, or refused by name."""

import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from purepruning_interop import torch as ppt
from tests.coupling.torch_patterns import Net, conv, fill
from tests.interop.torch_law import distance, half, masked, state_of


@pytest.fixture(autouse=True)
def only_graphs(monkeypatch):
    """Makes every result a graph."""
    monkeypatch.setattr(sys.modules[ppt.shrink.__module__], "cut_modules", lambda *_: 1 / 0)


def linears(run, **parts):
    return fill(Net(run, a=nn.Linear(8, 16), b=nn.Linear(16, 3), **parts), 0).eval()


def graph(model, *inputs):
    coupling = ppt.couple(model, *inputs)
    masks = coupling.masks(half(coupling), state_of(model))
    found = ppt.shrink(model, masks, coupling, *inputs)
    assert found.report.kind == "graph"
    assert found.report.params[1] < found.report.params[0]
    return masked(model, masks), found.model, found.report


def tokens(batch, length):
    generator = torch.Generator().manual_seed(batch * 100 + length)
    return torch.randn(batch, length, 8, generator=generator)


def positions(net, x):
    at = torch.arange(x.shape[1], dtype=x.dtype)[:, None]
    return net.b(net.a(x) + at * net.scale)


def heads(net, x):
    h = net.a(x).view(x.shape[0], x.shape[1], 4, 4).transpose(1, 2)
    h = F.softmax(h @ h.mT / x.shape[1] ** 0.5, -1) @ h
    return net.b(h.transpose(1, 2).reshape(x.shape[0], x.shape[1], 16))


def statistics(net, x):
    h = net.a(x).relu()
    return net.b(h), h.square().mean(), h.var(), h.std((0, 2)), h.mean((1, 2), keepdim=True)


LENGTHS = {
    "mean over batch and channels": (statistics, {}),
    "length as a divisor": (lambda net, x: net.b(net.a(x).sum(1) / x.shape[1]), {}),
    "mean over the length": (lambda net, x: net.b(net.a(x).relu().mean(1)), {}),
    "arange of the length": (positions, {"scale": nn.Parameter(torch.rand(16))}),
    "heads": (heads, {}),
    "layer norm": (lambda net, x: net.b(net.norm(net.a(x))), {"norm": nn.LayerNorm(16)}),
    "repeated": (lambda net, x: net.b(net.a(x).repeat(1, 2, 1).view(x.shape[0], 2, -1, 16)), {}),
    "interpolated": (
        lambda net, x: net.b(F.interpolate(net.a(x).mT, size=2 * x.shape[1], mode="linear").mT),
        {},
    ),
    "causal": (
        lambda net, x: net.b(torch.ones(x.shape[1], x.shape[1]).tril() @ net.a(x).relu()),
        {},
    ),
}


@pytest.mark.parametrize("name", LENGTHS)
def test_batch_and_length_stay_open(name):
    run, parts = LENGTHS[name]
    reference, small, report = graph(linears(run, **parts), tokens(2, 6))
    assert report.dynamic
    assert not any("axis 1" in fixed for fixed in report.fixed)
    for batch, length in ((2, 6), (1, 6), (5, 6), (2, 9), (3, 4)):
        x = tokens(batch, length)
        assert distance(reference(x), small(x)) <= 1e-5, (batch, length)


def test_an_example_of_one_leaves_the_batch_open():
    reference, small, report = graph(linears(statistics), tokens(1, 6))
    assert report.dynamic
    assert distance(reference(tokens(4, 6)), small(tokens(4, 6))) <= 1e-5


IMAGES = {
    "interpolated": lambda net, x: net.head(
        F.interpolate(F.max_pool2d(net.a(x), 2), size=x.shape[-2:])
    ),
    "area as a divisor": lambda net, x: net.head(
        net.a(x).relu().sum((2, 3), keepdim=True) / (x.shape[2] * x.shape[3])
    ),
    "group norm": lambda net, x: net.head(net.norm(net.a(x))),
    "pooled": lambda net, x: net.head(F.adaptive_avg_pool2d(net.a(x).relu(), 1)),
}


@pytest.mark.parametrize("name", IMAGES)
def test_height_and_width_stay_open(name):
    model = Net(IMAGES[name], a=conv(3, 12), norm=nn.GroupNorm(3, 12), head=conv(12, 4))
    reference, small, report = graph(fill(model, 0).eval(), torch.randn(2, 3, 8, 12))
    assert report.fixed == ("x axis 1 = 3",) or report.fixed == ("inputs_0 axis 1 = 3",)
    for size in ((2, 3, 8, 12), (1, 3, 8, 12), (3, 3, 16, 8), (2, 3, 10, 6)):
        x = torch.randn(size)
        assert distance(reference(x), small(x)) <= 1e-5, size


def windows(net, x):
    """As windows are usually written: the number of windows of an image goes through a float."""
    h = net.a(x)
    return net.b(h.view(int(h.shape[0] / 3), 3, 2, 16).sum(1))


def test_a_size_that_cannot_stay_open_is_refused_by_name():
    _, small, report = graph(linears(windows), torch.randn(6, 2, 8))
    assert not report.dynamic
    assert "axis 0 = 6" in report.fixed[0]
    assert "axis 0 = 6" in str(report)
    with pytest.raises(ValueError, match=r"of size 6 along axis 0, got 3; shrink the model with"):
        small(torch.randn(3, 2, 8))


def test_a_length_that_the_code_fixes_is_refused_and_the_batch_stays_open():
    def run(net, x):
        table = torch.from_numpy(np.linspace(0, 1, x.shape[1], dtype=np.float32))
        return net.b(net.a(x) * table[:, None])

    reference, small, report = graph(linears(run), tokens(2, 6))
    assert report.dynamic
    assert distance(reference(tokens(5, 6)), small(tokens(5, 6))) <= 1e-5
    with pytest.raises(ValueError, match=r"of size 6 along axis 1, got 7"):
        small(tokens(2, 7))


def test_graphs_with_checks_of_sizes_compile_and_export():
    reference, small, _ = graph(linears(windows), torch.randn(6, 2, 8))
    x = torch.randn(6, 2, 8)
    compiled = torch.compile(small, backend="aot_eager", fullgraph=True)
    assert distance(small(x), compiled(x)) <= 1e-6
    torch._dynamo.reset()
    exported = torch.export.export(small, (x,), strict=False).module()
    assert distance(reference(x), exported(x)) <= 1e-5
