import warnings

import jax
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import purepruning as pp
from purepruning.coupling.shrink_report import check_same
from purepruning_interop import torch as ppt
from purepruning_interop.torch.couple import analyse
from tests.coupling.torch_patterns import PATTERNS, Net, cast, conv, fill, image, parameter, tokens
from tests.coupling.torch_traps import TRAPS
from tests.covering import every
from tests.fast import some_key
from tests.interop.torch_law import half, state_of


def families(coupling):
    return {(f.name, f.kind, len(f)) for f in coupling.families}


def frozen_reason(coupling):
    return {(p.path, p.axis): p.reason for p in coupling.frozen}


@pytest.mark.parametrize("pattern", PATTERNS + TRAPS, ids=lambda p: p.name)
def test_every_pattern_has_units_or_none_as_expected(pattern):
    model, inputs = cast(*pattern.build(), torch.float64)
    coupling = ppt.couple(fill(model, seed=0), *inputs)
    if pattern.expect == "exact":
        assert coupling.n_units > 0
    elif pattern.expect.startswith("frozen"):
        assert coupling.n_units == 0


@pytest.mark.parametrize("pattern", every(4, PATTERNS + TRAPS), ids=lambda p: p.name)
def test_another_tracer_finds_the_same(pattern):
    model, inputs = cast(*pattern.build(), torch.float64)
    coupling = ppt.couple(fill(model, seed=0), *inputs)
    exported = analyse(model, inputs, {}, how="exported").coupling
    check_same(exported, coupling)
    assert frozen_reason(exported).keys() == frozen_reason(coupling).keys()


def test_a_model_comes_back_as_it_was():
    model, inputs = image_net(), image()
    model.train()
    model.norm.eval()
    model.a.weight.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    ppt.couple(model, *inputs)
    assert [m.training for m in (model, model.norm, model.head)] == [True, False, True]
    assert [m.weight.requires_grad for m in (model.a, model.head)] == [False, True]
    assert all(p.grad is None for p in model.parameters())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert torch.backends.mha.get_fastpath_enabled()


def image_net():
    return Net(
        lambda net, x: net.head(F.relu(net.norm(net.a(x)))),
        a=conv(3, 8),
        norm=nn.BatchNorm2d(8),
        head=conv(8, 4),
    )


def test_leaves_are_parameters_and_buffers_by_their_names_in_the_state_dict():
    coupling = ppt.couple(image_net(), *image())
    assert set(coupling.leaves) == set(image_net().state_dict())
    (family,) = coupling.families
    assert {(m.path, m.axis, m.role) for m in family.axes} == {
        ("a.weight", 0, "source"),
        ("a.bias", 0, "companion"),
        ("norm.weight", 0, "companion"),
        ("norm.bias", 0, "companion"),
        ("norm.running_mean", 0, "companion"),
        ("norm.running_var", 0, "companion"),
        ("head.weight", 1, "sink"),
    }
    assert frozen_reason(coupling)["head.weight", 0] == "an output"


def test_tied_parameters_are_one_leaf_under_their_first_name():
    net = Net(
        lambda net, x: net.head(F.gelu(net.embed(x))),
        embed=nn.Embedding(11, 8),
        head=nn.Linear(8, 11, bias=False),
    )
    net.head.weight = net.embed.weight
    coupling = ppt.couple(net, torch.tensor([[1, 2, 3]]))
    assert set(coupling.leaves) == {"embed.weight"}
    assert families(coupling) == {("embed.weight[1]", "channel", 8)}
    assert frozen_reason(coupling)["embed.weight", 0] == "looked up by index"


def test_an_operation_without_a_rule_keeps_what_it_reads_and_is_reported():
    net = Net(
        lambda net, x: net.head(torch.linalg.svdvals(net.a(x))),
        a=nn.Linear(6, 4),
        head=nn.Linear(4, 3),
    )
    coupling = ppt.couple(net, *tokens())
    assert coupling.n_units == 0
    assert list(coupling.unknown) == ["_linalg_svd"]
    assert "_linalg_svd" in frozen_reason(coupling)["a.weight", 0]


