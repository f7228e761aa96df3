"""Operators that channels go through, though they write by index, draw, round or choose."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from purepruning_interop import torch as ppt
from tests.coupling.torch_patterns import Net, fill
from tests.interop.torch_law import check_law, distance, half, masked, state_of

ROWS = torch.tensor([0, 2, 2, 1, 0, 3])


def zeros(h):
    return h.new_zeros(4, h.shape[1])


def rows(h):
    return ROWS[:, None].expand(-1, h.shape[1])


OPERATORS = {
    "index_add": lambda h: zeros(h).index_add(0, ROWS, h),
    "index_add_": lambda h: zeros(h).index_add_(0, ROWS, h),
    "index_copy": lambda h: h.index_copy(0, ROWS[:3], h[3:]),
    "scatter_add": lambda h: zeros(h).scatter_add(0, rows(h), h),
    "scatter_add of expand_as": lambda h: zeros(h).scatter_add(0, ROWS[:, None].expand_as(h), h),
    "scatter_reduce": lambda h: zeros(h).scatter_reduce(0, rows(h), h, "mean", include_self=False),
    "scatter_reduce of maxima": lambda h: zeros(h).scatter_reduce(0, rows(h), h, "amax"),
    "scatter": lambda h: h.scatter(0, rows(h)[:3], h[3:]),
    "fake_quantize": lambda h: torch.fake_quantize_per_tensor_affine(h, 0.1, 3, 0, 255),
    "rrelu": lambda h: F.rrelu(h, training=False),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_channels_go_through_an_operator(name):
    run = OPERATORS[name]
    model = Net(lambda net, x: net.b(run(net.a(x))), a=nn.Linear(5, 8), b=nn.Linear(8, 3))
    dtype = torch.float32 if name == "fake_quantize" else torch.float64
    model, x = fill(model, 0).to(dtype).eval(), torch.randn(6, 5, dtype=dtype)
    coupling = ppt.couple(model, x)
    assert not coupling.unknown
    assert coupling.n_units == 8
    masks = coupling.masks(half(coupling), state_of(model))
    found = ppt.shrink(model, masks, coupling, x)
    assert found.model.a.out_features == 4
    check_law(model, (x,), masks, found.model, found.report.plan, 8 * torch.finfo(dtype).eps)


def test_a_scale_for_each_channel_goes_with_it():
    class Quantised(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)
            self.register_buffer("scale", torch.linspace(0.1, 0.2, 8))
            self.register_buffer("zero_point", torch.zeros(8))

        def forward(self, x):
            weight = torch.fake_quantize_per_channel_affine(
                self.a.weight, self.scale, self.zero_point, 0, -128, 127
            )
            return self.b(F.linear(x, weight, self.a.bias))

    model, x = fill(Quantised(), 0).eval(), torch.randn(6, 5)
    with torch.no_grad():
        model.scale.copy_(torch.linspace(0.1, 0.2, 8))
        model.zero_point.zero_()
    coupling = ppt.couple(model, x)
    assert coupling.n_units == 8
    masks = coupling.masks(half(coupling), state_of(model))
    masks = {k: m for k, m in masks.items() if k not in ("scale", "zero_point")}
    small = ppt.shrink(model, masks, coupling, x).model
    assert small.scale.shape == (4,)
    assert distance(masked(model, masks)(x), small(x)) <= 1e-6


class Observed(nn.Module):
    """What ``prepare_qat`` makes quantise weights and activations, by ranges that it observes."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3)
        self.c = nn.Linear(6, 4)

    def forward(self, x):
        x = self.b(torch.relu(self.norm(self.a(x))))
        return self.c(torch.relu(x).mean((2, 3)))


@pytest.mark.filterwarnings("ignore")  # torch's, about what comes after torch.ao
@pytest.mark.parametrize(
    ("backend", "frozen"),
    [
        ("fbgemm", True),
        ("per tensor", False),
        pytest.param("fbgemm", False, marks=pytest.mark.full),
        pytest.param("per tensor", True, marks=pytest.mark.full),
    ],
)
def test_modules_of_torch_ao_shrink_after_training(backend, frozen):
    """Scales, zero points (integers) and ranges of channels go with them."""
    ao = torch.ao.quantization
    torch.manual_seed(0)
    model = Observed().train()
    model.qconfig = {
        "fbgemm": ao.get_default_qat_qconfig("fbgemm"),
        "per tensor": ao.QConfig(ao.default_fused_act_fake_quant, ao.default_fused_wt_fake_quant),
    }[backend]
    model, x = ao.prepare_qat(model), torch.randn(4, 3, 8, 8)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        sgd.zero_grad()
        model(x).square().sum().backward()
        sgd.step()
    if frozen:
        model.apply(ao.disable_observer)
    model.eval()
    coupling = ppt.couple(model, x)
    assert not coupling.unknown
    assert sorted(len(f) for f in coupling.families) == [6, 8]
    masks = coupling.masks(half(coupling), state_of(model))
    masks = {k: m for k, m in masks.items() if "fake_quant" not in k and "process" not in k}
    found = ppt.shrink(model, masks, coupling, x)
    small = found.model.state_dict()
    assert (len(small["a.weight"]), len(small["b.weight"])) == (4, 3)
    if backend == "fbgemm":
        for name in ("scale", "zero_point"):
            assert small[f"a.weight_fake_quant.{name}"].shape == (4,)
    # A sum that is added up in another order may be rounded to the next level.
    step = float(model.c.activation_post_process.scale)
    assert (masked(model, masks)(x) - found.model(x)).abs().max() <= 1.5 * step
    assert (masked(model, masks)(x) - model(x)).abs().max() > 10 * step


