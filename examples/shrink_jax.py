"""Which channels are coupled, pruning them, and the smaller model: JAX."""

import jax
from flax import linen as nn

import purepruning as pp
from purepruning_interop import linen


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(32, (3, 3), name="stem")(x))
        x = x + nn.Conv(32, (3, 3), name="block")(x)  # what is added has the same channels
        return nn.Dense(10, name="head")(x.mean((1, 2)))


def fn(params, x):
    return Net().apply({"params": params}, x)


x = jax.random.normal(jax.random.key(0), (8, 28, 28, 1))
params = Net().init(jax.random.key(1), x)["params"]

layers = linen.layers(Net(), params, x)
coupling = pp.couple(fn, params, x)
print(coupling)
rules = [{"sparsity": 0.5, "op_types": ["Conv2d"]}]
config = pp.resolve(rules, layers, coupling=coupling)
masks = pp.l1_norm(params, None, config)
small = pp.shrink(fn, params, masks, coupling, x)
print(small.report)
y = jax.jit(small.fn)(small.params, x)
print(abs(y - fn(pp.apply_masks(params, small.report.masks), x)).max())