def test_control_flow_on_data_is_refused_with_the_line():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 6)

        def forward(self, x):
            if x.sum() > 0:  # the line
                return self.a(x)
            return x

    with pytest.raises(ValueError, match=r"Branching.*test_torch_coupling.py.*if x.sum\(\) > 0"):
        ppt.couple(Branching(), *tokens())


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module instance, got function"):
        ppt.couple(lambda x: x, torch.ones(1))


def test_heads_and_positions_are_found_without_hints():
    by_name = {p.name: p for p in PATTERNS}
    kinds = {}
    for name in ("mha_builtin", "attention_gqa", "rope_rotate_half"):
        model, inputs = by_name[name].build()
        kinds[name] = sorted(
            (f.kind, len(f)) for f in ppt.couple(model, *inputs).families if "head" in f.kind
        )
    assert kinds == {
        "mha_builtin": [("head", 4), ("head_position", 4)],
        "attention_gqa": [("head", 2), ("head_position", 4), ("head_position", 4)],
        "rope_rotate_half": [("head", 2), ("head_position", 4), ("head_position", 8)],
    }


def test_kwargs_and_several_outputs():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x, *, scale=None, both=False):
            hidden = F.relu(self.a(x))
            if scale is not None:
                hidden = hidden * scale
            return {"out": self.b(hidden), "hidden": hidden} if both else self.b(hidden)

    model, (x,) = Model(), tokens()
    assert ppt.couple(model, x, scale=torch.ones(())).n_units == 8
    assert ppt.couple(model, x, both=True).n_units == 0


def test_a_buffer_that_is_overwritten_is_as_long_as_what_overwrites_it():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
            self.register_buffer("last", torch.zeros(8))

        def forward(self, x):
            hidden = F.relu(self.a(x))
            self.last.copy_(hidden.mean((0, 1)))
            return self.b(hidden)

    coupling = ppt.couple(Model(), *tokens())
    (family,) = coupling.families
    assert len(family) == 8
    assert "last" in {m.path for m in family.axes}


@pytest.mark.parametrize("kind", ["chain", "groups", "attention"])
def test_twins_in_jax_and_torch_give_the_same_units_masks_and_shapes(kind):
    fn, params, x, model, turn = twins()[kind]
    ours = pp.couple(fn, params, x)
    inputs = torch.from_numpy(np.array(x))
    inputs = inputs.permute(0, 3, 1, 2) if inputs.ndim == 4 else inputs
    theirs = ppt.couple(model, inputs)
    assert sorted((f.kind, len(f)) for f in ours.families) == sorted(
        (f.kind, len(f)) for f in theirs.families
    )
    # A unit of one is the unit of the other that has the same positions of the same parameters.
    twin = {}
    for path, leaf in ours.leaves.items():
        other = theirs.leaves[path]
        for a, units in enumerate(turn(list(leaf.units))):
            assert (units is None) == (other.units[a] is None), (path, a)
            if units is not None and units.shape[-1] == other.units[a].shape[-1] == 1:
                for one, two in zip(units[:, 0], other.units[a][:, 0], strict=True):
                    assert twin.setdefault(int(one), int(two)) == two
    for fam in ours.families:  # of factored axes, in order
        if int(fam.units[0]) not in twin:
            (same,) = (
                f
                for f in theirs.families
                if {m.path for m in f.axes} == {m.path for m in fam.axes} and f.kind == fam.kind
            )
            twin.update(zip(fam.units.tolist(), same.units.tolist(), strict=True))
    assert len(set(twin.values())) == ours.n_units == theirs.n_units
    chosen = half(ours)
    masks = ours.masks(chosen, params)
    masks_torch = theirs.masks([twin[int(u)] for u in chosen], state_of(model))
    small = pp.shrink(fn, params, masks, ours, x)
    small_torch = ppt.shrink(model, masks_torch, theirs, inputs).model
    for path, mask in masks.items():
        if mask is not None:
            full = np.broadcast_to(np.asarray(mask), params[path].shape)
            other = np.broadcast_to(masks_torch[path].numpy(), model.state_dict()[path].shape)
            assert np.array_equal(full.transpose(turn(range(full.ndim))), other)
    for path, array in small.params.items():
        assert tuple(turn(array.shape)) == tuple(small_torch.state_dict()[path].shape)
    found = np.asarray(small.fn(small.params, x))
    other = small_torch(inputs).detach().numpy()
    other = other.transpose(0, 2, 3, 1) if other.ndim == 4 else other
    assert np.abs(found - other).max() <= 1e-4 * np.abs(found).max()


