"""What the tests of all adapters' ``capture`` share."""

import jax
import numpy as np


def assert_outputs(outputs, expected, rtol=1e-5):
    """Compares names, structure, shapes and numbers; ``expected`` is computed by hand."""
    assert sorted(outputs) == sorted(expected)
    assert jax.tree.structure(outputs) == jax.tree.structure(dict(expected))
    for found, wanted in zip(jax.tree.leaves(outputs), jax.tree.leaves(expected), strict=True):
        assert tuple(found.shape) == tuple(wanted.shape)
        # The order of a float32 sum differs between a program run by parts and as a whole.
        np.testing.assert_allclose(np.asarray(found), np.asarray(wanted), rtol=rtol, atol=1e-5)
