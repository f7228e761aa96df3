"""Settings every test runs under: implicit conversions of arrays are errors.

The number of devices is left alone: a test that needs several starts a subprocess with
``XLA_FLAGS=--xla_force_host_platform_device_count=8``, so that the rest run as in a user's program.
"""

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# The same examples on every machine, and no time limit: the first example of a shape compiles.
# To look for new counterexamples: pytest --hypothesis-profile=explore
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000)
hypothesis.settings.load_profile("fixed")


@pytest.fixture
def standard_promotion():
    """Lets dtypes promote, for a test that runs code which is not ours and relies on it.

    ``optax.adam`` raises a float to the power of its int32 step count, an error in strict mode.
    """
    with jax.numpy_dtype_promotion("standard"):
        yield
