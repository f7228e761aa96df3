"""The documented flow with default options on ways of writing torch modules that users have."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, rnn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import purepruning as pp
from purepruning_interop import torch as ppt
from tests.coupling.torch_patterns import Net


def rows():
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


def steps():
    return torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))


def three(run, **more):
    """Layers of 16, 12 and 3, with names a, b and c."""
    return Net(run, a=nn.Linear(8, 16), b=nn.Linear(16, 12), c=nn.Linear(12, 3), **more)


def index_write(write, **more):
    """A module that writes into the output of its first layer."""

    def run(net, x):
        h = net.a(x)
        write(net, h, x)
        return net.c(net.b(h).relu())

    return three(run, **more), (rows(),)


def zeros_below():
    return index_write(lambda net, h, x: h.__setitem__(h < 0, 0.0))


def other_numbers():
    return index_write(lambda net, h, x: h.__setitem__(x[:, :1].expand_as(h) > 0.5, 2.0))


def whole_rows():
    return index_write(lambda net, h, x: h.__setitem__(x[:, 0] > 0, 0.0))


def one_channel():
    def write(net, h, x):
        h[:, torch.arange(16, device=h.device) == 3] = 0.0

    return index_write(write)


def a_row_of_channels():
    row = nn.Parameter(torch.arange(16.0))
    return index_write(lambda net, h, x: h.__setitem__(x[:, 0] > 0, net.row), row=row)


def rows_of_another():
    def write(net, h, x):
        chosen = x[:, 0] > 0
        h[chosen] = net.d(x)[chosen]

    return index_write(write, d=nn.Linear(8, 16))


def added_rows():
    def write(net, h, x):
        h.index_put_((x[:, 0] > 0,), net.row, accumulate=True)

    return index_write(write, row=nn.Parameter(torch.arange(16.0)))


def chosen_rows():
    return three(lambda net, x: net.c(net.b(net.a(x)[x[:, 0] > 0]).relu())), (rows(),)


def recurrent(kind, **options):
    layer = kind(10, 16, batch_first=True, **options)
    width = (options.get("proj_size") or 16) * (1 + options.get("bidirectional", False))

    def run(net, x):
        return net.head(net.layer(net.stem(x))[0])

    return Net(run, stem=nn.Linear(8, 10), layer=layer, head=nn.Linear(width, 3)), (steps(),)


def projected():
    return recurrent(nn.LSTM, proj_size=6)


def projected_without_biases():
    return recurrent(nn.LSTM, proj_size=6, bias=False)


def projected_both_ways():
    return recurrent(nn.LSTM, proj_size=6, num_layers=2, bidirectional=True)


def gru_both_ways():
    return recurrent(nn.GRU, num_layers=2, bidirectional=True)


def pruned_by_torch():
    net = nn.Sequential(
        nn.Conv1d(6, 16, 3), nn.BatchNorm1d(16), nn.ReLU(), nn.Conv1d(16, 12, 3), nn.ReLU(),
        nn.Conv1d(12, 3, 1),
    )  # fmt: skip
    prune.l1_unstructured(net[0], "weight", 0.3)
    prune.l1_unstructured(net[0], "bias", 0.3)
    prune.ln_structured(net[3], "weight", 0.25, 2, 0)
    return net, (steps(),)


def spectral():
    layers = (parametrizations.spectral_norm(nn.Linear(8, 16)), nn.ReLU(), nn.Linear(16, 3))
    return nn.Sequential(*layers), (rows(),)


def bag():
    def run(net, indices, offsets):
        return net.head(net.inner(net.table(indices, offsets)).relu())

    net = Net(run, table=nn.EmbeddingBag(20, 8), inner=nn.Linear(8, 12), head=nn.Linear(12, 3))
    return net, (torch.arange(9), torch.tensor([0, 4]))


def attention_of_other_widths():
    def run(net, x):
        return net.head(net.attention(net.q(x), net.k(x), net.v(x))[0])

    attention = nn.MultiheadAttention(16, 4, kdim=10, vdim=12, batch_first=True)
    sizes = {"q": 16, "k": 10, "v": 12}
    parts = {name: nn.Linear(8, n) for name, n in sizes.items()}
    return Net(run, attention=attention, head=nn.Linear(16, 3), **parts), (steps(),)


def checkpointed():
    def run(net, x):
        return net.c(checkpoint(lambda h: net.b(net.a(h).relu()), x, use_reentrant=False).relu())

    return three(run), (rows(),)


def checkpointed_in_parts():
    def run(net, x):
        return net.c(checkpoint_sequential(net.parts, 2, x, use_reentrant=False))

    parts = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU())
    return Net(run, parts=parts, c=nn.Linear(12, 3)), (rows(),)


def flow(build, training=False):
    """Returns a masked model, the small one, its inputs and what was left whole."""
    torch.manual_seed(0)
    model, inputs = build()
    model.train(training)
    coupling = ppt.couple(model, *inputs)
    config = pp.resolve(0.5, ppt.layers(model), coupling=coupling)
    masks = pp.l1_norm(dict(model.named_parameters()), None, config)
    small = ppt.shrink(model, masks, coupling, *inputs)
    torch.manual_seed(0)
    masked = build()[0].train(training)
    ppt.apply_(masked.state_dict(), small.report.masks)
    return masked, small, inputs, config.kept_whole


def check(masked, small, inputs):
    masked.eval(), small.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(small.model(*inputs), masked(*inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "build",
    [
        zeros_below, other_numbers, whole_rows, one_channel, a_row_of_channels,
        rows_of_another, added_rows, chosen_rows, projected, projected_without_biases,
        projected_both_ways, gru_both_ways, pruned_by_torch, spectral, bag,
        attention_of_other_widths,
    ],
)  # fmt: skip
def test_all_but_the_head_is_half_as_wide(build):
    masked, small, inputs, kept = flow(build)
    assert len(kept) == 1
    assert "an output" in str(kept[0])
    before, after = (sum(p.numel() for p in m.parameters()) for m in (masked, small.model))
    assert after < 0.65 * before
    if build not in (one_channel, attention_of_other_widths):  # which hold a number of a width
        assert type(small.model) is type(masked)
    check(masked, small, inputs)


@pytest.mark.parametrize("build", [checkpointed, checkpointed_in_parts])
def test_checkpoints_of_training_are_cut_as_well(build):
    masked, small, inputs, _ = flow(build, training=True)
    assert type(small.model) is type(masked)
    assert small.model.training
    small.model(*inputs).sum().backward()
    assert all(p.grad is not None for p in small.model.parameters())
    check(masked, small, inputs)


def test_an_lstm_says_how_wide_its_projection_is():
    _, small, _, _ = flow(projected)
    layer = small.model.layer
    assert (layer.input_size, layer.hidden_size, layer.proj_size) == (5, 8, 3)


def test_what_torch_pruned_stays_pruned():
    _, small, _, _ = flow(pruned_by_torch)
    first, second = small.model[0], small.model[3]
    assert first.weight_mask.shape == first.weight_orig.shape == (8, 6, 3)
    assert second.weight_mask.shape == second.weight_orig.shape == (6, 8, 3)
    assert not first.weight_mask.all()
    assert first.weight_mask.any((1, 2)).all()
    small.model(steps())
    assert torch.equal(first.weight, first.weight_orig * first.weight_mask)


def test_branches_of_a_condition_are_left_whole_and_the_model_as_it_is():
    def run(net, x):
        h = torch.cond(x.sum() > 0, lambda y: net.b(y), lambda y: net.d(y), (net.a(x).relu(),))
        return net.c(net.e(h.relu()).relu())

    more = {"d": nn.Linear(16, 12), "e": nn.Linear(12, 12)}
    net = three(run, **more).eval()
    coupling = ppt.couple(net, rows())
    config = pp.resolve(0.5, ppt.layers(net), coupling=coupling)
    assert sum("operand of cond, for which" in str(one) for one in config.kept_whole) == 3
    masks = pp.l1_norm(dict(net.named_parameters()), None, config)
    with pytest.raises(ValueError, match=r"shrink: the model calls torch\.cond, whose branches"):
        ppt.shrink(net, masks, coupling, rows())
    assert net.a.weight.shape == (16, 8)


def test_packed_sequences_are_refused_by_the_line_that_packs():
    def run(net, x, lengths):
        packed = rnn.pack_padded_sequence(x, lengths, batch_first=True)
        return net.head(rnn.pad_packed_sequence(net.layer(packed)[0], batch_first=True)[0])

    net = Net(run, layer=nn.LSTM(8, 16, batch_first=True), head=nn.Linear(16, 3)).eval()
    with pytest.raises(ValueError, match=r"torch\.export cannot read Net at .*pa[cd]"):
        ppt.couple(net, steps(), torch.tensor([6, 5, 3, 2]))
