"""A graph that shrink made is a model like any other: named, captured, and shrunk again."""

import copy

import pytest
import torch
from torch import nn

import purepruning as pp
from purepruning.stats import activations
from purepruning_interop import torch as ppt
from tests.coupling.torch_patterns import Net, fill
from tests.interop.torch_law import distance


def halves():
    """Two halves of channels whose sizes its forward fixes, so that a smaller one is a graph."""

    def forward(net, x):
        h = net.stem(x).relu()
        a, b = h[:, :8], h[:, 8:]
        h = net.depthwise(net.up(a) + net.side(b))
        return net.head(net.norm(h).mean((2, 3)))

    return Net(
        forward,
        stem=nn.Conv2d(3, 16, 3, padding=1),
        up=nn.Conv2d(8, 12, 1),
        side=nn.Conv2d(8, 12, 1, bias=False),
        depthwise=nn.Conv2d(12, 12, 3, padding=1, groups=12),
        norm=nn.BatchNorm2d(12),
        head=nn.Linear(12, 5),
    )


def a_round(model, x, sparsity=0.5):
    """The documented flow; returns what is left, and how far it is from the masked model."""
    coupling = ppt.couple(model, x)
    layers = ppt.layers(model)
    rules = [{"sparsity": sparsity, "op_types": ["Conv2d"]}]
    params = dict(model.named_parameters())
    masks = pp.l1_norm(params, None, pp.resolve(rules, layers, coupling=coupling))
    small = ppt.shrink(model, masks, coupling, x)
    reference = copy.deepcopy(model)
    ppt.apply_(reference, small.report.masks)
    with torch.no_grad():
        return small, distance(reference(x), small.model(x))


@pytest.fixture(scope="module")
def first():
    model = fill(halves(), 0).eval()
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    small, off = a_round(model, x)
    assert small.report.kind == "graph"
    assert off <= 1e-6
    return model, small.model, x


def test_layers_of_a_graph_have_names_types_and_axes(first):
    model, graph, _ = first
    full, small = ppt.layers(model), ppt.layers(graph)
    state = dict(graph.named_parameters())
    assert [x.name for x in small] == ["stem", "up", "side", "depthwise", "norm", "head"]
    for a, b in zip(full, small, strict=True):
        assert (a.name, a.type, a.weight, a.bias) == (b.name, b.type, b.weight, b.bias)
        assert (a.out_axes, a.in_axes, a.window) == (b.out_axes, b.in_axes, b.window)
        assert b.shape == tuple(state[b.weight].shape)
    depthwise = next(x for x in small if x.name == "depthwise")
    assert depthwise.groups == depthwise.shape[0] == 6
    assert ppt.layers(copy.deepcopy(graph)) == small


def test_rounds_on_a_graph(first):
    _, graph, x = first
    for expected in (3, 2):
        before = sum(p.numel() for p in graph.parameters())
        small, off = a_round(graph, x, 0.4 if expected == 2 else 0.5)
        graph = small.model
        assert off <= 1e-6
        assert sum(p.numel() for p in graph.parameters()) < before
        assert next(r for r in ppt.layers(graph) if r.name == "depthwise").groups == expected


def test_layers_of_a_graph_are_captured(first):
    model, graph, x = first
    names = ["stem", "up", "side", "depthwise", "head"]
    y, found = ppt.capture(graph, x, layers=names)
    assert {k: v.shape[1] for k, v in found.items()} == {
        row.name: row.shape[0] for row in ppt.layers(graph) if row.name in names
    }
    torch.testing.assert_close(found["head"], y)
    _, read = ppt.capture(graph, x, layers=["depthwise"], of="inputs")
    torch.testing.assert_close(read["depthwise"], found["up"] + found["side"])
    _, whole = ppt.capture(model, x, layers=["stem"])
    assert whole["stem"].shape[1] > found["stem"].shape[1]


def test_statistics_of_a_graph_prune_it(first):
    _, graph, x = first
    layers = ppt.layers(graph)
    coupling = ppt.couple(graph, x)
    config = pp.resolve([{"sparsity": 0.5, "op_types": ["Conv2d"]}], layers, coupling=coupling)
    params = dict(graph.named_parameters())
    stats = activations.init(params, config)
    outputs = ppt.capture(graph, x, layers=config.layers)[1]
    stats = activations.update(stats, outputs, config, activation="relu")
    small = ppt.shrink(graph, pp.mean_activation_rank(params, stats, config), coupling, x)
    assert small.report.params[1] < small.report.params[0]


