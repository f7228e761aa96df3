"""The same as ``shrink_jax.py`` for a torch module: ``python examples/shrink_torch.py``."""

import torch
from torch import nn

import purepruning as pp
from purepruning_interop import torch as interop


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 32, 3, padding="same")
        self.block = nn.Conv2d(32, 32, 3, padding="same")
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        x = self.stem(x).relu()
        x = x + self.block(x)  # what is added has the same channels
        return self.head(x.mean((2, 3)))


x = torch.randn(8, 1, 28, 28)
model = Net()
params = dict(model.named_parameters())

layers = interop.layers(model)
coupling = interop.couple(model, x)
print(coupling)
rules = [{"sparsity": 0.5, "op_types": ["Conv2d"]}]
config = pp.resolve(rules, layers, coupling=coupling)
masks = pp.l1_norm(params, None, config)
small = interop.shrink(model, masks, coupling, x)
print(small.model, small.report)
masked = pp.apply_masks(params, small.report.masks)
print((small.model(x) - torch.func.functional_call(model, masked, (x,))).abs().max())
