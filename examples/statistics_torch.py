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


def update(activation_stats, gradient_stats, params, x):
    def loss(params):
        y, outputs = interop.capture(model, x, params=params, layers=config.layers)  # changed
        return (y**2).mean(), outputs

    grads, outputs = torch.func.grad(loss, has_aux=True)(params)  # changed
    activation_stats = activations.update(activation_stats, outputs, config, activation="relu")
    return activation_stats, gradients.update(gradient_stats, params, grads, config)


activation_stats = activations.init(params, config)
gradient_stats = gradients.init(params, config)
for x in batches:
    activation_stats, gradient_stats = update(activation_stats, gradient_stats, params, x)
print(pp.summarize(params, pp.apoz_rank(params, activation_stats, config), layers))
print(pp.summarize(params, pp.taylor_fo(params, gradient_stats, config), layers))
