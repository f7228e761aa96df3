"""The README's example in PyTorch; what differs from JAX is marked."""

from torch import nn  # changed

import purepruning as pp
from purepruning_interop import torch as interop  # changed

model = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 10))  # changed
params = dict(model.named_parameters())  # changed

layers = interop.layers(model)  # changed
config = pp.resolve(0.8, layers)
masks = pp.level(params, None, config)
params = pp.apply_masks(params, masks)
print(pp.summarize(params, masks, layers))
