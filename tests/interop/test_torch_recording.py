"""A module is read by recording one call; what is out of the ordinary is left to export."""

import copy
import dataclasses
import functools
import random
import sys
from collections import OrderedDict, deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as hooks
from torch.utils import _pytree as pytree

from purepruning.coupling.shrink_report import check_same
from purepruning_interop import torch as ppt
from purepruning_interop.torch.couple import analyse
from purepruning_interop.torch.program import base_name
from purepruning_interop.torch.results import plain
from purepruning_interop.torch.rules.table import known_operators
from purepruning_interop.torch.tracing.record import record
from tests.coupling.torch_patterns import Net, conv, image


def recorded(model, *inputs, **kwargs):
    return record(model.eval(), inputs, kwargs, known_operators())


def operations(source):
    return [base_name(n.target) for n in source.root.graph.nodes if n.op == "call_function"]


def two_layers(forward):
    return Net(forward, a=nn.Linear(4, 8), b=nn.Linear(8, 2))


def test_operations_are_those_that_the_module_calls():
    model = Net(
        lambda net, x: net.head(F.relu(net.norm(net.a(x))).mean((2, 3))),
        a=conv(3, 8),
        norm=nn.BatchNorm2d(8),
        head=nn.Linear(8, 2),
    )
    source = recorded(model, *image())
    assert operations(source) == ["conv2d", "batch_norm", "relu", "mean", "linear"]
    assert sorted(source.state.values()) == sorted(
        k for k in model.state_dict() if "batches" not in k
    )
    assert not source.constants


def test_scopes_are_the_modules_that_call():
    model = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 2)))
    source = recorded(model, torch.ones(1, 4))
    calls = [n for n in source.root.graph.nodes if n.op == "call_function"]
    assert [n.meta["nn_module_stack"][""][0] for n in calls] == ["0", "1.0", "1.1"]


def test_an_operation_without_a_rule_is_recorded_in_parts():
    model = two_layers(lambda net, x: net.b(net.a(x)) * F.cosine_similarity(x, x)[:, None])
    assert "cosine_similarity" not in operations(recorded(model, torch.ones(2, 4)))


def test_tensors_that_belong_to_nobody_are_constants():
    table = torch.arange(8.0)
    model = two_layers(lambda net, x: net.b(net.a(x) * table))
    (found,) = recorded(model, torch.ones(2, 4)).constants.values()
    assert found is table


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(4, 6, 3), (2, 4, 9)),
        (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (2, 4, 9, 8)),
        (nn.Conv2d(4, 6, 3, groups=2, padding="same", bias=False), (2, 4, 9, 8)),
        (nn.Conv2d(4, 6, 3), (4, 9, 8)),
        (nn.Conv3d(4, 8, 2, groups=4, padding=1, stride=2), (1, 4, 5, 6, 7)),
        (nn.BatchNorm2d(4), (2, 4, 3, 3)),
        (nn.LayerNorm((4, 3)), (2, 4, 3)),
        (nn.GroupNorm(2, 4), (2, 4, 3)),
        (nn.Hardswish(), (2, 4)),
    ],
    ids=str,
)
def test_shapes_are_those_that_torch_computes(layer, shape):
    x = torch.ones(shape)
    expected = layer.eval()(x)
    found = [n for n in recorded(layer, x).root.graph.nodes if n.op == "call_function"][-1]
    value = found.meta["val"]
    assert (value.shape, value.stride()) == (expected.shape, expected.stride())
    assert value.dtype is expected.dtype


def test_a_convolution_of_other_channels_is_refused():
    assert recorded(nn.Conv2d(4, 6, 3), torch.ones(1, 3, 8, 8)) is None


def test_new_tensors_are_on_the_device_of_the_inputs():
    model = two_layers(lambda net, x: net.b(net.a(x)) * torch.arange(2, device=x.device))
    (made,) = [n for n in recorded(model, torch.ones(1, 4)).root.graph.nodes if "arange" in n.name]
    assert made.kwargs["device"] == torch.device("cpu")


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x, *, more):
        return {"y": self.b(self.a(x["x"]) + more[0])}


def test_arguments_of_any_nesting():
    inputs, more = {"x": torch.ones(2, 4)}, (torch.ones(2, 1), None)
    source = recorded(Nested(), inputs, more=more)
    assert len(source.given) == 3
    assert len(source.outputs) == 1
    assert ppt.couple(Nested(), inputs, more=more).n_units == 8


def stores_a_tensor(net, x):
    net.seen = net.a(x)
    return net.b(net.seen)


def fills_a_list(net, x):
    net.seen.append(net.a(x))
    return net.b(net.seen[-1])


def replaces_a_buffer(net, x):
    net.seen = net.seen + 1
    return net.b(net.a(x)) * net.seen


