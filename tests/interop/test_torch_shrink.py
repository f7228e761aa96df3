import copy
import math
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import purepruning as pp
from purepruning_interop import torch as ppt
from tests.coupling.torch_patterns import PATTERNS, Net, cast, conv, fill, image, parameter, tokens
from tests.coupling.torch_traps import TRAPS
from tests.covering import every
from tests.interop.torch_law import check_law, distance, floats, half, masked, state_of

BY_NAME = {p.name: p for p in PATTERNS + TRAPS}


def built(pattern, seed=0):
    model, inputs = cast(*BY_NAME[pattern].build(), torch.float64)
    return fill(model, seed), inputs


def shrunk(model, inputs, units=None, **options):
    coupling = ppt.couple(model, *inputs)
    units = half(coupling) if units is None else units
    masks = coupling.masks(units, state_of(model))
    found = ppt.shrink(model, masks, coupling, *inputs, **options)
    return masks, found.model, found.report


@pytest.fixture
def only_graphs(monkeypatch):
    """Makes every result a graph."""

    def refuse(*_):
        raise RuntimeError("not asked for")

    module = sys.modules[ppt.shrink.__module__]  # the package has a function of that name
    monkeypatch.setattr(module, "cut_modules", refuse)


@pytest.mark.parametrize("name", BY_NAME)
def test_masked_and_shrunk_are_one_function(name):
    model, inputs = built(name)
    masks, small, report = shrunk(model, inputs)
    check_law(model, inputs, masks, small, report.plan)
    if not all(mask.all() for mask in masks.values()):
        assert report.params[1] <= report.params[0]
        assert {k: tuple(v.shape) for k, v in small.state_dict().items()} == {
            k: report.plan.shape(report.names[k]) for k in model.state_dict()
        }


@pytest.mark.usefixtures("only_graphs")
@pytest.mark.parametrize("name", every(3, [p.name for p in PATTERNS[::2]]))
def test_masked_and_graph_are_one_function_for_another_batch(name):
    model, inputs = built(name, seed=1)
    masks, small, report = shrunk(model, inputs)
    assert report.kind == "graph"
    check_law(model, inputs, masks, small, report.plan)
    assert report.dynamic
    if name != "linear_to_conv_view":  # a view of -1 that makes the batch of something else
        larger = tuple(torch.cat([x, x.flip(0, -1), x]) if x.ndim else x for x in inputs)
        assert distance(masked(model, masks)(*larger), small(*larger)) <= 1e-10


# The classic differences between what is masked and what is removed.


def test_batch_norm_bias_of_a_pruned_channel_goes_with_it():
    """Zero filters alone leave ``bias - mean * scale / deviation`` behind a batch norm."""
    model, inputs = built("chain_bn")
    coupling = ppt.couple(model, *inputs)
    filters = {"a.weight": torch.ones(8, 3, 3, 3, dtype=torch.bool)}
    filters["a.weight"][:4] = False
    found = ppt.shrink(model, filters, coupling, *inputs)
    small, report = found.model, found.report
    assert small.bn_a.num_features == 4
    assert report.masks["bn_a.bias"].sum() == 4
    assert report.masks["bn_a.running_mean"].sum() == 4
    assert distance(masked(model, filters)(*inputs), small(*inputs)) > 1e-3
    assert distance(masked(model, report.masks)(*inputs), small(*inputs)) <= 1e-10


@pytest.mark.parametrize("function", [torch.sigmoid, torch.exp, F.softplus, torch.cos])
def test_activations_that_are_not_zero_at_zero(function):
    model = Net(lambda net, x: net.head(function(net.a(x))), a=conv(3, 8), head=conv(8, 4))
    model, inputs = cast(model, image(), torch.float64)
    masks, small, report = shrunk(fill(model, 0), inputs)
    assert report.kind == "module"
    assert small.head.in_channels == 4
    check_law(model, inputs, masks, small, report.plan)


def norm_net(norm, width=12):
    model = Net(
        lambda net, x: net.head(net.norm(net.stem(x))),
        stem=nn.Linear(6, width),
        norm=norm,
        head=nn.Linear(width, 4),
    )
    model, inputs = cast(model, tokens(), torch.float64)
    return fill(model, 0), inputs


