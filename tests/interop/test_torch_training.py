"""Training pruned torch modules; expected values are worked out by hand."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from purepruning_interop.torch import apply_, keep_pruned, masked_call

T, F = True, False


def make(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.GELU(), nn.Linear(4, 2))


MASKS = {
    "0.weight": torch.tensor([[T], [F], [T], [F]]),
    "0.bias": torch.tensor([T, F, T, F]),
    "3.weight": torch.tensor([[T, F, F, T], [F, T, T, F]]),
}
PRUNED = {name: ~mask for name, mask in MASKS.items()}


def inputs():
    return torch.randn(16, 3, generator=torch.Generator().manual_seed(1))


def step(model, optimizer):
    optimizer.zero_grad()
    ((model(inputs()) - 1) ** 2).sum().backward()
    optimizer.step()


def at_pruned(tensors):
    """The values at pruned places, of tensors by parameter name."""
    return {
        name: tensors[name].detach()[pruned.expand_as(tensors[name])]
        for name, pruned in PRUNED.items()
    }


def assert_pruned(model):
    params = dict(model.named_parameters())
    assert not any(x.any() for x in at_pruned(params).values())
    for name, pruned in PRUNED.items():
        assert params[name][~pruned.expand_as(params[name])].all()


# Masked calls.


def test_masked_call_computes_with_zeros():
    # [[1, 2], [3, 4]] without 2 and 3, at (5, 7), plus biases (1, 0).
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        model.bias.copy_(torch.tensor([1.0, 8.0]))
    masks = {"weight": torch.tensor([[T, F], [F, T]]), "bias": torch.tensor([T, F])}
    assert masked_call(model, masks, torch.tensor([5.0, 7.0])).tolist() == [6, 28]
    assert masked_call(model, masks, input=torch.tensor([5.0, 7.0])).tolist() == [6, 28]
    assert model.weight.tolist() == [[1, 2], [3, 4]]  # undamaged
    with torch.no_grad():
        model.weight[0, 1] = torch.nan
    assert masked_call(model, masks, torch.tensor([5.0, 7.0])).tolist() == [6, 28]


def test_gradients_of_pruned_weights_are_zero():
    model = make()
    masked_call(model, MASKS, inputs()).square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert not any(x.any() for x in at_pruned(grads).values())
    assert grads["3.bias"].all()

    # And they are those of a model whose weights are zero, where weights are kept.
    zeroed = copy.deepcopy(make())
    apply_(zeroed, MASKS)
    zeroed(inputs()).square().sum().backward()
    for name, p in zeroed.named_parameters():
        keep = MASKS.get(name, torch.tensor(T)).expand_as(p)
        torch.testing.assert_close(grads[name][keep], p.grad[keep])


def test_masked_call_under_torch_func():
    model = make().eval()
    params, x = {name: p.detach() for name, p in model.named_parameters()}, inputs()

    def loss(params):
        return masked_call(model, MASKS, x, params=params).square().sum()

    grads = torch.func.grad(loss)(params)
    assert not any(x.any() for x in at_pruned(grads).values())
    stacked = {name: torch.stack([p, 2 * p]) for name, p in params.items()}
    rows = torch.func.vmap(loss)(stacked)
    torch.testing.assert_close(rows[0], loss(params))
    torch.testing.assert_close(rows[1], loss({name: 2 * p for name, p in params.items()}))

    def of_masks(masks):
        return masked_call(model, masks, x, params=params).square().sum()

    both = {name: torch.stack([mask, ~mask]) for name, mask in MASKS.items()}
    torch.testing.assert_close(torch.func.vmap(of_masks)(both)[1], of_masks(PRUNED))


def test_masked_call_takes_some_params_and_buffers():
    model = make().eval()
    x = inputs()
    given = {"3.bias": torch.zeros(2), "1.running_mean": torch.ones(4)}
    other = copy.deepcopy(model)
    apply_(other, MASKS)
    with torch.no_grad():
        other[3].bias.zero_()
        other[1].running_mean.fill_(1)
    torch.testing.assert_close(masked_call(model, MASKS, x, params=given), other(x))


def test_running_statistics_are_written_as_ever():
    model = make()
    masked_call(model, MASKS, inputs())
    assert model[1].num_batches_tracked == 1


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(3, 2)
        self.head = nn.Linear(2, 3, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, i):
        return self.head(self.embed(i))


def test_a_shared_parameter_is_masked_in_all_its_places():
    model = Tied()
    with torch.no_grad():
        model.embed.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    masks = {"embed.weight": torch.tensor([[T, F]])}
    # (1, 0) times rows (1, 0), (3, 0), (5, 0).
    assert masked_call(model, masks, torch.tensor(0)).tolist() == [1, 3, 5]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with keep_pruned(model, masks, optimizer):
        model(torch.tensor(0)).sum().backward()
        optimizer.step()
    assert not model.head.weight[:, 1].any()
    with pytest.raises(KeyError, match=r"'head.weight'; nearest: 'embed.weight'"):
        apply_(model, {"head.weight": torch.tensor([[T, F]])})


def test_masked_call_compiles_into_one_graph():
    model, x = make().eval(), inputs()
    params = dict(model.named_parameters())
    compiled = torch.compile(
        lambda params, x: masked_call(model, MASKS, x, params=params),
        fullgraph=True,
        backend="eager",
    )
    torch.testing.assert_close(compiled(params, x), masked_call(model, MASKS, x))


# Writing zeros once.


def test_apply_writes_zeros_in_place():
    model = make()
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    apply_(model, MASKS)
    assert_pruned(model)
    for name, p in model.named_parameters():
        same, old = before[name]
        keep = MASKS.get(name, torch.tensor(T)).expand_as(p)
        assert p is same
        assert p.requires_grad
        assert torch.equal(p[keep], old[keep])


# The hook.


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1, nesterov=True),
    "sgd_fused": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True, foreach=False),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=1e-2, max_iter=2),
}


@pytest.mark.parametrize("zero_moments", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pruned_weights_are_zero_after_every_step(name, zero_moments):
    model = make()
    optimizer = OPTIMIZERS[name](model.parameters())
    keep_pruned(model, MASKS, optimizer, zero_moments=zero_moments)
    for _ in range(50):
        if name == "lbfgs":

            def closure():
                optimizer.zero_grad()
                loss = model(inputs()).square().sum()
                loss.backward()
                return loss

            optimizer.step(closure)
        else:
            step(model, optimizer)
        assert_pruned(model)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw_fused", "rmsprop", "adagrad"])
def test_moments_of_pruned_weights(name):
    for zero_moments in (True, False):
        model = make()
        optimizer = OPTIMIZERS[name](model.parameters())
        step(model, optimizer)  # there are moments before there are masks
        keep_pruned(model, MASKS, optimizer, zero_moments=zero_moments)
        step(model, optimizer)
        params = dict(model.named_parameters())
        keys = [k for k, x in optimizer.state[params["0.weight"]].items() if x.ndim]
        assert keys
        for key in keys:
            moments = {name: optimizer.state[params[name]][key] for name in MASKS}
            assert any(x.any() for x in at_pruned(moments).values()) is not zero_moments
            assert moments["0.weight"][0].all()
        if "step" in optimizer.state[params["0.weight"]]:
            assert optimizer.state[params["0.weight"]]["step"] == 2


def test_a_scalar_parameter_keeps_its_step_count():
    model = nn.Module()
    model.scale = nn.Parameter(torch.tensor(2.0))
    optimizer = torch.optim.Adam(model.parameters())
    with keep_pruned(model, {"scale": torch.tensor(F)}, optimizer, zero_moments=True):
        model.scale.square().backward()
        optimizer.step()
    assert model.scale == 0
    assert optimizer.state[model.scale]["step"] == 1


def test_not_even_nan_survives_a_step():
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    keep_pruned(model, {"weight": torch.tensor([[T, F]])}, optimizer, zero_moments=True)
    model.weight.grad = torch.tensor([[1.0, torch.nan]])
    optimizer.step()
    assert model.weight[0, 1] == 0
    assert optimizer.state[model.weight]["momentum_buffer"].tolist() == [[1, 0]]


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex128])
def test_kept_weights_keep_every_bit(dtype):
    kept = [1.0, -0.0, torch.nan, -torch.inf, 1e-40]
    params = {"w": torch.tensor([kept, [torch.nan, -0.0, torch.inf, 5, 0]], dtype=dtype)}
    before = params["w"].view(torch.uint8).clone()
    optimizer = torch.optim.SGD(params.values())
    for mask in (torch.tensor([[T], [F]]), torch.tensor([[T] * 5, [F] * 5])):
        with keep_pruned(params, {"w": mask}, optimizer):
            optimizer.step()  # there are no gradients, so that only the hook writes
        after = params["w"].view(torch.uint8)
        assert torch.equal(after[0], before[0])
        assert not after[1].any()  # +0.0


def test_a_model_in_another_layout_or_dtype():
    model = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    mask = torch.rand(4, 4, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with keep_pruned(model, {"weight": mask}, optimizer, zero_moments=True):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            model.to(dtype)
            model.weight.grad = torch.ones_like(model.weight)
            optimizer.step()
            moments = optimizer.state[model.weight]["momentum_buffer"]  # stay float32
            for values in (model.weight, moments):
                assert torch.equal(values != 0, mask)


def test_several_groups_and_several_optimizers():
    model = make()
    both = torch.optim.SGD(
        [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[3].parameters()}],
        lr=0.01,
        momentum=0.9,
    )
    with keep_pruned(model, MASKS, both):
        step(model, both)
        assert_pruned(model)
    model = make()
    first = torch.optim.SGD(model[0].parameters(), lr=0.1)
    second = torch.optim.Adam(model[3].parameters())
    with keep_pruned(model, MASKS, first), keep_pruned(model, MASKS, second):
        step(model, first)
        step(model, second)
        assert_pruned(model)


def test_schedulers_and_clipping_go_on_around_it():
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    keep_pruned(model, MASKS, optimizer)
    for _ in range(3):
        step(model, optimizer)
        scheduler.step()
        assert_pruned(model)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0125)


class Wrapper(torch.optim.Optimizer):
    """As Accelerate wraps optimizers: the base class is never initialised."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def zero_grad(self):
        self.optimizer.zero_grad()

    def step(self):
        self.optimizer.step()


