"""Uses the installed wheel, in an environment that has its required dependencies and nothing else.

Usage, from a directory that is not the checkout: python -P smoke.py
"""

import importlib.metadata
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp

import purepruning as pp
import purepruning_interop

for name in ("torch", "array_api_compat", "flax", "equinox", "haiku", "keras"):
    assert importlib.util.find_spec(name) is None, f"the environment is not clean: it has {name}"

for package in (pp, purepruning_interop):
    folder = Path(package.__file__).parent
    assert folder.parent.name == "site-packages", f"{folder} does not come from the wheel"
    assert (folder / "py.typed").is_file(), f"{folder} has no py.typed"
assert pp.__version__ == importlib.metadata.version("purepruning")

key = jax.random.key(0)
params = {"hidden": {"w": jax.random.normal(key, (6, 8)), "b": jnp.zeros(8)}}
layer = pp.make_layer(params, "hidden.w", "Linear", out_axes=1, in_axes=0)
config = pp.resolve([{"sparsity": 0.5, "op_types": ["Linear"]}], [layer])
masks = pp.level(params, None, config)
assert masks["hidden"]["b"] is None
assert int(masks["hidden"]["w"].sum()) == 24, masks

params["out"] = jax.random.normal(key, (8, 2))


def fn(params, x):
    return jnp.tanh(x @ params["hidden"]["w"] + params["hidden"]["b"][None]) @ params["out"]


x = jnp.ones((1, 6))
coupling = pp.couple(fn, params, x)
small = pp.shrink(fn, params, coupling.masks([1, 2, 3], params), coupling, x)
assert small.params["out"].shape == (5, 2)
assert small.fn(small.params, x).shape == (1, 2)
print(f"purepruning {pp.__version__} from the wheel: density {pp.density(masks, params)}")
