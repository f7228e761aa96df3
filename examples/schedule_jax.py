"""Prune as training goes on, in an Optax chain."""

import jax
import optax

import purepruning as pp

params = {"w": jax.random.normal(jax.random.key(0), (784, 10))}
layers = [pp.make_layer(params, "w", "Linear", out_axes=1, in_axes=0)]
config = pp.resolve(0.8, layers)
tx = optax.chain(optax.adam(1e-3), pp.prune_on_schedule(pp.level, pp.agp(end_step=9), config))
state, update = tx.init(params), jax.jit(tx.update)
for _ in range(10):
    updates, state = update(params, state, params)  # your gradients, as the first argument
    params = optax.apply_updates(params, updates)
print(pp.summarize(params, pp.get_masks(state, params), layers))
