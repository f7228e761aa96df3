"""The zoo itself: every model can be traced, and says something about its input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.coupling.zoo import MODELS


def test_names_are_unique():
    names = [entry.name for entry in MODELS]
    assert len(set(names)) == len(names)
    assert all(entry.name.startswith(entry.framework) for entry in MODELS)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("entry", MODELS, ids=lambda entry: entry.name)
def test_model(entry):
    fn, params, inputs = entry.build(jax.random.key(0))
    for leaf in jax.tree.leaves(params):
        assert isinstance(leaf, jax.Array)
        assert leaf.size == 1 or len(np.unique(leaf)) > 1 or leaf.dtype != jnp.float32
    traced = jax.jit(fn).trace(params, *inputs)
    outputs = jax.tree.leaves(traced.lower().compile()(params, *inputs))
    assert [x.aval.shape for x in traced.jaxpr.jaxpr.outvars] == [x.shape for x in outputs]
    for x in outputs:
        assert np.all(np.isfinite(x))
        assert x.size == 1 or np.std(x) > 1e-2