def test_a_layer_norm_with_the_original_divisor_sees_the_zeros():
    model, inputs = norm_net(nn.LayerNorm(12))
    masks, small, report = shrunk(model, inputs)
    assert (report.kind, report.norms, report.statistics) == ("module", "original", 1)
    assert report.replaced == ("norm",)
    assert isinstance(small.norm, nn.LayerNorm)
    assert small.norm.normalized_shape == (6,)
    check_law(model, inputs, masks, small, report.plan)


@pytest.mark.parametrize("norm", [nn.LayerNorm(12), nn.RMSNorm(12, eps=1e-6)])
def test_a_norm_over_what_is_kept_is_a_smaller_layer(norm):
    model, inputs = norm_net(norm)
    masks, small, report = shrunk(model, inputs, norms="kept")
    assert (report.kind, report.norms) == ("module", "kept")
    assert type(small.norm) is type(norm)
    assert small.norm.normalized_shape == (6,)
    kept = masks["norm.weight"]
    x = masked(model, masks).stem(*inputs)[..., kept]  # statistics that ignore what is pruned
    mean = x.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else 0.0
    scaled = (x - mean) / ((x - mean).square().mean(-1, keepdim=True) + norm.eps).sqrt()
    scaled = scaled * model.norm.weight[kept]
    if isinstance(norm, nn.LayerNorm):
        scaled = scaled + model.norm.bias[kept]
    expected = scaled @ model.head.weight[:, kept].T + model.head.bias
    assert distance(expected, small(*inputs)) <= 1e-12
    assert distance(masked(model, masks)(*inputs), small(*inputs)) > 1e-3


@pytest.mark.usefixtures("only_graphs")
@pytest.mark.parametrize(
    "name",
    [
        "layernorm_mlp",
        "rmsnorm_builtin",
        "groupnorm",
        "std_over_channels",
        "mean_over_channels",
        "mean_by_shape",
    ],
)
def test_graphs_know_both_meanings_of_norms(name):
    model, inputs = built(name)
    _, original, _ = shrunk(model, inputs)
    _, kept, _ = shrunk(model, inputs, norms="kept")
    assert distance(original(*inputs), kept(*inputs)) > 1e-3


