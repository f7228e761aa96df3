"""Eager calls on one CPU compile nothing and copy no parameters, in both frameworks."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import purepruning as pp
from purepruning.arrays import by_numpy
from purepruning.pruners.magnitude import element
from purepruning.selection import kth_host
from tests.explore import surface as table
from tests.explore.world import sides
from tests.modes import as_jax, as_torch, moved
from tests.test_laws import ROWS, integers

COMPILED = "/jax/core/compile/backend_compile_duration"

#: What is compiled on purpose, or is not ours.
COMPILES = {
    "stats.activations.update": "one function for each output, of which only sums are kept",
    "keep_pruned(sgd).init": "Optax's zeros",
    "keep_pruned(sgd).update": "Optax's momentum",
    **dict.fromkeys(("hessian_gradient", "synaptic_flow"), "the caller's function, differentiated"),
    "prune [jax]": "criteria of users are given arrays of the parameters' framework",
    "sparse_training": "Optax transforms hold arrays",
    "annealing": "steps are compiled, as they run by the thousand",
    "quantize.": "quantizers are called inside of losses, which are compiled",
}


@pytest.fixture
def compiled():
    """The names of what XLA has compiled since the test began, in a process that starts anew."""
    found = []

    def listen(event, duration, **about):
        if event == COMPILED:
            found.append(about.get("fun_name", "?"))

    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


def test_what_is_compiled_is_counted(compiled):
    jnp.asarray(np.ones(3)) + jnp.ones(3)
    assert compiled


@pytest.mark.parametrize("framework", [as_jax, as_torch])
def test_no_pruner_compiles(framework, compiled):
    for row in ROWS:
        params, stats = framework(integers()), moved(framework, row.statistics(integers()))
        compiled.clear()
        pp.apply_masks(params, row.pruner(params, stats, row.config()))
        assert not compiled, row


# Users run with the promotion that JAX comes with.
@pytest.mark.usefixtures("standard_promotion")
def test_no_other_function_compiles(compiled):
    found = (*table.surface(slow=False), *table.structure_calls(sides()[0]))
    calls = [call for call in found if call.works and call.name != "shrunk.fn"]
    assert len(calls) > 150
    wrong = {}
    for call in calls:
        arguments = {name: arg.value() for name, arg in call.args.items()}
        compiled.clear()
        call(arguments)
        if compiled and not call.name.startswith((*COMPILES,)):
            wrong[call.name] = compiled[:3]
    assert not wrong


@pytest.mark.parametrize("framework", ["jax", "torch"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_kth_lowest_copies_little(framework, dtype):
    values = np.random.default_rng(0).standard_normal(8_000_000, np.float32).astype(dtype)
    if framework == "jax":
        values = jax.device_put(values)
    else:
        values = torch.from_numpy(values.view(f"i{values.itemsize}")).view(getattr(torch, dtype))

    def cut(values):
        (found,) = kth_host.local_cuts([element(values, None)], [4_000_000])
        return found.key[0]

    tracemalloc.start()
    by_numpy(cut, values)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # A sample, a chunk, and what lies near the cut; of 100 million values it is less than a 25th.
    assert most < 0.1 * 4 * 8_000_000