def counts_calls(net, x):
    net.seen += 1
    return net.b(net.a(x))


@pytest.mark.parametrize(
    ("forward", "seen"),
    [(stores_a_tensor, None), (fills_a_list, []), (counts_calls, 0)],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_what_a_forward_leaves_behind_is_undone(forward, seen):
    model = two_layers(forward)
    model.seen = seen
    exported = forward is not counts_calls  # what that leaves behind is no tensor without values
    assert (recorded(model, torch.ones(2, 4)) is None) == exported
    assert model.seen is seen
    assert not seen
    assert ppt.couple(model, torch.ones(2, 4)).n_units == 8


def test_a_buffer_that_is_replaced_comes_back():
    model = two_layers(replaces_a_buffer)
    buffer = torch.zeros(2)
    model.register_buffer("seen", buffer)
    assert recorded(model, torch.ones(2, 4)) is None
    assert model.seen is buffer
    assert torch.equal(buffer, torch.zeros(2))


def test_a_buffer_that_is_written_to_comes_back():
    def forward(net, x):
        net.seen.add_(1)
        return net.b(net.a(x)) * net.seen

    model = two_layers(forward)
    model.register_buffer("seen", torch.zeros(2))
    assert recorded(model, torch.ones(2, 4)) is None
    assert torch.equal(model.seen, torch.zeros(2))


def test_the_memory_of_a_parameter_under_another_name_is_no_constant():
    model = two_layers(lambda net, x: net.b(F.linear(x, net.a.weight.data, net.a.bias)))
    assert sorted(recorded(model, torch.ones(2, 4)).state.values())[0] == "a.bias"
    assert ppt.couple(model, torch.ones(2, 4)).n_units == 8


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: net.b(net.a(x) if x.sum() > 0 else -net.a(x)),
        lambda net, x: net.b(net.a(x)) * float(net.a.bias.max()),
        lambda net, x: net.b(net.a(x))[x[:, 0].nonzero()],
        lambda net, x: net.b(net.a(x)) + torch.from_numpy(net.a.bias.detach().numpy())[:2],
    ],
)
def test_values_cannot_be_asked_for(forward):
    assert recorded(two_layers(forward), torch.ones(2, 4)) is None


def test_nothing_stays_switched_on():
    before = len(hooks._global_forward_hooks), len(hooks._global_forward_pre_hooks)
    for width in (4, 5):  # the second fails
        found = recorded(two_layers(lambda net, x: net.b(net.a(x))), torch.ones(2, width))
        assert (found is None) == (width == 5)
    assert (len(hooks._global_forward_hooks), len(hooks._global_forward_pre_hooks)) == before
    assert not torch.is_inference_mode_enabled()
    assert torch.ones(1).item() == 1


def test_random_numbers_are_not_drawn():
    model = two_layers(lambda net, x: net.b(net.a(x) + torch.rand(8)))
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    ppt.couple(model, torch.ones(2, 4))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    "seen", [{"k": []}, OrderedDict(), deque(), SimpleNamespace(x=None)], ids=str
)
def test_containers_and_objects_come_back(seen):
    def forward(net, x):
        y = net.a(x)
        if isinstance(net.seen, deque):
            net.seen.append(y)
        elif isinstance(net.seen, OrderedDict):
            net.seen["y"] = y
        elif isinstance(net.seen, dict):
            net.seen["k"].append(y)
        else:
            net.seen.x = y
        return net.b(y)

    model = two_layers(forward)
    model.seen, before = seen, copy.deepcopy(seen)
    assert recorded(model, torch.ones(2, 4)) is None
    assert model.seen is seen
    assert seen == before


def test_a_hook_that_removes_itself_comes_back():
    model = two_layers(lambda net, x: net.b(net.a(x)))
    handle = model.a.register_forward_pre_hook(lambda *_: handle.remove())
    assert recorded(model, torch.ones(2, 4)) is not None
    assert len(model.a._forward_pre_hooks) == 1


def freezes(net, x):
    net.a.weight.requires_grad_(False)
    return net.b(net.a(x))


def replaces_the_data(net, x):
    net.b.bias.data = net.seen
    return net.b(net.a(x))


def drops_gradients(net, x):
    net.zero_grad()
    return net.b(net.a(x))


@pytest.mark.parametrize("forward", [freezes, replaces_the_data, drops_gradients])
def test_parameters_stay_as_they_are(forward):
    model = two_layers(forward)
    model.register_buffer("seen", torch.ones(2))
    gradient = model.a.weight.grad = torch.ones(8, 4)
    memory = model.b.bias.data_ptr()
    assert recorded(model, torch.ones(2, 4)) is None
    assert model.a.weight.requires_grad
    assert model.a.weight.grad is gradient
    assert model.b.bias.data_ptr() == memory