class PlainWrapper:
    def __init__(self, optimizer):
        self.optimizer = optimizer

    def __getattr__(self, name):
        return getattr(self.optimizer, name)


@pytest.mark.parametrize("wrap", [Wrapper, PlainWrapper, lambda o: PlainWrapper(Wrapper(o))])
def test_wrapped_optimizers(wrap):
    model = make()
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = wrap(inner)
    with keep_pruned(model, MASKS, optimizer, zero_moments=True):
        for _ in range(3):
            step(model, optimizer)
            assert_pruned(model)
    assert not inner._optimizer_step_post_hooks
    with pytest.raises(TypeError, match=r"optimizer must be .*got int; pass the torch optimizer"):
        keep_pruned(model, MASKS, 5)


def test_removing_the_hook():
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with keep_pruned(model, MASKS, optimizer) as handle:
        step(model, optimizer)
        assert_pruned(model)
    apply_(model, MASKS)
    step(model, optimizer)
    assert model[0].weight[1].any()
    handle.remove()  # again, without effect
    assert not optimizer._optimizer_step_post_hooks


def test_other_masks_from_the_next_step_on():
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = keep_pruned(model, MASKS, optimizer)
    step(model, optimizer)
    handle.set_masks({"3.weight": torch.tensor([[F], [T]])})
    step(model, optimizer)
    assert not model[3].weight[0].any()
    assert model[3].weight[1].all()
    with pytest.raises(KeyError, match=r"'3.weights'; nearest: '3.weight'"):
        handle.set_masks({"3.weights": torch.tensor(T)})
    step(model, optimizer)
    assert not model[3].weight[0].any()  # the old ones still hold


