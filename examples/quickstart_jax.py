"""The README's example in JAX: from a Flax model to a pruned one."""

import jax
from flax import linen as nn

import purepruning as pp
from purepruning_interop import linen

x = jax.numpy.ones((1, 784))
model = nn.Sequential([nn.Dense(300), nn.relu, nn.Dense(10)])
params = model.init(jax.random.key(0), x)["params"]

layers = linen.layers(model, params, x)
config = pp.resolve(0.8, layers)
masks = pp.level(params, None, config)
params = pp.apply_masks(params, masks)
print(pp.summarize(params, masks, layers))