def test_a_graph_trains_and_keeps_its_state_dict(first):
    model, graph, x = first
    assert list(graph.state_dict()) == list(model.state_dict())
    graph = copy.deepcopy(graph).train()
    graph(x).square().sum().backward()
    assert all(p.grad is not None for p in graph.parameters())


def masked_encoder(net, x):
    mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
    return {"y": net.head(net.body(net.stem(x), mask=mask))}


def masked_decoder(net, x):
    mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
    h = net.stem(x)
    return {"y": net.head(net.body(h, h.flip(1), tgt_mask=mask))}


@pytest.mark.parametrize("forward", [masked_encoder, masked_decoder])
def test_what_cannot_be_exported_is_a_graph_of_fixed_sizes(forward):
    """Torch's attention asks whether its mask is causal, which its exporter does not know."""
    kind = "En" if forward is masked_encoder else "De"
    layer = getattr(nn, f"Transformer{kind}coderLayer")(16, 4, 32, batch_first=True)
    body = getattr(nn, f"Transformer{kind}coder")(layer, 1)
    model = Net(forward, stem=nn.Linear(6, 16), body=body, head=nn.Linear(16, 3))
    fill(model, 0).eval()
    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
    coupling = ppt.couple(model, x)
    units = [n for f in coupling.families for n in f.units[: len(f) // 2].tolist()]
    state = dict(model.named_parameters())
    small = ppt.shrink(model, coupling.masks(units, state), coupling, x)
    assert small.report.kind == "graph"
    assert not small.report.dynamic
    reference = copy.deepcopy(model)
    ppt.apply_(reference, small.report.masks)
    with torch.no_grad():
        assert distance(reference(x)["y"], small.model(x)["y"]) <= 1e-5
        assert distance(model(x)["y"], small.model(x)["y"]) > 1e-2
    with pytest.raises(ValueError, match="of size 2 along axis 0, got 3"):
        small.model(torch.ones(3, 5, 6))


def test_rounds_on_a_depthwise_convolution_whose_forward_is_not_called():
    """As in Mamba, whose kernel takes the weight."""

    def forward(net, x):
        weight = net.taps.weight
        h = nn.functional.conv1d(net.stem(x), weight, net.taps.bias, groups=weight.shape[0])
        return net.head(h)

    model = Net(
        forward,
        stem=nn.Conv1d(3, 12, 1),
        taps=nn.Conv1d(12, 12, 3, groups=12),
        head=nn.Conv1d(12, 4, 1),
    )
    fill(model, 0).eval()
    x = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(0))
    for left in (6, 3):
        coupling = ppt.couple(model, x)
        rules = [{"sparsity": 0.5, "op_types": ["Conv1d"]}]
        config = pp.resolve(rules, ppt.layers(model), coupling=coupling)
        masks = pp.l1_norm(dict(model.named_parameters()), None, config)
        model = ppt.shrink(model, masks, coupling, x).model
        assert (model.taps.groups, model.taps.in_channels, model.taps.out_channels) == (left,) * 3


class Rooted(nn.Module):
    """A root mean square norm, as language models have their own."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


@pytest.mark.parametrize("norm", [Rooted, nn.LayerNorm])
def test_rounds_on_a_norm_that_keeps_its_divisor(norm):
    model = Net(
        lambda net, x: net.head(net.norm(net.stem(x))),
        stem=nn.Linear(6, 16),
        norm=norm(16),
        head=nn.Linear(16, 3),
    )
    first = fill(model, 0).eval()
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    for left in (8, 4):
        coupling = ppt.couple(model, x)
        masks = coupling.masks(range(1, left + 1), dict(model.named_parameters()))
        small = ppt.shrink(model, masks, coupling, x)
        reference = copy.deepcopy(model)
        ppt.apply_(reference, small.report.masks)
        with torch.no_grad():
            assert distance(reference(x), small.model(x)) <= 1e-5
        assert small.model.state_dict()["stem.weight"].shape == (left, 6)
        model = small.model
    assert first.stem.out_features == 16