def catches(ask):
    """A module that goes another way whatever is raised, as careless code does."""

    def forward(net, x):
        try:
            ask(net, x)
        except Exception:
            return net.b(net.a(x).flip(1))
        return net.b(net.a(x))

    return forward


@pytest.mark.parametrize(
    "ask",
    [
        lambda net, x: int(x.sum()),
        lambda net, x: x.numpy(),
        lambda net, x: net.seen.add_(1),
        lambda net, x: x.tolist(),
    ],
)
def test_a_module_cannot_hide_what_it_asked(ask):
    model = two_layers(catches(ask))
    model.register_buffer("seen", torch.ones(2))
    assert recorded(model, torch.ones(2, 4)) is None


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: net.b(net.a(x)) * torch.from_numpy(net.seen.numpy()),
        lambda net, x: net.b(net.a(x)) * (x.data_ptr() == net.a(x).data_ptr()),
        lambda net, x: net.b(net.a(x) if net.a(x).requires_grad else net.a(x).flip(1)),
    ],
)
def test_memory_and_gradients_cannot_be_asked_for(forward):
    model = two_layers(forward)
    model.register_buffer("seen", torch.ones(2))
    assert recorded(model, torch.ones(2, 4)) is None


@pytest.mark.parametrize(
    "right",
    [
        lambda x: x.device.type == "cpu",
        lambda x: x.is_cpu and not x.is_meta and not x.is_cuda,
        lambda x: torch.is_grad_enabled(),
    ],
)
def test_a_module_that_asks_where_it_is_goes_the_way_it_goes(right):
    model = two_layers(lambda net, x: net.b(net.a(x) if right(x) and right(net.a(x)) else x))
    source = recorded(model, torch.ones(2, 4))
    assert operations(source)[-2:] == ["linear", "linear"]


