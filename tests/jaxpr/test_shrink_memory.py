"""What shrinking takes besides its result."""

import subprocess
import sys

import pytest

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
import purepruning as pp

N, LAYERS = 1024, 32
params = {f"l{i}": {"up": jnp.full((N, 2 * N), 0.01, jnp.bfloat16),
                    "down": jnp.full((2 * N, N), 0.01, jnp.bfloat16)} for i in range(LAYERS)}

def fn(p, x):
    for i in range(LAYERS):
        x = x + jax.nn.relu(x @ p[f"l{i}"]["up"]) @ p[f"l{i}"]["down"]
    return x

x = jax.ShapeDtypeStruct((1, N), jnp.bfloat16)
coupling = pp.couple(fn, params, x)
pruned = coupling.lowest(np.random.default_rng(0).random(coupling.n_units), 0.5)
masks = coupling.masks(pruned, params)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = int(open("/proc/self/statm").read().split()[1]) * 4096
small = pp.shrink(fn, params, masks, coupling, x, donate=DONATE)
peak = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) * 1024
result = sum(leaf.nbytes for leaf in jax.tree.leaves(small.params))
assert result == 2 * N * 2 * N * LAYERS  # bytes, half of the parameters
print((peak - before) / result)
"""


@pytest.mark.parametrize(("donate", "limit"), [(False, 1.5), (True, 0.5)])
def test_parameters_are_cut_one_by_one(donate, limit):
    """No masked copy of the whole model is made: 256 MiB of bfloat16 become 128.

    Where they may be deleted, the small model takes the place of what was cut.
    """
    program = PROGRAM.replace("DONATE", str(donate))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < limit
