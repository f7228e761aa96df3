"""The README's example of statistics in PyTorch; what differs from JAX is marked."""

import torch  # changed
from torch import nn  # changed

import purepruning as pp
from purepruning.stats import activations, gradients
from purepruning_interop import torch as interop  # changed

batches = torch.randn(20, 32, 784)  # changed
model = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 10))  # changed
params = dict(model.named_parameters())  # changed

layers = interop.layers(model)  # changed
rules = [{"sparsity": 0.5, "op_names": ["0"]}]  # changed
config = pp.resolve(rules, layers, granularity="output_channel")


def update(active, slopes, params, x):
    def loss(params):
        y, outputs = interop.capture(model, x, params=params, layers=config.layers)  # changed
        return (y**2).mean(), outputs

    grads, outputs = torch.func.grad(loss, has_aux=True)(params)  # changed
    active = activations.update(active, outputs, config, activation="relu")
    return active, gradients.update(slopes, params, grads, config)


active, slopes = activations.init(params, config), gradients.init(params, config)
for x in batches:
    active, slopes = update(active, slopes, params, x)
print(pp.summarize(params, pp.apoz_rank(params, active, config), layers))
print(pp.summarize(params, pp.taylor_fo(params, slopes, config), layers))
