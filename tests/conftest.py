"""Settings every test runs under: implicit conversions of arrays are errors.

The number of devices is left alone: a test that needs several starts a subprocess with
``XLA_FLAGS=--xla_force_host_platform_device_count=8``, so that the rest run as in a user's program.
"""

import gc
import os
import tempfile

import hypothesis
import jax
import pytest

from tests.fast import compiled_quickly

# Threads that wait for one another cost small tensors ten times what they bring, and more where
# several processes share the cores. Read when torch is imported; the fixture `threads` has more.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Read when Keras is imported.
os.environ.setdefault("KERAS_BACKEND", "jax")

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# The same examples on every machine, and no time limit: the first example of a shape compiles.
# To look for new counterexamples: pytest --hypothesis-profile=explore
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000)
# As many examples as usual, but others every time: for continuous integration.
hypothesis.settings.register_profile("fresh", deadline=None, print_blob=True)
hypothesis.settings.load_profile("fixed")


def pytest_addoption(parser):
    parser.addoption(
        "--full", action="store_true", help="run every case of the products that tests choose from"
    )


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "full: a case of a product that others cover, which runs with --full"
    )
    if jax.config.jax_compilation_cache_dir is None:
        _share_compiled(config)


def _share_compiled(config):
    """Keeps what is compiled for all of this process's tests: a third of it is asked for again.

    Every worker has a folder of its own, since files are not written at once.
    """
    folder = tempfile.TemporaryDirectory(prefix="purepruning-tests-")
    config.add_cleanup(folder.cleanup)
    jax.config.update("jax_compilation_cache_dir", folder.name)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--full"):
        left_out = [item for item in items if item.get_closest_marker("full")]
        items[:] = [item for item in items if not item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=left_out)


def pytest_collection_finish(session):
    """Keeps the collector of garbage from going through all that imports have made, every time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def unoptimized():
    """Compiles in less time, for a module of tests of what no order of operations changes."""
    with compiled_quickly():
        yield
    jax.clear_caches()


@pytest.fixture
def threads():
    """Four threads for torch, for a test of tensors so large that they share the work."""
    import torch

    torch.set_num_threads(4)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def rank_promotion():
    """Lets ranks promote, for a test that runs Keras: its layers add a bias to a batch."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def standard_promotion():
    """Lets dtypes promote, for a test that runs code which is not ours and relies on it.

    ``optax.adam`` raises a float to the power of its int32 step count, an error in strict mode.
    """
    with jax.numpy_dtype_promotion("standard"):
        yield