def twins():
    """Pairs of models: a function of flat parameters, and a torch module with the same weights."""
    import jax.numpy as jnp

    def lax_conv(x, w, groups=1):
        return jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )  # fmt: skip

    key = some_key()
    w = lambda *shape: jax.random.normal(key, shape)  # noqa: E731

    def chain(p, x):
        x = jax.nn.relu(lax_conv(x, p["a"]))
        x = x + lax_conv(jax.nn.relu(lax_conv(x, p["b"])), p["c"])
        return jnp.mean(x, (1, 2)) @ p["head"]

    def groups(p, x):
        x = jax.nn.relu(lax_conv(x, p["a"]))
        n, h, v, c = x.shape
        split = x.reshape(n, h, v, 3, c // 3)
        mean = split.mean((1, 2, 4), keepdims=True)
        var = ((split - mean) ** 2).mean((1, 2, 4), keepdims=True)
        x = ((split - mean) * jax.lax.rsqrt(var + 1e-5)).reshape(x.shape)
        x = x * p["scale"][None, None, None] + p["shift"][None, None, None]
        return lax_conv(x, p["head"])

    def attention(p, x):
        def heads(t):
            return t.reshape(*t.shape[:2], 4, 4)

        x = x @ p["stem"]
        q, k, v = (heads(x @ p[name]) for name in ("q", "k", "v"))
        shares = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k) / 2, -1)
        mixed = jnp.einsum("bhts,bshd->bthd", shares, v).reshape(x.shape)
        return (x + mixed @ p["out"]) @ p["head"]

    def torch_net(run, params, image):
        net = Net(run)
        for name, array in params.items():
            value = torch.from_numpy(np.array(array))
            if image and value.ndim == 4:
                value = value.permute(3, 2, 0, 1)
            elif value.ndim == 2:
                value = value.T
            net.register_parameter(name, nn.Parameter(value.contiguous()))
        return net

    def torch_chain(net, x):
        x = F.relu(F.conv2d(x, net.a, padding=1))
        x = x + F.conv2d(F.relu(F.conv2d(x, net.b, padding=1)), net.c, padding=1)
        return F.linear(x.mean((2, 3)), net.head)

    def torch_groups(net, x):
        x = F.group_norm(F.relu(F.conv2d(x, net.a, padding=1)), 3, net.scale, net.shift)
        return F.conv2d(x, net.head, padding=1)

    def torch_attention(net, x):
        x = F.linear(x, net.stem)
        q, k, v = (
            F.linear(x, getattr(net, n)).view(*x.shape[:2], 4, 4).transpose(1, 2) for n in "qkv"
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return F.linear(x + F.linear(mixed, net.out), net.head)

    def turn(axes):
        order = {4: [3, 2, 0, 1], 2: [1, 0], 1: [0]}[len(axes)]
        return [axes[a] for a in order]

    def entry(fn, run, params, x):
        return fn, params, x, torch_net(run, params, True), turn

    chain_params = {"a": w(3, 3, 3, 8), "b": w(3, 3, 8, 6), "c": w(3, 3, 6, 8), "head": w(8, 4)}
    group_params = {"a": w(3, 3, 3, 12), "scale": w(12), "shift": w(12), "head": w(3, 3, 12, 4)}
    names = ("stem", "q", "k", "v", "out", "head")
    sizes = [(6, 16), (16, 16), (16, 16), (16, 16), (16, 16), (16, 4)]
    heads_params = {name: w(*size) for name, size in zip(names, sizes, strict=True)}
    return {
        "chain": entry(chain, torch_chain, chain_params, jnp.ones((2, 8, 8, 3))),
        "groups": entry(groups, torch_groups, group_params, jnp.ones((2, 8, 8, 3))),
        "attention": entry(attention, torch_attention, heads_params, w(2, 5, 6)),
    }


def test_counts_are_those_of_a_hand_calculation():
    model = Net(
        lambda net, x: net.head(F.relu(net.norm(net.a(x))).mean((2, 3))) @ net.mix,
        a=conv(3, 8),
        norm=nn.BatchNorm2d(8),
        head=nn.Linear(8, 4),
        mix=parameter(4, 2),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = ppt.count(model, *image())
    rows = {x.name: (x.params, x.macs, x.activation_bytes) for x in found.layers}
    assert rows == {
        "a": (3 * 8 * 9 + 8, 2 * 64 * 8 * 27, 2 * 64 * 8 * 4),
        "head": (36, 2 * 8 * 4, 2 * 4 * 4),
        "mix": (8, 2 * 4 * 2, 2 * 2 * 4),
        "norm": (16, 0, 0),
    }
    assert found.params == sum(p.numel() for p in model.parameters())


class CutByData(nn.Module):
    """Takes as many of the channels of one layer as an input says."""

    def __init__(self):
        super().__init__()
        self.cut, self.hidden = nn.Linear(4, 6), nn.Linear(4, 5)
        self.out = nn.Linear(5, 2)

    def forward(self, x, n):
        taken = self.cut(x)[:, : n.item()].sum(1, keepdim=True)
        return taken + self.out(self.hidden(x).relu())


def test_a_part_whose_size_depends_on_data_keeps_what_it_is_taken_from():
    model, x, n = CutByData(), torch.randn(2, 4), torch.tensor(3)
    coupling = ppt.couple(model, x, n)
    assert "size depends on data" in frozen_reason(coupling)["cut.weight", 0]
    rules = [{"sparsity": 0.5, "op_types": ["Linear"]}]
    config = pp.resolve(rules, ppt.layers(model), coupling=coupling)
    masks = pp.l1_norm(dict(model.named_parameters()), None, config)
    small = ppt.shrink(model, masks, coupling, x, n)
    assert small.model.hidden.weight.shape == (3, 4)
    for n in (torch.tensor(3), torch.tensor(5)):
        masked = ppt.masked_call(model, small.report.masks, x, n)
        torch.testing.assert_close(small.model(x, n), masked)


def test_what_torch_cannot_take_apart_is_refused():
    """It writes into tensors that it passes by keyword."""
    model = nn.Sequential(conv(3, 8), nn.CrossMapLRN2d(3), conv(8, 4))
    with pytest.raises(ValueError, match=r"torch.export cannot read Sequential"):
        ppt.couple(model, *image())


def test_a_result_that_is_passed_by_keyword_is_written_to():

    def forward(net, x):
        hidden = net.a(x)
        with torch.no_grad():
            doubled = torch.mul(hidden, 2.0, out=torch.zeros_like(hidden))
        return net.b(doubled + hidden)

    model = Net(forward, a=nn.Linear(6, 8), b=nn.Linear(8, 3))
    assert ppt.couple(model, *tokens()).n_units == 8


def test_a_fourier_transform_keeps_its_own_axes_alone():
    def units(dim):
        model = Net(
            lambda net, x: net.head(torch.fft.fft(net.stem(x), dim=dim).real),
            stem=nn.Linear(6, 8),
            head=nn.Linear(8, 4),
        )
        return ppt.couple(model.eval(), *tokens()).n_units

    assert (units(1), units(-1)) == (8, 0)


def test_tables_of_a_model_of_shapes_are_known():
    def run(net, x):
        places = torch.arange(4, device=x.device)
        return net.head(net.a(x)[:, torch.cat([places, places + 4])])

    with torch.device("meta"):
        net = Net(run, a=nn.Linear(3, 16), head=nn.Linear(8, 2))
        found = ppt.couple(net, torch.ones(2, 3))
    assert [len(family) for family in found.families] == [8, 8]  # read by the head, and by none