@pytest.mark.parametrize(
    "name", ["mha_builtin", "attention_separate_qkv", "attention_gqa", "encoder_layer"]
)
def test_the_temperature_of_attention_stays(name):
    model, inputs = built(name)
    coupling = ppt.couple(model, *inputs)
    positions = [f for f in coupling.families if f.kind == "head_position"]
    units = np.concatenate([f.units[: len(f) // 2] for f in positions])
    masks, small, report = shrunk(model, inputs, units)
    check_law(model, inputs, masks, small, report.plan)


# What a shrunk model is.


def test_the_users_own_class_has_corrected_attributes():
    model = Net(
        lambda net, x: net.head(net.norm(net.up(F.relu(net.depth(F.relu(net.a(x))))))),
        a=conv(3, 8),
        depth=conv(8, 16, groups=8),
        up=nn.ConvTranspose2d(16, 6, 2, stride=2),
        norm=nn.BatchNorm2d(6),
        head=conv(6, 4),
    )
    model, inputs = cast(model, image(), torch.float64)
    fill(model, 0)
    coupling = ppt.couple(model, *inputs)
    first = next(f for f in coupling.families if any(m.path == "a.weight" for m in f.axes))
    third = next(f for f in coupling.families if any(m.path == "norm.weight" for m in f.axes))
    units = np.concatenate([first.units[:4], third.units[:3]])
    masks, small, report = shrunk(model, inputs, units)
    assert type(small) is type(model)
    assert (small.a.out_channels, small.depth.in_channels, small.depth.groups) == (4, 4, 4)
    assert (small.depth.out_channels, small.up.in_channels, small.up.out_channels) == (8, 8, 3)
    assert (small.norm.num_features, small.head.in_channels) == (3, 3)
    assert report.kind == "module"
    assert "own class" in str(report)
    check_law(model, inputs, masks, small, report.plan)


class Attention(nn.Module):
    """As in many libraries: the number of heads and their size are attributes."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.head_dim = 4, 4
        self.scale = self.head_dim**-0.5
        self.qkv, self.proj = nn.Linear(6, 48), nn.Linear(16, 4)

    def forward(self, x):
        b, n, _ = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        x = (q * self.scale @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).reshape(b, n, self.num_heads * self.head_dim))


@pytest.mark.parametrize("kind", ["head", "head_position"])
def test_heads_are_corrected_in_classes_nobody_knows(kind):
    model, inputs = cast(Attention(), tokens(), torch.float64)
    fill(model, 0)
    coupling = ppt.couple(model, *inputs)
    (family,) = (f for f in coupling.families if f.kind == kind)
    masks, small, report = shrunk(model, inputs, family.units[:3])
    assert type(small) is Attention
    left = (1, 4) if kind == "head" else (4, 1)
    assert (small.num_heads, small.head_dim, small.scale) == (*left, 0.5)
    check_law(model, inputs, masks, small, report.plan)


def test_tied_and_shared_and_frozen_stay_so():
    model, inputs = built("tied_weights")
    _, small, _ = shrunk(model, inputs)
    assert small.head.weight is small.embed.weight
    assert small.embed.embedding_dim == 4
    model, inputs = built("shared_module")
    _, small, _ = shrunk(model, inputs)
    assert small.shared.weight.shape == (4, 4, 3, 3)
    model, inputs = built("frozen_first_layer")
    _, small, _ = shrunk(model, inputs)
    assert not small.a.weight.requires_grad
    assert small.b.weight.requires_grad


@pytest.mark.usefixtures("only_graphs")
def test_tied_parameters_stay_tied_in_graphs():
    model, inputs = built("tied_weights")
    _, small, _ = shrunk(model, inputs)
    for one in (small, copy.deepcopy(small)):
        assert one.head.weight is one.embed.weight
        assert set(one.state_dict()) == set(model.state_dict())


def test_parametrised_weights_are_cut():
    model, inputs = built("weight_norm_of_consumer")
    masks, small, report = shrunk(model, inputs)
    check_law(model, inputs, masks, small, report.plan)
    assert report.params[1] < report.params[0]


def test_masks_may_name_any_of_the_tied_names():
    model, inputs = built("tied_weights")
    coupling = ppt.couple(model, *inputs)
    masks = coupling.masks(half(coupling), state_of(model))
    masks["head.weight"] = masks.pop("embed.weight")
    small = ppt.shrink(model, masks, coupling, *inputs).model
    assert small.head.weight.shape[1] == 4


@pytest.mark.parametrize("name", ["chain_bn", "layernorm_mlp", "mha_builtin", "lstm"])
def test_a_result_is_a_module_like_any_other(name, tmp_path):
    model, inputs = built(name)
    _, small, _ = shrunk(model, inputs)
    expected = [x.detach() for x in floats(small(*inputs))]
    copied = copy.deepcopy(small)
    assert distance(expected, copied(*inputs)) == 0.0
    assert list(copied.state_dict()) == list(small.state_dict())
    assert set(small.state_dict()) == set(model.state_dict())
    torch.save(small.state_dict(), tmp_path / "state.pt")
    with torch.no_grad():
        for p in copied.parameters():
            p.zero_()
    copied.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert distance(expected, copied(*inputs)) == 0.0
    copied.train()
    optimizer = torch.optim.SGD(copied.parameters(), 1e-2)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = sum(x.square().mean() for x in floats(copied(*inputs)))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    copied.eval()
    assert not any(m.training for m in copied.modules())
    compiled = torch.compile(small, backend="aot_eager")
    assert distance(expected, compiled(*inputs)) <= 1e-12
    torch._dynamo.reset()


@pytest.mark.usefixtures("only_graphs")
def test_graphs_switch_dropout_and_batch_norm_with_the_mode():
    model = Net(
        lambda net, x: net.head(net.drop(F.relu(net.norm(net.a(x))))),
        a=conv(3, 8),
        norm=nn.BatchNorm2d(8),
        drop=nn.Dropout(0.5),
        head=conv(8, 4),
    )
    model, inputs = cast(model, image(), torch.float64)
    fill(model, 0)
    _, small, _ = shrunk(model, inputs)
    assert small.training == model.training
    small.train()
    before = small.norm.running_mean.clone()
    one, other = small(*inputs), small(*inputs)
    assert not torch.equal(one, other)
    assert not torch.equal(before, small.norm.running_mean)
    small.eval()
    assert torch.equal(small(*inputs), small(*inputs))


@pytest.mark.parametrize("name", ["chain_bn", "layernorm_mlp", "group_conv"])
def test_a_saved_plan_rebuilds_the_model(name, tmp_path):
    model, inputs = built(name)
    _, small, report = shrunk(model, inputs)
    pp.save_plan(tmp_path / "plan.safetensors", report.plan)
    plan = pp.load_plan(tmp_path / "plan.safetensors")
    fresh, _ = built(name, seed=5)
    again = ppt.rebuild(fresh, plan, *inputs)
    again.model.load_state_dict(small.state_dict())
    assert (again.report.kind, again.report.params) == (report.kind, report.params)
    assert type(again.model) is type(small) or report.kind == "graph"
    assert distance(small(*inputs), again.model(*inputs)) == 0.0
    cut = ppt.rebuild(model, plan, *inputs)
    assert distance(small(*inputs), cut.model(*inputs)) <= 1e-12
    assert distance(small(*inputs), cut.fn(cut.params, *inputs)) <= 1e-12
    other, given = built("residual")
    with pytest.raises(ValueError, match=r"the plan does not fit: .* pass the plan of this model"):
        ppt.rebuild(other, plan, *given)


def test_the_original_is_untouched():
    model, inputs = built("chain_bn")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modules = list(model.modules())
    shrunk(model, inputs)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert list(model.modules()) == modules
    assert model.a.out_channels == 8
    assert all(p.grad is None for p in model.parameters())


def test_a_report_counts_parameters_and_multiply_adds():
    model, inputs = built("chain_bn")
    _, small, report = shrunk(model, inputs)
    assert report.params == tuple(sum(p.numel() for p in m.parameters()) for m in (model, small))
    assert report.macs == (ppt.count(model, *inputs).macs, ppt.count(small, *inputs).macs)
    assert report.macs[1] < report.macs[0]


def test_the_masks_of_a_report_apply_to_the_state():
    """They name the statistics of batch norms as well."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    x = torch.randn(5, 3)
    coupling = ppt.couple(model, x)
    masks = coupling.masks([1, 3], dict(model.state_dict()))
    found = ppt.shrink(model, masks, coupling, x)
    small, report = found.model, found.report
    assert repr(found).startswith("Shrunk(model=Sequential, report=ShrinkReport(params=")
    assert found.reason == report.reason == ""
    assert str(report).splitlines()[-1].startswith("result: the model's own class (agrees to ")
    ppt.apply_(model.state_dict(), report.masks)
    assert (model[1].running_var == 0).sum() == 2
    assert torch.allclose(model(x), small(x), atol=1e-6)


def test_disagreeing_masks_are_refused_kept_or_removed():
    model, inputs = built("residual")
    coupling = ppt.couple(model, *inputs)
    mask = torch.ones(8, 3, 3, 3, dtype=torch.bool)
    mask[:2] = False
    masks = {"a.weight": mask}
    with pytest.raises(ValueError, match="the masks disagree on 2 units"):
        ppt.shrink(model, masks, coupling, *inputs, conflicts="refuse")
    with pytest.raises(ValueError, match="nothing can be removed: the masks disagree on 2 units"):
        ppt.shrink(model, masks, coupling, *inputs)
    other = torch.ones(8, 6, 3, 3, dtype=torch.bool)
    other[1:3] = False
    kept = ppt.shrink(model, masks | {"c.weight": other}, coupling, *inputs)
    assert len(kept.report.restored) == 2
    removed = ppt.shrink(model, masks, coupling, *inputs, conflicts="remove")
    assert len(removed.report.extended) == 2
    assert removed.model.a.out_channels == 6


def test_wrong_arguments_are_refused():
    model, inputs = built("residual")
    coupling = ppt.couple(model, *inputs)
    with pytest.raises(ValueError, match="norms must be 'original' or 'kept', got 'mine'"):
        ppt.shrink(model, {}, coupling, *inputs, norms="mine")
    with pytest.raises(ValueError, match="coupling does not belong to this model"):
        ppt.shrink(built("chain_bn")[0], {}, coupling, *inputs)
    with pytest.raises(KeyError, match="wieght"):
        ppt.shrink(model, {"a.wieght": torch.ones(8, dtype=torch.bool)}, coupling, *inputs)


def test_weight_norm_of_pruned_filters_stays_whole():
    model, inputs = built("weight_norm")
    reasons = {(p.path, p.axis): p.reason for p in ppt.couple(model, *inputs).frozen}
    assert reasons["a.parametrizations.weight.original1", 0] == "no number where it is masked"


def test_parameters_without_a_layer():
    model = Net(
        lambda net, x: net.head(torch.cat([net.token.expand(len(x), -1, -1), net.stem(x)], 1)
                                + net.positions * net.scale),
        stem=nn.Linear(6, 8), token=parameter(1, 1, 8), positions=parameter(1, 6, 8),
        scale=parameter(8), head=nn.Linear(8, 4),
    )  # fmt: skip
    model, inputs = cast(model, tokens(), torch.float64)
    fill(model, 0)
    masks, small, report = shrunk(model, inputs)
    assert (small.token.shape[-1], small.positions.shape[-1], small.scale.shape) == (4, 4, (4,))
    check_law(model, inputs, masks, small, report.plan)


@pytest.mark.filterwarnings("ignore")  # torch's exporter calls what torch itself deprecates
def test_a_pruned_model_can_be_exported_to_onnx(tmp_path):
    for name in ("chain_bn", "layernorm_mlp", "attention_separate_qkv"):
        model, inputs = BY_NAME[name].build()
        _, small, _ = shrunk(fill(model, 0), inputs)
        file = tmp_path / f"{name}.onnx"
        torch.onnx.export(small, inputs, file, dynamo=True)
        session = onnxruntime.InferenceSession(file)
        given = {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)}
        found = [torch.from_numpy(x) for x in session.run(None, given)]
        assert distance(small(*inputs), found) <= 1e-5


def test_masks_of_weights_one_by_one_are_zeros_in_the_result():
    model, inputs = built("chain_bn")
    coupling = ppt.couple(model, *inputs)
    masks = coupling.masks(half(coupling), state_of(model))
    sparse = torch.rand(model.head.weight.shape, generator=torch.Generator().manual_seed(0)) > 0.5
    masks["head.weight"] = masks["head.weight"] & sparse
    found = ppt.shrink(model, masks, coupling, *inputs)
    small, report = found.model, found.report
    assert 0.3 < float((small.head.weight == 0).double().mean()) < 0.7
    check_law(model, inputs, report.masks, small, report.plan)
    assert math.isfinite(report.deviation)


class OnlyInSingle(nn.Module):
    """As operations are that have no kernel for float64."""

    def forward(self, x):
        if x.dtype != torch.float32:
            raise RuntimeError(f"expected float32, got {x.dtype}")
        return F.relu(x)


def test_a_model_that_does_not_run_in_double_precision_is_compared_as_it_is():
    model = nn.Sequential(nn.Linear(6, 16), OnlyInSingle(), nn.Linear(16, 3))
    inputs = tokens()
    masks, small, report = shrunk(model, inputs)
    assert report.kind == "module"
    assert 0 < small[0].out_features < 16
    assert 0 <= report.deviation <= 1e-5
    assert distance(masked(model, masks)(*inputs), small(*inputs)) <= 1e-5


class Features(nn.Module):
    """Returns logits, and the features that they are made of."""

    def __init__(self):
        super().__init__()
        self.stem = conv(3, 8)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        h = self.norm(self.stem(x)).relu()
        return {"logits": self.head(h.mean((2, 3))), "features": h}


@pytest.mark.parametrize("kind", ["module", "graph"])
def test_outputs_may_shrink_with_the_parameters(kind, request):
    if kind == "graph":
        request.getfixturevalue("only_graphs")
    model, inputs = cast(Features(), image(), torch.float64)
    fill(model, 0)
    assert ppt.couple(model, *inputs).n_units == 0
    coupling = ppt.couple(model, *inputs, outputs={"logits": True, "features": False})
    assert coupling.n_units == 8
    masks = coupling.masks([2, 5], state_of(model))
    small = ppt.shrink(model, masks, coupling, *inputs)
    assert small.report.kind == kind
    expected, found = masked(model, masks)(*inputs), small.model(*inputs)
    assert distance(expected["logits"], found["logits"]) <= 1e-10
    kept = [0, 2, 3, 5, 6, 7]
    assert distance(expected["features"][:, kept], found["features"]) <= 1e-10
    again = ppt.rebuild(model, small.report.plan, *inputs)
    assert distance(found["features"], again.model(*inputs)["features"]) <= 1e-12


@pytest.mark.parametrize("outputs", [{"logits": True}, (True, False), "no", {"logits": 1, "x": 2}])
def test_outputs_that_fit_no_result(outputs):
    with pytest.raises((TypeError, ValueError), match="outputs must"):
        ppt.couple(Features(), *image(), outputs=outputs)


# Norms that keep their divisors in the model's own class.


class Rooted(nn.Module):
    """A norm of a user's own class."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class Swapped(nn.LayerNorm):
    """A layer norm of channels that come second."""

    def forward(self, x):
        return super().forward(x.transpose(1, -1)).transpose(1, -1)


class Functional(nn.LayerNorm):
    """A layer norm that calls the function, as those of timm do."""

    def forward(self, x):
        return nn.functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class FunctionalOfChannels(nn.LayerNorm):
    """A layer norm of channels that come second, as that of ConvNeXt."""

    def forward(self, x):
        x = x.movedim(1, -1)
        x = nn.functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.movedim(-1, 1)


class FunctionalOfGroups(nn.GroupNorm):
    """A group norm that calls the function."""

    def forward(self, x):
        return nn.functional.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


NORMS = {
    "functional": lambda: Functional(12),
    "layer": lambda: nn.LayerNorm(12),
    "layer of two axes": lambda: nn.LayerNorm((5, 12)),
    "layer without parameters": lambda: nn.LayerNorm(12, elementwise_affine=False),
    "rms": lambda: nn.RMSNorm(12),
    "own": lambda: Rooted(12),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_a_norm_that_keeps_its_divisor_is_in_the_models_own_class(name, dtype, tmp_path):
    model, inputs = norm_net(NORMS[name]())
    model, inputs = cast(model, inputs, dtype)
    masks, small, report = shrunk(model, inputs)
    assert (report.kind, report.replaced) == ("module", ("norm",))
    assert type(small.norm).__name__ == type(model.norm).__name__
    assert isinstance(small.norm, type(model.norm))
    assert list(small.state_dict()) == list(model.state_dict())
    inside = torch.float32 if name == "own" and dtype == torch.float64 else dtype
    tolerance = 8 * torch.finfo(inside).eps
    assert distance(masked(model, masks)(*inputs), small(*inputs)) <= tolerance
    torch.save(small.norm, tmp_path / "norm.pt")
    again = torch.load(tmp_path / "norm.pt", weights_only=False)
    x = small.stem(*inputs)
    assert torch.equal(again(x), small.norm(x))
    assert torch.equal(copy.deepcopy(small)(*inputs), small(*inputs))


@pytest.mark.parametrize(
    "norm",
    [
        nn.GroupNorm(3, 12),
        nn.GroupNorm(12, 12),
        Swapped(12),
        FunctionalOfChannels(12),
        FunctionalOfGroups(1, 12),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_a_norm_of_channels_that_keeps_its_divisor(norm):
    model = Net(
        lambda net, x: net.head(net.norm(net.stem(x))),
        stem=conv(3, 12),
        norm=norm,
        head=conv(12, 4),
    )
    model, inputs = cast(model, image(), torch.float64)
    masks, small, report = shrunk(fill(model, 0), inputs)
    assert report.kind == "module"
    assert small.stem.out_channels < 12
    check_law(model, inputs, masks, small, report.plan)


def test_fused_encoder_layers_do_not_pass_over_the_divisor():
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model = Net(
        lambda net, x: net.head(net.layer(net.stem(x))),
        stem=nn.Linear(6, 16), layer=layer, head=nn.Linear(16, 3),
    )  # fmt: skip
    model, inputs = fill(model, 0).eval(), tokens()
    coupling = ppt.couple(model, *inputs)
    stem = next(f for f in coupling.families if "stem.weight" in {m.path for m in f.axes})
    masks = coupling.masks(stem.units[::2].tolist(), state_of(model))
    found = ppt.shrink(model, masks, coupling, *inputs)
    with torch.no_grad():
        assert distance(masked(model, masks)(*inputs), found.model(*inputs)) <= 1e-5


def test_masks_of_parameters_that_are_not_cut_stay_in_the_own_class():
    model, inputs = built("chain_bn")
    coupling = ppt.couple(model, *inputs)
    masks = coupling.masks(half(coupling), state_of(model))
    masks["head.bias"] = torch.arange(4) > 1
    found = ppt.shrink(model, masks, coupling, *inputs)
    assert found.report.kind == "module"
    assert not found.model.head.bias[:2].any()
    check_law(model, inputs, masks, found.model, found.report.plan)


def test_tables_that_are_in_no_state_dict_are_cut_in_the_own_class():
    """Rotary frequencies belong to positions of heads."""

    class Rotary(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(6, 16), nn.Linear(6, 16)
            self.register_buffer("scale", torch.linspace(1, 2, 16), persistent=False)

        def forward(self, x):
            return (self.q(x) * self.scale) @ (self.k(x) * self.scale).mT

    model, inputs = cast(Rotary(), tokens(), torch.float64)
    masks, small, report = shrunk(fill(model, 0), inputs)
    assert report.kind == "module"
    kept = masks["q.bias"]
    assert torch.equal(small.scale, model.scale[kept])
    assert model.scale.shape == (16,)
    check_law(model, inputs, masks, small, report.plan)


class _Residual(nn.Module):
    """A block that adds to what it is given."""

    def __init__(self, up, down):
        super().__init__()
        self.up, self.down = up, down

    def forward(self, x):
        return x + self.down(self.up(x).relu())


def test_whole_residual_branches_go_and_the_class_stays():
    blocks = [_Residual(nn.Linear(8, 6), nn.Linear(6, 8)) for _ in range(3)]
    model = nn.Sequential(nn.Linear(3, 8), *blocks, nn.Linear(8, 2))
    with torch.no_grad():
        blocks[1].up.weight.mul_(0.1)
    x = torch.randn(2, 3)
    coupling = ppt.couple(model, x)
    rules = [{"sparsity": 0.4, "op_partial_names": ["up"], "units": "branch"}]
    config = pp.resolve(rules, ppt.layers(model), coupling=coupling)
    masks = pp.l1_norm(dict(model.named_parameters()), None, config)
    small = ppt.shrink(model, masks, coupling, x).model
    assert type(small) is nn.Sequential
    assert [tuple(small[i].up.weight.shape) for i in (1, 2, 3)] == [(6, 8), (0, 8), (6, 8)]
    expected = model[0](x)  # by hand: of the second block its last bias is left
    expected = blocks[2](blocks[0](expected) + blocks[1].down.bias)
    torch.testing.assert_close(small(x), model[4](expected))


def test_branches_of_convolutions_are_refused_by_name():
    blocks = [_Residual(nn.Conv2d(8, 6, 1), nn.Conv2d(6, 8, 1)) for _ in range(2)]
    model = nn.Sequential(nn.Conv2d(3, 8, 1), *blocks, nn.Conv2d(8, 2, 1))
    x = torch.randn(1, 3, 4, 4)
    coupling = ppt.couple(model, x)
    rules = [{"sparsity": 0.5, "op_partial_names": ["up"], "units": "branch"}]
    config = pp.resolve(rules, ppt.layers(model), coupling=coupling)
    masks = pp.l1_norm(dict(model.named_parameters()), None, config)
    with pytest.raises(ValueError, match="no convolutions without channels; leave its layers out"):
        ppt.shrink(model, masks, coupling, x)