def test_noise_times_a_parameter_does_not_pin_channels():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)
            self.size = nn.Parameter(torch.rand(8))

        def forward(self, x):
            h = self.a(x)
            return self.b(h + torch.randn_like(h) * self.size)

    model, x = Noisy(), torch.randn(6, 5)
    coupling = ppt.couple(model, x)
    assert coupling.n_units == 8
    small = ppt.shrink(model, coupling.masks([1, 2, 3], state_of(model)), coupling, x).model
    assert small.size.shape == (5,)
    assert small(x).shape == (6, 3)


def test_experts_by_grouped_products():
    """Rows are sorted by expert; the hidden width of all experts is one."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
            self.up = nn.Parameter(torch.randn(2, 8, 16))
            self.down = nn.Parameter(torch.randn(2, 16, 8))
            self.register_buffer("ends", torch.tensor([8, 16], dtype=torch.int32))

        def forward(self, x):
            h = self.stem(x)
            y = torch._grouped_mm(h, self.up, self.ends).relu()
            return self.head(h + torch._grouped_mm(y, self.down, self.ends))

    model = fill(Experts(), 0).bfloat16().eval()
    x = torch.randn(16, 5).bfloat16()
    coupling = ppt.couple(model, x)
    assert not coupling.unknown
    inner = next(f for f in coupling.families if len(f) == 16)
    assert {m.path for m in inner.axes} == {"up", "down"}
    masks = coupling.masks(inner.units[:8].tolist(), state_of(model))
    small = ppt.shrink(model, masks, coupling, x).model
    assert small.up.shape == (2, 8, 8)
    assert distance(masked(model, masks)(x), small(x)) <= 0.05


def test_an_embedding_with_a_largest_norm_loses_columns():
    model = Net(
        lambda net, i: net.head(net.embed(i)),
        embed=nn.Embedding(10, 16, max_norm=1.0),
        head=nn.Linear(16, 3),
    )
    model, i = fill(model, 0).double().eval(), torch.tensor([1, 2, 3])
    coupling = ppt.couple(model, i)
    assert coupling.n_units == 16
    masks = coupling.masks(half(coupling), state_of(model))
    small = ppt.shrink(model, masks, coupling, i).model
    assert small.embed.embedding_dim == 8
    with torch.no_grad():
        assert distance(masked(model, masks)(i), small(i)) <= 1e-12


def test_a_grid_for_each_head_goes_with_it():
    def run(net, x):
        values = net.v(x).view(2, 4, 4, 6, 6).flatten(0, 1)
        grids = net.g(x).view(2, 4, 2, 6, 6).flatten(0, 1).permute(0, 2, 3, 1)
        return net.head(F.grid_sample(values, grids.tanh(), align_corners=False).view(2, 16, 6, 6))

    model = Net(run, v=nn.Conv2d(3, 16, 1), g=nn.Conv2d(3, 8, 1), head=nn.Conv2d(16, 3, 1))
    model, x = fill(model, 0).double().eval(), torch.randn(2, 3, 6, 6).double()
    coupling = ppt.couple(model, x)
    masks = coupling.masks(half(coupling), state_of(model))
    found = ppt.shrink(model, masks, coupling, x)
    assert found.report.params[1] < 0.6 * found.report.params[0]
    check_law(model, (x,), masks, found.model, found.report.plan, 1e-10)


def test_a_part_whose_size_depends_on_data_may_be_joined():
    model = Net(
        lambda net, x: net.b(torch.cat([net.a(x)[x[:, 0] > 0], net.a(x)])),
        a=nn.Linear(5, 8),
        b=nn.Linear(8, 3),
    )
    model, x = fill(model, 0).double().eval(), torch.randn(6, 5, dtype=torch.float64)
    coupling = ppt.couple(model, x)
    assert not coupling.unknown
    masks = coupling.masks(half(coupling), state_of(model))
    found = ppt.shrink(model, masks, coupling, x)
    assert found.model.a.out_features == 4
    check_law(model, (x,), masks, found.model, found.report.plan)
    check_law(model, (-x,), masks, found.model, found.report.plan)
