"""Searches are small programs that run a few times: what takes time is compiling them."""

import jax
import pytest


@pytest.fixture(autouse=True)
def _compile_fast():
    """Compiles without most optimisations."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
