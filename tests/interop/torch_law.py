"""Masked/shrunk equivalence of torch modules: the masked and the shrunk model are one function."""

import copy

import numpy as np
import torch
from torch.utils import _pytree as pytree


def state_of(model):
    """Parameters and buffers by name, each once."""
    found = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: tensor.detach() for name, tensor in found.items()}


def half(coupling, seed=0):
    """Half of the units of every group, chosen at random."""
    return coupling.lowest(np.random.default_rng(seed).random(coupling.n_units), 0.5)


def masked(model, masks):
    """A copy of the model with zeros where the masks are False."""
    found = copy.deepcopy(model)
    with torch.no_grad():
        for name, tensor in (*found.named_parameters(), *found.named_buffers()):
            if masks.get(name) is not None:
                tensor.masked_fill_(~masks[name], 0)
    return found


def floats(outputs):
    return [x for x in pytree.tree_leaves(outputs) if isinstance(x, torch.Tensor)]


def distance(one, other):
    """Largest difference of any output, relative to its largest value."""
    worst = 0.0
    for x, y in zip(floats(one), floats(other), strict=True):
        assert x.shape == y.shape
        x, y = x.detach(), y.detach()
        worst = max(worst, float((x - y).abs().max() / x.abs().max().clamp(min=1e-30)))
    return worst


def gradients(model, inputs):
    """Gradients of a fixed sum of all outputs, by the names of the parameters."""
    model = copy.deepcopy(model)
    total = 0
    for i, x in enumerate(floats(model(*inputs))):
        weights = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).reshape(x.shape) + 0.1 * i
        total = total + (weights * x).sum()
    if total.requires_grad:
        total.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check_law(model, inputs, masks, small, plan, tolerance=1e-10):
    """Asserts that outputs and gradients of kept parameters agree."""
    reference = masked(model, masks)
    assert distance(reference(*inputs), small(*inputs)) <= tolerance
    full, cut = gradients(reference, inputs), gradients(small, inputs)
    expected = plan.apply(full)
    scale = max((float(g.abs().max()) for g in expected.values()), default=1.0)
    for name, gradient in expected.items():
        if name in cut:
            assert float((gradient - cut[name]).abs().max()) <= tolerance * max(scale, 1e-30), name
        else:  # a parameter that is not read any more
            assert float(gradient.abs().max()) <= tolerance * scale, name