def test_the_model_knows_nothing_of_it():
    model, plain = make(), make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = keep_pruned(model, MASKS, optimizer)
    step(model, optimizer)
    masked_call(model, MASKS, inputs())
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other[0].weight, model[0].weight)
        other_optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
        step(other, other_optimizer)
        assert other[0].weight[1].any()
    # What torch does with hooks of a copied optimizer, which the docstring speaks of.
    assert not copy.deepcopy(optimizer)._optimizer_step_post_hooks
    optimizer.load_state_dict(optimizer.state_dict())
    step(model, optimizer)
    assert_pruned(model)
    handle.remove()


def test_mistakes_raise_and_nothing_is_written():
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    good = {"0.bias": MASKS["0.bias"]}
    before = model[0].bias.detach().clone()
    for bad, error, message in (
        ({"0.wieght": MASKS["0.weight"]}, KeyError, r"'0.wieght'; nearest: '0.weight'"),
        ({"0.weight": torch.tensor([T, F])}, ValueError, r"'0.weight'.*\(4, 3\), got \(2,\)"),
        (
            {"0.weight": torch.ones(4, 3)},
            TypeError,
            "'0.weight' must be boolean, got torch.float32",
        ),
        ({"1.running_max": MASKS["0.bias"]}, KeyError, "nearest: '1.running_mean'"),
    ):
        for call in (
            lambda masks: masked_call(model, masks, inputs()),
            lambda masks: apply_(model, masks),
            lambda masks: keep_pruned(model, masks, optimizer),
        ):
            with pytest.raises(error, match=message):
                call(good | bad)
    assert torch.equal(model[0].bias, before)
    assert not optimizer._optimizer_step_post_hooks
    for other in (make(), copy.deepcopy(model)):
        with pytest.raises(ValueError, match="holds none of the masked parameters"):
            keep_pruned(other, MASKS, optimizer)


def test_keep_pruned_takes_stacked_tensors_by_name():
    params = {"w": torch.ones(2, 3, requires_grad=True)}
    masks = {"w": torch.tensor([[T, F, T], [F, T, T]])}
    optimizer = torch.optim.SGD(params.values(), lr=0.5, momentum=0.9)
    with keep_pruned(params, masks, optimizer):
        for _ in range(2):
            optimizer.zero_grad()
            params["w"].sum().backward()
            optimizer.step()
    assert ((params["w"] == 0) == ~masks["w"]).all()
