"""The README's example of statistics in JAX: what channels do and what the loss would notice."""

import jax
from flax import linen as nn

import purepruning as pp
from purepruning.stats import activations, gradients
from purepruning_interop import linen

batches = jax.random.normal(jax.random.key(0), (20, 32, 784))
model = nn.Sequential([nn.Dense(300), nn.relu, nn.Dense(10)])
params = model.init(jax.random.key(1), batches[0])["params"]

layers = linen.layers(model, params, batches[0])
rules = [{"sparsity": 0.5, "op_names": ["layers_0"]}]
config = pp.resolve(rules, layers, granularity="output_channel")


@jax.jit
def update(activation_stats, gradient_stats, params, x):
    def loss(params):
        y, outputs = linen.capture(model, params, x, layers=config.layers)
        return (y**2).mean(), outputs

    grads, outputs = jax.grad(loss, has_aux=True)(params)
    activation_stats = activations.update(activation_stats, outputs, config, activation="relu")
    return activation_stats, gradients.update(gradient_stats, params, grads, config)


activation_stats = activations.init(params, config)
gradient_stats = gradients.init(params, config)
for x in batches:
    activation_stats, gradient_stats = update(activation_stats, gradient_stats, params, x)
print(pp.summarize(params, pp.apoz_rank(params, activation_stats, config), layers))
print(pp.summarize(params, pp.taylor_fo(params, gradient_stats, config), layers))
