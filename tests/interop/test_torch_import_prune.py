"""What ``torch.nn.utils.prune`` leaves in a module, as masks and plain parameters."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import purepruning as pp
from purepruning_interop import torch as ppt

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def build():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)
    ).eval()


def pruned():
    model = build()
    prune.ln_structured(model[0], "weight", amount=1, n=1, dim=0)
    prune.random_unstructured(model[0], "bias", amount=1)
    prune.l1_unstructured(model[4], "weight", amount=0.3)
    prune.random_unstructured(model[4], "weight", amount=0.5)  # a second time: one mask of both
    return model


@pytest.mark.parametrize("given", ["module", "state dict"])
def test_masks_and_state_of_a_pruned_model(given):
    model = pruned()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    masks, state = ppt.masks_from_torch_prune(model if given == "module" else model.state_dict())
    assert sorted(masks) == ["0.bias", "0.weight", "4.weight"]
    assert {x.dtype for x in masks.values()} == {torch.bool}
    assert [int((~masks[n]).sum()) for n in ("0.weight", "0.bias", "4.weight")] == [27, 1, 208]
    plain = build()
    plain.load_state_dict(state)  # strict: neither more nor less
    assert torch.equal(plain[4].weight, model[4].weight_orig)
    masked = pp.apply_masks(dict(plain.named_parameters()), masks)
    found = torch.func.functional_call(plain, masked, (X,))
    torch.testing.assert_close(found, model(X), rtol=0, atol=0)
    torch.testing.assert_close(ppt.masked_call(plain, masks, X), model(X), rtol=0, atol=0)
    after = model.state_dict()
    assert all(torch.equal(x, after[name]) for name, x in before.items())
    assert before.keys() == after.keys()


def test_masks_come_back_from_where_they_are_put():
    model = build()
    config = pp.resolve(0.5, ppt.layers(model))
    masks = pp.level(dict(model.named_parameters()), None, config)
    there = copy.deepcopy(model)
    for name, mask in masks.items():
        if mask is not None:
            layer, _, parameter = name.rpartition(".")
            prune.custom_from_mask(there.get_submodule(layer), parameter, mask)
    found, state = ppt.masks_from_torch_prune(there)
    assert found.keys() == {name for name, mask in masks.items() if mask is not None}
    assert all(torch.equal(found[name], masks[name]) for name in found)
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())


def test_a_module_that_is_shared_has_one_mask():
    layer = prune.l1_unstructured(nn.Linear(4, 4), "weight", amount=3)
    masks, state = ppt.masks_from_torch_prune(nn.ModuleDict({"a": layer, "b": layer}))
    assert sorted(masks) == ["a.weight"]
    assert sorted(state) == ["a.bias", "a.weight", "b.bias", "b.weight"]


def test_a_buffer_of_that_name_is_a_buffer():
    layer = prune.identity(nn.Linear(4, 4), "weight")
    layer.register_buffer("causal_mask", torch.ones(4))
    masks, state = ppt.masks_from_torch_prune(layer)
    assert masks["weight"].all()
    assert sorted(state) == ["bias", "causal_mask", "weight"]


def test_what_is_not_pruned_so_is_refused():
    with pytest.raises(ValueError, match=r"nothing is pruned .*use purepruning\.masks_from_zeros"):
        ppt.masks_from_torch_prune(build())
    layer = prune.custom_from_mask(nn.Linear(2, 2), "weight", torch.full((2, 2), 0.5))
    with pytest.raises(ValueError, match=r"'weight_mask' must hold 0 and 1, got 0.5"):
        ppt.masks_from_torch_prune(layer)
    with pytest.raises(TypeError, match="instance or a state dict"):
        ppt.masks_from_torch_prune([1])