def test_types_that_depend_on_the_device_are_left_to_export():
    def forward(net, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = net.a(x)
        return net.b(y.float() if y.dtype == torch.bfloat16 else y.flip(1))

    assert recorded(two_layers(forward), torch.ones(2, 4)) is None


def test_views_cannot_be_asked_what_they_are_of():
    model = two_layers(lambda net, x: net.b(net.a(x)[:1] if net.a(x)[:1]._is_view() else x))
    assert recorded(model, torch.ones(2, 4)) is None


def test_an_argument_that_is_given_twice_is_one_tensor():
    model = two_layers(lambda net, x, y: net.b(net.a(x)) if x is y else x)
    x = torch.ones(2, 4)
    assert operations(recorded(model, x, x)) == ["linear", "linear"]


def test_arguments_in_objects_that_nobody_knows_are_left_to_export():
    given = two_layers(lambda net, x: net.b(net.a(x.x)))
    assert recorded(given, SimpleNamespace(x=torch.ones(2, 4))) is None


@dataclasses.dataclass
class Output:
    y: torch.Tensor
    past: Any = None


class KeyCache:
    """As those of transformers: torch cannot flatten it."""

    def __init__(self, keys):
        self.keys = keys


def in_an_object(net, x):
    return SimpleNamespace(y=net.b(net.a(x)))


def in_a_dataclass(net, x):
    return Output(net.b(net.a(x)))


def beside_a_cache(net, x):
    h = net.a(x)
    return Output(net.b(h), KeyCache([h]))


def in_a_tuple_with_a_cache(net, x):
    h = net.a(x)
    return net.b(h), KeyCache([h]), 7


@pytest.mark.parametrize("graph", [False, True], ids=["own class", "graph"])
@pytest.mark.parametrize(
    "forward", [in_an_object, in_a_dataclass, beside_a_cache, in_a_tuple_with_a_cache]
)
def test_results_of_any_kind_pass_and_stay_whole(forward, graph, monkeypatch):
    """What a cache holds is no result: it shrinks with its keys."""
    model, x = two_layers(forward), torch.randn(2, 4)
    coupling = ppt.couple(model, x)
    assert [[m.path for m in f.axes] for f in coupling.families] == [
        ["a.bias", "a.weight", "b.weight"]
    ]
    masks = coupling.masks([1, 2, 3, 4], dict(model.named_parameters()))
    if graph:
        shrink = sys.modules[ppt.shrink.__module__]
        monkeypatch.setattr(shrink, "cut_modules", lambda *_: 1 / 0)
    found = ppt.shrink(model, masks, coupling, x)
    assert found.report.kind == ("graph" if graph else "module")
    assert found.report.deviation < 1e-10
    y = pytree.tree_leaves(plain(found.model(x)))[0]
    assert y.shape == (2, 2)
    assert "forward" not in vars(model)


@functools.cache
def table(length):
    return torch.arange(length * 8.0).view(length, 8).sin()


@functools.cache
def scaled_table(length):
    return table(length) * 2


def keeps_a_table(net, x):
    if x.shape[0] not in net.seen:
        net.seen[x.shape[0]] = torch.ones(x.shape[0], x.shape[0]).tril()
    return net.b(net.seen[x.shape[0]] @ (net.a(x) + scaled_table(x.shape[0])))


@pytest.mark.parametrize("graph", [False, True], ids=["own class", "graph"])
def test_what_functions_and_modules_keep_has_values(graph, monkeypatch):
    model, x = two_layers(keeps_a_table), torch.randn(3, 4)
    table.cache_clear()
    scaled_table.cache_clear()
    model.seen = {}
    coupling = ppt.couple(model, x)
    assert model.seen == {}
    model(x).sum().backward()
    masks = coupling.masks([1, 2, 3, 4], dict(model.named_parameters()))
    if graph:
        shrink = sys.modules[ppt.shrink.__module__]
        monkeypatch.setattr(shrink, "cut_modules", lambda *_: 1 / 0)
    table.cache_clear()
    scaled_table.cache_clear()
    ppt.shrink(model, masks, coupling, x)
    assert type(table(3)) is torch.Tensor
    assert torch.equal(table(3), torch.arange(24.0).view(3, 8).sin())
    model(x).sum().backward()


def written_in_parts(net, x):
    h = net.a(x)
    made = torch.zeros(x.shape[0], 8)
    made[:, :3] = h[:, :3]
    made[:, 3:] = h[:, 3:]
    count = torch.zeros(2)
    count[1] = 3
    if count.sum().item() > 2 and made.shape[0] == 2:
        made = made * 2
    return net.b(made)


def test_constants_have_values_until_something_unknown_is_written_to_them():
    model = two_layers(written_in_parts)
    assert recorded(model, torch.ones(2, 4)) is not None
    coupling = ppt.couple(model, torch.ones(2, 4))
    assert coupling.n_units == 8
    asks = two_layers(lambda net, x: net.b(net.a(x)) if zeros_with(x).sum() > 0 else x)
    assert recorded(asks, torch.ones(2, 4)) is None


def zeros_with(x):
    made = torch.zeros(4)
    made[:] = x[0]
    return made


def test_couple_leaves_random_numbers_and_flags_as_they_were():
    drawn = np.random.mtrand._rand  # what functions of numpy.random draw from
    model = two_layers(lambda net, x: net.b(net.a(x) * drawn.rand()) + torch.rand(2))
    before = drawn.get_state()[1].copy(), torch.get_rng_state()
    flags = torch.backends.mha.get_fastpath_enabled(), torch.compiler.is_compiling()
    ppt.couple(model, torch.ones(2, 4))
    assert np.array_equal(drawn.get_state()[1], before[0])
    assert torch.equal(torch.get_rng_state(), before[1])
    with pytest.raises(ValueError, match="cannot read"):
        ppt.couple(two_layers(lambda net, x: net.b(x)), torch.ones(2, 4))
    assert flags == (torch.backends.mha.get_fastpath_enabled(), torch.compiler.is_compiling())


def test_lists_index_as_tensors_do():
    model = two_layers(lambda net, x: net.b(net.a(x)[:, [7, 0, 1, 2, 3, 4, 5, 6]]))
    assert recorded(model, torch.ones(2, 4)) is not None
    assert ppt.couple(model, torch.ones(2, 4)).n_units == 8


def test_a_sparse_buffer_is_left_to_export():
    model = two_layers(lambda net, x: net.b(net.a(x)))
    model.register_buffer("seen", torch.eye(3).to_sparse())
    assert recorded(model, torch.ones(2, 4)) is None


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm1d(4), nn.LayerNorm(4), nn.GroupNorm(3, 9), nn.GroupNorm(2, 4)], ids=str
)
def test_a_norm_of_other_channels_is_refused(layer):
    assert recorded(layer, torch.ones(2, 8)) is None


def test_a_bias_of_other_channels_is_refused():
    model = Net(lambda net, x: F.conv2d(x, net.a, net.b), a=torch.ones(8, 3, 3, 3), b=torch.ones(4))
    assert recorded(model, *image()) is None


def test_random_numbers_continue_where_they_were():
    def forward(net, x):
        torch.manual_seed(0)
        random.seed(0)
        return net.b(net.a(x))

    model = two_layers(forward)
    states = torch.get_rng_state(), random.getstate()
    ppt.couple(model, torch.ones(2, 4))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


def test_a_parameter_that_is_not_read_is_the_same_to_both():
    model = two_layers(lambda net, x: net.b(net.a(x)))
    model.spare = nn.Linear(5, 6)
    inputs = (torch.ones(2, 4),)
    coupling = ppt.couple(model, *inputs)
    assert {p.path: p.reason for p in coupling.frozen}["spare.weight"] == "not used"
    check_same(analyse(model, inputs, {}, how="exported").coupling, coupling)
