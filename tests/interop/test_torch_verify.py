"""The check of torch results, in both directions and in the dtypes that models have."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from purepruning_interop import torch as ppt
from purepruning_interop.torch.verify import Reference
from tests.coupling.torch_patterns import Net, fill
from tests.interop.torch_law import half, masked, state_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def normed(forward, **parts):
    width = {"a": nn.Linear(8, 16), "norm": nn.LayerNorm(16), "b": nn.Linear(16, 3)}
    return Net(forward, **{**width, **parts})


def recurrent(net, x):
    return net.b(net.norm(net.rnn(net.a(x))[0]))


def states(net, x):
    h = net.norm(net.a(x))
    carry = torch.zeros(h.shape[0], 16, dtype=x.dtype)
    for t in range(h.shape[1]):
        carry = torch.tanh(carry + h[:, t])
    return net.b(carry)


NAMED_DTYPES = {
    "the dtype of the input": (lambda net, x: net.b(net.norm(net.a(x)).to(x.dtype)), {}),
    "a softmax in float32": (
        lambda net, x: net.b(
            torch.softmax(net.norm(net.a(x)), 1, dtype=torch.float32).to(x.dtype) * net.a(x)
        ),
        {},
    ),
    "zeros_like": (lambda net, x: net.b(net.norm(net.a(x)) + torch.zeros_like(net.a(x))), {}),
    "an identity": (
        lambda net, x: net.b(torch.eye(5, dtype=x.dtype) @ net.norm(net.a(x))),
        {},
    ),
    "a norm in float32": (
        lambda net, x: net.b(
            F.layer_norm(net.a(x).float(), (16,), net.norm.weight.float(), None, 1e-6).to(x.dtype)
        ),
        {},
    ),
    "zeros of a dtype": (states, {}),
    "an LSTM": (recurrent, {"rnn": nn.LSTM(16, 16, batch_first=True)}),
    "a GRU": (recurrent, {"rnn": nn.GRU(16, 16, batch_first=True)}),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMED_DTYPES)
def test_what_is_right_is_not_refused(name, dtype):
    """In float64, where the check runs, such a model has dtypes that its graph has not."""
    forward, parts = NAMED_DTYPES[name]
    model = fill(normed(forward, **parts), 0).to(dtype).eval()
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    coupling = ppt.couple(model, x)
    masks = coupling.masks(half(coupling), state_of(model))
    found = ppt.shrink(model, masks, coupling, x)
    assert found.report.params[1] < 0.7 * found.report.params[0]
    assert found.model(x).dtype == model(x).dtype
    expected, got = masked(model, masks)(x).double(), found.model(x).double()
    tolerance = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


class Deep(nn.Module):
    """Residual blocks, so that rounding adds up."""

    def __init__(self, depth=8):
        super().__init__()
        self.stem, self.head = nn.Linear(6, 16), nn.Linear(16, 3)
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(depth))
        self.ups = nn.ModuleList(nn.Linear(16, 24) for _ in range(depth))
        self.downs = nn.ModuleList(nn.Linear(24, 16) for _ in range(depth))
        self.wrong = None

    def hidden(self, i, h):
        return F.gelu(self.ups[i](h))

    def forward(self, x):
        if self.narrow and self.ups[0](self.stem(x)).dtype == torch.float64:
            raise TypeError("not made for float64")
        h = self.stem(x)
        for i, (norm, down) in enumerate(zip(self.norms, self.downs, strict=True)):
            h = h + down(self.hidden(i, norm(h)))
        return self.head(h)

    narrow = False


class NotForFloat64(Deep):
    narrow = True


class OffByOne(Deep):
    def hidden(self, i, h):
        h = super().hidden(i, h)
        return h.roll(1, -1) if i == 4 else h


class Exchanged(Deep):
    def hidden(self, i, h):
        h = super().hidden(i, h)
        return torch.cat([h[..., 1:2], h[..., :1], h[..., 2:]], -1) if i == 4 else h


class WithoutBias(Deep):
    def hidden(self, i, h):
        return F.gelu(F.linear(h, self.ups[i].weight, self.ups[i].bias if i != 4 else None))


class WithoutOneBias(Deep):
    def hidden(self, i, h):
        bias = self.ups[i].bias
        bias = torch.cat([bias[:-1], bias[-1:] * 0]) if i == 4 else bias
        return F.gelu(F.linear(h, self.ups[i].weight, bias))


def deep(base, dtype):
    """A model, what is right for half of its inner units, and a reference to compare with."""
    model = fill(base(), 0).to(dtype).eval()
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    coupling = ppt.couple(model, x)
    inner = [f for f in coupling.families if any(m.path.startswith("ups") for m in f.axes)]
    units = [u for f in inner if len(f) == 24 for u in f.units[:12].tolist()]
    masks = coupling.masks(units, state_of(model))
    found = ppt.shrink(model, masks, coupling, x)
    assert found.report.kind == "module"
    names = {name: name for name in model.state_dict()}
    state = {k: v * masks[k] if masks.get(k) is not None else v for k, v in state_of(model).items()}
    return found, Reference(model, state, masks, names, ((x,), {}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("base", [Deep, NotForFloat64])
def test_the_small_model_passes(base, dtype):
    found, reference = deep(base, dtype)
    assert reference.compare(found.model, found.report.plan)[0] is not None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wrong", [OffByOne, Exchanged, WithoutBias, WithoutOneBias])
def test_what_is_wrong_is_refused(wrong, dtype):
    found, reference = deep(Deep, dtype)
    small = copy.deepcopy(found.model)
    small.__class__ = wrong
    off, why = reference.compare(small, found.report.plan)
    assert off is None
    assert "gives something else" in why


@pytest.mark.parametrize("wrong", [OffByOne, Exchanged, WithoutBias, WithoutOneBias])
def test_what_is_wrong_is_refused_without_float64(wrong):
    found, reference = deep(NotForFloat64, torch.float32)
    small = copy.deepcopy(found.model)
    small.__class__ = wrong
    assert reference.compare(small, found.report.plan)[0] is None


def test_a_branch_of_gain_zero_hides_nothing():
    """Where the last layer of a branch is zero at first, other values show what is wrong in it."""
    found, reference = deep(Deep, torch.float32)
    small = copy.deepcopy(found.model)
    with torch.no_grad():
        for model in (small, reference.model):
            model.downs[4].weight.zero_()
        reference.state["downs.4.weight"] = reference.model.downs[4].weight.detach()
    small.__class__ = Exchanged
    assert reference.compare(small, found.report.plan)[0] is None


def test_the_check_leaves_the_model_as_it_is():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)
            self.embed = nn.Embedding(5, 4, max_norm=0.1)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return self.b(self.a(self.embed(x)).relu())

    model = Counting()
    x = torch.tensor([[0, 1], [2, 3]])
    coupling = ppt.couple(model, x)
    masks = coupling.masks(half(coupling), state_of(model))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.random.get_rng_state()
    ppt.shrink(model, masks, coupling, x)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training


def test_checking_leaves_the_generators_of_accelerators_alone(monkeypatch):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    x = torch.ones(2, 4)
    coupling = ppt.couple(model, x)
    masks = {"0.weight": torch.arange(8).reshape(8, 1).expand(8, 4) < 4}
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)  # which nobody puts back
    drawn = torch.get_rng_state()
    assert ppt.shrink(model, masks, coupling, x).model[0].out_features == 4
    assert seeded == []
    assert torch.equal(torch.get_rng_state(), drawn)
