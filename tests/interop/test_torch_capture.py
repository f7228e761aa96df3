"""Outputs of torch layers; every expected output is computed by hand from the parameters."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from purepruning_interop import torch as adapter
from tests.interop.capture import assert_outputs

X = torch.tensor([[1.0, -2.0, 3.0, 0.5], [0.0, 1.0, -1.0, 2.0]])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3)
        self.last = nn.Linear(3, 2)

    def forward(self, x, fail=False):
        x = nn.functional.relu(self.first(x), inplace=True)  # the output of first is overwritten
        x = self.norm(x)
        if fail:
            raise ZeroDivisionError
        x += 1
        return self.last(x)


def dense(params, name, x):
    return x @ params[f"{name}.weight"].T + params[f"{name}.bias"]


def numbers(outputs):
    return {k: v.detach().numpy() for k, v in outputs.items()}


def hooks(model):
    return [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


@pytest.mark.parametrize("own", [True, False], ids=["the model's parameters", "others"])
def test_outputs_are_those_before_what_overwrites_them(own):
    torch.manual_seed(0)
    net = Net().eval()
    params = dict((net if own else Net()).named_parameters())
    with torch.no_grad():
        y, outputs = adapter.capture(
            net, X, params=None if own else params, layers=adapter.layers(net)
        )
        first = dense(params, "first", X)
        norm = first.relu() / np.sqrt(1 + 1e-5)
        last = dense(params, "last", norm + 1)
    assert_outputs(outputs, {"first": first, "norm": norm, "last": last})
    assert torch.equal(y, outputs["last"])
    assert hooks(net) == []


@pytest.mark.parametrize("fail", [False, True])
def test_nothing_is_left_behind_also_where_the_forward_raises(fail):
    net = Net()
    before = {name: x.clone() for name, x in net.state_dict().items()}
    versions = [x._version for x in net.state_dict(keep_vars=True).values()]
    buffers = {name: x.clone() for name, x in net.named_buffers()}
    fast = torch.backends.mha.get_fastpath_enabled()
    if fail:
        with pytest.raises(ZeroDivisionError):
            adapter.capture(net, X, params=buffers, fail=True, layers=["first", "norm"])
    else:
        adapter.capture(net, X, params=buffers, layers=["first", "norm"])
    assert hooks(net) == []
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert [x._version for x in net.state_dict(keep_vars=True).values()] == versions
    assert all(torch.equal(before[name], x) for name, x in net.state_dict().items())
    assert all(torch.equal(before[name], x) for name, x in buffers.items())  # the caller's, too
    assert net.training


def test_a_hook_of_the_user_stays_and_comes_first():
    net = Net().eval()
    handle = net.first.register_forward_hook(lambda m, args, y: y + 1)
    _, outputs = adapter.capture(net, X, layers=["first"])
    expected = dense(dict(net.named_parameters()), "first", X) + 1
    assert_outputs(numbers(outputs), {"first": expected.detach()})
    assert list(net.first._forward_hooks) == [handle.id]


@pytest.mark.parametrize("given", [False, True])
def test_buffers_are_returned_where_asked_for(given):
    net, twin = Net(), Net()
    twin.load_state_dict(net.state_dict())
    params = {"norm.running_mean": torch.full((3,), 2.0)} if given else None
    (y, buffers), _ = adapter.capture(net, X, params=params, layers=["first"], mutable=True)
    x = dense(dict(net.named_parameters()), "first", X).relu().detach()
    start = 2 if given else 0
    assert sorted(buffers) == [
        "norm.num_batches_tracked",
        "norm.running_mean",
        "norm.running_var",
    ]
    np.testing.assert_allclose(
        buffers["norm.running_mean"], 0.9 * start + 0.1 * x.mean(0), rtol=1e-5
    )
    assert buffers["norm.num_batches_tracked"] == 1
    np.testing.assert_allclose(y.detach(), twin(X).detach(), rtol=1e-5)


def test_vmap_over_stacked_parameters_and_buffers():
    nets = [Net(), Net()]
    params, buffers = torch.func.stack_module_state(nets)

    def function(values):
        return adapter.capture(nets[0], X, params=values, layers=["first", "norm"])[1]

    found = torch.func.vmap(function)(params | buffers)
    first = torch.stack([dense(dict(n.named_parameters()), "first", X) for n in nets]).detach()
    relu = first.relu()
    norm = (relu - relu.mean(1, keepdim=True)) / (
        relu.var(1, correction=0, keepdim=True) + 1e-5
    ).sqrt()
    assert_outputs(numbers(found), {"first": first, "norm": norm}, rtol=1e-4)
    for net in nets:
        assert net.norm.num_batches_tracked == 0


@pytest.mark.parametrize("functional", [True, False])
def test_gradient_equals_the_one_by_hand(functional):
    net = Net()
    params = {name: p.detach() for name, p in net.named_parameters()}

    def loss(params):
        return (adapter.capture(net, X, params=params, layers=["first"])[1]["first"] ** 2).sum()

    if functional:
        grad = torch.func.grad(loss)(params)["first.weight"]
    else:
        loss(None).backward()
        grad = net.first.weight.grad
    y = dense(params, "first", X)
    np.testing.assert_allclose(grad, 2 * y.T @ X, rtol=1e-4, atol=1e-5)


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = self.a
        self.head = nn.Linear(4, 4)
        self.head.weight = self.a.weight

    def forward(self, x):
        return self.head(self.b(self.a(x)))


def test_shared_module_gives_the_list_of_its_outputs_under_each_name():
    net = Shared()
    p = dict(net.named_parameters())
    first = dense(p, "a", X)
    second = dense(p, "a", first)
    head = second @ p["a.weight"].T + p["head.bias"]
    _, outputs = adapter.capture(net, X, layers=["b", "a", "head", "a.weight", "head.weight"])
    assert outputs["a"] is not outputs["b"]
    for name in ("a", "b", "a.weight"):
        assert isinstance(outputs[name], list)
        for found, wanted in zip(outputs[name], [first, second], strict=True):
            torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(outputs["head"], head)
    torch.testing.assert_close(outputs["head.weight"], head)

    given = {"b.weight": torch.eye(4), "b.bias": torch.ones(4)}  # by another name
    _, outputs = adapter.capture(net, X, params=given, layers=["a", "head"])
    torch.testing.assert_close(outputs["a"], [X + 1, X + 2])
    torch.testing.assert_close(outputs["head"], X + 2 + p["head.bias"])


def test_buffer_by_another_name_of_its_module():
    net = nn.ModuleDict({"a": nn.BatchNorm1d(4)})
    net["b"] = net["a"]
    net.forward = lambda x: net["b"](x)
    (_, buffers), _ = adapter.capture(
        net, X, params={"b.running_mean": torch.ones(4)}, layers=["a"], mutable=True
    )
    torch.testing.assert_close(buffers["b.running_mean"], 0.9 + 0.1 * X.mean(0))
    assert "a.running_mean" not in buffers


def test_attention_returns_what_it_returns_and_first_of_it_the_output_of_its_out_proj():
    torch.manual_seed(0)
    net = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2, batch_first=True)})
    net.forward = lambda x: net["attention"](x, x, x)
    x = torch.randn(2, 5, 4)
    for evaluated in (False, True):
        net.train(not evaluated)
        with torch.no_grad():
            names = ["attention", "attention.out_proj"]
            y, outputs = adapter.capture(net, x, layers=names)
        torch.testing.assert_close(outputs["attention"], y)
        torch.testing.assert_close(outputs["attention.out_proj"], y[0])
        assert [tuple(t.shape) for t in outputs["attention"]] == [(2, 5, 4), (2, 5, 5)]
    stacked = {name: torch.stack([p, 2 * p]) for name, p in net.named_parameters()}
    found = torch.func.vmap(lambda p: adapter.capture(net, x, params=p, layers=["attention"])[1])(
        stacked
    )
    torch.testing.assert_close(found["attention"][0][0], outputs["attention"][0])
    # Alone too, from several calls, and from a model that does call it.
    net.forward = lambda x: net["attention"](*[net["attention"](x, x, x)[0]] * 3)
    y, outputs = adapter.capture(net, x, layers=["attention.out_proj"])
    assert list(outputs) == ["attention.out_proj"]
    torch.testing.assert_close(outputs["attention.out_proj"][1], y[0])
    net.forward = lambda x: net["attention"].out_proj(x)
    y, outputs = adapter.capture(net, x, layers=["attention.out_proj"])
    torch.testing.assert_close(outputs["attention.out_proj"], y)
    net.forward = lambda x: x
    with pytest.raises(ValueError, match=r"layer 'attention\.out_proj' is never called"):
        adapter.capture(net, x, layers=["attention.out_proj"])


@pytest.mark.parametrize("padded", [False, True])
def test_layers_of_an_evaluated_encoder_are_called(padded):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    net = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, 5, 8)
    mask = {"src_key_padding_mask": torch.tensor([[0] * 5, [0] * 3 + [1] * 2]).bool()}
    with torch.no_grad():
        _, outputs = adapter.capture(
            net, x, layers=["layers.0.linear1", "layers.1.norm2"], **(mask if padded else {})
        )
        wanted = net.train().requires_grad_(False)
        for module in wanted.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(module, nn.MultiheadAttention):
                module.dropout = 0.0
        expected = wanted(x, **(mask if padded else {}))
    kept = slice(0, 3 if padded else 5)
    torch.testing.assert_close(outputs["layers.1.norm2"][:, kept], expected[:, kept])
    assert outputs["layers.0.linear1"].shape == (2, 5, 16)


def test_recurrent_layer_and_names_of_its_weights():
    net = nn.Sequential(nn.LSTM(4, 3, batch_first=True))
    names = [layer.name for layer in adapter.layers(net)]
    y, outputs = adapter.capture(net, X[None], layers=names)
    assert list(outputs) == names
    for name in names:
        torch.testing.assert_close(outputs[name], y)


def test_computed_weights_are_of_the_layer_around_them():
    for make in (
        lambda: parametrizations.weight_norm(nn.Linear(4, 3)),
        lambda: prune.l1_unstructured(nn.Linear(4, 3), "weight", 5),
    ):
        net = nn.Sequential(make())
        rows = adapter.layers(net)
        _, outputs = adapter.capture(net, X, layers=rows)
        for row in rows:
            torch.testing.assert_close(outputs[row.name], X @ net[0].weight.T + net[0].bias)


def test_compiled():
    net = Net().eval()
    params = {name: p.detach() for name, p in net.named_parameters()}

    def function(params, x):
        return adapter.capture(net, x, params=params, layers=["first"])[1]

    found = torch.compile(function, backend="eager")(params, X)
    torch.testing.assert_close(found["first"], dense(params, "first", X))
    assert hooks(net) == []


class Idle(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.idle.forward(self.used(x))


def test_errors():
    net = Net()
    with pytest.raises(ValueError, match="layer 'idle' is never called in this forward pass"):
        adapter.capture(Idle(), X, layers=["used", "idle"])
    with pytest.raises(ValueError, match="no layer 'frist'; nearest: 'first'"):
        adapter.capture(net, X, layers=["frist"])
    with pytest.raises(TypeError, match="layers must list layer names"):
        adapter.capture(net, X, layers="first")
    with pytest.raises(KeyError, match=r"no parameter or buffer 'first\.wieght'; nearest"):
        adapter.capture(net, X, params={"first.wieght": X}, layers=["first"])
    with pytest.raises(TypeError, match="model must be a torch"):
        adapter.capture(Net, X, layers=["first"])
    with pytest.raises(TypeError, match="params must map names to tensors"):
        adapter.capture(net, X, params=list(net.parameters()), layers=["first"])
